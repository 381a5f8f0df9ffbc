"""The catalogue's optimizers made real, and what they keep and cost, read off a real step.

Nothing is imported before it is asked for: torchao and pytorch-optimizer come with the extra ``optim``.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bursar.errors import BadInput, MissingExtra
from bursar.optimizers import OPTIMIZERS, optimizer

__all__ = ["OPTIMIZERS", "Cost", "MuonWithAdamW", "build", "bytes_of", "cost", "state_tensors"]

_SIDE = 256  # of the square matrix on which an optimizer is measured: 65 536 parameters, whole blocks of 256


def build(
    name: str, parameters: Iterable[Any], *, module: nn.Module | None = None, **settings: Any
) -> torch.optim.Optimizer:
    """The optimizer ``name`` over ``parameters``: tensors, or groups of them as torch takes them.

    ``settings`` (``lr``, ``weight_decay``, …) go before the row's own; one that is None is left out. ``module`` tells
    Muon which matrices are embeddings. Raises UnknownName naming the nearest known, MissingExtra where its library is
    not installed, and BadInput for a setting it does not take.
    """
    row = optimizer(name)
    given = {**row.settings, **{k: v for k, v in settings.items() if v is not None}}
    make = _load(row.make, row.extra, name)
    if make is MuonWithAdamW:
        given["module"] = module
    try:
        made: torch.optim.Optimizer = make(parameters, **given)
    except TypeError as error:
        raise BadInput(f"{name} does not take {', '.join(settings)}: {error}") from error
    return made


def _load(path: str, extra: str, name: str) -> Any:
    module, _, attribute = path.rpartition(".")
    if module == __name__:
        return globals()[attribute]
    try:
        with _quiet():
            return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise MissingExtra(extra or "torch", f"the optimizer {name} is {path}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Importing torchao logs each GPU library that it could not load; none is needed here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def vocabulary_tables(module: nn.Module) -> set[int]:
    """The ids of ``module``'s embedding tables and of the heads over the same vocabulary."""
    tables = [m.weight for m in module.modules() if isinstance(m, nn.Embedding)]
    sizes = {len(t) for t in tables}
    heads = [m.weight for m in module.modules() if isinstance(m, nn.Linear) and m.out_features in sizes]
    return {id(p) for p in (*tables, *heads)}


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for hidden matrices, AdamW for all else: embeddings, heads of their vocabulary, what is not a matrix.

    One optimizer to its user: one list of groups, one state, one ``state_dict``. Without ``module`` every matrix is
    Muon's. Source: Jordan et al. 2024, "Muon", section on which parameters it is for.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        *,
        module: nn.Module | None = None,
    ) -> None:
        tables = vocabulary_tables(module) if module is not None else set()
        given = list(parameters)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        matrices, others = [], []
        for group in groups:
            chosen = {id(p) for p in group["params"] if p.ndim == 2 and id(p) not in tables}
            matrices.append({**group, "params": [p for p in group["params"] if id(p) in chosen]})
            others.append({**group, "params": [p for p in group["params"] if id(p) not in chosen]})
        settings = {"lr": lr, "weight_decay": weight_decay}
        kinds: tuple[tuple[Any, list[Any]], ...] = ((torch.optim.Muon, matrices), (torch.optim.AdamW, others))
        found = [(make, [g for g in part if g["params"]]) for make, part in kinds]
        self._parts = [make(part, **settings) for make, part in found if part]
        super().__init__([g for part in self._parts for g in part.param_groups], settings)
        self._share()

    def _share(self) -> None:
        """The parts work on this optimizer's own groups and state."""
        start = 0
        for part in self._parts:
            part.param_groups = self.param_groups[start : start + len(part.param_groups)]
            part.state = self.state
            start += len(part.param_groups)

    def __setstate__(self, state: dict[str, Any]) -> None:  # load_state_dict ends here
        super().__setstate__(state)
        if "_parts" in self.__dict__:
            self._share()

    def step(self, closure: Any = None) -> Any:
        """One update of both."""
        loss = closure() if closure is not None else None
        for part in self._parts:
            step: Any = type(part).step
            step.__wrapped__(part)  # past the hooks: this step has its own
        return loss


# ---- what an optimizer keeps


def bytes_of(tensor: Tensor) -> int:
    """The bytes behind ``tensor``: of its inner tensors, where it is made of several (8-bit states)."""
    return sum(t.numel() * t.element_size() for t in inner(tensor))


def inner(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that ``tensor`` is made of: itself, or those that ``__tensor_flatten__`` names."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [t for name in tensor.__tensor_flatten__()[0] for t in inner(getattr(tensor, name))]


def state_tensors(made: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    """The tensors of its ``state_dict``, by key."""
    found: dict[str, list[Tensor]] = {}
    for state in made.state_dict()["state"].values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                found.setdefault(key, []).append(value)
    return found


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """torchao compiles its step; here it runs as written, where no compiler need be."""
    with torch.compiler.set_stance("force_eager"):
        yield


@dataclass(frozen=True, slots=True)
class Cost:
    """One optimizer on one square matrix: what it keeps and does per parameter."""

    state: Mapping[str, str]  # the state tensors as found: name -> shape and dtype
    state_bytes: float  # per parameter, fp32 parameters
    state_bytes_bf16: float  # per parameter, bf16 parameters
    flops: float  # per parameter and update, matmuls included
    bytes_moved: float


@cache
def cost(name: str) -> Cost:
    """What ``name`` keeps (from the real ``state_dict`` after a step) and does (a traced step), on a 256² matrix."""
    from bursar.trace import tracing

    kept: dict[torch.dtype, float] = {}
    state: dict[str, str] = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = nn.Parameter(torch.zeros(_SIDE, _SIDE, dtype=dtype))
        weight.grad = torch.full_like(weight, 0.5)
        made = build(name, [weight])
        with uncompiled():
            made.step()
        tensors = state_tensors(made)
        kept[dtype] = sum(bytes_of(t) for ts in tensors.values() for t in ts if t.dim()) / weight.numel()
        if dtype == torch.float32:
            state = {key: _shape(ts[0]) for key, ts in tensors.items()}
    with tracing() as session:
        fake = nn.Parameter(torch.empty(_SIDE, _SIDE, device="cuda"))
        chosen = build(name, [fake])
        for _ in range(2):  # the first makes the states
            fake.grad = torch.empty_like(fake)
            session.mark()
            chosen.step()
    rows = session.ledger.recorded
    n = _SIDE * _SIDE
    return Cost(
        state,
        kept[torch.float32],
        kept[torch.bfloat16],
        sum(r.work.flops for r in rows if r.phase == "optimizer") / n,
        sum(r.work.read_bytes + r.work.written_bytes for r in rows if r.phase == "optimizer") / n,
    )


def _shape(tensor: Tensor) -> str:
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "uint8"}
    parts = inner(tensor)
    return " + ".join(f"{'×'.join(map(str, t.shape)) or 'scalar'} {names.get(t.dtype, t.dtype)}" for t in parts)
