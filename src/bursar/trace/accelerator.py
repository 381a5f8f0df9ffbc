"""A fake GPU for a torch that has none.

torch lets a program register one backend of its own, in Python, under the dispatch key ``PrivateUse1``. We register one
named ``gpu`` whose streams, events and generators do nothing. Fake tensors "on" it run forward, backward and foreach
optimizers, so the ops recorded are those a GPU would run, not the CPU's. User code says ``"cuda"`` and sees ``"cuda"``:
`patches` translates at the door.

Three things torch decides by asking CUDA are decided here, at the dispatcher, so that no import style of the user's
escapes them: which attention kernel runs, whether RMSNorm is one kernel, and what autocast casts (`autocast`).

Registration is for the life of the process and happens once; there is no way in torch to take it back. The fake
tensors never reach a kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import backend_registration

from bursar.errors import TraceFailed
from bursar.trace import autocast

NAME = "gpu"
aten = torch.ops.aten
_libraries: list[torch.library.Library] = []  # a Library unregisters its kernels when collected: hold on to them


class _Stream:
    """A stream on which nothing ever waits."""

    stream_id = 0
    device_index = 0
    device_type = 20  # c10::DeviceType::PrivateUse1
    device = property(lambda self: torch.device(NAME, 0))

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def query(self) -> bool:
        return True


class _Event:
    """An event that has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0


class _Module(backend_registration._DummyBackendModule):
    """``torch.gpu``: what torch and user code ask a device module, answered without a device."""

    Stream = _Stream
    Event = _Event

    def is_available(self) -> bool:
        """Not outside a trace, where `patches` says otherwise: a DataLoader would pin memory for it, and fail."""
        return False

    def set_device(self, device: Any) -> None: ...
    def synchronize(self, device: Any = None) -> None: ...
    def empty_cache(self) -> None: ...
    def set_rng_state(self, state: Any, device: Any = None) -> None: ...

    def current_stream(self, device: Any = None) -> _Stream:
        return _Stream()

    default_stream = current_stream

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return True

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.empty(16, dtype=torch.uint8, device="cpu")

    def get_device_properties(self, device: Any = None) -> types.SimpleNamespace:
        return types.SimpleNamespace(name=NAME, major=9, minor=0, multi_processor_count=132, total_memory=80 * 10**9)


_PRIVATE_USE = torch._C._autograd.DeviceType.PrivateUse1
_dropped: list[BaseException] = []


class _Guard(backend_registration._DummyDeviceGuard):
    """Names the device type, and survives being asked for it while an error is on its way out of autograd's engine.

    The engine's stream guard asks in its destructor. Entering Python with an error set there ends the process, so the
    error is taken off and kept: whoever called the engine raises it (`dropped_error`).
    """

    # Bound here, because looking an attribute up while an error is set may clear it (_PyType_Lookup)
    def type_(self, raise_what_is_set: Any = ctypes.pythonapi.PyErr_Occurred) -> Any:
        try:
            raise_what_is_set()  # ctypes does so for every call
        except BaseException as error:
            _dropped.append(error)
        return _PRIVATE_USE


def dropped_error() -> BaseException | None:
    """The first error taken off a device guard since last asked."""
    first = _dropped[0] if _dropped else None
    _dropped.clear()
    return first


# One kernel each on CUDA; a backend without its own gets them taken apart (all ops that torch composes implicitly and
# yet has kernels for, torch 2.13).
ONE_KERNEL = ("_fused_rms_norm", "_fused_rms_norm_backward", "silu_backward", "mish_backward", "native_channel_shuffle")


