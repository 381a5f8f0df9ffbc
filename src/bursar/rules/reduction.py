"""Sums and their like: one FLOP per input element."""

from __future__ import annotations

from bursar.rules import Op, Work, rule


def reduce(op: Op, per_element: int = 1) -> Work:
    """``per_element`` FLOPs for each element of the first input."""
    x = op.inputs[0]
    return op.moving(per_element * x.numel if x.is_float or any(t.is_float for t in op.outputs) else 0)


@rule("aten.sum", "aten.mean", "aten.cumsum", "aten.cumsum_", "aten.prod", "aten.cumprod", "aten.amax", "aten.amin",
      "aten.max", "aten.min", "aten.argmax", "aten.argmin", "aten.any", "aten.all", "aten.nansum",
      kind="reduction")  # fmt: skip
def plain(op: Op) -> Work:
    """One add or comparison per element."""
    return reduce(op)


@rule("aten.huber_loss", "aten.smooth_l1_loss", "aten.binary_cross_entropy", "aten.binary_cross_entropy_with_logits",
      "aten.soft_margin_loss", kind="reduction")  # fmt: skip
def loss(op: Op) -> Work:
    """Subtract (or take the logarithm), shape, add: 3 per element."""
    return reduce(op, 3)


@rule("aten._weight_norm_interface", kind="reduction")
def weight_norm(op: Op) -> Work:
    """Square and add 2, then v·g/|v| 1: 3 per element."""
    return reduce(op, 3)


@rule("aten._weight_norm_interface_backward", kind="reduction")
def weight_norm_backward(op: Op) -> Work:
    """The product's sum 2, and dv 3: 5 per element."""
    return reduce(op, 5)


@rule("aten.linalg_vector_norm", "aten.norm", kind="reduction")
def norm(op: Op) -> Work:
    """Square and add: 2 per element."""
    return reduce(op, 2)


@rule("aten.var", "aten.std", "aten.var_mean", "aten.std_mean", kind="reduction")
def variance(op: Op) -> Work:
    """Mean 1, centre 1, square and add 2: 4 per element."""
    return reduce(op, 4)


@rule("aten.logsumexp", kind="reduction")
def logsumexp(op: Op) -> Work:
    """Maximum, subtract, exp, add: 4 per element."""
    return reduce(op, 4)


@rule("aten.avg_pool2d", "aten._adaptive_avg_pool2d", "aten.max_pool2d_with_indices",
      "aten.avg_pool1d", "aten._adaptive_avg_pool3d", "aten.avg_pool3d", "aten.adaptive_max_pool2d",
      "aten.max_pool3d_with_indices", kind="reduction")  # fmt: skip
def pool(op: Op) -> Work:
    """Each output compares or adds its window; windows without a size given tile the input."""
    kernel = op["kernel_size"]
    x, out = op["self"], op.output
    if not kernel:
        return op.moving(x.numel)
    size = 1
    spatial = {"1d": 1, "2d": 2, "3d": 3}[next(s for s in ("1d", "2d", "3d") if s in op.name)]
    for k in (list(kernel) * spatial)[:spatial]:
        size *= k
    return op.moving(out.numel * size)


@rule("aten.avg_pool2d_backward", "aten._adaptive_avg_pool2d_backward", "aten.max_pool2d_with_indices_backward",
      "aten.avg_pool3d_backward", "aten._adaptive_avg_pool3d_backward", "aten.adaptive_max_pool2d_backward",
      "aten.max_pool3d_with_indices_backward", kind="reduction")  # fmt: skip
def pool_backward(op: Op) -> Work:
    """Each gradient is added where it came from."""
    return op.moving(op["grad_output"].numel, skip=("self",))


@rule("aten.topk", "aten.sort", "aten.argsort", "aten.unique_dim", "aten._unique2", kind="reduction")
def order(op: Op) -> Work:
    """Comparisons are not floating-point arithmetic by our count: it moves bytes."""
    return op.moving()
