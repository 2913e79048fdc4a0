"""The page before a training: its figures, its true correspondences, its refusals."""

import numpy as np
import pytest

from dataprep.synthetic import write_random_images
from dense_ssl.preview import figures, main, overlap_share, write_preview
from dense_ssl.views import ViewSpec


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    write_random_images(folder, 12)
    return folder


@pytest.mark.parametrize("recipe", ["demo/moco", "demo/sere", "demo/ibot_dc"])
def test_the_page_shows_what_the_method_has(recipe, images, tmp_path, capsys):
    out = tmp_path / "page.html"
    given = ["data.loader=folder", "--data", str(images), "--images", "2", "--out", str(out)]
    assert main([recipe, *given]) == 0
    assert capsys.readouterr().out.endswith(f"{out}\n")
    text = out.read_text()
    assert "12 images" in text
    assert text.count('src="data:image/png') == (2 if recipe == "demo/moco" else 3)
    assert ("Hidden from the student" in text) == (recipe != "demo/moco")
    assert "http" not in text.replace("http://www.w3.org", "")


def test_figures_are_those_of_the_recipe():
    views = (
        ViewSpec(name="global", count=2, size=224, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=1.0),
        ViewSpec(name="local", count=1, size=96, scale=(0.25, 0.25), ratio=(1.0, 1.0), flip=0.0),
    )
    sizes = np.full((50, 2), 112, np.int32)
    table, warnings = figures(views, sizes, seed=0)
    whole, local = table.split("<tr>")[2:]
    assert "<td>100 % (100 % to 100 %)</td><td>2.00 (2.00 to 2.00)</td><td>100 %</td>" in whole
    assert "<td>25 % (25 % to 25 %)</td><td>1.71 (1.71 to 1.71)</td><td>0 %</td>" in local
    assert "<td>100 % (100 % to 100 %)</td><td>0.0 %</td>" in local  # within the whole image
    assert [warning.split(" is ")[0] for warning in warnings] == [
        "the median crop of global",
        "the median crop of local",
    ]


def test_overlap_is_the_share_of_the_box():
    boxes = np.array([[0.0, 0, 0.5, 1], [0.5, 0, 1, 1], [0.25, 0, 0.75, 0.5]])
    other = np.array([0.0, 0, 0.5, 1])
    assert overlap_share(boxes, other) == pytest.approx([1, 0, 0.5])


def test_what_cannot_be_shown_is_refused(images, tmp_path, capsys):
    assert main(["demo/moco", "--data", str(tmp_path / "none")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    with pytest.raises(Exception, match="cannot be written"):
        write_preview(
            "demo/moco", [f"data.path={images}", "data.loader=folder"], tmp_path / "no" / "x", 1
        )