def install() -> None:
    """Register the fake accelerator, once per process.

    Raises TraceFailed where the process already runs another PrivateUse1 backend (an NPU, say): torch allows one.
    """
    if _libraries:
        return
    taken = torch._C._get_privateuse1_backend_name()
    if taken not in ("privateuseone", NAME):
        raise TraceFailed(
            f"torch's one place for a private backend is taken by {taken!r}, so the fake GPU cannot be registered. "
            "Run bursar in a process that has not loaded it, or trace with on='cpu'."
        )
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module(), device_guard=_Guard())
    kernels = torch.library.Library("aten", "IMPL")
    for key in ("AutogradPrivateUse1", "PrivateUse1"):  # with and without gradients
        kernels.impl("scaled_dot_product_attention", _scaled_dot_product_attention, key)
        kernels.impl("rms_norm", _rms_norm, key)
        kernels.impl("tensor_split.tensor_indices_or_sections", _tensor_split, key)
    # A kernel of the backend's own makes torch use the op's autograd formula instead of decomposing it; it never runs.
    for name in ONE_KERNEL:
        kernels.impl(name, _never, "PrivateUse1")
    _libraries.append(kernels)
    _libraries.extend(autocast.install(NAME))


def _never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a kernel of the fake accelerator was called: fake tensors must stop above it")


def _rms_norm(
    x: torch.Tensor, normalized_shape: list[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> Any:
    """RMSNorm as CUDA runs it: one kernel that saves x, weight and 1/rms in fp32 (off CUDA torch decomposes it)."""
    return aten._fused_rms_norm.default(x, normalized_shape, weight, eps)[0]


def _tensor_split(x: torch.Tensor, where: torch.Tensor, dim: int = 0) -> Any:
    """Ask for the values where torch's own code takes their address, which fake tensors have not."""
    places: Any = where.tolist()
    return aten.tensor_split.indices(x, places, dim) if where.dim() else aten.tensor_split.sections(x, places, dim)


def _scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Choose the kernel as torch does on CUDA (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).

    flash: 4-D, fp16 or bf16, no mask, head_dim <= 256 and equal for q, k, v. efficient: also fp32 and a mask, but no
    grouped queries. math: the rest, which stores the S x S scores and runs full-square matmuls whatever the mask.
    """
    fits_4d = query.dim() == key.dim() == value.dim() == 4
    head_dim = query.shape[-1]
    grouped = fits_4d and query.shape[1] != key.shape[1]
    half = query.dtype in (torch.float16, torch.bfloat16)
    square = not is_causal or query.shape[-2] == key.shape[-2]  # flash would align the mask to the other corner
    choice = _enabled_backends()
    flash = fits_4d and half and square and attn_mask is None and head_dim <= 256 and value.shape[-1] == head_dim
    if choice["flash"] and flash:
        pad = -head_dim % 8
        if pad:  # the kernel wants multiples of 8: torch pads and slices
            query, key, value = (torch.nn.functional.pad(t, (0, pad)) for t in (query, key, value))
            scale = head_dim**-0.5 if scale is None else scale
        out = aten._scaled_dot_product_flash_attention.default(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
        return out[..., :head_dim] if pad else out
    if choice["efficient"] and fits_4d and not grouped and query.dtype != torch.float64:
        bias = attn_mask
        if bias is not None:
            if bias.dtype == torch.bool:
                bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(bias.logical_not(), float("-inf"))
            shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
            if pad := -bias.shape[-1] % 16:  # the kernel wants rows aligned to 16: torch pads and slices
                bias = torch.nn.functional.pad(bias, (0, pad))[..., : bias.shape[-1]]
            bias = bias.expand(shape)
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        return aten._scaled_dot_product_efficient_attention.default(
            query, key, value, bias, needs_grad, dropout_p, is_causal, scale=scale
        )[0]
    return aten._scaled_dot_product_attention_math.default(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


def _enabled_backends() -> dict[str, bool]:
    """What ``torch.nn.attention.sdpa_kernel`` and the backend flags allow."""
    cuda = torch.backends.cuda
    return {"flash": cuda.flash_sdp_enabled(), "efficient": cuda.mem_efficient_sdp_enabled()}
