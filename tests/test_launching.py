"""The Slurm template with srun and scontrol played by two small scripts, and what launching passes on."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dataprep.synthetic import write_random_images
from dense_ssl import checkpoint, launch, pretrain
from dense_ssl.config import load
from dense_ssl.run_config import RunConfig, recipe_path
from tests.test_pretrain import RECIPE, wait_for_step

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "configs" / "launch" / "slurm.sbatch"

# Slurm sends a signal to the whole process group of a task, workers of the loader among them.
SRUN = """#!/usr/bin/env bash
while [[ ${1:-} == --* ]]; do shift; done
printf '%s\\n' "$@" > srun.args
[ -n "${DRY:-}" ] && exit 0
setsid "$@" & task=$!
again=0
trap 'again=1; kill -USR1 -- "-$task"' USR1
while :; do wait "$task"; code=$?; [ $again = 1 ] || break; again=0; done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> scontrol.args
[ "$1" = show ] && printf 'node-a\\nnode-b\\n'
exit 0
"""


@pytest.fixture
def slurm(tmp_path):
    """Return a function that starts the template as Slurm would, in `tmp_path`."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def start(**given):
        environment = os.environ | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node-[a-b]",
            "PYTHON": sys.executable,
        }
        return subprocess.Popen(
            ["bash", str(TEMPLATE)], env=environment | given, cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return start


def asked_of(folder, name):
    path = folder / f"{name}.args"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.slow
def test_before_the_limit_the_run_saves_and_the_job_queues_itself_again(slurm, tmp_path):
    images, run = tmp_path / "images", tmp_path / "run"
    write_random_images(images, 44)
    text = RECIPE.format(
        method="moco", backbone="test_resnet", init="fan_in", groups=1, images="x", run="x"
    )
    (tmp_path / "recipe.yaml").write_text(text)
    given = {
        "METHOD": "recipe.yaml", "DATA": str(images), "RUN": str(run), "GPUS": "2",
        "ARGS": "data.workers=1 train.epochs=400 run.checkpoint_every_steps=100000",
    }  # fmt: skip
    job = slurm(**given)
    wait_for_step(run, 2, job)
    job.send_signal(signal.SIGUSR1)
    output = job.communicate(timeout=240)[0]
    assert job.returncode == 75, output
    assert "the same command resumes" in output
    assert asked_of(tmp_path, "scontrol") == ["requeue 4711"]
    saved = checkpoint.load_newest(run / "checkpoints")["step"]
    assert saved >= 2
    # The job's next start goes on, on fewer GPUs too, and one that is done asks for nothing.
    (tmp_path / "scontrol.args").unlink()
    given["GPUS"] = "1"
    given["ARGS"] += f" train.steps={saved + 1}"
    job = slurm(**given)
    output = job.communicate(timeout=240)[0]
    assert job.returncode == 0, output
    assert f"resuming at step {saved}" in output
    assert asked_of(tmp_path, "scontrol") == []


def test_the_command_for_several_machines_is_one_the_trainer_takes(slurm, tmp_path, monkeypatch):
    job = slurm(
        METHOD="densecl", DATA="shards/coco", RUN="runs/a", SLURM_JOB_NUM_NODES="2", DRY="1",
        SLURM_GPUS_ON_NODE="8", ARGS="optim.lr=0.1 train.epochs=100",
    )  # fmt: skip
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 0, output
    python, flag, module, *arguments = asked_of(tmp_path, "srun")
    assert (python, flag, module) == (sys.executable, "-m", "dense_ssl.pretrain")
    seen = []
    monkeypatch.setattr(pretrain, "launch_ranks", lambda *given: seen.append(given) or 0)
    assert pretrain.main(arguments) == 0
    (ranks, rest, config, nodes, rendezvous), *_ = seen
    assert (ranks, nodes, rendezvous) == (8, 2, "node-a:29500")
    assert (config.method.name, config.run.dir, config.train.epochs) == ("densecl", "runs/a", 100)
    assert rest[0] == "densecl" and "optim.lr=0.1" in rest and "data.path=shards/coco" in rest


def test_the_template_says_what_is_missing(slurm):
    job = slurm(DATA="x", RUN="y")
    output = job.communicate(timeout=60)[0]
    assert job.returncode != 0
    assert "METHOD: a recipe in configs/" in output


def test_several_machines_need_to_know_where_they_meet(capsys):
    given = ["densecl", "data.path=x", "run.dir=y", "--nodes", "2"]
    assert pretrain.main(given) == 2
    assert "--rendezvous HOST:PORT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("codes", "want"),
    [([75], 75), ([-9, 75], 75), ([-9, -15], 75), ([75, 2], 2), ([1, 75, -9], 1), ([1, 2], 2)],
)
def test_a_failure_counts_more_than_the_ranks_it_ends(codes, want):
    assert launch.code_of(codes) == want


def test_the_agent_is_told_of_all_machines(tmp_path, monkeypatch):
    seen = []
    given = [f"run.dir={tmp_path}", "data.path=x"]
    config = load(RunConfig, recipe_path("densecl"), given)

    def elastic(config, command):
        seen.append((config.min_nodes, config.max_nodes, config.rdzv_endpoint))
        return lambda *arguments: None

    monkeypatch.setattr(launch, "elastic_launch", elastic)
    monkeypatch.setenv("PYTHONPATH", "")
    assert launch.launch_ranks(2, ["densecl", *given], config, 3, "first:29500") == 0
    assert launch.launch_ranks(2, ["densecl", *given], config) == 0
    assert seen == [(3, 3, "first:29500"), (1, 1, "localhost:0")]


@pytest.mark.parametrize("checker", [["bash", "-n"], ["shellcheck"]], ids=["bash", "shellcheck"])
def test_the_template_is_sound_shell(checker):
    if shutil.which(checker[0]) is None:
        pytest.skip(f"{checker[0]} is not installed")
    done = subprocess.run([*checker, str(TEMPLATE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_container_installs_what_set_up_installs():
    from dense_ssl.install import APT

    text = (ROOT / "configs" / "launch" / "Containerfile").read_text()
    copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY ")]
    assert all((ROOT / name).exists() for names in copied for name in names)
    assert all(package in text for package in APT)
