"""Faults in the middle of a measurement: the figures there were are kept, and nothing stays behind."""

from __future__ import annotations

import json
import resource

import pytest
import torch

from bursar.errors import StepFailed
from bursar.meter import guard
from bursar.meter import measured as metered
from bursar.workload.resolve import resolve
from bursar.workload.step import run
from command import ask

CPU = torch.device("cpu")
AFTER_PEAK = 4  # steps: two to warm up, one for the FLOPs, one for the peak; the fault comes in the fifth

MODEL = """
import torch
calls = []
class Faulty(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 64)
    def forward(self, x):
        y = self.layer(x)
        if type(self.layer.weight.data) is torch.Tensor and type(x) is torch.Tensor:
            calls.append(0)
            if len(calls) > {after}:
                {fault}
        return y
def make():
    return Faulty(), torch.randn(8, 64)
"""
FLOPS = 2 * 2 * 8 * 64 * 64  # forward and dW; the input wants no gradient


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    """One thread and few steps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(metered, "BUDGET_SECONDS", 0.0)
    yield
    torch.set_num_threads(threads)


def written(tmp_path, fault, after=AFTER_PEAK):
    """A model that does ``fault`` in its real steps after so many."""
    path = tmp_path / "faulty.py"
    path.write_text(MODEL.format(fault=fault, after=after))
    return f"{path}:make"


def measure(name, how=guard.measure):
    work = resolve(name, None, None)
    ledger = run(work, on="cpu", optimizer="sgd")
    return how(work, ledger, CPU, optimizer="sgd")


def failure(name):
    with pytest.raises(StepFailed) as caught:
        measure(name)
    return caught.value


def nothing_stays():
    """No mode, no profiler, no limit; and a healthy step can be measured."""
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert not torch.autograd._profiler_enabled()
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY
    assert measure("cruncher").model_flops == 368


def test_a_step_that_raises_keeps_what_was_measured_and_names_the_line(tmp_path):
    failed = failure(written(tmp_path, "raise ValueError('mid-measure')"))
    assert failed.unfinished.kind == "raised"
    assert failed.unfinished.steps == AFTER_PEAK
    assert failed.unfinished.figures["model_flops"] == failed.ledger.flops.model == FLOPS
    assert failed.unfinished.figures["peak_bytes"] == pytest.approx(failed.ledger.memory.peak_bytes, abs=100)
    assert "step 5 of the measurement raised ValueError: mid-measure at " in str(failed)
    assert "faulty.py:13" in str(failed)
    assert isinstance(failed.__cause__, ValueError)
    nothing_stays()


def test_a_step_that_raises_at_once_has_measured_nothing(tmp_path):
    failed = failure(written(tmp_path, "raise ValueError('at once')", after=0))
    assert failed.unfinished.figures == {}
    assert failed.unfinished.steps == 0
    nothing_stays()


def test_without_the_guard_the_figures_would_be_lost(tmp_path):
    with pytest.raises(ValueError, match="mid-measure") as caught:
        measure(written(tmp_path, "raise ValueError('mid-measure')"), how=metered.measure)
    assert not hasattr(caught.value, "unfinished")


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_a_loss_that_is_no_number_ends_the_measurement(tmp_path, number):
    failed = failure(written(tmp_path, f"y = y * float('{number}')"))
    assert failed.unfinished.kind == "loss"
    assert "step 5 of the measurement gave no number: the loss is" in str(failed)
    assert failed.unfinished.figures["model_flops"] == FLOPS
    nothing_stays()


def test_without_the_guard_a_loss_of_nan_would_pass(tmp_path):
    assert measure(written(tmp_path, "y = y * float('nan')"), how=metered.measure).model_flops == FLOPS


TAKES_A_GIGABYTE = "self.held = torch.empty(2**30, dtype=torch.uint8)"


def test_a_step_that_takes_more_than_is_free_is_an_error_and_not_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "available", lambda: 2.0**28)
    failed = failure(written(tmp_path, TAKES_A_GIGABYTE))
    assert failed.unfinished.kind == "memory"
    assert "ran out of memory" in str(failed)
    assert "268 MB were free: it took more than was forecast" in str(failed).replace("; it", ": it")
    assert failed.unfinished.figures["peak_bytes"] > 0
    nothing_stays()


def test_without_the_limit_the_system_would_promise_it(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "available", lambda: float("inf"))
    assert measure(written(tmp_path, TAKES_A_GIGABYTE)).model_flops == FLOPS


def test_what_would_have_fitted_is_said():
    work = resolve("mlp:H=64,D=32", 64, None)
    ledger = run(work, on="cpu", optimizer="sgd")
    peak, stands = ledger.memory.peak_bytes, sum(ledger.memory.between_steps.values())
    told = guard.remedy(ledger, guard.Unfinished("memory", "", "", 0, "cpu", {}), (peak + stands) // 2)
    assert "a batch of 31 would fit" in told or "a batch of 32 would fit" in told  # half of what a batch adds
    assert "no batch would fit" in guard.remedy(ledger, guard.Unfinished("memory", "", "", 0, "cpu", {}), stands)


def test_ctrl_c_keeps_what_was_measured(tmp_path):
    failed = failure(written(tmp_path, "raise KeyboardInterrupt"))
    assert failed.unfinished.kind == "stopped"
    assert failed.unfinished.figures["model_flops"] == FLOPS
    nothing_stays()


def test_the_command_prints_what_there_is_and_answers_no(tmp_path, capsys):
    name = written(tmp_path, "raise ValueError('mid-measure')")
    code, out, err = ask(capsys, "step", name, "--optimizer", "sgd", "--measure", "--json")
    found = json.loads(out)
    assert code == 1
    assert found["partial"] is True
    assert found["failed"]["kind"] == "raised"
    assert {x["what"] for x in found["lines"]} == {"model FLOPs", "hardware FLOPs", "peak memory"}
    assert all(x["balances"] for x in found["lines"])
    assert "mid-measure" in err
    code, out, err = ask(capsys, "step", name, "--optimizer", "sgd", "--measure")
    assert code == 1
    assert "the measurement ended in step" in out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_loss_is_read_where_it_lies(dtype):
    for number in (1.5, -0.25, float("inf")):
        assert guard.value(torch.tensor(number, dtype=dtype)) == number
    read = guard.value(torch.tensor(float("nan"), dtype=dtype))
    assert read != read
    assert guard.value(torch.tensor([1.0, 2.0], dtype=dtype)) is None
