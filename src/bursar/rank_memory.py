"""What one rank of a job holds on its device: parameters, gradients, states, activations, buffers. In closed form.

Each number follows from what the framework's code allocates: the shapes of a rank's shards, the tensors that backward
keeps, the buffers that collectives fill. Layout fields, ``micro_batch`` and ``micro_batches`` may be arrays: a million
layouts are one call.

    t tensor parallel   c context parallel   p pipeline stages   v virtual stages   k experts per token
    T tokens of one micro-batch on one rank   x bytes of the stream between blocks   e bytes of an activation's element
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

from bursar.architecture import Transformer
from bursar.errors import BadInput, UnknownName
from bursar.frameworks import Framework, framework
from bursar.hardware import Cluster
from bursar.jobs import Count, Decoder, Job, Layout
from bursar.rules import transformer

RANKS = ("worst", "first", "last")
MEGATRON = ("megatron", "megatron-deepspeed", "megatron-bridge", "nemo", "megascale")
_HOPPER = ("h100", "h200", "h800", "b200", "b300", "gb200", "gb300", "gh200")  # compute capability 9 and later
STATE_BYTES: dict[str, tuple[float, float]] = {
    # of one element, without the fp32 master copy: of a matrix, and of the rest (vectors, tables, the head)
    "adamw": (8, 8), "adam": (8, 8), "sgd": (0, 0), "momentum": (4, 4), "nesterov": (4, 4), "lion": (4, 4),
    "adamw-8bit": (2 + 8 / 256, 8),  # two states of 8 bits and a 32-bit scale per 256; Dettmers et al. 2022, section 2
    "adafactor": (0, 0),  # a row and a column of statistics; Shazeer and Stern 2018
    "muon": (4, 8),  # one momentum for matrices, AdamW for the rest; Jordan et al. 2024
}  # fmt: skip
_ALIASES = {"adam8bit": "adamw-8bit", "adamw8bit": "adamw-8bit", "dist_muon": "muon", "adamw8": "adamw-8bit"}


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes on one rank's device. ``parts`` add up to ``peak_bytes``; each number may be an array over layouts."""

    peak_bytes: Any  # allocated at the step's fullest instant
    steady_bytes: Any  # allocated between steps
    reserved_bytes: Any  # what the caching allocator holds of the device by then
    device_bytes: Any  # with the context and NCCL's buffers: what nvidia-smi shows and what has to fit
    parts: Mapping[str, Any]
    assumptions: tuple[str, ...] = ()


@cache
def constants() -> Mapping[str, Any]:
    """`catalog/memory.toml`."""
    return tomllib.loads(files("bursar").joinpath("catalog", "memory.toml").read_text(encoding="utf-8"))


def fits(job: Job, cluster: Cluster) -> Any:
    """Whether the worst rank's ``device_bytes`` are within the memory that the driver shows; an array for arrays."""
    return rank_memory(job, cluster).device_bytes <= cluster.accelerator.usable_bytes


def rank_memory(job: Job, cluster: Cluster, rank: str = "worst") -> RankMemory:
    """Memory of the ``worst`` rank of ``job``, of its ``first`` pipeline stage or of its ``last``.

    Raises BadInput for a rank, UnknownName for an optimizer that is in no table.
    """
    if rank not in RANKS:
        raise BadInput(f"no rank {rank!r}; known: {', '.join(RANKS)}")
    job = _wide(job)
    if rank != "worst":
        return _stage(job, cluster, _LAST if rank == "last" else _FIRST)
    stages = [_FIRST, _LAST] if np.any(np.asarray(job.layout.pp) > 1) else [_FIRST]
    if len(stages) > 1 and (framework(job.framework).name == "nanotron" or np.any(_ends_count(job))):
        stages.append(_SECOND)  # may have a layer more than the first
    worst, *others = (_stage(job, cluster, stage) for stage in stages)
    for other in others:
        worst = _worse(worst, other)
    return worst


_FIRST, _SECOND, _LAST = 0, 1, -1


def _wide(job: Job) -> Job:
    """With arrays of 64 bits: 32 hold no more than 2 GiB."""

    def wide(value: Any) -> Any:
        return value.astype(np.int64) if isinstance(value, np.ndarray) and value.dtype != np.int64 else value

    lay = job.layout
    layout = Layout(*(wide(getattr(lay, f.name)) if f.name != "schedule" else lay.schedule for f in fields(Layout)))
    return replace(job, layout=layout, micro_batch=wide(job.micro_batch), micro_batches=wide(job.micro_batches))


def _worse(a: RankMemory, b: RankMemory) -> RankMemory:
    """Of two ranks, layout by layout, the one whose device is fuller."""
    first = np.asarray(a.device_bytes >= b.device_bytes)

    def pick(one: Any, other: Any) -> Any:
        return _plain(np.where(first, one, other))

    return RankMemory(
        pick(a.peak_bytes, b.peak_bytes), pick(a.steady_bytes, b.steady_bytes),
        pick(a.reserved_bytes, b.reserved_bytes), pick(a.device_bytes, b.device_bytes),
        {name: pick(a.parts[name], b.parts[name]) for name in a.parts}, a.assumptions,
    )  # fmt: skip


# ---- what holds for a whole job


