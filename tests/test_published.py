"""Every method against the published sequence of operations: losses, gradients, centres; and its bench."""

import pytest
import torch

from dense_ssl import bench_step
from dense_ssl.bench_step import random_batch
from dense_ssl.methods import METHODS, make_method
from dense_ssl.published import SEQUENCES
from dense_ssl.schedule import Step
from tests.test_methods import CONFIGS

EXTENSIONS = {  # our own: nothing was published
    "densecl_dc",
}
IMAGES = 8
STEP = Step(45, steps_per_epoch=10, epochs=100, seed=5)


def method_of(config):
    """A method whose teacher is another network than its student, with centres that are not 0."""
    torch.manual_seed(1)
    method = make_method(config)
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.add_(0.05 * torch.randn_like(p))
        for name, buffer in method.named_buffers():
            if "center" in name:
                buffer.normal_(std=0.1)
            if "running" in name:
                buffer.zero_()
        if getattr(method, "masking", None) is not None:
            method.masking.token.normal_()
    return method


def test_every_published_method_is_covered():
    assert set(SEQUENCES) | EXTENSIONS == set(METHODS)


COMPARED = [k for k, c in CONFIGS.items() if c.name in SEQUENCES and k != "dino-test_resnet"]


@pytest.mark.parametrize("name", COMPARED)
def test_losses_gradients_and_centres_are_those_of_the_published_sequence(name):
    config = CONFIGS[name]
    method, batch = method_of(config), random_batch(config, IMAGES, torch.device("cpu"))
    want = SEQUENCES[config.name](method, batch, STEP)
    trained = {n: p for n, p in method.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(want["loss"], list(trained.values()))
    output = method(batch, STEP)
    output.loss.backward()
    torch.testing.assert_close(output.loss, want["loss"], rtol=2e-5, atol=1e-6)
    for part, value in output.logs.items():
        torch.testing.assert_close(value, want[part].detach(), rtol=2e-5, atol=1e-6, msg=part)
    for (key, p), gradient in zip(trained.items(), gradients, strict=True):
        scale = gradient.abs().max().item()
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-4 * scale + 1e-7, msg=key)
    method.after_step([output.carry], STEP)
    for part in ("center", "patch_center"):
        if part in want:
            got = getattr(method.objective, part)
            torch.testing.assert_close(got, want[part], rtol=1e-5, atol=1e-6)


def test_the_bench_prints_both_and_their_equal_losses(capsys):
    small = ["method.backbone.name=test_vit", "method.out_dim=64", "method.views.0.size=64"]
    assert bench_step.main(["demo/dino", *small, "--batch", "2", "--device", "cpu"]) == 0
    title, _, published, ours = capsys.readouterr().out.strip().splitlines()
    assert "2 images of 2 x 64 + 2 x 48 px" in title
    assert published.split()[0] == "published"
    assert ours.split()[0] == "ours"
    assert float(ours.split()[-1]) == pytest.approx(float(published.split()[-1]), abs=2e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nothing"], "METHOD=nothing: no such recipe"),
        (["densecl_dc"], "densecl_dc: its published sequence is not written out"),
        (["dino", "method.backbone.name=resnet50"], "published sequence of dino is that of a ViT"),
        (["moco", "--batch", "0"], "--batch 0: at least one image"),
    ],
)
def test_what_it_cannot_measure_is_refused(arguments, sentence, capsys):
    assert bench_step.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence in error
