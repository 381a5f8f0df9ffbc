"""Every optimizer in the trainer: it learns, resumes to the last bit, two ranks train as one; and a compiled run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from bursar.optimizers import OPTIMIZERS
from bursar.workload.optimizers import inner, uncompiled
from test_train import CRUNCHER, EXAMPLES, GPT, losses, run, weights

# 64 wide, so that matrices have the 4096 elements from which torchao keeps 8-bit states
WIDE = {**GPT, "model": "gpt2:L=1,d=64,h=2,V=256,T=32", "data": str(EXAMPLES / "text.txt"), "batch_size": 4,
        "global_batch_size": 8, "steps": 4, "warmup_steps": 0, "checkpoint_every": 2}  # fmt: skip
LR = {"sgd": 0.3, "lion": 3e-3}  # where the catalogue's own would not show in four steps


def table(name, **change):
    return {**WIDE, "optimizer": name, "lr": LR.get(name, OPTIMIZERS[name].settings["lr"]), **change}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_and_resumes_to_the_last_bit(tmp_path, name):
    settings = table(name)
    straight = run(tmp_path, settings, "straight")
    run(tmp_path, settings, "broken", max_steps=2)
    run(tmp_path, settings, "broken", resume=True)
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")
    assert straight.final_loss < straight.first_loss
    assert straight.measured.flops == straight.forecast.flops
    assert straight.measured.peak_bytes == pytest.approx(straight.forecast.peak_bytes, rel=2e-3)
    with uncompiled():
        a, b = (weights(tmp_path / of, settings) for of in ("straight", "broken"))
    for p, q in zip(a.module.parameters(), b.module.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in a.optimizer.state[p].items():
            other = b.optimizer.state[q][key]
            if isinstance(value, torch.Tensor):
                assert all(torch.equal(x, y) for x, y in zip(inner(value), inner(other), strict=True)), key
            else:
                assert value == other


TWO = """
    # Several runs in one process group: made at the first, and the forecasts do not see it.
    import contextlib, json, os, sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from bursar import ranks
    from bursar.train import config, loop

    folder, made, plain, lay_out = Path(sys.argv[1]), contextlib.ExitStack(), loop.forecast, ranks.lay_out
    group = ranks.group

    def forecast(*given):
        ranks.lay_out = lambda module, *rest: module
        try:
            return plain(*given)
        finally:
            ranks.lay_out = lay_out

    def once(*given):
        if not torch.distributed.is_initialized():
            made.enter_context(group(*given))
        return contextlib.nullcontext()

    loop.forecast, ranks.group = forecast, once
    for name, table in json.loads(sys.argv[2]).items():
        loop.train(config.decode(table, folder), "run", folder / name)
    made.close()
"""


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_two_ranks_train_as_one_under_sharded_and_quantised_optimizers(tmp_path, layout):
    cases = {name: table(name, layout=layout) for name in ("adamw", "muon", "lion", "adamw-8bit")}
    if layout == "fsdp":  # the scale is one for all shards
        cases["fp16"] = table("adamw", layout=layout, precision="fp16-mixed")
    (tmp_path / "two.py").write_text(textwrap.dedent(TWO))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(tmp_path / "two.py"), str(tmp_path), json.dumps(cases)],
        capture_output=True, text=True, timeout=240, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name, settings in cases.items():
        run(tmp_path, settings, f"{name}-alone")
        # 8-bit blocks of 256 lie otherwise over shards; fp16 rounds each micro-batch's sum
        tolerance = 1e-3 if name in ("adamw-8bit", "fp16") else 1e-5
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / f"{name}-alone"), rel=tolerance), name


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # inductor's own import
def test_a_compiled_run_learns_resumes_and_knows_its_flops(tmp_path):
    settings = {**CRUNCHER, "compile": True, "steps": 60, "checkpoint_every": 30}
    straight = run(tmp_path, settings, "straight")
    run(tmp_path, settings, "broken", max_steps=30)
    assert run(tmp_path, settings, "broken", resume=True).steps == 60
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")
    assert straight.final_loss < straight.first_loss / 2
    assert straight.measured.flops == straight.forecast.flops  # counted eagerly, before
    assert any("compile: FLOPs, bytes and peak are the eager step's" in text for text in straight.assumptions)
    plain = run(tmp_path, {**settings, "compile": False}, "plain")
    assert plain.final_loss == pytest.approx(straight.final_loss, rel=1e-4)
    assert not any("compile" in text for text in plain.assumptions)
