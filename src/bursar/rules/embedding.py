"""Table lookups: no FLOPs forward; they move the rows they touch, not the table."""

from __future__ import annotations

from bursar.rules import Op, Work, rule


@rule("aten.embedding", kind="embedding")
def embedding(op: Op) -> Work:
    """Reads the indices and one row each, writes the rows."""
    rows = op.output.n_bytes
    return Work(0, op["indices"].n_bytes + rows, rows)


@rule("aten.embedding_dense_backward", kind="embedding")
def embedding_backward(op: Op) -> Work:
    """Zeroes the table's gradient and adds each row to it: one add per element of the rows."""
    grad = op["grad_output"]
    return Work(grad.numel, op["indices"].n_bytes + 2 * grad.n_bytes, op.output.n_bytes + grad.n_bytes)


@rule("aten.index_select", "aten.gather", "aten.index", "aten.take", kind="embedding")
def gather(op: Op) -> Work:
    """Reads what it picks and where from, writes what it picked."""
    picked = op.output.n_bytes
    return Work(0, picked + sum(t.n_bytes for t in op.inputs[1:] if not t.is_float), picked)


@rule("aten.index_add", "aten.index_add_", "aten.scatter_add", "aten.scatter_add_", "aten.index_put",
      "aten.index_put_", "aten._index_put_impl_", "aten.scatter", "aten.scatter_", "aten.index_copy",
      "aten.index_copy_",
      kind="embedding")  # fmt: skip
def scatter(op: Op) -> Work:
    """Adds or puts each source element in its place; out of place it copies the target first."""
    source = op.inputs[-1]
    target = op.inputs[0].n_bytes if op.returns_new else 0
    indices = sum(t.n_bytes for t in op.inputs[1:-1])
    adds = source.numel if "add" in op.name or op["accumulate"] else 0
    return Work(adds, target + indices + 2 * source.n_bytes, target + source.n_bytes)
