"""What comes out of the ops that torch's fake tensors do not know, do wrongly, or refuse because a size is data.

Shapes and dtypes only. Where a size is data, the fake is as large as it can be and the op's rule says so
(`Work.assumes`), so the ledger's assumptions carry it to the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten


def _like_first(x: Any, *args: Any, **kwargs: Any) -> Any:
    return torch.empty_like(x)


def _like_second(grad: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    return torch.empty_like(x)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """An op that only writes in place."""


def _empty(like: Any, *shape: int, dtype: torch.dtype | None = None) -> Any:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.fake_device)


def _to_copy(x: Any, **kwargs: Any) -> Any:
    """Move a small constant without its value, which torch would try to make on the fake accelerator."""
    constant = getattr(x, "constant", None)
    if constant is None or kwargs.get("device") in (None, torch.device("cpu")):
        return aten._to_copy.default(x, **kwargs)
    x.constant = None
    try:
        return aten._to_copy.default(x, **kwargs)
    finally:
        x.constant = constant


def _rms_norm(x: Any, shape: Any, weight: Any, eps: Any) -> Any:
    rstd = _empty(x, *x.shape[: x.dim() - len(shape)], *[1] * len(shape), dtype=torch.float32)
    return torch.empty_like(x), rstd


def _rms_norm_backward(grad: Any, x: Any, shape: Any, rstd: Any, weight: Any, mask: Any) -> Any:
    return (torch.empty_like(x) if mask[0] else None), (torch.empty_like(weight) if mask[1] else None)


def _lstm_cell(input_gates: Any, hidden_gates: Any, cx: Any, input_bias: Any = None, hidden_bias: Any = None) -> Any:
    """torch's own (2.13) asks a bias for its device where there is none."""
    return torch.empty_like(cx), torch.empty_like(cx), torch.empty_like(input_gates)


def _gru_cell(input_gates: Any, hidden_gates: Any, hx: Any, input_bias: Any = None, hidden_bias: Any = None) -> Any:
    return torch.empty_like(hx), _empty(hx, *hx.shape[:-1], 5 * hx.shape[-1])


def _gru_cell_backward(grad_hy: Any, workspace: Any, has_bias: bool) -> Any:
    gates = (*grad_hy.shape[:-1], 3 * grad_hy.shape[-1])
    biases = [_empty(grad_hy, gates[-1]) if has_bias else None for _ in range(2)]
    return _empty(grad_hy, *gates), _empty(grad_hy, *gates), torch.empty_like(grad_hy), *biases


def _grouped_mm(a: Any, b: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """torch's own insists on bf16 (2.13), where CUDA multiplies any floats. (rows, k) by one (k, n) per group, or two
    matrices whose inner dimension the groups share: one (m, n) each."""
    if a.dim() == b.dim():
        shape = (offs.shape[0] if a.dim() == 2 else a.shape[0], a.shape[-2], b.shape[-1])
        return _empty(a, *shape, dtype=out_dtype or a.dtype)
    return _empty(a, a.shape[-2], b.shape[-1], dtype=out_dtype or a.dtype)


def _geqrf(x: Any) -> Any:
    return torch.empty_like(x), _empty(x, *x.shape[:-2], min(x.shape[-2:]))


def _lstsq(a: Any, b: Any, rcond: Any = None, *, driver: str | None = None) -> Any:
    """Of full rank: the residuals are there where the system is overdetermined and solved by the default driver."""
    m, n = a.shape[-2:]
    vector = b.dim() == 1 or (a.dim() - 1 == b.dim() and b.shape == a.shape[:-1])
    r = () if vector else (b.shape[-1],)
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-1] if vector else b.shape[:-2])
    on_host = a.fake_device.type == "cpu"
    driver = driver or ("gelsy" if on_host else "gels")
    residuals = (*batch, *r) if m > n and driver != "gelsy" else (0,)
    rank = batch if driver != "gels" else (0,)
    values = (*batch, min(m, n)) if driver in ("gelss", "gelsd") else (0,)
    real = a.dtype.to_real() if a.is_complex() else a.dtype
    return (_empty(a, *batch, n, *r), _empty(a, *residuals, dtype=real), _empty(a, *rank, dtype=torch.int64),
            _empty(a, *values, dtype=real))  # fmt: skip


