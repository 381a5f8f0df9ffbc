"""The comparison's hand counts are right, and its verdicts can go against any tool (benchmarks/counters.py)."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture(scope="module")
def benchmark() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        names = ("counter_cases", "counter_tools", "counters")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def case(benchmark: Any, name: str) -> Any:
    return next(c for c in benchmark.counter_cases.cases() if c.name == name)


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("ResNet-50", 2 * 4_089_184_256, None),  # 4.09 GMACs, as torchvision publishes of its v1.5
        ("MobileNetV2", 601_548_544, 1_181_421_056),
        ("LSTM", 1_966_080, 3_145_728),
        ("einsum ij,jk,kl->il", 786_432, None),
        ("TransformerEncoderLayer, eval", 4_718_592, None),
        ("while_loop", 40_960, None),
    ],
)
def test_the_hand_counts_are_the_published_ones(benchmark, name, forward, backward):
    c = case(benchmark, name)
    assert c.forward[""] == forward
    assert backward is None or c.step[""] - c.forward[""] == backward


CHEAP = ("MLP", "grouped convolution", "transposed convolution", "Llama block, GQA", "attention on the CPU", "LSTM",
         "bmm", "LoRA", "checkpointed MLP", "while_loop", "FFT", "elementwise only")  # fmt: skip


@pytest.mark.parametrize("name", CHEAP)
def test_bursar_equals_the_hand_count(benchmark, name):
    c = case(benchmark, name)
    assert benchmark.counter_tools.bursar_forward(c) == (c.forward[""], "")
    if c.step:
        assert benchmark.counter_tools.bursar_step(c) == (c.step[""], "")


def test_adamws_update_is_fourteen_flops_per_parameter(benchmark):
    c = case(benchmark, "AdamW's update")
    assert benchmark.counter_tools.bursar_step(c)[0] == c.step[""]


def test_bursar_names_a_custom_op_and_is_not_called_right_for_it(benchmark):
    c, bursar = case(benchmark, "custom op"), benchmark.counter_tools.TOOLS[0]
    value, said = benchmark.counter_tools.bursar_forward(c)
    assert (value, "product" in said) == (0, True)
    found = {"value": value, "named": ["product"]}
    assert benchmark.counters.verdict(c, bursar, "forward", found) == "named, 0"
    assert benchmark.counters.verdict(c, bursar, "forward", {**found, "named": []}) == "**0**"


@pytest.mark.parametrize(
    ("share", "named", "said"),
    [
        (1.0, [], "right"),
        (0.98, [], "**×0.98**"),
        (0.98, ["scaled_dot_product"], "named, ×0.98"),
        (0.998, [], "**×0.9980**"),
        (1.5, [], "**×1.50**"),
    ],
)
def test_a_figure_is_right_or_off_and_the_silent_are_told_from_those_who_say_so(benchmark, share, named, said):
    c, tool = case(benchmark, "GPT-2 small, causal"), benchmark.counter_tools.TOOLS[1]
    found = {"value": round(c.forward[""] * share), "named": named}
    assert benchmark.counters.verdict(c, tool, "forward", found) == said


def test_the_full_square_is_a_convention_and_an_estimate_is_none(benchmark):
    c, tools = case(benchmark, "GPT-2 small, causal"), {t.name: t for t in benchmark.counter_tools.TOOLS}
    square = {"value": c.step["full square"], "named": []}
    assert benchmark.counters.verdict(c, tools["torch, meta"], "step", square) == "right, full square"
    assert benchmark.counters.verdict(c, tools["torchlens"], "step", square) == "est. ×1.02"
    assert benchmark.counters.verdict(c, tools["thop"], "step", None) == "–"
    assert benchmark.counters.verdict(c, tools["thop"], "forward", {"error": "no"}) == "crash"


def cells(page: Path) -> dict[str, list[str]]:
    """The rows of a page's first table by their first cell."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| counter"))
    rows = [line.strip("| ").split(" | ") for line in lines[start:] if line.startswith("|") or not line]
    return {row[0]: row[1:] for row in rows[: [len(row) for row in rows].index(1)]}


def test_the_comparison_says_what_was_measured():
    root = Path(__file__).parents[1]
    measured, told = cells(root / "benchmarks" / "counters.md"), cells(root / "docs" / "comparison.md")
    assert told.keys() == measured.keys()
    assert {name: row[:9] for name, row in told.items()} == {name: row[:9] for name, row in measured.items()}
