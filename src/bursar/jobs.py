"""A training step on many devices, as planning sees it: a decoder's shape, a layout, and how it is run. No torch.

    Decoder   the model's shape: dense, grouped-query, mixture of experts, latent attention, sliding windows
    Layout    how ranks share the work; every field may be an array, so one `Job` can stand for thousands of layouts
    Job       the two, with batch, precision, recompute and what the framework does

A job says nothing of hardware; `hardware.Cluster` does. What a rank computes, sends and holds is priced on floor 3, by
the same functions for one published run and for a search over layouts.

    B micro-batch   S sequence   M micro-batches per step   L layers   D model   F hidden   V vocabulary   E experts
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from bursar.architecture import Network, Transformer
from bursar.errors import BadInput

Count = Any  # an int, or a NumPy array of them: a job's numbers broadcast

Recompute = Literal["none", "selective", "selective_op", "full"]
RECOMPUTE: tuple[str, ...] = ("none", "selective", "selective_op", "full")
SCHEDULES: tuple[str, ...] = ("gpipe", "1f1b", "interleaved", "zero-bubble", "dualpipev")
PRECISIONS: tuple[str, ...] = ("fp32", "fp16", "bf16", "fp8", "mxfp8", "nvfp4")  # of the products; the rest is 16 bit


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention: widths of its projections. Source: DeepSeek-AI 2024 (arXiv:2405.04434), 2.1."""

    q_rank: int  # 0: queries are not compressed
    kv_rank: int
    nope_dim: int  # of a head's query and key, without positions
    rope_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class Decoder:
    """A transformer's shape as planning needs it."""

    name: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int  # of one dense matrix
    gated_mlp: bool
    vocab_size: int
    tied_embeddings: bool
    bias: bool = False
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    learned_positions: int = 0  # rows of a table of positions; 0: rotary or none
    n_experts: int = 0  # routed; 0: dense
    experts_per_token: int = 0
    moe_d_ff: int = 0
    n_shared_experts: int = 0
    shared_d_ff: int = 0  # of all shared experts together
    first_dense_layers: int = 0
    moe_every: int = 1  # one layer in so many is a mixture
    sliding_window: int = 0  # tokens; 0: none
    windowed_every: int = 1  # one layer in so many has the window
    latent: Latent | None = None
    mtp_layers: int = 0  # multi-token prediction: more blocks, each with a head's loss
    n_encoder_layers: int = 0  # T5: these come before, and each decoder layer has a cross-attention too
    causal: bool = True

    @property
    def n_moe_layers(self) -> int:
        """Layers whose feed-forward is a mixture."""
        if not self.n_experts:
            return 0
        return (self.n_layers - self.first_dense_layers) // self.moe_every

    @property
    def query_width(self) -> int:
        """n_heads × what one head's query and key hold."""
        if self.latent is not None:
            return self.n_heads * (self.latent.nope_dim + self.latent.rope_dim)
        return self.n_heads * self.head_dim

    @property
    def value_width(self) -> int:
        """n_heads × what one head's value holds."""
        return self.n_heads * (self.latent.value_dim if self.latent is not None else self.head_dim)


@dataclass(frozen=True, slots=True)
class Layout:
    """How dp·tp·cp·pp ranks share the work. ``fsdp`` is a group inside dp·cp, ``ep`` one inside dp·cp·tp."""

    dp: Count = 1
    tp: Count = 1
    pp: Count = 1
    cp: Count = 1
    ep: Count = 1
    expert_tp: Count = 1  # tensor parallelism inside an expert
    fsdp: Count = 1  # ranks that share one copy of what zero_stage shards; 1 with zero_stage > 0 means dp·cp
    zero_stage: Count = 0  # 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too (FSDP)
    reshard_after_forward: Count = 1  # zero_stage 3 only
    sequence_parallel: Count = 0  # with tp
    virtual_stages: Count = 1  # model chunks per pipeline rank
    schedule: str = "1f1b"

    @property
    def ranks(self) -> Count:
        """Devices it takes."""
        return self.dp * self.tp * self.pp * self.cp

    @property
    def shards(self) -> Count:
        """Ranks that share one copy of what is sharded: dp·cp, or less with replicas of shards (HSDP)."""
        whole = self.dp * self.cp
        return whole * (self.fsdp <= 1) + self.fsdp * (self.fsdp > 1)


@dataclass(frozen=True, slots=True)
class Job:
    """One training step of ``model`` under ``layout``."""

    model: Decoder
    seq_len: int
    layout: Layout
    micro_batch: Count  # samples of one data-parallel rank in one forward
    micro_batches: Count  # of one data-parallel rank in one step
    precision: str = "bf16"
    recompute: str = "none"
    recompute_every: int = 1  # with full: one block in so many is checkpointed
    recompute_modules: tuple[str, ...] = ()  # with selective_op: the modules named by the source
    attention: str = "flash"  # flash, fused: scores are not stored; naive: they are
    optimizer: str = "adamw"
    framework: str = "megatron"  # whose habits hold where nothing else is said: catalog/frameworks.toml
    compiled: bool = False
    fp8_everywhere: bool = True  # False: linear layers of the blocks only
    gradient_bytes: float | None = None  # of one gradient element as accumulated; None: the framework's
    overlap_gradients: bool | None = None  # whether gradients are reduced while backward runs; None: the framework's
    offload_layers: int = 0  # whose activations go to the host
    padded_vocab_size: int = 0  # 0: as the framework pads it
    flags: dict[str, str] = field(default_factory=dict, hash=False)  # what else a source says of a published run

    @property
    def samples(self) -> Count:
        """Sequences of one step, all ranks together."""
        return self.micro_batch * self.micro_batches * self.layout.dp

    @property
    def tokens(self) -> Count:
        """Tokens of one step, all ranks together."""
        return self.samples * self.seq_len


def decoder(shape: Transformer | Network) -> Decoder:
    """The catalogue's ``shape`` as a decoder. Raises BadInput for what is none (a ResNet, Mamba, T5).

    >>> from bursar.architecture import preset
    >>> decoder(preset("llama3-8b")).n_kv_heads, decoder(preset("deepseek-v3")).n_moe_layers
    (8, 58)
    """
    if isinstance(shape, Transformer):
        return Decoder(
            shape.name, shape.n_layers, shape.d_model, shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.d_ff,
            shape.gated_mlp, shape.vocab_size, shape.tied_embeddings, shape.bias, shape.norm,
            shape.max_seq_len if shape.position == "learned" else 0, causal=shape.family != "bert",
        )  # fmt: skip
    s = shape.sizes
    if shape.kind == "mixtral":
        return Decoder(
            shape.name, s["L"], s["d"], s["h"], s["kv"], s["d"] // s["h"], s["F"], True, s["V"], False,
            n_experts=s["E"], experts_per_token=s["k"], moe_d_ff=s["F"],
        )  # fmt: skip
    if shape.kind == "deepseek-v3":
        return Decoder(
            shape.name, s["N"], s["d"], s["h"], s["h"], s["nope"] + s["rope"], s["F"], True, s["V"], False,
            n_experts=s["E"], experts_per_token=s["k"], moe_d_ff=s["M"], n_shared_experts=1, shared_d_ff=s["M"],
            first_dense_layers=s["dense"], latent=Latent(s["q"], s["kv"], s["nope"], s["rope"], s["v"]),
        )  # fmt: skip
    raise BadInput(f"{shape.name} is no decoder: plan lays out transformers and mixtures; bursar step traces the rest")
