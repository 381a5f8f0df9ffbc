"""Levers: each does what it says, changes nothing where it should not, and the named sets are the best there are."""

from __future__ import annotations

import json

import pytest

from bursar.architecture import preset
from bursar.errors import BadInput, UnknownName
from bursar.hardware import cluster
from bursar.jobs import Job, Layout, decoder
from bursar.plan.levers import (
    LEVERS,
    Case,
    Settings,
    break_even_density,
    held,
    lever,
    levers,
    lora_parameters,
    measure,
    pull,
)
from bursar.step_time import parameters
from command import ask

LLAMA = decoder(preset("llama3-8b"))
GPT2 = decoder(preset("gpt2"))
ONE, EIGHT = cluster("a100-80g-sxm"), cluster("8xa100-80g-sxm")


def base(on, batch=4, seq_len=1024, model=LLAMA):
    return Case(Job(model, seq_len, Layout(dp=on.count), batch, 1, attention="naive", framework="fsdp"))


@pytest.fixture(scope="module")
def alone():
    return levers(LLAMA, ONE, batch=4, seq_len=1024)


@pytest.fixture(scope="module")
def together():
    return levers(LLAMA, EIGHT, batch=2, seq_len=2048)


@pytest.mark.parametrize("name", ["zero-1", "zero-2", "zero-3", "sparse-gradients", "bf16-gradients-sent"])
def test_on_one_device_what_is_shared_or_sent_changes_nothing(name):
    said = lever(name).apply(base(ONE), ONE, Settings())
    assert isinstance(said, str)
    assert said.startswith("one device")


def test_a_lever_that_does_something_on_one_device_would_be_noticed():
    assert not isinstance(lever("checkpointing").apply(base(ONE), ONE, Settings()), str)


@pytest.mark.parametrize("row", [x for x in LEVERS if x.name != "sparse-gradients"], ids=lambda x: x.name)
def test_no_lever_takes_more_memory(row):
    for on in (ONE, EIGHT):
        after = row.apply(base(on), on, Settings())
        if not isinstance(after, str):
            assert held(after, on)[1] <= held(base(on), on)[1] * (1 + 1e-9)


def test_pulling_nothing_is_the_job_itself():
    assert pull(base(ONE), (), ONE, Settings()) == base(ONE)


def test_bf16_states_are_half_of_everything_that_is_kept():
    before, after = held(base(ONE), ONE)[2], held(pull(base(ONE), [lever("bf16-states")], ONE, Settings()), ONE)[2]
    p = parameters(LLAMA)
    assert before["parameters"] == pytest.approx(4 * p, rel=1e-3)
    assert after["parameters"] == pytest.approx(2 * p, rel=1e-3)
    assert before["optimizer_state"] == pytest.approx(8 * p, rel=1e-3)
    assert after["optimizer_state"] == pytest.approx(4 * p, rel=1e-3)


def test_eight_bit_states_are_about_two_bytes_per_parameter():
    after = held(pull(base(ONE), [lever("8bit-states")], ONE, Settings()), ONE)[2]
    tables = 2 * LLAMA.vocab_size * LLAMA.d_model  # bitsandbytes leaves embeddings in fp32: 8 bytes for two moments
    blocks = parameters(LLAMA) - tables
    assert after["optimizer_state"] == pytest.approx(2.03 * blocks + 8 * tables, rel=0.005)


def test_offloaded_states_leave_the_device_and_cross_the_link():
    case = pull(base(ONE), [lever("cpu-offload")], ONE, Settings())
    assert held(case, ONE)[2]["optimizer_state"] == 0
    p = parameters(LLAMA)
    # 2 bytes down and 2 up at 31 GB/s; 28 bytes read and written by the update at 100 GB/s
    assert case.host_seconds == pytest.approx(4 * p / 31e9 + 28 * p / 100e9)
    slower = measure(case, ONE).step_seconds - measure(base(ONE), ONE).step_seconds
    assert 0 < slower < case.host_seconds


def test_lora_trains_rank_times_in_plus_out_of_every_layer():
    # r (in + out) for q, o (4096 + 4096), k, v (4096 + 1024) and three of 4096 + 14336, 32 blocks
    per_block = 2 * 8192 + 2 * 5120 + 3 * 18432
    assert lora_parameters(LLAMA, 16) == 16 * 32 * per_block
    assert 41e6 < lora_parameters(LLAMA, 16) < 43e6  # what peft prints for Llama 3 8B with rank 16: 41 943 040
    after = held(pull(base(ONE), [lever("lora")], ONE, Settings()), ONE)[2]
    assert after["optimizer_state"] == pytest.approx(8 * lora_parameters(LLAMA, 16), rel=0.01)


def test_accumulation_keeps_the_batch_and_half_the_batch_does_not():
    kept = pull(base(ONE), [lever("accumulation")], ONE, Settings()).job
    half = pull(base(ONE), [lever("smaller-batch")], ONE, Settings()).job
    assert (kept.micro_batch, kept.samples) == (1, 4)
    assert (half.micro_batch, half.samples) == (2, 2)


