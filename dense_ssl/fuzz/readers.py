"""How each kind of file is read in earnest: the calls that the commands make. Each is given a folder."""

import argparse
import contextlib
import json
import math
from pathlib import Path

import numpy as np
import torch

from dataprep import sources
from dataprep.encode import EncodeOptions, encode
from dataprep.verify import verify
from dense_ssl import checkpoint as checkpoints
from dense_ssl import replay
from dense_ssl.config import apply_override, load, read_yaml
from dense_ssl.evaluation import coco as coco_data
from dense_ssl.evaluation import features
from dense_ssl.evaluation.detection.voc import read_voc
from dense_ssl.evaluation.matching import davis, hummingbird
from dense_ssl.evaluation.omissions import Omissions
from dense_ssl.evaluation.results import BASELINES, stored_baseline
from dense_ssl.fuzz.sound import SPLIT
from dense_ssl.loaders.source import ShardSource, decode, upright_size
from dense_ssl.log import keep_lines_before
from dense_ssl.micro_batches import noted
from dense_ssl.report.__main__ import write_report
from dense_ssl.run_config import RunConfig
from dense_ssl.weights.pretrained import load_backbone

MOST = 100  # records of a set, files of an archive, ...


def config(folder: Path) -> None:
    """Read a recipe."""
    read_yaml(folder / "recipe.yaml")
    load(RunConfig, folder / "recipe.yaml")


def override(folder: Path) -> None:
    """Read one `key=value` of the command line."""
    text = (folder / "override.txt").read_text(errors="replace")
    apply_override({"train": {"epochs": 1}, "views": [{}]}, text)


def shards(folder: Path) -> None:
    """Open a shard set as training does, read its records, and verify it."""
    source = ShardSource(folder)
    for index in range(min(len(source.sizes), MOST)):
        try:
            decode(source.read(index))
        except (OSError, ValueError):  # what a loader replaces
            continue
    _ = source.manifest.names
    verify(folder)


def picture(folder: Path) -> None:
    """Decode a picture for training, and encode it for a shard."""
    path = folder / "picture.jpg"
    upright_size(path)
    with contextlib.suppress(OSError, ValueError):
        decode(path.read_bytes())
    encode(path.read_bytes(), EncodeOptions(size=32))


def archive(folder: Path) -> None:
    """List the images of an archive, and read them."""
    (path,) = (path for path in folder.iterdir() if path.suffix in (".zip", ".tar"))
    listing = sources.list_source("folder", path, "")
    reader = sources.Reader(listing)
    try:
        for index in range(min(len(listing), MOST)):
            try:
                reader.read(index)
            except sources.Unreadable:  # goes to the quarantine list
                continue
    finally:
        reader.close()


def checkpoint(folder: Path) -> None:
    """Resume from a folder of checkpoints; read one for evaluation."""
    path = folder / "checkpoints" / "step-00000002.pt"
    record = path.with_suffix(".json")
    if not record.is_file():  # who damages one on purpose writes its checksum, too
        record.write_text(json.dumps({"sha256": checkpoints.file_sha256(path)}))
    try:
        checkpoints.load_newest(folder / "checkpoints")
    finally:
        load_backbone(str(path))


def weights(folder: Path) -> None:
    """Take a backbone from a file of weights."""
    (path,) = folder.glob("weights.*")
    load_backbone(f"{path}?arch=test_resnet")


def bundle(folder: Path) -> None:
    """Repeat a refused step."""
    (path,) = folder.glob("incidents/*.pt")
    replay.replayed(path, torch.device("cpu"))


def coco(folder: Path) -> None:
    """Read instance annotations, and draw their masks."""
    split = coco_data.read_split(folder, SPLIT, Omissions())
    for image in split.images:
        for instance in image.instances:
            coco_data.decode_mask(instance.segmentation, image.height, image.width)


def voc(folder: Path) -> None:
    """Read boxes of VOC's layout."""
    read_voc(folder, "2007", SPLIT, Omissions())


def feature_cache(folder: Path) -> None:
    """Read features that an evaluation has kept."""
    stored = features._load(folder / "features.pt")
    if stored is not None:
        features.Extracted(stored["features"], stored["kept"])


def memory_cache(folder: Path) -> None:
    """Read the memory of cells that an evaluation has kept."""
    hummingbird._stored(folder / "memory.safetensors")


def davis_cache(folder: Path) -> None:
    """Read the values of a sequence that an evaluation has kept."""
    video = davis.Video("cow", (), (), (1,), (8, 8), False)
    davis._stored(folder, video)


def page(folder: Path) -> None:
    """Write the page of a run."""
    write_report(folder)


def log(folder: Path) -> None:
    """Read a run's log for its page, and cut it for resuming."""
    write_report(folder)
    keep_lines_before(folder / "log.jsonl", 3)


def results(folder: Path) -> None:
    """Read what evaluations have kept, for the page and for the next evaluation."""
    write_report(folder)
    (folder / "eval.jsonl").rename(folder / BASELINES)
    stored_baseline(folder, "key")


def memory_note(folder: Path) -> None:
    """Read what a run has noted of its memory."""
    plain = argparse.Namespace(run=argparse.Namespace(dir=str(folder)))
    found = noted(plain)  # pyright: ignore[reportArgumentType]
    assert found is None or math.isfinite(np.float64(found))
