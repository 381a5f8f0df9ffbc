"""Matrix products. A multiply and an add are two FLOPs, so (m, k) @ (k, n) is 2mkn; a bias or epilogue adds none.

B batch, m rows, k inner, n columns.  Source: scaling-book section 4.
"""

from __future__ import annotations

import math

from bursar.rules import Op, Work, rule


@rule("aten.mm", "aten._int_mm", kind="matmul")
def mm(op: Op) -> Work:
    """(m, k) @ (k, n) -> (m, n): 2mkn."""
    a, b = op.inputs[:2]
    (m, k), (_, n) = a.shape, b.shape
    return op.moving(2 * m * k * n)


@rule("aten.addmm", "aten._addmm_activation", "aten.addmm_", kind="matmul")
def addmm(op: Op) -> Work:
    """self + (m, k) @ (k, n): 2mkn, the sum rides in the epilogue."""
    (m, k), (_, n) = op["mat1"].shape, op["mat2"].shape
    return op.moving(2 * m * k * n, skip=() if op["beta"] != 0 else ("self",))


@rule("aten.bmm", kind="matmul")
def bmm(op: Op) -> Work:
    """(B, m, k) @ (B, k, n): 2Bmkn."""
    (B, m, k), (_, _, n) = op["self"].shape, op["mat2"].shape
    return op.moving(2 * B * m * k * n)


@rule("aten.baddbmm", "aten.baddbmm_", "aten.addbmm", kind="matmul")
def baddbmm(op: Op) -> Work:
    """self + (B, m, k) @ (B, k, n): 2Bmkn. With beta 0 torch does not read self (the attention scores' empty)."""
    (B, m, k), (_, _, n) = op["batch1"].shape, op["batch2"].shape
    return op.moving(2 * B * m * k * n, skip=() if op["beta"] != 0 else ("self",))


@rule("aten.mv", kind="matmul")
def mv(op: Op) -> Work:
    """(m, k) @ (k,): 2mk."""
    return op.moving(2 * op["self"].numel)


@rule("aten.addmv", kind="matmul")
def addmv(op: Op) -> Work:
    """self + (m, k) @ (k,): 2mk."""
    return op.moving(2 * op["mat"].numel)


@rule("aten.dot", "aten.vdot", kind="matmul")
def dot(op: Op) -> Work:
    """(k,) . (k,): 2k."""
    return op.moving(2 * op["self"].numel)


@rule("aten.linear", kind="matmul")
def linear(op: Op) -> Work:
    """(..., k) @ (n, k)^T + bias: 2k per output element."""
    return op.moving(2 * op["input"].numel * op["weight"].shape[0])


@rule("aten.linear_backward", kind="matmul")
def linear_backward(op: Op) -> Work:
    """dX and dW cost what forward did, each if asked for."""
    wanted = sum(bool(w) for w in op["output_mask"][:2])
    return op.moving(2 * math.prod(op["self"].shape) * op["weight"].shape[0] * wanted)
