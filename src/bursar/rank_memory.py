"""What one rank of a job holds on its device: parameters, gradients, states, activations, buffers. In closed form.

Each number follows from what the framework's code allocates: the shapes of a rank's shards, the tensors that backward
keeps, the buffers that collectives fill. Layout fields, ``micro_batch`` and ``micro_batches`` may be arrays: a million
layouts are one call.

    t tensor parallel   c context parallel   p pipeline   v virtual stages   T tokens of one micro-batch on one rank
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

from bursar.errors import BadInput
from bursar.frameworks import Framework, framework
from bursar.hardware import Cluster
from bursar.jobs import Count, Decoder, Job

RANKS = ("worst", "first", "last")
MEGATRON = ("megatron", "megatron-deepspeed", "megatron-bridge", "nemo")
_HOPPER = ("h100", "h200", "h800", "b200", "b300", "gb200", "gb300", "gh200")
_MATRIX_STATE = {  # bytes of optimizer state per element of a matrix, without the fp32 master copy
    "adamw": 8, "adam": 8, "adamw-8bit": 2.03, "adam8bit": 2.03, "adafactor": 0, "sgd": 0, "momentum": 4, "lion": 4,
    "muon": 4,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes on one rank's device. ``parts`` add up to ``peak_bytes``; each number may be an array over layouts."""

    peak_bytes: Any  # allocated at the step's fullest instant
    steady_bytes: Any  # allocated between steps
    reserved_bytes: Any  # what the caching allocator then holds of the device
    device_bytes: Any  # with the context, NCCL's buffers and libraries: what nvidia-smi shows and what has to fit
    parts: Mapping[str, Any]
    assumptions: tuple[str, ...] = ()


@cache
def constants() -> Mapping[str, Mapping[str, float]]:
    """`catalog/memory.toml`."""
    return tomllib.loads(files("bursar").joinpath("catalog", "memory.toml").read_text(encoding="utf-8"))


def fits(job: Job, cluster: Cluster) -> Any:
    """Whether the worst rank's ``device_bytes`` are within the memory that the driver shows; an array for arrays."""
    return rank_memory(job, cluster).device_bytes <= cluster.accelerator.usable_bytes


def rank_memory(job: Job, cluster: Cluster, rank: str = "worst") -> RankMemory:
    """Memory of the ``worst`` rank of ``job``, of its ``first`` pipeline stage or of its ``last``. Raises BadInput."""
    if rank not in RANKS:
        raise BadInput(f"no rank {rank!r}; known: {', '.join(RANKS)}")
    if rank != "worst":
        return _stage(job, cluster, rank)
    first, last = _stage(job, cluster, "first"), _stage(job, cluster, "last")
    at_first = np.asarray(first.device_bytes >= last.device_bytes)

    def pick(a: Any, b: Any) -> Any:
        made = np.where(at_first, a, b)
        return made if made.ndim else made.item()

    parts = {name: pick(first.parts[name], last.parts[name]) for name in first.parts}
    return RankMemory(
        *(pick(getattr(first, f), getattr(last, f)) for f in ("peak_bytes", "steady_bytes", "reserved_bytes")),
        pick(first.device_bytes, last.device_bytes), parts, first.assumptions,
    )  # fmt: skip


class Shards(NamedTuple):
    """Parameters of one rank before data-parallel sharding: outside experts, and in them."""

    dense: Any
    expert: Any
    largest_unit: Any  # of one block, or the embedding: what FSDP gathers at once


