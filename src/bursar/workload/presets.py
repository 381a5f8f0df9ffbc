"""The catalogue's models as something to run: a real module, a batch for it, and its loss.

Tensors are made on the default device and in the default dtype, so that the same preset runs for real, under
`torch.device("meta")` and under a fake mode.

    B batch   S sequence   V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bursar import architecture
from bursar.architecture import Kind, Network, Transformer
from bursar.errors import BadInput
from bursar.workload.modules.bert import BERT
from bursar.workload.modules.gpt import GPT
from bursar.workload.modules.llama import Llama
from bursar.workload.modules.mamba import Mamba
from bursar.workload.modules.mixture import deepseek_v3, mixtral
from bursar.workload.modules.mobilenet import MobileNetV2
from bursar.workload.modules.resnet import ResNet50
from bursar.workload.modules.small import MLP, Cruncher, TwoLayer
from bursar.workload.modules.t5 import T5
from bursar.workload.modules.vit import ViT

Batch = tuple[Tensor, ...]

LM_BATCH_SIZE, LM_SEQ_LEN = 8, 1024  # the command line's own defaults, --batch-size and --seq-len


@dataclass(frozen=True, slots=True)
class Preset:
    """One model of the catalogue, ready to run."""

    name: str
    make_model: Callable[[], nn.Module]
    make_batch: Callable[[int, int | None], Batch]  # (samples, sequence length or None for the default)
    loss: Callable[[nn.Module, Batch], Tensor]
    default_batch_size: int
    default_seq_len: int | None  # None: the model has no sequence
    default_optimizer: str
    source: str
    architecture: Transformer | Network
    depth: int = 0  # of its blocks, all alike
    at_depth: Callable[[int], nn.Module] | None = None  # the same model with as many of them; None where they differ

    @property
    def active_parameters(self) -> int | None:
        """Parameters one token passes through, None where that is all."""
        return self.architecture.active_parameters() if isinstance(self.architecture, Network) else None


def build(name: str, **overrides: int) -> Preset:
    """The preset of that name, its sizes changed by `gpt2:L=2,d=256` or by `build("gpt2", L=2, d=256)`.

    Nothing is allocated before `make_model` or `make_batch` is called. Raises what `architecture.preset` raises, and
    `BadInput` for a family that has shapes but no module here.
    """
    shape = architecture.preset(name, **overrides)
    return _language_model(shape) if isinstance(shape, Transformer) else _network(shape)


# ---- language models

_LANGUAGE_MODELS: dict[str, Callable[[Transformer], nn.Module]] = {"gpt": GPT, "llama": Llama, "bert": BERT}


def _language_model(shape: Transformer) -> Preset:
    """A decoder that predicts the next token, or BERT, which predicts every one."""
    if shape.family not in _LANGUAGE_MODELS:
        raise BadInput(f"{shape.name}: bursar has no module of family {shape.family}; give file.py:callable instead")
    default_seq_len = min(LM_SEQ_LEN, shape.max_seq_len)

    def make_batch(batch_size: int, seq_len: int | None) -> Batch:
        """Tokens and targets, both (B, S), drawn from the whole vocabulary."""
        seq_len = default_seq_len if seq_len is None else seq_len
        _check_at_least_1(shape.name, batch_size=batch_size, seq_len=seq_len)
        if shape.position == "learned" and seq_len > shape.max_seq_len:
            raise BadInput(
                f"{shape.name}: a sequence of {seq_len} does not fit its table of {shape.max_seq_len} learned "
                f"positions; take at most {shape.max_seq_len}, or give the model a longer table with T={seq_len}"
            )
        size = (batch_size, seq_len)
        return torch.randint(0, shape.vocab_size, size), torch.randint(0, shape.vocab_size, size)

    return Preset(
        name=shape.name,
        make_model=lambda: _LANGUAGE_MODELS[shape.family](shape),
        depth=shape.n_layers,
        at_depth=lambda n: _LANGUAGE_MODELS[shape.family](replace(shape, n_layers=n)),
        make_batch=make_batch,
        loss=_next_token_loss,
        default_batch_size=LM_BATCH_SIZE,
        default_seq_len=default_seq_len,
        default_optimizer="adamw",
        source=shape.source,
        architecture=shape,
    )


def _next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy, computed inside the model."""
    tokens, targets = batch
    loss: Tensor = model(tokens, targets)
    return loss


