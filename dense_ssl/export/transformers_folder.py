"""A folder that `transformers.AutoModel.from_pretrained` reads, written without transformers.

Where transformers is installed it is also run, in a process of its own outside this project's folder: the
name `kernels` is another package's there.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import nn

from dense_ssl.export.card import model_card
from dense_ssl.export.plain import only_resnets
from dense_ssl.export.source import (
    MEAN,
    STD,
    Checked,
    Differs,
    Source,
    described,
    features,
    images,
    other_sides,
    plain_timm,
    read_written,
    within_rounding,
)
from dense_ssl.export.target import Draft, Target, write
from dense_ssl.weights.fewer_tokens import timm_options
from dense_ssl.weights.fingerprint import weights_sha256
from dense_ssl.weights.transformers_names import from_transformers, to_transformers

NAME = "transformers"
ABSENT = 3  # exit code of the check where transformers cannot be imported
_BICUBIC = 3  # Pillow's number of the filter
_USAGE = """
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("FOLDER")
model = AutoModel.from_pretrained("FOLDER").eval()
features = model(**processor(image, return_tensors="pt")).last_hidden_state
"""


def _obstacle(source: Source) -> str | None:
    """Return why transformers has no such network, or None."""
    other = f"transformers has no layout for {source.arch}; take timm"
    if not source.is_resnet:
        fits = set(source.trunk) == set(from_transformers(to_transformers(source.trunk)))
        trunk: Any = source.loaded.backbone.trunk
        mlp = trunk.blocks[0].mlp
        exact = isinstance(mlp.act, nn.GELU) and mlp.act.approximate == "none"
        return None if fits and exact and mlp.fc1.out_features % trunk.embed_dim == 0 else other
    if only_resnets(source) is not None:
        return other
    bottleneck = "layer1.0.conv3.weight" in source.trunk
    convolution = source.trunk["layer1.0.conv2.weight"]
    out = source.trunk[f"layer1.0.conv{3 if bottleneck else 2}.weight"].shape[0]
    inner = out // 4 if bottleneck else out
    plain = source.trunk["conv1.weight"].shape[1:] == (3, 7, 7)
    return None if plain and convolution.shape[:2] == (inner, inner) else other


def _drafts(source: Source) -> list[Draft]:
    return [Draft(NAME, lambda folder: _write(folder, source), _check)]


def _write(folder: Path, source: Source) -> None:
    folder.mkdir()
    state = to_transformers(source.trunk)
    write(folder / "model.safetensors", save(state, metadata=described(source)))
    config, outputs = _resnet_config(source) if source.is_resnet else _vit_config(source)
    for name, content in {
        "config.json": config | {"torch_dtype": "float32"},
        "preprocessor_config.json": _processing(224 if source.is_resnet else source.side),
    }.items():
        write(folder / name, (json.dumps(content, indent=2) + "\n").encode())
    write(folder / "README.md", model_card(source, "transformers", _USAGE, outputs).encode())


def _vit_config(source: Source) -> tuple[dict[str, Any], str]:
    trunk: Any = source.loaded.backbone.trunk
    block = trunk.blocks[0]
    config = {
        "architectures": ["Dinov2WithRegistersModel"],
        "model_type": "dinov2_with_registers",
        "hidden_size": trunk.embed_dim,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features // trunk.embed_dim,
        "num_register_tokens": source.class_tokens - 1,
        "image_size": trunk.patch_embed.img_size[0],
        "patch_size": trunk.patch_embed.patch_size[0],
        "num_channels": 3,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "layer_norm_eps": block.norm1.eps,
        "layerscale_value": 1.0,
        "use_swiglu_ffn": False,
    }
    second = (
        "; the register is the second class token, with its position in it"
        if source.class_tokens == 2
        else ""
    )
    outputs = (
        f"`features` is [1, {source.class_tokens} + N, D]: the class token, {source.class_tokens - 1} "
        f"register(s), then the cells row by row{second}. The layout is DINOv2's with all layer scales 1, "
        "whatever the method. `Dinov2WithRegistersBackbone.from_pretrained` gives maps for dense tasks."
    )
    return config, outputs


def _resnet_config(source: Source) -> tuple[dict[str, Any], str]:
    trunk = source.trunk
    bottleneck = "layer1.0.conv3.weight" in trunk
    blocks = [name.split(".")[:2] for name in trunk if name.startswith("layer")]
    last = "conv3" if bottleneck else "conv2"
    config = {
        "architectures": ["ResNetModel"],
        "model_type": "resnet",
        "layer_type": "bottleneck" if bottleneck else "basic",
        "embedding_size": trunk["conv1.weight"].shape[0],
        "hidden_sizes": [trunk[f"layer{s}.0.{last}.weight"].shape[0] for s in (1, 2, 3, 4)],
        "depths": [
            1 + max(int(block) for stage, block in blocks if stage == f"layer{s}")
            for s in (1, 2, 3, 4)
        ],
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,  # the stride is in the 3 x 3 convolution, as in torchvision
        "num_channels": 3,
    }
    return config, "`features` is the last map, [1, D, h, w], at stride 32."


def _processing(side: int) -> dict[str, Any]:
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(side / 0.875)},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }


def _check(path: Path, source: Source) -> Checked:
    """Compare the tensors by name in timm, and the outputs where transformers is installed."""
    state = read_written(path / "model.safetensors")
    if weights_sha256(state) != weights_sha256(to_transformers(source.trunk)):
        raise Differs("it does not read back to its own weights")
    plain = plain_timm(source, from_transformers(state), timm_options("timm", source.class_tokens))
    difference = float((features(plain, images(source.side)) - source.features).abs().max())
    description = f"names mapped back into timm {timm.__version__} {source.arch}, strict"
    if difference != 0.0:
        raise Differs(f"{description} gives features that differ by {difference:.3g}")
    return _run_transformers(path, source) or Checked(
        f"{description}; transformers is not installed here, so it was not run", difference
    )


def _run_transformers(path: Path, source: Source) -> Checked | None:
    """Return the comparison with what transformers makes of the folder; None where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    sizes = {"own": (source.side, source.side), "other": other_sides(source)}
    with tempfile.TemporaryDirectory() as aside:
        save_file({name: images(*size).contiguous() for name, size in sizes.items()}, f"{aside}/in")
        script = Path(__file__).with_name("transformers_check.py")
        # -P and another folder: `kernels` must not be found here.
        command = [sys.executable, "-P", str(script), str(path.resolve()), "in", "out"]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(command, cwd=aside, env=environment, capture_output=True, text=True)
        if done.returncode == ABSENT:
            return None
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise Differs(f"transformers cannot use it: {last[:200]}")
        found = load_file(f"{aside}/out")
        with safe_open(f"{aside}/out", "pt") as stream:
            about = stream.metadata()
    description = f"transformers {about['version']} {about['model']}"
    difference = within_rounding(found["own"], source.features, description)
    ours = features(source.standard, images(*sizes["other"]))
    elsewhere = float((found["other"] - ours).abs().max())
    size = " x ".join(map(str, sizes["other"]))
    remarks = {"other_size": size, "max_abs_diff_at_other_size": elsewhere}
    return Checked(description, difference, remarks=remarks)


TRANSFORMERS = Target(_obstacle, _drafts)