class _Case(NamedTuple):
    """A job's scalars, looked up once."""

    habits: Framework
    own: Mapping[str, Any]  # what memory.toml says of the framework
    e: int  # bytes of an activation's element
    closed: bool  # plain torch on decoders that `rules.transformer` writes down
    engine: bool  # Transformer Engine runs the blocks
    local: bool  # Megatron's own layers do
    naive: bool  # scores are stored
    gated: int  # hidden widths that a gated activation keeps
    dropout: int
    rotary: bool
    eighth: bool  # products keep what they multiply in 8 bits
    new: bool  # compute capability 9 and later


def _case(job: Job, cluster: Cluster) -> _Case:
    habits = framework(job.framework)
    model, known = job.model, constants()["framework"]
    impl = job.flags.get("impl", "")
    of_megatron = habits.name in MEGATRON and habits.name != "megatron-deepspeed"
    own = known.get(habits.name, known["plain"])
    learned = bool(model.learned_positions) or model.norm == "layernorm"
    return _Case(
        habits,
        own,
        4 if job.precision == "fp32" else 2,
        habits.name == "plain" and _is_closed(job),
        of_megatron and impl != "local",
        impl == "local",
        job.attention == "naive" or impl == "local",
        min(own["glu_kept"], 3) if job.compiled else own["glu_kept"],  # the compiler fuses it
        habits.dropout if learned else 0,  # models since Llama are trained without
        not model.learned_positions,
        of_megatron and job.precision in ("fp8", "mxfp8", "nvfp4") and job.fp8_everywhere,
        cluster.accelerator.name.startswith(_HOPPER),
    )


def _is_closed(job: Job) -> bool:
    """Whether the closed form of one device covers the job: no split, no experts, no latent attention, no BERT."""
    lay, model = job.layout, job.model
    whole = all(np.all(np.asarray(n) == 1) for n in (lay.tp, lay.pp, lay.cp))
    if not whole or model.n_experts or model.latent is not None or not model.causal or model.n_encoder_layers:
        return False
    kernel = job.precision == "fp32" or (model.head_dim % 8 == 0 and model.head_dim <= 256)
    return kernel and job.recompute in ("none", "full") and job.attention != "naive"


