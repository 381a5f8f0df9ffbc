"""Seconds of one training step of a job on a cluster, and its FLOPs: kernels, collectives, waits. No torch.

    layer       forward, backward and recompute of one block on one rank: products, attention, streams, collectives
    stage       its layers, and the embedding or the head where it is first or last
    step        micro-batches through the stages, the wait for one another, gradients, the update

Everything is closed form. A job's layout and batch may be arrays: a layer is priced once per distinct micro-batch and
sharding, so a million layouts cost about what their arithmetic on arrays costs. Nothing here was fitted to a step:
coefficients are those of `efficiency` and `network`.

    b micro-batch   S sequence   n = b·S/cp tokens of a rank   D model   F hidden   V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bursar.efficiency import (
    Rates,
    attention_seconds,
    coefficient,
    matmul_seconds,
    product_dtype,
    rates,
    slowest_of,
    stream_seconds,
)  # fmt: skip
from bursar.frameworks import Framework, framework
from bursar.hardware import Cluster
from bursar.jobs import Decoder, Job
from bursar.network import Wires, collective_seconds, dispatch_seconds, send_seconds, wires
from bursar.schedule import bubble_seconds, layers_of_stages

Array = Any  # floats, one per layout, or one for all

PARTS = (
    "compute", "attention", "memory_bound", "overhead", "tp", "cp", "ep", "dp", "pp_send", "bubble", "optimizer",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class StepTime:
    """One step. Each figure is a float, or an array with one per layout."""

    seconds: Array
    parts: Mapping[str, Array] = field(hash=False)  # of `PARTS`; they add up to `seconds`
    model_flops: Array  # of the whole job: forward and backward
    hardware_flops: Array  # and what is computed again
    model_full_square_flops: Array  # the literature's count: attention S² whatever the mask
    mfu: Array
    collectives: Mapping[str, Array] = field(hash=False)  # bytes that one rank sends, by what they are for
    assumptions: tuple[str, ...] = ()


# ---- counting


@dataclass(frozen=True, slots=True)
class Matrices:
    """Weights that tokens are multiplied by, as counts of one layer, and what a pair of attention costs."""

    attention: int
    dense: int
    router: int
    expert: int  # of one routed expert
    shared: int
    pair_flops: int  # forward, of one query-key pair, all heads


def matrices(model: Decoder) -> Matrices:
    """Weights of one layer of ``model`` by place. Norms and biases are no products, and are not here."""
    D, F, inner = model.d_model, model.d_ff, 3 if model.gated_mlp else 2
    if model.latent is not None:
        t, H = model.latent, model.n_heads
        queries = D * t.q_rank + t.q_rank * model.query_width if t.q_rank else D * model.query_width
        keys = D * (t.kv_rank + t.rope_dim) + t.kv_rank * H * (t.nope_dim + t.value_dim)
        weights = queries + keys + model.value_width * D
    else:
        weights = 2 * D * model.query_width + 2 * D * model.n_kv_heads * model.head_dim
    return Matrices(
        weights, inner * D * F, D * model.n_experts, inner * D * model.moe_d_ff, inner * D * model.shared_d_ff,
        2 * (model.query_width + model.value_width),
    )  # fmt: skip


def pairs(model: Decoder, S: int, windowed: bool = False) -> int:
    """Query-key pairs that the mask lets through, of one sequence and head."""
    W = model.sliding_window
    if not model.causal:
        return S * S
    if windowed and 0 < W < S:
        return W * S - W * (W - 1) // 2
    return S * (S + 1) // 2


def parameters(model: Decoder) -> int:
    """Every parameter, norms, biases and position tables included; a tied table once."""
    m, L, n_moe = matrices(model), model.n_layers, model.n_moe_layers
    D, norms = model.d_model, 2 if model.norm == "layernorm" else 1
    experts = n_moe * (m.router + model.n_experts * m.expert + m.shared)
    small = (2 * L + 1) * norms * D
    if model.bias:
        wide = model.d_ff * (2 if model.gated_mlp else 1)
        small += L * (model.query_width + 2 * model.n_kv_heads * model.head_dim + 2 * D + wide)
    if model.latent is not None:
        small += L * (model.latent.q_rank + model.latent.kv_rank)
    tables = model.vocab_size * D * (1 if model.tied_embeddings else 2) + model.learned_positions * D
    return L * m.attention + (L - n_moe) * m.dense + experts + small + tables + _beside(model)


def _beside(model: Decoder) -> int:
    """Parameters of what stands beside the decoder's own layers: an encoder, cross-attention, more tokens' heads."""
    m, D = matrices(model), model.d_model
    encoder = model.n_encoder_layers * (m.attention + m.dense)
    cross = model.n_layers * m.attention if model.n_encoder_layers else 0
    block = m.attention + (m.router + model.n_experts * m.expert + m.shared if model.n_experts else m.dense)
    return encoder + cross + model.mtp_layers * (block + 2 * D * D)


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs of one sequence by the law of counting: products and attention, multiply and add apart."""

    model: int
    full_square: int
    recompute: int

    @property
    def hardware(self) -> int:
        """Model FLOPs and what is computed again."""
        return self.model + self.recompute


