"""What is changed in torch while a trace runs, all of it here, all of it undone.

On a torch without CUDA, ``"cuda"`` fails in some places before any dispatch could translate it, and some of torch's
Python asks ``tensor.device.type`` and gets on with what it hears. So for the duration of a trace "cuda" is translated
to the fake accelerator going in, and the fake accelerator answers "cuda" when asked from Python. C++ asks by another
door (``prim.device``) and still hears the truth.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import optimizer as optimizer_module
from torch.utils import _device, _foreach_utils
from torch.utils._python_dispatch import _disable_current_modes

from bursar.trace import accelerator, autocast
from bursar.trace.values import Values

_ABSENT = object()
CUDA = torch.device("cuda", 0)


class Undo:
    """Attributes set for a while; `restore` puts every one back, the last first."""

    def __init__(self) -> None:
        self._old: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> Any:
        """Set ``owner.name`` and return what stood there."""
        old = vars(owner).get(name, _ABSENT) if isinstance(owner, type) else getattr(owner, name, _ABSENT)
        self._old.append((owner, name, old))
        setattr(owner, name, value)
        return getattr(owner, name) if old is _ABSENT else old

    def has(self, owner: Any, name: str) -> bool:
        """Whether ``owner.name`` is set at present."""
        return any(o is owner and n == name for o, n, _ in self._old)

    def restore(self) -> None:
        """Put everything back."""
        while self._old:
            owner, name, old = self._old.pop()
            if old is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, old)


def translate(device: Any) -> Any:
    """The fake accelerator for anything that means CUDA; everything else as it came."""
    if isinstance(device, torch.device):
        return torch.device(accelerator.NAME, 0) if device.type == "cuda" else device
    if isinstance(device, str) and device.split(":")[0] == "cuda":
        return torch.device(accelerator.NAME, 0)
    return device


def _numbers(data: Any) -> Any:
    """A list of numbers where some are fake tensors: torch reads them, and so do we, if their values are known."""
    if isinstance(data, (list, tuple)):
        return [_numbers(part) for part in data]
    return data.item() if isinstance(data, FakeTensor) and not data.dim() else data


def _default_device() -> torch.device | None:
    """The device of the innermost ``with torch.device(...)``; torch.get_default_device would make a tensor to tell."""
    modes = reversed(torch.overrides._get_current_function_mode_stack())
    return next((mode.device for mode in modes if isinstance(mode, _device.DeviceContext)), None)


@contextlib.contextmanager
def modules_may_move(replaced: Callable[[torch.nn.Module, str, Any], None]) -> Iterator[None]:
    """Within this block ``Module.to`` and its like work on fake tensors, and leave a user's own module for a fake one.

    ``replaced(module, name, real_parameter)`` is told of each real parameter or buffer that a move replaces by a fake
    one, so that the caller can put it back.
    """
    undo = Undo()
    try:
        _modules(undo, replaced)
        yield
    finally:
        undo.restore()


@contextlib.contextmanager
def cuda_means_fake() -> Iterator[None]:
    """Within this block ``"cuda"`` is the fake accelerator."""
    undo = Undo()
    try:
        _tensors(undo)
        _autocast(undo)
        _cuda_module(undo)
        yield
    finally:
        undo.restore()
        autocast.clear_cache()


@contextlib.contextmanager
def foreach_optimizers() -> Iterator[None]:
    """Let optimizers batch fake tensors: on CUDA they do, but torch looks at the exact type and sees a subclass."""
    undo = Undo()
    try:
        for module in (optimizer_module, _foreach_utils):
            undo.set(module, "_foreach_supported_types", [*module._foreach_supported_types, FakeTensor])
        yield
    finally:
        undo.restore()


def _tensors(undo: Undo) -> None:
    name = accelerator.NAME
    true_device = FakeTensor.__dict__["device"].fget

    def device(self: Any) -> torch.device:
        found: torch.device = true_device(self)
        return CUDA if found.type == name else found

    undo.set(FakeTensor, "device", property(device, FakeTensor.__dict__["device"].fset))
    undo.set(FakeTensor, "is_cuda", property(lambda self: self.fake_device.type == name))
    # Now that torch.cuda.is_available() says yes, fake mode would move real constants and build tensors on a device.
    undo.set(FakeTensorMode, "avoid_device_init", True)
    new = FakeTensor.__new__

    def fake_new(cls: Any, *args: Any, **kwargs: Any) -> Any:
        # (fake_mode, elem, device, ...) by position or by name
        if len(args) > 2 and args[2] is not None:
            args = (*args[:2], translate(args[2]), *args[3:])
        for key in ("device", "fake_device", "_fake_device"):
            if key in kwargs:
                kwargs[key] = translate(kwargs[key])
        return new(cls, *args, **kwargs)

    undo.set(FakeTensor, "__new__", staticmethod(fake_new))

    to = torch.Tensor.to

    def tensor_to(self: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple(translate(CUDA if type(a) is int else a) for a in args)
        if "device" in kwargs:
            kwargs["device"] = translate(kwargs["device"])
        return to(self, *args, **kwargs)

    undo.set(torch.Tensor, "to", tensor_to)
    undo.set(
        torch.Tensor,
        "cuda",
        lambda self, device=None, non_blocking=False, memory_format=torch.preserve_format: to(
            self, translate(CUDA), non_blocking=non_blocking, memory_format=memory_format
        ),
    )
    wrapper = torch.Tensor._make_wrapper_subclass

    def wrapper_subclass(*args: Any, **kwargs: Any) -> Any:  # a tensor made of several, an 8-bit state say
        return wrapper(*args, **{**kwargs, "device": translate(kwargs.get("device"))})

    undo.set(torch.Tensor, "_make_wrapper_subclass", staticmethod(wrapper_subclass))
    _device._device_constructors()  # torch remembers these functions on first use: let it be the true ones
    for factory in ("tensor", "as_tensor", "asarray"):  # other factories are translated when they are dispatched
        plain = getattr(torch, factory)

        @functools.wraps(plain)
        def made(*args: Any, _plain: Any = plain, **kwargs: Any) -> Any:
            device = kwargs.pop("device", None)
            if device is None and args and isinstance(args[0], torch.Tensor):
                return _plain(*args, **kwargs)
            args = (_numbers(args[0]), *args[1:]) if args else args
            device = translate(_default_device() if device is None else device)
            if str(device).split(":")[0] != name:
                return _plain(*args, device=device, **kwargs)
            wants = kwargs.pop("requires_grad", False)  # made on the host and moved: torch builds it below the modes
            return to(_plain(*args, device="cpu", **kwargs), device).requires_grad_(wants)

        undo.set(torch, factory, made)

    context = _device.DeviceContext.__init__  # `with torch.device("cuda")` and set_default_device

    def context_init(self: Any, device: Any) -> None:
        context(self, translate(torch.device(device)))

    undo.set(_device.DeviceContext, "__init__", context_init)


def _modules(undo: Undo, replaced: Callable[[torch.nn.Module, str, Any], None]) -> None:
    apply: Callable[..., Any] = torch.nn.Module._apply
    moved: dict[int, tuple[Any, Any]] = {}  # a tied parameter is moved once; the real one is kept alive for its id

    def module_apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        if recurse:
            for child in self.children():
                child._apply(fn)
        for key, param in self._parameters.items():
            if param is None:
                continue
            with torch.no_grad():
                applied = fn(param)
            if applied is param:
                continue
            if isinstance(param, FakeTensor):  # in place, as torch does for real ones: optimizers keep their grip
                grad, param.grad = param.grad, None
                # torch.utils.swap_tensors without its refusal of weak references, of which fake tensors have some
                moving = torch.nn.Parameter(applied, requires_grad=param.requires_grad)
                del applied
                torch._C._swap_tensor_impl(param, moving)
                param.__dict__, moving.__dict__ = moving.__dict__, param.__dict__
                if grad is not None:
                    param.grad = fn(grad)
            elif isinstance(applied, FakeTensor):
                if id(param) not in moved:
                    moved[id(param)] = (param, torch.nn.Parameter(applied, requires_grad=param.requires_grad))
                replaced(self, key, param)
                self._parameters[key] = moved[id(param)][1]
            else:
                return apply(self, fn, recurse=False)
        for key, buf in self._buffers.items():
            if buf is not None:
                applied = fn(buf)
                if isinstance(applied, FakeTensor) and not isinstance(buf, FakeTensor):
                    replaced(self, key, buf)
                self._buffers[key] = applied
        return self

    undo.set(torch.nn.Module, "_apply", module_apply)


def _autocast(undo: Undo) -> None:
    init = torch.autocast.__init__

    def autocast_init(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        init(self, accelerator.NAME if device_type == "cuda" else device_type, *args, **kwargs)

    undo.set(torch.autocast, "__init__", autocast_init)
    for question in ("is_autocast_enabled", "get_autocast_dtype"):
        plain = getattr(torch, question)
        undo.set(
            torch,
            question,
            lambda *args, _plain=plain: _plain(*(accelerator.NAME if a == "cuda" else a for a in args)),
        )
    clear = torch.clear_autocast_cache

    def clear_autocast_cache() -> None:
        autocast.clear_cache()
        clear()

    undo.set(torch, "clear_autocast_cache", clear_autocast_cache)


class _DeviceGuard(contextlib.nullcontext[None]):
    """``torch.cuda.device``, a class because torch asks what is one."""

    idx = 0

    def __init__(self, device: Any) -> None:
        super().__init__()


class _Generator(torch.Generator):
    """``torch.Generator("cuda")`` is one of the host's, which fake tensors take as well."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return torch._C.Generator("cpu" if translate(device) != device else device)


