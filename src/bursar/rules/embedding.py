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
      "aten.index_copy_", "aten.scatter_reduce", "aten.index_reduce", "aten._unsafe_index_put",
      "aten._unsafe_masked_index_put_accumulate", "aten.masked_scatter_backward", kind="embedding")  # fmt: skip
def scatter(op: Op) -> Work:
    """Adds or puts each source element in its place; out of place it copies the target first."""
    source = op.inputs[-1]
    target = op.inputs[0].n_bytes if op.returns_new else 0
    indices = sum(t.n_bytes for t in op.inputs[1:-1])
    reduces = any(word in op.name for word in ("add", "reduce", "accumulate")) or op["accumulate"]
    adds = source.numel if reduces and source.is_float else 0
    return Work(adds, target + indices + 2 * source.n_bytes, target + source.n_bytes)


def _bag(op: Op) -> tuple[int, int, int]:
    """(elements picked, bytes of them, FLOPs each: add 1, or compare, and a weight where each sample has its own)."""
    table = op["weight"] or op["grad"]
    picked = op["indices"].numel * table.shape[-1]
    size = table.n_bytes // max(1, table.numel)
    return picked, picked * size, 1 + (op["per_sample_weights"] is not None)


@rule("aten._embedding_bag", "aten._embedding_bag_forward_only", kind="embedding")
def embedding_bag(op: Op) -> Work:
    """Adds up (or takes the maximum of) each bag's rows: 1 per element picked; a mean divides each output."""
    picked, n_bytes, per_element = _bag(op)
    mean = op.output.numel if op["mode"] == 1 else 0
    others = sum(t.n_bytes for t in op.inputs[1:])
    return Work(per_element * picked + mean, n_bytes + others, sum(t.n_bytes for t in op.written))


@rule("aten._embedding_bag_backward", "aten._embedding_bag_dense_backward", "aten._embedding_bag_sparse_backward",
      kind="embedding")  # fmt: skip
def embedding_bag_backward(op: Op) -> Work:
    """Each bag's gradient is added to each of its rows; a dense table's gradient is zeroed before."""
    picked, n_bytes, per_element = _bag(op)
    dense = op.output.stored is None
    others = sum(t.n_bytes for t in op.inputs)
    return Work(per_element * picked, others + n_bytes * dense, op.output.n_bytes + n_bytes * dense)


@rule("aten._embedding_bag_per_sample_weights_backward", kind="embedding")
def embedding_bag_weights_backward(op: Op) -> Work:
    """The gradient of a sample's weight is its row times the bag's gradient: 2 per element picked."""
    picked, n_bytes, _ = _bag(op)
    read = sum(t.n_bytes for name in ("grad", "indices", "offsets", "offset2bag") for t in [op[name]] if t is not None)
    return Work(2 * picked, n_bytes + read, op.output.n_bytes)