def flops(job: Job) -> Flops:
    """FLOPs of one sequence of ``job``: what n samples cost is n times that, whoever computes them.

    A kernel that is told of the mask counts the pairs it lets through, stored scores the full square. Backward is twice
    forward. Recompute is what a checkpoint does again, and fused attention's second QKᵀ in backward.
    """
    model, S, habits = job.model, job.seq_len, framework(job.framework)
    m, L, n_moe = matrices(model), model.n_layers, model.n_moe_layers
    naive = job.attention == "naive"
    moe = m.router + model.experts_per_token * m.expert + m.shared
    n_windowed = L // model.windowed_every if model.sliding_window else 0
    kept = [pairs(model, S, windowed=True)] * n_windowed + [pairs(model, S)] * (L - n_windowed)
    if naive:
        kept = [S * S] * L
    heads = 1 + model.mtp_layers
    extra = model.mtp_layers * (m.attention + (moe if model.n_experts else m.dense) + 2 * model.d_model**2)
    layers = L * m.attention + (L - n_moe) * m.dense + n_moe * moe + extra
    n_pairs, square = (
        sum(kept) + model.mtp_layers * (S * S if naive else pairs(model, S)),
        (L + model.mtp_layers) * S * S,
    )
    if model.n_encoder_layers:  # its own attention sees all, and each decoder layer sees the encoder's output
        layers += model.n_encoder_layers * (m.attention + m.dense) + L * m.attention
        n_pairs, square = n_pairs + (model.n_encoder_layers + L) * S * S, square + (model.n_encoder_layers + L) * S * S
    linear = 2 * S * (layers + heads * model.vocab_size * model.d_model)
    core = m.pair_flops * n_pairs
    scores = 2 * model.query_width * n_pairs
    again = 0 if naive else scores
    if job.recompute == "full":
        part = 2 * S * layers + core
        if habits.early_stop:  # the block's last product makes nothing that backward wants
            last = (L - n_moe) * model.d_ff * model.d_model
            last += n_moe * (model.experts_per_token * model.moe_d_ff + model.shared_d_ff) * model.d_model
            part -= 2 * S * last
        again += part // job.recompute_every
    elif job.recompute == "selective":
        again += core
    elif job.recompute == "selective_op":
        again += 2 * S * _remade(job, habits) * L + (core if "core_attn" in job.recompute_modules else 0)
    return Flops(3 * (linear + core), 3 * (linear + m.pair_flops * square), again)


def _remade(job: Job, habits: Framework) -> int:
    """Weights per layer whose products run again under a checkpoint of named operators or modules."""
    model, m = job.model, matrices(job.model)
    if habits.name == "torchtitan":  # every second matrix product of a block: keys, output, one of the two wide ones
        D = model.d_model
        return D * model.n_kv_heads * model.head_dim + D * model.query_width + D * model.d_ff * (not model.n_experts)
    names, total = job.recompute_modules, 0
    share = model.n_moe_layers / model.n_layers
    if "mla_up_proj" in names and model.latent is not None:
        t = model.latent
        total += t.q_rank * model.query_width + t.kv_rank * model.n_heads * (t.nope_dim + t.value_dim)
    if "mlp" in names:
        total += int(m.dense * (1 - share))
    if "moe" in names:
        total += int(share * (model.experts_per_token * m.expert + m.shared))
    if "shared_experts" in names:
        total += int(share * m.shared)
    return total


# ---- one pass over one layer on one rank


@dataclass(slots=True)
class _Pass:
    """Seconds by part and kernels launched, while they are being added up."""

    rates: Rates
    seconds: dict[str, Array] = field(default_factory=dict)
    kernels: Array = 0

    def add(self, part: str, seconds: Array, kernels: Array = 0) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds
        self.kernels = self.kernels + kernels

    def product(
        self, dtype: str, M: Array, N: Array, K: Array, groups: Array = 1, out: float = 2.0, launches: Array = 1
    ) -> None:
        several = np.ndim(launches) > 0 or launches > 1
        self.add("compute", matmul_seconds(self.rates, dtype, M, N, K, groups, out, several), launches)

    def stream(self, n_bytes: Array, kernels: Array = 1) -> None:
        self.add("memory_bound", stream_seconds(self.rates, n_bytes, kernels), kernels)

    @property
    def total(self) -> Array:
        return sum(self.seconds.values())

    def scaled(self, share: Array) -> _Pass:
        return _Pass(self.rates, {k: v * share for k, v in self.seconds.items()}, self.kernels * share)

    def __add__(self, other: _Pass) -> _Pass:
        names = {**self.seconds, **other.seconds}
        both = {k: self.seconds.get(k, 0.0) + other.seconds.get(k, 0.0) for k in names}
        return _Pass(self.rates, both, self.kernels + other.kernels)


@dataclass(frozen=True, slots=True)
class _Context:
    """What a layer's price depends on: the job's scalars, and one array entry per distinct sharding."""

    job: Job
    habits: Framework
    rates: Rates
    links: Wires
    dtype: str  # of the blocks' products
    wide: str  # of the head's
    b: Array
    tp: Array
    cp: Array
    sp: Array
    ep: Array
    expert_tp: Array
    accumulate: float  # bytes moved per element of a weight's gradient as the product writes it

    @property
    def model(self) -> Decoder:
        return self.job.model

    @property
    def n(self) -> Array:
        """Tokens of a rank."""
        return self.b * self.job.seq_len / self.cp

    @property
    def e(self) -> int:
        """Bytes of an activation."""
        return 4 if self.job.precision == "fp32" else 2

    @property
    def fused(self) -> bool:
        return self.habits.fused_kernels or self.job.compiled

    @property
    def shard(self) -> Array:
        """What norms and residuals are split by: tp with sequence parallelism."""
        return np.where(self.sp > 0, self.tp, 1)


@dataclass(frozen=True, slots=True)
class _Passes:
    """Forward, backward, and what is made again in between."""

    forward: _Pass
    backward: _Pass
    again: _Pass

    def __add__(self, other: _Passes) -> _Passes:
        return _Passes(self.forward + other.forward, self.backward + other.backward, self.again + other.again)

    def scaled(self, share: Array) -> _Passes:
        return _Passes(self.forward.scaled(share), self.backward.scaled(share), self.again.scaled(share))


def _new(x: _Context) -> _Passes:
    return _Passes(_Pass(x.rates), _Pass(x.rates), _Pass(x.rates))


