"""What every protocol must have shown of itself; dense ones on label maps with next to nothing in them."""

import ast
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataprep.synthetic import write_camvid_discs
from dense_ssl.backbones import BackboneConfig, make_backbone
from dense_ssl.config import UserError
from dense_ssl.evaluation.catalogue import TASKS
from dense_ssl.evaluation.matching import attention, hummingbird, retrieve
from dense_ssl.evaluation.segmentation import probe as segment
from dense_ssl.evaluation.segmentation import train as segment_train
from dense_ssl.evaluation.segmentation.protocols import FpnConfig, UperNetConfig

HERE = Path(__file__).parent
# Per task: that it learns or finds what is there, that it stays at chance where nothing is, and what its
# numbers are compared with.
TRAINED = (
    "test_segment_training::test_networks_learn_separable_classes",
    "test_segment_training::test_networks_stay_at_chance_on_random_labels",
    "test_segment_data::test_metrics_equal_scikit_learn",
)
PROOFS: dict[str, tuple[str, str, str]] = {
    "knn": (
        "test_evaluation::test_knn_learns_separable_classes_and_not_random_ones",
        "test_evaluation::test_knn_learns_separable_classes_and_not_random_ones",
        "test_evaluation::test_knn_equals_scikit_learn",
    ),
    "object-knn": (
        "test_object_knn::test_objects_are_found_and_context_is_what_the_drop_shows",
        "test_object_knn::test_random_labels_stay_at_chance",
        "test_object_knn::test_cells_under_the_box_are_averaged",
    ),
    "linear": (
        "test_classification::test_linear_learns_separable_classes_and_not_random_ones",
        "test_classification::test_linear_learns_separable_classes_and_not_random_ones",
        "test_classification::test_heads_step_as_torchs_sgd_does",
    ),
    "finetune": (
        "test_finetune::test_learns_a_separable_set",
        "test_finetune::test_random_labels_stay_at_chance",
        "test_finetune::test_mae_reads_the_mean_of_cells_under_a_norm_of_its_own",
    ),
    "segment": (
        "test_evaluation::test_segmentation_learns_a_separable_set_and_not_random_labels",
        "test_evaluation::test_segmentation_learns_a_separable_set_and_not_random_labels",
        "test_segment_data::test_metrics_equal_scikit_learn",
    ),
    "segment-linear": (
        "test_evaluation::test_linear_probe_separates_cells_above_95_percent",
        "test_evaluation::test_linear_probe_separates_cells_above_95_percent",
        "test_evaluation_data::test_metrics_equal_brute_force",
    ),
    **dict.fromkeys(("segment-fcn", "segment-upernet", "segment-fpn", "segment-finetune"), TRAINED),
    "segment-frozen": (
        "test_proof_of_protocols::test_frozen_levels_learn_separable_classes_and_not_random_ones",
        "test_proof_of_protocols::test_frozen_levels_learn_separable_classes_and_not_random_ones",
        "test_segment_data::test_metrics_equal_scikit_learn",
    ),
    "attention": (
        "test_attention::test_attention_on_objects_is_found_and_blind_attention_is_chance",
        "test_attention::test_attention_on_objects_is_found_and_blind_attention_is_chance",
        "test_attention::test_jaccard_equals_scikit_learn",
    ),
    "correspondence": (
        "test_correspondence::test_features_that_know_their_place_match_and_others_do_not",
        "test_correspondence::test_features_that_know_their_place_match_and_others_do_not",
        "test_correspondence::test_cells_lie_where_the_boxes_say",
    ),
    "detect": (
        "test_detect_training::test_every_network_learns_coloured_rectangles",
        "test_detect_training::test_nothing_is_learnt_of_annotations_of_other_images",
        "test_detect_metrics::test_coco_boxes_equal_counting_by_hand",
    ),
    "davis": (
        "test_davis::test_perfect_features_carry_masks_along_and_noise_does_not",
        "test_davis::test_perfect_features_carry_masks_along_and_noise_does_not",
        "test_davis::test_j_and_f_are_the_official_ones",
    ),
    "semi-supervised": (
        "test_classification::test_few_labels_suffice_for_separable_classes",
        "test_proof_of_protocols::test_logistic_regression_on_random_labels_stays_at_chance",
        "test_classification::test_logistic_regression_is_the_minimum",
    ),
    "hummingbird": (
        "test_dense_retrieval::test_hummingbird_learns_a_separable_set_and_not_random_labels",
        "test_dense_retrieval::test_hummingbird_learns_a_separable_set_and_not_random_labels",
        "test_dense_retrieval::test_looking_up_equals_a_loop",
    ),
    "retrieve": (
        "test_dense_retrieval::test_retrieval_learns_a_separable_set_and_not_random_labels",
        "test_dense_retrieval::test_retrieval_learns_a_separable_set_and_not_random_labels",
        "test_dense_retrieval::test_mean_iou_equals_that_of_the_pixels",
    ),
    "landmarks": (
        "test_image_retrieval::test_places_are_found_and_random_truth_is_chance",
        "test_image_retrieval::test_places_are_found_and_random_truth_is_chance",
        "test_parity_evaluation::test_compute_map",
    ),
    "copydays": (
        "test_image_retrieval::test_copies_are_found_and_strangers_are_not",
        "test_image_retrieval::test_copies_are_found_and_strangers_are_not",
        "test_image_retrieval::test_precision_by_the_definition",
    ),
    "cluster": (
        "test_cluster::test_prototypes_of_the_classes_are_found_and_others_are_chance",
        "test_cluster::test_prototypes_of_the_classes_are_found_and_others_are_chance",
        "test_cluster::test_the_assignment_is_the_best_of_all",
    ),
    "svm": (
        "test_svm::test_learns_separable_classes_and_not_random_ones",
        "test_svm::test_learns_separable_classes_and_not_random_ones",
        "test_svm::test_average_precision_is_scikit_learns_where_that_is_monotone",
    ),
}


