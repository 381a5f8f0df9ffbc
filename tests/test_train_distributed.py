"""`bursar train` on two processes: equal to one under DDP and FSDP2, and no hang where a rank is gone."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
CONFIG = """
model = "gpt2:L=2,d=32,h=2,V=256,T=32"
data = "{text}"
seq_len = 16
steps = {steps}
batch_size = 4
global_batch_size = 16   # one rank accumulates four micro-batches, two ranks two each
optimizer = "sgd"        # Adam would hide a gradient that is N times too long
lr = 0.5
warmup_steps = 5
layout = "{layout}"
checkpoint_every = 25
tensorboard = false
device = "cpu"
timeout_seconds = {timeout}
"""
MAIN = "import sys\nimport torch\ntorch.set_num_threads(1)\n{patch}\nfrom bursar.cli import main\nmain(sys.argv[1:])\n"
WITHOUT_1_OVER_N = "from bursar.train import step\nstep.mean_over = lambda loss, n: loss"
LEAVES = """
import os
from bursar.train import loop
plain = loop.update
def update(*args, **kwargs):
    if os.environ["RANK"] == "1" and args[3] == 4:
        os._exit(0)
    return plain(*args, **kwargs)
loop.update = update
"""
NEVER_COMES = "import os\nif os.environ['RANK'] == '1':\n    os._exit(0)"
HANGS = LEAVES.replace("os._exit(0)", "import time; time.sleep(600)")


def launch(folder, name, processes, layout="ddp", patch="", steps=50, timeout=60, more=()):
    """Run a config in a process, or by torchrun in two, and return what came of it."""
    (folder / "run.toml").write_text(
        CONFIG.format(text=EXAMPLES / "text.txt", layout=layout, steps=steps, timeout=timeout)
    )
    script = folder / f"{name}.py"
    script.write_text(MAIN.format(patch=textwrap.dedent(patch)))
    command = [sys.executable, str(script)]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
                   str(script)]  # fmt: skip
    command += ["train", str(folder / "run.toml"), "--out", str(folder / name), "--json", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


def losses(folder, name):
    with (folder / name / "log.csv").open() as f:
        return [float(row["loss"]) for row in csv.DictReader(f)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The losses of one process."""
    folder = tmp_path_factory.mktemp("one")
    done = launch(folder, "one", 1)
    assert done.returncode == 0, done.stderr
    return losses(folder, "one")


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_two_processes_train_as_one_and_resume_as_if_never_stopped(tmp_path, one, layout):
    done = launch(tmp_path, "two", 2, layout, more=["--max-steps", "25"])
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["ranks"], record["samples_per_step"], record["tokens_per_step"]) == (2, 16, 16 * 16)
    assert record["measured"]["flops"] == record["forecast"]["flops"]
    if layout == "ddp":
        assert record["measured"]["peak_bytes"] == pytest.approx(record["forecast"]["peak_bytes"], rel=0.01)
    done = launch(tmp_path, "two", 2, layout, more=["--resume"])
    assert done.returncode == 0, done.stderr
    two = losses(tmp_path, "two")
    assert len(two) == len(one) == 50
    assert two == pytest.approx(one, rel=1e-5)
    assert one[-1] < one[0] - 1


def test_leaving_out_1_over_n_would_be_noticed(tmp_path, one):
    done = launch(tmp_path, "wrong", 1, patch=WITHOUT_1_OVER_N, steps=12)
    wrong = losses(tmp_path, "wrong")
    assert done.returncode in (0, 1), done.stderr
    assert wrong != pytest.approx(one[: len(wrong)], rel=1e-5)
    assert wrong[-1] / 4 != pytest.approx(one[len(wrong) - 1], rel=1e-3)  # not for the printed sum alone


@pytest.mark.parametrize(
    ("patch", "timeout"), [(LEAVES, 600), (HANGS, 5), (NEVER_COMES, 2)], ids=["exits", "hangs", "never"]
)
def test_a_rank_that_is_gone_is_named_and_nobody_waits_for_ever(tmp_path, patch, timeout):
    done = launch(tmp_path, "gone", 2, patch=patch, timeout=timeout)  # 120 s at most: a busy machine starts slowly
    assert done.returncode != 0
    assert "rank 0 waited for rank 1 of 2, which is gone or hangs" in done.stderr
    assert sorted(p.name for p in (tmp_path / "gone").glob("*.new")) == []
