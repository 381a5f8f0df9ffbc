"""One forward pass in which of many blocks alike only the first run: how the model calls them, what it does between.

A model traced with fewer blocks (`bursar.folding`) must call those it has left out as it calls those it kept. Here the
whole model runs, and a block that was passed before with arguments of the same shapes hands back outputs of the same
shapes without running; the ops around the blocks are recorded as always.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from bursar.folding import Trunk, Unfoldable
from bursar.ledger import Row

Token = tuple[Any, ...]  # ("block", list, index) or (op, module, shapes, dtypes)


class Skim:
    """Stands in for the blocks of ``trunks`` (whole, as `repeats.find` gives them) while the model ``root`` runs."""

    def __init__(self, root: nn.Module, trunks: Sequence[Trunk], rows: list[Row]) -> None:
        self.names = {id(module): name for name, module in root.named_modules()}
        self.rows = rows
        self.blocks = {
            id(block): (trunk, index)
            for trunk in trunks
            for index, block in enumerate(root.get_submodule(trunk.path)._modules.values())
        }
        self.failed = ""
        self._passed: dict[tuple[str, int], tuple[Any, Any]] = {}  # (list, place in the pattern): arguments, outputs
        self._visits: list[tuple[int, int, str, int]] = []  # (first row, row after the last, list, block)
        self._start = 0
        self._inside = False

    def begin(self) -> None:
        """Forget the visits so far: a new pass begins."""
        self._start = len(self.rows)
        self._visits.clear()

    def takes(self, module: nn.Module) -> bool:
        """Whether ``module`` is a block, met by the model and not within another block."""
        return not self._inside and id(module) in self.blocks

    def call(self, module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a block by ``run``, or hand back what one alike returned."""
        trunk, index = self.blocks[id(module)]
        first = len(self.rows)
        self._inside = True
        try:
            period, place = divmod(index - trunk.start, trunk.period)
            if not 1 <= period < trunk.periods:
                return run(*args, **kwargs)
            given = _shape_of((args, kwargs))
            known = self._passed.get((trunk.path, place))
            if known is not None and known[0] == given:
                return _made(known[1], args)
            if known is not None:
                self.failed = f"blocks of {trunk.path} are called with different arguments"
            out = run(*args, **kwargs)
            self._passed[(trunk.path, place)] = given, _like(out, args)
            return out
        finally:
            self._inside = False
            self._visits.append((first, len(self.rows), trunk.path, index))

    def tokens(self) -> list[Token]:
        """What the pass since `begin` did: the ops outside the blocks, and each block as one."""
        found: list[Token] = []
        at = self._start
        for first, after, path, index in self._visits:
            found += [_token(row) for row in self.rows[at:first]]
            found.append(("block", path, index))
            at = after
        return [*found, *(_token(row) for row in self.rows[at:])]


def check(expected: Sequence[Token], rows: Sequence[Row], trunks: Sequence[Trunk]) -> None:
    """Compare a pass that was skimmed with the rows of the same pass, unfolded. Raises Unfoldable."""
    found: list[Token] = []
    for row in rows:
        if row.phase != "forward":
            break
        block = next(((t.path, i) for t in trunks if (i := t.block(row.module)) is not None), None)
        token: Token = _token(row) if block is None else ("block", *block)
        if block is None or not found or found[-1] != token:
            found.append(token)
    rest = found[len(expected) :]
    if found[: len(expected)] != list(expected) or any(token[0] == "block" for token in rest):
        raise Unfoldable("the model does not treat all of its blocks alike")


def _token(row: Row) -> Token:
    return row.op, row.module, row.shapes, row.dtypes


def _shape_of(value: Any) -> Any:
    """What a block can see of its arguments without looking at their values."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device.type, value.requires_grad
    if isinstance(value, (list, tuple)):
        return tuple(map(_shape_of, value))
    if isinstance(value, dict):
        return tuple((k, _shape_of(v)) for k, v in value.items())
    return value if isinstance(value, (int, float, str, type(None))) else id(value)


def _like(value: Any, args: Any) -> Any:
    """How to make another output: a tensor that came in goes out, others are empty."""
    if isinstance(value, torch.Tensor):
        at = next((i for i, a in enumerate(args) if a is value), None)
        if at is not None:
            return "argument", at
        return "new", tuple(value.shape), value.stride(), value.dtype, value.device, value.requires_grad
    if isinstance(value, (list, tuple)):
        return ("list", type(value), [_like(v, args) for v in value])
    if isinstance(value, dict):
        return ("dict", type(value), {k: _like(v, args) for k, v in value.items()})
    return ("value", value)


def _empty(shape: Any, stride: Any, dtype: Any, device: Any) -> torch.Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


class _Output(torch.autograd.Function):
    """An empty tensor that some graph made: one may write into it, as into a block's output."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, *made: Any) -> torch.Tensor:
        return _empty(*made)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError("a skimmed pass has no backward")


def _made(like: Any, args: Any) -> Any:
    kind, *what = like
    if kind == "argument":
        return args[what[0]]
    if kind == "new":
        *made, wants_gradient = what
        if not wants_gradient:
            return _empty(*made)
        return _Output.apply(torch.empty(0, requires_grad=True), *made)  # type: ignore[no-untyped-call]
    if kind == "list":
        parts = [_made(v, args) for v in what[1]]
        return what[0](*parts) if hasattr(what[0], "_fields") else what[0](parts)
    if kind == "dict":
        return what[0](**{k: _made(v, args) for k, v in what[1].items()})
    return what[0]