@cache
def known_tests(module: str) -> set[str]:
    tree = ast.parse((HERE / f"{module}.py").read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_protocol_has_its_proofs():
    assert set(PROOFS) == set(TASKS)
    for task, proofs in PROOFS.items():
        for proof in proofs:
            module, _, name = proof.partition("::")
            assert name in known_tests(module), f"{task}: no test {proof}"


def test_logistic_regression_on_random_labels_stays_at_chance():
    from dense_ssl.evaluation.classification.semi_supervised import fit_logistic

    pytest.importorskip("sklearn")
    generator = torch.Generator().manual_seed(0)
    few, many = (torch.randn(n, 16, generator=generator) for n in (60, 800))
    labels = torch.randint(0, 4, (60,), generator=generator)
    truth = torch.randint(0, 4, (800,), generator=generator)
    said = (many.double() @ fit_logistic(few, labels, 0.1, 4).T).argmax(1)
    assert abs((said == truth).float().mean().item() - 0.25) < 0.06


# --- label maps with next to nothing in them


SMALL = {
    "size": "48,64",
    "batch_size": 2,
    "workers": 0,
    "precision": "fp32",
    "steps": 2,
    "lr": 1e-3,
}
CONFIGS = {
    "segment": (segment, segment.Config(size=(48, 64), steps=60, batch_size=2)),
    "segment-fpn": (segment_train, FpnConfig(**SMALL, test="native")),
    "segment-upernet": (segment_train, UperNetConfig(**SMALL, test="native")),
    "hummingbird": (hummingbird, hummingbird.Config(size=(48, 64), k=3)),
    "retrieve": (retrieve, retrieve.Config(size=(48, 64))),
    "attention": (attention, attention.Config(size=64)),
}


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return make_backbone(BackboneConfig(name="test_vit")).eval()


def repainted(root, paint, split="val"):
    for number, path in enumerate(sorted((root / f"{split}annot").iterdir())):
        with Image.open(path) as opened:
            labels = np.array(opened)
        Image.fromarray(paint(labels, number)).save(path)


@pytest.mark.parametrize("task", CONFIGS)
def test_next_to_nothing_in_the_labels(task, tmp_path, vit):
    protocol, config = CONFIGS[task]

    def scored(root):
        data = protocol.load(root, config)
        return protocol.run(vit, data, config), data

    def one_pixel(labels, number):
        labels[:] = 3  # void
        labels[30, 40] = number % 3
        return labels

    write_camvid_discs(tmp_path / "pixel", 3)
    repainted(tmp_path / "pixel", one_pixel)
    if (
        task == "retrieve"
    ):  # reads labels at the input's size, where single pixels are lost: said, not scored
        with pytest.raises(UserError, match="val: every pixel is void"):
            scored(tmp_path / "pixel")
    else:
        values, _ = scored(tmp_path / "pixel")
        metrics = {name: value for name, value in values.items() if not name.startswith("note/")}
        assert metrics and all(0 <= value <= 100 for value in metrics.values())

    write_camvid_discs(tmp_path / "absent", 3)
    for split in ("train", "val"):  # of one class alone; the others occur nowhere
        repainted(
            tmp_path / "absent",
            lambda labels, _: np.where(labels == 3, 3, 1).astype(np.uint8),
            split,
        )
    values, _ = scored(tmp_path / "absent")
    if task == "segment":  # a probe of a few steps
        assert values["aAcc"] > 95
    elif task in ("hummingbird", "retrieve"):
        assert values["mIoU"] == pytest.approx(100, abs=1e-6)  # absent classes are in no mean
    else:  # two steps teach nothing
        assert 0 <= values.get("mIoU", values.get("jaccard")) <= 100

    write_camvid_discs(tmp_path / "void", 3)
    repainted(tmp_path / "void", lambda labels, _: np.full_like(labels, 3))
    with pytest.raises(UserError, match="nothing usable: val: mask is void everywhere: 3"):
        scored(tmp_path / "void")


def test_frozen_levels_learn_separable_classes_and_not_random_ones(tmp_path, vit):
    from dense_ssl.evaluation.segmentation.protocols import FrozenConfig

    rng = np.random.default_rng(0)
    colours = np.array([(60, 60, 200), (200, 60, 60)])
    for kind in ("true", "random"):
        for split in ("train", "val"):
            (tmp_path / kind / split).mkdir(parents=True)
            (tmp_path / kind / f"{split}annot").mkdir()
            (tmp_path / kind / "classes.txt").write_text("0 blue\n1 red\n")
            for number in range(6):
                truth = np.full((64, 64), number % 2, np.uint8)
                shown = colours[truth] + rng.normal(0, 10, (64, 64, 3))
                image = Image.fromarray(np.clip(shown, 0, 255).astype(np.uint8))
                image.save(tmp_path / kind / split / f"{number}.png")
                blocks = np.kron(rng.integers(0, 2, (4, 4)), np.ones((16, 16), int)).astype(
                    np.uint8
                )
                said = truth if kind == "true" else blocks
                Image.fromarray(said).save(tmp_path / kind / f"{split}annot" / f"{number}.png")
    config = FrozenConfig(**SMALL | {"size": 64, "lr": 3e-2, "steps": 25}, test="native")
    values = segment_train.run(vit, segment_train.load(tmp_path / "true", config), config)
    assert values["mIoU"] > 95
    control = segment_train.run(vit, segment_train.load(tmp_path / "random", config), config)
    assert control["aAcc"] < 70