def _linear(x: _Context, p: _Passes, M: Array, K: Array, N: Array, groups: Array = 1, bias: bool = False) -> None:
    """(M, K) @ (K, N) and its two gradients. In 8 or 4 bits, operands are cast first: read once, written both ways."""
    out = float(x.e)
    # a group of products is one library call after another: each costs the host a launch, not a module's ops
    launches = 1 + (groups - 1) / coefficient("host_ops_per_kernel")
    p.forward.product(x.dtype, M, N, K, groups, out, launches)
    p.backward.product(x.dtype, M, K, N, groups, out, launches)
    p.backward.product(x.dtype, K, N, M, groups, x.accumulate, launches)
    if x.dtype in ("fp8", "fp4"):
        by_recipe = {"mxfp8": "cast_bytes_blocks", "nvfp4": "cast_bytes_fp4"}
        cast = coefficient(by_recipe.get(x.job.precision, "cast_bytes"))
        p.forward.stream(cast * groups * M * K, launches)
        p.backward.stream(cast * groups * M * N, launches)
    if bias:
        p.backward.stream(x.e * M * N)
    if not x.habits.fused_gradients and x.accumulate == out:
        # the gradient is added to the one before by a kernel of its own
        g = _gradient_bytes(x.job, x.habits)
        p.backward.stream((x.e + 2 * g) * groups * K * N)


def _gradient_bytes(job: Job, habits: Framework) -> float:
    if job.gradient_bytes is not None:
        return job.gradient_bytes
    return habits.gradient_bytes.get(job.precision, 4.0)


def _norm(x: _Context, p: _Passes) -> None:
    """One norm with the residual sum before it, and dropout where there is one."""
    D, n, e = x.model.d_model, x.n / x.shard, x.e
    if x.fused or x.model.norm == "layernorm":
        p.forward.stream(2 * n * D * e)
        p.backward.stream(5 * n * D * e, 2)
    else:  # by single ops in fp32
        p.forward.stream(coefficient("eager_rmsnorm_forward_bytes") * n * D, 6)
        p.backward.stream(coefficient("eager_rmsnorm_backward_bytes") * n * D, 12)
    mask = n * D * x.habits.dropout
    if x.fused or not x.habits.dropout:
        p.forward.stream(3 * n * D * e + mask)
    else:
        p.forward.stream(5 * n * D * e + mask, 2)
    p.backward.stream(3 * n * D * e + (2 * n * D * e + mask) * x.habits.dropout, 1 + x.habits.dropout)


def _attention(x: _Context, p: _Passes, windowed: bool, *, causal: bool = True, cross: bool = False) -> None:
    """Norm, projections, the core, the output's projection."""
    model, n, tp, e = x.model, x.n, x.tp, x.e
    D, Q, E = model.d_model, model.query_width, model.n_kv_heads * model.head_dim
    _norm(x, p)
    if model.latent is not None:
        t, H = model.latent, model.n_heads
        if t.q_rank:
            _linear(x, p, n, D, t.q_rank)
            _linear(x, p, n, t.q_rank, Q / tp)
        else:
            _linear(x, p, n, D, Q / tp)
        _linear(x, p, n, D, t.kv_rank + t.rope_dim)
        _linear(x, p, n, t.kv_rank, H * (t.nope_dim + t.value_dim) / tp)
        # two more norms, keys put together of two parts, queries and keys turned
        p.forward.stream(2 * n * (t.q_rank + t.kv_rank) * e + 4 * n * Q / tp * e, 6)
        p.backward.stream(4 * n * (t.q_rank + t.kv_rank) * e + 5 * n * Q / tp * e, 8)
        E = Q
    elif x.fused:
        _linear(x, p, n, D, (Q + 2 * E) / tp, bias=model.bias)
    else:
        for width in (Q, E, E):
            _linear(x, p, n, D, width / tp, bias=model.bias)
        p.backward.stream(2 * 3 * n * D * e, 2)
    if model.latent is None and not model.learned_positions and model.norm == "rmsnorm":  # rotary positions
        turned = n * (Q + E) / tp * (2 * e if x.fused else coefficient("eager_rotary_bytes"))
        p.forward.stream(turned, 2 if x.fused else 10)
        p.backward.stream(turned, 2 if x.fused else 10)
    _core(x, p, windowed, causal)
    _linear(x, p, n, model.value_width / tp, D, bias=model.bias)
    _tensor_parallel(x, p)


def _core(x: _Context, p: _Passes, windowed: bool, causal: bool) -> None:
    """softmax(QKᵀ)V: one fused kernel, or scores in memory."""
    model, S, e, tp = x.model, x.job.seq_len, x.e, x.tp
    dqk, dv = model.query_width // model.n_heads, model.value_width // model.n_heads
    if x.job.attention == "naive":
        scores = x.b * model.n_heads / tp * S * S / x.cp
        groups, rows = x.b * model.n_heads / tp, S / x.cp
        # 16-bit products of heads that are no multiple of 8 miss the tensor cores, which load 16 bytes at a time
        plain = e == 4 or (max(dqk % 8, dv % 8) and "fp32" in x.rates.ceilings)
        dtype = product_dtype(x.rates.device, "fp32" if plain else "bf16")
        dropout = x.habits.dropout
        p.forward.product(dtype, rows, S, dqk, groups, e)
        p.forward.stream(2 * e * scores)  # mask and softmax in one
        if not x.fused:  # scale and mask by themselves
            p.forward.stream(4 * e * scores, 2)
        if dropout:
            p.forward.stream((2 * e + 1) * scores)
        p.forward.product(dtype, rows, dv, S, groups, e)
        p.forward.stream(2 * x.n * model.value_width / tp * e)  # tokens together again
        p.backward.product(dtype, S, dv, rows, groups, e)
        p.backward.product(dtype, rows, S, dv, groups, e)
        if dropout:
            p.backward.stream((2 * e + 1) * scores)
        p.backward.stream(3 * e * scores)
        if not x.fused:
            p.backward.stream(4 * e * scores, 2)
        p.backward.product(dtype, rows, dqk, S, groups, e)
        p.backward.product(dtype, S, dqk, rows, groups, e)
        p.backward.stream(4 * x.n * model.query_width / tp * e, 3)
        return
    kept = pairs(model, S, windowed) if causal else S * S
    done = 2 * (model.query_width + model.value_width) * kept * x.b / tp / x.cp
    seen = model.sliding_window if windowed and model.sliding_window else S / x.cp
    p.forward.add("attention", attention_seconds(x.rates, done, seen, dqk), 1)
    # published rates count five products backward for the two forward: the scores are made again
    p.backward.add("attention", attention_seconds(x.rates, 5 * done / 2, seen, dqk, backward=True), 2)
    # keys and values go round the ring while the kernel works on those that are here
    held = (model.n_kv_heads * model.head_dim * 2 if model.latent is None else model.query_width * 2) / tp * x.n * e
    ring = np.where(x.cp > 1, (x.cp - 1) * send_seconds(x.links, held, tp), 0.0)
    least = coefficient("cp_shown") * ring
    p.forward.add("cp", np.maximum(ring - p.forward.seconds["attention"], least))
    p.backward.add("cp", np.maximum(2 * ring - p.backward.seconds["attention"], 2 * least))


