"""Each library that training uses: its version, and one real call."""

import importlib
import io
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from PIL import Image

from dense_ssl.doctor.findings import Finding, Severity, attempt

SETUP = "run `make setup`"
PYTHON = (3, 11)


def check_software() -> list[Finding]:
    """Return a finding per library."""
    return [
        _python(),
        attempt("torch", _torch, Severity.BROKEN, SETUP),
        *_cuda(),
        attempt("triton", _triton, Severity.WARNING, f"{SETUP}; run.kernels=torch goes without"),
        attempt("timm", _timm, Severity.BROKEN, SETUP),
        attempt("ffcv", _ffcv, Severity.WARNING, f"{SETUP}; data.loader=dali or folder go without"),
        attempt("dali", _dali, Severity.WARNING, f"{SETUP}; data.loader=ffcv or folder go without"),
    ]


def encoded_image(height: int = 375, width: int = 500) -> bytes:
    """Return a JPEG of smooth noise, about as many bytes as a photograph of that size."""
    coarse = np.random.default_rng(0).integers(
        0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8
    )
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def installed(*names: str) -> str:
    """Return the version of the first of these packages that is installed."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise ImportError(f"{names[0]} is not installed")


def _python() -> Finding:
    found = platform.python_version()
    if sys.version_info < PYTHON:
        return Finding("python", found, Severity.BROKEN, "3.11 or newer is needed")
    return Finding("python", found)


def _torch() -> str:
    x = torch.eye(8) @ torch.eye(8)
    assert x.trace() == 8
    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def _cuda() -> list[Finding]:
    if not torch.cuda.is_available():
        why = "no CUDA device" if torch.version.cuda else "torch is built without CUDA"
        value = f"{why}: training runs on the CPU, which is for trying things out"
        remedy = "the full recipes need CUDA GPUs; configs/demo/ do not"
        return [Finding("cuda", value, Severity.WARNING, remedy)]

    def call() -> str:
        for device in range(torch.cuda.device_count()):
            x = torch.ones(256, 256, device=f"cuda:{device}", dtype=torch.bfloat16)
            assert float((x @ x)[0, 0]) == 256
        return f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"

    return [
        attempt("cuda", call, Severity.BROKEN, "the driver and torch's CUDA do not fit together")
    ]


def _triton() -> str:
    found = installed("triton")
    from kernels.ahead import compile_only
    from kernels.catalogue import ALL

    spec = ALL["sinkhorn_bias"]
    if torch.cuda.is_available():
        with torch.device("cuda"):
            given = spec.inputs(spec.small[0], torch.float32)
        spec.call(**given)
        torch.cuda.synchronize()
        return f"{found}, a kernel ran"
    with compile_only(86) as compiled, torch.device("meta"):
        spec.call(**spec.inputs(spec.small[0], torch.float32))
    assert compiled
    return f"{found}, a kernel was compiled for sm_86; no CUDA device to run it on"


def _timm() -> str:
    from dense_ssl.backbones import BackboneConfig, make_backbone

    make_backbone(BackboneConfig(name="test_resnet"))
    return installed("timm")


def _ffcv() -> str:
    found = installed("ffcv")
    libffcv = importlib.import_module("ffcv.libffcv")
    data = np.frombuffer(encoded_image(), np.uint8)
    target = np.zeros((375, 500, 3), np.uint8)
    libffcv.imdecode(data, target, 375, 500, 375, 500, 0, 0, 1, 1, False, False)
    if not target.any():
        raise RuntimeError("an image was decoded to nothing")
    return f"{found}, an image was decoded"


def _dali() -> str:
    found = installed("nvidia-dali-cuda130", "nvidia-dali-cuda120")
    from nvidia.dali import fn, pipeline_def

    kind = "mixed" if torch.cuda.is_available() else "cpu"

    device: Any = 0 if kind == "mixed" else None

    @pipeline_def(batch_size=1, num_threads=1, device_id=device)
    def decode():  # noqa: ANN202
        encoded = fn.external_source(
            source=[[np.frombuffer(encoded_image(), np.uint8)]], cycle=True
        )
        return fn.decoders.image(encoded, device=kind)

    pipeline = decode()
    pipeline.build()
    (images,) = pipeline.run()
    assert tuple(images.as_cpu().as_array().shape[1:]) == (375, 500, 3)
    return f"{found}, an image was decoded on the {'GPU' if kind == 'mixed' else 'CPU'}"
