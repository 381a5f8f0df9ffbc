"""Seconds of a step: identities of its counts, parts that add up, measured layers and collectives, schedules."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import bursar
from bursar import step_time as module
from bursar.architecture import preset
from bursar.efficiency import (
    attention_seconds,
    coefficient,
    coefficients,
    generation,
    matmul_seconds,
    product_dtype,
    rates,
    slowest_of,
    stream_seconds,
    sustained,
)
from bursar.errors import UnknownName
from bursar.hardware import Cluster, accelerator, accelerators
from bursar.jobs import SCHEDULES, Decoder, Job, Latent, Layout, decoder
from bursar.network import collective_seconds, dispatch_seconds, send_seconds, wires
from bursar.rules import transformer
from bursar.schedule import bubble_seconds, layers_of_stages
from bursar.step_time import PARTS, flops, parameters, step_time

DATA = Path(__file__).parent / "data"
A100, H100 = accelerator("a100-80g-sxm"), accelerator("h100-sxm")
GPT = Decoder(
    "gpt 22b", 48, 6144, 64, 64, 96, 24576, False, 51200, True, bias=True, norm="layernorm", learned_positions=2048
)
MIXTURE = Decoder(
    "mixture", 16, 2048, 16, 4, 128, 8192, True, 32000, False,
    n_experts=16, experts_per_token=2, moe_d_ff=4096, n_shared_experts=1, shared_d_ff=4096, first_dense_layers=1,
)  # fmt: skip


def table(name):
    with (DATA / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def shapes():
    """The models of model_shapes.csv, which counts matrices only: no biases, no position tables."""
    found = {}
    for r in table("model_shapes.csv"):
        number = {
            k: int(r[k] or 0) for k in ("n_experts", "top_k", "expert_ffn", "shared_experts", "first_dense_layers")
        }
        found[r["name"]] = Decoder(
            r["name"], int(r["n_layers"]), int(r["d_model"]), int(r["n_heads"]), int(r["n_kv_heads"]),
            int(r["head_dim"]), int(r["ffn_hidden"]), r["mlp"] == "swiglu", int(r["vocab"]), r["tied"] == "1",
            n_experts=number["n_experts"], experts_per_token=number["top_k"], moe_d_ff=number["expert_ffn"],
            n_shared_experts=number["shared_experts"], shared_d_ff=number["shared_experts"] * number["expert_ffn"],
            first_dense_layers=number["first_dense_layers"],
            latent=Latent(*(int(n) for n in r["mla"].strip("()").split(","))) if r["mla"] else None,
        )  # fmt: skip
    return found


# ---- counts


@pytest.mark.parametrize("name", ["gpt2", "gpt3-175b", "llama3-8b", "llama3-70b"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_flops_and_parameters_are_those_of_the_closed_form_kernel_by_kernel(name, recompute):
    shape = preset(name)
    kernels = transformer.count(shape, 2, 1024, precision="bf16", recompute=recompute)
    counted = flops(Job(decoder(shape), 1024, Layout(), 2, 1, recompute=recompute, framework="torchtitan"))
    assert 2 * counted.model == kernels.model
    assert 2 * counted.hardware == kernels.hardware
    assert parameters(decoder(shape)) == kernels.parameters


@pytest.mark.parametrize(("layers", "width", "heads"), [(24, 2304, 24), (96, 12288, 96), (128, 25600, 160)])
def test_with_stored_scores_and_full_recompute_flops_are_megatrons_formula(layers, width, heads):
    """96 B s L h² (1 + s/6h + V/16Lh). Source: Narayanan et al. 2021, equation 3."""
    s, V = 2048, 51200
    model = Decoder("m", layers, width, heads, heads, width // heads, 4 * width, False, V, True)
    counted = flops(Job(model, s, Layout(), 1, 1, recompute="full", attention="naive"))
    assert counted.hardware == 96 * s * layers * width**2 + 16 * s**2 * layers * width + 6 * s * width * V


def test_parameters_are_those_of_the_published_shapes_within_a_thousandth():
    for r in table("model_shapes.csv"):
        model, printed = shapes()[r["name"]], 1e9 * float(r["params_B"])
        # the table leaves out norms, and rounds to a million
        assert parameters(model) == pytest.approx(printed, rel=1e-3, abs=0.6e6), r["name"]


def test_flops_per_token_are_those_nvidia_counts_within_their_tolerance():
    """Dense 0.1 %, mixtures 0.6 %: NVIDIA leaves the router out. Its DeepSeek rows near 260 train one more token's
    head; its GPT-OSS rows before release 26.06 count a gated expert as two matrices, and are no truth."""
    names = {
        "DeepSeekV3": "DeepSeek-V3", "Kimi_K2": "Kimi-K2", "LLAMA3.1_405B": "Llama-3.1-405B",
        "LLAMA3_70B": "Llama-3-70B", "LLAMA3_8B": "Llama-3-8B", "Qwen3_235B_a22B": "Qwen3-235B-A22B",
        "Qwen3_30B_a3B": "Qwen3-30B-A3B", "GPT OSS 120B": "GPT-OSS-120B",
    }  # fmt: skip
    checked = set()
    for r in table("implied_flops_per_token.csv"):
        if r["model"] not in names or (r["model"].startswith("GPT") and r["container"] < "26.06"):
            continue
        if r["container"] == "26.04.01":  # tokens/s printed as multiples of 32
            continue
        model, implied = shapes()[names[r["model"]]], 1e9 * float(r["implied_gflop_per_token"])
        if r["model"] == "DeepSeekV3" and implied > 255e9:
            model = replace(model, mtp_layers=1)
        if r["model"].startswith("GPT"):
            model = replace(model, sliding_window=128, windowed_every=2)
        S = int(r["seq_len"])
        tolerance = 6e-3 if model.n_experts else 1e-3
        assert flops(Job(model, S, Layout(), 1, 1)).model / S == pytest.approx(implied, rel=tolerance), r
        checked.add(r["model"])
    assert checked == set(names)


def test_naive_attention_counts_the_square_and_a_fused_kernel_the_triangle():
    S, pair = 1024, 4 * 6144  # forward, of one pair, all heads
    naive = flops(Job(GPT, S, Layout(), 1, 1, attention="naive"))
    fused = flops(Job(GPT, S, Layout(), 1, 1, attention="flash"))
    assert naive.model - fused.model == 3 * 48 * pair * (S * S - S * (S + 1) // 2)
    assert naive.full_square == fused.full_square == naive.model


def test_a_window_is_counted_in_the_layers_that_have_it():
    S, W = 1024, 128
    half = replace(GPT, sliding_window=W, windowed_every=2)
    kept = W * S - W * (W - 1) // 2
    full = flops(Job(GPT, S, Layout(), 1, 1)).model
    assert full - flops(Job(half, S, Layout(), 1, 1)).model == 3 * 24 * 4 * 6144 * (S * (S + 1) // 2 - kept)


def test_a_layout_changes_no_flops_of_the_whole_job():
    one = step_time(Job(GPT, 2048, Layout(), 4, 2, framework="megatron"), Cluster(A100, 1))
    for layout, b, m in ((Layout(tp=8), 4, 2), (Layout(pp=4), 1, 8), (Layout(dp=8, zero_stage=1), 1, 1)):
        many = step_time(Job(GPT, 2048, layout, b, m, framework="megatron"), Cluster(A100, 8))
        assert many.model_flops == one.model_flops
        assert many.hardware_flops == one.hardware_flops


# ---- the parts of a step


JOBS = [
    Job(GPT, 2048, Layout(), 1, 1),
    Job(GPT, 2048, Layout(8, 8, 2, sequence_parallel=1), 2, 8, "fp16", "full", attention="naive"),
    Job(GPT, 2048, Layout(64, zero_stage=3), 2, 1, recompute="selective_op", framework="torchtitan", compiled=True),
    Job(GPT, 8192, Layout(4, 2, cp=4, zero_stage=1), 1, 4, "fp8", "selective", framework="megatron-bridge"),
    Job(MIXTURE, 4096, Layout(16, 1, 2, ep=8, zero_stage=1), 1, 8, "mxfp8", framework="megatron-bridge"),
    Job(MIXTURE, 4096, Layout(8, 2, 2, ep=4, virtual_stages=2, schedule="interleaved", sequence_parallel=1), 1, 8),
]


@pytest.mark.parametrize("job", JOBS)
def test_the_parts_add_up_to_the_step_and_none_is_negative(job):
    found = step_time(job, Cluster(accelerator("h200"), int(job.layout.ranks)))
    assert set(found.parts) == set(PARTS)
    assert sum(found.parts.values()) == pytest.approx(found.seconds, rel=1e-12)
    assert all(v >= 0 for v in found.parts.values())
    assert 0 < found.mfu < 1
    ideal = found.hardware_flops / accelerator("h200").peak(product_dtype(accelerator("h200"), job.precision))
    assert found.seconds > ideal / job.layout.ranks


def test_many_layouts_at_once_are_each_as_alone():
    """One array of layouts, its search's price, against one call each."""
    grid = [(dp, tp, pp, b) for dp in (1, 4) for tp in (1, 2, 8) for pp in (1, 3, 12) for b in (1, 4)]
    dp, tp, pp, b = np.array(grid).T
    many = 64 // b
    array = Layout(dp, tp, pp, zero_stage=1 * (dp > 1), sequence_parallel=1 * (tp > 1))
    cluster = Cluster(A100, 288)
    together = step_time(Job(GPT, 2048, array, b, many, recompute="full"), cluster)
    assert together.seconds.shape == (len(grid),)
    for i, (d, t, p, one) in enumerate(grid):
        layout = Layout(d, t, p, zero_stage=int(d > 1), sequence_parallel=int(t > 1))
        alone = step_time(Job(GPT, 2048, layout, one, 64 // one, recompute="full"), cluster)
        assert together.seconds[i] == pytest.approx(alone.seconds, rel=1e-12)
        assert together.mfu[i] == pytest.approx(alone.mfu, rel=1e-12)
        for name in PARTS:
            assert together.parts[name][i] == pytest.approx(alone.parts[name], rel=1e-9, abs=1e-12), name


def test_one_device_sends_nothing_and_waits_for_nobody():
    alone = step_time(Job(GPT, 2048, Layout(), 1, 4), Cluster(A100, 1))
    assert [alone.parts[k] for k in ("tp", "cp", "ep", "dp", "pp_send", "bubble")] == [0] * 6
    assert sum(alone.collectives.values()) == 0


def test_tensor_parallel_ranks_send_two_all_reduces_a_pass():
    """2(n-1)/n of the stream, twice in forward and twice in backward, each layer (Korthikanti et al. 2022, 4.2.2)."""
    found = step_time(Job(GPT, 2048, Layout(tp=8), 4, 3), Cluster(A100, 8))
    stream = 4 * 2048 * 6144 * 2
    assert found.collectives["tp"] == pytest.approx(3 * 48 * 4 * 2 * 7 / 8 * stream)


def test_more_gradient_accumulation_hides_the_gradients_all_reduce():
    few = step_time(Job(GPT, 2048, Layout(dp=64), 1, 1, framework="megatron-deepspeed"), Cluster(A100, 64))
    many = step_time(Job(GPT, 2048, Layout(dp=64), 1, 16, framework="megatron-deepspeed"), Cluster(A100, 64))
    assert few.parts["dp"] == pytest.approx(many.parts["dp"])  # once a step
    assert many.seconds < 16 * few.seconds


def test_sharded_parameters_are_gathered_for_every_micro_batch():
    few = step_time(Job(GPT, 2048, Layout(dp=8, zero_stage=3), 1, 1, framework="fsdp"), Cluster(A100, 8))
    many = step_time(Job(GPT, 2048, Layout(dp=8, zero_stage=3), 1, 4, framework="fsdp"), Cluster(A100, 8))
    assert many.collectives["dp"] == pytest.approx(4 * few.collectives["dp"])
    kept = Layout(dp=8, zero_stage=3, reshard_after_forward=0)
    assert (
        step_time(Job(GPT, 2048, kept, 1, 1, framework="fsdp"), Cluster(A100, 8)).collectives["dp"]
        < (few.collectives["dp"])
    )


def test_gathering_parameter_by_parameter_costs_a_ring_s_steps_each_time():
    """Small messages on many ranks: sixteen calls a layer wait sixteen times as long; one rank waits for none."""
    big, alone = (
        [
            step_time(Job(GPT, 2048, Layout(dp=n, zero_stage=3), 1, 1, "fp16", framework=f), Cluster(A100, n)).parts[
                "dp"
            ]
            for f in ("deepspeed", "fsdp")
        ]
        for n in (1024, 1)
    )
    assert big[0] > 4 * big[1]
    assert alone == [0, 0]


def test_dualpipe_hides_the_experts_exchange():
    layout = Layout(8, 1, 2, ep=8, virtual_stages=2, schedule="interleaved")
    job = Job(MIXTURE, 4096, layout, 1, 8)
    shown, hidden = (
        step_time(replace(job, layout=replace(layout, schedule=s)), Cluster(H100, 16)).parts["ep"]
        for s in ("interleaved", "dualpipev")
    )
    assert hidden == pytest.approx(0.2 * shown)


def test_a_small_model_in_eager_mode_waits_for_the_host_and_a_graph_does_not():
    tiny = replace(GPT, d_model=256, n_heads=4, n_kv_heads=4, head_dim=64, d_ff=1024)
    job = Job(tiny, 256, Layout(), 1, 1, framework="megatron")
    eager = step_time(job, Cluster(H100, 1))
    graph = step_time(replace(job, flags={"cuda_graph": "full_iteration"}), Cluster(H100, 1))
    assert eager.parts["overhead"] > 0.5 * eager.seconds
    assert graph.parts["overhead"] < 0.2 * eager.parts["overhead"]


def test_an_unknown_framework_names_those_that_are_known():
    with pytest.raises(UnknownName, match="megatron"):
        step_time(Job(GPT, 2048, Layout(), 1, 1, framework="nobody's"), Cluster(A100, 1))


# ---- measured layers and collectives


def test_a_layer_of_22b_takes_what_korthikanti_measured_within_a_tenth():
    """Table 4: one layer, tp 8, s 2048, b 4. Three passes of it: forward, backward, and again under full recompute."""
    rows = {r["experiment"]: r for r in table("korthikanti_layer_times.csv")}
    for sp, experiment in ((0, "baseline_no_recompute"), (1, "sequence_parallelism")):
        got = [
            step_time(
                Job(replace(GPT, n_layers=n), 2048, Layout(tp=8, sequence_parallel=sp), 4, 1, "fp16",
                    attention="naive", framework="megatron", flags={"fwd_bwd_only": ""}), Cluster(A100, 8),
            ).seconds
            for n in (48, 24)
        ]  # fmt: skip
        assert (got[0] - got[1]) / 24 == pytest.approx(float(rows[experiment]["combined_ms"]) / 1e3, rel=0.1)


def test_all_reduces_take_what_nccl_tests_measured():
    links = wires(Cluster(A100, 8))
    errors = []
    for r in table("nccl_all_reduce.csv"):
        measured = (int(r["time_ns_1"]) + int(r["time_ns_2"])) / 2e9
        errors.append(float(collective_seconds(links, "all_reduce", int(r["bytes"]), int(r["n_gpus"]))) / measured - 1)
    assert len(errors) == 77  # 2 to 8 ranks, 1 MiB to 1 GiB
    assert np.mean(np.abs(errors)) < 0.1
    assert np.max(np.abs(errors)) < 0.35


def test_between_nodes_a_group_has_its_share_of_the_adapters():
    """Eight ranks a node ring over eight adapters; one rank a node has one, an eighth of the node's network."""
    links = wires(Cluster(A100, 64))
    S = 1e10
    whole = collective_seconds(links, "all_gather", S, 64, 1)
    apart = collective_seconds(links, "all_gather", S, 8, 8)
    assert apart / whole == pytest.approx(8 * (7 / 8) / (63 / 64), rel=0.01)
    assert send_seconds(links, S, 8) > send_seconds(links, S, 1)


def test_a_token_crosses_the_network_once_per_node_that_wants_it():
    links = wires(Cluster(H100, 64))
    once, each = (dispatch_seconds(links, 1e9, 64, 8, flag) for flag in (True, False))
    assert each / once == pytest.approx(8 / (8 * (1 - (7 / 8) ** 8)), rel=0.01)
    assert dispatch_seconds(links, 1e9, 1, 8) == 0


def test_a_collective_of_one_rank_is_free():
    links = wires(Cluster(A100, 8))
    assert [collective_seconds(links, op, 1e9, 1) for op in ("all_reduce", "all_gather", "reduce_scatter")] == [0, 0, 0]


# ---- one op


def test_a_tile_more_than_a_full_wave_costs_a_second_wave():
    """132 units: 12 x 11 tiles of 256 x 128 are one wave, and 12 x 12 would be two; smaller tiles soften the step."""
    speed = rates(H100)
    full, more = (matmul_seconds(speed, "bf16", 12 * 256, n * 128, 8192) for n in (11, 12))
    assert 1.1 < more / full < 2
    assert matmul_seconds(speed, "bf16", 12 * 256, 10 * 128 + 1, 8192) == full


def test_no_product_is_faster_than_its_peak_or_its_bytes():
    sizes = np.array([1, 16, 128, 1000, 4096, 16384])
    M, N, K = (a.ravel() for a in np.meshgrid(sizes, sizes, sizes))
    for device in accelerators():
        for dtype in rates(device).ceilings:
            got = matmul_seconds(rates(device), dtype, M, N, K)
            assert np.all(got > 2.0 * M * N * K / device.peak(dtype)), (device.name, dtype)


def test_the_best_published_product_is_not_outrun():
    """Long runs keep less than the best product: of 271.2 TFLOP/s on A100, 794.5 on H100."""
    for device in (A100, H100):
        seconds = matmul_seconds(rates(device), "bf16", 8192, 8192, 8192)
        reached = 2 * 8192**3 / seconds
        best = device.measured_matmul_flops_per_s["bf16"]
        assert 0.75 * best < reached < best


def test_a_small_kernel_is_bound_by_its_launch_and_a_large_one_by_bytes():
    speed = rates(A100)
    assert stream_seconds(speed, 1e3) == pytest.approx(coefficient("kernel_gap_seconds"), rel=0.01)
    assert 1e10 / stream_seconds(speed, 1e10) == pytest.approx(0.85 * A100.memory_bytes_per_s, rel=0.01)


def test_attention_is_slower_on_short_sequences_and_narrow_heads():
    speed = rates(H100)
    assert attention_seconds(speed, 1e12, 1024, 128) > attention_seconds(speed, 1e12, 16384, 128)
    assert attention_seconds(speed, 1e12, 4096, 64) > attention_seconds(speed, 1e12, 4096, 128)
    assert attention_seconds(rates(H100, "flash1"), 1e12, 8192, 128) > attention_seconds(speed, 1e12, 8192, 128)


def test_less_power_for_the_same_units_is_a_lower_clock():
    capped = replace(H100, tdp_watts=500, measured_matmul_flops_per_s={})
    # cube root of the dynamic power's ratio, a fifth of the limit being static
    assert sustained(capped) / sustained(H100) == pytest.approx(((500 / 700 - 0.2) / 0.8) ** (1 / 3), rel=1e-2)
    assert generation(capped) == "hopper"


def test_a_large_cluster_waits_for_its_slowest_chip():
    """√(2 ln n) standard deviations of 2 %: eight devices are where rates were read, one is a little better off."""
    assert slowest_of(8) == 1
    assert slowest_of(1) == pytest.approx(1 / (1 + 0.02 * 2.0393), rel=1e-4)
    assert slowest_of(1024) == pytest.approx((1 + 0.02 * 3.7233) / (1 + 0.02 * 2.0393), rel=1e-4)
    job = Job(GPT, 2048, Layout(dp=8), 1, 1)
    few, many = (step_time(replace(job, layout=Layout(dp=n)), Cluster(A100, n)) for n in (8, 512))
    assert many.parts["compute"] / few.parts["compute"] == pytest.approx(slowest_of(512))
    assert many.parts["memory_bound"] == pytest.approx(few.parts["memory_bound"])


# ---- schedules


@pytest.mark.parametrize(
    ("schedule", "chunks", "share"),
    [
        ("gpipe", 1, 1),
        ("1f1b", 1, 1),
        ("interleaved", 4, 1 / 4),
        ("zero-bubble", 1, 1 / 3),
        ("dualpipev", 2, 2 / 7 * 1),
    ],
)
def test_bubbles_are_those_of_the_papers(schedule, chunks, share):
    """Of (p-1)(F+B), p 8, F = B/2 = W. DualPipeV: (p/2-1)(F+B+B-3W) = 3·2F of 7·3F."""
    assert bubble_seconds(schedule, 8, chunks, 3.0, 24.0) == pytest.approx(share * 7 * 3.0)


def test_an_unknown_schedule_is_refused():
    assert "1f1b" in SCHEDULES
    with pytest.raises(UnknownName, match="1f1b"):
        bubble_seconds("2f2b", 8, 1, 3.0, 24.0)


def test_uneven_stages_hold_every_layer_and_the_fullest_is_the_slowest():
    most, first, last = layers_of_stages(94, np.array([2, 8]), 1)
    assert list(most) == [47, 12]
    assert list(first) == [47, 11]
    assert all(first + last + (np.array([2, 8]) - 2) * most >= 94)


def test_more_micro_batches_make_the_bubble_a_smaller_part():
    parts = [
        step_time(Job(GPT, 2048, Layout(tp=8, pp=8), 1, m), Cluster(A100, 64)).parts for m in (8, 64)
    ]  # fmt: skip
    shares = [p["bubble"] / sum(p.values()) for p in parts]
    assert shares[0] > 0.35  # 7 of 15
    assert shares[1] < 0.12  # 7 of 71


# ---- the coefficients


def test_every_coefficient_has_a_unit_a_source_and_a_reader():
    code = "".join(p.read_text(encoding="utf-8") for p in Path(bursar.__file__).parent.rglob("*.py"))
    for name, row in coefficients().items():
        assert row.unit, name
        assert len(row.source) > 20, name
        stem = re.sub("_(ampere|hopper|blackwell|nvidia|amd)$", "_", name)
        assert f'"{name}"' in code or f'"{stem}{{' in code, f"{name} is read by nobody"
    with pytest.raises(UnknownName):
        coefficient("matmul_k_loops")


def test_no_number_of_time_hides_in_the_code():
    """Floats of the step's modules, beside halves, whole numbers and the share of an overlapped exchange."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    body = re.sub(r'"""[\s\S]*?"""|#.*', "", source)
    assert set(re.findall(r"(?<![\w.])\d+\.\d+(?:e-?\d+)?", body)) <= {"0.0", "1.0", "2.0", "4.0"}
