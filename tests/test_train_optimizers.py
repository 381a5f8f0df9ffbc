"""Every optimizer in the trainer: it learns, resumes to the last bit, two ranks train as one; and a compiled run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import typing

import pytest
import torch

from bursar.optimizers import OPTIMIZERS
from bursar.train import config, loop, step
from bursar.workload import optimizers
from bursar.workload.optimizers import inner, uncompiled
from test_train import CRUNCHER, EXAMPLES, GPT, losses, run, weights

# 64 wide, so that matrices have the 4096 elements from which torchao keeps 8-bit states
WIDE = {**GPT, "model": "gpt2:L=1,d=64,h=2,V=256,T=32", "data": str(EXAMPLES / "text.txt"), "batch_size": 4,
        "global_batch_size": 8, "steps": 4, "warmup_steps": 0, "checkpoint_every": 2}  # fmt: skip
LR = {"sgd": 0.3, "lion": 3e-3}  # where the catalogue's own would not show in four steps


def table(name, **change):
    return {**WIDE, "optimizer": name, "lr": LR.get(name, OPTIMIZERS[name].settings["lr"]), **change}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Folder and record of an unbroken run of one process, and what was forecast of it, each optimizer run once."""
    folder, done = tmp_path_factory.mktemp("straight"), {}
    forecast = loop.forecast

    def once(name, **change):
        label = "-".join([name, *change.values()])
        if label not in done:
            with pytest.MonkeyPatch.context() as patch:
                kept = []
                patch.setattr(loop, "forecast", lambda *given: kept.append(forecast(*given)) or kept[0])
                done[label] = (folder / label, run(folder, table(name, **change), label), kept[0])
        return done[label]

    return once


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_and_resumes_to_the_last_bit(tmp_path, monkeypatch, straight, name):
    settings = table(name)
    unbroken, record, ahead = straight(name)
    monkeypatch.setattr(loop, "forecast", lambda *given: ahead)  # of the same step: not traced again
    run(tmp_path, settings, "broken", max_steps=2)
    run(tmp_path, settings, "broken", resume=True)
    assert losses(tmp_path / "broken") == losses(unbroken)
    assert record.final_loss < record.first_loss
    assert record.measured.flops == record.forecast.flops
    assert record.measured.peak_bytes == pytest.approx(record.forecast.peak_bytes, rel=2e-3)
    with uncompiled():
        a, b = (weights(of, settings) for of in (unbroken, tmp_path / "broken"))
    for p, q in zip(a.module.parameters(), b.module.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in a.optimizer.state[p].items():
            other = b.optimizer.state[q][key]
            if isinstance(value, torch.Tensor):
                assert all(torch.equal(x, y) for x, y in zip(inner(value), inner(other), strict=True)), key
            else:
                assert value == other


TWO = """
    # Several runs in one process group: made at the first, and the forecast, made once, does not see it.
    import contextlib, json, os, sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from bursar import ranks
    from bursar.train import config, loop

    folder, made, plain, kept = Path(sys.argv[1]), contextlib.ExitStack(), loop.forecast, []
    group = ranks.group

    def once(*given):
        if not torch.distributed.is_initialized():
            made.enter_context(group(*given))
        return contextlib.nullcontext()

    loop.forecast = lambda *given: kept[0] if kept else kept.append(plain(*given)) or kept[0]
    ranks.group = once
    for name, table in json.loads(sys.argv[2]).items():
        loop.train(config.decode(table, folder), "run", folder / name)
    made.close()
"""
HALVED = {"precision": "fp16-mixed"}
CASES = [(layout, name, {}) for layout in ("ddp", "fsdp") for name in ("adamw", "muon", "lion", "adamw-8bit")]
CASES.append(("fsdp", "adamw", HALVED))  # the scale is one for all shards


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two ranks trained every case, in one launch."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "two.py").write_text(textwrap.dedent(TWO))
    tables = {"-".join([layout, name, *more.values()]): table(name, layout=layout, **more)
              for layout, name, more in CASES}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(folder / "two.py"), str(folder), json.dumps(tables)],
        capture_output=True, text=True, timeout=400, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(("layout", "name", "more"), CASES, ids=str)
def test_two_ranks_train_as_one_under_sharded_and_quantised_optimizers(two, straight, layout, name, more):
    alone, _, _ = straight(name, **more)
    # 8-bit blocks of 256 lie otherwise over shards; fp16 rounds each micro-batch's sum
    tolerance = 1e-3 if name == "adamw-8bit" or more else 1e-5
    assert losses(two / "-".join([layout, name, *more.values()])) == pytest.approx(losses(alone), rel=tolerance)


# The trainer's precisions beside the rows of `bursar optimizers --bytes`; it keeps no fp32 states over bf16 weights
ROWS = {"fp32": "fp32", "bf16": "bf16, all of it (torch's AdamW)", "bf16-mixed": "bf16 autocast",
        "fp16-mixed": "bf16 autocast"}  # fmt: skip


@pytest.fixture(scope="module")
def byte_table():
    return {row.precision: row for row in optimizers.byte_table()}


@pytest.mark.parametrize(("precision", "optimizer"), [*((p, "adamw") for p in ROWS), ("fp32", "adamw-8bit")])
def test_the_trainer_keeps_the_bytes_per_parameter_of_the_table(tmp_path, byte_table, precision, optimizer):
    assert set(ROWS) == set(typing.get_args(typing.get_type_hints(config.Config)["precision"]))
    label = ROWS[precision] if optimizer == "adamw" else "fp32, 8-bit states"
    row = byte_table[label]
    settings = {**CRUNCHER, "model": "mlp:D=1024,H=1024,L=1,K=8", "precision": precision, "optimizer": optimizer}
    made = config.decode(settings, tmp_path)
    trainee = step.make(made, torch.device("cpu"))
    batch = step.cast(made, made.preset.make_batch(made.batch_size, None))
    weight = next(p for p in trainee.module.parameters() if p.shape == (1024, 1024))
    step.gradients(made, trainee, batch)
    gradient = optimizers.bytes_of(weight.grad) / weight.numel()
    with uncompiled():
        step.update(made, trainee, batch, 0)
    state = [v for v in trainee.optimizer.state[weight].values() if isinstance(v, torch.Tensor) and v.dim()]
    states = sum(map(optimizers.bytes_of, state)) / weight.numel()
    assert (optimizers.bytes_of(weight) / weight.numel(), gradient, states, 0) == (
        row.parameters, row.gradients, row.optimizer_state, row.master
    )  # fmt: skip


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