def _step_whatever_was_found(scaler: Any, optimizer: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
    """GradScaler's step, as if no gradient overflowed: whether one did is data."""
    return optimizer.step(*args, **kwargs)


def _cuda_module(undo: Undo) -> None:
    """``torch.cuda`` answers as a machine with one device would; nothing is touched."""
    fake = getattr(torch, accelerator.NAME)
    for name in ("synchronize", "empty_cache", "set_device", "current_stream", "default_stream", "stream",
                 "get_rng_state", "set_rng_state", "is_bf16_supported", "get_device_properties", "Stream",
                 "Event"):  # fmt: skip
        undo.set(torch.cuda, name, getattr(fake, name))
    for module in (torch.cuda, fake):
        undo.set(module, "is_available", lambda: True)
    undo.set(torch.cuda, "is_initialized", lambda: True)
    undo.set(torch.cuda, "device_count", lambda: 1)
    undo.set(torch.cuda, "current_device", lambda: 0)
    undo.set(torch.cuda, "get_device_name", lambda device=None: "bursar's fake accelerator")
    undo.set(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    undo.set(torch.cuda, "_lazy_init", lambda: None)
    undo.set(torch.cuda, "is_current_stream_capturing", lambda: False)  # optimizers ask, before torch 2.13
    for name in ("manual_seed", "manual_seed_all", "seed", "seed_all", "init", "ipc_collect", "reset_peak_memory_stats",
                 "reset_accumulated_memory_stats", "reset_max_memory_allocated", "reset_max_memory_cached",
                 "set_per_process_memory_fraction"):  # fmt: skip
        undo.set(torch.cuda, name, lambda *args, **kwargs: None)
    for name in ("range_push", "range_pop", "mark"):  # a torch without CUDA has no NVTX
        undo.set(torch.cuda.nvtx, name, lambda *args: 0)
    undo.set(torch.cuda, "initial_seed", lambda: 0)
    undo.set(torch.cuda, "device", _DeviceGuard)
    undo.set(torch.cuda, "memory_stats", lambda device=None: {})
    undo.set(torch.cuda, "memory_summary", lambda device=None, abbreviated=False: "")
    undo.set(torch.cuda, "mem_get_info", lambda device=None: (80 * 10**9, 80 * 10**9))
    undo.set(torch, "Generator", _Generator)
    undo.set(torch.Tensor, "record_stream", lambda self, stream: None)
    undo.set(torch.Tensor, "pin_memory", lambda self, device=None: self)
    undo.set(torch.amp.GradScaler, "_maybe_opt_step", _step_whatever_was_found)
    # Eval's fused kernel of nn.TransformerEncoderLayer has no rule, nor in torch 2.11 a fake one: run its parts
    undo.set(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        undo.set(torch.cuda, name, lambda device=None: 0)


def transformers_kernels(undo: Undo, values: Values) -> None:
    """Let transformers choose the kernels of a real run, where it is loaded.

    It recognises fake tensors and, unable to look whether anything is masked or packed, hands attention a dense mask
    where real tensors get ``is_causal``: more FLOPs, and no flash kernel. A tensor whose values the trace knows (made
    of constants: positions, a mask of ones) may be looked at like a real one. Of positions that are not known we say
    that nothing is packed. Switch's experts go by name, ``f"expert_{index}"``. Each is done once, however often asked.
    """
    plain_format: Any = FakeTensor.__format__

    def formatted(tensor: Any, spec: str) -> str:
        known = None if tensor.dim() else values.of(tensor)
        return plain_format(tensor, spec) if known is None else format(tensor.item(), spec)

    if not undo.has(FakeTensor, "__format__"):
        undo.set(FakeTensor, "__format__", formatted)
    imports = sys.modules.get("transformers.utils.import_utils")
    if imports is not None and not undo.has(imports, "is_fake_tensor"):
        undo.set(imports, "is_fake_tensor", lambda x: isinstance(x, FakeTensor) and values.of(x) is None)
    masking = sys.modules.get("transformers.masking_utils")
    packed = "find_packed_sequence_indices"
    if imports is not None and masking is not None and hasattr(masking, packed) and not undo.has(masking, packed):
        plain = masking.find_packed_sequence_indices
        undo.set(
            masking,
            "find_packed_sequence_indices",
            lambda positions: None if imports.is_fake_tensor(positions) else plain(positions),
        )


def forget_transformers_tables() -> None:
    """Empty the caches in which transformers' models keep tables of positions: a fake one must not outlive its trace,
    nor a real one come into it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.models.") and ".modeling_" in name:
            for table in _tables(module):
                table.cache_clear()


@functools.cache
def _tables(module: Any) -> tuple[Any, ...]:
    """The functions of a module's classes that remember what they returned, under whatever decorators."""
    classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    functions = [getattr(held, "__func__", held) for c in classes for held in vars(c).values()]
    cells = [cell for f in functions for cell in getattr(f, "__closure__", None) or ()]
    found: list[Any] = []
    for cell in cells:
        with contextlib.suppress(ValueError):  # an empty cell
            found.append(cell.cell_contents)
    return tuple(f for f in found if isinstance(f, functools._lru_cache_wrapper))


def torchao_tables(optimizer: Any) -> None:
    """Make torchao's tables of 8-bit codes from real numbers: it keeps them for good, and a trace has none to give."""
    if type(optimizer).__module__.startswith("torchao."):
        from torchao.optim import subclass_8bit

        with _disable_current_modes(), torch.device("cpu"):
            subclass_8bit.get_qmap_signed()
            subclass_8bit.get_qmap_unsigned()
