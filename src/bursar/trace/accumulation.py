"""Which of autograd's sums of two gradients are done in place.

Where a tensor is used twice, the engine adds its two gradients: into the first if nobody else holds it, else into the
second, else into a new tensor (torch/csrc/autograd/input_buffer.cpp, `accumulate`). It never adds into a subclass, and
a fake tensor is one; a trace that followed it would hold one gradient too many there. Here the engine's test is made
again, on the counts of references; what "nobody else" looks like is learnt once, from a gradient of which it is true.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

ADD = torch.ops.aten.add.Tensor
ADD_IN_PLACE = torch.ops.aten.add_.Tensor
Counts = tuple[int, int]  # of a tensor and of its storage


def counts(tensor: torch.Tensor) -> Counts:
    """How many hold ``tensor`` and its storage, those that hand it to a dispatch mode included."""
    return tensor._use_count(), torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # type: ignore[attr-defined]


@functools.cache
def held_by_engine_alone() -> Counts | None:
    """`counts` of a gradient that only the engine's buffer holds, seen from a mode; None where torch hides it."""
    if not hasattr(torch.Tensor, "_use_count"):
        return None
    found: list[Counts] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is ADD and not torch.is_grad_enabled():
                found.append(counts(args[0]))
            return func(*args, **(kwargs or {}))

    with torch.enable_grad(), FakeTensorMode(), Watch():  # type: ignore[no-untyped-call]
        twice = torch.empty(2, device="cpu", requires_grad=True) * 2
        torch.autograd.backward((twice * 3).sum() + (twice * 5).sum())
    return found[0] if len(found) == 1 else None


def into(args: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(the gradient that the engine adds into, the other) where it would add in place; None for a new tensor."""
    alone = held_by_engine_alone()
    if alone is None or len(args) != 2 or not all(isinstance(a, torch.Tensor) and not a.is_sparse for a in args):
        return None
    a, b = args
    if a.shape != b.shape or a.dtype != b.dtype:
        return None  # not two gradients of one tensor: a formula of backward adds something up
    for target, other in ((a, b), (b, a)):
        if counts(target) == alone and target.is_contiguous():
            return target, other
    return None
