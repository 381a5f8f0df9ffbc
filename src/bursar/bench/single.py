"""One op run by itself, as a step would run it: the same shapes and strides, its operands as near or as far.

Before each repeat the core's own cache is filled with other data; then what the step would find there is read into it
again. Large operands that come from afar take turns, so that they do.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch

from bursar.bench import clock
from bursar.context import FAR, HOT, State, arguments, distinct, n_bytes, operands
from bursar.ledger import Call, Operand

FAR_BYTES = 32 * 2**20  # operands take turns over this much, as far as the pool's cap allows
MOST_COPIES = 16
EVICT_BYTES = 4 * 2**20
FRESH_BYTES = 2**25  # larger blocks come from the system each time
MOST_BYTES = 2 * 2**30  # an op with larger operands is not benchmarked by itself


class Bench:
    """Runs calls. One per calibration or forecast: it holds the buffer that clears the cache."""

    def __init__(self, cache_bytes: int) -> None:
        self._evict = torch.zeros(max(EVICT_BYTES, 2 * cache_bytes) // 4)
        self._maker = torch.Generator().manual_seed(0)
        self._floats = torch.rand(2**20, generator=self._maker).add_(0.25)
        self.spreads: list[float] = []  # of each call, half the quartile range over the median

    def seconds(self, call: Call, state: State, budget: float = 6e-3) -> float | None:
        """Seconds of ``call`` in ``state``; None for what cannot be run by itself."""
        tensors = arguments(call)
        total = sum(b for _, b in distinct(tensors)) + sum(map(n_bytes, call.outputs))
        if total > MOST_BYTES or any(len(t.stride) != len(t.shape) for t in tensors):
            return None
        try:
            op: Any = torch.ops
            for part in call.op.split("."):
                op = getattr(op, part)
            with torch.enable_grad():  # some kernels ask whether backward will come; no operand wants a gradient
                return self._run(op, call, state, total, budget)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError):
            return None

    def _run(self, op: Any, call: Call, state: State, total: int, budget: float) -> float:
        tensors = arguments(call)
        level = dict(zip((s for s, _ in distinct(tensors)), state.inputs, strict=False))
        if state.code == HOT:  # no sweep then: what is not in the core's cache has to be reached by turns
            level = {s: FAR if at else HOT for s, at in level.items()}
        cold = {s for s, at in level.items() if at == FAR}
        copies = min(MOST_COPIES, max(1, FAR_BYTES // max(total, 1))) if cold and total > EVICT_BYTES // 16 else 1
        shared: dict[Any, torch.Tensor] = {}
        sets = [self._filled(op, call, {} if i else shared, shared, level) for i in range(copies)]
        op = _made_ready(op, call, sets)
        turns = itertools.cycle(sets)
        now: list[Any] = [None]
        warm_output = state.output == HOT and call.outputs
        quiet = state.code == HOT
        made = max((n_bytes(o) for o in call.outputs), default=0)
        kept = min(MOST_COPIES, FAR_BYTES // made) if state.output == FAR and FRESH_BYTES > made >= 2**16 else 0
        ring: deque[Any] = deque(maxlen=kept)  # outputs held so long that the next one's block was touched long ago

        def before() -> None:
            now[0] = next(turns)
            if not quiet:
                self._evict.add_(1.0)
            for tensor in now[0][2]:
                if tensor.numel() < 2**19:
                    tensor.sum() if tensor.is_floating_point() else tensor.max()
            if warm_output:
                for out in call.outputs:
                    torch.empty(out.shape, dtype=getattr(torch, out.dtype)).zero_()

        def run() -> None:
            out = op(*now[0][0], **now[0][1])
            if kept:
                ring.append(out)

        warm = max(kept + 2 if kept else 2, min(copies, 3))
        found, spread = clock.median(run, before=before, budget=budget, warm=warm)
        self.spreads.append(spread)
        return found

    def _filled(
        self, op: Any, call: Call, own: dict[Any, torch.Tensor], shared: dict[Any, torch.Tensor], level: dict[int, int]
    ) -> tuple[tuple[Any, ...], dict[str, Any], list[torch.Tensor]]:
        """Arguments made real: storages that are far are of this set's own, the others those of ``shared``."""
        names = [a.name for a in op._schema.arguments]
        limits = _limits(call, names)
        hot: list[torch.Tensor] = []
        numbers = itertools.count()
        by_storage: dict[int, list[Operand]] = {}
        for i, t in enumerate(arguments(call)):
            by_storage.setdefault(t.storage if t.storage >= 0 else -1 - i, []).append(t)

        def fill(value: Any, limit: int) -> Any:
            if isinstance(value, Operand):
                i = next(numbers)
                key = value.storage if value.storage >= 0 else -1 - i
                where = own if level.get(key) == FAR else shared
                size = max(_extent(t) for t in by_storage[key])
                base = where.get((key, value.dtype))
                if base is None:
                    base = where[(key, value.dtype)] = self._values(size, value.dtype, limit)
                made = base.as_strided(value.shape, value.stride)
                if level.get(key) == HOT:
                    hot.append(made)
                return made
            if isinstance(value, tuple):
                return [fill(v, limit) for v in value]
            return value

        args = tuple(fill(a, limits.get(n, 2)) for n, a in zip(names, call.args, strict=False))
        kwargs = {k: fill(v, limits.get(k, 2)) for k, v in call.kwargs}
        return args, kwargs, hot

    def _values(self, size: int, dtype: str, limit: int) -> torch.Tensor:
        kind: torch.dtype = getattr(torch, dtype)
        if kind.is_floating_point or kind.is_complex:
            made = torch.empty(size, dtype=kind)
            whole = size // len(self._floats) * len(self._floats)
            made[:whole].view(-1, len(self._floats)).copy_(self._floats)
            made[whole:].copy_(self._floats[: size - whole])
            return made
        if kind is torch.bool:
            return torch.rand(size, generator=self._maker) > 0.5
        return torch.randint(max(1, min(limit, 2**31)), (size,), generator=self._maker).to(kind)


