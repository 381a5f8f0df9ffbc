"""The one table: a row per op of a training step, the storages they lived in, and every question asked of both.

No torch. A ledger is written by `trace` from real model code; `memory` reads its timeline, `roofline` prices its rows.
Conservation laws hold by construction and are tested: kinds, dtypes, phases and modules each add up to the total, and
the memory classes partition the live bytes at every instant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bursar import memory
from bursar.errors import BadInput, printable
from bursar.memory import Memory, Storage, Textbook
from bursar.rules import KINDS, MODEL_KINDS, Work, three_lines
from bursar.units import format_bytes, format_flops

if TYPE_CHECKING:
    import polars

    from bursar.reconcile import Measured, Reconciliation
    from bursar.roofline import Forecast


_COUNTED = ("flops", "recompute_flops", "full_square_flops", "read_bytes", "written_bytes", "allocated_bytes",
            "freed_bytes")  # fmt: skip


class Row(NamedTuple):
    """One op. Its sequence number is its place in the table."""

    phase: str
    kind: str
    op: str
    module: str
    dtype: str  # what it computes in; fp32 on TF32 tensor cores is "tf32"
    shapes: tuple[tuple[int, ...], ...]  # inputs, then outputs
    dtypes: tuple[str, ...]
    work: Work
    allocated_bytes: int
    reads_weight: bool = False  # whether an operand of a product is a parameter or its cast copy


class Operand(NamedTuple):
    """A tensor in a `Call`. ``storage`` is its storage's place in the ledger, -1 where that is not on the device."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str  # torch's name: float32
    storage: int


class Call(NamedTuple):
    """How a row's op was called: enough to call it again. Written where the ops are this machine's own."""

    op: str  # with its overload: aten.add.Tensor
    args: tuple[Any, ...]  # each tensor as an `Operand`
    kwargs: tuple[tuple[str, Any], ...]
    outputs: tuple[Operand, ...]
    site: int  # the number of the call in Python that it came from: one may run many ops
    views: int  # views made since the row before


@dataclass(frozen=True, slots=True)
class Uncounted:
    """An op without a rule: its FLOPs are not in any total, its bytes are."""

    op: str
    calls: int
    bytes: int

    @property
    def fix(self) -> str:
        """The three lines of Python that count it."""
        return three_lines(self.op)


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs of one step. The first four count the kinds matmul, attention and conv; a multiply and an add are two."""

    forward: int
    backward: int
    recompute: int  # activation checkpointing, and the scores a fused attention computes again in backward
    optimizer: int  # every kind, in the optimizer phase
    by_kind: Mapping[str, int]
    by_dtype: Mapping[str, int]
    total: int  # all kinds, all phases
    six_p_tokens: int  # the rule of thumb, shown beside the count and never instead of it
    attention: int  # the attention kind over all phases, what the masks let through
    attention_full_square: int  # the same, S^2 whatever the mask
    uncounted: tuple[Uncounted, ...] = ()

    @property
    def model(self) -> int:
        """Forward + backward: what the model asks for, and what MFU divides."""
        return self.forward + self.backward

    @property
    def hardware(self) -> int:
        """Model FLOPs + recompute: what the device does, and what HFU divides."""
        return self.model + self.recompute

    @property
    def model_full_square(self) -> int:
        """Model FLOPs by the literature's convention, attention S^2 whatever the mask."""
        return self.model + self.attention_full_square_extra

    attention_full_square_extra: int = 0


@dataclass(frozen=True, slots=True)
class Model:
    """What was trained."""

    name: str
    parameters: int
    trainable_parameters: int
    active_parameters: int  # what one token passes through; a mixture's experts count by the share that is active


@dataclass(frozen=True, slots=True)
class Step:
    """How much of it one optimizer update sees."""

    samples: int
    tokens: int
    micro_batches: int


