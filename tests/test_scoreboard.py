"""What forecasts of published runs reach, and that the page of it is what the command says."""

from __future__ import annotations

from pathlib import Path

import pytest

from bursar.plan import intervals, published, validate
from bursar.report import validate as page

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "data" / "published"
A100_LAYOUTS = (
    "b_megatron2021_table1", "b3_megatron_jan2021_table", "c_korthikanti2022_table3_5", "j_bloom176b_layout_sweep",
    "v_vtrain_multi_node_measured",
)  # fmt: skip


@pytest.fixture(scope="module")
def board() -> validate.Scoreboard:
    return validate.validate(published.read(FOLDER))


def line(board, table, target):
    return next(x for x in board.lines if (x.table, x.target) == (table, target))


def test_no_row_that_could_be_scored_is_skipped(board):
    excused = {*validate.EXCUSED, "the source prints none", "fewer than three layouts of its model and batch"}
    assert {why for x in board.lines for why in x.reasons} <= excused


def test_a100_layouts_are_forecast_within_eight_percent_after_one_scale(board):
    lines = [line(board, table, "step_time") for table in A100_LAYOUTS]
    assert sum(x.scaled_mape * x.rows for x in lines) / sum(x.rows for x in lines) < 0.08


@pytest.mark.parametrize(
    ("table", "most"), [("g_mosaic_llm_foundry", 0.08), ("v_vtrain_single_node_measured", 0.15), ("h_torchtitan", 0.14)]
)
def test_step_time_stays_within_its_bound_after_one_scale(board, table, most):
    assert line(board, table, "step_time").scaled_mape < most


def test_every_table_of_step_times_beats_one_constant_per_gpu(board):
    worse = [x.table for x in board.lines if x.target == "step_time" and x.scaled_mape > x.floor_mape]
    assert worse == []


def test_memory_is_forecast_within_its_bounds(board):
    golden = "y_megatron_ci_memory_golden"
    assert line(board, golden, "steady_memory").mape < 0.03
    assert line(board, golden, "peak_memory").mape < 0.08
    bloom = line(board, "j_bloom176b_layout_sweep", "fits")
    assert bloom.within_10 >= 0.95
    assert bloom.oom_caught == bloom.oom_rows == 3


def test_intervals_of_step_times_cover_four_fifths_of_all_runs(board):
    assert 0.75 <= board.coverage["step_time"] <= 0.85


def test_the_errors_that_intervals_learn_from_are_those_found(board):
    kept = {(e.target, e.table, e.kind, e.generation): e for e in intervals.published()}
    found = {(e.target, e.table, e.kind, e.generation): e for e in board.errors()}
    assert kept.keys() == found.keys()
    for key, e in found.items():
        assert kept[key].rows == e.rows
        assert kept[key].log_errors == pytest.approx(e.log_errors, abs=2e-3)


def test_the_scoreboard_of_the_docs_is_what_the_command_writes(board):
    written = (ROOT / "docs" / "scoreboard.md").read_text(encoding="utf-8")
    said = page.markdown(board, "data/published", written.split("(", 1)[1].split(")", 1)[0])
    assert written == said, "run: bursar validate data/published --markdown docs/scoreboard.md"
