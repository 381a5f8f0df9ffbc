"""The fake accelerator against what real CUDA devices did (benchmarks/cuda_fixtures.py recorded it).

Without a recorded file these tests hold the comparison itself: a fixture made here, from the real CPU, must agree with
the CPU trace, and one that was tampered with must not.
"""

import importlib.util
import json
from pathlib import Path

import pytest

from bursar.rules import FREE
from bursar.trace import tracing
from reference_models import CASES, build

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FILES = sorted((BENCHMARKS / "fixtures").glob("*.json"))
# Ops that differ by name only: what torch's CPU or CUDA build calls what the trace calls otherwise
# Under a dispatch mode, which records a fixture, autograd sums two gradients into a new tensor; without one, in place.
SAME = {"aten.add_": "aten.add", "aten.cudnn_batch_norm": "aten.native_batch_norm", "aten.detach_": "aten.detach"}


def recorder():
    spec = importlib.util.spec_from_file_location("cuda_fixtures", BENCHMARKS / "cuda_fixtures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def traced(name: str, on: str | None):
    device = "cpu" if on == "cpu" else "cuda"
    with tracing(on=on) as session:
        import torch

        with torch.device(device):
            running = build(CASES[name], device=device)
        running.step()
        running.step()
    return session.ledger


def disagreements(case: dict, ledger) -> list[str]:
    """What the fixture and the ledger do not agree on, in words."""
    found = []
    recorded = [case["op_names"][i].split() for i in case["ops"]]
    theirs = [SAME.get(op, op) for op, _ in recorded if op not in FREE]
    ours = [SAME.get(row.op, row.op) for row in ledger.recorded if row.op not in FREE]
    if theirs != ours:
        at = next(
            (i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours))
        )
        found.append(f"op {at}: {theirs[at : at + 3]} there, {ours[at : at + 3]} here ({len(theirs)} and {len(ours)})")
    if "allocated_peak_bytes" in case:
        ratio = ledger.memory.peak_bytes / case["allocated_peak_bytes"]
        if not 0.9 <= ratio <= 1.02:  # library workspaces are outside the trace
            found.append(f"peak {ledger.memory.peak_bytes} here, {case['allocated_peak_bytes']} there")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_fake_accelerator_runs_the_ops_of_a_real_one(path):
    fixture = json.loads(path.read_text())
    told = {name: disagreements(case, traced(name, None)) for name, case in fixture["cases"].items()}
    assert {name: words for name, words in told.items() if words} == {}


@pytest.mark.parametrize("name", ["mlp/adamw/fp32", "gpt/adamw/fp32", "gpt/adamw/ckpt"])
def test_a_fixture_recorded_on_this_cpu_agrees_with_the_cpu_trace(name):
    assert disagreements(recorder().record(name, "cpu"), traced(name, "cpu")) == []


def test_a_fixture_that_was_tampered_with_does_not_agree():
    case = recorder().record("mlp/sgd/fp32", "cpu")
    ledger = traced("mlp/sgd/fp32", "cpu")
    assert disagreements(case, ledger) == []
    dropped = next(i for i, n in enumerate(case["ops"]) if case["op_names"][n].startswith("aten.addmm"))
    tampered = {**case, "ops": case["ops"][:dropped] + case["ops"][dropped + 1 :]}
    assert disagreements(tampered, ledger)
    assert disagreements({**case, "allocated_peak_bytes": 2 * ledger.memory.peak_bytes}, ledger)


def test_the_bytes_autograd_saves_are_the_activations_of_the_trace():
    case = recorder().record("mlp/adamw/fp32", "cpu")
    kept = traced("mlp/adamw/fp32", "cpu").memory.after_forward["activations"]
    assert case["saved_bytes"] == kept
