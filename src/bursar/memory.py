"""Live bytes over a step, from the storages' lifetimes. No torch.

Seven classes partition the live bytes at every instant, so at the peak they add up to the peak exactly:

    parameters       the model's weights                     buffers   its other tensors
    gradients        what ends in a parameter's .grad        inputs    the batch
    optimizer_state  what the optimizer keeps per parameter
    activations      what autograd keeps for backward, and what a checkpoint's recomputation made for it
    temporary        the rest: what an op made and soon let go, and what only the user's variables still hold
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from bursar import allocator

if TYPE_CHECKING:
    import numpy as np

CLASSES = ("parameters", "gradients", "optimizer_state", "activations", "temporary", "buffers", "inputs")


class Storage:
    """One allocation. Mutable while the step runs; `memory_class` is settled when it ends."""

    __slots__ = ("freed_in", "index", "made_outside", "memory_class", "module", "n_bytes", "name", "op",
                 "owner", "phase", "row", "saved", "weight_copy")  # fmt: skip

    def __init__(self, index: int, n_bytes: int, row: int) -> None:
        self.index = index
        self.n_bytes = n_bytes
        self.row = row  # the op that made it
        self.memory_class: str | None = None
        self.op = self.module = self.name = ""
        self.owner = ""  # the parameter whose gradient or state it is
        self.phase = "forward"
        self.saved = False  # autograd keeps it for backward
        self.made_outside = False  # by a factory outside every module: a batch, most likely
        self.weight_copy = False  # a parameter in another dtype, as autocast makes it
        self.freed_in = ""

    def copy(self) -> Storage:
        """Another one like it."""
        new = Storage(self.index, self.n_bytes, self.row)  # five times as fast as copy.copy: a deep model has many
        new.memory_class, new.op, new.module, new.name = self.memory_class, self.op, self.module, self.name
        new.owner, new.phase, new.saved, new.made_outside = self.owner, self.phase, self.saved, self.made_outside
        new.weight_copy, new.freed_in = self.weight_copy, self.freed_in
        return new

    def likeness(self) -> tuple[object, ...]:
        """What two storages of blocks alike have in common."""
        return (self.n_bytes, self.memory_class, self.op, self.phase, self.saved, self.made_outside, self.weight_copy)

    def settle(self) -> None:
        """Decide the class of what nobody claimed."""
        if self.memory_class is None:
            outlived = self.phase == "recompute" and self.freed_in not in ("", "recompute")
            if self.made_outside:
                self.memory_class = "inputs"
            else:
                self.memory_class = "activations" if self.saved or outlived else "temporary"


@dataclass(frozen=True, slots=True)
class Textbook:
    """The notes' static sum, in bytes: all four at once, which no instant of a real step shows.

    Activations are the outputs of the layers that have parameters, the model's own output excepted; optimizer state is
    every tensor of it but the scalars.
    """

    parameters: int
    activations: int
    gradients: int
    optimizer_state: int

    @property
    def total(self) -> int:
        """The sum, in bytes."""
        return self.parameters + self.activations + self.gradients + self.optimizer_state


@dataclass(frozen=True, slots=True)
class Holding:
    """A storage alive at the peak."""

    memory_class: str
    module: str
    op: str
    n_bytes: int


@dataclass(frozen=True)
class Memory:
    """The step's memory on one device, in bytes."""

    peak_bytes: int
    peak_row: int  # the op during which the peak stands, as a row of the ledger
    at_peak: Mapping[str, int]
    between_steps: Mapping[str, int]
    textbook: Textbook
    event_rows: np.ndarray
    event_deltas: np.ndarray
    event_classes: np.ndarray  # indices into CLASSES
    base: Mapping[str, int]  # live bytes when the step began
    holdings: tuple[Holding, ...]  # what stands at the peak, the largest first
    event_storages: np.ndarray
    base_storages: tuple[tuple[int, int], ...]  # (storage, bytes) alive when the step began

    @cached_property
    def timeline(self) -> Mapping[str, np.ndarray]:
        """Live bytes of each class after each event; ``row`` says during which op."""
        import numpy as np  # here: pages that need no ledger start without it

        found: dict[str, np.ndarray] = {"row": self.event_rows}
        for i, name in enumerate(CLASSES):
            deltas = np.where(self.event_classes == i, self.event_deltas, 0)
            found[name] = self.base[name] + np.cumsum(deltas)
        return found

    @cached_property
    def held(self) -> allocator.Held:
        """What CUDA's caching allocator would hand out and hold for this step: see `bursar.allocator`."""
        return self.replayed()

    def replayed(self, *, expandable_segments: bool = False) -> allocator.Held:
        """The same with the allocator's option ``expandable_segments``, say."""
        import numpy as np

        base = np.array(self.base_storages, np.int64).reshape(-1, 2)
        return allocator.replay(
            np.concatenate([base[:, 0], self.event_storages]),
            np.concatenate([base[:, 1], self.event_deltas]),
            expandable_segments=expandable_segments,
        )

    @property
    def allocated_bytes(self) -> int:
        """The peak after the allocator's rounding."""
        return self.held.allocated_bytes

    @property
    def reserved_bytes(self) -> int:
        """The bytes of the allocator's segments."""
        return self.held.reserved_bytes

    @cached_property
    def after_forward(self) -> Mapping[str, int]:
        """Live bytes by class at the fullest moment of the activations."""
        kept = self.timeline["activations"]
        i = int(kept.argmax()) if len(kept) else -1
        return {c: int(self.timeline[c][i]) if len(kept) else self.base[c] for c in CLASSES}

    @property
    def saved_activations(self) -> int:
        """The bytes autograd keeps for backward, at their fullest; the notes count the layers' outputs instead."""
        return self.after_forward["activations"]

    def course(self, columns: int) -> Mapping[str, list[int]]:
        """Live bytes by class in ``columns``: before the step, the most in each of its equal stretches, after it.

        ``row`` is the op each ends with, as a row of the ledger.
        """
        import numpy as np

        n = len(self.event_rows)
        if not n:
            return {"row": [0], **{c: [self.base[c]] for c in CLASSES}}
        first, last = int(self.event_rows[0]), int(self.event_rows[-1])
        ends = np.linspace(first, last, columns - 1)[1:]
        cuts = [0, *np.searchsorted(self.event_rows, ends, side="right").tolist()]
        found: dict[str, list[int]] = {"row": [first, *(int(e) for e in ends), last]}
        for c in CLASSES:
            live = self.timeline[c]
            values = [self.base[c]]
            for start, stop in itertools.pairwise(cuts):
                before = int(live[start - 1]) if start else self.base[c]
                values.append(max(before, int(live[start:stop].max(initial=0))))
            found[c] = [*values, int(live[-1])]
        return found


