"""Autocast on the fake accelerator follows CUDA's policy.

CPU autocast keeps LayerNorm in bf16 where CUDA runs it in fp32, so a CPU run cannot tell CUDA's dtypes. torch's policy
for CUDA is compiled in (aten/src/ATen/autocast_mode.h); these are its lists, applied by Python kernels under
``AutocastPrivateUse1``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

KEY = "AutocastPrivateUse1"
_KEYSET = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)  # type: ignore[attr-defined]
_device_type = ""

# AT_FORALL_LOWER_PRECISION_FP
LOWER = (
    "_convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d convolution "
    "prelu addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul "
    "linalg_multi_dot _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell "
    "scaled_dot_product_attention _scaled_dot_product_flash_attention"
).split()
# AT_FORALL_FP32, and AT_FORALL_FP32_SET_OPT_DTYPE without a dtype given, which comes to the same
FP32 = (
    "acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow softplus layer_norm "
    "native_layer_norm group_norm frobenius_norm nuclear_norm cosine_similarity cosine_embedding_loss nll_loss "
    "nll_loss2d hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss "
    "multilabel_margin_loss soft_margin_loss triplet_margin_loss multi_margin_loss "
    "binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp upsample_nearest1d _upsample_nearest_exact1d "
    "upsample_nearest2d _upsample_nearest_exact2d upsample_nearest3d _upsample_nearest_exact3d upsample_linear1d "
    "upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d upsample_bicubic2d _upsample_bicubic2d_aa "
    "prod softmax log_softmax cumprod cumsum linalg_vector_norm linalg_matrix_norm sum norm rms_norm nll_loss_nd "
    "cross_entropy_loss"
).split()
# AT_FORALL_PROMOTE: the widest floating dtype among the arguments
PROMOTE = "addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add cat stack".split()

_cast_weights: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}


def clear_cache() -> None:
    """Forget the weights cast in this autocast block; torch does so when the outermost block ends."""
    _cast_weights.clear()


def _cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, FakeTensor):
        if not x.is_floating_point() or x.dtype in (dtype, torch.float64) or x.fake_device.type != _device_type:
            return x
        # A leaf weight is cast once per autocast block (cached_cast in autocast_mode.cpp).
        if x.is_leaf and x.requires_grad and x.dtype == torch.float32 and torch.is_autocast_cache_enabled():
            if dtype == torch.float32 or not torch.is_grad_enabled():
                return x.to(dtype)
            hit = _cast_weights.get(id(x))
            if hit is None:
                hit = _cast_weights[id(x)] = (x, x.to(dtype))
            return hit[1]
        return x.to(dtype)
    if isinstance(x, (list, tuple)):
        return type(x)(_cast(y, dtype) for y in x)
    return x


def _floats(args: Any) -> list[torch.dtype]:
    found = []
    for x in args:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            found.append(x.dtype)
        elif isinstance(x, (list, tuple)):
            found += _floats(x)
    return found


def _kernel(op: Any, policy: Callable[[tuple[Any, ...]], torch.dtype | None]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_KEYSET):
            dtype = policy((*args, *kwargs.values()))
            if dtype is None:
                return op(*args, **kwargs)
            return op(*(_cast(x, dtype) for x in args), **{k: _cast(v, dtype) for k, v in kwargs.items()})

    return run


def _lower(args: tuple[Any, ...]) -> torch.dtype | None:
    return torch.get_autocast_dtype(_device_type)


def _fp32(args: tuple[Any, ...]) -> torch.dtype | None:
    return torch.float32


def _promote(args: tuple[Any, ...]) -> torch.dtype | None:
    dtypes = set(_floats(args))
    return torch.float32 if torch.float32 in dtypes and len(dtypes) > 1 else None


def install(device_type: str) -> list[torch.library.Library]:
    """Register the policy for ``device_type``; the libraries returned must be kept alive."""
    global _device_type
    _device_type = device_type
    through = torch.library.Library("_", "IMPL")
    through.fallback(torch.library.fallthrough_kernel, KEY)
    casts = torch.library.Library("aten", "IMPL")
    for names, policy in ((LOWER, _lower), (FP32, _fp32), (PROMOTE, _promote)):
        for name in names:
            packet = getattr(torch.ops.aten, name, None)
            for overload in packet.overloads() if packet is not None else ():
                op = getattr(packet, overload)
                if op._schema.is_mutable or overload.endswith("out"):
                    continue
                casts.impl(op._schema.name.split("::")[1] + ("" if overload == "default" else "." + overload),
                           _kernel(op, policy), KEY)  # fmt: skip
    return [through, casts]