def _tensor_parallel(x: _Context, p: _Passes) -> None:
    """One block's collectives: its output summed over tp, or scattered, and gathered before the next block."""
    whole = x.n * x.model.d_model * x.e
    all_reduce = collective_seconds(x.links, "all_reduce", whole, x.tp)
    gather = collective_seconds(x.links, "all_gather", whole, x.tp)
    one = np.where(x.sp > 0, 2 * gather, all_reduce)
    shown = 1 - _tp_overlap(x)
    kernels = np.where(x.tp > 1, 1 + x.sp, 0)
    p.forward.add("tp", one * shown, kernels)
    # backward gathers the inputs again for the weights' gradients, beside the products that wait for them anyway
    p.backward.add("tp", one * shown, kernels)


def _tp_overlap(x: _Context) -> float:
    return max(x.habits.tp_overlap, coefficient("async_tp_hidden") if "async_tp" in x.job.flags else 0.0)


def _mlp(x: _Context, p: _Passes, width: int) -> None:
    """Norm, the wide products, the activation between, and back."""
    D, tp = x.model.d_model, x.tp
    _norm(x, p)
    inner = 2 if x.model.gated_mlp else 1
    if x.fused:
        _linear(x, p, x.n, D, inner * width / tp, bias=x.model.bias)
    else:
        for _ in range(inner):
            _linear(x, p, x.n, D, width / tp, bias=x.model.bias)
    _activation(x, p, x.n * width / tp)
    _linear(x, p, x.n, width / tp, D, bias=x.model.bias)
    _tensor_parallel(x, p)


def _activation(x: _Context, p: _Passes, elements: Array) -> None:
    e, gated = x.e, x.model.gated_mlp
    if gated:
        p.forward.stream((3 if x.fused else 5) * elements * e, 1 if x.fused else 2)
        p.backward.stream((5 if x.fused else 8) * elements * e, 1 if x.fused else 3)
    else:
        p.forward.stream(2 * elements * e)
        p.backward.stream(3 * elements * e)


def _mixture(x: _Context, p: _Passes) -> None:
    """Norm, router, tokens to their experts' ranks, the experts, and back; shared experts beside."""
    model, n, e = x.model, x.n, x.e
    D, k, E, F = model.d_model, model.experts_per_token, model.n_experts, model.moe_d_ff
    _norm(x, p)
    own = n / np.where(x.sp > 0, x.tp, 1)  # with sequence parallelism a rank routes its own tokens
    full = "fp32" if "fp32" in x.rates.ceilings else x.wide
    for one, M, N, K in ((p.forward, own, E, D), (p.backward, own, D, E), (p.backward, D, E, own)):
        one.product(full, M, N, K, 1, 4.0)
    p.forward.stream(own * E * 4 * 4, 8)  # scores, top k, counts
    p.backward.stream(own * E * 4 * 4, 6)
    sent = own * k * D * e
    # permuted for the ranks and again for the experts, and put back with their weights
    dropping = "tokendrop" in x.job.flags
    joined = x.job.flags.get("dispatcher") == "hybridep"
    passes = coefficient(
        "permute_passes_unfused" if dropping else "permute_passes_joined" if joined else "permute_passes"
    )
    p.forward.stream(2 * own * D * e + passes * sent, 4 + 8 * dropping)
    p.backward.stream(2 * own * D * e + (passes + 1) * sent, 5 + 10 * dropping)
    if dropping:  # each expert picks its tokens: a sort of the whole map
        p.forward.stream(coefficient("sort_bytes") * own * E, 6)
    # padding every expert to a capacity goes with the plain exchange, which sends every copy
    move = dispatch_seconds(x.links, own * D * e, x.ep, k, not dropping)
    # DualPipe runs one micro-batch's exchange beside another's products: that is what it is for
    hides = "ep_overlap" in x.job.flags or x.job.layout.schedule == "dualpipev"
    shown = 1.0 - coefficient("ep_overlap_hidden") if hides else 1.0
    p.forward.add("ep", 2 * move * shown, np.where(x.ep > 1, 2, 0))
    p.backward.add("ep", 2 * move * shown, np.where(x.ep > 1, 2, 0))
    inner = 2 if model.gated_mlp else 1
    here = E / x.ep  # experts of a rank; each sees what all ranks of the group send it
    arriving = own * k * x.expert_tp / here * 1.0
    width = F / x.expert_tp
    _linear(x, p, arriving, D, inner * width, here)
    _activation(x, p, arriving * here * width)
    _linear(x, p, arriving, width, D, here)
    if model.shared_d_ff:
        _linear(x, p, n, D, inner * model.shared_d_ff / x.tp)
        _activation(x, p, n * model.shared_d_ff / x.tp)
        _linear(x, p, n, model.shared_d_ff / x.tp, D)
        p.forward.stream(3 * n * D * e)
        _tensor_parallel(x, p)