def test_a_window_as_long_as_the_sequence_changes_nothing():
    assert isinstance(lever("windowed-attention").apply(base(ONE), ONE, Settings(window=1024)), str)
    assert not isinstance(lever("windowed-attention").apply(base(ONE), ONE, Settings(window=1023)), str)


@pytest.mark.parametrize("n", [2, 8, 64])
def test_sparse_gradients_break_even_where_both_send_as_much(n):
    on = cluster(f"{n}xa100-80g-sxm")
    job = base(on).job
    density, p, g = break_even_density(job, on), parameters(LLAMA), 4
    assert (n - 1) * density * p * (g + 4) == pytest.approx(2 * (n - 1) / n * p * g)
    at = measure(pull(base(on), [lever("sparse-gradients")], on, Settings(density=density)), on)
    assert at.wire_bytes == pytest.approx(measure(base(on), on).wire_bytes)


def test_the_cheapest_set_fits_and_no_single_lever_that_fits_is_cheaper(alone):
    assert alone.cheapest is not None
    assert alone.fits(alone.cheapest.outcome)
    for row in alone.alone:
        if row.outcome is not None and row.lever.same_mathematics and alone.fits(row.outcome):
            assert row.outcome.token_seconds >= alone.cheapest.outcome.token_seconds * (1 - 1e-6)


def test_the_fewest_are_no_more_than_the_cheapest(alone):
    assert len(alone.fewest.names) <= len(alone.cheapest.names)
    assert alone.fits(alone.fewest.outcome)


def test_named_sets_train_the_same_thing(alone, together):
    for found in (alone, together):
        for chosen in (found.cheapest, found.fewest, found.together):
            assert all(lever(name).same_mathematics for name in chosen.names)


def test_nothing_takes_less_memory_than_the_set_that_takes_the_least(together):
    least = together.together.outcome.device_bytes
    assert all(row.outcome.device_bytes >= least * (1 - 1e-9) for row in together.alone
               if row.outcome is not None and row.lever.same_mathematics)  # fmt: skip


def test_one_more_sample_or_block_than_the_largest_does_not_fit():
    found = levers(GPT2, cluster("l4"), batch=4, seq_len=1024, only=["checkpointing"])
    far = found.largest["base"]
    on = cluster("l4")
    usable = on.accelerator.usable_bytes
    assert held(base(on, batch=far.batch, model=GPT2), on)[1] <= usable
    assert held(base(on, batch=far.batch + 1, model=GPT2), on)[1] > usable
    assert far.seq_len == 1024  # its table of positions ends there


def test_a_model_that_fits_as_it_is_needs_no_lever():
    found = levers(GPT2, ONE, batch=1, seq_len=256, only=["checkpointing", "bf16-states"])
    assert found.fits(found.base)
    assert found.fewest.names == ()


def test_the_json_has_a_row_per_lever_and_the_sets(capsys):
    code, out, _ = ask(capsys, "levers", "llama3-8b", "--on", "a100-80g-sxm", "--batch-size", "1", "--json")
    found = json.loads(out)
    assert code == 0
    assert [row["name"] for row in found["levers"]] == [row.name for row in LEVERS]
    assert {"base", "cheapest", "fewest", "together", "largest", "break_even_density"} <= set(found)
    assert all(row["why"] for row in found["levers"] if not row["applies"])
    assert found["largest"]["together"]["parameters"] >= found["largest"]["base"]["parameters"]


def test_where_no_set_fits_the_answer_is_no(capsys):
    code, page, err = ask(capsys, "levers", "llama3-70b", "--on", "l4", "--only", "checkpointing")
    assert code == 1
    assert "No set of levers makes it fit" in page
    assert "no set of levers fits: the least is" in err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["gpt2", "--on", "l4", "--only", "wishing"], "no lever 'wishing'"),
        (["gpt2", "--on", "l4", "--batch-size", "0"], "train nothing"),
        (["gpt2", "--on", "l4,h100-sxm"], "one kind of device"),
        (["gpt2", "--on", "l4", "--density", "2"], "give a share"),
        (["resnet50", "--on", "l4"], "is no decoder"),
    ],
)
def test_what_cannot_be_meant_is_refused(capsys, argv, says):
    code, _, err = ask(capsys, "levers", *argv)
    assert (code, says in err) == (2, True), err


def test_the_page_is_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, page, _ = ask(capsys, "levers", "gpt2", "--on", "8xl4", "--batch-size", "2", "--explain")
    assert code == 0
    assert max(map(len, page.splitlines())) <= 80
    assert "The cheapest set that fits" in page


def test_settings_have_bounds():
    with pytest.raises(BadInput, match="rank is 0"):
        Settings(rank=0)
    with pytest.raises(UnknownName):
        lever("prayer")
