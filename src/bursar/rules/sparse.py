"""Sparse matrices: work is done for the elements stored, nnz of them, and for no others.

A sparse tensor reaches a rule as its values and indices (`Tensor.stored`); its shape is the full one.
"""

from __future__ import annotations

from bursar.rules import Op, Tensor, Work, rule
from bursar.rules.matmul import sparse_product


def stored(x: Tensor) -> int:
    """The elements stored: all of them where the tensor is dense."""
    return x.numel if x.stored is None else x.stored


@rule("aten._sparse_mm", "aten._sparse_sparse_matmul", "aten.hspmm", kind="matmul")
def sparse_mm(op: Op) -> Work:
    """2·nnz·n."""
    return sparse_product(op, *op.inputs[:2])


@rule("aten._sparse_addmm", "aten.sspaddmm", kind="matmul")
def sparse_addmm(op: Op) -> Work:
    """self + sparse @ dense: 2·nnz·n."""
    return sparse_product(op, op["mat1"], op["mat2"])


@rule("aten.sparse_sampled_addmm", kind="matmul")
def sampled_addmm(op: Op) -> Work:
    """(m, k) @ (k, n) where self has an element: 2·nnz·k."""
    return op.moving(2 * stored(op["self"]) * op["mat1"].shape[-1])


@rule("aten._sparse_mm_reduce_impl", kind="matmul")
def sparse_mm_reduce(op: Op) -> Work:
    """A product whose sum may be another reduction: 2·nnz·n."""
    return op.moving(2 * stored(op["self"]) * op["other"].shape[-1])


@rule("aten._sparse_mm_reduce_impl_backward", kind="matmul")
def sparse_mm_reduce_backward(op: Op) -> Work:
    """To the stored values and to the dense factor, each 2·nnz·n if asked for."""
    wanted = sum(bool(w) for w in op["output_mask"])
    return op.moving(wanted * 2 * stored(op["self"]) * op["weight"].shape[-1])


@rule("aten._sparse_semi_structured_linear", "aten._sparse_semi_structured_mm", "aten._cslt_sparse_mm",
      "aten._sparse_semi_structured_addmm", kind="matmul")  # fmt: skip
def semi_structured(op: Op) -> Work:
    """2:4 sparse weights hold half the elements, each of which meets every column: 2·nnz·n."""
    a, b = op.inputs[0], op.inputs[1]
    weight, dense = (b, a) if op.name.endswith("linear") else (a, op["dense_B"] or op["mat2"] or b)
    columns = dense.shape[-1] if not op.name.endswith("linear") else dense.numel // dense.shape[-1]
    return op.moving(2 * weight.numel * columns)


@rule("aten._sparse_sum", "aten._sparse_sum_backward", "aten._sparse_csr_sum", "aten._sparse_csr_prod",
      "aten._coalesce", "aten._sparse_softmax", "aten._sparse_softmax_backward_data", "aten._sparse_log_softmax",
      "aten._sparse_log_softmax_backward_data", kind="reduction")  # fmt: skip
def sparse_reduction(op: Op) -> Work:
    """Per stored element 1; softmax 5, its backward 4, as the dense ones."""
    per = (4 if "backward" in op.name else 5) if "softmax" in op.name else 1
    return op.moving(per * stored(op.inputs[0]))


@rule("aten._to_sparse", "aten._to_sparse_csr", "aten._to_sparse_csc", "aten._to_sparse_bsr", "aten._to_sparse_bsc",
      "aten._to_dense", "aten.sparse_mask", "aten._sparse_mask_projection", "aten.copy_sparse_to_sparse_",
      "aten._convert_indices_from_coo_to_csr", "aten._convert_indices_from_csr_to_coo",
      "aten._to_sparse_semi_structured", "aten._cslt_compress", kind="copy")  # fmt: skip
def convert(op: Op) -> Work:
    """Moves and computes nothing."""
    dense = op.name.startswith("aten._to_sparse") and op.output.stored == op.output.numel
    return op.moving(assumes="a dense tensor made sparse is taken to have no zeros" if dense else "")
