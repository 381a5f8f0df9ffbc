"""One value in, one value out.

A function evaluation is one FLOP, whatever the function; work on integers and booleans is none.
"""

from __future__ import annotations

from bursar.rules import Op, Tensor, Work, rule
from bursar.rules.copy import WRITE_ONLY


def pointwise(op: Op, per_element: int = 1) -> Work:
    """``per_element`` FLOPs for each element of the widest tensor among the results (or, in place, what is written)."""
    written = op.written or op.outputs
    is_float = any(t.is_float for t in (*written, *op.inputs))
    n = max((t.numel for t in written), default=0)
    skip = op.writes if op.name in WRITE_ONLY else ()
    return op.moving(per_element * n if is_float else 0, skip=skip)


@rule("aten.addcmul", "aten.addcmul_", "aten.addcdiv", "aten.addcdiv_", kind="elementwise")
def addcmul(op: Op) -> Work:
    """self + value·a·b (or a/b): 3 per element."""
    return pointwise(op, 3)


@rule("aten.lerp", "aten.lerp_", kind="elementwise")
def lerp(op: Op) -> Work:
    """self + w·(end - self): 3 per element."""
    return pointwise(op, 3)


UNTAGGED = ("mish mish_backward elu elu_backward celu hardswish hardswish_backward _prelu_kernel "
            "_prelu_kernel_backward leaky_relu leaky_relu_backward hardtanh hardtanh_backward hardsigmoid "
            "hardsigmoid_backward softplus softplus_backward softshrink softshrink_backward hardshrink "
            "hardshrink_backward log_sigmoid_forward log_sigmoid_backward glu glu_backward rrelu_with_noise "
            "rrelu_with_noise_backward rrelu_with_noise_functional huber_loss_backward smooth_l1_loss_backward "
            "binary_cross_entropy_backward soft_margin_loss_backward polar where add sub rsub mul div "
            "floor_divide remainder bitwise_and bitwise_or bitwise_xor bitwise_left_shift bitwise_right_shift "
            "__lshift__ __rshift__ abs eq ne lt le gt ge relu gelu gelu_backward threshold threshold_backward isinf "
            "isnan isin bucketize searchsorted copysign heaviside gcd lcm xlogy _add_relu _conj_physical "
            "quantize_per_tensor quantize_per_channel quantize_per_tensor_dynamic").split()  # fmt: skip


@rule(*(f"aten.{name}" for name in UNTAGGED), kind="elementwise")
def untagged(op: Op) -> Work:
    """Pointwise, though torch (2.13) does not tag them so."""
    return pointwise(op)


QUANTIZERS = ("fake_quantize_per_tensor_affine_cachemask fake_quantize_per_channel_affine_cachemask "
              "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams _fake_quantize_learnable_per_tensor_affine "
              "_fake_quantize_learnable_per_channel_affine _fused_moving_avg_obs_fq_helper "
              "_fake_quantize_learnable_per_tensor_affine_backward "
              "_fake_quantize_learnable_per_channel_affine_backward").split()  # fmt: skip


@rule(*(f"aten.{name}" for name in QUANTIZERS), kind="elementwise")
def fake_quantize(op: Op) -> Work:
    """Divide, round, shift, clamp, and back: 5 per element."""
    return op.moving(5 * op.output.numel)


@rule("aten.linalg_cross", kind="elementwise")
def cross(op: Op) -> Work:
    """Each of three components a·b - c·d: 3 per element."""
    return pointwise(op, 3)


@rule("aten.renorm", "aten.embedding_renorm_", kind="elementwise")
def renorm(op: Op) -> Work:
    """A norm 2, and a scale 1: 3 per element."""
    return op.moving(3 * op.inputs[0].numel)


@rule("aten.masked_fill", "aten.masked_fill_", kind="elementwise")
def masked_fill(op: Op) -> Work:
    """Chooses, computes nothing: reads the tensor and the mask, writes the tensor."""
    return op.moving()


