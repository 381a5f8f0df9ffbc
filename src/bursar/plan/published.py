"""Published runs, as jobs on clusters: the one schema of ``runs.csv``.

Each row is a measured run; an empty cell takes the named framework's default and says so. A row is skipped, with the
reason, where it has no shape or its source's figure is impossible; where only a target is empty, that target is.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from bursar.errors import BadInput, UnknownName
from bursar.frameworks import Framework, framework
from bursar.hardware import Cluster, accelerator
from bursar.jobs import PRECISIONS, RECOMPUTE, Decoder, Job, Latent, Layout
from bursar.rank_memory import fits
from bursar.step_time import step_time

FILE = "runs.csv"
REQUIRED = ("id", "table", "role", "gpu", "n_gpus", "framework")
_GATED = ("llama", "moe", "mla_moe")
OPTIMIZERS = ("adamw", "adamw-8bit", "adam8bit", "adafactor", "sgd", "momentum", "lion", "muon")  # that forecasts know
_VOCABULARY = 50257  # where a source prints none: GPT-2's, which its makers' CI uses
_VOCABULARIES = {  # where Megatron's CI does not print one; tests/functional_tests/test_cases
    "bert": 28996 + 2,  # bert-large-cased, begin and end
    "t5": 28996 + 2 + 100,  # and --vocab-extra-ids 100
    "release": 256000,  # nemotron_2_256k
    "mixtral_8x22b": 32000,  # Llama2Tokenizer
    "mixtral_8x7b_tp1": 32000,
    "nemotron3": 131072,
}
_LAYERS = 24
_GPU = "a100-80g-sxm"  # where a source prints none: what most rows ran on
_RECOMPUTE = {"full_uniform": "full", "full_block": "full", "": ""}


class BadCell(BadInput):
    """A cell that cannot be read; any other BadInput is about a run that can be read and not forecast."""


@dataclass(frozen=True, slots=True)
class Run:
    """One row: what ran, where, and what was measured. None is a figure that the source does not print."""

    id: str
    table: str
    role: str  # score or calibration
    job: Job | None
    cluster: Cluster | None
    step_seconds: float | None
    peak_bytes: float | None
    steady_bytes: float | None
    peak_kind: str  # allocated, reserved, nvidia_smi, or nothing said
    fits: bool | None
    skip: str  # why nothing can be forecast; empty where something can
    assumptions: tuple[str, ...] = ()
    flags: Mapping[str, str] = field(default_factory=dict, hash=False)


def read(folder: Path) -> list[Run]:
    """The rows of ``folder/runs.csv``. Raises BadInput for a file that is not there or not of the schema."""
    path = folder / FILE
    if not path.is_file():
        raise BadInput(f"no {FILE} in {folder}: validate reads a folder with published runs in that file")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(line for line in file if not line.startswith("#"))
            missing = [c for c in REQUIRED if c not in (rows.fieldnames or ())]
            if missing:
                raise BadInput(f"{path} has no column {', '.join(missing)}")
            return [run(row) for row in rows]
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path} is no CSV file: {error}") from None


def run(row: Mapping[str, str | None]) -> Run:
    """One row as a run. Raises BadInput, naming the row and the column, for a cell that cannot be read."""
    cell = _Cells(row)
    flags = dict(_flag(f) for f in cell.text("flags").split(";") if f)
    skip = next((f"flag {name}" for name in ("no_shape", "impossible") if name in flags), "")
    job = where = None
    if not skip:
        try:
            job = _job(cell, flags)
            where = _cluster(cell, job)
            if not any(cell.text(name) for name in ("micro_batch", "grad_accumulation")):
                job = _with_micro_batch(job, where, cell)
        except BadCell:
            raise
        except (UnknownName, BadInput) as error:
            job, skip = None, str(error)
    ran = cell.text("fits")
    return Run(
        cell.text("id"), cell.text("table"), cell.text("role") or "score", job, where,
        cell.number("measured_step_seconds"), cell.number("measured_peak_bytes"), cell.number("steady_bytes"),
        cell.text("peak_kind"), None if ran == "" else ran == "1", skip, tuple(cell.assumed), flags,
    )  # fmt: skip


def _with_micro_batch(job: Job, where: Cluster, cell: _Cells) -> Job:
    """``job`` with the micro-batch its authors would have found: the quickest by forecast that fits, a power of two.

    What is published was tuned. Where none fits, the smallest.
    """
    samples = int(job.micro_batch * job.micro_batches)
    sizes = np.array([b for b in (2**i for i in range(8)) if samples % b == 0])
    tried = replace(job, micro_batch=sizes, micro_batches=samples // sizes)
    seconds = np.where(fits(tried, where), step_time(tried, where).seconds, np.inf)
    best = int(np.argmin(seconds))  # the first, of all that do not fit
    cell.assumed.append(f"micro_batch = {sizes[best]} (the source prints none: the quickest by forecast that fits)")
    return replace(job, micro_batch=int(sizes[best]), micro_batches=samples // int(sizes[best]))


class _Cells:
    """A row's cells, read as what they are; what was empty and taken for granted is remembered."""

    def __init__(self, row: Mapping[str, str | None]) -> None:
        self.row = row
        self.assumed: list[str] = []

    def text(self, name: str) -> str:
        return (self.row.get(name) or "").strip()

    def number(self, name: str) -> float | None:
        text = self.text(name)
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            raise BadCell(f"row {self.text('id')}: {name} is {text!r}, not a number") from None
        if not 0 <= value < 1e30:
            raise BadCell(f"row {self.text('id')}: {name} is {text}, which cannot be")
        return value

    def count(self, name: str, default: int, why: str = "") -> int:
        """A whole number; an empty cell is ``default``, an assumption where ``why`` is given."""
        value = self.number(name)
        if value is None:
            if why:
                self.assumed.append(f"{name} = {default} ({why})")
            return default
        if value != int(value):
            raise BadCell(f"row {self.text('id')}: {name} is {value}, not a whole number")
        return int(value)

    def must(self, name: str) -> int:
        """A whole number that has to be there."""
        if not self.text(name):
            raise BadInput(f"no {name}")
        return self.count(name, 0)


