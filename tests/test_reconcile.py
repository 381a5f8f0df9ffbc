"""Forecast and measurement side by side: the real step's FLOPs, peak and seconds against its ledger."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from bursar.errors import NoAnswer
from bursar.meter import measured as metered
from bursar.meter.measured import _matched, measure
from bursar.reconcile import SLACK_BYTES, Line, Measured, reconcile
from bursar.workload.resolve import resolve
from bursar.workload.step import run
from command import ask

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def briefly():
    """One thread and few steps: what is asserted are counts."""
    threads, budget = torch.get_num_threads(), metered.BUDGET_SECONDS
    torch.set_num_threads(1)
    metered.BUDGET_SECONDS = 0.0
    yield
    torch.set_num_threads(threads)
    metered.BUDGET_SECONDS = budget


def both(model, sizes, **options):
    work = resolve(model, *sizes)
    ledger = run(work, on="cpu", fold=False, **options)
    return ledger, measure(work, ledger, CPU, **options)


@pytest.mark.parametrize(
    ("model", "sizes", "options"),
    [
        ("mlp:H=64,D=32", (16, None), {"optimizer": "sgd"}),
        ("gpt2:L=2,d=32,h=2,V=100", (2, 16), {"accumulate": 2, "precision": "bf16-mixed"}),
        ("gpt2:L=2,d=32,h=2,V=100", (2, 16), {"zero_grad": "zeros", "optimizer": "momentum"}),
        ("llama3-8b:L=2,d=32,h=4,kv=2,F=64,V=100", (1, 16), {"recompute": "full"}),
    ],
    ids=str,
)
def test_the_books_balance_and_every_row_has_its_seconds(model, sizes, options):
    ledger, measured = both(model, sizes, **options)
    found = reconcile(ledger, measured)
    errors = {x.what: x.error for x in found.lines}
    assert errors["model FLOPs"] == errors["hardware FLOPs"] == 0
    assert measured.peak_bytes == pytest.approx(ledger.memory.peak_bytes, rel=1e-3, abs=SLACK_BYTES)
    assert found.balances
    assert found.unmatched == 0
    assert all(s > 0 for s in measured.rows)
    for parts in (found.by_kind, found.by_phase, found.by_module):
        assert sum(p.seconds for p in parts) == pytest.approx(measured.profiled_seconds)
        assert sum(p.flops for p in parts) == ledger.flops.hardware
        assert sum(p.calls for p in parts) == len(ledger)


RECURRENT = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.layers = nn.Embedding(50, 16), nn.LSTM(16, 16, 2)
    def forward(self, ids):
        return self.layers(self.table(ids))[0].square().mean()
def make(): return Net(), torch.arange(24).view(6, 4)
"""


def test_a_recurrent_kernel_counts_the_gradients_that_are_wanted_in_both_books(tmp_path):
    (tmp_path / "net.py").write_text(RECURRENT)
    ledger, measured = both(f"{tmp_path}/net.py:make", (None, None), optimizer="sgd")
    forward = 2 * (6 * 4) * 4 * 16 * (16 + 16) * 2  # 2·T·B per weight, four gates, two layers
    first_state = 2 * 4 * 4 * 16 * 16 * 2  # which no gradient is wanted of: one step of one matrix, in each layer
    assert ledger.flops.forward == forward
    assert ledger.flops.backward == 2 * forward - first_state
    assert (measured.model_flops, measured.hardware_flops) == (ledger.flops.model, ledger.flops.hardware)


def test_a_forecast_that_is_wrong_does_not_balance():
    ledger, measured = both("mlp:H=64,D=32", (16, None), optimizer="sgd")
    for change in ({"model_flops": measured.model_flops + 2}, {"peak_bytes": measured.peak_bytes * 2}):
        found = reconcile(ledger, dataclasses.replace(measured, **change))
        assert not found.balances
        assert found.lines[0].error == min(x.error for x in found.lines)  # the largest difference first


