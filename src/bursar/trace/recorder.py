"""Writes the ledger: a dispatch mode that sees every op torch runs, and asks the rules what it costs.

Keep no references. Autograd hands a gradient over without a copy only if nobody else holds it, so a recorder that kept
outputs would add phantom copies to the step it watches. Storages are known by address and watched by weak reference.

An error may leave backward: the fake accelerator's device guard, which is Python, takes it off on the way out and
`session` raises it once the engine has returned (`accelerator`).
"""

from __future__ import annotations

import bisect
import math
import os
import sys
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from bursar import rules
from bursar.folding import Operands
from bursar.ledger import Call, Operand, Row
from bursar.memory import Storage
from bursar.rules import Op, Tensor, Work
from bursar.trace import accumulation
from bursar.trace.fakes import FAKES, SPARSE, bound, elements_stored, index_bytes, is_sparse, parts
from bursar.trace.scratch import AS_REAL, Scratch
from bursar.trace.values import Values

aten = torch.ops.aten
_ACCUMULATE_GRAD = 2**64 - 1  # the sequence number of every AccumulateGrad node
_ITEM = aten._local_scalar_dense.default
_SOME_STEP = 1000  # what an optimizer hears when it asks a fake tensor for its value: late enough for RAdam to rectify
REAL = frozenset({torch.Tensor, torch.nn.Parameter})  # a tensor of these types was made outside the block

_Priced = tuple[str, Work, str, tuple[tuple[int, ...], ...], tuple[str, ...]]

DTYPE_NAMES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8", torch.float8_e5m2: "fp8", torch.complex64: "complex64",
    torch.complex128: "complex128", torch.bool: "bool",
}  # fmt: skip


def dtype_name(dtype: torch.dtype) -> str:
    """``fp32``, ``bf16``, …: the field's short names; torch's own for the rest."""
    return DTYPE_NAMES.get(dtype) or str(dtype).removeprefix("torch.")


class _OpInfo:
    """What never changes about an op: its name, its schema's arguments, what it writes."""

    __slots__ = (
        "arg_names",
        "asked",
        "defaults",
        "fake",
        "free",
        "func",
        "ignored",
        "is_view",
        "makes_inputs",
        "name",
        "returns_new",
        "tags",
        "writes",
    )

    def __init__(self, func: Any) -> None:
        self.func = func
        schema = func._schema
        namespace, base = schema.name.split("::")
        self.name = f"{namespace}.{base}"
        # prim.* and profiler.* are torch talking to itself, half of the stream of a fake step
        self.ignored = namespace in ("prim", "profiler")
        self.arg_names = [a.name for a in schema.arguments]
        self.asked = _ASKED.get(self.name)
        if self.asked:
            self.arg_names.append("output_mask")
        self.defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        self.writes = tuple(a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write)
        aliases = [r.alias_info for r in schema.returns]
        self.is_view = any(a is not None and not a.is_write for a in aliases)
        self.returns_new = any(a is None for a in aliases)
        self.free = self.is_view or self.name in rules.FREE
        self.tags = frozenset(str(t).split(".")[-1] for t in func.tags)
        self.fake = FAKES.get(self.name)
        found = rules.RULES.get(self.name)
        self.makes_inputs = self.name == "aten._to_copy" or (found is not None and found.work is rules.copy.fill)