@dataclass(frozen=True, repr=False)
class Ledger:
    """One training step, written down."""

    rows: list[Row]
    storages: list[Storage]
    events: list[tuple[int, int, int]]  # (row, storage, +bytes or -bytes), in order
    first_row: int = 0  # the recorded step begins here; what came before it built the model and warmed it up
    first_event: int = 0
    device: str = "gpu"  # whose memory and ops these are: "gpu" or "cpu"
    model: Model = Model("", 0, 0, 0)
    step: Step = Step(0, 0, 0)
    textbook: Textbook = field(default_factory=lambda: Textbook(0, 0, 0, 0))
    assumptions: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    partial: bool = False
    replicas: int = 1  # data-parallel ranks doing the same; the rows are one rank's, `flops` the whole job's
    calls: tuple[Call, ...] = ()  # of the recorded rows, in their order; none where the ops are another machine's

    def __len__(self) -> int:
        return len(self.rows) - self.first_row

    def __repr__(self) -> str:  # the rows themselves are megabytes
        peak, flops = format_bytes(self.memory.peak_bytes), format_flops(self.flops.model)
        return f"<Ledger {printable(self.model.name, keep='') or 'of a step'}: {len(self)} ops, {flops}, peak {peak}>"

    @property
    def recorded(self) -> list[Row]:
        """The rows of the recorded step."""
        return self.rows[self.first_row :]

    @cached_property
    def flops(self) -> Flops:
        """The step's FLOPs, by phase, kind and dtype."""
        phases = dict.fromkeys(("forward", "backward", "recompute", "optimizer"), 0)
        by_kind = dict.fromkeys(KINDS, 0)
        by_dtype: dict[str, int] = {}
        attention = square = square_model = 0
        for row in self.recorded:
            work = row.work
            done = (work.flops + work.recompute_flops) * self.replicas
            if not done:
                continue
            by_kind[row.kind] = by_kind.get(row.kind, 0) + done
            by_dtype[row.dtype] = by_dtype.get(row.dtype, 0) + done
            if row.phase == "optimizer":
                phases["optimizer"] += done
            elif row.kind in MODEL_KINDS:
                phases[row.phase] += work.flops * self.replicas
                phases["recompute"] += work.recompute_flops * self.replicas
                if row.kind == "attention":
                    attention += done
                    again = work.recompute_flops * work.full_square_flops // work.flops
                    square += (work.full_square_flops + again) * self.replicas
                    if row.phase != "recompute":
                        square_model += (work.full_square_flops - work.flops) * self.replicas
        return Flops(
            **phases,
            by_kind=by_kind,
            by_dtype=by_dtype,
            total=sum(by_kind.values()),
            six_p_tokens=6 * self.model.active_parameters * self.step.tokens,
            attention=attention,
            attention_full_square=square,
            attention_full_square_extra=square_model,
            uncounted=self.uncounted,
        )

    @cached_property
    def bytes_moved(self) -> Mapping[str, int]:
        """Bytes read and written by the step's kernels, by kind."""
        found = dict.fromkeys(KINDS, 0)
        for row in self.recorded:
            found[row.kind] = found.get(row.kind, 0) + row.work.read_bytes + row.work.written_bytes
        return found

    @cached_property
    def uncounted(self) -> tuple[Uncounted, ...]:
        """Ops without a rule, the largest movers first. Their FLOPs are unknown, not zero."""
        calls: dict[str, list[int]] = {}
        for row in self.recorded:
            if row.kind == "uncounted":
                entry = calls.setdefault(row.op, [0, 0])
                entry[0] += 1
                entry[1] += row.work.read_bytes + row.work.written_bytes
        found = [Uncounted(op, n, b) for op, (n, b) in calls.items()]
        return tuple(sorted(found, key=lambda u: (-u.bytes, u.op)))

    @cached_property
    def memory(self) -> Memory:
        """Live bytes over the step: peak, what stands at it, what stays between steps."""
        return memory.replay(self.storages, self.events, self.first_event, self.textbook, buckets=self.replicas > 1)

    @cached_property
    def ops(self) -> polars.DataFrame:
        """One row per op: seq, phase, kind, op, module, dtype, dtypes, shapes, FLOPs, bytes."""
        import polars as pl

        rows = self.recorded
        freed = [0] * len(rows)
        for row, _, delta in self.events[self.first_event :]:
            if delta < 0 and row >= self.first_row:
                freed[row - self.first_row] -= delta
        return pl.DataFrame(
            {
                "seq": range(len(rows)),
                "phase": [r.phase for r in rows],
                "kind": [r.kind for r in rows],
                "op": [r.op for r in rows],
                "module": [r.module for r in rows],
                "dtype": [r.dtype for r in rows],
                "dtypes": [list(r.dtypes) for r in rows],
                "shapes": [[list(s) for s in r.shapes] for r in rows],
                "flops": [r.work.flops for r in rows],
                "recompute_flops": [r.work.recompute_flops for r in rows],
                "full_square_flops": [r.work.full_square_flops or r.work.flops for r in rows],
                "read_bytes": [r.work.read_bytes for r in rows],
                "written_bytes": [r.work.written_bytes for r in rows],
                "allocated_bytes": [r.allocated_bytes for r in rows],
                "freed_bytes": freed,
            },
            schema_overrides={
                "seq": pl.Int64,
                "dtypes": pl.List(pl.String),
                "shapes": pl.List(pl.List(pl.Int64)),
                **dict.fromkeys(_COUNTED, pl.Int64),
            },
        )

    def by(self, column: str, *, depth: int | None = None) -> polars.DataFrame:
        """Totals per value of ``column`` (kind, phase, op, module, dtype), the largest FLOPs first.

        ``depth`` cuts module paths after that many names: ``by("module", depth=2)``.
        """
        import polars as pl

        known = ("phase", "kind", "op", "module", "dtype")
        if column not in known:
            raise BadInput(f"a ledger has no column {column!r} to group by; it has {', '.join(known)}")
        ops = self.ops
        if column == "module" and depth is not None:
            ops = ops.with_columns(pl.col("module").str.split(".").list.head(depth).list.join("."))
        counted = ("flops", "recompute_flops", "read_bytes", "written_bytes", "allocated_bytes")
        return (
            ops.group_by(column)
            .agg(pl.len().alias("calls"), *(pl.col(c).sum() for c in counted))
            .sort(["flops", "read_bytes", column], descending=[True, True, False])
        )

    def on(self, name: str) -> Forecast:
        """This step priced on an accelerator or cluster of the catalogue (``"h100-sxm"``, ``"8xh100-sxm"``), or on this
        machine (``"local"``) as `bursar bench` measured it; then it must have been traced with ``on="local"``.

        Raises UnknownName naming the nearest known, NotCalibrated for a machine that was not measured.
        """
        if name == "local":
            from bursar import machine, pricing

            return pricing.local(self, machine.current()).forecast
        from bursar.hardware import cluster
        from bursar.roofline import forecast

        return forecast(self, cluster(name))

    def reconcile(self, measured: Measured, forecast_seconds: float | None = None) -> Reconciliation:
        """This forecast beside ``measured`` (`bursar.meter.measured.measure`), line by line."""
        from bursar.reconcile import reconcile

        return reconcile(self, measured, forecast_seconds)

    def export(self, path: str | Path, on: str | None = None, form: str | None = None) -> None:
        """Write this step to a file: an HTML report, CSV, Parquet, Markdown, a plot, a trace or a memory snapshot.

        ``form`` is a name of `bursar.report.export.FORMS`; without it the suffix says which. ``on`` prices it first, as
        `on` does. Raises BadInput for a form that is not known and a path that cannot be written.
        """
        from bursar.report import export

        path = Path(path)
        export.write(form or export.form_of(path), self, self.on(on) if on is not None else None, path)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from bursar.report.html import notebook

        return notebook.ledger(self)