# ---- other networks


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How one kind of network is made and fed; `s` is its sizes by letter. The last tensor of a batch is the target."""

    model: Callable[[dict[str, int]], nn.Module]
    batch: Callable[[dict[str, int], int, int], Batch]  # (sizes, samples, sequence length or 0)
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: str = "adamw"


def _token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of (B, S, V) and (B, S)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _tokens(n: int) -> Callable[[dict[str, int], int, int], Batch]:
    """`n` tensors of tokens, (B, S) each."""
    return lambda s, B, S: tuple(torch.randint(0, s["V"], (B, S)) for _ in range(n))


def _images(s: dict[str, int], n: int, _: int) -> Batch:
    """Images and their classes."""
    return torch.randn(n, 3, s["R"], s["R"]), torch.randint(0, s["K"], (n,))


def _llama_shape(s: dict[str, int], layers: str, width: str, kv: int, theta: float, eps: float) -> Transformer:
    """The sizes as a Llama, whose block the mixtures change."""
    return Transformer(
        "", "llama", s[layers], s["d"], s["h"], kv, s["d"] // s["h"], s[width], True, s["V"], s["T"], False, "rmsnorm",
        False, "rope", theta, eps, "",
    )  # fmt: skip


_RECIPES: dict[Kind, _Recipe] = {
    "two-layer": _Recipe(
        model=lambda s: TwoLayer(s["D"], s["K"]),
        batch=lambda s, n, _: (torch.randn(n, s["D"]), torch.randn(n, s["K"])),
        loss=F.mse_loss,
    ),
    "cruncher": _Recipe(
        model=lambda s: Cruncher(s["D"], s["L"]),
        batch=lambda s, n, _: (torch.randn(n, s["D"]), torch.randn(n)),
        loss=F.mse_loss,
        optimizer="adagrad",  # the notes', chapter 10
    ),
    "mlp": _Recipe(
        model=lambda s: MLP(s["D"], s["H"], s["L"], s["K"]),
        batch=lambda s, n, _: (torch.randn(n, s["D"]), torch.randn(n, s["K"])),
        loss=F.mse_loss,
    ),
    "resnet50": _Recipe(
        model=lambda s: ResNet50(s["K"]),
        batch=_images,
        loss=F.cross_entropy,
    ),
    "mobilenet-v2": _Recipe(model=lambda s: MobileNetV2(s["K"]), batch=_images, loss=F.cross_entropy),
    "vit": _Recipe(
        model=lambda s: ViT(s["d"], s["L"], s["h"], s["F"], s["P"], s["R"], s["K"]),
        batch=_images,
        loss=F.cross_entropy,
    ),
    "t5": _Recipe(
        model=lambda s: T5(s["V"], s["d"], s["N"], s["h"], s["c"], s["F"]), batch=_tokens(3), loss=_token_loss
    ),
    "mamba": _Recipe(model=lambda s: Mamba(s["V"], s["d"], s["L"], s["N"], s["R"]), batch=_tokens(2), loss=_token_loss),
    "mixtral": _Recipe(
        model=lambda s: mixtral(_llama_shape(s, "L", "F", s["kv"], 1e6, 1e-5), s["E"], s["k"]),
        batch=_tokens(2),
        loss=_token_loss,
    ),
    "deepseek-v3": _Recipe(
        model=lambda s: deepseek_v3(
            _llama_shape(s, "N", "F", s["h"], 1e4, 1e-6), _llama_shape(s, "N", "M", s["h"], 1e4, 1e-6), s
        ),
        batch=_tokens(2),
        loss=_token_loss,
    ),
}


def _network(shape: Network) -> Preset:
    """A network whose shape is a few sizes by letter."""
    recipe, sizes = _RECIPES[shape.kind], dict(shape.sizes)
    default_seq_len = min(LM_SEQ_LEN, sizes["T"]) if shape.has_sequence else None

    def make_batch(batch_size: int, seq_len: int | None = None) -> Batch:
        """Inputs and targets of `batch_size` samples."""
        _check_at_least_1(shape.name, batch_size=batch_size)
        if seq_len is not None and not shape.has_sequence:
            raise BadInput(f"{shape.name} has no sequence; leave the sequence length out")
        length = seq_len if seq_len is not None else default_seq_len or 0
        if shape.has_sequence:
            _check_at_least_1(shape.name, seq_len=length)
        return recipe.batch(sizes, batch_size, length)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        """The recipe's loss of the model's output."""
        *inputs, targets = batch
        return recipe.loss(model(*inputs), targets)

    return Preset(
        name=shape.name,
        make_model=lambda: recipe.model(sizes),
        depth=sizes.get("L", 0),
        at_depth=(lambda n: recipe.model({**sizes, "L": n})) if "L" in sizes else None,
        make_batch=make_batch,
        loss=loss,
        default_batch_size=sizes["B"],
        default_seq_len=default_seq_len,
        default_optimizer=recipe.optimizer,
        source=shape.source,
        architecture=shape,
    )


def _check_at_least_1(name: str, **sizes: int) -> None:
    """Refuse an empty batch."""
    for what, size in sizes.items():
        if size < 1:
            raise BadInput(f"{name}: {what.replace('_', ' ')} must be at least 1, not {size}")
