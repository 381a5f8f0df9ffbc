"""A ledger priced on an accelerator: seconds, MFU, what binds, whether it fits. No torch.

Each op takes at least max(FLOPs / dense peak, bytes / memory bandwidth) (Williams, Waterman and Patterson 2009). The
sum over ops is a bound no run can beat on that device. Real steps take longer: until a device is calibrated the
expectation is a constant times the bound, inside an interval, and says that it was assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bursar.hardware import Accelerator, Cluster
from bursar.ledger import Ledger, Row
from bursar.network import Collective, data_parallel
from bursar.rules import MODEL_KINDS, Work

# Of published single-device steps times one constant, 1.45 left the smallest error, 13 %; most lay between 1x and 2x.
EXPECTED, LOWER, UPPER = 1.45, 1.0, 2.0
RESERVE_BYTES = 10**9  # CUDA's context and the libraries' workspaces, outside the allocator: 0.5 to 1 GB on most cards


@dataclass(frozen=True)
class Forecast:
    """One step on a device. Each rate is per device; the cluster's devices do the same at the same time."""

    cluster: Cluster
    seconds: float  # the expectation
    lower_seconds: float  # its 80 % interval
    upper_seconds: float
    roofline_seconds: float  # the bound
    ideal_seconds: Mapping[str, float] = field(repr=False)  # model, hardware and full-square FLOPs at dense peak
    bound_by: Mapping[str, float] = field(default_factory=dict)  # adds up to `seconds`
    peak_bytes: int = 0
    collectives: tuple[Collective, ...] = ()
    assumptions: tuple[str, ...] = ()
    basis: str = "assumed"  # counted, measured, calibrated or assumed
    row_seconds: tuple[float, ...] = field(default=(), repr=False)  # of each recorded row, where ops were priced singly

    @property
    def mfu(self) -> float:
        """Model FLOPs at dense peak over the expected time."""
        return self.ideal_seconds["model"] / self.seconds

    @property
    def hfu(self) -> float:
        """Hardware FLOPs, recompute included, at dense peak over the expected time."""
        return self.ideal_seconds["hardware"] / self.seconds

    @property
    def mfu_full_square(self) -> float:
        """MFU by the literature's convention: attention S^2 whatever the mask."""
        return self.ideal_seconds["full_square"] / self.seconds

    @property
    def usable_bytes(self) -> int:
        """What the driver shows, less the reserve."""
        return self.cluster.accelerator.usable_bytes - RESERVE_BYTES

    @property
    def fits(self) -> bool:
        """Whether the peak fits one device."""
        return self.peak_bytes <= self.usable_bytes

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from bursar.report.html import notebook

        return notebook.forecast(self)


def op_seconds(row: Row, device: Accelerator) -> tuple[float, float]:
    """(compute, memory) seconds of one op at the device's dense peak and bandwidth: `work_seconds` of its row."""
    return work_seconds(row.work, row.kind, row.dtype, device)


def work_seconds(work: Work, kind: str, dtype: str, device: Accelerator) -> tuple[float, float]:
    """(compute, memory) seconds of ``work`` at the device's dense peak and bandwidth.

    Raises BadInput where a matrix product is in a dtype the device has no peak for.
    """
    done = work.flops + work.recompute_flops
    peak = unit_peak(device, kind, dtype) if done else None
    compute = done / peak if peak else 0.0
    return compute, (work.read_bytes + work.written_bytes) / device.memory_bytes_per_s


def unit_peak(device: Accelerator, kind: str, dtype: str) -> float | None:
    """Dense peak FLOP/s of the units that do ``kind`` in ``dtype``. Raises BadInput for products as above.

    Elementwise arithmetic runs on the vector units, at the fp32 rate; None where that is not known: it is bound by
    memory on every device in the catalogue.
    """
    return _peak(device, dtype) if kind in MODEL_KINDS else device.peak_flops_per_s.get("fp32")


def _peak(device: Accelerator, dtype: str) -> float:
    if dtype == "tf32" and "tf32" not in device.peak_flops_per_s:
        dtype = "fp32"  # a device without TF32 runs fp32
    return device.peak(dtype)


def seconds_at_peak(flops: Mapping[str, int], device: Accelerator) -> float:
    """MFU's ideal time: the sum over dtypes of FLOPs by dense peak. Raises BadInput for a dtype without one."""
    return sum(n / _peak(device, dtype) for dtype, n in flops.items())


def forecast(ledger: Ledger, cluster: Cluster) -> Forecast:
    """``ledger``'s step on ``cluster``: each device runs the recorded rows, gradients are reduced over all of them.

    Raises BadInput for a dtype the device cannot multiply.
    """
    device = cluster.accelerator
    bound = {"compute": 0.0, "memory": 0.0, "network": 0.0}
    ideal = {"model": 0.0, "hardware": 0.0, "full_square": 0.0}
    for row in ledger.recorded:
        compute, moving = op_seconds(row, device)
        bound["compute" if compute >= moving else "memory"] += max(compute, moving)
        if row.kind in MODEL_KINDS and row.phase != "optimizer" and row.work.flops:
            peak, work = _peak(device, row.dtype), row.work
            ideal["hardware"] += (work.flops + work.recompute_flops) / peak
            if row.phase != "recompute":
                ideal["model"] += work.flops / peak
                ideal["full_square"] += (work.full_square_flops or work.flops) / peak
    notes = [*device.assumptions]
    collectives = data_parallel(cluster.count, ledger.textbook.gradients)
    wire = _wire_bytes_per_s(cluster)
    if collectives and wire is None:
        notes.append(f"no link speed is known for {device.name}: communication is left out of the time")
    elif collectives and wire is not None:
        backward = _backward_seconds(ledger, device)
        sending = sum(c.bytes for c in collectives) / wire
        bound["network"] = max(0.0, sending - backward)  # DDP sends while backward runs
        notes.append("gradients are all-reduced while backward runs; what does not hide is counted as network")
    roofline = sum(bound.values())
    seconds = EXPECTED * roofline
    notes.append(
        f"time is {EXPECTED} times the roofline, inside [{LOWER:g}, {UPPER:g}]: assumed, for {device.name} is not "
        "calibrated"
    )
    notes.append(
        f"fits compares with {device.usable_bytes:,} usable bytes less {RESERVE_BYTES:,} for context and libraries"
    )
    return Forecast(
        cluster,
        seconds,
        LOWER * roofline,
        UPPER * roofline,
        roofline,
        ideal,
        {**bound, "overhead": seconds - roofline},
        ledger.memory.peak_bytes,
        collectives,
        tuple(notes),
    )


def _backward_seconds(ledger: Ledger, device: Accelerator) -> float:
    return sum(max(op_seconds(r, device)) for r in ledger.recorded if r.phase in ("backward", "recompute"))


def _wire_bytes_per_s(cluster: Cluster) -> float | None:
    """One rank's slowest link on the ring: NVLink inside its domain, its share of the node's network beyond it."""
    device = cluster.accelerator
    domain = device.scaleup_size or device.node_size or 1
    if cluster.count <= domain:
        return device.scaleup_bytes_per_s or device.pcie_bytes_per_s
    if device.node_bytes_per_s is None or not device.node_size:
        return None
    return device.node_bytes_per_s / device.node_size
