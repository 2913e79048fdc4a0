"""Recipes load and round-trip; what is wrong is named with its key and a remedy."""

from pathlib import Path

import pytest
import yaml

from dense_ssl.config import Config, UserError, apply_override, dump, load, validate
from dense_ssl.run_config import RunConfig, recipe_path

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))
GIVEN = ["data.path=shards/x", "run.dir=runs/x"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_recipe_loads_and_round_trips(path, tmp_path):
    config = load(RunConfig, path, GIVEN)
    saved = tmp_path / "config.yaml"
    saved.write_text(dump(config))
    assert load(RunConfig, saved) == config


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_recipe_says_command_hardware_and_result(path):
    head = path.read_text().split("method:")[0]
    assert "make pretrain METHOD=" in head
    assert "Hardware" in head
    assert "Reaches" in head or path.parent.name == "demo"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "optim.lrr: unknown key; did you mean optim.lr?"),
        ("trainn.epochs=1", "trainn: unknown key; did you mean train"),
        ("epochs=3", "epochs: unknown key; did you mean train.epochs?"),
        (
            "train.batch_size=0",
            "train.batch_size: Input should be greater than or equal to 1 (got 0)",
        ),
        ("train.precision=half", "train.precision: Input should be 'bf16', 'fp16' or 'fp32'"),
        ("method.name=dino9", "method: Input tag 'dino9'"),
        (
            "method.momentumm=1",
            ": method.momentumm: unknown key; did you mean method.momentum?",
        ),
        ("method.views.0.size=big", ": method.views.0.size: Input should be a valid integer"),
        ("method.views.7.size=8", "'7' is not a position in a list of 1"),
        ("optim.lr", "write it as key.sub=value"),
    ],
)
def test_a_wrong_key_or_value_is_one_clear_sentence(override, message):
    with pytest.raises(UserError) as caught:
        load(RunConfig, recipe_path("densecl"), [*GIVEN, override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_keys_and_files_are_named(tmp_path):
    with pytest.raises(UserError, match="run: missing|run.dir: missing|data.path: missing"):
        load(RunConfig, recipe_path("densecl"))
    with pytest.raises(UserError, match="no such configuration file"):
        load(RunConfig, tmp_path / "no.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="not readable as YAML"):
        load(RunConfig, tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="expected a mapping"):
        load(RunConfig, tmp_path / "list.yaml")
    with pytest.raises(
        UserError, match=r"METHOD=nope: no such recipe in configs/; there are .*densecl"
    ):
        recipe_path("nope")
    with pytest.raises(
        UserError, match=r"no such recipe in configs/; did you mean udi\? There are .*densecl"
    ):
        recipe_path("udii")


def test_overrides_read_yaml_and_build_missing_sections():
    data = yaml.safe_load("a: {b: [1, 2]}")
    apply_override(data, "a.b.1=[3, 4]")
    apply_override(data, "c.d=1e-3")
    assert data == {"a": {"b": [1, [3, 4]]}, "c": {"d": "1e-3"}}


def test_a_number_moves_the_start_of_a_schedule_and_a_mapping_replaces_it():
    moved = load(RunConfig, recipe_path("densecl"), [*GIVEN, "optim.lr=0.1"]).optim.lr
    assert (moved.start, moved.shape, moved.per) == (0.1, "cosine", "epoch")
    flat = load(RunConfig, recipe_path("densecl"), [*GIVEN, "optim.lr={start: 1, shape: constant}"])
    assert flat.optim.lr.shape == "constant"


def test_text_that_yaml_leaves_as_text_becomes_the_float_it_says():
    config = load(RunConfig, recipe_path("densecl"), [*GIVEN, "optim.lr=1e-3"])
    assert config.optim.lr.start == 0.001


def test_on_is_a_key_of_a_recipe_and_a_word_for_true(tmp_path):
    path = tmp_path / "a.yaml"
    text = "data: {path: a}\nrun: {dir: b, compile: yes}\nmethod: {name: moco}\n"
    path.write_text(text + "watch: {on: off}\n")
    config = load(RunConfig, path)
    assert config.run.compile
    assert not config.watch.on


def test_configurations_are_frozen_and_closed():
    class Small(Config):
        size: int = 3

    small = validate(Small, {}, "here")
    with pytest.raises(ValueError, match="frozen"):
        small.size = 4
    with pytest.raises(UserError, match="here: sizes: unknown key; did you mean size"):
        validate(Small, {"sizes": 1}, "here")
