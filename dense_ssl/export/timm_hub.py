"""A folder as timm keeps models on Hugging Face's hub: `timm.create_model("local-dir:FOLDER")`."""

import json
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save
from timm.data.config import resolve_model_data_config

from dense_ssl.export.card import IMAGENET_PROCESSING, model_card
from dense_ssl.export.source import Checked, Differs, Source, at_other_size, compare, described
from dense_ssl.export.target import Draft, Target, always, write
from dense_ssl.weights.fewer_tokens import timm_options

NAME = "timm-hub"
_USAGE = """
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:you/name"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
features = model.forward_features(transform(image).unsqueeze(0))
"""


def _drafts(source: Source) -> list[Draft]:
    return [Draft(NAME, lambda folder: _write(folder, source), _check)]


def _write(folder: Path, source: Source) -> None:
    folder.mkdir()
    write(folder / "model.safetensors", save(source.trunk, metadata=described(source)))
    write(folder / "config.json", (json.dumps(_config(source), indent=2) + "\n").encode())
    if source.is_resnet:
        outputs = "`features` is the last map, [1, D, h, w], at stride 32."
    else:
        outputs = (
            f"`features` holds {source.class_tokens} class token(s), then the cells row by row, [1, "
            f"{source.class_tokens} + N, D]. Any size that is a multiple of the patch will do."
        )
    write(folder / "README.md", model_card(source, "timm", _USAGE, outputs).encode())


def _config(source: Source) -> dict[str, Any]:
    trunk: Any = source.standard.trunk
    options: dict[str, Any] = dict(timm_options("timm", source.class_tokens))
    side = source.side
    if source.is_resnet:
        side = 224
    else:
        options |= {"img_size": side, "dynamic_img_size": True}
    about = trunk.pretrained_cfg
    return {
        "architecture": source.arch,
        "num_classes": 0,
        "num_features": trunk.num_features,
        "model_args": options,
        # timm's own of this architecture are of other weights: some ViTs of it want 0.5 and 0.5.
        "pretrained_cfg": IMAGENET_PROCESSING
        | {
            "tag": source.method or "self-supervised",
            "input_size": [3, side, side],
            "fixed_input_size": False,
            "pool_size": about.get("pool_size") if source.is_resnet else None,
            "crop_pct": 0.875,
            "num_classes": 0,
            "first_conv": about.get("first_conv"),
            "classifier": about.get("classifier"),
        },
    }


def _check(path: Path, source: Source) -> Checked:
    model: Any = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0)
    processing = resolve_model_data_config(model)
    told = [list(processing["mean"]), list(processing["std"])]
    if told != [IMAGENET_PROCESSING["mean"], IMAGENET_PROCESSING["std"]]:
        raise Differs(f"timm would normalise by {told}")
    checked = compare(model, source, f"timm {timm.__version__} local-dir, pretrained=True")
    return Checked(checked.description, 0.0, remarks=at_other_size(model, source))


TIMM_HUB = Target(always, _drafts)
