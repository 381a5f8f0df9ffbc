"""Fourier transforms: 5 N log2 N FLOPs for N complex points, half of it where one side is real.

Source: the convention of FFTW's benchmarks (fftw.org/speed/method.html): nominal real FLOPs of radix 2, used for every
N. A transform over several dimensions has N their product; the scale of a normalisation adds none.
"""

from __future__ import annotations

import math

from bursar.rules import Op, Tensor, Work, rule


def fft_flops(x: Tensor, dims: tuple[int, ...]) -> int:
    """Complex to complex over ``dims`` of the (full-size) tensor ``x``, batched over the others.

    >>> fft_flops(Tensor((3, 1024), "complex64", 0), (1,)) == 3 * 5 * 1024 * 10
    True
    """
    return round(5 * x.numel * math.log2(max(1, math.prod(x.shape[d] for d in dims))))


@rule("aten._fft_c2c", kind="reduction")
def c2c(op: Op) -> Work:
    """Complex to complex, either way."""
    return op.moving(fft_flops(op["self"], op["dim"]))


@rule("aten._fft_r2c", kind="reduction")
def r2c(op: Op) -> Work:
    """Real to complex: half."""
    return op.moving(fft_flops(op["self"], op["dim"]) // 2)


@rule("aten._fft_c2r", kind="reduction")
def c2r(op: Op) -> Work:
    """Complex to real: half, of the real side's size."""
    return op.moving(fft_flops(op.output, op["dim"]) // 2)
