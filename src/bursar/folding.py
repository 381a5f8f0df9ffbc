"""A deep model's ledger from a shallow copy of it, traced: what one block costs, its like cost too. No torch.

A trunk is a list of blocks in which a pattern (one block, or several in turn) repeats. Of the trunk's periods only four
are traced, P0 P1 P2 P3, the ends and two alike between them; the others are copies of those two:

    forward    P0 P1 | P2 ... P2 | P2 P3        a copy refers to itself and to its neighbour, as P2 refers to P1
    backward   P3 P2 | P1 ... P1 | P1 P0        as P1 refers to P2
    optimizer  one row for a list of tensors: the list grows; a loop over parameters: as forward

Nothing is taken on trust. P1 and P2 must be alike row for row, storage for storage and event for event, or
`Unfoldable` is raised and the whole model is traced instead.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from bursar import rules
from bursar.ledger import Ledger, Row
from bursar.memory import Storage
from bursar.rules import Op

KEPT = 4  # periods traced: two ends, which may differ, and two that must not

Home = tuple[int, int]  # the period a storage belongs to, and the number of its place there
Event = tuple[Storage, int]
NAMES = ("name", "owner", "module")  # where a storage's block is written


class Unfoldable(Exception):
    """The traced copy does not repeat as its blocks promised. The message says where."""


@dataclass(frozen=True)
class Trunk:
    """A repeated part of a model: ``periods`` times ``period`` blocks of the list ``path``, from block ``start`` on."""

    path: str
    start: int
    period: int
    periods: int

    @property
    def extra(self) -> int:
        """The periods that are not traced."""
        return self.periods - KEPT

    @cached_property
    def _prefix(self) -> str:
        return f"{self.path}." if self.path else ""

    def block(self, path: str) -> int | None:
        """The block, in the traced copy, that the module or tensor called ``path`` stands in."""
        if not path.startswith(self._prefix):
            return None
        number = path[len(self._prefix) :].split(".", 1)[0]
        return int(number) if number.isdecimal() else None

    def period_of(self, path: str) -> int | None:
        """The period (0 to 3), None outside the repeated part."""
        block = self.block(path)
        if block is None or not self.start <= block < self.start + KEPT * self.period:
            return None
        return (block - self.start) // self.period

    def shifted(self, path: str, periods: int) -> str:
        """``path`` that many periods further on."""
        if not periods or not path.startswith(self._prefix):
            return path
        number, dot, rest = path[len(self._prefix) :].partition(".")
        return f"{self._prefix}{int(number) + periods * self.period}{dot}{rest}" if number.isdecimal() else path

    def in_full(self, path: str) -> str:
        """What ``path`` of the traced copy is called in the whole model."""
        block = self.block(path)
        return path if block is None or block < self.start + 2 * self.period else self.shifted(path, self.extra)

    def copies(self, path: str) -> int:
        """How often what is called ``path`` in the traced copy stands in the whole model: P2 stands for all others."""
        return 1 + self.extra if self.period_of(path) == 2 else 1


@dataclass(frozen=True, slots=True)
class Operands:
    """The tensors of a row that no module owns: the call, and the storages behind its arguments and outputs."""

    op: Op
    arguments: Mapping[str, Any]  # by name: a Storage, a tuple of them, or None
    outputs: tuple[Storage | None, ...]

    def storages(self) -> list[Storage]:
        """Those of the arguments, lists flattened."""
        found: list[Storage] = []
        for value in self.arguments.values():
            found += [s for s in (value if isinstance(value, tuple) else (value,)) if s is not None]
        return found

    def replaced(self, new: Callable[[Storage], Storage]) -> Operands:
        """The same call on other storages."""

        def one(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(one, value))
            return None if value is None else new(value)

        return Operands(self.op, {k: one(v) for k, v in self.arguments.items()}, one(self.outputs))


class Tape(NamedTuple):
    """A recorded step: what is alive when it begins, its rows, and what each (0: before the first) makes or frees."""

    alive: list[Event]
    rows: list[Row]
    events: list[list[Event]]  # one longer than rows
    operands: dict[int, Operands]


def unfold(ledger: Ledger, trunks: Sequence[Trunk], operands: Mapping[int, Operands]) -> Ledger:
    """The ledger of the whole model, of which ``ledger`` traced a copy with four periods of each trunk.

    ``operands`` are those of rows outside every module, by row. The result holds the recorded step alone, and the
    storages alive when it began. Raises Unfoldable.
    """
    collecting = gc.isenabled()
    gc.disable()  # many records, no garbage: the collector would walk all of torch for nothing, half the time here
    try:
        tape = _tape(ledger, operands)
        for i, trunk in enumerate(trunks, 1):
            tape = _Unfolding(tape, trunk).run(last=i == len(trunks))
        return _written(ledger, tape)
    finally:
        if collecting:
            gc.enable()


def _written(ledger: Ledger, tape: Tape) -> Ledger:
    storages: dict[int, int] = {}
    kept: list[Storage] = []

    def index(storage: Storage) -> int:
        storages[id(storage)] = storage.index = len(kept)
        kept.append(storage)
        return storage.index

    events = [(-1, index(s), delta) for s, delta in tape.alive]
    first_event = len(events)
    for row, here in enumerate(tape.events, -1):
        for storage, delta in here:
            at = storages.get(id(storage))
            events.append((row, index(storage) if at is None else at, delta))
    return dataclasses.replace(
        ledger, rows=tape.rows, storages=kept, events=events, first_row=0, first_event=first_event, calls=()
    )


def _tape(ledger: Ledger, operands: Mapping[int, Operands]) -> Tape:
    first = ledger.first_row
    alive: dict[int, int] = {}
    for _, storage, delta in ledger.events[: ledger.first_event]:
        alive[storage] = alive.get(storage, 0) + delta
    events: list[list[Event]] = [[] for _ in range(len(ledger.rows) - first + 1)]
    for row, storage, delta in ledger.events[ledger.first_event :]:
        events[max(row - first + 1, 0)].append((ledger.storages[storage], delta))
    return Tape(
        [(ledger.storages[s], n) for s, n in alive.items() if n],
        ledger.recorded,
        events,
        {row - first: found for row, found in operands.items() if row >= first},
    )


class _Unfolding:
    """One trunk's unfolding: homes for the storages, then every sequence spliced."""

    def __init__(self, tape: Tape, trunk: Trunk) -> None:
        self.tape, self.trunk = tape, trunk
        self.homes: dict[int, Home] = {}
        self.places: dict[Home, Storage] = {}
        self.clones: dict[Home, Storage] = {}
        self.whole: dict[Home, Storage] = {}  # by period of the whole model, copies included
        self.counts: dict[Any, int] = {}
        self.numbers: dict[Any, int] = {}  # a place (zone, maker, which of them) and its number
        self.zones: list[Any] = []  # the zone of each place
        seen = {id(s) for s, _ in tape.alive}
        self.born = [[s for s, _ in here if id(s) not in seen and not seen.add(id(s))] for here in tape.events]  # type: ignore[func-returns-value]
        self.renamed: dict[tuple[str, int], str] = {}
        self.stretch: dict[int, int] = {}  # a row's period, within a run

    def run(self, last: bool) -> Tape:
        """The longer tape; for the last trunk without the operands, which nobody will ask for."""
        tape, trunk = self.tape, self.trunk
        for storage, _ in tape.alive:
            home = next((p for p in map(trunk.period_of, map(storage.__getattribute__, NAMES)) if p is not None), None)
            self._settle(storage, home, "start")
        tags, lists = self._tags()
        order = splice(tags, self._alike, trunk.extra, [_side(row.phase) for row in tape.rows], self._claim)
        inside = {i for i, _, copied in order if copied}
        if inside & lists:
            raise Unfoldable("a row over several blocks stands between two blocks")
        self._check_near(inside)
        extra = trunk.extra
        self.whole = {(p if p < 2 else p + extra, key): s for (p, key), s in self.places.items()}
        alive = self._events(tape.alive)
        rows: list[Row] = []
        events = [self._events(tape.events[0])]
        operands: dict[int, Operands] = {}
        for i, shift, copied in order:
            row = tape.rows[i]
            known = tape.operands.get(i)
            if i in lists:
                assert known is not None
                row, known = self._longer(row, known, last)
                new = self._events(tape.events[i + 1])
            elif copied:
                row = row._replace(module=self._renamed(row.module, shift))
                new = [(self._at(s, shift), delta) for s, delta in tape.events[i + 1]]
                if known is not None and not last:
                    known = known.replaced(lambda s, shift=shift: self._at(s, shift))  # type: ignore[misc]
            else:
                row = row._replace(module=trunk.in_full(row.module))
                new = self._events(tape.events[i + 1])
            if known is not None and not last:
                operands[len(rows)] = known
            rows.append(row)
            events.append(new)
        for storage in {id(s): s for here in (tape.alive, *tape.events) for s, _ in here}.values():
            for name in NAMES:
                setattr(storage, name, trunk.in_full(getattr(storage, name)))
        self._check_freed(alive, events)
        return Tape(alive, rows, events, operands)

    # ---- which period a row and a storage belong to

    def _tags(self) -> tuple[list[int | None], set[int]]:
        """The period of each row, and the rows whose lists of tensors go over several."""
        tags: list[int | None] = []
        lists: set[int] = set()
        for i, row in enumerate(self.tape.rows):
            tag = self.trunk.period_of(row.module) if row.module else None
            known = self.tape.operands.get(i)
            if tag is None and known is not None:
                found = {self.homes[id(s)][0] for s in known.storages() if id(s) in self.homes}
                if len(found) > 1:
                    lists.add(i)
                    self._share(known, i)
                elif found:
                    tag = found.pop()
            tags.append(tag)
            for storage in self.born[i + 1]:
                self._settle(storage, tag, None)
        return tags, lists

    def _share(self, known: Operands, row: int) -> None:
        """The outputs of a row over lists belong to the period of the element they come from."""
        source = next(
            (v for v in known.arguments.values() if isinstance(v, tuple) and len(v) == len(known.outputs)), None
        )
        for i, output in enumerate(known.outputs):
            if output is None or id(output) in self.homes:
                continue
            if source is None:
                raise Unfoldable("an op joins tensors of several blocks in one")
            element = source[i]
            home = self.homes.get(id(element)) if element is not None else None
            self._settle(output, home[0] if home else None, row)

    def _settle(self, storage: Storage, period: int | None, zone: Any) -> None:
        if period is None or (zone is None and id(storage) in self.homes):
            return
        maker = self.trunk.shifted(storage.module, -period), storage.op  # the ends may make more or less in between
        place = self.counts[(zone, period, maker)] = self.counts.get((zone, period, maker), -1) + 1
        number = self.numbers.setdefault((zone, maker, place), len(self.zones))
        if number == len(self.zones):
            self.zones.append(zone)
        home = (period, number)
        if zone is not None:
            self.places[home] = storage
        self.homes[id(storage)] = home

    def _claim(self, zone: int, period: int, rows: range) -> None:
        """What the rows of a stretch make belongs to its period, also what stands between two blocks."""
        for i in rows:
            self.stretch[i] = period
            for storage in self.born[i + 1]:
                home = self.homes.get(id(storage))
                if home is None or self.zones[home[1]] is None:
                    self._settle(storage, period, ("rows", zone))

    # ---- copies

    def _at(self, storage: Storage, shift: int) -> Storage:
        """The storage that stands to its period as ``storage`` does, ``shift`` periods further on."""
        home = self.homes.get(id(storage))
        if home is None:
            return storage
        there = home[0] + shift, home[1]
        return self.whole.get(there) or self._clone(*there)

    def _check_near(self, rows: Iterable[int]) -> None:
        """What a row within a run makes or frees is of its own period or a neighbour."""
        for row in rows:
            for storage, _ in self.tape.events[row + 1]:
                home = self.homes.get(id(storage))
                if home is not None and abs(home[0] - self.stretch[row]) > 1:
                    raise Unfoldable("a block frees what a distant one made")

    def _clone(self, period: int, key: int) -> Storage:
        like = self.places.get((2, key))
        if like is None or not 2 <= period < self.trunk.extra + 2:
            raise Unfoldable("a block's storage has no counterpart in its neighbour")
        found = self.whole[(period, key)] = self.clones[(period, key)] = like.copy()
        found.name, found.owner = self._renamed(like.name, period - 2), self._renamed(like.owner, period - 2)
        found.module = self._renamed(like.module, period - 2)
        return found

    def _renamed(self, path: str, shift: int) -> str:
        if not path or not shift:
            return path
        found = self.renamed.get((path, shift))
        if found is None:
            found = self.renamed[(path, shift)] = self.trunk.shifted(path, shift)
        return found

    def _check_freed(self, alive: list[Event], events: list[list[Event]]) -> None:
        """A copy is freed as its original is, once or not at all."""
        left: dict[int, int] = {}
        for storage, delta in itertools.chain(alive, *events):
            left[id(storage)] = left.get(id(storage), 0) + delta
        for (_, key), clone in self.clones.items():
            if left.get(id(clone)) != left.get(id(self.places[(2, key)])):
                raise Unfoldable("a copy of a block would not free what the block frees")

    def _relative(self, storage: Storage, period: int) -> Any:
        """``storage`` as seen from ``period``; what belongs to no period is itself."""
        home = self.homes.get(id(storage))
        if home is None:
            return id(storage)
        # Which of a neighbour's: not compared, for the end may differ there. `_check_freed` sees that all add up.
        return (home[0] - period, home[1], storage.likeness()) if home[0] == period else home[0] - period

    def _alike(self, a: int, b: int) -> bool:
        """Whether row a of P1 and row b of P2 are the same."""
        one, two = self.tape.rows[a], self.tape.rows[b]
        module = one.module if self.trunk.period_of(one.module) is None else self.trunk.shifted(one.module, 1)
        return one._replace(module=module) == two and self._events_alike(a, b)

    def _events_alike(self, a: int, b: int) -> bool:
        one, two = self.tape.events[a + 1], self.tape.events[b + 1]
        return len(one) == len(two) and all(
            d == e and self._relative(s, 1) == self._relative(t, 2) for (s, d), (t, e) in zip(one, two, strict=True)
        )

    def _spliced(self, storages: Sequence[Storage | None], values: Sequence[Any]) -> list[tuple[int, int, bool]]:
        """The order of a sequence that goes over the periods' storages; ``values`` must repeat with them."""
        homes = [None if s is None else self.homes.get(id(s)) for s in storages]
        tags = [None if home is None else home[0] for home in homes]
        split = [
            None if s is None or home is None else (s.memory_class, self.zones[home[1]], isinstance(v, int) and v > 0)
            for s, home, v in zip(storages, homes, values, strict=True)
        ]

        def alike(a: int, b: int) -> bool:
            one, two = storages[a], storages[b]
            if one is None or two is None:
                return one is two and values[a] == values[b]
            return bool(values[a] == values[b] and self._relative(one, 1) == self._relative(two, 2))

        return splice(tags, alike, self.trunk.extra, split)

    def _events(self, events: Sequence[Event]) -> list[Event]:
        """Events outside the runs of rows: a list freed, an optimizer's states."""
        order = self._spliced([s for s, _ in events], [d for _, d in events])
        return [(self._at(events[i][0], shift), events[i][1]) for i, shift, _ in order]

    def _longer(self, row: Row, known: Operands, last: bool) -> tuple[Row, Operands]:
        """A row over a list of tensors, with the tensors of every period in the list."""
        arguments, storages = dict(known.op.args), dict(known.arguments)
        for name, value in known.arguments.items():
            tensors = arguments[name]
            if not isinstance(value, tuple):
                if value is not None and id(value) in self.homes:
                    raise Unfoldable("an op mixes one block's tensor with a list over several")
                continue
            order = self._spliced(value, tensors)
            arguments[name] = tuple(tensors[i] for i, _, _ in order)
            if not last:
                storages[name] = tuple(None if value[i] is None else self._at(value[i], shift) for i, shift, _ in order)
        order = self._spliced(known.outputs, known.op.outputs)
        outputs = tuple(known.op.outputs[i] for i, _, _ in order)
        op = dataclasses.replace(known.op, args=arguments, outputs=outputs)
        cost = rules.cost(op)
        made = sum(
            s.n_bytes * self.trunk.extra
            for s in known.outputs
            if s is not None and self.homes.get(id(s), (0,))[0] == 2 and row.allocated_bytes
        )
        tensors = (*op.inputs, *op.outputs)
        row = row._replace(
            work=cost[1] if cost is not None else op.moving(),
            shapes=tuple(t.shape for t in tensors),
            dtypes=tuple(t.dtype for t in tensors),
            allocated_bytes=row.allocated_bytes + made,
        )
        if last:
            return row, known
        after = tuple(None if known.outputs[i] is None else self._at(known.outputs[i], shift) for i, shift, _ in order)  # type: ignore[arg-type]
        return row, Operands(op, storages, after)


