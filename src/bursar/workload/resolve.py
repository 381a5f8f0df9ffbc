"""MODEL, as a user writes it, to something that can be run: a preset, a ``config.json``, or a callable of their own."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bursar import architecture
from bursar.errors import BadInput, UnknownName
from bursar.workload import presets


@dataclass(frozen=True, slots=True)
class Workload:
    """A model, a batch for it and its loss. Nothing is made before it is asked for.

    ``make`` returns the module and one micro-batch; ``samples`` and ``tokens`` are of that micro-batch, None where only
    running the model will tell.
    """

    name: str
    make: Callable[[], tuple[nn.Module, Any]]
    loss: Callable[[nn.Module, Any], Tensor]
    samples: int | None = None
    tokens: int | None = None
    optimizer: str = "adamw"
    assumptions: tuple[str, ...] = ()
    active_parameters: int | None = None  # what one token passes through, where that is not all
    depth: int = 0  # of blocks known to be alike; a ``make_shallow`` with fewer then stands for all of them
    make_shallow: Callable[[int], tuple[nn.Module, Any]] | None = None


def resolve(model: str, batch_size: int | None = None, seq_len: int | None = None) -> Workload:
    """The workload that ``model`` names.

    Raises UnknownName for a name that is no preset, file or callable, and BadInput for sizes that cannot be meant.
    """
    for what, value in (("batch size", batch_size), ("sequence length", seq_len)):
        if value is not None and value < 1:
            raise BadInput(f"a {what} of {value} trains nothing; give 1 or more")
    path = Path(model.split(":")[0])
    if model.split(":")[0] in architecture.known_models():
        return _preset(model, batch_size, seq_len)
    if path.suffix == ".json" or (path.is_dir() and (path / "config.json").is_file()):
        from bursar.workload import hf

        return hf.workload(path if path.suffix == ".json" else path / "config.json", batch_size, seq_len)
    where, _, name = model.rpartition(":")
    if where and (where.endswith(".py") or all(part.isidentifier() for part in where.split("."))):
        return from_callable(_find(where, name), model, batch_size, seq_len)
    raise UnknownName(
        "model",
        model,
        architecture.known_models(),
        "Or give a config.json, file.py:callable or package.module:callable.",
    )


def _preset(model: str, batch_size: int | None, seq_len: int | None) -> Workload:
    preset = presets.build(model)
    samples = batch_size if batch_size is not None else preset.default_batch_size
    if preset.default_seq_len is None and seq_len is not None:
        raise BadInput(f"{preset.name} has no sequence; leave --seq-len out")
    sequence = seq_len if seq_len is not None else preset.default_seq_len

    def make() -> tuple[nn.Module, Any]:
        return preset.make_model(), preset.make_batch(samples, sequence)

    at_depth = preset.at_depth
    return Workload(
        preset.name,
        make,
        preset.loss,
        samples,
        samples * (sequence or 1),
        preset.default_optimizer,
        active_parameters=preset.active_parameters,
        depth=preset.depth,
        make_shallow=at_depth and (lambda n: (at_depth(n), preset.make_batch(samples, sequence))),
    )


def parameters(work: Workload) -> int:
    """How many parameters the workload's model has, a shared one counted once; made on the meta device."""
    with torch.device("meta"):
        module, _ = work.make()
    return sum(p.numel() for p in module.parameters())


# ---- a user's own


def _find(where: str, name: str) -> Callable[..., Any]:
    """The callable ``name`` in a file or a module. The user's code is run, as they asked by naming it."""
    if where.endswith(".py"):
        path = Path(where)
        if not path.is_file():
            raise BadInput(f"no file {where}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None  # a .py file always has a spec
        assert spec.loader is not None  # and a loader
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)
        sys.path.insert(0, str(path.resolve().parent))
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(path.resolve().parent))
    else:
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            if error.name is None or not where.startswith(error.name):
                raise
            raise UnknownName("model", f"{where}:{name}", architecture.known_models()) from error
    found = getattr(module, name, None)
    if found is None:
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UnknownName(f"callable in {where}", name, public)
    if not callable(found):
        raise BadInput(f"{where}:{name} is a {type(found).__name__}; bursar needs a callable that returns a module")
    return found  # type: ignore[no-any-return]


