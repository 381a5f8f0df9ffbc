"""Matrix products. A multiply and an add are two FLOPs, so (m, k) @ (k, n) is 2mkn; a bias or epilogue adds none.

B batch, m rows, k inner, n columns.  Source: scaling-book section 4.
"""

from __future__ import annotations

import math

from bursar.rules import Op, Tensor, Work, rule


@rule("aten.mm", "aten._int_mm", "aten._scaled_mm", "aten._scaled_mm_v2", kind="matmul")
def mm(op: Op) -> Work:
    """(m, k) @ (k, n) -> (m, n): 2mkn; with scales (fp8), they ride in the epilogue."""
    a, b = op.inputs[:2]
    if a.stored is not None or b.stored is not None:
        return sparse_product(op, a, b)
    (m, k), (_, n) = a.shape, b.shape
    return op.moving(2 * m * k * n)


@rule("aten.addmm", "aten._addmm_activation", "aten.addmm_", kind="matmul")
def addmm(op: Op) -> Work:
    """self + (m, k) @ (k, n): 2mkn, the sum rides in the epilogue."""
    a, b = op["mat1"], op["mat2"]
    if a.stored is not None or b.stored is not None:
        return sparse_product(op, a, b)
    (m, k), (_, n) = a.shape, b.shape
    return op.moving(2 * m * k * n, skip=() if op["beta"] != 0 else ("self",))


def sparse_product(op: Op, a: Tensor, b: Tensor) -> Work:
    """(m, k) @ (k, n): 2·nnz·n with a sparse, 2·nnz·m with b sparse; both sparse, each stored element of a meets the
    stored elements of one row of b, nnz(b) / k of them where they lie evenly.
    """
    if a.stored is not None and b.stored is not None:
        return op.moving(2 * a.stored * b.stored // max(1, a.shape[-1]),
                         assumes="the stored elements of sparse factors lie evenly over the rows")  # fmt: skip
    if a.stored is not None:
        return op.moving(2 * a.stored * (b.shape[-1] if len(b.shape) > 1 else 1))
    return op.moving(2 * (b.stored or 0) * a.shape[-2])


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
    a = op["self"]
    return op.moving(2 * (a.numel if a.stored is None else a.stored))


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


@rule("aten.addr", kind="matmul")
def addr(op: Op) -> Work:
    """self + (m,) x (n,): one product of inner size 1, 2mn."""
    return op.moving(2 * op.output.numel, skip=() if op["beta"] != 0 else ("self",))


@rule("aten._grouped_mm", "aten._scaled_grouped_mm", "aten._scaled_grouped_mm_v2", kind="matmul")
def grouped_mm(op: Op) -> Work:
    """One product per group of rows, of columns or of the inner side: each row meets the weights of its group alone.

    (M, k) @ (G, k, n) 2Mkn; (G, m, k) @ (G, k, n) 2Gmkn; (G, m, k) @ (k, N) 2mkN; (m, K) @ (K, n) 2mKn.
    """
    a, b = op.inputs[:2]
    grouped_columns = len(a.shape) == 3 and len(b.shape) == 2
    return op.moving(2 * a.shape[-2] * a.shape[-1] * b.shape[-1] if grouped_columns else 2 * a.numel * b.shape[-1])


@rule("aten._weight_int8pack_mm", "aten._weight_int4pack_mm", "aten._weight_int4pack_mm_for_cpu",
      "aten._weight_int4pack_mm_with_scales_and_zeros", "aten._dyn_quant_matmul_4bit", "aten._mixed_dtypes_linear",
      "aten.mkldnn_linear", "aten._wrapped_quantized_linear_prepacked", "quantized.linear", "quantized.linear_relu",
      "quantized.linear_dynamic", "quantized.linear_relu_dynamic", "quantized.linear_dynamic_fp16",
      "mkldnn._linear_pointwise", "onednn.qlinear_pointwise", kind="matmul")  # fmt: skip
def packed_linear(op: Op) -> Work:
    """(..., k) @ weights packed in any form: 2k per output element; unpacking is not arithmetic of the model."""
    return op.moving(2 * op.inputs[0].shape[-1] * op.output.numel)


@rule("aten._foreach_mm", kind="matmul")
def foreach_mm(op: Op) -> Work:
    """A list of products."""
    return op.moving(sum(2 * a.numel * b.shape[-1] for a, b in zip(op["self"], op["mat2"], strict=True)))


@rule("aten.matmul_backward", kind="matmul")
def matmul_backward(op: Op) -> Work:
    """Each gradient asked for costs what forward did."""
    return op.moving(2 * op["grad"].numel * op["self"].shape[-1] * sum(bool(w) for w in op["mask"]))


@rule("aten._trilinear", kind="matmul")
def trilinear(op: Op) -> Work:
    """sum of i1·i2·i3 as torch does it, i1 with i2 and then with i3: each pair 2 per product where it sums, else 1.

    Source: ``_trilinear`` of aten/src/ATen/native/Linear.cpp. `nn.Bilinear` is 2·B·out·in1·in2 + 2·B·out·in2.
    """
    expands = [set(op[f"expand{i}"] or ()) for i in (1, 2, 3)]
    total = len(op["i1"].shape) + len(expands[0])
    shapes = []
    for i, gone in enumerate(expands, 1):
        sizes = iter(op[f"i{i}"].shape)
        shapes.append([1 if d in gone else next(sizes) for d in range(total)])
    first, second, third = shapes
    summed = set(op["sumdim"] or ())
    early = {d for d in summed if d in expands[2]}  # summed at once: i3 does not have it
    pair = [max(a, b) for a, b in zip(first, second, strict=True)]
    left = [1 if d in early else n for d, n in enumerate(pair)]
    flops = (2 if early else 1) * math.prod(pair)
    flops += (2 if summed - early else 1) * math.prod(max(a, b) for a, b in zip(left, third, strict=True))
    return op.moving(flops)


@rule("aten._euclidean_dist", kind="matmul")
def euclidean_dist(op: Op) -> Work:
    """|x|² - 2xy + |y|² as one product of inner size M + 2: (..., P, M), (..., R, M) -> (..., P, R)."""
    return op.moving(2 * op.output.numel * (op["x1"].shape[-1] + 2))


@rule("torch_nn._linear_cross_entropy_batch_chunked", "torch_nn._linear_cross_entropy_batch_chunked_no_reduction",
      kind="matmul")  # fmt: skip
def linear_cross_entropy(op: Op) -> Work:
    """Logits of the chunks: (N, D) @ (D, V), 2NDV; backward's products are done in it, twice that, where wanted."""
    x, weight = op.inputs[:2]
    made = sum(t.shape in (x.shape, weight.shape) and t.numel > 1 for t in op.outputs)
    return op.moving(2 * x.numel * weight.shape[0] * (1 + made))