def _side(phase: str) -> str:
    """Forward goes up the blocks and backward, with what it computes again, down."""
    return "backward" if phase == "recompute" else phase


def splice(
    tags: Sequence[int | None],
    alike: Callable[[int, int], bool],
    extra: int,
    split: Sequence[Any],
    claim: Callable[[int, int, range], None] = lambda zone, period, items: None,
) -> list[tuple[int, int, bool]]:
    """The order of a sequence when ``extra`` periods are put between its second and third.

    ``tags`` say each item's period (None: no period's). Where they run 0 1 2 3 the third stretch is repeated, where
    they run 3 2 1 0 the second; a stretch goes to the item before the next one's first. ``alike(a, b)`` compares an
    item of period 1 with one of period 2; ``split`` separates two runs that meet in one period. ``claim`` hears of each
    stretch before any is compared. Returns (item, periods further on, whether it stands in a run). Raises Unfoldable.

    >>> splice([None, 0, 1, 2, 3, None], lambda a, b: True, 2, "fffffb")
    [(0, 0, False), (1, 0, True), (2, 0, True), (3, 0, True), (3, 1, True), (3, 2, True), (4, 2, True), (5, 0, False)]
    """
    visits: list[list[Any]] = []  # period, first item, last item, split key
    for i, tag in enumerate(tags):
        if tag is None:
            continue
        if visits and visits[-1][0] == tag and visits[-1][3] == split[i]:
            visits[-1][2] = i
        else:
            visits.append([tag, i, i, split[i]])
    runs: list[tuple[bool, list[range]]] = []
    at = 0
    while at < len(visits):
        four = [v[0] for v in visits[at : at + 4]]
        if four in ([0, 1, 2, 3], [3, 2, 1, 0]) and len({v[3] for v in visits[at : at + 4]}) == 1:
            starts = [v[1] for v in visits[at : at + 4]] + [visits[at + 3][2] + 1]
            stretches = [range(a, b) for a, b in itertools.pairwise(starts)]
            for period, items in zip(four, stretches, strict=True):
                claim(len(runs), period, items)
            runs.append((four[0] == 0, stretches))
            at += 4
        elif visits[at][0] in (0, 3):
            claim(len(runs), visits[at][0], range(visits[at][1], visits[at][2] + 1))
            runs.append((visits[at][0] == 0, [range(visits[at][1], visits[at][2] + 1)]))
            at += 1
        else:
            raise Unfoldable(f"the blocks are not passed one after the other: {four}")
    order: list[tuple[int, int, bool]] = []
    done = 0
    for up, stretches in runs:
        order += [(i, 0, False) for i in range(done, stretches[0].start)]
        done = stretches[-1].stop
        if len(stretches) == 1:
            order += [(i, 0 if up else extra, True) for i in stretches[0]]
            continue
        one, two = (stretches[1], stretches[2]) if up else (stretches[2], stretches[1])
        if len(one) != len(two) or not all(map(alike, one, two)):
            raise Unfoldable("two blocks that look alike do not cost alike")
        order += [(i, 0 if up else extra, True) for s in stretches[:2] for i in s]
        again = range(extra) if up else range(extra, 0, -1)
        order += [(i, shift, True) for shift in again for i in stretches[2]]
        order += [(i, extra if up else 0, True) for s in stretches[2:] for i in s]
    order += [(i, 0, False) for i in range(done, len(tags))]
    return order