def _block(x: _Context, windowed: bool, moe: bool) -> _Passes:
    """One decoder layer, with what its checkpoint makes again."""
    p = _new(x)
    _attention(x, p, windowed, causal=x.model.causal)
    if _graphed(x.job) == "but experts":
        for one in (p.forward, p.backward):
            one.kernels = one.kernels * (coefficient("host_seconds_graph") / _host_seconds(x.job, x.habits))
    if moe:
        _mixture(x, p)
    else:
        _mlp(x, p, x.model.d_ff)
    job = x.job
    if job.recompute == "full":
        again = p.forward.scaled(1 / job.recompute_every)
        if x.habits.early_stop and not moe:
            last = _new(x)
            _linear(x, last, x.n, x.model.d_ff / x.tp, x.model.d_model)
            again = again + last.forward.scaled(-1 / job.recompute_every)
        return replace(p, again=again)
    if job.recompute == "selective":
        core = _new(x)
        _core(x, core, windowed, x.model.causal)
        return replace(p, again=core.forward)
    if job.recompute == "selective_op":
        again = _Pass(x.rates)
        if x.habits.name == "torchtitan":
            remade = _new(x)
            D, model = x.model.d_model, x.model
            _linear(x, remade, x.n, D, model.n_kv_heads * model.head_dim / x.tp)
            _linear(x, remade, x.n, model.query_width / x.tp, D)
            if not moe:
                _linear(x, remade, x.n, D, model.d_ff / x.tp)
            streams = p.forward.seconds.get("memory_bound", 0.0)
            remade.forward.add("memory_bound", streams, p.forward.kernels / 2)
            # what is scattered is kept, what is gathered is not
            gather = collective_seconds(x.links, "all_gather", x.n * D * x.e, x.tp)
            remade.forward.add("tp", np.where(x.sp > 0, 2 * gather, 0.0) * (1 - _tp_overlap(x)))
            return replace(p, again=remade.forward)
        names, model = job.recompute_modules, x.model
        if "core_attn" in names:
            core = _new(x)
            _core(x, core, windowed, model.causal)
            again = again + core.forward
        if "mla_up_proj" in names and model.latent is not None:
            up, t = _new(x), model.latent
            _linear(x, up, x.n, t.q_rank, model.query_width / x.tp)
            _linear(x, up, x.n, t.kv_rank, model.n_heads * (t.nope_dim + t.value_dim) / x.tp)
            again = again + up.forward
        if "mlp" in names and not moe:
            wide = _new(x)
            _mlp(x, wide, model.d_ff)
            again = again + wide.forward
        if "layernorm" in names:
            again.stream(4 * x.n / x.shard * model.d_model * x.e, 2)
        if "moe_act" in names and moe:
            again.stream(3 * x.n * model.experts_per_token * model.moe_d_ff * x.e)
        if "moe" in names and moe:
            whole = _new(x)
            _mixture(x, whole)
            again = again + whole.forward
        return replace(p, again=again)
    return p


def _embedding(x: _Context) -> _Passes:
    """Rows looked up, positions added, dropout; the table's gradient is scattered into zeros."""
    p, n, e = _new(x), x.n, x.e
    D, V = x.model.d_model, x.model.vocab_size
    p.forward.stream(n * D * e * (2 + 2 * (x.model.learned_positions > 0) + 2 * x.habits.dropout), 3)
    p.backward.stream(n * D * e * 3 + 2 * V * D * e / x.tp, 4)
    p.forward.add("tp", collective_seconds(x.links, "all_reduce", n * D * e, x.tp), np.where(x.tp > 1, 1, 0))
    return p


def _head(x: _Context) -> _Passes:
    """The last norm, D -> V, and cross-entropy in fp32."""
    p, n = _new(x), x.n
    V, D = _padded(x.job, x.habits, x.tp), x.model.d_model
    _norm(x, p)
    plain = replace(x, dtype=x.wide)
    _linear(plain, p, n, D, V / x.tp)
    logits = n * V / x.tp
    # torchtitan compiles each block by itself; its head and loss stay eager (parallelize_llama.py, apply_compile)
    fused = x.habits.fused_loss or (x.job.compiled and x.habits.name != "torchtitan")
    p.forward.stream(
        logits * coefficient("loss_forward_bytes_fused" if fused else "loss_forward_bytes"), 3 if fused else 9
    )
    p.backward.stream(
        logits * coefficient("loss_backward_bytes_fused" if fused else "loss_backward_bytes"), 2 if fused else 4
    )
    three = collective_seconds(x.links, "all_reduce", 4 * n, x.tp)
    reduced = collective_seconds(x.links, "all_reduce", n * D * x.e, x.tp)
    p.forward.add("tp", 3 * three, np.where(x.tp > 1, 3, 0))
    p.backward.add("tp", reduced, np.where(x.tp > 1, 1, 0))
    return p


def _padded(job: Job, habits: Framework, tp: Array) -> Array:
    if job.padded_vocab_size:
        return job.padded_vocab_size
    unit = habits.vocab_multiple * (tp if habits.vocab_multiple > 1 else 1)
    return np.ceil(job.model.vocab_size / unit) * unit


# ---- the step


