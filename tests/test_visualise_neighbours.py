"""Neighbours on a sheet are those of the pooled features, and no image is its own."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dataprep.synthetic import random_image
from dense_ssl.backbones import BackboneConfig, make_backbone
from dense_ssl.config import UserError
from dense_ssl.loaders.source import FolderSource
from dense_ssl.visualise.neighbours import (
    centre_crops,
    nearest_others,
    neighbour_rows,
    pooled_features,
)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return make_backbone(BackboneConfig(name="test_resnet")).eval()


@pytest.fixture
def folder(tmp_path):
    """Five pictures, each twice: as it is, and a little brighter; and one file that is no image."""
    for number in range(5):
        pixels = random_image(60, 80, number).astype(int)
        for name, shift in (("a", 0), ("b", 6)):
            image = Image.fromarray((pixels + shift).clip(0, 255).astype(np.uint8))
            image.save(tmp_path / f"{number}{name}.png")
    source = FolderSource(tmp_path)
    (tmp_path / "2a.png").write_bytes(b"damaged since its header was read")
    return source


def test_twins_find_each_other_and_a_damaged_image_is_left_out(backbone, folder):
    crops = list(centre_crops(folder, range(10), 48))
    assert len(crops) == 9
    assert all(crop.shape == (48, 48, 3) for crop in crops)
    features = pooled_features(backbone, crops)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(9))
    index, similarity = nearest_others(features, 3)
    twins = [1, 0, 3, 2, None, 6, 5, 8, 7]  # 2a is missing, so 2b stands alone at 4
    for row, twin in enumerate(twins):
        assert twin is None or int(index[row, 0]) == twin
        assert row not in index[row].tolist()
    want = (features @ features.T).fill_diagonal_(-2).topk(3).values
    torch.testing.assert_close(similarity, want)


def test_equal_images_are_not_shown_as_their_own_neighbours():
    features = F.normalize(torch.randn(4, 6), dim=1)[[0, 0, 1, 2, 3, 0, 0]]
    index, similarity = nearest_others(features, 2)
    assert index.shape == similarity.shape == (7, 2)
    for row in range(7):
        assert row not in index[row].tolist()
    assert torch.allclose(similarity[0], torch.ones(2))


def test_a_row_for_each_query(backbone, folder):
    rows = neighbour_rows(backbone, folder, range(10), 3, 48)
    assert len(rows) == 3
    assert all(row.width > 6 * 144 for row in rows)
    with pytest.raises(UserError, match="1 of 2 images can be read"):
        neighbour_rows(backbone, folder, [3, 4], 1, 48)
