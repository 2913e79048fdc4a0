"""A run goes on with another number of ranks, and each step still sees the same records."""

from pathlib import Path

import pytest
import torch

from dataprep.synthetic import write_random_images
from dense_ssl import pretrain
from dense_ssl.methods.moco import MoCo
from tests.ranks import on_ranks
from tests.test_pretrain import RECIPE

STEPS, BEFORE = 7, 4  # of 3 an epoch: within the second one the number of ranks changes


class Seen:
    """A run whose ranks note the records of every micro-batch; ours to send to processes."""

    def __init__(self, recipe: Path, notes: Path, steps: int) -> None:
        self.recipe, self.notes, self.steps = recipe, notes, steps

    def __call__(self, world=None):
        rank = 0 if world is None else world.rank
        forward = MoCo.forward

        def noting(method, batch, step):
            name = f"step{step.index}-micro{step.micro}-rank{rank}.pt"
            torch.save(batch.index, self.notes / name)
            return forward(method, batch, step)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(MoCo, "forward", noting)
            if world is not None:
                patched.setattr(pretrain, "init_world", lambda *_: world)
            return pretrain.main([str(self.recipe), f"train.steps={self.steps}"])


def test_each_step_sees_the_records_of_the_undisturbed_run(tmp_path):
    write_random_images(tmp_path / "images", 26)  # 3 steps of 8 an epoch

    def train(run, ranks, steps):
        notes = tmp_path / f"{run}-seen"
        notes.mkdir(exist_ok=True)
        path = tmp_path / f"{run}.yaml"
        path.write_text(
            RECIPE.format(
                method="moco", backbone="test_resnet", init="fan_in", groups=1,
                images=tmp_path / "images", run=tmp_path / run,
            )
        )  # fmt: skip
        work = Seen(path, notes, steps)
        codes = [work()] if ranks == 1 else on_ranks(ranks, work, tmp_path)
        assert codes == [0] * ranks

    def records(run, step):
        found = (tmp_path / f"{run}-seen").glob(f"step{step}-*.pt")
        return {path.stem.partition("rank")[2]: torch.load(path).tolist() for path in found}

    train("whole", 1, STEPS)
    train("moved", 1, BEFORE)
    train("moved", 2, STEPS)
    for step in range(STEPS):
        seen = records("moved", step)
        assert sorted(seen) == (["0"] if step < BEFORE else ["0", "1"])
        together = [record for rank in seen.values() for record in rank]
        assert len(together) == 8
        assert set(together) == set(records("whole", step)["0"])