def step_time(job: Job, cluster: Cluster) -> StepTime:
    """The forecast of one step of ``job`` on ``cluster``. Vectorised over the layout's fields and the batch.

    Raises UnknownName for a framework or schedule that no row or function knows, BadInput for a dtype the device has no
    peak in.
    """
    habits = framework(job.framework)
    kernel = habits.flash if job.attention == "flash" else "fused"
    speed = rates(cluster.accelerator, kernel)
    links = wires(cluster)
    lay = job.layout
    names = ("micro_batch", "micro_batches", "dp", "tp", "pp", "cp", "ep", "expert_tp", "fsdp", "zero_stage",
             "reshard_after_forward", "sequence_parallel", "virtual_stages")  # fmt: skip
    values = [getattr(job if hasattr(job, k) else lay, k) for k in names]
    shape = np.broadcast_shapes(*(np.shape(v) for v in values))
    columns = dict(
        zip(names, (np.broadcast_to(np.asarray(v, dtype=float), shape).ravel() for v in values), strict=True)
    )

    priced = ("micro_batch", "tp", "cp", "sequence_parallel", "ep", "expert_tp")
    table = np.stack([columns[k] for k in priced], axis=1)
    few, where = _distinct(table)
    b, tp, cp, sp, ep, expert_tp = few.T
    width = 4.0 if job.precision == "fp32" else 2.0
    accumulate = 2.0 * _gradient_bytes(job, habits) if habits.fused_gradients else width
    x = _Context(
        job, habits, speed, links,
        product_dtype(cluster.accelerator, job.precision),
        product_dtype(cluster.accelerator, "fp32" if job.precision == "fp32" else "bf16"),
        b, tp, cp, sp, ep, expert_tp, accumulate,
    )  # fmt: skip
    model = job.model
    host = _host_seconds(job, habits)
    block = _mean_block(x)
    saves = coefficient("host_checkpoint_seconds") if job.recompute == "full" else 0.0
    layer = {
        "F": _with_host(block.forward, host, saves, _refilled(job)),
        "B": _with_host(block.backward, host),
        "R": _with_host(block.again, host, saves),
    }
    first, last = (_both(p, host) for p in (_embedding(x), _head(x)))

    def spread(parts: Mapping[str, Array]) -> dict[str, Array]:
        return {k: np.broadcast_to(v, few.shape[:1])[where] for k, v in parts.items()}

    F, B, R = (spread(layer[k]) for k in "FBR")
    first, last = spread(first), spread(last)

    c = columns
    pp, M, chunks = c["pp"], c["micro_batches"], c["virtual_stages"]
    extra = model.mtp_layers
    n_layers = model.n_layers + model.n_encoder_layers
    head = _sum(last, _scale(_sum(F, B, R, last), extra)) if extra else last
    one = _total(_sum(F, B, R))
    counted = habits.name == "megatron-deepspeed"
    before, after = (1.0, 1.0) if counted else (_total(first) / one, _total(head) / one)
    most, n_first, n_last = layers_of_stages(n_layers, pp, chunks, before, after)
    held = _held(job, c, most)

    sharded = _sharded_parameters(job, habits, c, links, speed, held, _total(F), _total(B) + _total(R))
    per_layer = _sum(F, B, R)
    if sharded is not None:
        per_layer = _sum(per_layer, sharded["layer"])
        first = _sum(first, sharded["ends"])
        one = _total(per_layer)
    stages = [most * one, n_first * one + _total(first), n_last * one + _total(head)]
    single = pp == 1
    whole = n_layers * one + _total(first) + _total(head)
    slowest = np.where(single, whole, np.maximum.reduce(stages))
    at_first = ~single & (stages[1] >= slowest)
    at_last = ~single & (stages[2] >= slowest) & ~at_first
    count = np.where(single, n_layers, np.where(at_first, n_first, np.where(at_last, n_last, most)))
    busy = _sum(
        _scale(per_layer, count),
        _scale(first, single | at_first),
        _scale(head, single | at_last),
    )
    sent = _hidden_bytes(job, c)
    send = np.where(pp > 1, 2 * chunks * send_seconds(links, sent, c["tp"] * c["cp"] * c["dp"]), 0.0)
    send = send * np.where(chunks > 1, 1 - habits.overlap_parameters * coefficient("interleaved_send_hidden"), 1.0)
    bubble = np.where(single, 0.0, bubble_seconds(lay.schedule, pp, chunks, slowest, whole + pp * send))
    slower = slowest_of(pp * c["tp"] * c["cp"] * c["dp"])
    parts = {k: M * v * (slower if k in ("compute", "attention") else 1.0) for k, v in busy.items()}
    parts["pp_send"] = M * send
    parts["bubble"] = np.maximum(bubble - send, 0.0)
    done = _data_parallel(job, habits, c, links, speed, held, (_total(B) + _total(R)) * most)
    parts = _sum(parts, done)
    parts = _sum(parts, _update(job, habits, c, speed, held))
    seconds = _total(parts)
    work = flops(job)
    samples = np.broadcast_to(np.asarray(job.samples, dtype=float), shape)

    def out(value: Array) -> Array:
        return _shaped(value, shape)

    model_flops = samples * work.model
    notes = ("the network's speed is assumed: one 400 Gb/s adapter per accelerator",) if links.assumed else ()
    peak = cluster.accelerator.peak(product_dtype(cluster.accelerator, job.precision))
    total = out(seconds)
    return StepTime(
        total,
        {k: out(parts.get(k, 0.0) * np.ones(seconds.shape)) for k in PARTS},
        _plain(model_flops), _plain(samples * work.hardware), _plain(samples * work.full_square),
        _plain(model_flops / (np.asarray(total) * peak * np.asarray(lay.ranks))),
        {k: out(v) for k, v in _traffic(job, habits, c, held).items()},
        notes,
    )  # fmt: skip


def _distinct(table: Any) -> tuple[Any, Any]:
    """The table's distinct rows, and for each row which of them it is."""
    if len(table) == 1:
        return table, np.zeros(1, dtype=int)
    whole = table.astype(np.int64)
    size = whole.max(axis=0) + 1
    if np.all(whole == table) and np.prod(size.astype(float)) < 2.0**62:  # one number says all: one sort
        code = np.zeros(len(table), dtype=np.int64)
        for column, n in zip(whole.T, size, strict=True):
            code = code * n + column
    else:
        code = np.zeros(len(table), dtype=np.int64)
        for column in table.T:
            values, place = np.unique(column, return_inverse=True)
            code = code * len(values) + place.ravel()
    _, chosen, where = np.unique(code, return_index=True, return_inverse=True)
    return table[chosen], where.ravel()


def _shaped(value: Array, shape: tuple[int, ...]) -> Array:
    return _plain(np.broadcast_to(value, (int(np.prod(shape)),) if shape else (1,)).reshape(shape))