def padded_vocabulary(job: Job) -> Any:
    """Rows of the embedding, all tensor-parallel ranks together."""
    if job.padded_vocab_size:
        return job.padded_vocab_size
    multiple = int(job.flags.get("vocab_divisible_by") or framework(job.framework).vocab_multiple)
    multiple = multiple * job.layout.tp
    return -(-job.model.vocab_size // multiple) * multiple


def attention_parameters(model: Decoder, tp: Count) -> Any:
    """Elements of one block's attention on one of ``tp`` ranks, its norm included."""
    d, bias = model.d_model, int(model.bias)
    norm = d * (2 if model.norm == "layernorm" else 1)
    if model.latent is not None:
        m, H = model.latent, model.n_heads
        query = (
            d * m.q_rank + m.q_rank + m.q_rank * model.query_width // tp if m.q_rank else d * model.query_width // tp
        )
        key = d * (m.kv_rank + m.rope_dim) + m.kv_rank + m.kv_rank * H * (m.nope_dim + m.value_dim) // tp
        return norm + query + key + model.value_width * d // tp
    kv = np.maximum(model.n_kv_heads / tp, 1) * model.head_dim  # a rank has one key-value head at least
    q = model.n_heads * model.head_dim / tp
    return norm + (d + bias) * (q + 2 * kv) + q * d + bias * d


def mlp_parameters(model: Decoder, d_ff: Count, tp: Count, bias: bool) -> Any:
    """Elements of one feed-forward on one of ``tp`` ranks, without its norm."""
    matrices = 3 if model.gated_mlp else 2
    return matrices * model.d_model * d_ff / tp + bias * ((matrices - 1) * d_ff / tp + model.d_model)


def _stage_layers(job: Job, last: bool) -> tuple[Any, Any]:
    """Blocks of the stage, and how many of them are mixtures."""
    model, lay = job.model, job.layout
    pp = np.asarray(lay.pp)
    L: Any = model.n_layers
    flags = job.flags
    own = flags.get("last_stage_layers" if last else "first_stage_layers")
    extra = int("embedding_counts_as_layer" in flags) + int("loss_counts_as_layer" in flags)
    if own:
        here: Any = np.where(pp == 1, L, int(own))
    elif extra:
        counted = "loss_counts_as_layer" if last else "embedding_counts_as_layer"
        here = np.where(pp == 1, L, (L + extra) / pp - int(counted in flags))
    else:
        here = np.where(pp == 1, L, L // pp if last else np.ceil(L / pp))
    if not model.n_experts:
        return here, 0 * here
    if last:
        return here, np.minimum(here, model.n_moe_layers) if model.moe_every == 1 else here // model.moe_every
    moe = (
        np.maximum(here - model.first_dense_layers, 0)
        if model.moe_every == 1
        else np.minimum(here / model.moe_every, model.n_moe_layers)
    )
    return here, np.where(pp == 1, model.n_moe_layers, moe)


def _shards(job: Job, first: bool, last: bool, one: Any) -> Shards:
    """Elements of one stage. ``one`` is true where there is one stage only."""
    model, lay = job.model, job.layout
    t, d = lay.tp, job.model.d_model
    norm = d * (2 if model.norm == "layernorm" else 1)
    here, moe = _stage_layers(job, last)
    attention = attention_parameters(model, t)
    dense_block = attention + norm + mlp_parameters(model, model.d_ff, t, model.bias)
    expert: Any = 0
    moe_block: Any = 0
    if model.n_experts:
        shared = mlp_parameters(model, model.shared_d_ff, t, False) if model.shared_d_ff else 0
        moe_block = attention + norm + d * model.n_experts + shared
        experts = model.n_experts / lay.ep
        expert = experts * mlp_parameters(model, model.moe_d_ff, lay.expert_tp, model.bias)
    dense = (here - moe) * dense_block + moe * moe_block
    vocabulary = padded_vocabulary(job) * d / t
    whole_expert = moe * expert
    if first:
        dense = dense + vocabulary + model.learned_positions * d
    if last:
        dense = dense + norm
        dense = dense + np.where(one & first & bool(model.tied_embeddings), 0, vocabulary)
        if model.mtp_layers:
            block, more = (moe_block, expert) if model.n_experts else (dense_block, 0)
            dense = dense + model.mtp_layers * (block + 2 * d * d / t + 3 * norm) + np.where(one, 0, vocabulary)
            whole_expert = whole_expert + model.mtp_layers * more
    unit = np.maximum(dense_block if model.first_dense_layers or not model.n_experts else 0, moe_block + expert)
    return Shards(dense, whole_expert, np.maximum(unit, vocabulary))


class Block(NamedTuple):
    """Bytes that backward keeps of one block, per micro-batch on one rank; its input; and what backward works in."""

    saved: Any
    input: Any
    working: Any


def block(job: Job, moe: bool) -> Block:
    """What one block keeps of a micro-batch, with nothing recomputed but what ``job.recompute`` names in the block."""
    model, lay, habits = job.model, job.layout, framework(job.framework)
    e = 4 if job.precision == "fp32" else 2
    t, d = lay.tp, model.d_model
    S = job.seq_len
    T = job.micro_batch * S / lay.cp  # tokens
    sp = np.where(np.asarray(lay.sequence_parallel) == 1, t, 1)
    drop = habits.dropout
    stats = 8 if model.norm == "layernorm" else 4
    mask = drop  # bytes of one dropout mask element
    H, E = model.query_width, np.maximum(model.n_kv_heads / t, 1) * model.head_dim
    Q, V = model.query_width / t, model.value_width / t
    # ---- attention: norm's input and output, q, k, v, core, output projection's input, dropout
    x = T * d / sp
    norms = 2 * (x * e + x * e + T / sp * stats)
    if model.latent is not None:
        m = model.latent
        small = T * (m.q_rank * 2 + m.kv_rank * 2 + m.rope_dim) * e
        qkv = T * (2 * Q + Q + V) * e + small  # queries and keys are put together anew after rotation
    else:
        qkv = T * (Q + 2 * E) * e
    heads = model.n_heads / t
    scores: Any = 0
    out = T * V * e
    if job.attention == "naive":
        square = job.micro_batch * heads * (S / lay.cp) * S
        scores = square * (e + drop * (1 + e))
    else:
        scores = 4 * T * heads
    attention_other = x * mask
    # ---- feed-forward
    if moe:
        mlp = _moe_bytes(job, T, e, habits)
    else:
        mlp = _mlp_bytes(model, T * model.d_ff / t, e)
    mlp_other = x * mask
    saved = norms + qkv + scores + out + attention_other + mlp + mlp_other
    core = scores + (0 if job.attention != "naive" else 0)
    if job.recompute == "selective":
        saved = saved - core
    if job.recompute == "selective_op":
        saved = saved - _recomputed_modules(job, core, mlp, norms, moe)
    fork = 2 * x * e + (mlp if not moe else mlp / 2)
    return Block(saved, x * e, fork)


def _mlp_bytes(model: Decoder, n: Any, e: int) -> Any:
    """GELU keeps its input, the next product its output; SwiGLU keeps both branches and the product's input."""
    return n * e * (3 if model.gated_mlp else 2)


def _moe_bytes(job: Job, T: Any, e: int, habits: Framework) -> Any:
    """Routing, the tokens sent to this rank's experts (balanced), the experts and the shared one."""
    model, lay = job.model, job.layout
    k, d = model.experts_per_token, model.d_model
    t = lay.tp
    sent = T * k / np.where(np.asarray(lay.sequence_parallel) == 1, t, 1)
    rows = T * k / lay.expert_tp if habits.name in MEGATRON else sent
    rows = sent
    routed = rows * d * e * 2 + _mlp_bytes(model, rows * model.moe_d_ff, e) + rows * d * e
    router = T * model.n_experts * (4 * 2 + 1 + e) / np.where(np.asarray(lay.sequence_parallel) == 1, t, 1)
    shared = _mlp_bytes(model, T * model.shared_d_ff / t, e) if model.shared_d_ff else 0
    return routed + router + shared


def _recomputed_modules(job: Job, core: Any, mlp: Any, norms: Any, moe: bool) -> Any:
    """Bytes that recomputing the named modules saves."""
    names = job.recompute_modules
    saved: Any = 0
    if not names or any(n in ("core_attn", "attn") for n in names):
        saved = saved + core
    if any(n in ("mlp", "moe") for n in names):
        saved = saved + mlp
    if any(n in ("moe_act", "mlp_act", "activation") for n in names):
        saved = saved + mlp / (4 if job.model.gated_mlp else 2)
    if any("norm" in n for n in names):
        saved = saved + norms / 2
    return saved


def in_flight(job: Job, last: bool) -> Any:
    """Micro-batches whose activations the stage holds at most, in units of all its layers."""
    lay, M = job.layout, np.asarray(job.micro_batches)
    p, v = np.asarray(lay.pp), np.asarray(lay.virtual_stages)
    if lay.schedule == "gpipe":
        return np.where(p > 1, M, 1)
    if lay.schedule == "dualpipev":
        return np.where(p > 1, np.minimum(M, p + 0.5), 1)
    stage = p - 1 if last else 0 * p
    plain = np.minimum(M, p - stage)
    chunks = 2 * (p - stage - 1) + (v - 1) * p + 1  # megatron/core/pipeline_parallel/schedules.py: warm-up + 1
    return np.where(p == 1, 1, np.where(v > 1, np.minimum(M * v, chunks) / v, plain))


def state_bytes(job: Job) -> tuple[Any, Any]:
    """Optimizer state of one element of a matrix, with a master copy where parameters are 16 bit."""
    habits = framework(job.framework)
    master = max(habits.state_bytes - 8, 0) if job.precision != "fp32" else 0
    own = _MATRIX_STATE.get(job.optimizer.lower())
    if own is None:
        raise BadInput(f"no optimizer {job.optimizer!r}; known: {', '.join(_MATRIX_STATE)}")
    return own + master, master


def _stage(job: Job, cluster: Cluster, rank: str) -> RankMemory:
    model, lay, habits, known = job.model, job.layout, framework(job.framework), constants()
    one = np.asarray(lay.pp) == 1
    is_last = rank == "last"
    a, b = _shards(job, True, True, one), _shards(job, not is_last, is_last, one)
    shards = Shards(*(np.where(one, x, y) for x, y in zip(a, b, strict=True)))
    here, moe = _stage_layers(job, is_last)
    here, moe = np.where(one, model.n_layers, here), np.where(one, model.n_moe_layers, moe)
    # ---- parameters, gradients, states
    dp = np.asarray(lay.shards)
    expert_dp = np.maximum(np.asarray(lay.dp) * lay.cp * lay.tp / (np.asarray(lay.ep) * lay.expert_tp), 1)
    expert_dp = np.minimum(expert_dp, np.maximum(dp * lay.tp / (np.asarray(lay.ep) * lay.expert_tp), 1))
    zero = np.asarray(lay.zero_stage)

    def sharded(stage: int) -> Any:
        return np.where(zero >= stage, shards.dense / dp + shards.expert / expert_dp, shards.dense + shards.expert)

    fp32 = job.precision == "fp32"
    parameter = 4 if fp32 else habits.parameter_bytes
    gradient = job.gradient_bytes or (
        4 if fp32 else habits.gradient_bytes.get(job.precision, habits.gradient_bytes["bf16"])
    )
    state, _ = state_bytes(job)
    parts: dict[str, Any] = {}
    parts["parameters"] = sharded(3) * parameter
    parts["gradients"] = sharded(2) * gradient
    parts["optimizer_state"] = sharded(1) * (state + (4 if job.precision == "fp16" and habits.name in MEGATRON else 0))
    # ---- activations
    T = job.micro_batch * job.seq_len / lay.cp
    sp = np.where(np.asarray(lay.sequence_parallel) == 1, lay.tp, 1)
    e = 4 if fp32 else 2
    dense_block, moe_block = block(job, False), block(job, bool(model.n_experts))
    layers = (here - moe) * dense_block.saved + moe * moe_block.saved
    working = np.maximum(dense_block.working, moe_block.working)
    if job.recompute == "full":
        every = job.recompute_every
        kept = here * dense_block.input / every + layers * (1 - 1 / every)
        one_block = np.maximum(dense_block.saved, moe_block.saved)
        layers_in_flight = kept
        working = working + one_block
    else:
        layers_in_flight = layers
    flight = in_flight(job, is_last)
    flight = np.where(one, 1, flight)
    activations = flight * layers_in_flight
    if not is_last:
        activations = activations + flight * T * model.d_model / sp * habits.dropout
    else:
        activations = activations + np.where(one, T * model.d_model / sp * habits.dropout, 0)
    vocabulary = padded_vocabulary(job) / lay.tp
    has_loss = one | is_last
    end = 2 * T * model.d_model / sp * e  # the last norm's input and output
    logits = np.where(has_loss, T * vocabulary * (e + 4 if not fp32 else 8), 0)
    if "fused_cross_entropy" in job.flags:
        logits = np.where(has_loss, T * vocabulary * e * 2, 0)
    activations = activations + np.where(has_loss, end, 0)
    # ---- what is gathered and sent
    gathered = np.where(zero >= 3, 2 * shards.largest_unit * 2, 0) * (np.asarray(lay.shards) > 1)
    p2p = np.where(one, 0, 2 * T * model.d_model / sp * e)
    workspace = _workspace(job, cluster)
    steady = parts["parameters"] + parts["gradients"] + parts["optimizer_state"] + workspace
    if habits.name not in (*MEGATRON, "nanotron", "llm.c"):
        steady = steady - parts["gradients"]
    parts["activations"] = activations
    parts["logits"] = logits
    parts["collective_buffers"] = gathered + p2p
    parts["workspaces"] = workspace + 0 * activations
    at_loss = activations + logits
    at_block = activations + working
    parts["temporary"] = np.maximum(at_block - at_loss, 0)
    parts = {name: _plain(value) for name, value in parts.items()}
    peak = sum(parts.values())
    reserved = peak * (1 + known["allocator"]["reserve"])
    groups = 1 + (np.asarray(lay.tp) > 1) + (np.asarray(lay.pp) > 1) + (np.asarray(lay.ep) > 1)
    context = known["context"]
    device = (
        reserved
        + context["cuda_bytes"]
        + np.where(np.asarray(lay.ranks) > 1, context["nccl_bytes"] + context["nccl_small_bytes"] * groups, 0)
    )
    return RankMemory(peak, _plain(steady), reserved, _plain(device), parts)


def _workspace(job: Job, cluster: Cluster) -> float:
    """Workspaces of cuBLAS and Transformer Engine, which live in the caching allocator."""
    known = constants()
    name = cluster.accelerator.name
    new = name.startswith(_HOPPER)
    cublas = known["cublas"]
    one = cublas["deterministic_bytes" if "deterministic" in job.flags else "hopper_bytes" if new else "default_bytes"]
    made = one * cublas["handles"]
    if job.flags.get("impl", "") == "transformer_engine" or job.framework in ("nemo", "megatron-bridge"):
        made += known["transformer_engine"]["hopper_bytes" if new else "default_bytes"]
    return made


def _plain(value: Any) -> Any:
    made = np.asarray(value, dtype=np.float64)
    return made if made.ndim else made.item()