def _histogram(x: Any, bins: Any, *args: Any, **kwargs: Any) -> Any:
    n = bins if isinstance(bins, int) else bins.numel() - 1
    return _empty(x, n), _empty(x, n + 1)


def _ctc_loss(log_probs: Any, targets: Any, input_lengths: Any, target_lengths: Any, *args: Any, **kwargs: Any) -> Any:
    """The longest target has a row of targets' width; where they stand in a line, each its fair share at least."""
    T, B = log_probs.shape[0], log_probs.shape[1] if log_probs.dim() == 3 else 1
    if targets.dim() == 2:
        longest = targets.shape[1]
    elif isinstance(target_lengths, (list, tuple)):
        longest = max(target_lengths, default=0)
    else:
        longest = math.ceil(targets.shape[0] / max(1, B))
    return _empty(log_probs, B), _empty(log_probs, B, T, 2 * longest + 1)


def _efficient_attention_backward(
    grad: Any, query: Any, key: Any, value: Any, bias: Any, *args: Any, **kwargs: Any
) -> Any:
    """torch's own (2.13) takes no window."""
    d_bias = torch.empty_like(bias) if bias is not None else _empty(query, 0)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), d_bias


# Used in place of torch's
FAKES: dict[str, Callable[..., Any]] = {
    "aten._to_copy": _to_copy,
    "aten._fused_rms_norm": _rms_norm,
    "aten._fused_rms_norm_backward": _rms_norm_backward,
    "aten.silu_backward": _like_second,
    "aten._sample_dirichlet": _like_first,
    "aten._standard_gamma": _like_first,
    "aten.mish_backward": _like_second,
    "aten.native_channel_shuffle": _like_first,
    "aten._fused_sgd_": _nothing,
    "aten._fused_adagrad_": _nothing,
    "aten._thnn_fused_lstm_cell": _lstm_cell,
    "aten._thnn_fused_gru_cell": _gru_cell,
    "aten._thnn_fused_gru_cell_backward": _gru_cell_backward,
    "aten._grouped_mm": _grouped_mm,
    "aten.geqrf": _geqrf,
    "aten.linalg_lstsq": _lstsq,
    "aten.histogram": _histogram,
    "aten._histogramdd_bin_edges": lambda x, bins, *args, **kwargs: [_empty(x, n + 1) for n in bins],
    "aten._histogramdd_from_bin_cts": lambda x, bins, *args, **kwargs: _empty(x, *bins),
    "aten._histogramdd_from_bin_tensors": lambda x, bins, **kwargs: _empty(x, *(b.numel() - 1 for b in bins)),
    "aten.multi_margin_loss_backward": _like_second,
    "aten.multilabel_margin_loss_backward": _like_second,
    "aten.fractional_max_pool3d_backward": _like_second,
    "aten._efficient_attention_backward": _efficient_attention_backward,
    "aten._ctc_loss": _ctc_loss,
    "aten._ctc_loss_backward": _like_second,
    "aten.sparse_compressed_tensor": lambda *args, **kwargs: _compressed(*args, **kwargs),
    "aten._sparse_compressed_tensor_unsafe": lambda *args, **kwargs: _compressed(*args, **kwargs),
}


def _unique(x: Any, *, inverse: bool, counts: bool, dim: int | None = None) -> Any:
    n = x.numel() if dim is None else x.shape[dim]
    found = _empty(x, n) if dim is None else torch.empty_like(x)
    shape = x.shape if dim is None else (n,)
    return (found, _empty(x, *(shape if inverse else (0,)), dtype=torch.int64),
            _empty(x, n if counts else 0, dtype=torch.int64))  # fmt: skip


