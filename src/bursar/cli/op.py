"""``bursar op``: what one operation costs, and with ``--measure`` what it reaches here."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from bursar import operation
from bursar.cli import common
from bursar.errors import BadInput
from bursar.hardware import Accelerator, cluster


def op(
    text: str,
    /,
    *words: str,
    dtype: str = "bf16",
    on: str | None = None,
    measure: Annotated[bool, Parameter(negative=())] = False,
    seconds: float = 1.0,
    json: common.Json = False,
    explain: common.Explain = False,
) -> None:
    """One operation: FLOPs, bytes, arithmetic intensity; on a device what binds it; with --measure its speed here.

    Examples: bursar op 'matmul 16384x32768x8192' --on h100-sxm · bursar op attention 8x32x4096x128 causal backward ·
    bursar op conv2d 8x3x224x224 64x7x7 stride=2 padding=3 · bursar op "einsum 'bij,bjk->bik' 2x3x4 2x4x5" · bursar op
    'matmul 2048x2048x2048' --dtype fp32,bf16 --measure

    Parameters
    ----------
    text:
        matmul, matvec, einsum, conv1d to conv3d, attention, add, mul, relu, gelu, exp, sum, softmax, layernorm,
        rmsnorm, cross_entropy, embedding, adamw, …, with its sizes; backward after them for the backward kernels
    words:
        the same, unquoted
    dtype:
        fp64, fp32, tf32, fp16, bf16 or fp8; several with commas
    on:
        an accelerator of the catalogue: h100-sxm
    measure:
        run it on this machine too
    seconds:
        how long to measure each dtype
    """
    whole = operation.join(text, words)
    operations = tuple(operation.parse(whole, name) for name in dict.fromkeys(dtype.split(",")))
    device = _device(on)
    priced = tuple(operation.price(one, device) for one in operations)
    measured: tuple[operation.Measured, ...] = ()
    if measure:
        common.need_torch("measuring runs the operation with torch")
        if not 0 < seconds <= 3600:
            raise BadInput(f"--seconds {seconds:g} is no time to measure: give more than 0 and at most 3600")
        with common.progress(f"running {operations[0].text}"):
            from bursar.measure import compare

            measured = compare(operations, seconds)
    from bursar.report import op as page

    if json:
        common.print_json(page.record(priced, measured))
        return
    common.print_page(*page.render(priced, measured, explain=explain))


def _device(on: str | None) -> Accelerator | None:
    """The one accelerator of ``--on``. Raises BadInput for a cluster, or a machine whose peak no catalogue knows."""
    if on is None:
        return None
    if on in ("cpu", "local"):
        raise BadInput(f"--on {on}: no peak is known for this machine; --measure runs the operation on it")
    found = cluster(on)
    if found.count != 1:
        raise BadInput(f"an operation runs on one device: give --on {found.accelerator.name}, not {on}")
    return found.accelerator
