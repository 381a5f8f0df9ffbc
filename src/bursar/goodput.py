"""What is left of a run's time after failures: checkpoints at the best interval, work lost, restarts.

    M mean time between interruptions of the whole job   δ writing one checkpoint   τ work between two   R restarting

Young 1974: τ = √(2δM). Daly 2006, equations 20 and 37: the wall time of Ts seconds of work with failures that come at
random is M · e^(R/M) · (e^((τ+δ)/M) - 1) · Ts/τ, and the best τ is √(2δM)·[1 + ⅓·√(δ/2M) + δ/18M] - δ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from bursar.errors import BadInput, NoAnswer

# Dubey et al. 2024 (arXiv:2407.21783), 3.3.4: 419 unexpected interruptions in 54 days of 16 384 H100
FAILURES_PER_GPU_HOUR: Final = 419 / (16_384 * 54 * 24)
# the same, 3.3.1: 2 TB/s sustained from storage for as many
STORAGE_BYTES_PER_GPU_SECOND: Final = 2e12 / 16_384
CHECKPOINT_BYTES_PER_PARAMETER: Final = 14  # bf16 weights, fp32 master copy, Adam's two moments
RESTART_SECONDS: Final = 600.0  # detecting, replacing, loading, warming up: assumed
WRITE_SECONDS: Final = 60.0  # where the model's size is not known: assumed


@dataclass(frozen=True, slots=True)
class Goodput:
    """A run with failures. Seconds, and shares of the wall time."""

    share: float  # of the wall time that is kept work
    mtbf_seconds: float  # of the whole job
    checkpoint_seconds: float
    interval_seconds: float  # of work between two checkpoints
    restart_seconds: float
    work_seconds: float
    interruptions: float  # expected
    assumptions: tuple[str, ...]

    @property
    def wall_seconds(self) -> float:
        """From start to end."""
        return self.work_seconds / self.share

    def record(self) -> dict[str, object]:
        """As it stands in ``run --goodput --json``."""
        return {
            "share": self.share,
            "mtbf_seconds": self.mtbf_seconds if math.isfinite(self.mtbf_seconds) else None,
            "checkpoint_seconds": self.checkpoint_seconds,
            "interval_seconds": self.interval_seconds,
            "restart_seconds": self.restart_seconds,
            "interruptions": self.interruptions,
            "wall_seconds": self.wall_seconds,
            "wall_days": self.wall_seconds / 86400,
        }


def best_interval(checkpoint_seconds: float, mtbf_seconds: float) -> float:
    """Seconds of work between two checkpoints that lose the least: Daly 2006, equation 37; M itself beyond δ = 2M.

    >>> round(best_interval(60, 3 * 3600) / 60, 1)
    18.3
    """
    d, m = checkpoint_seconds, mtbf_seconds
    if d >= 2 * m:
        return m
    x = math.sqrt(d / (2 * m))
    return math.sqrt(2 * d * m) * (1 + x / 3 + x * x / 9) - d


def goodput(
    work_seconds: float,
    gpus: int,
    parameters: int | None = None,
    *,
    failures_per_gpu_hour: float | None = None,
    checkpoint_seconds: float | None = None,
    interval_seconds: float | None = None,
    restart_seconds: float | None = None,
) -> Goodput:
    """``work_seconds`` on ``gpus`` accelerators that fail, with the best checkpoint interval where none is given.

    Raises BadInput for a figure that is not above zero (failures may be none), NoAnswer where failures come so fast
    that the run would not end.
    """
    notes = []
    rate = FAILURES_PER_GPU_HOUR if failures_per_gpu_hour is None else failures_per_gpu_hour
    if not 0 <= rate < 1e6:
        raise BadInput(f"failures_per_gpu_hour is {rate!r}; give 0 or more")
    if failures_per_gpu_hour is None:
        notes.append(
            f"failures: {rate:.3g} per GPU-hour, 419 interruptions in 54 days of 16 384 H100 (Dubey et al. 2024, 3.3.4)"
        )
    if checkpoint_seconds is None and parameters is not None:
        checkpoint_seconds = CHECKPOINT_BYTES_PER_PARAMETER * parameters / (STORAGE_BYTES_PER_GPU_SECOND * gpus)
        notes.append(
            f"checkpoint: {CHECKPOINT_BYTES_PER_PARAMETER} bytes per parameter, storage of 122 MB/s per accelerator "
            "(Dubey et al. 2024, 3.3.1: 2 TB/s for 16 384)"
        )
    elif checkpoint_seconds is None:
        checkpoint_seconds = WRITE_SECONDS
        notes.append(f"checkpoint: {WRITE_SECONDS:.0f} s assumed, as the model's size is not known")
    restart = RESTART_SECONDS if restart_seconds is None else restart_seconds
    if restart_seconds is None:
        notes.append(f"restart after a failure: {RESTART_SECONDS:.0f} s assumed")
    for name, value in (("checkpoint_seconds", checkpoint_seconds), ("restart_seconds", restart)):
        if not 0 < value < 1e12:
            raise BadInput(f"{name} is {value!r}; give a number above zero")
    if interval_seconds is not None and not 0 < interval_seconds < 1e12:
        raise BadInput(f"interval_seconds is {interval_seconds!r}; give a number above zero")
    if rate == 0:
        share = 1.0 if interval_seconds is None else interval_seconds / (interval_seconds + checkpoint_seconds)
        between = interval_seconds or work_seconds
        return Goodput(share, math.inf, checkpoint_seconds, between, restart, work_seconds, 0.0, tuple(notes))
    mtbf = 3600 / (rate * gpus)
    tau = best_interval(checkpoint_seconds, mtbf) if interval_seconds is None else interval_seconds
    exponent = (restart + tau + checkpoint_seconds) / mtbf
    if exponent > 50:
        raise NoAnswer(
            f"the run would not end: an interruption comes every {mtbf:.3g} s and a checkpoint with its restart takes "
            f"{restart + checkpoint_seconds:.3g} s; fewer accelerators, or faster checkpoints"
        )
    share = tau / (mtbf * math.exp(restart / mtbf) * math.expm1((tau + checkpoint_seconds) / mtbf))
    wall = work_seconds / share
    return Goodput(share, mtbf, checkpoint_seconds, tau, restart, work_seconds, wall / mtbf, tuple(notes))
