"""An exported ONNX file as a backbone: the file itself is evaluated, not what it was made of."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dense_ssl.backbones.features import Backbone, BackboneConfig, Features
from dense_ssl.config import UserError, validate


class OnnxBackbone(Backbone):
    """Cells and class tokens by onnxruntime, on the CPU and without gradients."""

    def __init__(self, path: Path) -> None:
        """Open a file of `python -m dense_ssl.export --to onnx`.

        Raises:
            UserError: onnxruntime is not installed, or the file is damaged or no export of ours.
        """
        super().__init__()
        try:
            import onnxruntime
        except ImportError:
            raise UserError(
                f"{path}: needs onnxruntime, not installed; run .venv/bin/python -m pip install "
                "-c constraints.txt onnxruntime"
            ) from None
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(path), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # whatever a damaged file makes of its parser
            raise UserError(f"{path}: damaged, or no ONNX file ({type(error).__name__})") from None
        told = self._session.get_modelmeta().custom_metadata_map
        outputs = [output.name for output in self._session.get_outputs()]
        if outputs != ["cells", "class_tokens"] or "arch" not in told:
            raise UserError(f"{path}: no export of this project; TO=onnx writes such files")
        given = {
            "name": told["arch"],
            "positions": told.get("positions", "timm"),
            "class_tokens": told.get("class_tokens", 1),
        }
        self.config = validate(BackboneConfig, given, str(path))
        self.trunk = _NoTrunk(path.name)
        self.dim = int(self._session.get_outputs()[1].shape[-1])
        # The smallest image that is one cell: a ResNet's cells begin where the last stride does.
        self.stride = self._stride()

    def forward(self, images: Tensor) -> Features:
        """Return the features of normalised float images [B, 3, H, W]."""
        cells, tokens = self._session.run(None, {"images": images.float().cpu().numpy()})
        rows, columns = (-(-side // self.stride) for side in images.shape[2:])
        return Features(
            cls=torch.from_numpy(tokens).to(images.device),
            dense=torch.from_numpy(cells).to(images.device),
            grid=(rows, columns),
        )

    def compile_encoder(self) -> None:
        """Do nothing: the graph is compiled."""

    def checkpoint_gradients(self) -> None:
        """Refuse.

        Raises:
            UserError: always; there are no gradients.
        """
        raise UserError("an ONNX file has no gradients; evaluate the run it was exported from")

    def _stride(self) -> int:
        side = 224 if self.config.name.startswith(("vit", "deit")) else 64
        cells, _ = self._session.run(None, {"images": torch.zeros(1, 3, side, side).numpy()})
        return side // round(cells.shape[1] ** 0.5)


class _NoLayers(UserError, AttributeError):
    """A layer is asked for; `hasattr` may still ask whether there is one."""


class _NoTrunk(nn.Module):
    """What stands where layers would be: says so when one is asked for."""

    name = ""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.place = nn.Parameter(torch.zeros(1), requires_grad=False)  # where the images are put

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise _NoLayers(
                f"{self.name}: an ONNX file gives cells and class tokens only, and this asks for its "
                f"layers ({name}); evaluate the run it was exported from"
            ) from None