def from_callable(
    make_model: Callable[..., Any], name: str, batch_size: int | None = None, seq_len: int | None = None
) -> Workload:
    """A workload from a callable returning a module, or a module and a batch.

    It is given ``batch_size`` and ``seq_len`` if its signature has them. A batch is a tensor, a tuple of arguments or a
    dict of keyword arguments; without one, it is guessed from the model's first layer, and the page says so.
    """
    try:
        takes = set(inspect.signature(make_model).parameters)
    except (TypeError, ValueError):
        takes = set()
    sizes = {"batch_size": batch_size, "seq_len": seq_len}
    passed = {k: v for k, v in sizes.items() if k in takes and v is not None}
    notes: list[str] = []

    def make() -> tuple[nn.Module, Any]:
        made = make_model(**passed)
        if isinstance(made, nn.Module):
            batch, note = guess_batch(made, batch_size or presets.LM_BATCH_SIZE, seq_len or presets.LM_SEQ_LEN)
            notes.append(note)
            return made, batch
        if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
            ignored = [k for k, v in sizes.items() if v is not None and k not in passed]
            if ignored:
                raise BadInput(
                    f"{name} makes its own batch, so --{ignored[0].replace('_', '-')} would change nothing; let it "
                    f"take a parameter {ignored[0]!r}"
                )
            return made
        raise BadInput(
            f"{name} returned {type(made).__name__}; bursar needs a torch.nn.Module, or a module and a batch"
        )

    return Workload(name, make, loss_of_output, assumptions=Late(notes))


class Late(tuple[str, ...]):
    """Assumptions that are known only once the model was made; reads the list each time."""

    def __new__(cls, notes: list[str]) -> Late:
        """``notes`` is read each time, and may still grow."""
        self = super().__new__(cls)
        self.notes = notes  # type: ignore[attr-defined]
        return self

    def __iter__(self) -> Any:
        return iter(self.notes)  # type: ignore[attr-defined]


def guess_batch(model: nn.Module, batch_size: int, seq_len: int) -> tuple[tuple[Tensor, ...], str]:
    """A batch for the model's first layer with weights: tokens, images or features. Raises BadInput otherwise."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Embedding):
            x = torch.randint(0, layer.num_embeddings, (batch_size, seq_len))
            return (
                x,
            ), f"the batch is guessed: tokens ({batch_size}, {seq_len}), for the embedding {name!r} comes first"
        if isinstance(layer, nn.Conv2d):
            x = torch.randn(batch_size, layer.in_channels, 224, 224)
            return (x,), f"the batch is guessed: images {tuple(x.shape)}, for the convolution {name!r} comes first"
        if isinstance(layer, nn.Linear):
            x = torch.randn(batch_size, layer.in_features)
            return (x,), f"the batch is guessed: features {tuple(x.shape)}, for the linear layer {name!r} comes first"
    raise BadInput("cannot guess a batch for this model: let the callable return (module, batch)")


def loss_of_output(model: nn.Module, batch: Any) -> Tensor:
    """Run the model and find the scalar to differentiate: a ``loss`` it returns, else the mean of its output."""
    if isinstance(batch, Mapping):
        out = model(**batch)
    elif isinstance(batch, (tuple, list)):
        out = model(*batch)
    else:
        out = model(batch)
    found = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
    if isinstance(found, Tensor):
        return found
    tensors = tensors_in(out)
    scalar = next((t for t in tensors if t.dim() == 0 and t.requires_grad), None)
    if scalar is not None:
        return scalar
    floats = [t for t in tensors if t.requires_grad]
    if not floats:
        raise BadInput("the model's output needs no gradient, so there is nothing to train; is every parameter frozen?")
    return floats[0].float().mean()


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a batch or an output, dicts, lists and tuples opened."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in tensors_in(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors_in(v)]
    return []
