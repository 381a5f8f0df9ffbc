"""What each module of a model costs: its share of a step's FLOPs, bytes moved, roofline seconds and peak. No torch.

The shares add up to the step's own figures, for they are groupings of the same rows and storages. What an optimizer
does is one share of its own, and what runs outside every module stands under the empty name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from bursar.hardware import Accelerator
from bursar.ledger import Ledger
from bursar.memory import Storage
from bursar.roofline import op_seconds

OPTIMIZER = "optimizer step"


class Share(NamedTuple):
    """One module's part of a step, or each of ``copies`` alike whose first number rises by one."""

    module: str
    copies: int
    flops: int  # all kinds and phases; of the whole job, as `Ledger.flops`
    bytes_moved: int
    bytes_at_peak: int  # of what it owns or made, alive when the device's memory is fullest
    roofline_seconds: float | None  # None without a device


def numbered(path: str) -> tuple[str, int, str] | None:
    """``path`` around its first number; None where it has none.

    >>> numbered("model.layers.7.mlp.up"), numbered("head")
    (('model.layers', 7, 'mlp.up'), None)
    """
    names = path.split(".")
    at = next((i for i, name in enumerate(names) if name.isdecimal() and name == str(int(name))), None)
    if at is None:
        return None
    return ".".join(names[:at]), int(names[at]), ".".join(names[at + 1 :])


def joined(stem: str, number: int | str, rest: str) -> str:
    """The path of these parts: the reverse of `numbered`."""
    return ".".join(part for part in (stem, str(number), rest) if part)


def label(path: str, copies: int = 1) -> str:
    """How a page writes a module, or several alike.

    >>> label("layers.0.mlp", 12), label("head"), label("")
    ('layers.0–11.mlp', 'head', '(outside modules)')
    """
    parts = numbered(path) if copies > 1 else None
    if parts is None:
        return path or "(outside modules)"
    stem, first, rest = parts
    return joined(stem, f"{first}–{first + copies - 1}", rest)


def shares(ledger: Ledger, device: Accelerator | None = None) -> list[Share]:
    """Every module's share of ``ledger``'s step, in order of forward, neighbours alike folded.

    Raises BadInput for a dtype that ``device`` cannot multiply.
    """
    flops: dict[str, int] = {}
    moved: dict[str, int] = {}
    seconds: dict[str, list[float]] = {}
    for row in ledger.recorded:
        path, work = OPTIMIZER if row.phase == "optimizer" else row.module, row.work
        flops[path] = flops.get(path, 0) + (work.flops + work.recompute_flops) * ledger.replicas
        moved[path] = moved.get(path, 0) + work.read_bytes + work.written_bytes
        if device is not None:
            seconds.setdefault(path, []).append(max(op_seconds(row, device)))
    standing = _at_peak(ledger)
    return folded(
        Share(
            path,
            1,
            flops.get(path, 0),
            moved.get(path, 0),
            standing.get(path, 0),
            None if device is None else math.fsum(seconds.get(path, ())),
        )
        for path in {**flops, **standing}
    )


def folded(found: Iterable[Share]) -> list[Share]:
    """Shares alike but for their first number, which rises by one, as one each; in order of the first."""
    made: list[Share] = []
    runs: dict[tuple[str, str], int] = {}  # stem, rest -> the run that may go on
    for share in found:
        parts = numbered(share.module)
        if parts is None:
            made.append(share)
            continue
        stem, number, rest = parts
        at = runs.get((stem, rest))
        if at is not None:
            run = made[at]
            begun = numbered(run.module)
            if begun is not None and begun[1] + run.copies == number and run[2:] == share[2:]:
                made[at] = run._replace(copies=run.copies + 1)
                continue
        runs[stem, rest] = len(made)
        made.append(share)
    return made


def unfolded(found: Iterable[Share]) -> Iterator[Share]:
    """Every module by itself: the reverse of `folded`."""
    for share in found:
        parts = numbered(share.module)
        if parts is None:
            yield share
            continue
        stem, first, rest = parts
        for n in range(share.copies):
            yield share._replace(module=joined(stem, first + n, rest), copies=1)


def _at_peak(ledger: Ledger) -> dict[str, int]:
    """The bytes at the peak by module; DDP's buckets, which are all modules' gradients, under the empty name."""
    found: dict[str, int] = {}
    for (_, path), n_bytes in owners_at_peak(ledger).items():
        found[path] = found.get(path, 0) + n_bytes
    return found


def owners_at_peak(ledger: Ledger) -> dict[tuple[str, str], int]:
    """The bytes at the peak by (class, module): the module whose they are, else the one that made them."""
    memory = ledger.memory
    live = memory.event_deltas.cumsum()
    upto = int(live.argmax()) + 1 if len(live) and live.max() > 0 else 0
    found: dict[tuple[str, str], int] = {}
    step = zip(memory.event_storages[:upto].tolist(), memory.event_deltas[:upto].tolist(), strict=True)
    for index, n_bytes in (*memory.base_storages, *step):
        storage = None if index < 0 else ledger.storages[index]
        key = ("gradients", "") if storage is None else (storage.memory_class or "temporary", _owner(storage))
        found[key] = found.get(key, 0) + n_bytes
    return {key: n_bytes for key, n_bytes in found.items() if n_bytes}


def _owner(storage: Storage) -> str:
    """The module whose parameter, buffer, gradient or state it is, else the one that made it."""
    if storage.memory_class in ("parameters", "buffers", "gradients", "optimizer_state"):
        tensor = storage.owner or storage.name
        if tensor:
            return tensor.rpartition(".")[0]
    return OPTIMIZER if storage.phase == "optimizer" else storage.module