class Recorder(TorchDispatchMode):
    """Records ops, storages and their lifetimes on one device type while it is the innermost mode.

    ``tf32`` names the kinds whose fp32 runs on TF32 tensor cores; ``scratch`` says what a kernel takes for itself.
    """

    def __init__(
        self,
        mode: FakeTensorMode,
        device_type: str,
        tf32: frozenset[str] = frozenset(),
        scratch: Scratch | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode = mode
        self.device_type = device_type
        self.tf32 = tf32
        self.scratch = scratch
        self.rows: list[Row] = []
        self.storages: list[Storage] = []
        self.events: list[tuple[int, int, int]] = []  # (row, storage, +bytes or -bytes)
        self.phase = "forward"
        self.backward_depth = 0
        self.after_backward = False
        self.creates_graph = False
        self.muted = 0
        self.elsewhere = 0  # ops of modules that ran on another device: seen, not counted
        self.module = ""
        self.depth = 0
        self.backward_at_depth = 0
        self._live: dict[int, tuple[Storage, Any]] = {}
        self._stand_ins: Any = WeakIdKeyDictionary()  # real tensor -> fake tensor
        self._stored: Any = WeakIdKeyDictionary()  # sparse tensor -> elements it holds
        self._infos: dict[Any, _OpInfo] = {}
        self._costs: dict[Any, _Priced] = {}
        self._entered: list[int] = [0]  # autograd sequence numbers at which the module changed, and to what
        self._entered_module: list[str] = [""]
        self._node_number = -1
        self._node_module = ""
        self.values = Values()
        self.leaf_modules: dict[int, str] = {}  # storage address of a parameter -> its module
        self.calls: list[Call] | None = [] if device_type == "cpu" else None  # one per row
        self._site: tuple[int, int] = (0, 0)
        self._sites = self._views = 0
        self.operands: dict[int, Operands] | None = None  # of the optimizer's rows, where the ledger is to be unfolded

    # ---- what the session tells it

    def enter(self, module: str) -> None:
        """From here on ops belong to ``module``."""
        self.module = module
        number = torch._C._autograd._get_sequence_nr()
        if self._entered[-1] == number:
            self._entered_module[-1] = module
        else:
            self._entered.append(number)
            self._entered_module.append(module)

    def adopt(self, tensor: torch.Tensor, memory_class: str, name: str = "", owner: str = "") -> None:
        """Count ``tensor``'s storage as ``memory_class`` from now on, whoever made it."""
        tensor = unwrapped(tensor)
        if is_sparse(tensor):
            self.muted += 1
            for part in parts(tensor):
                self.adopt(part, memory_class, name)
            self.muted -= 1
            return
        if type(tensor) in REAL and tensor.device.type == self.device_type:
            tensor = self.stand_in(tensor)
        if not isinstance(tensor, FakeTensor) or tensor.fake_device.type != self.device_type:
            return
        storage = self._storage(tensor)
        storage.memory_class = memory_class
        storage.name = storage.name or name
        storage.owner = storage.owner or owner

    def known(self, tensor: torch.Tensor) -> Storage | None:
        """The record of ``tensor``'s storage, if it is on this device and alive."""
        fake = self._stand_ins.get(tensor) if type(tensor) in REAL else tensor
        if is_sparse(fake):
            return None  # its parts are known
        found = self._live.get(fake.untyped_storage()._cdata) if fake is not None else None
        return found[0] if found else None

    def stand_in(self, real: torch.Tensor) -> FakeTensor:
        """The fake tensor that stands for ``real`` in every op, so that nothing computes on a user's own data.

        A scalar on the host (a step count, say) keeps its value in a copy: torch's own code asks for it.
        """
        fake: FakeTensor | None = self._stand_ins.get(real)
        if fake is None:
            with _disable_current_modes(), torch.no_grad():
                scalar = real.dim() == 0 and real.device.type == "cpu"
                alias = real.detach().clone() if scalar else real.detach()
                fake = self.mode.fake_tensor_converter.from_real_tensor(self.mode, alias, make_constant=scalar)
            self._stand_ins[real] = fake
            if type(real) is torch.Tensor and real.device.type == "cpu" and not is_sparse(real):
                self.values.know(fake, real)  # a literal, a table of positions or of rates: what code may look at
            if is_sparse(real):
                with _disable_current_modes():
                    self._stored[fake] = real._nnz() * math.prod(real.shape[real.sparse_dim() :])
            elif fake.fake_device.type == self.device_type and self.known(fake) is None:
                self._storage(fake).made_outside = True
        return fake

    def _without_real(self, value: Any, real: dict[int, torch.Tensor]) -> Any:
        if type(value) in REAL:
            fake = self.stand_in(value)
            real[id(fake)] = value
            return fake
        if type(value) in (list, tuple):
            return type(value)(self._without_real(v, real) for v in value)
        return value

    def resized(self, address: int, n_bytes: int) -> None:
        """A storage was resized in place (FSDP does, and so may a user)."""
        found = self._live.get(address)
        if found is not None and found[0].n_bytes != n_bytes:
            self.events.append((len(self.rows) - 1, found[0].index, n_bytes - found[0].n_bytes))
            found[0].n_bytes = n_bytes

    def close(self) -> None:
        """Stop watching: storages freed from now on are not written down."""
        self._live.clear()
        self._stand_ins = WeakIdKeyDictionary()

    # ---- what torch tells it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        info = self._infos.get(func)
        if info is None:
            info = self._infos[func] = _OpInfo(func)
        for kind in types:
            if kind is not FakeTensor and hasattr(kind, "__tensor_flatten__"):
                return (
                    NotImplemented  # made of several tensors (an 8-bit state): it says which ops on them, and they come
                )
        if info.ignored or self.muted:
            return func(*args, **kwargs) if kwargs else func(*args)
        if _any_real(args) or (kwargs and _any_real(kwargs.values())):
            real: dict[int, torch.Tensor] = {}
            args = self._without_real(tuple(args), real)
            kwargs = {k: self._without_real(v, real) for k, v in kwargs.items()} if kwargs else kwargs
            out = self.__torch_dispatch__(func, types, args, kwargs)
            return real.get(id(out), out)  # what is written in place is returned as it came
        node = torch._C._current_autograd_node() if self.backward_depth else None
        if func is accumulation.ADD and node is not None and not kwargs and not torch.is_grad_enabled():
            in_place = accumulation.into(args)
            if in_place is not None:
                return self.__torch_dispatch__(accumulation.ADD_IN_PLACE, types, in_place)
        try:
            if kwargs:
                device = kwargs.get("device")
                if device is not None and device.type == "cuda" and self.device_type != "cpu":
                    kwargs = {**kwargs, "device": torch.device(self.device_type, 0)}
                out = (info.fake or func)(*args, **kwargs)
            else:
                out = (info.fake or func)(*args)
        except UnsupportedOperatorException:
            if info.name not in SPARSE:
                raise
            out = SPARSE[info.name](*args, **(kwargs or {}))
        except (DataDependentOutputException, DynamicOutputShapeException):
            out = self.values.answer(func, args, kwargs)
            if out is NotImplemented:
                out = bound(info.name, args, kwargs)
            if out is not NotImplemented:
                if not info.is_view:
                    self._record(func, info, node, args, kwargs, out)
                return out
            # torch's optimizers read counters and norms: ASGD and Adafactor always; Adagrad, and before torch 2.13
            # Adam, under a default device. The number changes no cost. A bool, which may, is not made up.
            if func is _ITEM and self.phase == "optimizer" and not self.depth and args[0].dtype != torch.bool:
                return _SOME_STEP
            raise
        if self.scratch is not None and info.name in AS_REAL:
            out = self.scratch.as_real(func, info.name, lambda: self._key(info, args, kwargs), args, kwargs, out)
        if is_sparse(out):
            self._stored[out] = elements_stored(info.name, out, args, self._stored.get)
        if info.is_view:
            self._views += 1
        else:
            if not self._stored or not (is_sparse(out) or any(map(is_sparse, args))):
                self.values.follow(info, func, args, kwargs, out, create=self.phase != "optimizer")
            self._record(func, info, node, args, kwargs, out)
            if info.name in _RESIZES and isinstance(out, FakeTensor):
                self.resized(out.untyped_storage()._cdata, out.untyped_storage().nbytes())
        return out

    def _record(self, func: Any, info: _OpInfo, node: Any, args: Any, kwargs: Any, out: Any) -> None:
        seen: dict[int, None] = {}
        key: list[Any] = [info]
        here = [False]
        for a in args:
            key.append(self._signature(a, seen, here))
        if kwargs:
            for name, value in kwargs.items():
                key.append(name)
                key.append(self._signature(value, seen, here))
        outs: list[Any] = []
        if info.returns_new:
            if isinstance(out, torch.Tensor):
                outs.append(out)
            elif isinstance(out, (list, tuple)):
                outs = [t for t in out if isinstance(t, torch.Tensor)]
                if not outs:
                    outs = [t for part in out if isinstance(part, (list, tuple)) for t in part
                            if isinstance(t, torch.Tensor)]  # fmt: skip
        device_type = self.device_type
        mine = [t for t in outs if isinstance(t, FakeTensor) and t.fake_device.type == device_type]
        if not mine and not here[0]:
            self.elsewhere += bool(self.depth)
            return  # an op of another device: the optimizers' step counters live on the host
        phase, module = self._phase(node), self.module
        if node is not None and (phase == "backward" or not module):
            module = self._module_of(node)
        row_number = len(self.rows)
        allocated = 0
        for t in mine:
            allocated += self._allocate(t, row_number, phase, module, info)
        if info.free and not allocated:
            return
        if info.asked and node is not None:
            kwargs = {**(kwargs or {}), "output_mask": wanted(info.asked, node)}
            key.append(kwargs["output_mask"])
        kind, work, dtype, shapes, dtypes = self._priced(tuple(key), info, args, kwargs, outs)
        if self.scratch is not None:
            allocated += self._scratch(tuple(key), info, args, kwargs, outs, work, module, phase)
        if phase == "optimizer" and kind not in _KEEP_KIND:
            kind = "optimizer"
        if phase == "recompute":
            self._kept_for_recompute(args)
        reads_weight = kind in rules.MODEL_KINDS and self._reads_weight(args)
        if info.name == "aten._to_copy" and mine and self._reads_weight(args):
            self._live[mine[0].untyped_storage()._cdata][0].weight_copy = True
        if self.operands is not None and phase == "optimizer":
            self.operands[row_number] = self._operands(info, args, kwargs, outs)
        if self.calls is not None:
            self.calls.append(self._call(func, args, kwargs, outs, info.asked))
        self.rows.append(Row(phase, kind, info.name, module, dtype, shapes, dtypes, work, allocated, reads_weight))

    def _priced(self, key: tuple[Any, ...], info: _OpInfo, args: Any, kwargs: Any, outs: list[Any]) -> _Priced:
        """The cost of a call, looked up: a model calls few ops with many arguments."""
        try:
            found = self._costs.get(key)
        except TypeError:  # an argument that does not hash: price it afresh
            return self._cost(info, args, kwargs, outs)
        if found is None:
            found = self._costs[key] = self._cost(info, args, kwargs, outs)
        return found

    def _key(self, info: _OpInfo, args: Any, kwargs: Any) -> tuple[Any, ...]:
        seen: dict[int, None] = {}
        named = [part for k, v in (kwargs or {}).items() for part in (k, self._signature(v, seen, [False]))]
        return (info, *(self._signature(a, seen, [False]) for a in args), *named)

    def _scratch(
        self, key: Any, info: _OpInfo, args: Any, kwargs: Any, outs: list[Any], work: Work, module: str, phase: str
    ) -> int:
        """Write down what the kernel takes for itself: bytes that come after its outputs and go before the next op."""
        assert self.scratch is not None
        if info.free or self._stored:
            return 0
        if info.asked:
            kwargs = {k: v for k, v in kwargs.items() if k != "output_mask"} if kwargs else kwargs
        n_bytes, what = self.scratch.of(
            info.func, key, lambda: self._op(info, args, kwargs, outs), work.flops, args, kwargs
        )
        if not n_bytes:
            return 0
        row = len(self.rows)
        record = Storage(len(self.storages), n_bytes, row)
        record.op, record.module, record.phase, record.memory_class = info.name, module, phase, "temporary"
        record.name = f"{what} in {info.name}"
        self.storages.append(record)
        self.events += [(row, record.index, n_bytes), (row, record.index, -n_bytes)]
        return n_bytes

    def _kept_for_recompute(self, args: Any) -> None:
        """What a checkpoint's second forward reads was kept for it, though by a closure and not by the graph."""
        for a in args:
            if isinstance(a, torch.Tensor):
                known = self.known(a)
                if known is not None and known.phase == "forward":
                    known.saved = True
            elif isinstance(a, (list, tuple)):
                self._kept_for_recompute(a)

    def _reads_weight(self, args: Any) -> bool:
        for a in args:
            if isinstance(a, torch.Tensor) and not is_sparse(a):
                found = self._live.get(a.untyped_storage()._cdata)
                if found is not None and (found[0].memory_class == "parameters" or found[0].weight_copy):
                    return True
        return False

    def _signature(self, value: Any, seen: dict[int, None], here: list[bool]) -> Any:
        if isinstance(value, torch.Tensor):
            if isinstance(value, FakeTensor) and value.fake_device.type == self.device_type:
                here[0] = True
            if id(value) in seen:  # a kernel reads each distinct input once
                return (value.shape, "again", value.dtype)
            seen[id(value)] = None
            if is_sparse(value):
                return (value.shape, self._stored.get(value), value.dtype)
            return (value.shape, value.stride(), value.dtype)
        if isinstance(value, (list, tuple)):
            return tuple([self._signature(v, seen, here) for v in value])
        return value

    def _op(self, info: _OpInfo, args: Any, kwargs: Any, outs: list[Any]) -> Op:
        seen: dict[int, None] = {}
        named = dict(info.defaults)
        for name, value in zip(info.arg_names, args, strict=False):
            named[name] = self._describe(value, seen)
        for name, value in (kwargs or {}).items():
            named[name] = self._describe(value, seen)
        ordered = {name: named[name] for name in info.arg_names if name in named}
        return Op(
            info.name, ordered, tuple(self._describe(t, {}) for t in outs), info.tags, info.writes, info.returns_new
        )

    def _operands(self, info: _OpInfo, args: Any, kwargs: Any, outs: list[Any]) -> Operands:
        def storage(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return self.known(value)
            return tuple(map(storage, value)) if isinstance(value, (list, tuple)) else None

        named = {**dict(zip(info.arg_names, args, strict=False)), **(kwargs or {})}
        return Operands(self._op(info, args, kwargs, outs), {k: storage(v) for k, v in named.items()}, storage(outs))

    def _call(self, func: Any, args: Any, kwargs: Any, outs: list[Any], asked: Any) -> Call:
        """The call as it can be made again, and which call in Python it came from: a frame at one of its instructions.

        A C++ composite (an unrolled GRU) runs thousands of ops from one such place. A Python loop of a single op looks
        the same; it is rare, and costs the forecast a few microseconds a turn.
        """
        frame = sys._getframe(2)
        while frame.f_back is not None and frame.f_code.co_filename in _NOT_A_SITE:
            frame = frame.f_back
        site = (id(frame), frame.f_lasti)
        if site != self._site:
            self._site, self._sites = site, self._sites + 1
        views, self._views = self._views, 0
        own = (kwargs or {}).items()  # without the mask that this recorder gives to ops that do not hear it
        named = tuple((k, self._operand(v)) for k, v in own if not (asked and k == "output_mask"))
        outputs = tuple(self._operand(t) for t in outs)
        return Call(str(func), tuple(self._operand(a) for a in args), named, outputs, self._sites, views)

    def _operand(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            known = None if is_sparse(value) else self._live.get(value.untyped_storage()._cdata)
            stride = () if is_sparse(value) else tuple(value.stride())
            dtype = str(value.dtype).removeprefix("torch.")
            return Operand(tuple(value.shape), stride, dtype, known[0].index if known else -1)
        if isinstance(value, (list, tuple)):
            return tuple(self._operand(v) for v in value)
        return value

    def _cost(self, info: _OpInfo, args: Any, kwargs: Any, outs: list[Any]) -> _Priced:
        op = self._op(info, args, kwargs, outs)
        dtype = next((t.dtype for t in op.inputs if t.is_float), None) or next((t.dtype for t in op.written), "none")
        if info.free:
            kind, work = "copy", _NOTHING
        else:
            kind, work = rules.cost(op) or ("uncounted", op.moving())
        if dtype == "fp32" and kind in self.tf32:
            dtype = "tf32"
        tensors = (*op.inputs, *op.outputs)
        return kind, work, dtype, tuple(t.shape for t in tensors), tuple(t.dtype for t in tensors)

    def _describe(self, value: Any, seen: dict[int, None]) -> Any:
        if isinstance(value, torch.Tensor):
            again = id(value) in seen
            seen[id(value)] = None
            shape = tuple(value.shape)
            if is_sparse(value):
                held = self._stored.get(value, 0)
                n_bytes = 0 if again else held * value.element_size() + index_bytes(value, held)
                return Tensor(shape, dtype_name(value.dtype), n_bytes, held)
            stored = math.prod(n for n, stride in zip(shape, value.stride(), strict=True) if stride != 0)
            return Tensor(shape, dtype_name(value.dtype), 0 if again else stored * value.element_size())
        if isinstance(value, (list, tuple)):
            return tuple(self._describe(v, seen) for v in value)
        return value

    # ---- phases and modules

    def _phase(self, node: Any) -> str:
        if self.backward_depth:
            if (
                node is not None
                and torch.is_grad_enabled()
                and (not self.creates_graph or self.depth > self.backward_at_depth)
            ):
                return "recompute"  # the engine runs with gradients off; a checkpoint's second forward turns them on
            return "backward"
        if self.phase == "forward" and self.after_backward:
            if torch.is_grad_enabled():
                self.after_backward = False
            else:
                return "optimizer"  # between backward and the optimizer without gradients: clipping, averaging
        return self.phase

    def _module_of(self, node: Any) -> str:
        number = node._sequence_nr()
        if number == self._node_number:
            return self._node_module
        if number == _ACCUMULATE_GRAD:
            leaf = node.variable
            return "" if is_sparse(leaf) else self.leaf_modules.get(leaf.untyped_storage()._cdata, "")
        self._node_number = number
        self._node_module = self._entered_module[bisect.bisect_right(self._entered, number) - 1]
        return self._node_module

    # ---- storages

    def _allocate(self, tensor: torch.Tensor, row: int, phase: str, module: str, info: _OpInfo) -> int:
        if is_sparse(tensor):
            return 0  # its parts were made before it
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._live:
            return 0
        record = self._register(storage, address, row)
        record.op, record.module, record.phase = info.name, module, phase
        record.made_outside = not self.depth and phase == "forward" and info.makes_inputs
        return record.n_bytes

    def _storage(self, tensor: torch.Tensor) -> Storage:
        storage = tensor.untyped_storage()
        address = storage._cdata
        found = self._live.get(address)
        return found[0] if found else self._register(storage, address, len(self.rows) - 1)

    def _register(self, storage: Any, address: int, row: int) -> Storage:
        n_bytes = storage.nbytes()
        record = Storage(len(self.storages), n_bytes, row)
        self.storages.append(record)
        live, events, rows = self._live, self.events, self.rows

        def gone(_: Any) -> None:
            live.pop(address, None)
            # A checkpoint ends its second forward early, by an exception: what is let go then, no backward read
            record.freed_in = "recompute" if rows and rows[-1].phase == "recompute" else self._phase_now()
            events.append((len(rows) - 1, record.index, -record.n_bytes))

        live[address] = (record, weakref.ref(storage, gone))
        events.append((row, record.index, n_bytes))
        return record

    def _phase_now(self) -> str:
        return self._phase(torch._C._current_autograd_node()) if self.backward_depth else self.phase

    def keep_for_backward(self, roots: Iterable[Any]) -> list[torch.Tensor]:
        """Mark the storages that the graph behind ``roots`` (grad_fn nodes) saved; return the leaves it reaches.

        Saved tensors are read raw: unpacking one inside a checkpoint would run the recomputation.
        """
        leaves: list[torch.Tensor] = []
        todo = [r for r in roots if r is not None]
        seen = set(todo)
        while todo:
            node = todo.pop()
            variable = getattr(node, "variable", None)
            if variable is not None:
                leaves.append(variable)
            for attribute in _saved_attributes(node):
                saved = getattr(node, attribute, None)
                for raw in saved if isinstance(saved, (list, tuple)) else (saved,):
                    data = getattr(raw, "data", None)
                    if isinstance(data, torch.Tensor):
                        record = self.known(data)
                        if record is not None:
                            record.saved = True
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    todo.append(following)
        return leaves


# Backward ops that do not hear which gradients are wanted: the places of the input and the first state among forward's
_ASKED = {"aten.mkldnn_rnn_layer_backward": (0, 5)}
_NOTHING = Work()
# What stands between a call in Python and the dispatch mode that sees it
_NOT_A_SITE = frozenset(
    (__file__, *(os.path.join(os.path.dirname(torch.__file__), *name.split("/")) for name in
     ("_dynamo/eval_frame.py", "_compile.py", "utils/_device.py", "overrides.py", "_ops.py")))
)  # fmt: skip
_RESIZES = frozenset({"aten.resize_", "aten.resize_as_"})
_KEEP_KIND = rules.MODEL_KINDS | {"uncounted"}  # in the optimizer phase the other kinds become "optimizer"
_saved_by_type: dict[type, list[str]] = {}


def wanted(asked: tuple[int, ...], node: Any) -> tuple[bool, ...]:
    """Which of ``_ASKED``'s gradients ``node`` of autograd has somebody waiting for; other ops' schemas say that."""
    return tuple(node.next_functions[i][0] is not None for i in asked)


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor under the wrappers of torch.func's transforms."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _any_real(values: Iterable[Any]) -> bool:
    for value in values:
        kind = type(value)
        if kind in REAL or ((kind is list or kind is tuple) and value and _any_real(value)):
            return True
    return False


def _saved_attributes(node: Any) -> list[str]:
    found = _saved_by_type.get(type(node))
    if found is None:
        found = [a for a in dir(type(node)) if a.startswith("_raw_saved_")]
        _saved_by_type[type(node)] = found
    return found
