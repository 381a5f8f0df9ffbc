"""A tracing block: everything that must stand around torch for a ledger to be written, and fall away afterwards."""

from __future__ import annotations

import bisect
import contextlib
import functools
import logging
import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary

import bursar
from bursar.errors import BursarError
from bursar.folding import Trunk, Unfoldable, unfold
from bursar.ledger import Ledger, Model, Step
from bursar.memory import Textbook
from bursar.trace import accelerator, accumulation, compat, failures, higher_order, patches
from bursar.trace.recorder import REAL, Recorder, unwrapped
from bursar.trace.scratch import Scratch
from bursar.trace.skim import Skim, Token, check

_looks: list[list[str]] = []


@contextlib.contextmanager
def looking() -> Iterator[list[str]]:
    """Within this block models run to be looked at (what batch do they take?): no module is learnt by its name.

    Yields a list that grows by the class of each module called, where a session traces.
    """
    _looks.append([])
    try:
        with torch.no_grad():
            yield _looks[-1]
    finally:
        _looks.pop()


class Session:
    """What `tracing` yields. ``ledger`` is there when the block has ended (also partial, when it ended in an error)."""

    def __init__(self, on: str | None, tf32: frozenset[str] | None = None, scratch: str = "asked") -> None:
        self.on = on
        self.device = "cpu" if on == "cpu" else accelerator.NAME
        # The fallback runs an op for real; there is no real tensor on the fake accelerator
        self.mode = FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=self.device == "cpu")
        self.recorder = Recorder(
            self.mode,
            self.device,
            _tf32_flags() if tf32 is None else tf32,
            Scratch(scratch) if self.device == "cpu" and scratch != "none" else None,
        )
        self.roots: list[torch.nn.Module] = []
        self.names: dict[int, str] = {}
        self.assumptions: list[str] = []
        self._trunks: tuple[Trunk, ...] = ()
        self.skim: Skim | None = None
        self._expected: list[Token] | None = None  # the whole model's forward, as it was skimmed
        self.checkpointed: frozenset[int] = frozenset()  # ids of modules whose forward runs under a checkpoint
        self.steps: list[tuple[int, int, int]] = []  # (optimizer, row, event) at the end of each optimizer.step
        self._calls: list[tuple[int, int, int]] = []  # (row, samples, tokens) of each outermost forward
        self._backwards: list[int] = []  # the row at the end of each outermost backward
        self._first: tuple[int, int] | None = None
        self._last_layer = ""
        self.partial = False
        self._ledger: Ledger | None = None
        self._parameters: dict[int, torch.Tensor] = {}
        self._leaves = WeakIdKeyDictionary()  # other tensors that get a gradient, an input say: not kept alive
        self._own_grads: dict[int, tuple[torch.Tensor, Any]] = {}  # real parameters and the .grad they came with
        self._layer_outputs: dict[str, int] = {}
        self._undo: list[Callable[[], None]] = []
        self._moved: set[int] = set()  # ids of a user's own modules that a .to() made fake for the time
        self._patches = patches.Undo()
        self._optimizers: dict[int, Any] = {}

    @property
    def ledger(self) -> Ledger:
        """The ledger of the block's last step. Raises BursarError while the block is still open."""
        if self._ledger is None:
            raise BursarError("the ledger is written when the tracing block ends; read it after the `with`")
        return self._ledger

    # ---- modules

    def register(self, root: torch.nn.Module) -> None:
        """Learn the names of ``root``'s modules and the class of its parameters and buffers."""
        if id(root) in self.names:
            return
        patches.transformers_kernels(self._patches, self.recorder.values)
        self._remember(root)
        prefix = "" if not self.roots else f"{type(root).__name__}."
        self.roots.append(root)
        for name, module in root.named_modules():
            self.names.setdefault(id(module), (prefix + name).rstrip("."))
        for name, module in root.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    self._parameter(parameter, (prefix + name).rstrip("."), f"{prefix}{name}.{key}".lstrip("."))
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    self.recorder.adopt(buffer, "buffers", f"{prefix}{name}.{key}".lstrip("."))

    def _parameter(self, parameter: torch.Tensor, module: str, name: str) -> None:
        parameter = unwrapped(parameter)
        self._parameters.setdefault(id(parameter), parameter)
        self._own_grad(parameter)
        for part in _tensors(parameter):  # a quantised weight is codes and scales
            self.recorder.adopt(part, "parameters", name)
        if parameter.layout is torch.strided:
            self.recorder.leaf_modules.setdefault(parameter.untyped_storage()._cdata, module)
        if parameter.grad is not None:
            self.recorder.adopt(parameter.grad, "gradients", name)

    def _name(self, parameter: Any) -> str:
        known = self.recorder.known(parameter) if isinstance(parameter, torch.Tensor) else None
        return known.name if known is not None else ""

    # ---- a user's own module, made of real tensors: nothing of the trace may stay in it

    def _own_grad(self, parameter: torch.Tensor) -> None:
        if type(parameter) in REAL:
            self._own_grads.setdefault(id(parameter), (parameter, parameter.grad))

    def _own_grads_of(self, parameters: Iterable[torch.Tensor]) -> None:
        for parameter in parameters:
            self._own_grad(parameter)

    def _put_back_grads(self) -> None:
        for parameter, grad in self._own_grads.values():
            if parameter.grad is not grad:
                parameter.grad = grad

    def _remember(self, root: torch.nn.Module) -> None:
        """Note what ``root`` holds, to take out every fake tensor its forward may leave in it (a cache, a buffer)."""
        tensors = (*root.parameters(), *root.buffers())
        modules = list(root.modules())
        if any(type(t) in REAL for t in tensors) or any(id(m) in self._moved for m in modules):
            for module in modules:
                for held in (module.__dict__, module._parameters, module._buffers):
                    self._undo.append(functools.partial(_without_fakes, held, dict(held)))

    def _remember_optimizer(self, optimizer: Any) -> None:
        """Note the state and settings of an optimizer over real parameters."""
        groups = optimizer.param_groups
        if not any(type(p) in REAL for group in groups for p in group["params"]):
            return
        settings = [dict(group) for group in groups]
        states = {p: dict(state) for p, state in optimizer.state.items()}

        def put_back() -> None:
            for group, setting in zip(groups, settings, strict=False):
                group.clear()
                group.update(setting)
            for p in list(optimizer.state):
                if p in states:
                    optimizer.state[p] = states[p]
                else:
                    del optimizer.state[p]

        self._undo.append(put_back)

    def call(self, module: torch.nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a module's forward under its name."""
        recorder = self.recorder
        if _looks:
            patches.transformers_kernels(self._patches, recorder.values)
            _looks[-1].append(type(module).__name__)
            return forward(module, *args, **kwargs)
        if self.skim is not None and self.skim.takes(module):
            return self.skim.call(module, lambda *a, **k: self.call(module, forward, a, k), args, kwargs)
        name = self.names.get(id(module))
        if name is None:
            if recorder.depth:  # a module nobody registered as a child: it goes by its parent's name
                name = recorder.module
            else:
                self.register(module)
                name = self.names[id(module)]
        if not recorder.depth and not recorder.backward_depth:
            samples, tokens = size_of_batch((*args, *kwargs.values()))
            self._calls.append((len(recorder.rows), samples, tokens))

        def run(*args: Any, **kwargs: Any) -> Any:
            before = recorder.module
            recorder.depth += 1
            recorder.enter(name)
            try:
                out = forward(module, *args, **kwargs)
                if not recorder.backward_depth:
                    self._note_output(module, name, out)
                return out
            except BaseException as error:
                failures.note(error, name)
                raise
            finally:
                recorder.depth -= 1
                recorder.enter(before)

        if id(module) in self.checkpointed and not recorder.backward_depth:
            return checkpoint(run, *args, use_reentrant=False, **kwargs)
        return run(*args, **kwargs)

    def _note_output(self, module: torch.nn.Module, name: str, out: Any) -> None:
        has_parameters = any(p is not None for p in module._parameters.values())
        if isinstance(out, torch.Tensor) and has_parameters and not module._modules:
            self._layer_outputs[name] = out.numel() * out.element_size()
            self._last_layer = name

    # ---- backward and optimizers

    def backward(self, run: Callable[..., Any], roots: Any, args: Any, kwargs: Any, creates_graph: bool) -> Any:
        """Run autograd's backward or grad from ``roots`` as the backward phase."""
        recorder = self.recorder
        if not recorder.backward_depth:
            tensors = [roots] if isinstance(roots, torch.Tensor) else [t for t in roots if isinstance(t, torch.Tensor)]
            recorder.muted += 1
            try:
                leaves = recorder.keep_for_backward([t.grad_fn for t in tensors])
            finally:
                recorder.muted -= 1
            for leaf in leaves:
                if id(leaf) in self._parameters:
                    continue
                self._own_grad(leaf)
                if isinstance(leaf, torch.nn.Parameter):
                    self._parameters[id(leaf)] = leaf
                    known = recorder.known(leaf)
                    if known is not None and known.memory_class is None:
                        known.memory_class = "parameters"
                else:
                    self._leaves[leaf] = None
            recorder.backward_at_depth = recorder.depth
            recorder.creates_graph = creates_graph
        recorder.backward_depth += 1
        try:
            return run(*args, **kwargs)
        finally:
            recorder.backward_depth -= 1
            if not recorder.backward_depth:
                recorder.after_backward = True
                self._backwards.append(len(recorder.rows))
                for parameter in (*self._parameters.values(), *self._leaves):
                    grad = parameter.grad if parameter.is_leaf else None
                    if grad is not None:
                        recorder.adopt(grad, "gradients", owner=self._name(parameter))
                error = accelerator.dropped_error()
                if error is not None:
                    raise error

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if id(optimizer) not in self._optimizers:
            patches.torchao_tables(optimizer)
            self._optimizers[id(optimizer)] = optimizer
            self._remember_optimizer(optimizer)
        for parameter in parameters:
            if id(parameter) not in self._parameters:
                self._parameter(parameter, "", "")
        self.recorder.phase = "optimizer"
        return tuple(map(self._closure, args)), {k: self._closure(v) for k, v in kwargs.items()}

    def _closure(self, argument: Any) -> Any:
        """A closure that an optimizer calls within its step (LBFGS) is forward and backward."""
        if not callable(argument):
            return argument

        def closure() -> Any:
            self.recorder.phase = "forward"
            try:
                return argument()
            finally:
                self.recorder.phase = "optimizer"

        return closure

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.recorder.phase = "forward"
        self.steps.append((id(optimizer), len(self.recorder.rows), len(self.recorder.events)))
        for parameter, state in optimizer.state.items():
            for tensor in _tensors(state):
                self.recorder.adopt(tensor, "optimizer_state", owner=self._name(parameter))
        self.recorder.after_backward = True

    # ---- the block

    def _replaced(self, module: torch.nn.Module, name: str, real: Any) -> None:
        where = module._parameters if name in module._parameters else module._buffers
        self._moved.add(id(module))
        self._undo.append(lambda: where.__setitem__(name, real))

    @contextlib.contextmanager
    def open(self) -> Iterator[Session]:
        """Enter: modes, patches, hooks. Leave: all of it undone, the random state put back, the ledger written."""
        if self.device != "cpu":
            accelerator.install()
        accumulation.held_by_engine_alone()  # before the modes: it runs a backward of its own
        undo = self._patches
        rng, python_rng, numpy_rng = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
        with contextlib.ExitStack() as stack:
            stack.callback(torch.set_rng_state, rng)
            stack.callback(random.setstate, python_rng)
            stack.callback(np.random.set_state, numpy_rng)
            stack.callback(lambda: [f() for f in reversed(self._undo)])
            stack.callback(self._put_back_grads)
            stack.callback(undo.restore)
            stack.callback(patches.forget_transformers_tables)
            patches.forget_transformers_tables()
            self._patch(undo)
            stack.callback(register_optimizer_step_pre_hook(self._before_step).remove)
            stack.callback(register_optimizer_step_post_hook(self._after_step).remove)
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            stack.enter_context(patches.modules_may_move(self._replaced))
            if self.device != "cpu":
                stack.enter_context(patches.cuda_means_fake())
                stack.enter_context(patches.foreach_optimizers())
            quiet = logging.getLogger("torch._subclasses.fake_tensor")  # it prints the traceback that we raise
            stack.callback(setattr, quiet, "disabled", quiet.disabled)
            quiet.disabled = True
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*(pin_memory|data pointer of FakeTensor)")
                warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
                warnings.filterwarnings("ignore", message="PyTorch was compiled without cuDNN")
                stack.enter_context(torch.compiler.set_stance("force_eager"))  # torchao compiles its steps itself
                stack.enter_context(self.mode)
                stack.enter_context(self.recorder)
                try:
                    yield self
                except BaseException as error:
                    self.partial = True
                    told = failures.explain(error, self.on)
                    if told is not None:
                        raise told from error
                    raise
                finally:
                    self._ledger = self._write()

    def _patch(self, undo: patches.Undo) -> None:
        forward = torch.nn.Module.__call__

        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            return self.call(module, forward, args, kwargs)

        undo.set(torch.nn.Module, "__call__", call)
        backward, grad = torch.autograd.backward, torch.autograd.grad

        def traced_backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            creates = kwargs.get("create_graph", args[2] if len(args) > 2 else False)
            return self.backward(backward, tensors, (tensors, *args), kwargs, bool(creates))

        def traced_grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            creates = kwargs.get("create_graph", args[2] if len(args) > 2 else False)
            return self.backward(grad, outputs, (outputs, inputs, *args), kwargs, bool(creates))

        undo.set(torch.autograd, "backward", traced_backward)
        undo.set(torch.autograd, "grad", traced_grad)
        # For who imported backward or grad before: both end here
        engine = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

        def traced_engine(roots: Any, *args: Any, **kwargs: Any) -> Any:
            return self.backward(engine, roots, (roots, *args), kwargs, bool(args[2]))

        undo.set(torch.autograd, "_engine_run_backward", traced_engine)
        resize = torch.UntypedStorage.resize_

        def resize_(storage: Any, n_bytes: int) -> Any:
            out = resize(storage, n_bytes)
            self.recorder.resized(storage._cdata, storage.nbytes())
            return out

        undo.set(torch.UntypedStorage, "resize_", resize_)
        if self.recorder.scratch is not None:
            self._watch_random_state(undo)
        zero_grad = torch.optim.Optimizer.zero_grad

        def traced_zero_grad(optimizer: Any, set_to_none: bool = True) -> None:
            self._own_grads_of(p for group in optimizer.param_groups for p in group["params"])
            phase, self.recorder.phase = self.recorder.phase, "optimizer"
            try:
                zero_grad(optimizer, set_to_none)
            finally:
                self.recorder.phase = phase

        undo.set(torch.optim.Optimizer, "zero_grad", traced_zero_grad)
        compat.truncated_normal(undo)
        higher_order.patch(undo, self.recorder)
        module_zero_grad = torch.nn.Module.zero_grad

        def traced_module_zero_grad(module: torch.nn.Module, set_to_none: bool = True) -> None:
            self._own_grads_of(module.parameters())
            module_zero_grad(module, set_to_none)

        undo.set(torch.nn.Module, "zero_grad", traced_module_zero_grad)

    def _watch_random_state(self, undo: patches.Undo) -> None:
        """A checkpoint keeps the random state for its second forward, and that sets its own aside: 5056 bytes each."""
        get = torch.random.get_rng_state

        def get_rng_state() -> torch.Tensor:
            state = get()
            if torch._C._dispatch_tls_local_exclude_set().has(torch._C.DispatchKey.Python):
                return state  # asked for where no mode sees anything: torch's own tests do
            forward = not self.recorder.backward_depth
            self.recorder.adopt(state, "activations" if forward else "temporary", "random state of a checkpoint")
            return state

        undo.set(torch.random, "get_rng_state", get_rng_state)
        undo.set(torch, "get_rng_state", get_rng_state)

    def mark(self) -> None:
        """The step to be kept begins here; what came before is warm-up."""
        self._first = (len(self.recorder.rows), len(self.recorder.events))

    def pass_over(self, module: torch.nn.Module, trunks: Iterable[Trunk], forward: Callable[[], Any]) -> None:
        """Run ``forward``, which calls ``module``, with the blocks of ``trunks`` skimmed: `unfolded` compares.

        Twice, because a first pass may fill caches. Raises Unfoldable where blocks alike are called differently.
        """
        patches.transformers_kernels(self._patches, self.recorder.values)
        self.skim = skim = Skim(module, tuple(trunks), self.recorder.rows)
        names, self.names = self.names, skim.names
        try:
            for _ in range(2):
                skim.begin()
                forward()
        finally:
            self.skim, self.names = None, names
            self._layer_outputs.clear()
        if skim.failed:
            raise Unfoldable(skim.failed)
        self._expected = skim.tokens()

    def fold(self, trunks: Iterable[Trunk]) -> None:
        """The model is a shallow copy of one in which these trunks are deeper; `unfolded` writes that one's ledger."""
        self._trunks = tuple(trunks)
        self.recorder.operands = {} if self._trunks else None

    def unfolded(self) -> Ledger:
        """The ledger of the whole model. Raises Unfoldable where the copy does not repeat as it should."""
        ledger = unfold(self.ledger, self._trunks, self.recorder.operands or {})
        if self._expected is not None:
            check(self._expected, ledger.rows, self._trunks)
        return ledger

    def _times(self, name: str) -> int:
        """How often a parameter or layer of the traced model stands in the whole one."""
        return math.prod(trunk.copies(name) for trunk in self._trunks)

    def _window(self) -> tuple[int, int]:
        """Where the last step begins, as a row and an event: after the step before it of the same optimizer."""
        if self._first is not None:
            return self._first
        earlier = [s for s in self.steps[:-1] if s[0] == self.steps[-1][0]]
        if not earlier:
            return 0, 0
        _, row, event = earlier[-1]
        rows, events = self.recorder.rows, self.recorder.events
        while row < len(rows) and rows[row].phase == "optimizer":  # zero_grad and the like end the step before
            row += 1
        while event < len(events) and (events[event][0] < row or events[event][2] < 0):
            event += 1
        return row, event

    def _micro_batches(self, first_row: int) -> list[tuple[int, int]]:
        """(samples, tokens) of each micro-batch: the first outermost call before each backward; all, without any."""
        calls = [call for call in self._calls if call[0] >= first_row]
        ends = [row for row in self._backwards if row >= first_row]
        if ends:
            first: dict[int, tuple[int, int, int]] = {}
            for call in calls:
                first.setdefault(bisect.bisect_right(ends, call[0]), call)
            calls = [call for end, call in first.items() if end < len(ends)]
        return [(samples, tokens) for _, samples, tokens in calls]

    def _write(self) -> Ledger:
        recorder = self.recorder
        for storage in recorder.storages:
            storage.settle()
        if recorder.elsewhere:
            where = "the CPU" if self.device != "cpu" else "another device than the CPU"
            self.assumptions.append(
                f"{recorder.elsewhere} calls of ops inside modules ran on {where} and are not counted"
            )
        self.assumptions += recorder.values.relied_on
        self.assumptions += recorder.scratch.assumptions if recorder.scratch is not None else []
        self.assumptions += dict.fromkeys(row.work.assumes for row in recorder.rows if row.work.assumes)
        first_row, first_event = self._window()
        calls = self._micro_batches(first_row)
        named = [(p, self._times(self._name(p))) for p in self._parameters.values()]
        sizes = [(p.numel() * times, p.element_size(), p.requires_grad) for p, times in named]
        states = sum(
            part.numel() * part.element_size() * self._times(self._name(parameter))
            for optimizer in self._optimizers.values()
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, torch.Tensor) and (value.dim() or (not parameter.dim() and key != "step"))
            for part in _tensors(value)
        )
        total = sum(n for n, _, _ in sizes)
        trained = sum(n * size for n, size, wants in sizes if wants)
        self._layer_outputs.pop(self._last_layer, None)
        outputs = sum(n_bytes * self._times(name) for name, n_bytes in self._layer_outputs.items())
        recorder.close()  # what is freed from here on is no part of the step
        return Ledger(
            recorder.rows,
            recorder.storages,
            recorder.events,
            first_row,
            first_event,
            "cpu" if self.device == "cpu" else "gpu",
            Model(type(self.roots[0]).__name__ if self.roots else "", total,
                  sum(n for n, _, wants in sizes if wants), total),
            Step(sum(c[0] for c in calls), sum(c[1] for c in calls), len(calls)),
            Textbook(sum(n * size for n, size, _ in sizes), outputs, trained, states),
            tuple(self.assumptions),
            {"bursar": bursar.__version__, "torch": str(torch.__version__)},
            self.partial,
            calls=tuple(recorder.calls[first_row:]) if recorder.calls is not None else (),
        )  # fmt: skip


def _without_fakes(now: dict[str, Any], before: dict[str, Any]) -> None:
    for key in [k for k, v in now.items() if isinstance(v, FakeTensor)]:
        if key in before:
            now[key] = before[key]
        else:
            del now[key]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):  # an 8-bit state is codes, scales and a table
            yield from _tensors([getattr(value, name) for name in value.__tensor_flatten__()[0]])
        else:
            yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def size_of_batch(tensors: Iterable[Any]) -> tuple[int, int]:
    """Samples and tokens of a call by its first tensor: integers of shape (B, S) are tokens, else one per sample."""
    first = next((t for t in tensors if isinstance(t, torch.Tensor)), None)
    if first is None or not first.dim():
        return 0, 0
    is_tokens = first.dim() == 2 and not first.is_floating_point()
    return first.shape[0], first.shape[0] * (first.shape[1] if is_tokens else 1)


def _tf32_flags() -> frozenset[str]:
    """The kinds that torch's own flags let run on TF32."""
    kinds = set()
    if torch.backends.cuda.matmul.allow_tf32 or torch.get_float32_matmul_precision() != "highest":
        kinds.add("matmul")
    if torch.backends.cudnn.allow_tf32:
        kinds.add("conv")
    return frozenset(kinds)
