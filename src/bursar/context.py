"""In what state a step's ops run: what of their operands is still in cache, and what is called around them. No torch.

An op's seconds depend on where its operands are. Each input was touched some bytes ago (its reuse distance: all that
moved in between); past the size of the core's own cache it has to come from further away, and past some of that from
memory, for the last cache is shared with whoever else runs here. The same goes for the op's code, and for the block
that its output gets: the allocator hands out the block freed last of that size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from bursar.ledger import Call, Ledger, Operand

HOT, NEAR, FAR = 0, 1, 2
FAR_CACHES = 8  # a distance of this many of the core's own caches is far


class State(NamedTuple):
    """Where one call finds what it needs: `HOT` in the core's own cache, `NEAR` it, or `FAR` away."""

    inputs: tuple[int, ...]  # by distinct storage, in the order of the arguments
    output: int
    code: int  # HOT or NEAR


@dataclass(frozen=True, slots=True)
class Placed:
    """A row's call in its place in the step."""

    call: Call
    state: State
    phase: str
    new_site: bool  # the first op of a call made in Python
    entered: bool  # the first op of another module than the row before's
    stream: float  # of the core's own cache, the share that the row before streamed through: 1 where all of it
    cold: float  # of the bytes of its inputs, the share that comes from afar, what is near counted half


def operands(value: Any) -> Iterator[Operand]:
    """Every tensor among the arguments of a `Call`, lists walked through."""
    if isinstance(value, Operand):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from operands(part)


def arguments(call: Call) -> tuple[Operand, ...]:
    """Its tensors, positional first."""
    return (*operands(call.args), *(o for _, value in call.kwargs for o in operands(value)))


SIZES = {"float64": 8, "int64": 8, "complex64": 8, "complex128": 16, "float16": 2, "bfloat16": 2, "int16": 2, "bool": 1,
         "int8": 1, "uint8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1}  # fmt: skip


def n_bytes(tensor: Operand) -> int:
    """Bytes it reads or writes: elements that are stored, each once."""
    found = SIZES.get(tensor.dtype, 4)
    for size, stride in zip(tensor.shape, tensor.stride, strict=False):
        found *= size if stride else 1
    return found


def distinct(tensors: tuple[Operand, ...]) -> list[tuple[int, int]]:
    """(storage, bytes) of each storage among ``tensors``, in order; a tensor without one stands alone."""
    found: dict[int, int] = {}
    for i, t in enumerate(tensors):
        key = t.storage if t.storage >= 0 else -1 - i
        found[key] = max(found.get(key, 0), n_bytes(t))
    return list(found.items())


def placed(ledger: Ledger, cache_bytes: int) -> list[Placed]:
    """Each recorded row's call with its state, on a core whose own cache holds ``cache_bytes``.

    The step is walked twice: what the second pass finds is what the step before left behind.
    """
    rows, calls = ledger.recorded, ledger.calls
    frees = _freed(ledger)
    last = 0
    touched: dict[int, int] = {}
    ran: dict[str, int] = {}
    blocks: dict[int, list[int]] = {}  # bytes of a freed block -> when those of this size were last touched
    clock = 0
    found: list[Placed] = []
    for turn in range(2):
        before = None
        for i, (row, call) in enumerate(zip(rows, calls, strict=True)):
            inputs = distinct(arguments(call))
            moved = sum(b for _, b in inputs) + sum(map(n_bytes, call.outputs))
            level = tuple(_level(clock - touched.get(s, -(10**15)), cache_bytes) for s, _ in inputs)
            output = FAR if call.outputs else HOT
            for out in call.outputs:
                size = ledger.storages[out.storage].n_bytes if out.storage >= 0 else 0
                if stack := blocks.get(size):
                    output = _level(clock - stack.pop(), cache_bytes)
            code = min(NEAR, _level(clock - ran.get(call.op, -(10**15)), cache_bytes))
            clock += moved
            ran[call.op] = clock
            for storage, _ in inputs:
                touched[storage] = clock
            for out in call.outputs:
                touched[out.storage] = clock
            for storage in frees.get(i, ()):
                blocks.setdefault(ledger.storages[storage].n_bytes, []).append(touched.get(storage, clock))
            if turn:
                far = sum(b * at / FAR for (_, b), at in zip(inputs, level, strict=True))
                found.append(
                    Placed(
                        call,
                        State(level, output, code),
                        row.phase,
                        before is None or call.site != before[0],
                        before is not None and row.module != before[1],
                        min(1.0, last / cache_bytes),
                        far / max(1, sum(b for _, b in inputs)),
                    )
                )
            last = moved
            before = (call.site, row.module)
    return found


def _level(distance: int, cache_bytes: int) -> int:
    return HOT if distance <= cache_bytes else NEAR if distance <= FAR_CACHES * cache_bytes else FAR


def _freed(ledger: Ledger) -> dict[int, list[int]]:
    """The storages freed after each recorded row."""
    found: dict[int, list[int]] = {}
    for row, storage, delta in ledger.events[ledger.first_event :]:
        if delta < 0:
            found.setdefault(row - ledger.first_row, []).append(storage)
    return found


def signature(call: Call, state: State) -> str:
    """What tells this call's seconds from another's: op, shapes, strides, dtypes, whole numbers, state.

    Real numbers are left out (a step size changes with every step and costs nothing), and so are storages, but for
    which operands share one.
    """
    names: dict[int, int] = {}
    level = "".join(map(str, (*state.inputs, state.output, state.code)))
    parts = [call.op, *(_written(a, names) for a in call.args), *(f"{k}={_written(v, names)}" for k, v in call.kwargs)]
    return f"{' '.join(parts)} @{level}"


def _written(value: Any, names: dict[int, int]) -> str:
    if isinstance(value, Operand):
        shape, stride = "x".join(map(str, value.shape)), ",".join(map(str, value.stride))
        contiguous = stride == ",".join(map(str, _contiguous(value.shape)))
        name = names.setdefault(value.storage, len(names)) if value.storage >= 0 else "-"
        return f"{value.dtype}[{shape}{'' if contiguous else ':' + stride}]{name}"
    if isinstance(value, tuple):
        return "(" + " ".join(_written(v, names) for v in value) + ")"
    return "~" if isinstance(value, float) else str(value)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    found, step = [], 1
    for size in reversed(shape):
        found.append(step)
        step *= max(1, size)
    return tuple(reversed(found))
