"""What the pages name exists: links and anchors, make's targets and variables, keys, files and functions."""

import ast
import importlib
import re
import types
from functools import cache
from pathlib import Path
from typing import Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from dense_ssl.methods import Method
from dense_ssl.run_config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "kernels/RESULTS.md"])
MAKEFILE = (ROOT / "Makefile").read_text()
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
NOT_OF_THE_PROJECT = {"overrides.py"}


def named(page):
    return str(page.relative_to(ROOT))


def code_of(page):
    """Return the code spans and the lines of the fenced blocks of a page."""
    text = page.read_text()
    blocks = [line for block in FENCE.findall(text) for line in block.splitlines()[1:-1]]
    return blocks, re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def anchors_of(page):
    """Return the anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()) for title in titles]
    return {slug.strip().replace(" ", "-") for slug in slugs}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_and_anchors_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{named(page)} -> {target}"
        if anchor:
            assert anchor in anchors_of(there), f"{named(page)} -> {target}"


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {name for name in pages if f"]({name})" not in index} == set()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_targets_and_variables_of_make_exist(page):
    targets = set(re.findall(r"^([a-z-]+):.*##", MAKEFILE, re.MULTILINE))
    blocks, spans = code_of(page)
    for text in [*blocks, *spans]:
        command = re.search(r"(?:^|&& |\$ )make(?: ([a-z-]+))?((?: [A-Z_]+=\S*)*)", text)
        if command is None:
            continue
        target, given = command.groups()
        assert target is None or target in targets, f"{named(page)}: {text}"
        for variable in re.findall(r"([A-Z_]+)=", given):
            assert f"$({variable})" in MAKEFILE or f"{variable} " in MAKEFILE, f"{text}"


@cache
def keys():
    """Return all dotted keys of a run, without positions in lists."""
    return set(walk(RunConfig, ()))


def walk(annotation, prefix):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield ".".join((*prefix, name))
            yield from walk(field.annotation, (*prefix, name))
    elif get_origin(annotation) in (Union, types.UnionType, tuple, list) or hasattr(
        annotation, "__metadata__"
    ):
        for part in get_args(annotation):
            yield from walk(part, prefix)


def is_of_a_module(text):
    """Whether `a.b` is a name of one of our modules, as tables of the pages write it."""
    module, _, name = text.partition(".")
    if module == "method" and hasattr(Method, name):
        return True
    for path in ROOT.glob(f"dense_ssl/**/{module}.py"):
        where = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found = importlib.import_module(where)
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not None:
            return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_keys_of_a_run_exist(page):
    sections = "|".join(RunConfig.model_fields)
    blocks, spans = code_of(page)
    wrong = []
    for text in [*blocks, *spans]:
        for found in re.findall(rf"(?<![\w./-])((?:{sections})\.[a-z_0-9.]*[a-z0-9_])", text):
            key = ".".join(part for part in found.split(".") if not part.isdecimal())
            is_file = (key.rpartition(".")[2] in ("py", "md", "yaml", "jsonl")) or key.endswith("_")
            if key not in keys() and not is_file and not is_of_a_module(key):
                wrong.append(found)
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_and_functions_exist(page):
    _, spans = code_of(page)
    for text in spans:
        found = re.fullmatch(r"([\w./-]+\.py)(?:: ([\w., ]+))?", text)
        if found is None or found[1] in NOT_OF_THE_PROJECT or "pixel_agreement" in text:
            continue
        name, wanted = found.groups()
        places = [p for p in [ROOT / name, *ROOT.glob(f"*/**/{name}")] if p.is_file()]
        assert places, f"{named(page)}: {name}"
        known = names_in(places[0])
        missing = [w for w in (wanted or "").split(", ") if w and w not in known]
        assert missing == [], f"{named(page)}: {text}"


def names_in(path):
    """Return the functions, classes, methods and constants of a file."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            inner = node.body if isinstance(node, ast.ClassDef) else []
            names |= {f"{node.name}.{n.name}" for n in inner if isinstance(n, ast.FunctionDef)}
    return names


def test_from_the_command_to_the_loss_it_is_two_files():
    """The loop calls the method it was given; the method's file holds the loss."""
    text = (ROOT / "dense_ssl/pretrain.py").read_text()
    assert "output = trained(batch, " in text and "output.loss" in text
    densecl = (ROOT / "dense_ssl/methods/densecl.py").read_text()
    assert "def forward(self, batch: MultiCropBatch, step: Step) -> Output:" in densecl


def test_the_arithmetic_of_the_expectations_holds():
    """docs/eight-3090s.md derives its ceilings from the published rates that it shows."""
    text = (ROOT / "docs/eight-3090s.md").read_text()
    rates = {
        name: (float(train.replace(",", "")), float(infer.replace(",", "")))
        for name, train, infer in re.findall(r"^\| (\S+) \| ([\d,]+) \| ([\d,]+) \|", text, re.M)
    }
    train, infer = rates["ResNet-50"]
    card = 1 / (1 / train + 1 / infer)
    assert f"**{card:.0f} images/s a card, 7,300 on eight**" in text
    assert round(8 * card, -2) == 7300
    assert f"{118e3 * 800 / (8 * card) / 3600:.1f} h. ImageNet" in text
    assert f"{1.281e6 * 200 / (8 * card) / 3600:.1f} h. *Published*" in text
    train, infer = rates["ViT-S/16"]
    views = (2 * 197 + 10 * 37) / 197
    card = 1 / (views / train + 2 / infer)
    assert f"{views:.2f} full views" in text and f"**{card:.0f}\n  images/s a card" in text
