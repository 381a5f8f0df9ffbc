"""What a collective sends, for n ranks and S bytes.

The ring's volume is the least possible (Thakur, Rabenseifner and Gropp 2005, "Optimization of collective
communication operations in MPICH").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from bursar.efficiency import coefficient
from bursar.hardware import Cluster

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


def zero_bytes(
    stage: int, ranks: int, *, parameters: float = 2, gradients: float = 2, optimizer_state: float = 12
) -> float:
    """Model states of one rank under ZeRO, from those of an unsharded model: its three parts in any one unit.

    Stage 1 shards the optimizer state, 2 the gradients too, 3 (FSDP) the parameters too; stage 0 is data parallel. The
    defaults are bytes per parameter of mixed-precision Adam, whose fp32 master weights count as optimizer state.
    Source: Rajbhandari et al. 2020 (arXiv:1910.02054), section 5. Raises ValueError for a stage other than 0 to 3.

    >>> zero_bytes(0, 64), zero_bytes(1, 64), zero_bytes(2, 64), zero_bytes(3, 64)
    (16.0, 4.1875, 2.21875, 0.25)
    """
    if stage not in range(4):
        raise ValueError(f"ZeRO has stages 0 to 3, not {stage}")
    shards = [ranks if stage >= first else 1 for first in (3, 2, 1)]
    return sum(part / n for part, n in zip((parameters, gradients, optimizer_state), shards, strict=True))


def data_parallel_ranks(batch_tokens: float, bytes_per_s: float, flops_per_s: float) -> int:
    """The most ranks on which backward still hides the all-reduce of bf16 gradients, at peak rates.

    Backward does 4·P·B/n FLOPs on B/n of the batch's B tokens while 2(n-1)/n·2P bytes leave each rank, so P falls out
    and n ≤ 1 + B·W/C.

    >>> data_parallel_ranks(4e6, 100e9, 1e15)
    401
    """
    return 1 + math.floor(batch_tokens * bytes_per_s / flops_per_s)


# ---- seconds


@dataclass(frozen=True, slots=True)
class Wires:
    """What a cluster's links reach, bytes/s of one device in one direction."""

    inside_bytes_per_s: float  # within the scale-up domain
    between_bytes_per_s: float  # a device's share of its node's network
    domain: int  # devices that the fast links join
    assumed: bool  # whether the network's speed was given by nobody


def wires(cluster: Cluster) -> Wires:
    """``cluster``'s links, less what collectives leave unused of them."""
    device = cluster.accelerator
    joined = device.scaleup_bytes_per_s is not None
    inside = (
        device.scaleup_bytes_per_s * coefficient("scaleup_fraction")
        if device.scaleup_bytes_per_s is not None
        else (device.pcie_bytes_per_s or coefficient("pcie_bytes_per_s")) * coefficient("pcie_fraction")
    )
    node = cluster.node_bytes_per_s
    share = node / cluster.node_size if node else coefficient("adapter_bytes_per_s")
    domain = cluster.scaleup_size if joined else cluster.node_size
    return Wires(inside, share * coefficient("node_fraction"), domain, node is None)


def inside(links: Wires, ranks: Any, stride: Any) -> Any:
    """How many of a group's ``ranks``, ``stride`` devices apart, share one domain: at least one."""
    return np.minimum(np.maximum(links.domain // np.maximum(stride, 1), 1), ranks)


def collective_seconds(links: Wires, op: str, n_bytes: Any, ranks: Any, stride: Any = 1) -> Any:
    """Seconds of one ``op`` on S bytes over ``ranks`` devices that stand ``stride`` apart; 0 for a group of one.

    ``op`` is all_reduce, all_gather or reduce_scatter; S is the whole, as gathered.
    A ring's slowest link is the domain's, or the group's share of a node's network: of the node's devices, those of the
    group send for it, and the others' groups are busy at the same time. Between nodes an all-reduce is a ring or a
    tree, whichever is quicker; the others are rings.
    """
    near = inside(links, ranks, stride)
    nodes = np.ceil(ranks / near)
    far = nodes > 1
    hop, fixed, each = (coefficient(c) for c in ("node_latency_seconds", "scaleup_latency_seconds",
                                                 "scaleup_latency_per_rank_seconds"))  # fmt: skip
    passes = 2 if op == "all_reduce" else 1
    rate = np.where(
        far, np.minimum(links.inside_bytes_per_s, links.between_bytes_per_s * near), links.inside_bytes_per_s
    )
    # a ring of all ranks takes a step per rank and pass, a tree one per level and pass between nodes
    within = (fixed + each * near) * passes / 2
    ring = (fixed + each * (ranks - nodes)) * passes / 2 + hop * nodes * passes
    tree = within + hop * 2 * np.ceil(np.log2(np.maximum(nodes, 1)))
    waits = np.where(far, np.minimum(ring, tree) if passes == 2 else ring, within)
    volume = passes * n_bytes * (ranks - 1) / ranks
    return np.where(ranks > 1, volume / rate + waits, 0.0)


def send_seconds(links: Wires, n_bytes: Any, stride: Any) -> Any:
    """Seconds to send ``n_bytes`` to the device ``stride`` further on."""
    near = stride < links.domain
    rate = np.where(near, links.inside_bytes_per_s, links.between_bytes_per_s)
    return n_bytes / rate + np.where(
        near, coefficient("scaleup_latency_seconds") / 2, coefficient("node_latency_seconds")
    )


def dispatch_seconds(links: Wires, n_bytes: Any, ranks: Any, copies: int, once: bool = True) -> Any:
    """Seconds to send a rank's tokens, ``n_bytes``, to ``copies`` experts each, spread evenly over ``ranks`` devices.

    With ``once`` a token crosses the network once per domain that wants it, and is handed on inside (DeepSeek-AI 2024,
    3.2.2): of d domains, copies drawn at random hit d(1 - (1 - 1/d)^copies).
    """
    near = inside(links, ranks, 1)
    domains = np.ceil(ranks / near)
    hit = domains * (1 - (1 - 1 / domains) ** copies) if once else copies
    out = n_bytes * hit * (domains - 1) / domains / links.between_bytes_per_s
    slower = coefficient("exchange_fraction") / coefficient("scaleup_fraction")
    local = n_bytes * copies * (near - 1) / near / (links.inside_bytes_per_s * slower)
    fixed = coefficient("scaleup_latency_seconds") / 2 + np.where(domains > 1, coefficient("node_latency_seconds"), 0.0)
    return np.where(ranks > 1, np.maximum(out, local) + fixed, 0.0)
