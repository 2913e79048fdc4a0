"""What evaluations read: polygons, run lengths, label maps, metrics; bad data is counted and named."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataprep.synthetic import write_camvid_discs
from dense_ssl.config import UserError
from dense_ssl.evaluation import coco
from dense_ssl.evaluation.metrics import confusion, segmentation_scores
from dense_ssl.evaluation.omissions import Omissions
from dense_ssl.evaluation.segmentation import probe as segment
from dense_ssl.evaluation.segmentation.data import VOID, read_mask, semantic_map

# pycocotools 2.0 speaks to numpy 2 in the old way
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


# --- masks and polygons


def test_rle_equals_pycocotools():
    coco_mask = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for height, width in [(1, 1), (7, 5), (60, 91), (300, 200)]:
        for density in (0.0, 0.03, 0.5, 1.0):
            block = 10 if height > 50 else 1
            coarse = rng.random((height // block + 1, width // block + 1)) < density
            mask = np.kron(coarse, np.ones((block, block)))[:height, :width]
            mask = np.asfortranarray(mask.astype(np.uint8))
            encoded = coco_mask.encode(mask)
            compressed = {"size": [height, width], "counts": encoded["counts"].decode()}
            assert (coco.decode_rle(compressed, height, width) == mask.astype(bool)).all()
            flat = mask.flatten(order="F")
            edges = np.flatnonzero(np.diff(flat)) + 1
            runs = np.diff([0, *edges, flat.size]).tolist()
            plain = {"size": [height, width], "counts": ([0] if flat[0] else []) + runs}
            assert (coco.decode_rle(plain, height, width) == mask.astype(bool)).all()


def test_polygons_equal_pycocotools_but_for_the_outline():
    coco_mask = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for _ in range(30):
        turn = np.sort(rng.uniform(0, 2 * np.pi, 12))
        radius = rng.uniform(10, 60, 12)
        points = np.stack([70 + radius * np.cos(turn), 60 + radius * np.sin(turn)], 1)
        polygon = points.flatten().tolist()  # partly outside the image
        ours = coco.decode_mask([polygon], 100, 110)
        theirs = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([polygon], 100, 110))) > 0
        border = 100 * 110 * 0.02
        assert (ours ^ theirs).sum() < border
        assert (ours & theirs).sum() / (ours | theirs).sum() > 0.93


def test_polygon_pixels_are_those_whose_centre_is_inside():
    assert coco.decode_mask([[2, 1, 5, 1, 5, 3, 2, 3]], 4, 6).sum() == 6
    assert coco.decode_mask([[2.4, 1, 5.6, 1, 5.6, 3, 2.4, 3]], 4, 6)[1].tolist() == [
        False, False, True, True, True, True,
    ]  # fmt: skip
    assert coco.decode_mask([[-50, -50, 90, -50, 90, 90, -50, 90]], 4, 6).all()
    assert not coco.decode_mask([[10, 10, 20, 10, 20, 20]], 4, 6).any()
    two = coco.decode_mask([[0, 0, 2, 0, 2, 2, 0, 2], [1, 1, 4, 1, 4, 3, 1, 3]], 4, 6)
    assert two.sum() == 4 + 6 - 1  # the union of pieces


def test_semantic_map_paints_small_over_large_and_crowds_as_void():
    def square(side, category, crowd=False):
        polygon = [[0, 0, side, 0, side, side, 0, side]]
        return coco.Instance(category, polygon, (0, 0, side, side), crowd)

    image = coco.AnnotatedImage(
        Path("x"), 10, 12, (square(3, 7), square(6, 9), square(9, 7, crowd=True))
    )
    labels = semantic_map(image, {7: 1, 9: 2})
    assert [int(labels[i, i]) for i in (0, 2, 3, 5, 6, 8, 9)] == [1, 1, 2, 2, VOID, VOID, 0]


def test_index_masks(tmp_path):
    labels = np.array([[0, 1, 2], [3, 255, 2]], np.uint8)
    for mode in ("L", "P", "I;16"):
        image = Image.fromarray(labels.astype(np.uint16) if mode == "I;16" else labels)
        if mode == "P":
            image.putpalette([i for i in range(256) for _ in range(3)])
        image.save(tmp_path / "m.png")
        expected = [[0, 1, 2], [VOID, VOID, 2]]
        assert read_mask(tmp_path / "m.png", 3, void=3).tolist() == expected
    with pytest.raises(ValueError, match="class 2 of 2"):
        read_mask(tmp_path / "m.png", 2, void=3)
    Image.new("RGB", (3, 3)).save(tmp_path / "c.png")
    with pytest.raises(ValueError, match="mask is RGB"):
        read_mask(tmp_path / "c.png", 3, void=3)


# --- segmentation metrics


def test_metrics_equal_brute_force():
    rng = np.random.default_rng(0)
    truth, said = rng.integers(0, 6, (3, 20, 30)), rng.integers(0, 5, (3, 20, 30))
    truth[0] = np.where(rng.random((20, 30)) < 0.3, VOID, truth[0])
    truth[truth == 3] = 2  # class 3 is predicted only, class 6 is nowhere
    scores = segmentation_scores(confusion(torch.tensor(truth), torch.tensor(said), 7))
    valid = truth != VOID
    ious, recalls = [], []
    for label in range(7):
        in_truth, in_said = (truth == label) & valid, (said == label) & valid
        if (in_truth | in_said).any():
            ious.append((in_truth & in_said).sum() / (in_truth | in_said).sum())
        if in_truth.any():
            recalls.append((in_truth & in_said).sum() / in_truth.sum())
    assert scores["mIoU"] == pytest.approx(100 * np.mean(ious))
    assert scores["mAcc"] == pytest.approx(100 * np.mean(recalls))
    assert scores["aAcc"] == pytest.approx(100 * (truth == said)[valid].mean())


def test_metrics_of_extreme_predictions():
    truth = torch.tensor([[0, 1, 1], [VOID, 2, 2]])
    perfect = truth.clone()
    assert segmentation_scores(confusion(truth, perfect, 3)) == pytest.approx(
        {"mIoU": 100, "aAcc": 100, "mAcc": 100}
    )
    wrong = (truth + 1) % 3
    assert segmentation_scores(confusion(truth, wrong, 3))["mIoU"] == 0
    one = segmentation_scores(confusion(truth, torch.zeros_like(truth), 3))
    assert one["mAcc"] == pytest.approx(100 / 3) and one["mIoU"] == pytest.approx(100 / 15)
    void = segmentation_scores(confusion(truth, torch.full_like(truth, 2), 3))
    assert void["aAcc"] == pytest.approx(40)
    with pytest.raises(ValueError, match="no labelled pixel"):
        segmentation_scores(confusion(torch.full((4, 4), VOID), torch.zeros(4, 4), 3))


# --- bad data


def test_bad_camvid_data_is_counted_and_named(tmp_path):
    write_camvid_discs(tmp_path, 9)
    masks = tmp_path / "valannot"
    good = Image.open(masks / "000.png")
    good.load()
    (masks / "000.png").unlink()
    good.resize((48, 36)).save(masks / "001.png")
    good.convert("RGB").save(masks / "002.png")
    Image.fromarray(np.full((72, 96), 150, np.uint8)).save(masks / "003.png")
    Image.fromarray(np.full((72, 96), 255, np.uint8)).save(masks / "004.png")
    (masks / "005.png").write_bytes(b"x")
    good.transpose(Image.Transpose.TRANSPOSE).save(masks / "006.png")
    (tmp_path / "val/007.jpg").write_bytes(b"x")
    data = segment.load(tmp_path, segment.Config())
    assert [image.path.name for image in data.val] == ["008.jpg"]
    assert sorted(data.omitted.lines()) == [
        "val: image header not readable: 1 (007.jpg)",
        "val: mask has class 150 of 3: 1 (003.jpg)",
        "val: mask is RGB, not one class index per pixel: 1 (002.jpg)",
        "val: mask is void everywhere: 1 (004.jpg)",
        "val: mask missing: 1 (000.jpg)",
        "val: mask not readable: 1 (005.jpg)",
        "val: mask of another size than its image: 2 (001.jpg, 006.jpg)",
    ]
    shutil.rmtree(masks)
    with pytest.raises(UserError, match="nothing usable: val: mask missing: 9"):
        segment.load(tmp_path, segment.Config())
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(UserError, match="names the classes"):
        segment.load(tmp_path, segment.Config())
    with pytest.raises(UserError, match="neither COCO"):
        segment.load(tmp_path / "train", segment.Config())


def test_bad_coco_data_is_counted_and_named(real_images, tmp_path):
    root = real_images / "nasty" / "coco"
    omitted = Omissions()
    split = coco.read_split(root, "val2017", omitted)
    text = "\n".join(omitted.lines())
    for expected in (
        "image file missing: 1",
        "image of another size than the annotations say: 1",
        "image listed twice: 1 (000000322864.jpg)",
        "annotation with a polygon of fewer than three points: 1 (900021)",
        "annotation with a box of no size: 2 (900031, 900091)",
        "annotation without a segmentation: 1 (900041)",
        "annotation of an unknown category: 1 (900071)",
        "annotation of an unknown image: 1 (900081)",
        "annotation with run lengths of another size: 1 (900121)",
        "annotation id used twice: 1 (56944)",
    ):
        assert expected in text
    numbers = dict.fromkeys(split.categories, 1)
    for image in split.images:
        labels = semantic_map(image, numbers)
        assert labels.shape == (image.height, image.width)
    with pytest.raises(UserError, match="no valid JSON"):
        coco.read_split(root, "truncated", Omissions())
    assert not coco.read_split(root, "empty", Omissions()).images
    garbled = tmp_path / "annotations/instances_x.json"
    garbled.parent.mkdir()
    garbled.write_text('{"images": [{}], "annotations": [], "categories": []}')
    with pytest.raises(UserError, match="an entry lacks or garbles 'file_name'"):
        coco.read_split(tmp_path, "x", Omissions())
    with pytest.raises(UserError, match="no instances_train"):
        segment.load(root, segment.Config())


def test_real_coco_masks_agree_with_pycocotools(real_images, capsys):
    module = pytest.importorskip("pycocotools.coco")
    root = real_images / "coco-mini"
    truth = module.COCO(str(root / "annotations/instances_val2017.json"))
    split = coco.read_split(root, "val2017", Omissions())
    assert len(split.images) == 128 and len(split.categories) == 80
    checked = 0
    for image in split.images[:40]:
        entries = truth.loadAnns(truth.getAnnIds(imgIds=[int(image.path.stem)]))
        assert len(entries) == len(image.instances)
        for entry, instance in zip(entries, image.instances):
            theirs = truth.annToMask(entry).astype(bool)
            ours = coco.decode_mask(instance.segmentation, image.height, image.width)
            if theirs.sum() > 400:
                assert (ours & theirs).sum() / (ours | theirs).sum() > 0.9
                checked += 1
    assert checked > 100