# Used where torch's fake tensors refuse, the size being data, and where nothing is known of the values either
BOUNDS: dict[str, Callable[..., Any]] = {
    "aten._unique": lambda x, sorted=True, inverse=False: _unique(x, inverse=inverse, counts=False)[:2],
    "aten._unique2": lambda x, sorted=True, inverse=False, counts=False: _unique(x, inverse=inverse, counts=counts),
    "aten.unique_dim": lambda x, dim, sorted=True, inverse=False, counts=False: _unique(
        x, inverse=inverse, counts=counts, dim=dim
    ),
    "aten.unique_consecutive": lambda x, inverse=False, counts=False, dim=None: _unique(
        x, inverse=inverse, counts=counts, dim=dim
    ),
}


def bound(name: str, args: Any, kwargs: Any) -> Any:
    """The most that the op can return, or NotImplemented where nobody has said what that is."""
    fake = BOUNDS.get(name)
    if fake is None:
        return NotImplemented
    renamed = {"return_inverse": "inverse", "return_counts": "counts"}
    return fake(*args, **{renamed.get(k, k): v for k, v in (kwargs or {}).items()})


# ---- sparse tensors, of which torch's fakes know the making and little more


def is_sparse(x: Any) -> bool:
    """Whether ``x`` is a tensor without one storage: COO, CSR and their like."""
    return isinstance(x, torch.Tensor) and x.layout is not torch.strided


def parts(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The dense tensors that a fresh sparse one is made of."""
    if x.layout is torch.sparse_coo:
        return x._indices(), x._values()
    return ()


def _product(a: Any, b: Any) -> Any:
    return torch.empty((a.shape[0], *b.shape[1:]), dtype=b.dtype, device=b.fake_device)


def _compressed(starts: Any, indices: Any, values: Any, size: Any = None, **kwargs: Any) -> Any:
    return torch.empty(size, dtype=values.dtype, layout=kwargs["layout"], device=values.fake_device)


def _like_sparse(x: Any, dtype: torch.dtype) -> Any:
    return torch.empty(x.shape, dtype=dtype, layout=x.layout, device=x.fake_device)


# Used where torch has no fake for sparse arguments on this device
SPARSE: dict[str, Callable[..., Any]] = {
    "aten.mm": _product,
    "aten.mv": _product,
    "aten._sparse_mm": _product,
    "aten._sparse_addmm": lambda x, a, b, **kwargs: _product(a, b),
    "aten.addmm": lambda x, a, b, **kwargs: _product(a, b),
    "aten._to_copy": lambda x, dtype=None, device=None, **kwargs: torch.empty(
        x.shape, dtype=dtype or x.dtype, layout=x.layout, device=device or x.fake_device
    ),
    "aten._sparse_mm_reduce_impl": lambda x, other, reduce: (
        _empty(other, x.shape[0], other.shape[1]),
        _empty(other, 0, dtype=torch.int64),
    ),
    "aten.sparse_mask": lambda x, mask, **kwargs: _like_sparse(mask, x.dtype),
    "aten.sparse_sampled_addmm": lambda x, a, b, **kwargs: _like_sparse(x, x.dtype),
    "aten._to_sparse": lambda x, *args, **kwargs: torch.empty(
        x.shape, dtype=x.dtype, layout=kwargs.get("layout") or torch.sparse_coo, device=x.fake_device
    ),
}


def elements_stored(name: str, result: torch.Tensor, args: Any, of: Callable[[Any], int | None]) -> int:
    """How many elements a sparse ``result`` holds; ``of`` says it of a sparse operand. torch's fakes forget it."""
    if name in ("aten._embedding_bag_backward", "aten._embedding_bag_sparse_backward"):
        return int(args[1].numel() * result.shape[-1])  # a row per index
    tensors = [t for t in args if isinstance(t, torch.Tensor)]
    held = [n for t in tensors if (n := of(t)) is not None]
    if held:
        return max(held)
    return tensors[-1].numel() if tensors else 0  # made of indices and values, the last; or of a dense tensor


def index_bytes(x: torch.Tensor, held: int) -> int:
    """8 bytes per stored row and sparse dimension in COO; in CSR one index per element, and where each row starts."""
    if x.layout is torch.sparse_coo:
        return held // max(1, math.prod(x.shape[x.sparse_dim() :])) * 8 * x.sparse_dim()
    return 8 * (held + x.shape[-2] + 1)