def _plain(value: Array) -> Array:
    """A number where there is one layout."""
    return float(value) if np.ndim(value) == 0 else value


def _total(parts: Mapping[str, Array]) -> Array:
    return sum(parts.values()) if parts else 0.0


def _sum(*many: Mapping[str, Array]) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for parts in many:
        for k, v in parts.items():
            found[k] = found[k] + v if k in found else v
    return found


def _scale(parts: Mapping[str, Array], by: Array) -> dict[str, Array]:
    return {k: v * by for k, v in parts.items()}


def _with_host(p: _Pass, host: float, fixed: float = 0.0, refilled: float = 0.0) -> dict[str, Array]:
    """Seconds by part; what the host takes beyond the device is overhead.

    A host that waits for the device in the middle of a pass has to fill the queue again: so many kernels ``refilled``.
    """
    return {**p.seconds, "overhead": np.maximum(host * p.kernels + fixed - p.total, 0.0) + host * refilled}


def _both(p: _Passes, host: float) -> dict[str, Array]:
    return _sum(_with_host(p.forward, host), _with_host(p.backward, host))


def _graphed(job: Job) -> str:
    """What is replayed from CUDA graphs: nothing, all, or of a mixture's layers all but the experts.

    How many tokens an expert gets is known on the device only: graphs of modules stop at the router.
    """
    graphs = job.flags.get("cuda_graph")
    if not graphs:
        return ""
    return "all" if graphs == "full_iteration" or not job.model.n_experts else "but experts"


def _refilled(job: Job) -> float:
    """Kernels launched with nothing queued, after the host has read how many tokens an expert gets.

    With a capacity it need not read; a graph of the whole step has no host in it.
    """
    graphs = _graphed(job)
    if not job.model.n_experts or "tokendrop" in job.flags or graphs == "all":
        return 0.0
    return coefficient("host_restart_kernels_graphed" if graphs else "host_restart_kernels")


def _host_seconds(job: Job, habits: Framework) -> float:
    if _graphed(job) == "all":
        return coefficient("host_seconds_graph")
    if job.compiled or habits.name == "llm.c":
        return coefficient("host_seconds_compiled")
    return coefficient("host_seconds_eager") * coefficient("host_ops_per_kernel")


