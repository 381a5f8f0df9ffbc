"""The catalogue's models as something to run: a real module, a batch for it, and its loss.

Tensors are made on the default device and in the default dtype, so that the same preset runs for real, under
`torch.device("meta")` and under a fake mode.

    B batch   S sequence   V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bursar import architecture
from bursar.architecture import Kind, Network, Transformer
from bursar.errors import BadInput
from bursar.workload.modules.gpt import GPT
from bursar.workload.modules.llama import Llama
from bursar.workload.modules.resnet import ResNet50
from bursar.workload.modules.small import MLP, Cruncher, TwoLayer

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


def build(name: str, **overrides: int) -> Preset:
    """The preset of that name, its sizes changed by `gpt2:L=2,d=256` or by `build("gpt2", L=2, d=256)`.

    Nothing is allocated before `make_model` or `make_batch` is called. Raises what `architecture.preset` raises, and
    `BadInput` for a family that has shapes but no module here.
    """
    shape = architecture.preset(name, **overrides)
    return _language_model(shape) if isinstance(shape, Transformer) else _network(shape)


# ---- language models

_LANGUAGE_MODELS: dict[str, Callable[[Transformer], nn.Module]] = {"gpt": GPT, "llama": Llama}


def _language_model(shape: Transformer) -> Preset:
    """A decoder that predicts the next token."""
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
    """How one kind of network is made and fed; `s` is its sizes by letter."""

    model: Callable[[dict[str, int]], nn.Module]
    batch: Callable[[dict[str, int], int], Batch]  # (sizes, samples)
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: str = "adamw"


_RECIPES: dict[Kind, _Recipe] = {
    "two-layer": _Recipe(
        model=lambda s: TwoLayer(s["D"], s["K"]),
        batch=lambda s, n: (torch.randn(n, s["D"]), torch.randn(n, s["K"])),
        loss=F.mse_loss,
    ),
    "cruncher": _Recipe(
        model=lambda s: Cruncher(s["D"], s["L"]),
        batch=lambda s, n: (torch.randn(n, s["D"]), torch.randn(n)),
        loss=F.mse_loss,
        optimizer="adagrad",  # the notes', chapter 10
    ),
    "mlp": _Recipe(
        model=lambda s: MLP(s["D"], s["H"], s["L"], s["K"]),
        batch=lambda s, n: (torch.randn(n, s["D"]), torch.randn(n, s["K"])),
        loss=F.mse_loss,
    ),
    "resnet50": _Recipe(
        model=lambda s: ResNet50(s["K"]),
        batch=lambda s, n: (torch.randn(n, 3, s["R"], s["R"]), torch.randint(0, s["K"], (n,))),
        loss=F.cross_entropy,
    ),
}


def _network(shape: Network) -> Preset:
    """A network with one input and one target per sample."""
    recipe, sizes = _RECIPES[shape.kind], dict(shape.sizes)

    def make_batch(batch_size: int, seq_len: int | None = None) -> Batch:
        """Inputs and targets of `batch_size` samples."""
        _check_at_least_1(shape.name, batch_size=batch_size)
        if seq_len is not None:
            raise BadInput(f"{shape.name} has no sequence; leave the sequence length out")
        return recipe.batch(sizes, batch_size)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        """The recipe's loss of the model's output."""
        inputs, targets = batch
        return recipe.loss(model(inputs), targets)

    return Preset(
        name=shape.name,
        make_model=lambda: recipe.model(sizes),
        make_batch=make_batch,
        loss=loss,
        default_batch_size=sizes["B"],
        default_seq_len=None,
        default_optimizer=recipe.optimizer,
        source=shape.source,
        architecture=shape,
    )


def _check_at_least_1(name: str, **sizes: int) -> None:
    """Refuse an empty batch."""
    for what, size in sizes.items():
        if size < 1:
            raise BadInput(f"{name}: {what.replace('_', ' ')} must be at least 1, not {size}")
