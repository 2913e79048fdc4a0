"""Sound files of every kind, small, to begin from."""

import io
import json
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from PIL import Image

from dataprep.convert import Manner, convert
from dataprep.job import Job
from dataprep.synthetic import random_image, write_random_images
from dataprep.write_ffcv import ALLOCATION, DESCRIPTOR, HEADER, SAMPLE
from dense_ssl import checkpoint
from dense_ssl.config import dump, validate
from dense_ssl.incidents import FORMAT, as_plain
from dense_ssl.loaders import DataConfig, make_loader
from dense_ssl.loaders.order import Order
from dense_ssl.methods import Method, make_method
from dense_ssl.run_config import RunConfig
from dense_ssl.weights import plain_pickle

SPLIT = "train"
RECIPE: dict[str, Any] = {
    "method": {
        "name": "moco",
        "views": [{"name": "global", "count": 2, "size": 32, "photometric": "moco_v2"}],
        "backbone": {"name": "test_resnet", "init": "fan_in"},
        "hidden_dim": 16, "out_dim": 8, "queue_length": 16,
    },
    "data": {"path": "shards", "loader": "folder", "workers": 0},
    "optim": {"lr": 0.05},
    "train": {"epochs": 2, "batch_size": 4, "precision": "fp32"},
    "run": {"dir": "run", "device": "cpu"},
}  # fmt: skip


def make(folder: Path) -> None:
    """Write folders of sound files (`shards`, `beton`, `coco`, `run`) and `seeds/TARGET/N` for targets."""
    write_random_images(folder / "images", 8, sizes=((32, 40),))
    manner = Manner(workers=1, max_bad=0, stream=io.StringIO(), say=lambda _: None)
    for name, kind in (("shards", "dali"), ("beton", "ffcv")):
        convert(Job("folder", folder / "images", "", folder / name, formats=(kind,)), manner)
    for name, content in {
        **_of_shards(folder / "shards"), **_of_a_beton(folder / "beton/ffcv/images.beton"),
        **_of_recipes(), **_pictures(), **_archives(folder / "images"),
        **_of_a_run(folder), **_of_evaluations(folder / "coco"), **_of_voc(folder / "voc" / "VOC2007"),
    }.items():  # fmt: skip
        seeds = folder / "seeds" / name
        seeds.mkdir(parents=True)
        for number, data in enumerate(content):
            (seeds / str(number)).write_bytes(data)


def _of_shards(shards: Path) -> dict[str, list[bytes]]:
    files = {
        "manifest": "manifest.json", "sizes": "sizes.npy", "labels": "labels.npy",
        "checksums": "checksums.npy", "names": "names.txt", "index": "dali/shard-000000.idx",
        "tar-shard": "dali/shard-000000.tar",
    }  # fmt: skip
    return {target: [(shards / name).read_bytes()] for target, name in files.items()}


def _of_a_beton(beton: Path) -> dict[str, list[bytes]]:
    """The two ends of an FFCV file: between them lie pages of 8 MiB."""
    whole = beton.read_bytes()
    table = 8 * ALLOCATION.itemsize
    head = HEADER.itemsize + 2 * DESCRIPTOR.itemsize + 8 * SAMPLE.itemsize
    return {"beton-head": [whole[:head]], "beton-table": [whole[-table:]]}


def _of_recipes() -> dict[str, list[bytes]]:
    config = validate(RunConfig, RECIPE, "sound")
    overrides = (
        b"train.epochs=3",
        b"views.0.size=[1, 2]",
        b"optim.lr={start: 0.1, end: 0}",
        b"a.b.c=&a [1, *a]",
    )
    short = b"method: {name: moco}\ntrain: &t {epochs: 2}\nrun: {dir: a}\nlist: [*t, *t]\nwhen: 2020-01-01\n"
    return {
        "config": [dump(config).encode(), short],
        "override": list(overrides),
        "memory-note": [b'{"micro_batch": 4}'],
    }


