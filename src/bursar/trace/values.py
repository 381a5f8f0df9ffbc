"""The values a trace does know: of tensors made of constants alone, so that code may look at them.

A fake tensor has a shape and no data. But a position table, a mask of ones, `torch.linspace(0, 0.1, 12)` depend on no
data either, and models ask for them: is anything masked, how wide is the window. What is made of constants is computed
beside the trace, on the host, and a look at it is answered as a real run would answer. A look at anything else stays an
error (`failures`), except for what is listed in `_assume`: there the answer is an assumption, and the ledger says so.

One real buffer stands for one fake storage, so views need no following: each is the same window of the buffer.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch

aten = torch.ops.aten
MAX_ELEMENTS = 2**17  # positions and masks of padding are smaller; S × S masks are not looked at, and cost 10 ms each
MAX_FLOATS = 2**13  # numbers that are looked at are few: rates, scales, a table's bounds
MAX_ASSUMED_ELEMENTS = 2**23  # which token goes to which expert, one-hot, is larger and asked for more often

BALANCED = "routing is balanced: every expert gets its equal share of the tokens"
FINITE = "where the model asks whether its numbers are finite, they are"
PICTURES = "where the model asks which pictures are blank (padding), none is"
AVERAGE_DRAW = "a single random number that decides something is taken as 0.5 (no layer is dropped at random)"

_UNSET = frozenset({"aten.empty", "aten.empty_like", "aten.empty_strided", "aten.empty_permuted", "aten.new_empty",
                    "aten.new_empty_strided", "aten.resize_", "aten.set_"})  # fmt: skip
# Their values do not depend on those of the tensor they are given
_FILLS = {"aten.zeros_like": 0, "aten.new_zeros": 0, "aten.ones_like": 1, "aten.new_ones": 1}
_ASKS_FINITE = frozenset({"aten.eq", "aten.ne", "aten.isinf", "aten.isnan"})
_OVERWRITE = frozenset({"aten.fill_", "aten.zero_", "aten.copy_"})


@dataclass(slots=True)
class _Buffer:
    """The values of one storage, one-dimensional on the host, and the assumption they rest on, if any."""

    data: torch.Tensor
    assumption: str
    storage: Any  # a weak reference to the fake storage, whose death forgets this


class Values:
    """What is known of the fake tensors of one trace."""

    def __init__(self) -> None:
        self._buffers: dict[int, _Buffer] = {}
        self.relied_on: dict[str, None] = {}  # the assumptions that answered a question, in order

    # ---- asking

    def of(self, tensor: Any) -> torch.Tensor | None:
        """The values of ``tensor``, on the host, or None where they are not known. Do not write to it."""
        if not self._buffers or tensor.layout is not torch.strided:  # a sparse tensor has no one storage
            return None
        buffer = self._buffers.get(tensor.untyped_storage()._cdata)
        if buffer is None or buffer.data.dtype != tensor.dtype:
            return None
        if tensor.untyped_storage().nbytes() > buffer.data.nbytes:  # grown since by resize_
            return None
        with no_dispatch():
            return buffer.data.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an op that needs values returns, new tensors fake; NotImplemented where they are unknown."""
        name = func._schema.name
        if name == "aten::index":  # x[mask]: where the mask is true is known, what stands there need not be
            masks = self._masks_opened(args[1])
            return NotImplemented if masks is None else func(args[0], masks)
        if name == "aten::masked_select":
            mask = self.of(args[1])
            if mask is None:
                return NotImplemented
            self._rely(args)
            with no_dispatch():
                chosen = int(mask.expand(torch.broadcast_shapes(mask.shape, args[0].shape)).sum())
            return torch.empty(chosen, dtype=args[0].dtype, device=args[0].fake_device)
        if name == "aten::_ctc_loss" and func._overloadname == "Tensor":
            lengths = [t for t in map(self.of, args[2:4]) if t is not None]
            if len(lengths) < 2:
                return NotImplemented
            return aten._ctc_loss.default(*args[:2], *([int(n) for n in t.tolist()] for t in lengths), *args[4:])
        real = self._real((args, kwargs or {}))
        if real is None:
            return NotImplemented
        self._rely((args, kwargs))
        with no_dispatch():
            out = func(*real[0], **real[1])
        device = next((t.fake_device for t in _fakes((args, kwargs))), torch.device("cpu"))
        assumption = self._assumption((args, kwargs))
        return self._as_fake(out, device, assumption)

    def _as_fake(self, out: Any, device: torch.device, assumption: str) -> Any:
        if isinstance(out, torch.Tensor):
            fake = torch.empty(out.shape, dtype=out.dtype, device=device)
            self.know(fake, out, assumption)
            return fake
        if isinstance(out, (list, tuple)):
            return tuple(self._as_fake(part, device, assumption) for part in out)
        return out

    def _masks_opened(self, indices: Any) -> list[Any] | None:
        """Boolean index tensors as the positions where they are true; None when one is unknown."""
        opened: list[Any] = []
        for index in indices:
            if not isinstance(index, FakeTensor) or index.dtype not in (torch.bool, torch.uint8):
                opened.append(index)
                continue
            known = self.of(index)
            if known is None:
                return None
            self._rely((index,))
            with no_dispatch():
                positions = known.nonzero(as_tuple=True)
            opened += [self._as_fake(p, index.fake_device, self._assumption((index,))) for p in positions]
        return opened

    def _rely(self, arguments: Any) -> None:
        assumption = self._assumption(arguments)
        if assumption:
            self.relied_on[assumption] = None

    def _assumption(self, arguments: Any) -> str:
        for tensor in _fakes(arguments):
            buffer = self._buffers.get(tensor.untyped_storage()._cdata)
            if buffer is not None and buffer.assumption:
                return buffer.assumption
        return ""

    # ---- learning

    def know(self, fake: torch.Tensor, real: torch.Tensor, assumption: str = "") -> None:
        """From now on ``fake`` has the values of ``real``, which are copied.

        Some kernels return something else on the host (a batch norm's statistics, say): that is not known.
        """
        if real.shape != fake.shape:
            return
        with no_dispatch():
            buffer = self._new_buffer(fake, assumption)
            if buffer is not None:
                buffer.data.as_strided(fake.shape, fake.stride(), fake.storage_offset()).copy_(real)

    def _new_buffer(self, fake: torch.Tensor, assumption: str) -> _Buffer | None:
        storage = fake.untyped_storage()
        n_bytes = storage.nbytes()
        limit = _limit(fake, assumption)
        if type(n_bytes) is not int or n_bytes > limit * fake.element_size():  # a symbolic size has no values
            return None
        address, buffers = storage._cdata, self._buffers
        data = torch.empty(n_bytes // fake.element_size(), dtype=fake.dtype, device="cpu")
        found = _Buffer(data, assumption, weakref.ref(storage, lambda _: buffers.pop(address, None)))
        buffers[address] = found
        return found

    def follow(self, info: Any, func: Any, args: Any, kwargs: Any, out: Any, *, create: bool) -> None:
        """After an op ran on fake tensors: run it on the values too, if all are known; else forget what it wrote.

        With ``create`` false nothing new is learnt: optimizers ask for no values and make many.
        """
        if info.writes:
            self._written(info, func, args, kwargs, create)
            return
        if not create:
            return
        if info.name in _UNSET:  # nobody looks at what stands there before something is written
            if isinstance(out, FakeTensor) and not out.is_floating_point():
                self._fill(out, 0)
            return
        tensor = out if isinstance(out, FakeTensor) else next((t for t in _fakes((out,))), None)
        if tensor is None:
            return
        if info.name in _FILLS:
            self._fill(tensor, _FILLS[info.name])
            return
        if "nondeterministic_seeded" in info.tags or not _small(out):
            self._assume(info, args, out)
            return
        for a in args:  # most ops meet an activation first
            if isinstance(a, FakeTensor):
                if a.untyped_storage()._cdata not in self._buffers:
                    self._assume(info, args, out)
                    return
                break
        real = self._real((args, kwargs or {}))
        if real is None:
            self._assume(info, args, out)
            return
        assumption = self._assumption((args, kwargs)) if self._buffers else ""
        if not _small(out, _limit(tensor, assumption)):
            return
        with no_dispatch():
            try:
                values = func(*real[0], **real[1])
            except Exception:  # no kernel on the host, say: then it is not known
                return
        if isinstance(out, FakeTensor):
            self.know(out, values, assumption)
        elif isinstance(out, (list, tuple)):
            for fake, value in zip(out, values, strict=True):
                if isinstance(fake, FakeTensor):
                    self.know(fake, value, assumption)

    def _fill(self, tensor: FakeTensor, value: int) -> None:
        with no_dispatch():
            buffer = self._new_buffer(tensor, "")
            if buffer is not None:
                buffer.data.fill_(value)

    def _written(self, info: Any, func: Any, args: Any, kwargs: Any, create: bool) -> None:
        named = {**dict(zip(info.arg_names, args, strict=False)), **(kwargs or {})}
        written = [t for name in info.writes for t in _fakes((named.get(name),))]
        if create and info.name in _OVERWRITE and written and _small(written[0]) and _whole(written[0]):
            known = self._buffers.get(written[0].untyped_storage()._cdata)
            if known is None or known.data.dtype != written[0].dtype:
                with no_dispatch():
                    self._new_buffer(written[0], self._assumption(args[1:]))
        if not self._buffers:
            return
        touched = [a for t in written if (a := t.untyped_storage()._cdata) in self._buffers]
        if not touched:
            return
        deterministic = "nondeterministic_seeded" not in info.tags
        real = self._real((args, kwargs or {})) if deterministic and create else None
        if real is not None:
            with no_dispatch():
                try:
                    func(*real[0], **real[1])
                except Exception:
                    real = None
        if real is None:
            for address in touched:
                self._buffers.pop(address, None)
            return
        assumption = self._assumption((args, kwargs))
        for address in touched:
            self._buffers[address].assumption = assumption

    def _assume(self, info: Any, args: Any, out: Any) -> None:
        """The few answers that a trace may give without knowing: a router's choice, and one random number."""
        if info.name in ("aten.topk", "aten.max", "aten.argmax"):
            chosen = out[1] if isinstance(out, (list, tuple)) and len(out) == 2 else out
            x = args[0]
            if not isinstance(chosen, FakeTensor) or chosen.dtype != torch.int64 or not x.dim() or not chosen.dim():
                return
            if not x.is_floating_point():
                return
            at = {"aten.topk": 2, "aten.max": 1, "aten.argmax": 1}[info.name]
            dim = args[at] if len(args) > at and args[at] is not None else -1
            experts = x.shape[dim]
            if type(experts) is int and _small(chosen, MAX_ASSUMED_ELEMENTS):
                with no_dispatch():
                    turns = torch.arange(chosen.numel(), device="cpu").remainder_(max(experts, 1)).view(chosen.shape)
                self.know(chosen, turns, BALANCED)
        elif info.name == "aten.eq" and type(args[1]) in (int, float) and not args[1] and args[0].dim() > 3:
            if args[0].is_floating_point() and _small(out):
                with no_dispatch():
                    self.know(out, torch.zeros((), dtype=torch.bool, device="cpu").expand(tuple(out.shape)), PICTURES)
        elif info.name in _ASKS_FINITE and isinstance(out, FakeTensor) and _small(out):
            # isfinite(x) is x == x and |x| != inf, isnan(x) is x != x
            if info.name in ("aten.isinf", "aten.isnan") or (
                args[0] is args[1] or (type(args[1]) is float and args[1] == float("inf"))
            ):
                answer = info.name == "aten.eq" or (info.name == "aten.ne" and args[0] is not args[1])
                with no_dispatch():
                    same = torch.full((), answer, device="cpu").expand(tuple(out.shape))
                self.know(out, same, FINITE)
        elif info.name in ("aten.rand", "aten.uniform_") and isinstance(out, FakeTensor) and out.numel() == 1:
            with no_dispatch():
                half = torch.full(tuple(out.shape), 0.5, dtype=out.dtype, device="cpu")
            self.know(out, half, AVERAGE_DRAW)

    def _real(self, value: Any) -> Any:
        """``value`` with every fake tensor replaced by its values, devices by the host; None when one is unknown."""
        if isinstance(value, torch.Tensor):
            return self.of(value) if isinstance(value, FakeTensor) else value
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if isinstance(value, (list, tuple)):
            parts = []
            for part in value:
                real = self._real(part)
                if real is None and part is not None:
                    return None
                parts.append(real)
            return type(value)(parts) if type(value) in (list, tuple) else parts
        if isinstance(value, dict):
            found = {}
            for key, part in value.items():
                real = self._real(part)
                if real is None and part is not None:
                    return None
                found[key] = real
            return found
        return value


def _limit(tensor: torch.Tensor, assumption: str) -> int:
    """How many elements of such a tensor are worth computing."""
    if assumption:
        return MAX_ASSUMED_ELEMENTS
    return MAX_FLOATS if tensor.is_floating_point() else MAX_ELEMENTS


def _fakes(value: Any) -> Iterator[FakeTensor]:
    if isinstance(value, FakeTensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _fakes(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _fakes(part)


def _small(value: Any, limit: int = MAX_ASSUMED_ELEMENTS) -> bool:
    """Whether all tensors in ``value`` have a known size within the limit."""
    for tensor in _fakes(value):
        n = 1
        for size in tensor.shape:
            if type(size) is not int:
                return False
            n *= size
        if n > limit:
            return False
    return True


def _whole(tensor: FakeTensor) -> bool:
    """Whether a write to ``tensor`` writes all of its storage."""
    n_bytes = tensor.untyped_storage().nbytes()
    return type(n_bytes) is int and tensor.is_contiguous() and tensor.numel() * tensor.element_size() == n_bytes
