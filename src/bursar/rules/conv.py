"""Convolutions, as the matrix product they are (im2col): padding's zeros are multiplied like the rest.

N batch, C channels, g groups, o/i output and input spatial sizes, k kernel.
"""

from __future__ import annotations

import math

from bursar.rules import Op, Tensor, Work, rule


def _flops(x: Tensor, weight: Tensor, out: Tensor, transposed: bool) -> int:
    """2 N Cout prod(o) (Cin/g) prod(k); transposed, input and output change places: 2 N Cin prod(i) (Cout/g) prod(k).

    A weight is (Cout, Cin/g, k...) or, transposed, (Cin, Cout/g, k...), so either is 2 N · positions · weight.numel.
    """
    spatial = len(weight.shape) - 2
    batched = len(x.shape) == spatial + 2
    positions = math.prod((x if transposed else out).shape[-spatial:])
    return 2 * (x.shape[0] if batched else 1) * positions * weight.numel


@rule("aten.convolution", "aten._convolution", "aten.cudnn_convolution", kind="conv")
def convolution(op: Op) -> Work:
    """Any convolution: grouped, depthwise, dilated, transposed; 1-D to 3-D."""
    x = op["input"] if op["input"] is not None else op["self"]
    return op.moving(_flops(x, op["weight"], op.output, bool(op["transposed"])))


@rule("aten.convolution_backward", kind="conv")
def convolution_backward(op: Op) -> Work:
    """dX and dW cost what forward did, each if asked for; the bias gradient is a sum that rides along."""
    forward = _flops(op["input"], op["weight"], op["grad_output"], bool(op["transposed"]))
    wanted = sum(bool(w) for w in op["output_mask"][:2])
    return op.moving(forward * wanted)