def _pictures() -> dict[str, list[bytes]]:
    image = Image.fromarray(random_image(40, 48, 0))
    options: list[dict[str, Any]] = [
        {"format": "JPEG"}, {"format": "JPEG", "progressive": True}, {"format": "PNG"},
        {"format": "WEBP"}, {"format": "GIF"}, {"format": "TIFF", "compression": "tiff_lzw"},
        {"format": "BMP"}, {"format": "JPEG2000"}, {"format": "PPM"},
    ]  # fmt: skip
    return {"picture": [_saved(image, **how) for how in options]}


def _saved(image: Image.Image, **how: Any) -> bytes:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    more: dict[str, Any] = {"exif": exif} if how["format"] in ("JPEG", "PNG", "WEBP") else {}
    image.save(file, **how, **more)
    return file.getvalue()


def _archives(images: Path) -> dict[str, list[bytes]]:
    packed, rolled, inner = io.BytesIO(), io.BytesIO(), io.BytesIO()
    files = sorted(images.glob("*.jpg"))
    with zipfile.ZipFile(packed, "w") as archive:
        for number, path in enumerate(files[:4]):
            method = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[number % 2]
            archive.write(path, f"class{number % 2}/{path.name}", method)
    with tarfile.open(fileobj=inner, mode="w") as archive:
        archive.add(files[3], files[3].name)
    with tarfile.open(fileobj=rolled, mode="w") as archive:
        for path in files[:3]:
            archive.add(path, f"class0/{path.name}")
        nested = tarfile.TarInfo("class1.tar")
        nested.size = len(inner.getvalue())
        archive.addfile(nested, io.BytesIO(inner.getvalue()))
    return {"zip": [packed.getvalue()], "tar": [rolled.getvalue()]}


def _of_a_run(folder: Path) -> dict[str, list[bytes]]:
    config = validate(RunConfig, RECIPE, "sound")
    torch.manual_seed(0)
    method = make_method(config.method)
    run = folder / "run" / "checkpoints"
    payload = {
        "step": 2, "epoch": 1.0, "config": config.model_dump(mode="json"), "data": {"images": 8},
        "method": method.state_dict(), "optimizer": {"state": {}, "param_groups": []},
        "scaler": {}, "meter": {}, "micro_batch": 4,
    }  # fmt: skip
    saved = checkpoint.save(run, payload, keep=1)
    trunk = method.student["backbone"].trunk.state_dict()  # pyright: ignore
    arrays = {name: value.numpy() for name, value in trunk.items()}
    return {
        "checkpoint": [saved.read_bytes()],
        "checksum": [saved.with_suffix(".json").read_bytes()],
        "bundle": [_stored(_bundle(folder, config, method))],
        "legacy-checkpoint": [_stored({"state_dict": trunk}, _use_new_zipfile_serialization=False)],
        "safetensors": [safetensors.torch.save(dict(trunk))],
        "pickle": [plain_pickle.dumps({"model": arrays, "matching_heuristics": True})],
        **_of_a_page(folder / "page", dump(config)),
    }


def _of_a_page(page: Path, config: str) -> dict[str, list[bytes]]:
    """What the page of a run is made of; in `page` it lies whole."""
    steps = [{"step": step, "epoch": step / 2} for step in (1, 2, 3)]
    files: dict[str, tuple[str, list[dict[str, Any]]]] = {
        "log": ("log.jsonl", [
            {**at, "loss": 1.5, "lr": 0.05, "images_per_s": 9.5, "data_wait": 0.1, "refused": 0, "eta_s": 3.0}
            for at in steps
        ]),
        "looks": ("watch.jsonl", [
            {**at, "rankme": 7.5, "most_rank": 8.0, "spread": 0.5, "match_one_cell": 40.0} for at in steps
        ]),
        "events": ("events.jsonl", [
            {"time": "2026-01-01 00:00", "kind": "started", "step": 0, "ranks": 1, "machine": "one"},
            {"time": "2026-01-01 00:01", "kind": "halved", "micro_batches": 2, "images": 4},
            {"time": "2026-01-01 00:02", "kind": "refused", "reason": "full"},
        ]),
    }  # fmt: skip
    page.mkdir()
    (page / "config.yaml").write_text(config)
    (page / "eval.jsonl").touch()
    for path, records in files.values():
        (page / path).write_text("".join(json.dumps(record) + "\n" for record in records))
    return {
        "settings": [config.encode()],
        **{target: [(page / path).read_bytes()] for target, (path, _) in files.items()},
    }


