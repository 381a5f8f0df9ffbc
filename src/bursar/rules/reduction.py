"""Sums and their like: one FLOP per input element."""

from __future__ import annotations

from bursar.rules import Op, Work, rule


def reduce(op: Op, per_element: int = 1) -> Work:
    """``per_element`` FLOPs for each element of the first input."""
    x = op.inputs[0]
    return op.moving(per_element * x.numel if x.is_float or any(t.is_float for t in op.outputs) else 0)


@rule("aten.sum", "aten.mean", "aten.cumsum", "aten.cumsum_", "aten.prod", "aten.cumprod", "aten.amax", "aten.amin",
      "aten.max", "aten.min", "aten.argmax", "aten.argmin", "aten.any", "aten.all", "aten.nansum", "aten.cummax",
      "aten.cummin", "aten.hash_tensor", "aten._aminmax", "aten.count_nonzero", "aten.equal", "aten.allclose",
      "aten._is_all_true", "aten._is_any_true", kind="reduction")  # fmt: skip
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
      "aten.adaptive_max_pool3d", "aten.adaptive_avg_pool1d", "aten.adaptive_avg_pool2d", "aten.adaptive_avg_pool3d",
      "aten.fractional_max_pool2d", "aten.fractional_max_pool3d", "aten.mkldnn_max_pool2d", "aten.mkldnn_max_pool3d",
      "aten.quantized_max_pool2d", "aten.max_pool3d_with_indices", kind="reduction")  # fmt: skip
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
      "aten.adaptive_max_pool3d_backward", "aten.adaptive_avg_pool3d_backward", "aten.fractional_max_pool2d_backward",
      "aten.fractional_max_pool3d_backward", "aten.max_pool2d_backward", "aten.max_pool3d_with_indices_backward",
      kind="reduction")  # fmt: skip
def pool_backward(op: Op) -> Work:
    """Each gradient is added where it came from."""
    return op.moving(op["grad_output"].numel, skip=("self",))


@rule("aten.topk", "aten.sort", "aten.argsort", "aten.kthvalue", "aten.median", "aten.nanmedian", "aten.mode",
      "aten.histc", kind="reduction")  # fmt: skip
def order(op: Op) -> Work:
    """Comparisons are not floating-point arithmetic by our count: it moves bytes."""
    return op.moving()


@rule("aten.unique_dim", "aten._unique2", "aten._unique", "aten.unique_consecutive", "aten.unique_dim_consecutive",
      kind="reduction")  # fmt: skip
def unique(op: Op) -> Work:
    """Comparisons; how many values differ is data."""
    return op.moving(assumes="unique finds every value once, the most it can")


@rule("aten.histogram", "aten._histogramdd_from_bin_cts", "aten._histogramdd_from_bin_tensors", "aten.bincount",
      "aten._histogramdd_bin_edges", kind="reduction")  # fmt: skip
def histogram(op: Op) -> Work:
    """One add per value; finding its bin is comparing."""
    bins = "bincount counts as many classes as there are values" if op.name.endswith("bincount") else ""
    return op.moving(op.inputs[0].numel if any(t.is_float for t in op.inputs) else 0, assumes=bins)


@rule("aten.trace", kind="reduction")
def trace(op: Op) -> Work:
    """The diagonal's sum, which is all it reads."""
    n = min(op["self"].shape)
    size = op.output.n_bytes
    return Work(n, n * size, size)


@rule("aten.dist", kind="reduction")
def dist(op: Op) -> Work:
    """Subtract, square, add: 3 per element."""
    return op.moving(3 * max(t.numel for t in op.inputs))


@rule("aten.logcumsumexp", "aten._logcumsumexp", kind="reduction")
def logcumsumexp(op: Op) -> Work:
    """As logsumexp, 4 per element, and a logarithm each: 5."""
    return reduce(op, 5)


@rule("aten._cdist_forward", kind="reduction")
def cdist(op: Op) -> Work:
    """Every pair of rows: subtract, power, add over the M columns, 3PRM."""
    return op.moving(3 * op.output.numel * op["x1"].shape[-1])


@rule("aten._cdist_backward", kind="reduction")
def cdist_backward(op: Op) -> Work:
    """Every pair and column: subtract, scale by the distance 2, add: 4PRM."""
    return op.moving(4 * op["cdist"].numel * op["x1"].shape[-1])


@rule("aten._pdist_forward", kind="reduction")
def pdist(op: Op) -> Work:
    """Every pair of one set: 3 per pair and column."""
    return op.moving(3 * op.output.numel * op["self"].shape[-1])


@rule("aten._pdist_backward", kind="reduction")
def pdist_backward(op: Op) -> Work:
    """To both rows of a pair: 5 per pair and column."""
    return op.moving(5 * op["pdist"].numel * op["self"].shape[-1])


@rule("aten.segment_reduce", "aten._segment_reduce_backward", kind="reduction")
def segment_reduce(op: Op) -> Work:
    """One add or comparison per element of the data."""
    return op.moving((op["data"]).numel)


@rule("aten.reflection_pad1d_backward", "aten.reflection_pad2d_backward", "aten.reflection_pad3d_backward",
      "aten.replication_pad1d_backward", "aten.replication_pad2d_backward", "aten.replication_pad3d_backward",
      kind="reduction")  # fmt: skip
def pad_backward(op: Op) -> Work:
    """Each gradient is added where its value came from."""
    return op.moving(op["grad_output"].numel, skip=("self",))


@rule("aten.multi_margin_loss", "aten.multilabel_margin_loss_forward", kind="reduction")
def margin_loss(op: Op) -> Work:
    """Subtract, add the margin, clamp, add: 4 per element and target of its row."""
    targets = op["target"].shape[-1] if op.name.startswith("aten.multilabel") and op["target"].shape else 1
    return op.moving(4 * op["self"].numel * targets)


@rule("aten.multi_margin_loss_backward", "aten.multilabel_margin_loss_backward", kind="reduction")
def margin_loss_backward(op: Op) -> Work:
    """Twice that: the comparison again, and the two sums."""
    targets = op["target"].shape[-1] if op.name.startswith("aten.multilabel") and op["target"].shape else 1
    return op.moving(8 * op["self"].numel * targets)


def _lattice(op: Op) -> int:
    """Cells of CTC's lattice: T steps by 2 L + 1 labels and blanks, for each of the batch."""
    return int((op["log_alpha"] or op.outputs[1]).numel)


@rule("aten._ctc_loss", "aten._cudnn_ctc_loss", kind="reduction")
def ctc_loss(op: Op) -> Work:
    """Each cell adds up three paths in log space (maximum 2, subtract 3, exp 3, sum 2, log 1) and its label: 12."""
    return op.moving(12 * _lattice(op), assumes="CTC's lattice is as large as the longest input and target")


@rule("aten._ctc_loss_backward", kind="reduction")
def ctc_loss_backward(op: Op) -> Work:
    """The paths from the other end, 12 per cell, and their sum with the first, 4; 3 per log-probability."""
    return op.moving(16 * _lattice(op) + 3 * op["log_probs"].numel)