def padded_vocabulary(job: Job) -> Any:
    """Rows of the embedding, all tensor-parallel ranks together."""
    if job.padded_vocab_size:
        return job.padded_vocab_size
    multiple = int(job.flags.get("vocab_divisible_by") or framework(job.framework).vocab_multiple) * job.layout.tp
    return -(-job.model.vocab_size // multiple) * multiple


# ---- parameters


def attention_parameters(model: Decoder, tp: Count) -> Any:
    """Elements of one attention on one of ``tp`` ranks, the norm before it included."""
    d, bias = model.d_model, int(model.bias)
    norm = norm_parameters(model)
    if model.latent is not None:
        m, H = model.latent, model.n_heads
        query = d * model.query_width / tp
        if m.q_rank:
            query = d * m.q_rank + m.q_rank + m.q_rank * model.query_width / tp
        key = d * (m.kv_rank + m.rope_dim) + m.kv_rank + m.kv_rank * H * (m.nope_dim + m.value_dim) / tp
        return norm + query + key + model.value_width * d / tp
    kv = _key_heads(model, tp) * model.head_dim
    q = model.query_width / tp
    return norm + (d + bias) * (q + 2 * kv) + q * d + bias * d


def norm_parameters(model: Decoder) -> int:
    """Elements of one normalisation."""
    return model.d_model * (2 if model.norm == "layernorm" else 1)


def mlp_parameters(model: Decoder, d_ff: Count, tp: Count, bias: bool) -> Any:
    """Elements of one feed-forward on one of ``tp`` ranks, without its norm."""
    matrices = 3 if model.gated_mlp else 2
    return matrices * model.d_model * d_ff / tp + bias * ((matrices - 1) * d_ff / tp + model.d_model)


def _key_heads(model: Decoder, tp: Count) -> Any:
    return np.maximum(model.n_kv_heads / tp, 1)  # a rank has one key-value head at least


class Block(NamedTuple):
    """One kind of block on one rank: elements outside experts and in them, bytes of a micro-batch."""

    dense: Any
    expert: Any
    saved: Any  # what backward keeps
    input: Any  # of that, what comes in: all that a checkpointed block keeps
    working: Any  # what its backward makes beside


def _blocks(job: Job, case: _Case, stage: int) -> list[tuple[Any, Block]]:
    """The kinds of blocks of one stage, and how many of each it has."""
    model, t = job.model, job.layout.tp
    attention, norm = attention_parameters(model, t), norm_parameters(model)
    dense = attention + norm + mlp_parameters(model, model.d_ff, t, model.bias)
    here, moe = _stage_layers(job, stage)
    if model.n_encoder_layers:
        tokens = int(job.flags.get("decoder_seq_len") or job.seq_len)
        encoder = _activations(job, case, job.seq_len)
        decoder = _activations(job, case, tokens)
        cross = _attention_bytes(job, case, tokens, job.seq_len)
        both = Block(dense + attention, 0, decoder[0] + cross, *decoder[1:])
        share = here / model.n_layers
        return [(share * model.n_encoder_layers, Block(dense, 0, *encoder)), (here, both)]
    kinds = [(here - moe, Block(dense, 0, *_activations(job, case, job.seq_len)))]
    if model.n_experts:
        shared = mlp_parameters(model, model.shared_d_ff, t, False) if model.shared_d_ff else 0
        outside = attention + norm + model.d_model * model.n_experts + shared
        each = mlp_parameters(model, model.moe_d_ff, job.layout.expert_tp, model.bias)
        made = _activations(job, case, job.seq_len, moe=True)
        kinds.append((moe, Block(outside, model.n_experts / job.layout.ep * each, *made)))
    return kinds


def _stage_layers(job: Job, stage: int) -> tuple[Any, Any]:
    """Blocks of the stage, and how many of them are mixtures."""
    model, flags = job.model, job.flags
    pp = np.asarray(job.layout.pp)
    L, last = model.n_layers, stage == _LAST
    own = flags.get("last_stage_layers" if last else "first_stage_layers")
    if own:
        here: Any = int(own) + 0.0 * pp
    elif framework(job.framework).name == "nanotron":  # by compute, the head among it; models/base.py, build_model
        with_head = L + model.vocab_size * model.d_model / _layer_matrices(model)
        each = with_head / pp
        here = L - np.floor(each * (pp - 1)) if last else np.floor(each) if stage == _FIRST else np.ceil(each)
    else:
        here = np.where(L % pp == 0, L / pp, np.floor(L / pp) if last else np.ceil(L / pp))
        count = sum(_counts(job))
        here = np.where(_ends_count(job), (L + count) / pp - (0 if stage == _SECOND else _counts(job)[last]), here)
    here = np.where(pp == 1, L, here)
    if not model.n_experts:
        return here, 0.0 * here
    if model.moe_every > 1:
        return here, np.where(pp == 1, model.n_moe_layers, here / model.moe_every)
    moe = np.minimum(here, model.n_moe_layers) if last else np.maximum(here - model.first_dense_layers, 0)
    return here, np.where(pp == 1, model.n_moe_layers, moe)


def _counts(job: Job) -> tuple[int, int]:
    """Layers that the embedding and the loss stand for where they count as some; both where nobody says."""
    told = tuple(int(f"{name}_counts_as_layer" in job.flags) for name in ("embedding", "loss"))
    return (told[0], told[1]) if any(told) else (1, 1)


def _ends_count(job: Job) -> Any:
    """Whether the embedding and the loss count as layers: the run says so, or only so are Megatron's stages even.

    account_for_embedding_in_pipeline_split in megatron/core; BLOOM's 70 layers in 12 stages.
    """
    lay, L = job.layout, job.model.n_layers
    chunks = np.asarray(lay.pp) * np.where(np.asarray(lay.pp) > 1, lay.virtual_stages, 1)
    if "embedding_counts_as_layer" in job.flags or "loss_counts_as_layer" in job.flags:
        return chunks > 1
    if framework(job.framework).name not in MEGATRON or "first_stage_layers" in job.flags:
        return chunks < 1
    return (chunks > 1) & (L % chunks != 0) & ((L + 2) % chunks == 0)


def _layer_matrices(model: Decoder) -> float:
    """Elements of a block's matrices, on one rank that has them all."""
    return float(attention_parameters(model, 1) + mlp_parameters(model, model.d_ff, 1, False))


class Ends(NamedTuple):
    """Elements of a stage beside its blocks."""

    table: Any  # the embedding, the head
    rest: Any  # positions, the last norm, what a head has more


def _ends(job: Job, stage: int) -> Ends:
    """The embedding of the first stage, the norm and the head of the last."""
    model, t = job.model, job.layout.tp
    one = np.asarray(job.layout.pp) == 1
    d, norm = model.d_model, norm_parameters(model)
    vocabulary = padded_vocabulary(job) * d / t
    bert = not model.causal and not model.n_encoder_layers
    first_rest = model.learned_positions * d + bert * 2 * d  # BERT tells two sentences apart
    last_rest = norm * (2 if model.n_encoder_layers else 1)
    if bert:  # the masked-word head's matrix and norm, the pooler, the head for the next sentence; biases
        last_rest = last_rest + 2 * (d * d + d) + norm + 2 * d + 2 + padded_vocabulary(job) / t
    if model.n_encoder_layers:
        last_rest = last_rest + padded_vocabulary(job) / t
    more = model.mtp_layers * (2 * d * d / t + 3 * norm)
    if stage == _SECOND:
        return Ends(0 * vocabulary, 0 * vocabulary)
    if stage == _LAST:
        head = np.where(one, 0 if model.tied_embeddings else 1, 1) + (np.where(one, 0, 1) if model.mtp_layers else 0)
        return Ends(vocabulary * (head + one), last_rest + more + one * first_rest)
    return Ends(
        vocabulary * (1 + np.where(one, 0 if model.tied_embeddings else 1, 0)), first_rest + one * (last_rest + more)
    )


# ---- activations of one block, one micro-batch


def _activations(job: Job, case: _Case, tokens: Count, moe: bool = False) -> tuple[Any, Any, Any]:
    """`Block.saved`, ``input`` and ``working`` of a block over ``tokens`` tokens of a sequence."""
    model, lay, e = job.model, job.layout, case.e
    if case.closed:
        return _plain_block(job, tokens)
    T = job.micro_batch * tokens / lay.cp
    x = T * model.d_model / _sequence(job) * e
    attention = _attention_bytes(job, case, tokens, tokens)
    whole = T * model.d_model * e
    norm = x + (whole if case.own["gathered"] else x) + T / _sequence(job) * (8 if model.norm == "layernorm" else 4)
    norm = norm + x / e * (case.dropout - case.eighth)
    hidden = _moe_bytes(job, case, T) if moe else _mlp_bytes(model, case, T * model.d_ff / lay.tp)
    saved = attention + norm + hidden
    working = x + whole + T * e * _widest(job, moe)  # sequence parallel inputs are gathered for their weights' gradient
    core = _core_bytes(job, case, tokens, tokens)
    if job.recompute == "selective":
        saved = saved - core
    elif job.recompute == "selective_op":
        saved, again = _selected(job, case, saved, core, hidden, x, T, moe)
        working = working + again
    return saved, x, np.maximum(working, core + x)


def _sequence(job: Job) -> Any:
    """Ranks that share the stream between blocks: tp with sequence parallelism, else 1."""
    return np.where(np.asarray(job.layout.sequence_parallel) == 1, job.layout.tp, 1)


def _widest(job: Job, moe: bool) -> Any:
    """Elements per token of the widest gradient pair inside a block."""
    model, lay = job.model, job.layout
    inner = 2 if model.gated_mlp else 1
    if moe:
        rows = model.experts_per_token * lay.expert_tp / _sequence(job)
        return (inner + 1) * rows * model.moe_d_ff / lay.expert_tp + rows * model.d_model
    return (inner + 1) * model.d_ff / lay.tp


def _attention_bytes(job: Job, case: _Case, queries: Count, keys: Count) -> Any:
    """The norm before an attention, what the attention and its two products keep, and the dropout after it."""
    model, lay, e = job.model, job.layout, case.e
    t, S = lay.tp, _sequence(job)
    T, U = job.micro_batch * queries / lay.cp, job.micro_batch * keys / lay.cp
    x = T * model.d_model / S * e
    given = T * model.d_model * e if case.own["gathered"] else x  # what the norm puts out, as the product keeps it
    saved = x + given + T / S * (8 if model.norm == "layernorm" else 4) + x / e * case.dropout
    Q, V = model.query_width / t, model.value_width / t
    if model.latent is not None:
        m = model.latent
        # each down-projection and its norm's output
        saved = saved + T * (2 * m.q_rank + 2 * m.kv_rank + m.rope_dim) * e
        qkv = T * (2 * Q + V) * e
    else:
        kv = _key_heads(model, t) * model.head_dim
        qkv = T * Q * e + U * 2 * kv * e
        if case.rotary and case.engine and case.new and not case.naive:
            # values are a view of the one product, which stays beside the turned queries and keys
            qkv = qkv + T * (Q + kv) * e
    if "qk_layernorm" in job.flags and model.latent is None:
        qkv = qkv + 2 * (T * Q + U * _key_heads(model, t) * model.head_dim) * e  # both norms' inputs, as copies
    out = T * V * e
    if case.eighth:
        out = out + T * V - x / e  # the next product keeps its own in 8 bits; so does the first, of the norm
    elif not case.naive and not (case.engine and case.new):
        out = case.own["outputs"] * out
    return saved + qkv + out + _core_bytes(job, case, queries, keys)


def _core_bytes(job: Job, case: _Case, queries: Count, keys: Count) -> Any:
    """Scores: the softmax, dropout's mask and output; with a fused kernel one fp32 sum per query and head."""
    heads = job.model.n_heads / job.layout.tp
    T = job.micro_batch * queries / job.layout.cp
    if not case.naive:
        return 4 * T * heads
    return T * keys * heads * (case.e + case.dropout * (1 + case.e))


def _mlp_bytes(model: Decoder, case: _Case, n: Any) -> Any:
    """GELU keeps its input and the next product its output; a gated one both branches and the product's input."""
    kept = case.e * (case.gated if model.gated_mlp else 2)
    return n * (kept - case.eighth)


def _moe_bytes(job: Job, case: _Case, T: Any) -> Any:
    """Routing, the rows sent to this rank's experts (as many to each), the experts, and the shared one."""
    model, lay, e = job.model, job.layout, case.e
    mine = T / _sequence(job)  # tokens that this rank routes
    rows = mine * model.experts_per_token * lay.expert_tp
    routed = rows * model.d_model * (e - case.eighth) + _mlp_bytes(model, case, rows * model.moe_d_ff / lay.expert_tp)
    if not model.gated_mlp:  # the probabilities weigh GELU's output in a product of its own; SwiGLU's kernel takes them
        routed = routed + rows * model.moe_d_ff / lay.expert_tp * e
    router = mine * model.n_experts * (4 + 4 + 1)  # logits and probabilities in fp32, the choice in one byte
    shared = _mlp_bytes(model, case, T * model.shared_d_ff / lay.tp) if model.shared_d_ff else 0
    return routed + router + shared


def _selected(job: Job, case: _Case, saved: Any, core: Any, hidden: Any, x: Any, T: Any, moe: bool) -> tuple[Any, Any]:
    """What a block keeps when single modules or operators are made again, and what of that backward holds at once."""
    model, lay, e = job.model, job.layout, case.e
    names = job.recompute_modules
    if case.habits.name == "torchtitan" and not names:
        # Kept: every second product of wq wk wv wo w1 w3 w2, the attention's output; torchtitan's parallelize.py
        kept = x + T * (2 * model.query_width + _key_heads(model, lay.tp) * lay.tp * model.head_dim) / lay.tp * e
        kept = kept + T * (model.d_ff / lay.tp) * e + x + core
        kept = np.minimum(kept, saved) if not moe else x + (saved - x) / 2  # of experts' products too every second
        return kept, saved - kept
    gone: Any = 0
    if not names or "core_attn" in names:
        gone = gone + core
    if "mlp" in names and not moe:
        gone = gone + hidden
    if "moe" in names and moe:
        gone = gone + hidden
    if "moe_act" in names and moe and "moe" not in names:
        rows = T / _sequence(job) * model.experts_per_token
        gone = gone + rows * model.moe_d_ff * e
    if any("norm" in name for name in names):
        gone = gone + 2 * x
    if "mla_up_proj" in names and model.latent is not None:
        gone = gone + T * (2 * model.query_width + model.value_width) / lay.tp * e
    if "shared_experts" in names and moe and model.shared_d_ff:
        gone = gone + _mlp_bytes(model, case, T * model.shared_d_ff / lay.tp)
    gone = np.minimum(gone, saved - x)
    return saved - gone, gone


def _plain_block(job: Job, tokens: Count) -> tuple[Any, Any, Any]:
    """Plain torch on one device: `rules.transformer`'s block."""
    made = _closed_form(job, tokens)
    x = made.block_input_bytes
    return made.block.saved_bytes, x, 2 * x + _widest(job, False) * job.micro_batch * tokens * 2


def _closed_form(job: Job, tokens: Count) -> transformer.Totals:
    model = job.model
    shape = Transformer(
        name=model.name, family="gpt" if model.learned_positions else "llama", n_layers=model.n_layers,
        d_model=model.d_model, n_heads=model.n_heads, n_kv_heads=model.n_kv_heads, head_dim=model.head_dim,
        d_ff=model.d_ff, vocab_size=model.vocab_size, max_seq_len=model.learned_positions or job.seq_len,
        norm=model.norm, gated_mlp=model.gated_mlp, bias=model.bias, tied_embeddings=model.tied_embeddings,
        position="learned" if model.learned_positions else "rope", rope_theta=1e4, norm_eps=1e-5, source="",
    )  # fmt: skip
    precision = job.precision if job.precision in transformer.PRECISIONS else "bf16"
    return transformer.count(shape, job.micro_batch, tokens, precision=precision)


# ---- pipeline: how many micro-batches are held


def held_layers(job: Job, stage: int, here: Any) -> Any:
    """Layers times micro-batches whose activations a stage of ``here`` layers holds at most."""
    lay, M = job.layout, np.asarray(job.micro_batches)
    p, v = np.asarray(lay.pp), np.asarray(lay.virtual_stages)
    if lay.schedule == "gpipe":
        return np.where(p > 1, M, 1) * here
    if lay.schedule == "dualpipev":  # DeepSeek-AI 2024, table 2: p + 1 chunks, two of them a stage
        return np.where(p > 1, np.minimum(M, (p + 1) / 2), 1) * here
    last = stage == _LAST
    behind = 0 * p if last else p - 1 - stage  # stages after this one
    # Warm-up and one more; chunks take turns, a group of micro-batches each: p, or where that does not divide them the
    # next number that does. megatron/core/pipeline_parallel/schedules.py, get_pp_rank_microbatches
    group = _group(M, p) if np.any((v > 1) & (M % p != 0)) else p
    n = np.where(v > 1, np.minimum(M * v, 2 * behind + (v - 1) * group + 1), np.minimum(M, behind + 1))
    n = np.where(p == 1, 1, n)
    even = n / np.where((p > 1) & (v > 1), v, 1) * here
    short = _ends_count(job) & (v > 1) & (stage != _SECOND) & bool(_counts(job)[last])
    if not np.any(short):
        return even
    # One chunk, the stage's last or its first, has a layer less than the others
    each, which = (here + 1) / v, v - 1 if last else 0 * v
    held = np.clip(n - which * group, 0, group) + np.clip(n - (v + which) * group, 0, group)
    return np.where(short, n * each - held, even)


def _group(M: Any, p: Any) -> Any:
    """The least number from ``p`` on that divides ``M``; ``p`` where none does."""
    many, stages = np.broadcast_arrays(M, p)
    pairs, where = np.unique(np.stack([many.ravel(), stages.ravel()]).astype(np.int64), axis=1, return_inverse=True)
    least = [next((g for g in range(n, m + 1) if m % g == 0), n) for m, n in pairs.T.tolist()]
    return np.asarray(least)[where.ravel()].reshape(many.shape)


def _first_chunk(job: Job) -> Any:
    """Micro-batches that the first stage has embedded and not yet brought back."""
    lay, M = job.layout, np.asarray(job.micro_batches)
    p = np.asarray(lay.pp)
    return np.where(p == 1, 1, np.minimum(M, np.where(np.asarray(lay.virtual_stages) > 1, 2 * p - 1, p)))


# ---- one stage


def _optimizer(job: Job) -> str:
    """The optimizer's name in `STATE_BYTES`, where it has one."""
    name = job.optimizer.lower()
    return _ALIASES.get(name, name)


def state_bytes(job: Job) -> tuple[float, float]:
    """Optimizer state and fp32 master copy of one element: of a matrix in a block, and of anything else.

    Raises UnknownName for an optimizer that is in no table.
    """
    habits = framework(job.framework)
    copied = habits.parameter_bytes < 4 and job.precision != "fp32"  # plain: what bursar.step does, no master copy
    master = 4.0 if copied else 0.0
    own = STATE_BYTES.get(_optimizer(job))
    if own is None:
        raise UnknownName("memory of an optimizer", job.optimizer, STATE_BYTES, "Add it to rank_memory.STATE_BYTES.")
    if habits.name == "plain" and job.precision == "bf16":  # states are of the parameters' dtype
        own = (own[0] / 2, own[1] / 2)
    return own[0] + master, own[1] + master


class Elements(NamedTuple):
    """Elements of a stage before data parallelism shares them: in matrices, in experts, in tables and in the rest."""

    dense: Any
    expert: Any
    table: Any
    rest: Any

    @property
    def all(self) -> Any:
        """Every one."""
        return self.dense + self.expert + self.table + self.rest

    def held(self, job: Job, stage: int, of_matrix: Any, of_other: Any) -> Any:
        """Bytes on one rank of what ZeRO's ``stage`` and those after it share, so many per element."""
        lay = job.layout
        shards = np.asarray(lay.shards)
        shared = np.asarray(lay.zero_stage) >= stage
        of_experts = np.maximum(shards * lay.tp / (np.asarray(lay.ep) * lay.expert_tp), 1)
        experts = self.expert * of_matrix / np.where(shared, of_experts, 1)
        made = (self.dense * of_matrix + (self.table + self.rest) * of_other) / np.where(shared, shards, 1) + experts
        if (
            stage == 1 and _optimizer(job) == "muon"
        ):  # it needs whole matrices: a rank has some, and one of them a table
            made = np.maximum(made, np.where(shared, self.table * of_other + experts, 0))
        return made


class _States(NamedTuple):
    """Bytes that stay from step to step, and what an update takes beside."""

    parameters: Any
    gradients: Any
    states: Any
    update: Any
    late: Any  # gradients of 16 bits that wait to be added to those of 32
    gradient: float  # bytes of one


def _states(job: Job, case: _Case, elements: Elements) -> _States:
    parameter, gradient = _element_bytes(job, case)
    matrix, other = state_bytes(job)
    trained = float(job.flags.get("trainable") or 1)  # share of the parameters; the rest is frozen, in 16 bit
    if "finetune_lora" in job.flags:  # the adapters are small beside what they adapt
        trained = 0.0
    if trained < 1:
        parameter, gradient = 2 + (parameter - 2) * trained, gradient * trained
        matrix, other = matrix * trained, other * trained
    if "bf16_states" in job.flags:
        parameter, gradient, other = 2.0, 2.0, other / 2
        matrix = matrix if "8bit" in job.optimizer else matrix / 2
    updated = trained / 2 if "bf16_states" in job.flags and not case.closed else trained
    if "8bit" in job.optimizer or "fused_update" in job.flags:  # one kernel, in place: no lists of temporaries
        updated = 0.0
    late = case.own["late_bytes"] * trained if job.precision not in ("fp32", "fp16") else 0
    if "offload_states" in job.flags:  # and their update with them
        matrix = other = updated = 0.0
    if job.precision == "fp16" and case.habits.name in MEGATRON and not job.gradient_bytes:
        matrix, other = matrix + 4, other + 4  # the gradient of the master copy, kept
    step = parameter if case.closed else case.own["step_bytes"]  # a list kernel's temporary is of the states' dtype
    return _States(
        elements.held(job, 3, parameter, parameter), elements.held(job, 2, gradient, gradient),
        elements.held(job, 1, matrix, other), elements.held(job, 1, updated, updated) * step,
        elements.held(job, 3, late, late), gradient,
    )  # fmt: skip


def _stage_activations(job: Job, case: _Case, stage: int, kinds: list[tuple[Any, Block]], mtp: Any) -> Any:
    """What backward keeps of all micro-batches in flight, the logits aside."""
    lay, model, e = job.layout, job.model, case.e
    one = np.asarray(lay.pp) == 1
    with_loss = one | (stage == _LAST)
    T = job.micro_batch * job.seq_len / lay.cp
    x = T * model.d_model / _sequence(job) * e
    here = sum(n for n, _ in kinds)
    saved = sum(n * _kept(job, b) for n, b in kinds)
    made = np.where(here > 0, held_layers(job, stage, here) / np.maximum(here, 1e-9), 0) * saved
    if job.offload_layers:  # the last of them are on the host when the stage is fullest
        made = made * np.maximum(1 - job.offload_layers / np.maximum(here, 1), 0)
    if case.closed:
        ends = _closed_form(job, job.seq_len)
        return made + ends.embedding.saved_bytes + ends.head.saved_bytes
    made = made + mtp * (kinds[-1][1].saved + 3 * x)
    made = made + np.where(one | (stage == _FIRST), _first_chunk(job) * x / e * case.dropout, 0)
    gathered = T * model.d_model * e  # the head's input, where the sequence is shared
    made = made + np.where(with_loss, x + np.where(x < gathered, gathered, x), 0)  # and the last norm's
    if case.habits.name == "megatron-deepspeed":  # runtime/pipe/engine.py keeps a stage's outputs until their backward
        made = made + np.where(with_loss, 0, _first_chunk(job) * x)
    return made


def _logits(job: Job, case: _Case, with_loss: Any, mtp: Any) -> Any:
    """The most that is held of the logits, the loss and its gradient."""
    model, lay = job.model, job.layout
    queries = int(job.flags.get("decoder_seq_len") or job.seq_len) if model.n_encoder_layers else job.seq_len
    rows = job.micro_batch * queries / lay.cp
    logit = case.own["logit_bytes"] + (2 if case.e == 4 and case.own["logit_bytes"] == 6 else 0)
    if case.closed:  # the log-softmax is among what backward keeps; its gradient and the logits' come on top
        logit = {"fp32": 8, "bf16": 4}.get(job.precision, 10)
    logit = min(logit, float(job.flags.get("logit_bytes") or logit))  # a loss that is not the framework's
    made = rows * padded_vocabulary(job) / lay.tp * (logit + 4 * mtp) / float(job.flags.get("loss_chunks") or 1)
    return np.where(with_loss, made, 0)


def _buffers(job: Job, case: _Case, elements: Elements, kinds: list[tuple[Any, Block]], gradient: float) -> Any:
    """What is gathered, sent and received, and buckets; and a unit's gradients before they are scattered."""
    lay, d = job.layout, job.model.d_model
    shards, zero = np.asarray(lay.shards), np.asarray(lay.zero_stage)
    unit = np.minimum(elements.table, padded_vocabulary(job) * d / lay.tp)  # the embedding and the head are one each
    if "megatron_fsdp" in job.flags:
        unit = 0 * unit  # its units are blocks; tables stay gathered
    for _, b in kinds:
        unit = np.maximum(unit, b.dense + b.expert)
    gathers = (zero >= 3) & (shards > 1)
    # The unit at work and the next one; all of them where they stay until backward
    gathered = np.where(np.asarray(lay.reshard_after_forward) == 0, elements.all, 2 * unit) * case.e
    x = job.micro_batch * job.seq_len / lay.cp * d / _sequence(job) * case.e
    made = np.where(gathers, gathered, 0) + np.where(np.asarray(lay.pp) == 1, 0, 2 * x)
    if case.habits.name == "megatron-deepspeed":
        bucket = np.minimum(constants()["buckets"]["deepspeed_elements"], elements.all) * gradient
        made = made + np.where((zero >= 1) & (shards > 1), bucket, 0)
    made = made + elements.held(job, 3, 1, 1) * np.where(shards > 1, case.own["bucket_bytes"], 0)
    return made, np.where(gathers, unit * gradient, 0)


def _stage(job: Job, cluster: Cluster, stage: int) -> RankMemory:
    """Memory of a rank of one pipeline stage: what is there at each of four instants, and the fullest of them."""
    case, lay = _case(job, cluster), job.layout
    one = np.asarray(lay.pp) == 1
    with_loss = one | (stage == _LAST)
    kinds, ends = _blocks(job, case, stage), _ends(job, stage)
    mtp = np.where(with_loss, job.model.mtp_layers, 0)
    last = kinds[-1][1]
    elements = Elements(
        sum(n * b.dense for n, b in kinds) + mtp * last.dense, sum(n * b.expert for n, b in kinds) + mtp * last.expert,
        ends.table, ends.rest,
    )  # fmt: skip
    parameters, gradients, states, update, late, gradient = _states(job, case, elements)
    activations = _stage_activations(job, case, stage, kinds, mtp)
    logits = _logits(job, case, with_loss, mtp)
    buffers, reduced = _buffers(job, case, elements, kinds, gradient)
    working: Any = 0
    for _, b in kinds:
        working = np.maximum(working, b.working + (b.saved - b.input if job.recompute == "full" else 0))
    tokens = job.micro_batch * job.seq_len / lay.cp
    inputs = np.where(with_loss | (stage == _FIRST), tokens * 8 * 2, 0)  # tokens and targets, 8 bytes each
    workspace = _workspace(job, case)
    # Megatron-FSDP's units are blocks, and what is in none is gathered for good; fsdp/mcore_fsdp_adapter.py
    stays = (elements.table + elements.rest) * case.e * int("megatron_fsdp" in job.flags)
    buffers = buffers + stays
    steady = parameters + states + workspace + (gradients if case.own["gradients_stay"] else 0)
    steady = steady + stays + _left_over(job, case, stage, tokens * job.model.d_model / _sequence(job) * case.e)
    # ---- the fullest instant: the loss, a block's backward, the last block's end, the update
    base = parameters + states + workspace + buffers + inputs
    several = case.own["gradients_stay"] | (np.asarray(job.micro_batches) > 1)
    at_loss = base + np.where(several, gradients, 0) + activations + logits
    at_block = base + np.where(several, gradients, 0) + activations + working + reduced
    # DeepSpeed's pipeline clears late gradients before the next backward only: the next forward still has them
    # (runtime/pipe/engine.py, _exec_backward_pass). Elsewhere they outlive their micro-batch's activations for a moment
    over = 0 if case.habits.name == "megatron-deepspeed" else 1 / np.maximum(_first_chunk(job), 1)
    still = np.where(one, 0, activations * (1 - over))
    at_end = base + gradients + late + still
    peak = np.maximum(np.maximum(at_loss, at_block), np.maximum(at_end, base + gradients + update))
    loss_is = peak == at_loss
    block_is = ~loss_is & (peak == at_block)
    end_is = ~loss_is & ~block_is & (peak == at_end)
    parts = {
        "parameters": parameters,
        "gradients": np.where((loss_is | block_is) & ~np.asarray(several), 0, gradients),
        "optimizer_state": states,
        "activations": np.select([loss_is | block_is, end_is], [activations, still], 0),
        "logits": np.where(loss_is, logits, 0),
        "collective_buffers": buffers + np.where(block_is, reduced, 0),
        "temporary": np.select([block_is, loss_is, end_is], [working, 0 * peak, late], update),
        "inputs": inputs + 0 * peak,
        "workspaces": workspace + 0 * peak,
    }
    parts = {name: _plain(value) for name, value in parts.items()}
    total = sum(parts.values())
    # Freed blocks seldom suit what comes next: a pool grows to the sum of what each kind takes at its fullest
    most = base + gradients + late + activations + logits + working + reduced
    reserved = np.maximum(most, total * (1 + constants()["allocator"]["least_reserve"]))
    outside = constants()["context"]
    device = reserved + outside["cuda_bytes"] + outside["driver_bytes"] + outside["nccl_bytes"] * _groups(job)
    return RankMemory(total, _plain(steady), _plain(reserved), _plain(device), parts, _assumptions(job))


def _assumptions(job: Job) -> tuple[str, ...]:
    """What the figures take for granted of this job."""
    made = []
    if job.model.n_experts:
        made.append("each expert gets as many tokens as the others")
    if "mamba_hybrid" in job.flags:
        made.append("state-space layers are counted as attention and feed-forward")
    if "finetune_lora" in job.flags:
        made.append("adapters take no memory")
    if job.model.n_encoder_layers and np.any(np.asarray(job.layout.pp) > 1):
        made.append("encoder and decoder layers are spread evenly over the stages")
    return tuple(made)


def _element_bytes(job: Job, case: _Case) -> tuple[float, float]:
    """Bytes of one parameter as the model holds it, and of its gradient as it is accumulated."""
    if case.habits.name == "plain":
        size = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0}.get(job.precision, 4.0)
        return size, job.gradient_bytes or size
    if job.precision == "fp32":
        return 4.0, 4.0
    given = case.habits.gradient_bytes
    parameter = case.habits.parameter_bytes
    if case.eighth and case.habits.name == "megatron" and "fp8_param_gather" not in job.flags:
        parameter = (
            parameter + 2
        )  # 8-bit weights and their transposes beside those of 16 bits; NVIDIA's recipes keep the former only
    gradient = job.gradient_bytes or given.get(job.precision, given["bf16"])
    return parameter, gradient


