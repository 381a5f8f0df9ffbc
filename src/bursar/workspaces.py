"""Device memory that no op of a step shows: what the libraries under torch set aside, each with its source. No torch.

These stand beside the ledger's peak and are not part of it. `allocated` workspaces come out of torch's caching
allocator, so `torch.cuda.max_memory_allocated` shows them; the others only the driver shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bursar.hardware import Cluster
from bursar.ledger import Ledger, Row

# getChosenWorkspaceSize: ":4096:2:16:8", in KiB; on compute capability 9 and 10 ":4096:8"
CUBLAS_BYTES, CUBLAS_BYTES_HOPPER = (2 * 4096 + 8 * 16) * 1024, 8 * 4096 * 1024
_HOPPER_ON = ("h100", "h200", "b200", "gb200", "b300", "gb300")
NCCL_BYTES = 688_000_000  # of one communicator, the upper of the two figures reported


@dataclass(frozen=True, slots=True)
class Workspace:
    """What one library sets aside on one device."""

    name: str
    n_bytes: int
    allocated: bool  # through torch's caching allocator
    source: str


def workspaces(ledger: Ledger, cluster: Cluster) -> tuple[Workspace, ...]:
    """Those of ``ledger``'s step on a device of ``cluster``, the largest first; none where nobody knows (not NVIDIA's).

    cuDNN's are missing: it chooses them as it runs.
    """
    if cluster.accelerator.vendor != "NVIDIA":
        return ()
    found = [*_cublas(ledger, cluster), *_flash(ledger.recorded)]
    if cluster.count > 1:
        found.append(Workspace("NCCL's buffers of one communicator, at most", NCCL_BYTES, False, "nccl#964"))
    return tuple(sorted(found, key=lambda w: -w.n_bytes))


def _cublas(ledger: Ledger, cluster: Cluster) -> Iterator[Workspace]:
    products = {row.phase for row in ledger.recorded if row.kind == "matmul"}
    if not products:
        return
    each = CUBLAS_BYTES_HOPPER if cluster.accelerator.name.startswith(_HOPPER_ON) else CUBLAS_BYTES
    threads = 1 + bool(products & {"backward", "recompute"})  # autograd's thread has a handle of its own
    yield Workspace(
        f"cuBLAS, {threads} threads' handles" if threads > 1 else "cuBLAS",
        threads * each,
        True,
        "aten/src/ATen/cuda/CublasHandlePool.cpp, one per handle and stream, kept",
    )


def _flash(rows: list[Row]) -> Iterator[Workspace]:
    """The query's gradient summed in fp32 and a sum per query; K's and V's by query head where heads are shared."""
    most = max(
        (_flash_bytes(r) for r in rows if r.op == "aten._scaled_dot_product_flash_attention_backward"), default=0
    )
    if most:
        source = "flash-attention csrc/flash_attn/flash_api.cpp, mha_bwd: dq_accum, softmax_d, dk_expanded"
        yield Workspace("flash attention's backward, the largest", most, True, source)


def _flash_bytes(row: Row) -> int:
    """From the shapes of grad, q, k: (B, H, S, D) each."""
    _, (B, H, S, D), (_, kv_heads, K, _) = row.shapes[:3]
    S, wide = -(-S // 128) * 128, -(-D // 32) * 32
    n = 4 * B * H * S * (wide + 1)
    return n + (2 * 2 * B * H * K * D if kv_heads != H else 0)