def replay(
    storages: Sequence[Storage],
    events: Sequence[tuple[int, int, int]],
    first_event: int,
    textbook: Textbook,
    buckets: bool = False,
) -> Memory:
    """Walk the allocations and frees from ``first_event`` on; those before it are what the step starts from.

    With ``buckets`` the gradients live in DDP's buckets (gradient_as_bucket_view), which stand from step to step.
    """
    import numpy as np

    base = dict.fromkeys(CLASSES, 0)
    start: dict[int, int] = {}
    for _, storage, delta in events[:first_event]:
        start[storage] = start.get(storage, 0) + delta
    for storage, n_bytes in start.items():
        if n_bytes:
            base[_class(storages[storage])] += n_bytes
    step = events[first_event:]
    if buckets:
        step = [e for e in step if storages[e[1]].memory_class != "gradients"]
        base["gradients"] = textbook.gradients
    rows, ids, deltas = (np.array(column, np.int64) for column in (zip(*step, strict=True) if step else ((), (), ())))
    number = {name: i for i, name in enumerate(CLASSES)}
    classes = np.fromiter((number[_class(s)] for s in storages), np.int8, len(storages))[ids]
    at_start = sum(base.values())
    live = at_start + np.cumsum(deltas)
    i = int(live.argmax()) if len(step) else -1
    peak = int(live[i]) if len(step) else at_start
    if peak <= at_start:
        i, peak = -1, at_start
    upto = slice(0, i + 1)
    at_peak = {c: base[c] + int(deltas[upto][classes[upto] == number[c]].sum()) for c in CLASSES}
    end = {c: base[c] + int(deltas[classes == number[c]].sum()) for c in CLASSES}
    alive = {k: n for k, n in start.items() if not (buckets and storages[k].memory_class == "gradients")}
    if buckets and textbook.gradients:
        alive[-1] = textbook.gradients
    held = np.zeros(len(storages), np.int64)
    np.add.at(held, ids[upto], deltas[upto])
    for k, n in alive.items():
        if k >= 0:
            held[k] += n
    standing = ((storages[k], int(held[k])) for k in np.flatnonzero(held).tolist())
    holdings = sorted(
        (Holding(_class(s), s.name or s.module, s.op, n) for s, n in standing),
        key=lambda h: (-h.n_bytes, h.module, h.op),
    )
    return Memory(
        peak, int(rows[i]) if i >= 0 else 0, at_peak, end, textbook, rows, deltas, classes, base, tuple(holdings), ids,
        tuple((k, n) for k, n in alive.items() if n),
    )  # fmt: skip


def _class(storage: Storage) -> str:
    return storage.memory_class or "temporary"