def _flag(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name.strip(), value.strip()


def _cluster(cell: _Cells, job: Job) -> Cluster:
    name = cell.text("gpu")
    if not name:
        name = _GPU
        cell.assumed.append(f"gpu = {name} (the source prints none)")
    device = accelerator(name)
    network = cell.number("inter_node_gb_per_s_per_node")
    node = cell.count("gpus_per_node", 0)
    return Cluster(
        device,
        job.layout.ranks,
        own_node_size=node or None,
        own_node_bytes_per_s=network * 1e9 if network else None,
        own_scaleup_size=72 if "nvl72" in job.flags else None,
    )


def _ranks(cell: _Cells) -> int:
    return cell.count("dp", 1) * cell.count("tp", 1) * cell.count("pp", 1) * cell.count("cp", 1)


def _job(cell: _Cells, flags: dict[str, str]) -> Job:
    habits = _habits(cell)
    model = _decoder(cell, flags)
    tp, pp, cp = (cell.count(c, 1) for c in ("tp", "pp", "cp"))
    n_gpus = cell.count("n_gpus", 0) or _ranks(cell)
    if "ci_platform" in flags and not cell.text("n_gpus"):
        # Megatron's CI runs on one node, or on as many as one group of experts needs; full-size models on 16
        experts = cell.count("ep", 1) * int(flags.get("etp") or (tp if model.n_experts else 1))
        node = 4 if cell.text("gpu").startswith("gb") else 8
        nodes = 1 if "tiny_model" in flags else 16
        n_gpus = max(nodes * node, tp * pp * cp * max(1, experts // (tp * cp)))
        cell.assumed.append(f"{n_gpus} GPUs (the source prints none)")
    if not cell.text("tp") and "model_parallel" in flags:
        tp, pp = _split(_number_in(flags, "model_parallel", 1), cell.count("gpus_per_node", 8), model.n_layers)
        cell.assumed.append(f"tp = {tp}, pp = {pp} (the source prints their product only)")
    dp = cell.count("dp", 0)
    if not dp:
        dp = max(1, n_gpus // (tp * pp * cp))
        cell.assumed.append(f"dp = {dp} (what is left of {n_gpus} GPUs)")
    elif dp * tp * pp * cp != n_gpus:
        cell.assumed.append(f"{dp * tp * pp * cp} GPUs (the layout's, where the source says {n_gpus})")
    stages, ends = _pipeline(flags, pp)
    stages = cell.count("virtual_stages", stages or 1)
    flags = {**flags, **ends, **_hints(cell, flags)}
    layout = Layout(
        dp, tp, pp, cp,
        ep=cell.count("ep", 1),
        expert_tp=_number_in(flags, "etp", tp if habits.name == "megatron" and model.n_experts else 1),
        # torchtitan shards over the ranks of cp too, and prints the degree without them; distributed/parallel_dims.py
        fsdp=cell.count("fsdp", 1) * (cp if habits.name == "torchtitan" else 1),
        zero_stage=cell.count("zero_stage", habits.zero_stage, f"{habits.title}'s default"),
        reshard_after_forward=cell.count("reshard_after_forward", 1),
        sequence_parallel=cell.count("sequence_parallel", habits.sequence_parallel if tp > 1 else 0,
                                     f"{habits.title}'s default" if tp > 1 else ""),
        virtual_stages=stages,
        schedule=cell.text("pp_schedule") or ("interleaved" if stages > 1 else "1f1b"),
    )  # fmt: skip
    micro, many, batch = (cell.count(c, 0) for c in ("micro_batch", "grad_accumulation", "global_batch"))
    if not micro and many and batch:
        micro = max(1, batch // (dp * many))
    micro = micro or 1
    if not many:
        many = max(1, batch // (dp * micro)) if batch else 1
    recompute = cell.text("recompute")
    recompute, _, every = _RECOMPUTE.get(recompute, recompute).partition(":")
    if recompute.startswith("every_k"):
        recompute = "full"
    if recompute and recompute not in RECOMPUTE:
        cell.assumed.append(f"recompute = full (for {recompute!r})")
        recompute = "full"
    if not recompute:
        recompute = habits.recompute
        cell.assumed.append(f"recompute = {recompute} ({habits.title}'s default)")
    attention = cell.text("attention")
    if not attention and _scores_stored(flags):
        attention = "naive"
        cell.assumed.append("attention = naive (no deterministic fused kernel in that container)")
    if not attention:
        attention = habits.attention
        cell.assumed.append(f"attention = {attention} ({habits.title}'s default)")
    if attention not in ("flash", "fused", "naive"):
        cell.assumed.append(f"attention = flash (for {attention!r})")
        attention = "flash"
    precision = cell.text("precision") or "bf16"
    if precision not in PRECISIONS:
        raise BadInput(f"no precision {precision!r}; known: {', '.join(PRECISIONS)}")
    gradients = 4.0 if "fp32_grad_accumulation" in flags else 2.0 if "grad_reduce_bf16" in flags else None
    overlap = flags.get("overlap_grad_reduce")
    return Job(
        model, cell.must("seq_len"), layout, micro, many,
        precision=precision,
        recompute=recompute,
        recompute_every=int(every) if every.isdecimal() else 1,
        recompute_modules=tuple(filter(None, flags.get("recompute_modules", "").replace("+", ",").split(","))),
        attention=attention,
        optimizer=_optimizer(cell),
        framework=habits.name,
        compiled=cell.text("compile") == "1",
        fp8_everywhere="fp8_linear_only" not in flags,
        gradient_bytes=gradients,
        overlap_gradients=None if overlap is None else overlap == "1",
        offload_layers=_number_in(flags, "cpu_offload_layers"),
        flags=flags,
    )  # fmt: skip


def _habits(cell: _Cells) -> Framework:
    """The framework's row; for one that has none, the habits of its kind: sharded like FSDP, split like Megatron."""
    name = cell.text("framework")
    sharded = cell.text("zero_stage") == "3" or cell.count("fsdp", 1) > 1
    if sharded and "deepspeed" in name.lower():
        return framework("deepspeed")
    try:
        return framework(name)
    except UnknownName:
        split = cell.count("tp", 1) * cell.count("pp", 1) > 1 or bool(cell.text("n_experts"))
        many = cell.count("n_gpus", 0) != 1
        like = framework("fsdp" if sharded else "megatron" if split or (not name and many) else "plain")
        cell.assumed.append(f"what {name or 'an unnamed framework'} does by default is taken from {like.title}")
        return like


def _number_in(flags: Mapping[str, str], name: str, default: int = 0) -> int:
    """A flag's whole number, where it has one."""
    return int(flags[name]) if flags.get(name, "").isdecimal() else default


def _optimizer(cell: _Cells) -> str:
    """The optimizer, from free text: a row of the catalogue whose name begins it, else AdamW."""
    text = cell.text("optimizer").lower().replace("_", "-")
    if text in ("", "adam"):
        return "adamw"
    found = [name for name in OPTIMIZERS if text.startswith(name)]
    if not found:
        cell.assumed.append(f"optimizer = adamw (for {text!r})")
        return "adamw"
    return max(found, key=len)


def _scores_stored(flags: Mapping[str, str]) -> bool:
    """Megatron's own layers store the scores. So did Transformer Engine where determinism was asked of a flash-attn
    before 2.4.1, whose backward has none: the containers of CI's first clusters (`get_attention_backend`)."""
    old = "dracooci" in flags.get("ci_platform", "") and "deterministic" in flags
    return flags.get("impl") == "local" or old


def _hints(cell: _Cells, flags: Mapping[str, str]) -> dict[str, str]:
    """What Megatron's CI says of a run in its name only, or not at all."""
    if "ci_platform" not in flags:
        return {}
    name, found = cell.text("model"), {}
    grouped = "grouped" in name or "etp" in flags or "tiny_model" not in flags
    if cell.count("n_experts", 0) and not grouped and cell.text("moe_d_ff") in ("", cell.text("d_ff")):
        found["sequential_experts"] = "1"  # no --moe-grouped-gemm
    if "qk_layernorm" in name:
        found["qk_layernorm"] = "1"
    return found


def _gpt_like(family: str, flags: Mapping[str, str]) -> bool:
    """GPT's block: LayerNorm, learned positions. Megatron's CI puts SwiGLU and experts into that one."""
    tiny = "ci_platform" in flags and "tiny_model" in flags and not flags.get("mla") and family in ("llama", "moe")
    return family in ("gpt", "bert", "t5") or tiny


def _dense_first(flags: Mapping[str, str]) -> int:
    """Dense layers of Megatron's ``--moe-layer-freq``, as in ([0]*3+[1]*11)."""
    found = re.match(r"\(\[0\]\*(\d+)\+", flags.get("moe_layer_freq", ""))
    return int(found[1]) if found else 0


def _pipeline(flags: Mapping[str, str], pp: int) -> tuple[int, dict[str, str]]:
    """Chunks per rank and layers of the first and last stage, from ``--pipeline-model-parallel-layout``.

    E is the embedding, t a block, m a multi-token prediction layer, L the loss; | ends a chunk, chunks go round robin.

    >>> _pipeline({"pp_layout": "Et*3|(tt|)*6tmL"}, 2)
    (4, {'first_stage_layers': '9', 'last_stage_layers': '7'})
    """
    text = flags.get("pp_layout", "")
    if not text:
        return 0, {}
    text = re.sub(r"\(([^()]*)\)\*(\d+)", lambda m: m[1] * int(m[2]), text)
    text = re.sub(r"(\w)\*(\d+)", lambda m: m[1] * int(m[2]), text)
    chunks = [chunk.count("t") for chunk in text.split("|")]
    ends = {"first_stage_layers": str(sum(chunks[::pp])), "last_stage_layers": str(sum(chunks[pp - 1 :: pp]))}
    return len(chunks) // pp, ends


def _split(product: int, node: int, n_layers: int) -> tuple[int, int]:
    """tp and pp from their product as Megatron's rule has it: tensor parallel within a node, pipeline beyond."""
    tp = min(product, node)
    while product % tp or (n_layers % (product // tp) and tp > 1):
        tp -= 1
    return tp, product // tp


def _trains_another_token(cell: _Cells, flags: Mapping[str, str]) -> bool:
    """DeepSeek-V3 predicts one token more (DeepSeek-AI 2024, arXiv:2412.19437, 4.2) unless its source says not."""
    if "without_mtp" in flags or (cell.count("n_experts", 0), cell.count("n_layers", 0)) != (256, 61):
        return False
    cell.assumed.append("mtp = 1 (DeepSeek-V3's own)")
    return True


def _layers(cell: _Cells, flags: Mapping[str, str]) -> int:
    """Layers of the decoder, or of a model that has nothing else."""
    if cell.text("n_layers"):
        n_layers = cell.must("n_layers")
        if "mamba_hybrid" in flags and n_layers > 1:
            cell.assumed.append("two layers of a hybrid, a mixer and a feed-forward, count as one block")
            n_layers //= 2
        return n_layers
    if "decoder_layers" in flags:
        return _number_in(flags, "decoder_layers", _LAYERS)
    return cell.count("n_layers", _LAYERS, "the source prints none; GPT-2 medium's")


def _decoder(cell: _Cells, flags: Mapping[str, str]) -> Decoder:
    """The row's shape."""
    d = cell.count("d_model", 0)
    if not d:
        raise BadInput("no d_model")
    heads = cell.must("n_heads")
    family = cell.text("family")
    gated = cell.text("gated_mlp") == "1" if cell.text("gated_mlp") else family in _GATED
    d_ff = cell.count("d_ff", 0)
    if not d_ff:
        d_ff = -(-(8 * d // 3) // 64) * 64 if gated else 4 * d
        cell.assumed.append(f"d_ff = {d_ff}")
    which = "release" if "ci_platform" in flags and "tiny_model" not in flags and family != "t5" else family
    named = next((n for n in _VOCABULARIES if cell.text("model").startswith(n)), which)
    vocabulary = cell.count("vocab", _VOCABULARIES.get(named, _VOCABULARY), "the source prints none")
    experts = cell.count("n_experts", 0)
    mla = [int(x) for x in flags.get("mla", "").split("/") if x.isdecimal()]
    shared = cell.count("n_shared_experts", 0)
    moe_d_ff = cell.count("moe_d_ff", d_ff)
    tied = cell.text("tied_embeddings")
    return Decoder(
        cell.text("model") or cell.text("id"),
        _layers(cell, flags), d, heads,
        cell.count("n_kv_heads", heads),
        _number_in(flags, "head_dim", d // heads),
        d_ff, gated, vocabulary,
        tied == "1" if tied else family not in ("llama", "moe", "mla_moe"),
        bias=family in ("gpt", "bert", "t5"),
        norm="layernorm" if _gpt_like(family, flags) else "rmsnorm",
        learned_positions=cell.must("seq_len") if _gpt_like(family, flags) else 0,
        n_experts=experts,
        experts_per_token=cell.count("experts_per_token", min(2, experts)) if experts else 0,
        moe_d_ff=moe_d_ff if experts else 0,
        n_shared_experts=shared,
        shared_d_ff=_number_in(flags, "shared_expert_d_ff", shared * moe_d_ff) if experts else 0,
        first_dense_layers=_number_in(flags, "first_dense_layers", _dense_first(flags)),
        moe_every=_number_in(flags, "moe_layer_freq", 1),
        sliding_window=cell.count("sliding_window", 0),
        windowed_every=2 if "window_every_2nd_layer" in flags else 1,
        latent=Latent(*mla) if len(mla) == 5 else None,
        mtp_layers=_number_in(flags, "mtp", int("with_mtp" in flags or _trains_another_token(cell, flags))),
        n_encoder_layers=_number_in(flags, "encoder_layers"),
        causal=family != "bert",
    )  # fmt: skip
