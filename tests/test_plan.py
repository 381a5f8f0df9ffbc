"""The search over layouts: nothing is left out, each layout has its price by validate's functions, and no says why."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from bursar.architecture import preset
from bursar.errors import BadInput, NoAnswer, UnknownName
from bursar.hardware import cluster
from bursar.jobs import Job, Layout, decoder
from bursar.plan.model import llama_like, read
from bursar.plan.request import clusters_of, layout_of, question_of
from bursar.plan.search import (
    AXES,
    NO_CHUNKS,
    NO_MEMORY,
    NO_SHARDS,
    NO_SP,
    NO_TP,
    Question,
    counts,
    enumerate_layouts,
    require,
    search,
    why,
)
from bursar.rank_memory import rank_memory
from bursar.step_time import step_time
from command import ask

SMALL = decoder(preset("gpt2"))
TINY = Question(replace(SMALL, n_layers=4, n_heads=4, n_kv_heads=4), 1024, 16.0, tokens=1e9)


def by_hand(question: Question, on: str) -> dict[tuple, float]:
    """Every layout and way to recompute by plain loops over whole numbers, with seconds per token where it fits."""
    where, model = cluster(on), question.model
    n, found = where.count, {}
    numbers = range(1, n + 1)
    for tp in numbers:
        for pp in numbers:
            for cp in numbers:
                if n % (tp * pp * cp) or model.n_heads % tp or model.d_ff % tp or pp > model.n_layers:
                    continue
                if cp > 1 and question.seq_len % (2 * cp):
                    continue
                dp = n // (tp * pp * cp)
                shards = [(0, 1, 1)] + ([(1, 1, 1), (2, 1, 1)] if dp * cp > 1 else [])
                if dp * cp > 1:
                    groups = [1, *(g for g in range(2, dp * cp) if (dp * cp) % g == 0)]
                    shards += [(3, again, g) for g in groups for again in (1, 0)]
                for sp in (0, 1) if tp > 1 else (0,):
                    for v in (
                        1,
                        *(v for v in range(2, model.n_layers + 1) if pp > 1 and model.n_layers % (pp * v) == 0),
                    ):
                        for b in (1, 2, 4, 8, 16):
                            rounds = pp if v > 1 else 1
                            many = max(1, round(question.batch / (dp * b * rounds))) * rounds
                            if abs(many * dp * b / question.batch - 1) > 1 / 8:
                                continue
                            for stage, again, group in shards:
                                layout = Layout(
                                    dp, tp, pp, cp, fsdp=group, zero_stage=stage, reshard_after_forward=again,
                                    sequence_parallel=sp, virtual_stages=v,
                                    schedule="interleaved" if v > 1 else "1f1b",
                                )  # fmt: skip
                                for recompute, every in question.recompute:
                                    if every > model.n_layers / pp:
                                        continue
                                    job = Job(
                                        model, question.seq_len, layout, b, many, recompute=recompute,
                                        recompute_every=every, framework=question.framework,
                                    )  # fmt: skip
                                    if rank_memory(job, where).device_bytes > where.accelerator.usable_bytes:
                                        continue
                                    key = (dp, tp, pp, cp, group, stage, again, sp, v, b, recompute, every)
                                    found[key] = step_time(job, where).seconds / job.tokens
    return found


@pytest.fixture(scope="module")
def tiny():
    question = replace(TINY, batch=4.0, recompute=(("none", 1), ("full", 2)))
    return question, search(question, [cluster("4xl4")], top=10_000)


def test_the_search_is_the_brute_force_over_a_small_space(tiny):
    question, plan = tiny
    brute = by_hand(question, "4xl4")
    assert plan.feasible == len(brute) > 100
    best = plan.layouts[0]
    assert best.step_seconds / best.batch_tokens == pytest.approx(min(brute.values()))
    found = {
        (*(int(getattr(c.job.layout, a)) for a in ("dp", "tp", "pp", "cp", "fsdp", "zero_stage",
          "reshard_after_forward", "sequence_parallel", "virtual_stages")), c.job.micro_batch, c.job.recompute,
         c.job.recompute_every): c.step_seconds / c.batch_tokens
        for c in plan.layouts
    }  # fmt: skip
    assert found.keys() == brute.keys()
    assert all(found[k] == pytest.approx(brute[k]) for k in found)


def test_every_combination_is_feasible_or_rejected_for_one_reason(tiny):
    _, plan = tiny
    assert plan.feasible + sum(plan.rejected.values()) == plan.searched


def test_a_combination_lost_between_the_reasons_would_be_noticed(tiny):
    _, plan = tiny
    rejected = Counter(plan.rejected)
    rejected[NO_SP] -= 1
    assert plan.feasible + sum(rejected.values()) != plan.searched


def test_the_ranking_is_by_what_was_asked(tiny):
    question, plan = tiny
    per_token = [c.step_seconds / c.batch_tokens for c in plan.layouts]
    assert per_token == sorted(per_token)
    memory = search(question, [cluster("4xl4")], by="memory", top=20).layouts
    assert [c.device_bytes for c in memory] == sorted(c.device_bytes for c in memory)
    assert memory[0].device_bytes == min(c.device_bytes for c in plan.layouts)


def test_the_best_of_each_division_is_the_first_of_it_among_all(tiny):
    question, plan = tiny

    def division(choice):
        return tuple(int(getattr(choice.job.layout, axis)) for axis in ("dp", "tp", "pp", "cp", "ep"))

    firsts = {}
    for choice in plan.layouts:
        firsts.setdefault(division(choice), choice.step_seconds / choice.batch_tokens)
    distinct = search(question, [cluster("4xl4")], top=1000, distinct=True).layouts
    assert {division(c): c.step_seconds / c.batch_tokens for c in distinct} == pytest.approx(firsts)
    assert len(distinct) == len(firsts)


def test_a_layout_in_the_plan_has_the_price_that_validate_would_give_it(tiny):
    _, plan = tiny
    for choice in plan.layouts[:: len(plan.layouts) // 20]:
        assert choice.step_seconds == step_time(choice.job, choice.cluster).seconds
        held = rank_memory(choice.job, choice.cluster)
        assert choice.peak_bytes == held.peak_bytes
        assert sum(choice.memory.values()) == pytest.approx(choice.peak_bytes)
        assert sum(choice.time.values()) == pytest.approx(choice.step_seconds)


def test_ranks_and_batches_of_every_layout_multiply_out():
    space = enumerate_layouts(Question(decoder(preset("llama3-8b")), 8192, 512.0), 48)
    c = space.columns
    assert np.all(c["dp"] * c["tp"] * c["pp"] * c["cp"] == 48)
    samples = c["dp"] * c["micro_batch"] * c["micro_batches"]
    assert np.all(np.abs(samples / 512 - 1) <= 1 / 8)
    assert np.all(c["micro_batches"] % np.where(c["virtual_stages"] > 1, c["pp"], 1) == 0)
    assert {NO_TP, NO_SP, NO_CHUNKS, NO_SHARDS} <= set(space.rejected)
    assert set(c) == set(AXES)


def test_on_one_device_there_is_one_layout_per_micro_batch():
    space = enumerate_layouts(replace(TINY, batch=8.0), 1)
    assert space.columns["micro_batch"].tolist() == [1, 2, 4, 8]
    assert np.all(space.columns["zero_stage"] == 0)


def test_more_devices_never_take_longer_where_the_batch_divides():
    question = replace(TINY, batch=64.0, recompute=(("none", 1),))
    days = [search(question, [cluster(f"{n}xh100-sxm")], top=1).layouts[0].days for n in (1, 2, 4, 8)]
    assert days == sorted(days, reverse=True)


def test_shards_of_everything_sharded_add_up_to_the_whole():
    where, model = cluster("8xh100-sxm"), decoder(preset("llama3-8b"))
    whole = rank_memory(Job(model, 4096, Layout(dp=8), 1, 1, framework="megatron-bridge"), where).parts
    shard = rank_memory(Job(model, 4096, Layout(dp=8, zero_stage=3), 1, 1, framework="megatron-bridge"), where).parts
    for part in ("parameters", "optimizer_state"):
        assert 8 * shard[part] == pytest.approx(whole[part])


def test_an_expert_layout_is_searched_and_divides_the_experts():
    question = Question(decoder(preset("mixtral-8x7b")), 4096, 256.0, recompute=(("full", 1),))
    plan = search(question, [cluster("64xh100-sxm")], top=5)
    assert plan.layouts
    assert all(8 % c.job.layout.ep == 0 for c in plan.layouts)
    assert any(c.job.layout.ep > 1 for c in plan.layouts)


def test_why_adds_up_to_how_much_slower_the_second_is(tiny):
    _, plan = tiny
    best, other = plan.layouts[0], plan.layouts[7]
    slower = other.step_seconds * best.batch_tokens / other.batch_tokens - best.step_seconds
    assert sum(s for _, s in why(best, other)) == pytest.approx(slower, abs=2e-3 * best.step_seconds)


# ---- ranges, days, budgets


def test_the_fewest_devices_that_finish_in_time_come_first():
    question = replace(TINY, tokens=1e10, batch=64.0, recompute=(("none", 1),))
    clusters = [cluster(f"{n}xh100-sxm") for n in (1, 2, 4, 8)]
    alone = {c.count: search(question, [c], top=1).layouts[0].days for c in clusters}
    limit = (alone[2] + alone[4]) / 2
    plan = search(replace(question, days=limit), clusters, top=3)
    assert plan.layouts[0].cluster.count == 4
    assert all(c.days <= limit for c in plan.layouts)


def test_a_budget_is_kept_to_and_the_cheapest_comes_first():
    question = replace(TINY, tokens=1e10, recompute=(("none", 1),))
    clusters = [cluster("8xh100-sxm"), cluster("8xa100-80g-sxm")]
    free = search(question, clusters, by="cost", top=50)
    costs = [c.usd for c in free.layouts]
    assert costs == sorted(costs)
    tight = search(replace(question, budget_usd=costs[10]), clusters, by="cost", top=50)
    assert max(c.usd for c in tight.layouts) <= costs[10]
    assert "over the budget" in tight.rejected


def test_a_range_takes_whole_nodes_powers_of_two_and_three_halves_of_them():
    assert counts(8, 100, 8) == [8, 16, 24, 32, 48, 64, 96, 100]
    assert counts(6, 6, 8) == [6]
    assert [c.name for c in clusters_of("h100-sxm,l4", "8..16")] == ["8xh100-sxm", "16xh100-sxm", "8xl4", "16xl4"]


# ---- requests that cannot be meant, and answers that are no


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["llama3-70b", "--on", "8xh100-sxm", "--layout", "tp=3"], 2, "nearest that do: 2 and 4"),
        (["llama3-70b", "--on", "8xh100-sxm", "--layout", "qp=3"], 2, "no axis of a layout 'qp'"),
        (["llama3-8b", "--on", "8xh100-sxm", "--tokens", "1T", "--budget", "0"], 2, "budget is 0; give 1 or more"),
        (["llama3-8b", "--on", "8xh100-sxm", "--tokens", "1T", "--days", "-3"], 2, "above zero"),
        (["llama3-8b", "--on", "8xh100-sxm", "--tokens", "-1"], 2, "negative"),
        (["llama3-8b", "--on", "8xh100-sxm", "--days", "3"], 2, "give its --tokens"),
        (["llama3-8b", "--on", "8xmi300x", "--tokens", "1T", "--by", "cost"], 2, "no price for mi300x"),
        (["llama3-8b", "--on", "8xh100-sxm", "--network", "warp"], 2, "give a rate"),
        (["llama3-8b", "--on", "8xh100-sxm", "--gpus", "16"], 2, "given twice"),
        (["llama3-8b", "--on", "h100-sxm", "--gpus", "64..8"], 2, "smaller number first"),
        (["llama3-8b", "--on", "8xh100-sxm", "--batch-tokens", "100"], 2, "less than one sequence of 8192"),
        (["llama3-8b", "--on", "8xa100-80g-sxm", "--precision", "fp8"], 2, "no known peak in fp8"),
        (["llama3-8b", "--on", "8xh100-sxm", "--recompute", "some"], 2, "no recompute 'some'"),
        (["resnet50", "--on", "8xh100-sxm"], 2, "is no decoder"),
        (["model.py:make", "--on", "8xh100-sxm"], 2, "is code"),
        (["gpt2", "--on", "8xh100-sxm", "--seq-len", "2048"], 2, "gpt2 has 1024 positions"),
        (["gpt2:L=4", "--on", "1xl4", "--tokens", "1T", "--days", "0.001", "--recompute", "none"], 1, "nearest: "),
        (["llama3-8b", "--on", "1xl4", "--recompute", "full", "--fits"], 1, "nearest that fits: "),
    ],
)
def test_a_request_that_cannot_be_met_says_what_is_wrong_and_what_works(capsys, argv, code, says):
    found, _, err = ask(capsys, "plan", *argv)
    assert (found, says in err) == (code, True), err


def test_fits_answers_with_its_exit_code(capsys):
    code, out, _ = ask(capsys, "plan", "gpt2:L=2", "--on", "1xh100-sxm", "--batch", "8", "--fits")
    assert (code, out.startswith("yes: ")) == (0, True)


def test_a_plan_without_layouts_raises_and_one_with_them_does_not(tiny):
    question, plan = tiny
    assert require(plan) is plan
    wide = replace(question, model=replace(SMALL, n_layers=48, d_model=12288, n_heads=96, n_kv_heads=96, d_ff=49152))
    none = search(replace(wide, recompute=(("full", 1),)), [cluster("2xl4")])
    assert none.layouts == ()
    assert none.rejected[NO_MEMORY] > 0
    with pytest.raises(NoAnswer, match="the least is"):
        require(none)


def test_the_json_has_the_contracts_fields(capsys):
    code, out, _ = ask(
        capsys, "plan", "gpt2:L=4", "--on", "4xh100-sxm", "--tokens", "1T", "--batch-tokens", "500000", "--top", "3",
        "--recompute", "none", "--json",
    )  # fmt: skip
    found = json.loads(out)
    assert code == 0
    assert found["schema_version"] == 1
    assert {"layouts", "searched", "rejected"} <= set(found)
    assert len(found["layouts"]) == 3
    best = found["layouts"][0]
    assert {"layout", "micro_batch", "recompute", "step_seconds", "mfu", "peak_bytes", "days", "usd"} <= set(best)
    assert found["searched"] == sum(found["rejected"].values()) + found["feasible"]
    assert best["days"] == pytest.approx(best["steps"] * best["step_seconds"] / 86400)
    assert best["usd"] == pytest.approx(best["days"] * 24 * 4 * 3.99)
    low, high = best["step_seconds_80"]
    assert low <= best["step_seconds"] <= high
    # 500 000 tokens are 488.3 sequences: rounded to what divides, and said
    assert best["batch_tokens"] % 1024 == 0
    assert any("rounded" in note for note in found["assumptions"])


def test_the_page_ranks_breaks_memory_down_and_says_why_the_second_loses(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, page, _ = ask(
        capsys, "plan", "gpt2:L=4", "--on", "4xh100-sxm", "--tokens", "1T", "--recompute", "none", "--explain"
    )
    assert code == 0
    for said in ("By time: the first ", "Memory of the fullest rank", "comes second", "Rejected", "Assumptions"):
        assert said in page
    assert max(map(len, page.splitlines())) <= 80


def test_planning_needs_no_torch():
    code = (
        "import sys; from bursar.cli import main; "
        "main(['plan', 'gpt2:L=2', '--on', '2xh100-sxm', '--batch', '4', '--recompute', 'none', '--json']); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# ---- the model


def test_a_config_of_mixtral_is_its_preset(tmp_path):
    config = {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_hidden_layers": 32, "num_local_experts": 8, "num_experts_per_tok": 2,
        "vocab_size": 32000, "max_position_embeddings": 32768, "sliding_window": None,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    made, longest = read(str(tmp_path))
    assert replace(made, name="mixtral-8x7b") == decoder(preset("mixtral-8x7b"))
    assert longest == 32768


def test_a_config_that_lacks_a_size_names_it():
    with pytest.raises(BadInput, match="needs 'num_hidden_layers'"):
        llama_like({"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 8}, "x")
    with pytest.raises(UnknownName, match="no model 'lama'"):
        read("lama")


def test_axes_have_short_names_and_bounds():
    assert layout_of("tp=8,pp=4,zero=1,sp=1", 64) == {"tp": 8, "pp": 4, "zero_stage": 1, "sequence_parallel": 1}
    with pytest.raises(BadInput, match="zero_stage=4 cannot be"):
        layout_of("zero=4", 64)
    question, clusters = question_of("llama3-8b", on="64xh100-sxm", layout="tp=8,pp=2,cp=1", recompute="every_k:4")
    plan = search(question, clusters, top=3)
    assert {(c.job.layout.tp, c.job.layout.pp, c.recompute) for c in plan.layouts} == {(8, 2, "every_k:4")}
