"""Normalisations and softmax: FLOPs per element, each function evaluation counted as one."""

from __future__ import annotations

from bursar.rules import Op, Work, rule


def _first(op: Op) -> int:
    return op.inputs[0].numel


@rule("aten.native_layer_norm", "aten.native_group_norm", kind="reduction")
def layer_norm(op: Op) -> Work:
    """Mean 1, centre 1, square and add 2, scale 1, weight and bias 2: 7 per element."""
    return op.moving(7 * _first(op))


@rule("aten.native_layer_norm_backward", "aten.native_group_norm_backward", kind="reduction")
def layer_norm_backward(op: Op) -> Work:
    """x-hat 2, g·w 1, its two sums 3, dx 3, dw 2 and db 1: 12 per element."""
    return op.moving(12 * _first(op))


@rule("aten._fused_rms_norm", kind="reduction")
def rms_norm(op: Op) -> Work:
    """Square and add 2, scale 1, weight 1: 4 per element."""
    return op.moving(4 * _first(op))


@rule("aten._fused_rms_norm_backward", kind="reduction")
def rms_norm_backward(op: Op) -> Work:
    """x-hat 1, g·w 1, its sum 2, dx 3, dw 2: 9 per element."""
    return op.moving(9 * _first(op))


@rule("aten.native_batch_norm", "aten.cudnn_batch_norm", "aten._native_batch_norm_legit",
      "aten._native_batch_norm_legit_functional", "aten._batch_norm_with_update", kind="reduction")  # fmt: skip
def batch_norm(op: Op) -> Work:
    """As layer norm, over the batch: 7 per element."""
    return op.moving(7 * _first(op))


@rule("aten.native_batch_norm_backward", "aten.cudnn_batch_norm_backward", "aten.batch_norm_backward",
      kind="reduction")  # fmt: skip
def batch_norm_backward(op: Op) -> Work:
    """As layer norm's: 12 per element."""
    return op.moving(12 * _first(op))


@rule("aten._softmax", "aten._safe_softmax", "aten._log_softmax", kind="reduction")
def softmax(op: Op) -> Work:
    """Maximum, subtract, exp, sum, divide (or subtract the log): 5 per element."""
    return op.moving(5 * _first(op))


@rule("aten._softmax_backward_data", "aten._log_softmax_backward_data", kind="reduction")
def softmax_backward(op: Op) -> Work:
    """y·(g - sum(g·y)): 4 per element; log-softmax g - exp(y)·sum(g), the same."""
    return op.moving(4 * _first(op))


@rule("aten.nll_loss_forward", "aten.nll_loss2d_forward", kind="reduction")
def nll_loss(op: Op) -> Work:
    """Picks one log-probability per target and adds: it reads the rows' one element, not the table."""
    picked = op["target"].numel
    size = op["self"].n_bytes // max(1, op["self"].numel)
    return Work(picked, op["target"].n_bytes + picked * size, sum(t.n_bytes for t in op.written))


@rule("aten.nll_loss_backward", "aten.nll_loss2d_backward", kind="reduction")
def nll_loss_backward(op: Op) -> Work:
    """Fills the gradient with zeros and writes one value per target."""
    return Work(0, op["target"].n_bytes + op["grad_output"].n_bytes, op.output.n_bytes)
