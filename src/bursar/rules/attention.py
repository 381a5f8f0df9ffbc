"""Fused attention kernels: the scores never reach memory, and a mask the kernel is told of is work not done.

B batch, H query heads, S queries, T keys, d head size (dv of the values).
"""

from __future__ import annotations

import math
from dataclasses import replace

from bursar.rules import Op, Tensor, Work, rule


def pairs(S: int, T: int, causal: bool = False, left: int | None = None, right: int | None = None) -> int:
    """Query-key pairs the mask lets through: query i sees keys i-left ... i+right, causal being right = 0.

    >>> pairs(64, 64, causal=True) == 64 * 65 // 2
    True
    >>> pairs(4, 4, causal=True, left=1)
    7
    """
    if causal:
        right = 0
    if right is None and left is None:
        return S * T
    if right == 0 and left is None:  # closed form: rows 1, 2, ... T, T, T
        full = min(S, T)
        return full * (full + 1) // 2 + (S - full) * T
    first = [0 if left is None else max(0, i - left) for i in range(S)]
    last = [T if right is None else min(T, i + right + 1) for i in range(S)]
    return sum(max(0, b - a) for a, b in zip(first, last, strict=True))


def attend(op: Op, heads: int, S: int, T: int, d: int, dv: int, backward: bool, **mask: int | bool | None) -> Work:
    """Work of one kernel over ``heads`` = B·H score matrices.

    Forward is QK^T and PV: 2·pairs·(d + dv). Backward is dV, dP, dQ and dK, twice that, and QK^T once more because
    the scores were not stored (Dao 2022, FlashAttention, section 3.1): 2·pairs·d of recompute.
    """
    seen = pairs(S, T, **mask)  # type: ignore[arg-type]
    forward, square = (2 * heads * p * (d + dv) for p in (seen, S * T))
    if not backward:
        return op.moving(forward, full_square_flops=square)
    return op.moving(2 * forward, recompute_flops=2 * heads * seen * d, full_square_flops=2 * square)


def attend_pairs(op: Op, seen: int, q: Tensor, k: Tensor, v: Tensor, backward: bool) -> Work:
    """As `attend`, of a kernel that visits ``seen`` pairs over all its samples and heads, which need not be alike."""
    square = math.prod(q.shape[:-1]) * k.shape[-2]
    forward, whole = (2 * n * (q.shape[-1] + v.shape[-1]) for n in (seen, square))
    if not backward:
        return op.moving(forward, full_square_flops=whole)
    return op.moving(2 * forward, recompute_flops=2 * seen * q.shape[-1], full_square_flops=2 * whole)


def _sdpa(op: Op, backward: bool) -> Work:
    (B, H, S, d), (_, _, T, _), dv = op["query"].shape, op["key"].shape, op["value"].shape[-1]
    return attend(op, B * H, S, T, d, dv, backward, causal=bool(op["is_causal"]))


@rule(
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_fused_attention_overrideable",
    kind="attention",
)
def sdpa(op: Op) -> Work:
    """softmax(QK^T)V on (B, H, S, d); grouped queries cost what their query heads do."""
    return _sdpa(op, backward=False)


@rule(
    "aten._scaled_dot_product_flash_attention_backward",
    "aten._scaled_dot_product_efficient_attention_backward",
    "aten._scaled_dot_product_cudnn_attention_backward",
    "aten._scaled_dot_product_flash_attention_for_cpu_backward",
    "aten._scaled_dot_product_fused_attention_overrideable_backward",
    kind="attention",
)
def sdpa_backward(op: Op) -> Work:
    """Twice forward, and the scores once more."""
    return _sdpa(op, backward=True)


PACKED = "packed sequences are taken to be of equal length: their lengths are data"


def _dense_or_packed(op: Op, backward: bool) -> Work:
    """(B, S, H, d), or packed (total, H, d) with cumulative lengths: then sequences of equal length are assumed."""
    q, k, v = op["query"].shape, op["key"].shape, op["value"].shape
    starts = next((op[n] for n in ("cum_seq_q", "cu_seqlens_q", "cu_seq_q") if op[n]), None)
    H, d, dv = q[-2], q[-1], v[-1]
    if len(q) == 3 or starts is not None:
        B = starts.shape[0] - 1 if starts is not None else 1
        S, T = q[-3] * (q[0] if len(q) == 4 else 1) // B, k[-3] * (k[0] if len(k) == 4 else 1) // B
    else:
        B, S, T = q[0], q[1], k[1]
    left, right = op["window_size_left"], op["window_size_right"]
    causal = bool(op["is_causal"]) or op["custom_mask_type"] in (1, 2)  # 1 top-left, 2 bottom-right
    window = op["window_size"]
    if isinstance(window, (list, tuple)):
        left, right = window
    elif window:
        left = window - 1
    left = left if left is not None and left >= 0 else None
    work = attend(op, B * H, S, T, d, dv, backward, causal=causal, left=left,
                  right=right if right is not None and right >= 0 else None)  # fmt: skip
    return work if starts is None or B == 1 else replace(work, assumes=PACKED)


@rule("aten._flash_attention_forward", "aten._efficient_attention_forward", "torch_attn._varlen_attn",
      "aten._flash_attention_forward_no_dropout_inplace", kind="attention")  # fmt: skip
def packed(op: Op) -> Work:
    """The kernels under SDPA, called directly: heads after the sequence, windows, packed sequences."""
    return _dense_or_packed(op, backward=False)


@rule("aten._flash_attention_backward", "aten._efficient_attention_backward", "torch_attn._varlen_attn_backward",
      kind="attention")  # fmt: skip
def packed_backward(op: Op) -> Work:
    """Twice forward, and the scores once more."""
    return _dense_or_packed(op, backward=True)


@rule("bursar.flex_attention", kind="attention")
def flex_attention(op: Op) -> Work:
    """2·pairs·(d + dv), the pairs those that the mask function lets through."""
    return attend_pairs(op, op["pairs"], op["query"], op["key"], op["value"], backward=False)


@rule("bursar.flex_attention_backward", kind="attention")
def flex_attention_backward(op: Op) -> Work:
    """Twice forward, and the scores once more."""
    return attend_pairs(op, op["pairs"], op["query"], op["key"], op["value"], backward=True)


def _encoder(op: Op, tokens: int, S: int, weights: int, heads: int, d: int) -> Work:
    """Each token meets every element of the weight matrices; each head its S x S pairs, whatever the mask."""
    samples = tokens // max(1, S)
    return op.moving(2 * tokens * weights + 4 * samples * heads * S * S * d)


@rule("aten._transformer_encoder_layer_fwd", kind="matmul")
def encoder_layer(op: Op) -> Work:
    """A whole encoder layer as one kernel (eval's fast path): qkv, scores and values, projection, two of the ffn."""
    x, heads = op["src"], op["num_heads"]
    weights = sum(op[n].numel for n in ("qkv_weight", "proj_weight", "ffn_weight_1", "ffn_weight_2"))
    return _encoder(op, x.numel // x.shape[-1], x.shape[-2], weights, heads, op["embed_dim"] // heads)


@rule("aten._native_multi_head_attention", kind="matmul")
def multi_head_attention(op: Op) -> Work:
    """qkv, scores and values, projection as one kernel."""
    x, heads = op["query"], op["num_head"]
    weights = op["qkv_weight"].numel + op["proj_weight"].numel
    return _encoder(op, x.numel // x.shape[-1], x.shape[-2], weights, heads, op["embed_dim"] // heads)