class Part(NamedTuple):
    """A block of the model, or several alike: each one's FLOPs (forward, backward, recompute) and bytes moved."""

    module: str
    copies: int
    flops: int
    bytes: int


def outline(path: str) -> str:
    """The block a module stands in: its path up to the first number, or two names.

    >>> outline("model.layers.7.mlp.up"), outline("head.dense.weight")
    ('model.layers.7', 'head.dense')
    """
    names = path.split(".")
    at = next((i + 1 for i, name in enumerate(names) if name.isdecimal()), 2)
    return ".".join(names[:at])


def parts(rows: Iterable[Row]) -> list[Part]:
    """What each block costs, in order of forward; neighbours that differ in their number alone are folded."""
    totals: dict[str, list[int]] = {}
    for row in rows:
        entry = totals.setdefault("optimizer step" if row.phase == "optimizer" else outline(row.module), [0, 0])
        if row.kind in MODEL_KINDS and row.phase != "optimizer":
            entry[0] += row.work.flops + row.work.recompute_flops
        entry[1] += row.work.read_bytes + row.work.written_bytes
    found: list[Part] = []
    for path, (flops, n_bytes) in totals.items():
        stem, _, number = path.rpartition(".")
        last = found[-1] if found else None
        if last is not None and number.isdecimal() and last[2:] == (flops, n_bytes):
            last_stem, _, span = last.module.rpartition(".")
            if last_stem == stem and span.split("–")[-1].isdecimal():
                found[-1] = Part(f"{stem}.{span.split('–')[0]}–{number}", last.copies + 1, flops, n_bytes)
                continue
        found.append(Part(path, 1, flops, n_bytes))
    return found