def test_seconds_are_a_line_only_where_they_were_forecast():
    ledger, measured = both("mlp:H=64,D=32", (16, None), optimizer="sgd")
    assert "seconds" not in {x.what for x in reconcile(ledger, measured).lines}
    found = ledger.reconcile(measured, measured.seconds * 2)
    assert next(x for x in found.lines if x.what == "seconds").error == pytest.approx(1.0)


def test_scratch_is_named_where_a_library_takes_it(tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def make():\n"
        "    net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))\n"
        "    return net, torch.randn(4, 3, 16, 16)\n"
    )
    ledger, measured = both(f"{tmp_path}/net.py:make", (None, None), optimizer="sgd")
    found = next(x for x in reconcile(ledger, measured).lines if x.what == "peak memory")
    assert abs(found.error) < 1e-3
    assert "scratch that no op shows: " in found.cause
    assert "oneDNN's blocked layouts in aten.convolution_backward" in found.cause
    unknown = dataclasses.replace(measured, peak_bytes=ledger.memory.peak_bytes * 2)
    assert "oneDNN" in next(x.cause for x in reconcile(ledger, unknown).lines if x.what == "peak memory")


def test_a_step_that_will_not_fit_is_refused_before_it_runs():
    work = resolve("mlp:H=64,D=32", 16, None)
    ledger = run(work, on="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metered.memory, "there_are", lambda device: 1000)
        patch.setattr(metered, "real", lambda *a, **k: pytest.fail("it was built"))
        with pytest.raises(NoAnswer, match="smaller batch"):
            measure(work, ledger, CPU)


def test_a_step_that_raises_leaves_nothing_behind(tmp_path):
    (tmp_path / "bad.py").write_text(
        "import torch\n"
        "calls = []\n"
        "class Bad(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(4, 4)\n"
        "    def forward(self, x):\n"
        "        calls.append(0)\n"
        "        if len(calls) > 6:\n"
        "            raise ValueError('mid-measure')\n"
        "        return self.layer(x)\n"
        "def make():\n"
        "    return Bad(), torch.randn(2, 4)\n"
    )
    work = resolve(f"{tmp_path}/bad.py:make", None, None)
    ledger = run(work, on="cpu")
    with pytest.raises(ValueError, match="mid-measure"):
        measure(work, ledger, CPU)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    both("cruncher", (2, None))


def test_rows_find_their_events_in_order():
    events = [("aten::empty", 0, 1, 1.0), ("aten::mm", 1, 5, 4.0), ("aten::add", 2, 3, 1.0), ("aten::add_", 6, 7, 2.0)]
    assert _matched(["aten.mm", "aten.add"], events) == (1, 3)  # the add within mm is its own
    assert _matched(["aten.mm", "aten.exp", "aten.add"], events) == (1, None, 3)


def test_the_median_and_what_a_line_says():
    measured = Measured("cpu", "x", 1, 1, 1, (3.0, 1.0, 2.0, 10.0), 1.0)
    assert (measured.seconds, measured.spread) == (2.5, (1.0, 10.0))
    assert Line("x", "B", 99, 100, 0.01).balances
    assert not Line("x", "B", 98, 100, 0.01).balances
    assert Line("x", "FLOP", 0, 0, 0.0).balances


def test_the_command(capsys):
    code, out, _ = ask(capsys, "step", "cruncher", "--measure")
    assert code == 0
    assert "equal" in out
    answer = json.loads(ask(capsys, "step", "cruncher", "--measure", "--json")[1])
    assert answer["balances"] is True
    assert {x["what"] for x in answer["lines"]} == {"model FLOPs", "hardware FLOPs", "peak memory"}
    assert {p["name"] for p in answer["by_phase"]} == {"forward", "backward", "optimizer"}
    code, _, err = ask(capsys, "step", "cruncher", "--measure", "--on", "h100-sxm")
    assert code == 2
    assert "on this machine, not on h100-sxm" in err