def _bundle(folder: Path, config: RunConfig, method: Method) -> Mapping[str, Any]:
    """Return what the guard of a run would keep of its first step."""
    data = DataConfig(path=str(folder / "shards"), loader="folder", workers=0)
    loader = make_loader(data, config.method.views, Order(8, 4), torch.device("cpu"))
    batch: Any = next(iter(loader.epoch(0)))
    return {
        "format": FORMAT, "config": config.model_dump(mode="json"),
        "step": {"index": 1, "steps_per_epoch": 2, "epochs": 2.0, "seed": 0},
        "epoch": 0, "rank": 0, "method": method.state_dict(), "batches": [as_plain(batch)],
    }  # fmt: skip


def _of_evaluations(folder: Path) -> dict[str, list[bytes]]:
    images = write_random_images(folder / SPLIT, 2, sizes=((24, 32),))
    entries = [
        {"id": i, "file_name": path.name, "height": 24, "width": 32}
        for i, path in enumerate(images)
    ]
    shapes: list[Any] = [
        [[2, 2, 20, 3, 18, 20, 4.5, 18.5], [1, 1, 5, 1, 5, 5]],
        {"size": [24, 32], "counts": [24 * 4, 24 * 8, 24 * 20]},
        {"size": [24, 32], "counts": "P3`7PN"},
    ]
    annotations = [
        {
            "id": i,
            "image_id": i % 2,
            "category_id": 1,
            "bbox": [2, 2, 18, 18],
            "iscrowd": 0,
            "segmentation": shape,
        }
        for i, shape in enumerate(shapes)
    ]
    instances = {
        "images": entries, "annotations": annotations,
        "categories": [{"id": 1, "name": "cow", "supercategory": "animal"}],
    }  # fmt: skip
    features = {
        "features": torch.randn(4, 3), "kept": torch.arange(4), "lost": torch.tensor([], dtype=torch.int64),
        "reasons": [],
    }  # fmt: skip
    memory = {"cells": torch.randn(4, 3).half(), "labels": torch.rand(4, 2).half()}
    result = {
        "protocol": "knn",
        "metric": "top1",
        "value": 40.5,
        "key": "key",
        "values": {"top1": 40.5},
    }
    return {
        "coco": [json.dumps(instances).encode()],
        "feature-cache": [_stored(features)],
        "memory-cache": [safetensors.torch.save(memory)],
        "results": [json.dumps(result).encode() + b"\n"],
        "davis-cache": [json.dumps([{"number": 1, "j": [0.5, 0.25], "f": [0.5, 1.0]}]).encode()],
    }


def _of_voc(folder: Path) -> dict[str, list[bytes]]:
    lists = folder / "ImageSets" / "Main"
    for place in (lists, folder / "JPEGImages", folder / "Annotations"):
        place.mkdir(parents=True)
    (lists / f"{SPLIT}.txt").write_text("cow\n")
    Image.fromarray(random_image(24, 32, 0)).save(folder / "JPEGImages" / "cow.jpg")
    box = "<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>20</xmax><ymax>18</ymax></bndbox>"
    text = (
        "<annotation><size><width>32</width><height>24</height></size>"
        f"<object><name>cow</name><difficult>0</difficult>{box}</object></annotation>"
    )
    return {"voc": [text.encode()]}


def _stored(content: Any, **how: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()
