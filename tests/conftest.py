"""Shared ground of all tests: seeds, threads, where real images may lie, and a few small batches."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# One thread: networks here are tiny, and OpenMP's spinning threads starve each other on busy machines.
# Processes that tests start inherit it, so that their results are the same to the bit.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)
    # The longest first: what is left at the end is short, so that all processes end together.
    items.sort(key=lambda item: "slow" not in item.keywords)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_images() -> Path:
    """The folder of real image sets beside the project, or a skip that says so."""
    where = Path(os.environ.get("DENSE_SSL_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (where / "README.md").is_file():
        pytest.skip(f"no real images at {where} (set DENSE_SSL_TEST_DATA)")
    return where


@pytest.fixture
def tiny_resnet(monkeypatch):
    """A ResNet of 8 to 64 channels, and in place of timm's."""
    from timm.models.resnet import BasicBlock, ResNet

    from dense_ssl.backbones import BackboneConfig, make_backbone

    def create(name, **options):
        return ResNet(
            BasicBlock, (1, 1, 1, 1), num_classes=0, channels=(8, 16, 32, 64), stem_width=8
        )

    monkeypatch.setattr("dense_ssl.backbones.resnet.create_trunk", create)
    torch.manual_seed(0)
    return make_backbone(BackboneConfig(name="resnet18")).eval()
