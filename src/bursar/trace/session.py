"""A tracing block: everything that must stand around torch for a ledger to be written, and fall away afterwards."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import bursar
from bursar.errors import BursarError
from bursar.ledger import Ledger, Model, Step
from bursar.memory import Textbook
from bursar.trace import accelerator, failures, patches
from bursar.trace.recorder import Recorder


class Session:
    """What `tracing` yields. ``ledger`` is there when the block has ended (also partial, when it ended in an error)."""

    def __init__(self, on: str | None, tf32: frozenset[str] | None = None) -> None:
        self.on = on
        self.device = "cpu" if on == "cpu" else accelerator.NAME
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.recorder = Recorder(self.device, _tf32_flags() if tf32 is None else tf32)
        self.roots: list[torch.nn.Module] = []
        self.names: dict[int, str] = {}
        self.assumptions: list[str] = []
        self.checkpointed: frozenset[int] = frozenset()  # ids of modules whose forward runs under a checkpoint
        self.steps: list[tuple[int, int, int]] = []  # (optimizer, row, event) at the end of each optimizer.step
        self._calls: list[tuple[int, int, int]] = []  # (row, samples, tokens) of each outermost forward
        self._first: tuple[int, int] | None = None
        self._last_layer = ""
        self.partial = False
        self._ledger: Ledger | None = None
        self._parameters: dict[int, torch.Tensor] = {}
        self._layer_outputs: dict[str, int] = {}
        self._undo: list[Callable[[], None]] = []
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
        self._parameters.setdefault(id(parameter), parameter)
        if isinstance(parameter, FakeTensor):
            self.recorder.adopt(parameter, "parameters", name)
            self.recorder.leaf_modules.setdefault(parameter.untyped_storage()._cdata, module)

    def call(self, module: torch.nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a module's forward under its name."""
        recorder = self.recorder
        name = self.names.get(id(module))
        if name is None:
            if recorder.depth:  # a module nobody registered as a child: it goes by its parent's name
                name = recorder.module
            else:
                self.register(module)
                name = self.names[id(module)]
        if not recorder.depth and not recorder.backward_depth:
            samples, tokens = _batch_of(args, kwargs)
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
        if isinstance(out, torch.Tensor) and next(iter(module._parameters.values()), None) is not None:
            if not module._modules:
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
                if id(leaf) not in self._parameters:
                    self._parameters[id(leaf)] = leaf
                    known = recorder.known(leaf) if isinstance(leaf, FakeTensor) else None
                    if known is not None and known.memory_class is None and isinstance(leaf, torch.nn.Parameter):
                        known.memory_class = "parameters"
            recorder.backward_at_depth = recorder.depth
            recorder.creates_graph = creates_graph
        recorder.backward_depth += 1
        try:
            return run(*args, **kwargs)
        finally:
            recorder.backward_depth -= 1
            if not recorder.backward_depth:
                recorder.after_backward = True
                for parameter in self._parameters.values():
                    grad = parameter.grad if parameter.is_leaf else None
                    if grad is not None:
                        recorder.adopt(grad, "gradients")
                error, recorder.error = recorder.error, None
                if error is not None:
                    raise error

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._optimizers.setdefault(id(optimizer), optimizer)
        self.recorder.phase = "optimizer"

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.recorder.phase = "forward"
        self.steps.append((id(optimizer), len(self.recorder.rows), len(self.recorder.events)))
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    self.recorder.adopt(value, "optimizer_state")
        self.recorder.after_backward = True

    # ---- the block

    def _replaced(self, module: torch.nn.Module, name: str, real: Any) -> None:
        where = module._parameters if name in module._parameters else module._buffers
        self._undo.append(lambda: where.__setitem__(name, real))

    @contextlib.contextmanager
    def open(self) -> Iterator[Session]:
        """Enter: modes, patches, hooks. Leave: all of it undone, the random state put back, the ledger written."""
        if self.device != "cpu":
            accelerator.install()
        undo = patches.Undo()
        rng, python_rng = torch.get_rng_state(), random.getstate()
        touched: dict[int, tuple[torch.Tensor, Any]] = {}
        with contextlib.ExitStack() as stack:
            stack.callback(torch.set_rng_state, rng)
            stack.callback(random.setstate, python_rng)
            stack.callback(lambda: [f() for f in reversed(self._undo)])
            stack.callback(lambda: _put_back_gradients(touched))
            stack.callback(undo.restore)
            self._patch(undo, touched)
            stack.callback(register_optimizer_step_pre_hook(self._before_step).remove)
            stack.callback(register_optimizer_step_post_hook(self._after_step).remove)
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            if self.device != "cpu":
                stack.enter_context(patches.cuda_means_fake(self._replaced))
                stack.enter_context(patches.foreach_optimizers())
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*pin_memory.*")
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

    def _patch(self, undo: patches.Undo, touched: dict[int, tuple[torch.Tensor, Any]]) -> None:
        forward = torch.nn.Module.__call__

        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            if not module.__dict__.get("_bursar_seen_real", False):
                for parameter in module._parameters.values():
                    if parameter is not None and not isinstance(parameter, FakeTensor):
                        touched.setdefault(id(parameter), (parameter, parameter.grad))
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
        resize = torch.UntypedStorage.resize_

        def resize_(storage: Any, n_bytes: int) -> Any:
            out = resize(storage, n_bytes)
            self.recorder.resized(storage._cdata, storage.nbytes())
            return out

        undo.set(torch.UntypedStorage, "resize_", resize_)
        zero_grad = torch.optim.Optimizer.zero_grad

        def traced_zero_grad(optimizer: Any, set_to_none: bool = True) -> None:
            phase, self.recorder.phase = self.recorder.phase, "optimizer"
            try:
                zero_grad(optimizer, set_to_none)
            finally:
                self.recorder.phase = phase

        undo.set(torch.optim.Optimizer, "zero_grad", traced_zero_grad)

    def mark(self) -> None:
        """The step to be kept begins here; what came before is warm-up."""
        self._first = (len(self.recorder.rows), len(self.recorder.events))

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

    def _write(self) -> Ledger:
        recorder = self.recorder
        for storage in recorder.storages:
            storage.settle()
        first_row, first_event = self._window()
        calls = [(samples, tokens) for row, samples, tokens in self._calls if row >= first_row]
        sizes = [(p.numel(), p.element_size(), p.requires_grad) for p in self._parameters.values()]
        states = sum(
            value.numel() * value.element_size()
            for optimizer in self._optimizers.values()
            for parameter, state in optimizer.state.items()
            for value in state.values()
            if isinstance(value, torch.Tensor) and value.dim() and value.numel() > 1 or parameter.numel() == 1
        )
        total = sum(n for n, _, _ in sizes)
        trained = sum(n * size for n, size, wants in sizes if wants)
        self._layer_outputs.pop(self._last_layer, None)
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
            Textbook(sum(n * size for n, size, _ in sizes), sum(self._layer_outputs.values()), trained, states),
            tuple(self.assumptions),
            {"bursar": bursar.__version__, "torch": torch.__version__},
            self.partial,
        )  # fmt: skip


def _put_back_gradients(touched: dict[int, tuple[torch.Tensor, Any]]) -> None:
    for parameter, grad in touched.values():
        if isinstance(parameter.grad, FakeTensor):
            parameter.grad = grad


def _batch_of(args: Any, kwargs: Any) -> tuple[int, int]:
    """Samples and tokens of a call: integers of shape (B, S) are tokens, anything else one token per sample."""
    first = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)), None)
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
