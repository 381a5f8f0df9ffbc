"""Which blocks of a model repeat, and the model with four periods of them (`bursar.folding`).

Blocks are alike when their modules have the same classes, the same settings and parameters of the same shapes; a number
that counts the blocks (a layer's index) may differ. That is a promise only: `folding` holds the traced blocks to it,
and `skim` the calls of all others.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bursar.folding import KEPT, Trunk

LEAST = 6  # periods from which on leaving some out is worth it
_PLAIN = (int, float, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size, type)
_OWN = frozenset({"_parameters", "_buffers", "_modules", "training"})


def find(module: nn.Module, least: int = LEAST) -> list[Trunk]:
    """The trunks of ``module``: its outermost lists in which a pattern of blocks repeats ``least`` times or more."""
    counts: dict[int, int] = {}
    for _, child in module.named_modules(remove_duplicate=False):
        counts[id(child)] = counts.get(id(child), 0) + 1
        for tensor in (*child._parameters.values(), *child._buffers.values()):
            counts[id(tensor)] = counts.get(id(tensor), 0) + 1
    return list(_find(module, "", least, counts))


def _find(module: nn.Module, path: str, least: int, counts: dict[int, int]) -> Iterator[Trunk]:
    children = list(module._modules.values())
    numbered = list(module._modules) == [str(i) for i in range(len(children))]
    if isinstance(module, (nn.ModuleList, nn.Sequential)) and numbered and None not in children:
        found = _pattern(_likenesses([c for c in children if c is not None], counts), least)
        if found is not None and any(next(c.parameters(), None) is not None for c in children if c is not None):
            yield Trunk(path, *found)
            return
    for name, child in module._modules.items():
        if child is not None:
            yield from _find(child, f"{path}.{name}" if path else name, least, counts)


def _pattern(likenesses: list[Any], least: int) -> tuple[int, int, int] | None:
    """(start, period, periods) of the pattern that leaves the fewest blocks to trace, None for none."""
    best, left = None, len(likenesses) + 1
    for period in range(1, len(likenesses) // least + 1):
        start = 0
        while start + least * period <= len(likenesses):
            end = start + period
            while end < len(likenesses) and likenesses[end] == likenesses[end - period]:
                end += 1
            periods = (end - start) // period
            traced = len(likenesses) - (periods - KEPT) * period
            if periods >= least and traced < left:
                best, left = (start, period, periods), traced
            start = max(start + 1, end - period + 1)
    return best


def _likenesses(blocks: list[nn.Module], counts: dict[int, int]) -> list[Any]:
    """One value per block; equal where the blocks are alike."""
    described = [_describe(block, counts) for block in blocks]
    kinds: dict[Any, list[int]] = {}  # blocks that differ in numbers at most
    for i, values in enumerate(described):
        kinds.setdefault(tuple(int if type(v) is int else v for v in values), []).append(i)
    found: list[Any] = [None] * len(blocks)
    for number, members in enumerate(kinds.values()):
        columns = list(zip(*([v for v in described[i] if type(v) is int] for i in members), strict=True))
        counting = [len({v - i for v, i in zip(column, members, strict=True)}) == 1 for column in columns]
        for place, i in enumerate(members):
            found[i] = number, *(c[place] for c, counts_up in zip(columns, counting, strict=True) if not counts_up)
    return found


def _describe(block: nn.Module, counts: dict[int, int]) -> list[Any]:
    """Everything about a block that may change what it does, in a fixed order."""
    found: list[Any] = []
    for name, module in block.named_modules(remove_duplicate=False):
        found += [name, type(module), module.training]
        for key, value in sorted(module.__dict__.items()):
            if key not in _OWN:
                found.append(key)
                found += _setting(value)
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            found.append(key)
            if tensor is not None:
                found += [type(tensor), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad]
                found.append(0 if counts[id(tensor)] == 1 else ("shared", id(tensor), id(block)))
        if counts[id(module)] > 1:
            found.append(("shared", id(module), id(block)))
    return found


def _setting(value: Any) -> Iterable[Any]:
    if isinstance(value, _PLAIN):
        return [value]
    if isinstance(value, (list, tuple)):
        return [type(value), len(value), *itertools.chain.from_iterable(map(_setting, value))]
    if isinstance(value, dict):
        return [
            type(value),
            len(value),
            *itertools.chain.from_iterable((repr(k), *_setting(v)) for k, v in value.items()),
        ]
    if isinstance(value, (set, frozenset)):
        return [type(value), frozenset(map(repr, value))]
    if isinstance(value, functools.partial):
        return [type(value), *_setting(value.func), *_setting(value.args), *_setting(value.keywords)]
    if isinstance(value, Tensor):
        return [("tensor", id(value))]
    return [("object", id(value))]  # shared by all blocks (a config), or they are not alike


def shorten(module: nn.Module, trunks: Iterable[Trunk]) -> list[nn.Module]:
    """Take the periods that are not traced out of ``module``, in place, and return their blocks."""
    taken: list[nn.Module] = []
    for trunk in trunks:
        blocks = module.get_submodule(trunk.path)
        children = list(blocks._modules.values())
        first = trunk.start + 2 * trunk.period
        last = first + trunk.extra * trunk.period
        taken += [c for c in children[first:last] if c is not None]
        names = list(blocks._modules)[: len(children) - (last - first)]
        blocks._modules = dict(zip(names, children[:first] + children[last:], strict=True))
    return taken
