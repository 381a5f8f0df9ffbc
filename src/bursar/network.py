"""What a collective sends, for n ranks and S bytes.

The ring's volume is the least possible (Thakur, Rabenseifner and Gropp 2005, "Optimization of collective
communication operations in MPICH").
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BUCKET_BYTES = 25 * 2**20  # DDP's bucket_cap_mb default


@dataclass(frozen=True, slots=True)
class Collective:
    """One kind of collective in a step: what one rank sends, all calls together."""

    op: str
    group: str
    ranks: int
    calls: int
    bytes: int


def all_gather_bytes(n: int, n_bytes: int) -> int:
    """Sent per rank to gather S bytes from n shards, and to reduce-scatter them: (n-1)/n·S.

    >>> all_gather_bytes(8, 800)
    700
    """
    return n_bytes * (n - 1) // n


def all_reduce_bytes(n: int, n_bytes: int) -> int:
    """Sent per rank to sum S bytes over n ranks: a reduce-scatter and an all-gather.

    >>> all_reduce_bytes(8, 800)
    1400
    """
    return 2 * all_gather_bytes(n, n_bytes)


def data_parallel(ranks: int, gradient_bytes: int) -> tuple[Collective, ...]:
    """DDP's collectives in one step: the gradients once, in buckets, whatever the accumulation (``no_sync``)."""
    if ranks < 2 or not gradient_bytes:
        return ()
    calls = math.ceil(gradient_bytes / BUCKET_BYTES)
    return (Collective("all_reduce", "dp", ranks, calls, all_reduce_bytes(ranks, gradient_bytes)),)


def rounds(strategy: str, micro_batches: int, deferred: bool) -> dict[str, int]:
    """Collectives over the whole model that one rank joins in one step of ``micro_batches``.

    ``deferred`` synchronises gradients after the last micro-batch only: DDP's ``no_sync``, FSDP's
    ``set_requires_gradient_sync``. ``fsdp`` reshards after forward, so each forward and each backward gathers the
    parameters anew (Rajbhandari et al. 2020, section 7.2.2). Raises KeyError for a strategy other than ddp and fsdp.

    >>> rounds("fsdp", 4, deferred=False)
    {'all_gather': 8, 'reduce_scatter': 4}
    >>> rounds("ddp", 4, deferred=True)
    {'all_reduce': 1}
    """
    synchronised = 1 if deferred else micro_batches
    return {
        "ddp": {"all_reduce": synchronised},
        "fsdp": {"all_gather": 2 * micro_batches, "reduce_scatter": synchronised},
    }[strategy]