@rule("aten.native_dropout", kind="elementwise")
def dropout(op: Op) -> Work:
    """Draw, compare, scale: 1 multiply per element; writes the result and a mask of one byte each."""
    return op.moving(op["input"].numel)


@rule("aten.native_dropout_backward", kind="elementwise")
def dropout_backward(op: Op) -> Work:
    """g·mask·scale: 2 per element."""
    return op.moving(2 * op["grad_output"].numel)


@rule("aten.mse_loss", kind="reduction")
def mse_loss(op: Op) -> Work:
    """Subtract, square, add: 3 per element."""
    return op.moving(3 * op["self"].numel)


@rule("aten.mse_loss_backward", kind="elementwise")
def mse_loss_backward(op: Op) -> Work:
    """(x - y)·2/n·g: 3 per element."""
    return op.moving(3 * op["self"].numel)


FOREACH_FLOPS = {"addcmul": 3, "addcdiv": 3, "lerp": 3, "copy": 0, "zero": 0}  # the rest: 1 per element


def foreach(op: Op) -> Work:
    """One kernel over lists of tensors (the multi-tensor optimizers): per element, what its single op costs."""
    base = op.name.removeprefix("aten._foreach_").rstrip("_")
    results: list[Tensor] = list(op.written or op.outputs)
    per_element = FOREACH_FLOPS.get(base, 1)
    if base in ("norm", "max"):  # a reduction: square and add, or compare, per input element
        return op.moving((2 if base == "norm" else 1) * sum(t.numel for t in op.inputs))
    elements = sum(t.numel for t in results if t.is_float)
    return op.moving(per_element * elements, skip=op.writes if op.name in WRITE_ONLY else ())


for _base in ("abs acos add addcdiv addcmul asin atan ceil clamp_max clamp_min copy cos cosh div erf erfc exp expm1 "
              "floor frac lerp lgamma log log10 log1p log2 max maximum minimum mul neg norm pow reciprocal round rsqrt "
              "sigmoid sign sin sinh sqrt sub tan tanh trunc zero").split():  # fmt: skip
    _in_place = () if _base in ("max", "norm") else (f"aten._foreach_{_base}_",)
    rule(f"aten._foreach_{_base}", *_in_place, kind="elementwise")(foreach)


def _fused(op: Op, flops: int) -> Work:
    """One kernel over all parameters. The schema marks the gradients as written, which only a loss scale would do."""
    grads = sum(t.n_bytes for t in op["grads"])
    done = op.moving(flops)
    return Work(flops, done.read_bytes, done.written_bytes - grads if "grads" in op.writes else done.written_bytes)


@rule("aten._fused_adamw_", "aten._fused_adam_", kind="optimizer")
def fused_adam(op: Op) -> Work:
    """Decay 1 multiply (or add), two moments 3 + 4, bias, root, eps and division 4, update 2: 14 per parameter."""
    return _fused(op, 14 * sum(t.numel for t in op["self"]))


@rule("aten._fused_sgd_", kind="optimizer")
def fused_sgd(op: Op) -> Work:
    """Momentum 2 and update 2 per parameter."""
    return _fused(op, 4 * sum(t.numel for t in op["self"]))


@rule("aten._fused_adagrad_", kind="optimizer")
def fused_adagrad(op: Op) -> Work:
    """Square and add 2, root, eps, division 3, update 2 per parameter."""
    return _fused(op, 7 * sum(t.numel for t in op["self"]))


@rule("aten._amp_update_scale_", kind="elementwise")
def update_scale(op: Op) -> Work:
    """The loss scaler's one number."""
    return op.moving(1)


@rule("aten._amp_foreach_non_finite_check_and_unscale_", kind="elementwise")
def unscale(op: Op) -> Work:
    """The loss scaler's check and multiply: 1 per gradient element."""
    return op.moving(sum(t.numel for t in op["self"]))