def _made_ready(op: Any, call: Call, sets: list[Any]) -> Any:
    """What the values of some arguments have to be for the op to run as it does in a step: seen to, in ``sets``.

    Raises NotImplementedError for an op that takes what only another op can make.
    """
    base = call.op.split(".")[1]
    if base == "_grouped_mm":  # rows are shared out evenly; the offsets are where each expert's end
        for args, kwargs, _ in sets:
            offsets = args[2] if len(args) > 2 else kwargs["offs"]
            rows = args[0].shape[-1] if args[0].dim() == 2 and args[1].dim() == 2 else args[0].shape[0]
            offsets.copy_(torch.linspace(0, rows, len(offsets) + 1)[1:])
    elif base == "mkldnn_rnn_layer_backward":  # its workspace is the library's own: the forward op makes it
        for i, (args, kwargs, hot) in enumerate(sets):
            x, w0, w1, w2, w3, hx, cx = args[:7]
            reverse, mode, hidden, layers, has_biases, _, bidirectional, sizes, batch_first = args[13:22]
            out = torch.ops.aten.mkldnn_rnn_layer(  # with gradients enabled, else it makes none
                x,
                w0,
                w1,
                w2,
                w3,
                hx,
                cx,
                reverse,
                sizes,
                mode,
                hidden,
                layers,
                has_biases,
                bidirectional,
                batch_first,
                True,
            )
            given = [*args]
            given[7:10], given[22] = out[:3], out[3]
            sets[i] = (given, kwargs, hot)
    elif any(a.name in _OPAQUE for a in op._schema.arguments):
        raise NotImplementedError(f"{call.op} takes what only its forward can make")
    return op


_OPAQUE = ("workspace", "reserve", "reserveSpace", "weight_buf", "rng_state", "philox_seed")


def _extent(t: Operand) -> int:
    """Elements of the storage that a tensor reaches into."""
    if 0 in t.shape:
        return 1
    return 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride, strict=True))


def _limits(call: Call, names: Iterable[str]) -> dict[str, int]:
    """What whole numbers may be, by argument: rows of a table, classes, places along a dimension. Else 0 and 1."""
    given = {**dict(zip(names, call.args, strict=False)), **dict(call.kwargs)}
    base = call.op.split(".")[1].rstrip("_")

    def shape(name: str) -> tuple[int, ...]:
        found = next(operands(given.get(name)), None)
        return found.shape if found is not None else (2,)

    known: dict[str, Callable[[], dict[str, int]]] = {
        "embedding": lambda: {"indices": shape("weight")[0]},
        "embedding_dense_backward": lambda: {"indices": int(given["num_weights"])},
        "nll_loss_forward": lambda: {"target": shape("self")[-1]},
        "nll_loss_backward": lambda: {"target": shape("self")[-1]},
        "nll_loss2d_forward": lambda: {"target": shape("self")[1]},
        "nll_loss2d_backward": lambda: {"target": shape("self")[1]},
        "max_pool2d_with_indices_backward": lambda: {"indices": shape("self")[-1] * shape("self")[-2]},
        "index": lambda: {"indices": min(shape("self"))},
        "index_put": lambda: {"indices": min(shape("self"))},
    }
    if base in known:
        return known[base]()
    dim = given.get("dim")
    if (
        isinstance(given.get("index"), Operand)
        and isinstance(dim, int)
        and -len(shape("self")) <= dim < len(shape("self"))
    ):
        return {"index": shape("self")[dim]}
    return {}