def _mean_block(x: _Context) -> _Passes:
    """A layer of the model's mix: windowed or not, mixture or dense, encoder or decoder."""
    model = x.model
    L = model.n_layers
    moe = model.n_moe_layers / L
    windowed = (L // model.windowed_every) / L if model.sliding_window else 0.0
    mean = None
    for has_window, of_window in ((True, windowed), (False, 1 - windowed)):
        for is_moe, of_moe in ((True, moe), (False, 1 - moe)):
            if of_window * of_moe > 0:
                part = _block(x, has_window, is_moe).scaled(of_window * of_moe)
                mean = part if mean is None else mean + part
    assert mean is not None
    if model.n_encoder_layers:
        cross = _new(x)
        _attention(x, cross, windowed=False, causal=False)
        mean = mean + cross.scaled(L / (L + model.n_encoder_layers))
    return mean


def _hidden_bytes(job: Job, c: Mapping[str, Array]) -> Array:
    """Bytes between two stages: the stream, split over tp where it is scattered before it is sent."""
    e = 4 if job.precision == "fp32" else 2
    return c["micro_batch"] * job.seq_len / c["cp"] * job.model.d_model * e / c["tp"]


@dataclass(frozen=True, slots=True)
class _Held:
    """Parameters of the fullest rank, before ZeRO shards them."""

    layers: Array  # its decoder layers
    layer: Array  # of one layer: what is replicated over dp·cp
    layer_experts: Array  # and its experts
    ends: Array  # tables

    @property
    def dense(self) -> Array:
        return self.layers * self.layer + self.ends

    @property
    def experts(self) -> Array:
        return self.layers * self.layer_experts


def _held(job: Job, c: Mapping[str, Array], most: Array) -> _Held:
    model, m = job.model, matrices(job.model)
    n_layers = model.n_layers + model.n_encoder_layers
    experts = model.n_moe_layers * model.n_experts * m.expert
    table = model.vocab_size * model.d_model
    tables = table * (1 if model.tied_embeddings else 2)
    body = (parameters(model) - experts - tables) / n_layers
    ends = np.where(c["pp"] > 1, table, tables)
    spread = c["ep"] * c["expert_tp"]
    return _Held(most, body / c["tp"], experts / n_layers / spread if experts else 0.0, ends / c["tp"])


def _sharded_parameters(
    job: Job,
    habits: Framework,
    c: Mapping[str, Array],
    links: Wires,
    speed: Rates,
    held: _Held,
    forward: Array,
    backward: Array,
) -> dict[str, dict[str, Array]] | None:
    """What ZeRO-3 or FSDP adds to a layer and to the ends of one micro-batch; None where no layout is sharded so."""
    three = c["zero_stage"] >= 3
    if not np.any(three):
        return None
    one, tables = held.layer + held.layer_experts, held.ends
    width = _gathered_bytes(job, habits)
    reduced = _reduced_bytes(job, habits)
    shards = np.where(c["fsdp"] > 1, c["fsdp"], c["dp"] * c["cp"])
    stride = c["tp"]
    calls = habits.gather_calls
    gather = calls * collective_seconds(links, "all_gather", one * width / calls, shards, stride)
    scatter = calls * collective_seconds(links, "reduce_scatter", one * reduced / calls, shards, stride)
    replicas = c["dp"] * c["cp"] / shards
    summed = collective_seconds(links, "all_reduce", one * reduced / shards, replicas, stride * shards)
    # parameter by parameter, a block made again lets go of what backward then gathers once more
    times = 2 if calls > 1 and job.recompute == "full" else 1
    again = np.where(c["reshard_after_forward"] > 0, times * gather, 0.0)
    hidden_forward, hidden_backward = np.minimum(gather, forward), np.minimum(again + scatter + summed, backward)
    if not habits.overlap_gathers:
        hidden_forward, hidden_backward = 0.0 * gather, 0.0 * gather
    slow = coefficient("network_sms") / speed.units
    shown = gather + again + scatter + summed - hidden_forward - hidden_backward
    shown = shown + slow * (hidden_forward + hidden_backward)
    copies = one * (width * 2 + reduced * 2) / speed.bytes_per_s  # in and out of the flat buffers
    ends = collective_seconds(links, "all_gather", tables * width, shards, stride)
    ends = ends + collective_seconds(links, "reduce_scatter", tables * reduced, shards, stride) + gather + scatter
    return {
        "layer": {"dp": np.where(three, shown, 0.0), "memory_bound": np.where(three & (shards > 1), copies, 0.0)},
        "ends": {"dp": np.where(three, ends, 0.0)},
    }


def _gathered_bytes(job: Job, habits: Framework) -> float:
    if job.precision == "fp32":
        return 4.0
    return 1.0 if job.precision in ("fp8", "mxfp8") and habits.name == "torchtitan" else 2.0


def _reduced_bytes(job: Job, habits: Framework) -> float:
    said = job.flags.get("reduce_dtype")
    if said:
        return 4.0 if said == "fp32" else 2.0
    return _gradient_bytes(job, habits)


def _data_parallel(
    job: Job, habits: Framework, c: Mapping[str, Array], links: Wires, speed: Rates, held: _Held, backward: Array
) -> dict[str, Array]:
    """Gradients and parameters between replicas, once a step: ZeRO 0 to 2."""
    stage = c["zero_stage"]
    if np.all(stage >= 3):
        return {"dp": np.zeros(stage.shape)}
    g = _reduced_bytes(job, habits)
    width = 4.0 if job.precision == "fp32" else 2.0
    group, stride = c["dp"] * c["cp"], c["tp"]
    spread = c["ep"] * c["expert_tp"]
    expert_group = np.maximum(group * c["tp"] / spread, 1)

    def over_all(op: str, width: float) -> Array:
        seconds = collective_seconds(links, op, held.dense * width, group, stride)
        if job.model.n_experts:
            seconds = seconds + collective_seconds(links, op, held.experts * width, expert_group, spread)
        return seconds

    zero, some = np.any(stage == 0), np.any(stage > 0)
    reduce = np.where(
        stage == 0, over_all("all_reduce", g) if zero else 0.0, over_all("reduce_scatter", g) if some else 0.0
    )
    reduce = np.where(stage == 2, reduce * c["micro_batches"], reduce)
    gather = over_all("all_gather", width) if some else 0.0
    gather = np.where((stage == 0), 0.0, gather)
    overlaps = habits.overlap_gradients if job.overlap_gradients is None else job.overlap_gradients
    slow = coefficient("network_sms") / speed.units
    if overlaps:
        hidden = np.minimum(reduce, backward)
        reduce = reduce - hidden + slow * hidden
    if habits.overlap_parameters:
        hidden = np.minimum(gather, backward / 2)
        gather = gather - hidden + slow * hidden
    # the first stage and the last hold a tied table each, and add their gradients
    apart = stride * group * np.maximum(c["pp"] - 1, 1)
    table = job.model.vocab_size * job.model.d_model / c["tp"] * g
    shared = (c["pp"] > 1) & job.model.tied_embeddings
    tied = np.where(shared, collective_seconds(links, "all_reduce", table, 2, apart), 0.0)
    return {"dp": np.where(stage >= 3, 0.0, reduce + gather + tied)}


def _update(job: Job, habits: Framework, c: Mapping[str, Array], speed: Rates, held: _Held) -> dict[str, Array]:
    """The optimizer's kernels over what a rank owns."""
    if "fwd_bwd_only" in job.flags:
        return {"optimizer": np.zeros(c["dp"].shape)}
    dense, experts = held.dense, held.experts
    shards = np.where(c["fsdp"] > 1, c["fsdp"], c["dp"] * c["cp"])
    group = np.maximum(c["dp"] * c["cp"] * c["tp"] / (c["ep"] * c["expert_tp"]), 1)
    own = np.where(c["zero_stage"] > 0, dense / shards + experts / group, dense + experts)
    return {"optimizer": stream_seconds(speed, own * habits.optimizer_bytes, 40) + coefficient("step_seconds")}


def _traffic(job: Job, habits: Framework, c: Mapping[str, Array], held: _Held) -> dict[str, Array]:
    """Bytes one rank sends in a step, by what they are for."""
    model = job.model
    dense, experts, most = held.dense, held.experts, held.layers
    e = 4 if job.precision == "fp32" else 2
    g, width = _reduced_bytes(job, habits), _gathered_bytes(job, habits)
    M, tp, cp, ep = c["micro_batches"], c["tp"], c["cp"], c["ep"]
    stream = c["micro_batch"] * job.seq_len / cp * model.d_model * e
    passes = 3 if job.recompute == "full" else 2
    group = c["dp"] * cp
    of_group = (group - 1) / group
    stage = c["zero_stage"]
    once = 2 * of_group * dense * np.where(stage == 0, g, (g + width) / 2)
    every = of_group * (dense + experts) * M * ((1 + c["reshard_after_forward"]) * width + g)
    moe = model.n_moe_layers / model.n_layers
    return {
        "tp": M * most * passes * 2 * 2 * (tp - 1) / tp * stream,
        "cp": M * most * passes * (cp - 1) * 2 * model.n_kv_heads * model.head_dim / tp * stream / model.d_model,
        "ep": M * most * moe * passes * 2 * (ep - 1) / ep * stream * model.experts_per_token
        / np.where(c["sequence_parallel"] > 0, tp, 1),
        "dp": np.where(stage >= 3, every, once),
        "pp": np.where(c["pp"] > 1, 2 * M * c["virtual_stages"] * stream / tp, 0.0),
    }  # fmt: skip
