"""The kernels one operation launches, forward and backward, as `rules.Op` for the rules to price. No torch.

Forward they are what a GPU's eager torch launches: fused attention, fused RMSNorm. Backward they are what autograd
launches when every floating-point input wants a gradient: `backward` reads it off the forward kernel.

B batch, M rows, K inner, N columns; N, C and g in a convolution are batch, channels and groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from bursar.errors import BadInput
from bursar.rules import Op, Tensor

ITEM_BYTES = {
    "fp64": 8, "fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "int64": 8, "bool": 1,
}  # fmt: skip
POINTWISE = frozenset({"pointwise"})  # torch's tag, by which the rules know one FLOP per element


def tensor(dtype: str, *shape: int) -> Tensor:
    """A dense tensor. TF32 is a way to multiply, not to store: such a tensor is fp32."""
    return Tensor(shape, "fp32" if dtype == "tf32" else dtype, math.prod(shape) * ITEM_BYTES[dtype])


def statistics(x: Tensor, *shape: int) -> Tensor:
    """What a kernel keeps beside a result (means, log-sum-exps): fp32, or fp64 for fp64."""
    return tensor("fp64" if x.dtype == "fp64" else "fp32", *shape)


def kernel(name: str, outputs: Sequence[Tensor], *, tags: frozenset[str] = frozenset(), **args: Any) -> Op:
    """One call of ``aten.<name>`` that makes ``outputs``."""
    return Op(f"aten.{name}", args, tuple(outputs), tags)


def pointwise(name: str, *inputs: Tensor, out: Tensor | None = None) -> Op:
    """An elementwise kernel; ``out`` is shaped as the first input unless given."""
    return kernel(name, [out or inputs[0]], tags=POINTWISE, inputs=list(inputs))


def matmul(a: Tensor, b: Tensor) -> Op:
    """(M, K) @ (K, N), the same with a batch in front of both, or (M, K) @ (K,). fp8 factors give a bf16 product."""
    out = tensor("bf16" if a.dtype == "fp8" else a.dtype, *a.shape[:-1], *b.shape[-1:] * (len(b.shape) > 1))
    if len(b.shape) == 1:
        return kernel("mv", [out], self=a, vec=b)
    return kernel("mm" if len(a.shape) == 2 else "bmm", [out], self=a, mat2=b)


def convolution(x: Tensor, weight: Tensor, out: Tensor, transposed: bool) -> Op:
    """A convolution whose output is known already: stride, padding and dilation show in its shape alone."""
    return kernel("convolution", [out], input=x, weight=weight, transposed=transposed)


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: int | None) -> Op:
    """softmax(QK^T)V on (B, H, S, d), fused; a window of W lets a query see itself and the W - 1 before it."""
    B, H, S, _ = q.shape
    kept = [q, statistics(q, B, H, S)]  # the output and the log-sum-exp that backward reads
    if window is None:
        return kernel("_scaled_dot_product_flash_attention", kept, query=q, key=k, value=v, is_causal=causal)
    dense = [Tensor((t.shape[0], t.shape[2], t.shape[1], t.shape[3]), t.dtype, t.n_bytes) for t in (q, k, v)]
    return kernel("_flash_attention_forward", [dense[0], kept[1]], query=dense[0], key=dense[1], value=dense[2],
                  is_causal=True, window_size_left=window - 1, window_size_right=0)  # fmt: skip


def einsum(equation: str, operands: Sequence[Tensor]) -> tuple[Op, ...]:
    """``torch.einsum``'s kernels: operands pairwise from the left, each pair a bmm, or mul where nothing is summed.

    Follows ``einsum`` and ``sumproduct_pair`` of aten/src/ATen/native/Linear.cpp: a label is summed as soon as no later
    operand has it. What stands in an operand alone is summed before its pair is multiplied. Copies that make an operand
    dense for bmm are left out. ``equation`` has its ``->`` and fits the operands (`operation.parse` sees to that).
    """
    inputs, _, result = equation.partition("->")
    dtype = operands[0].dtype
    sizes = [dict(zip(labels, x.shape, strict=True)) for labels, x in zip(inputs.split(","), operands, strict=True)]
    waiting = {s: sum(d.get(s, 1) != 1 for d in sizes) for d in sizes for s in d}
    ops: list[Op] = []

    def total(x: dict[str, int], gone: set[str]) -> dict[str, int]:
        kept = {s: n for s, n in x.items() if s not in gone}
        if gone:
            ops.append(kernel("sum", [tensor(dtype, *kept.values())], self=tensor(dtype, *x.values())))
        return kept

    left = sizes[0]
    if len(sizes) == 1:
        total(left, set(left) - set(result))
    for right in sizes[1:]:
        summed, left_alone, right_alone = set[str](), set[str](), set[str]()
        for s in (left | right).keys() - set(result):
            if left.get(s, 1) != 1 and right.get(s, 1) != 1:
                waiting[s] -= 1
                if waiting[s] == 1:
                    summed.add(s)
                    waiting[s] = 0
            elif waiting[s] == 1:
                (left_alone if left.get(s, 1) != 1 else right_alone).add(s)
                waiting[s] = 0
        a, b = total(left, left_alone & set(left)), total(right, right_alone & set(right))
        left = {s: max(a.get(s, 1), b.get(s, 1)) for s in (a | b) if s not in summed}
        if not summed:
            x, y = (tensor(dtype, *d.values()) for d in (a, b))
            ops.append(pointwise("mul", x, y, out=tensor(dtype, *left.values())))
            continue
        batch = math.prod(n for s, n in a.items() if s in b and s not in summed)
        inner = math.prod(a[s] for s in summed)
        m, n = (math.prod(d.values()) // (batch * inner) for d in (a, b))
        ops.append(matmul(tensor(dtype, batch, m, inner), tensor(dtype, batch, inner, n)))
    return tuple(ops)


# ---------------------------------------------------------------------------------------------------------- backward

# Elementwise functions of one tensor: autograd's kernels and how many whole tensors each reads.
UNARY = {
    "relu": (("threshold_backward", 2),),
    "gelu": (("gelu_backward", 2),),
    "silu": (("silu_backward", 2),),
    "sigmoid": (("sigmoid_backward", 2),),
    "tanh": (("tanh_backward", 2),),
    "exp": (("mul", 2),),
    "log": (("div", 2),),
    "sqrt": (("mul", 1), ("div", 2)),
    "rsqrt": (("pow", 1), ("mul", 1), ("mul", 2)),
    "neg": (("neg", 1),),
    "abs": (("sgn", 1), ("mul", 2)),
    "sin": (("cos", 1), ("mul", 2)),
    "cos": (("sin", 1), ("neg", 1), ("mul", 2)),
}  # fmt: skip
BINARY = ("add", "sub", "mul", "div")


def backward(op: Op, *, inputs_too: bool = True) -> tuple[Op, ...]:
    """The kernels that turn the gradient of ``op``'s output into those of its inputs.

    Without ``inputs_too`` a product or convolution makes the gradient of its weight, the second operand, alone: the
    first layer's backward. Nothing for an op whose backward is a view. Raises BadInput where none is known.
    """
    name = op.name.removeprefix("aten.")
    if name in UNARY:
        return tuple(pointwise(k, *[op.output] * reads) for k, reads in UNARY[name])
    if name not in _BACKWARD:
        raise BadInput(f"the backward of {name} is not known here; ask for the forward")
    made = _BACKWARD[name](op)
    if name in ("mm", "bmm", "mv") and not inputs_too:
        return made[1:]
    if name == "convolution" and not inputs_too:
        return (_convolution_backward(op, d_input=False),)
    return made


def _transposed(x: Tensor) -> Tensor:
    return Tensor((*x.shape[:-2], x.shape[-1], x.shape[-2]), x.dtype, x.n_bytes)


def _matmul(op: Op) -> tuple[Op, ...]:
    """dX = G W^T, dW = X^T G."""
    a, b = op["self"], op["mat2"]
    return matmul(op.output, _transposed(b)), matmul(_transposed(a), op.output)


def _matvec(op: Op) -> tuple[Op, ...]:
    """The vector's is A^T g; the matrix's an outer product, which torch multiplies out elementwise."""
    a, g = op["self"], op.output
    column = Tensor((*g.shape, 1), g.dtype, g.n_bytes)
    return matmul(_transposed(a), g), pointwise("mul", column, op["vec"], out=a)


def _convolution_backward(op: Op, d_input: bool = True) -> Op:
    x, w = op["input"], op["weight"]
    return kernel("convolution_backward", [x, w] if d_input else [w], grad_output=op.output, input=x, weight=w,
                  transposed=op["transposed"], output_mask=[d_input, True, False])  # fmt: skip


def _attention(op: Op) -> tuple[Op, ...]:
    q, k, v = (op[n] for n in ("query", "key", "value"))
    name = op.name.removeprefix("aten.")
    name = name.removesuffix("_forward") + "_backward"
    out, logsumexp = op.outputs
    return (kernel(name, [q, k, v], grad_out=out, **op.args, out=out, logsumexp=logsumexp),)


def _to_shape(g: Tensor, x: Tensor) -> list[Op]:
    """The sum that takes a gradient back to an operand that was broadcast."""
    return [] if g.shape == x.shape else [kernel("sum", [x], self=g)]


def _binary(op: Op) -> tuple[Op, ...]:
    a, b = op["inputs"]
    g, name = op.output, op.name.removeprefix("aten.")
    to_a: list[Op] = []
    to_b: list[Op] = []
    if name == "mul":
        to_a, to_b = [pointwise("mul", g, b)], [pointwise("mul", g, a)]
    elif name == "div":  # g/b, and -g·((a/b)/b)
        to_a = [pointwise("div", g, b)]
        to_b = [pointwise("div", a, b, out=g), pointwise("div", g, b), pointwise("neg", g), pointwise("mul", g, g)]
    elif name == "sub":
        to_b = [pointwise("neg", g)]
    return (*to_a, *_to_shape(g, a), *to_b, *_to_shape(g, b))


def _layer_norm(op: Op) -> tuple[Op, ...]:
    x, w, b, (out, mean, rstd) = op["input"], op["weight"], op["bias"], op.outputs
    made = kernel(
        "native_layer_norm_backward", [x, w, b], grad_out=out, input=x, mean=mean, rstd=rstd, weight=w, bias=b
    )
    return (made,)


def _rms_norm(op: Op) -> tuple[Op, ...]:
    x, w, (out, rstd) = op["input"], op["weight"], op.outputs
    return (kernel("_fused_rms_norm_backward", [x, w], grad_out=out, input=x, rstd=rstd, weight=w),)


def _softmax(op: Op) -> tuple[Op, ...]:
    return (kernel(op.name.removeprefix("aten.") + "_backward_data", [op.output], grad=op.output, output=op.output),)


def _nll(op: Op) -> tuple[Op, ...]:
    log_probabilities, target = op["self"], op["target"]
    args = {"grad_output": op.output, "self": log_probabilities, "target": target, "total_weight": op.outputs[1]}
    return (Op("aten.nll_loss_backward", args, (log_probabilities,)),)


def _mse(op: Op) -> tuple[Op, ...]:
    x, y = op["self"], op["target"]
    return tuple(kernel("mse_loss_backward", [t], grad_output=op.output, self=x, target=y) for t in (x, y))


def _dropout(op: Op) -> tuple[Op, ...]:
    out, mask = op.outputs
    return (kernel("native_dropout_backward", [out], grad_output=out, mask=mask),)


def _embedding(op: Op) -> tuple[Op, ...]:
    return (kernel("embedding_dense_backward", [op["weight"]], grad_output=op.output, indices=op["indices"]),)


_BACKWARD: dict[str, Callable[[Op], tuple[Op, ...]]] = {
    "mm": _matmul,
    "bmm": _matmul,
    "mv": _matvec,
    "convolution": lambda op: (_convolution_backward(op),),
    "_scaled_dot_product_flash_attention": _attention,
    "_flash_attention_forward": _attention,
    **dict.fromkeys(BINARY, _binary),
    "clone": lambda op: (),
    "sum": lambda op: (),  # the gradient, expanded: a view
    "mean": lambda op: (pointwise("div", op.output, out=op["self"]),),
    "native_layer_norm": _layer_norm,
    "_fused_rms_norm": _rms_norm,
    "_softmax": _softmax,
    "_log_softmax": _softmax,
    "nll_loss_forward": _nll,
    "mse_loss": _mse,
    "native_dropout": _dropout,
    "embedding": _embedding,
}