def _kept(job: Job, b: Block) -> Any:
    """What a block keeps of a micro-batch under the job's recompute."""
    if job.recompute != "full":
        return b.saved
    return b.input / job.recompute_every + b.saved * (1 - 1 / job.recompute_every)


def _left_over(job: Job, case: _Case, stage: int, x: Any) -> Any:
    """What Megatron's modules still point to between steps."""
    if case.habits.name not in MEGATRON:
        return 0
    pp, v = np.asarray(job.layout.pp), np.asarray(job.layout.virtual_stages)
    chunks = np.where(pp > 1, np.where(v > 1, v, 1) - (1 if stage == _FIRST else 0), 0)
    left = 2 * x * chunks  # each chunk's last input and its gradient; transformer_block.py, set_input_tensor
    if case.local:  # parallel_state.get_global_memory_buffer, dot_product_attention.py: the scores' buffer
        left = left + job.micro_batch * job.model.n_heads / job.layout.tp * job.seq_len**2 * case.e
    return left


def _workspace(job: Job, case: _Case) -> float:
    """Workspaces of cuBLAS and Transformer Engine, which live in the caching allocator."""
    known = constants()
    cublas, engine = known["cublas"], known["transformer_engine"]
    size = "hopper_bytes" if case.new else "default_bytes"
    made = float(cublas["deterministic_bytes" if "deterministic" in job.flags else size] * cublas["handles"])
    if case.engine:
        grouped = engine["grouped_streams"] if job.model.n_experts and "sequential_experts" not in job.flags else 0
        made += engine[size] * (1 + grouped)
    return made


def _groups(job: Job) -> Any:
    """Communicators that a rank joins: all ranks, and data, tensor, pipeline, context and expert groups of a part.

    Megatron and its like have two more: a model's ranks, for the gradients' norm, and the first and last stage, for a
    tied table. megatron/core/parallel_state.py, initialize_model_parallel.
    """
    lay = job.layout
    dp, tp, pp, cp, ep = (np.asarray(n) for n in (lay.dp, lay.tp, lay.pp, lay.cp, lay.ep))
    world = dp * tp * pp * cp
    joined = 1 * (world > 1) + sum(1 * ((n > 1) & (n < world)) for n in (dp, tp, pp, cp, ep))
    if framework(job.framework).name in MEGATRON:
        joined = joined + ((tp > 1) & (pp > 1) & (tp * pp < world)) + ((pp > 1) & bool(job.model.tied_embeddings))
    return joined


def _plain(value: Any) -> Any:
    made = np.asarray(value, dtype=np.float64)
    return made if made.ndim else made.item()
