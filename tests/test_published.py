"""Published runs are read as jobs: an empty cell is a stated default, a bad one an error that names it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from bursar.errors import BadInput
from bursar.frameworks import framework, frameworks
from bursar.jobs import Layout
from bursar.plan import published

FOLDER = Path(__file__).parent.parent / "data" / "published"
GPT = {
    "id": "t:1", "table": "t", "role": "score", "model": "GPT", "family": "gpt", "n_layers": "4", "d_model": "64",
    "n_heads": "4", "vocab": "1000", "seq_len": "128", "gpu": "a100-80g-sxm", "n_gpus": "8", "precision": "bf16",
    "framework": "megatron", "tp": "2", "pp": "2", "micro_batch": "1", "grad_accumulation": "4", "global_batch": "8",
    "measured_step_seconds": "1.5", "fits": "1",
}  # fmt: skip


@pytest.fixture(scope="module")
def runs() -> list[published.Run]:
    return published.read(FOLDER)


def test_every_row_is_a_run_and_only_rows_without_a_shape_are_skipped(runs):
    assert len(runs) == 1570
    reasons = {r.skip for r in runs if r.skip}
    assert reasons == {"flag no_shape", "flag impossible"}
    assert sum(bool(r.skip) for r in runs) == 13


def test_ranks_and_batches_multiply_as_printed(runs):
    with (FOLDER / "runs.csv").open(encoding="utf-8") as file:
        printed = {row["id"]: row for row in csv.DictReader(file)}
    for run in runs:
        row = printed[run.id]
        if run.job is None or not row["n_gpus"] or "layout_inconsistent" in run.flags:
            continue
        assert run.job.layout.ranks == int(row["n_gpus"]) == run.cluster.count
        if (
            all(row[c] for c in ("micro_batch", "grad_accumulation", "global_batch", "dp"))
            and "ga_printed" not in run.flags
        ):
            assert run.job.samples == int(row["micro_batch"]) * int(row["grad_accumulation"]) * int(row["dp"])


def test_an_empty_cell_takes_the_frameworks_default_and_says_so():
    run = published.run(GPT)
    assert run.job.layout == Layout(dp=2, tp=2, pp=2)
    assert run.job.model.d_ff == 4 * 64
    assert "dp = 2 (what is left of 8 GPUs)" in run.assumptions
    assert "recompute = none (Megatron-LM's default)" in run.assumptions


def test_a_full_cell_is_not_assumed():
    run = published.run({**GPT, "recompute": "full", "dp": "2", "attention": "naive", "zero_stage": "1",
                         "sequence_parallel": "0", "d_ff": "256"})  # fmt: skip
    assert run.assumptions == ()


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ({"d_model": "wide"}, "row t:1: d_model is 'wide', not a number"),
        ({"n_layers": "1.5"}, "row t:1: n_layers is 1.5, not a whole number"),
        ({"measured_step_seconds": "-1"}, "row t:1: measured_step_seconds is -1, which cannot be"),
        ({"measured_step_seconds": "nan"}, "row t:1: measured_step_seconds is nan, which cannot be"),
    ],
)
def test_a_cell_that_cannot_be_read_is_named(cells, said):
    with pytest.raises(BadInput) as error:
        published.run({**GPT, **cells})
    assert str(error.value) == said


@pytest.mark.parametrize(
    ("cells", "why"),
    [
        ({"flags": "no_shape"}, "flag no_shape"),
        ({"flags": "impossible"}, "flag impossible"),
        ({"gpu": "abacus"}, "no accelerator 'abacus'"),
        ({"precision": "fp7"}, "no precision 'fp7'"),
        ({"d_model": ""}, "no d_model"),
    ],
)
def test_a_row_that_no_forecast_can_be_made_for_says_why(cells, why):
    run = published.run({**GPT, **cells})
    assert run.job is None
    assert run.skip.startswith(why)


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ({"framework": "abacus"}, "what abacus does by default is taken from Megatron-LM"),
        ({"framework": "abacus", "zero_stage": "3"}, "what abacus does by default is taken from FSDP (LLM Foundry)"),
        ({"optimizer": "abacus"}, "optimizer = adamw (for 'abacus')"),
        ({"recompute": "every_other"}, "recompute = full (for 'every_other')"),
        ({"attention": "abacus"}, "attention = flash (for 'abacus')"),
        ({"gpu": ""}, "gpu = a100-80g-sxm (the source prints none)"),
        ({"n_layers": ""}, "n_layers = 24 (the source prints none; GPT-2 medium's)"),
    ],
)
def test_free_text_that_no_table_knows_is_an_assumption_and_not_a_skipped_row(cells, said):
    run = published.run({**GPT, **cells})
    assert run.job is not None
    assert said in run.assumptions


def test_flags_whose_numbers_cannot_be_read_are_passed_over():
    flags = "mtp=some;etp=;mla=1/2;moe_layer_freq=([0]*3+[1]*11);head_dim=x;cpu_offload_layers=y;model_parallel=?"
    assert published.run({**GPT, "flags": flags}).job.layout.expert_tp == 1


def test_a_folder_without_the_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(BadInput, match=r"no runs\.csv in"):
        published.read(tmp_path)


def test_a_file_without_the_columns_is_an_error_that_names_them(tmp_path):
    (tmp_path / "runs.csv").write_text("id,table\n1,t\n")
    with pytest.raises(BadInput, match="has no column role, gpu, n_gpus, framework"):
        published.read(tmp_path)


def test_every_framework_says_where_its_habits_are_written():
    assert all(row.source and row.gradient_bytes for row in frameworks().values())
    assert framework("Megatron-Core").name == "megatron"


@pytest.mark.parametrize(("row", "printed"), [(1, 16), (2, 16), (3, 16), (8, 1), (9, 1), (10, 1)])
def test_a_micro_batch_that_nobody_printed_is_what_its_authors_printed_later(runs, row, printed):
    """Megatron's table of January 2021 has none; the paper's table 1 of April prints one for the same model."""
    by_id = {r.id: r for r in runs}
    early, late = by_id[f"b3_megatron_jan2021_table:{row}"], by_id[f"b_megatron2021_table1:{row}"]
    assert late.job.micro_batch == printed
    assert early.job.micro_batch == printed
    assert any("the quickest by forecast that fits" in note for note in early.assumptions)
    assert not any("quickest" in note for note in late.assumptions)
