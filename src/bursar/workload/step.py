"""One training step of a workload, run on fake tensors and written down."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from bursar.errors import BadInput, UnknownName
from bursar.folding import KEPT, Trunk, Unfoldable
from bursar.hardware import cluster
from bursar.ledger import Ledger, Step
from bursar.trace import Session
from bursar.trace.patches import Undo
from bursar.trace.scratch import HOW
from bursar.trace.session import size_of_batch
from bursar.workload import optimizers, repeats
from bursar.workload.resolve import Workload, from_callable, loss_of_output, resolve, tensors_in

PRECISIONS = ("fp32", "tf32", "bf16", "bf16-mixed", "fp16-mixed")
RECOMPUTE = ("none", "selective", "full")
ZERO_GRAD = ("none", "zeros")
_MIXED = {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}


def step(
    model: nn.Module | Callable[..., Any] | str,
    batch: Any = None,
    *,
    batch_size: int | None = None,
    seq_len: int | None = None,
    precision: str = "fp32",
    optimizer: str | None = None,
    recompute: str = "none",
    accumulate: int = 1,
    on: str | None = None,
    zero_grad: str = "none",
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    fold: bool = True,
    scratch: str = "asked",
) -> Ledger:
    """What one training step of ``model`` costs: forward, backward and optimizer, traced without running anything.

    ``model`` is a module, a callable returning one (or a module and a batch), or a name as on the command line; a
    module is copied onto fake tensors and itself not touched. ``batch`` is a tensor, a tuple of arguments or a dict of
    keyword arguments for its forward. ``batch_size`` is the micro-batch of one data-parallel rank in samples,
    ``accumulate`` the micro-batches per step. ``on`` is a catalogue name, ``"cpu"``, ``"local"`` for this machine's ops
    as `Ledger.on` prices them from `bursar bench`, or None for a GPU in general;
    ``"8xh100-sxm"`` is eight data-parallel ranks. ``zero_grad`` says what becomes of the gradients after the update:
    ``"none"`` frees them, ``"zeros"`` keeps them, filled with zeros. ``loss(module, batch)`` returns the scalar to
    differentiate; without it the model's own loss is used, else the mean of its output. ``fold`` lets four of many
    blocks alike stand for all of them, which changes no figure. ``scratch`` says where what the CPU's kernels take for
    themselves comes from: see `bursar.tracing`.

    Raises UnknownName and BadInput for what cannot be meant, DataDependent where forward needs a tensor's values, and
    whatever the model's own code raises.
    """
    _check(precision, optimizer, recompute, accumulate, zero_grad, scratch)
    replicas = 1
    if on == "local":  # this machine's own ops, each with its call: blocks written from others alike have none
        on, fold = None if torch.cuda.is_available() else "cpu", False
    if on not in (None, "cpu"):
        assert on is not None
        replicas = cluster(on).count
    if isinstance(model, str):
        work = resolve(model, batch_size, seq_len)
    elif isinstance(model, nn.Module):
        work = Workload(type(model).__name__, lambda: (model, batch), loss or loss_of_output)
    elif callable(model):
        work = from_callable(model, getattr(model, "__name__", type(model).__name__), batch_size, seq_len)
    else:
        raise BadInput(
            f"{type(model).__name__} is no model; give a torch.nn.Module, a callable returning one, or a name"
        )
    if isinstance(model, nn.Module) and batch is None:
        raise BadInput("a module needs a batch to run on: bursar.step(module, batch)")
    if loss is not None:
        work = dataclasses.replace(work, loss=loss)
    if batch is not None and not isinstance(model, nn.Module):
        made = work.make

        def with_batch() -> tuple[nn.Module, Any]:
            first = made()
            return first[0], batch

        work = dataclasses.replace(work, make=with_batch, samples=None, tokens=None)
    return run(
        work, precision, optimizer or work.optimizer, recompute, accumulate, on, replicas, zero_grad, fold, scratch
    )


def _check(
    precision: str, optimizer: str | None, recompute: str, accumulate: int, zero_grad: str, scratch: str = "asked"
) -> None:
    if precision not in PRECISIONS:
        raise UnknownName("precision", precision, PRECISIONS)
    if recompute not in RECOMPUTE:
        raise UnknownName("recompute", recompute, RECOMPUTE)
    if optimizer is not None and optimizer not in optimizers.OPTIMIZERS:
        raise UnknownName("optimizer", optimizer, optimizers.OPTIMIZERS)
    if zero_grad not in ZERO_GRAD:
        raise UnknownName("zero_grad", zero_grad, ZERO_GRAD)
    if scratch not in HOW:
        raise UnknownName("scratch", scratch, HOW)
    if accumulate < 1:
        raise BadInput(f"{accumulate} micro-batches train nothing; give --accumulate 1 or more")


def run(
    work: Workload,
    precision: str = "fp32",
    optimizer: str = "adamw",
    recompute: str = "none",
    accumulate: int = 1,
    on: str | None = None,
    replicas: int = 1,
    zero_grad: str = "none",
    fold: bool = True,
    scratch: str = "asked",
) -> Ledger:
    """Trace two steps of ``work``, the first to make the optimizer's states and fill caches, and keep the second.

    With ``fold``, of many blocks alike four are traced and stand for all (`bursar.folding`); a model that does not
    repeat, or will not run with fewer blocks, is traced whole.
    """
    trunks: list[Trunk] = []
    how = (work, precision, optimizer, recompute, accumulate, on, replicas, zero_grad, scratch)
    try:
        return _trace(*how, trunks if fold else None)
    except Exception:
        if not trunks:
            raise
    return _trace(*how, None)


def _trace(
    work: Workload,
    precision: str,
    optimizer: str,
    recompute: str,
    accumulate: int,
    on: str | None,
    replicas: int,
    zero_grad: str,
    scratch: str,
    trunks: list[Trunk] | None,
) -> Ledger:
    """Two steps traced, the second kept; into ``trunks`` goes what was folded (None: nothing may be)."""
    tf32 = frozenset({"matmul", "conv"}) if precision == "tf32" else frozenset[str]()
    session = Session(on, tf32, scratch)
    device = torch.device("cpu" if on == "cpu" else "cuda")
    with session.open():
        with device, fake_copies(device):
            shallow = trunks is not None and work.depth >= repeats.LEAST and work.make_shallow
            module, batch = shallow(KEPT) if shallow else work.make()
            module, batch = copy.deepcopy((module, batch)) if _has_real(module, batch) else (module, batch)
        module.train()
        module.to(device)
        batch = _moved(batch, device)
        if precision == "bf16":
            module.to(torch.bfloat16)
            batch = _cast(batch, torch.bfloat16)

        forward = _forward(work, module, batch, device, precision)
        if trunks is not None:
            _fold(session, module, forward, work.depth if shallow else None, trunks)
        session.register(module)
        for tensor in tensors_in(batch):
            session.recorder.adopt(tensor, "inputs", "batch")
        if recompute == "full":
            session.checkpointed = _blocks(module)
        one_step, _ = _stepper(forward, module, device, precision, optimizer, accumulate, zero_grad)
        with _selective(recompute):
            one_step()
            session.mark()
            one_step()
    ledger = session.unfolded() if trunks else session.ledger
    samples, tokens = (
        size_of_batch(tensors_in(batch)) if work.samples is None else (work.samples, work.tokens or work.samples)
    )
    notes = _assumptions(work, precision, optimizer, recompute, replicas, ledger, zero_grad == "none")
    return dataclasses.replace(
        ledger,
        model=dataclasses.replace(
            ledger.model, name=work.name, active_parameters=work.active_parameters or ledger.model.active_parameters
        ),
        step=Step(samples * accumulate * replicas, tokens * accumulate * replicas, accumulate),
        replicas=replicas,
        assumptions=(*ledger.assumptions, *notes),
    )


def real(
    work: Workload,
    device: torch.device,
    precision: str = "fp32",
    optimizer: str = "adamw",
    recompute: str = "none",
    accumulate: int = 1,
    zero_grad: str = "none",
) -> tuple[nn.Module, Any, torch.optim.Optimizer, Callable[[], None]]:
    """The module, batch and optimizer that `run` traces, made of real tensors on ``device``, and the step itself."""
    with device:
        module, batch = work.make()
        module, batch = copy.deepcopy((module, batch))
    module.train()
    module.to(device)
    batch = _moved(batch, device)
    if precision == "bf16":
        module.to(torch.bfloat16)
        batch = _cast(batch, torch.bfloat16)
    if recompute == "full":
        blocks = _blocks(module)
        for block in module.modules():
            if id(block) in blocks:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    forward = _forward(work, module, batch, device, precision)
    one_step, chosen = _stepper(forward, module, device, precision, optimizer, accumulate, zero_grad)

    def step() -> None:
        with _selective(recompute):
            one_step()

    return module, batch, chosen, step


def _forward(
    work: Workload, module: nn.Module, batch: Any, device: torch.device, precision: str
) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        cast = _MIXED.get(precision)
        with torch.autocast(device.type, cast) if cast else contextlib.nullcontext():
            return work.loss(module, batch)

    return forward


def _stepper(
    forward: Callable[[], Tensor],
    module: nn.Module,
    device: torch.device,
    precision: str,
    optimizer: str,
    accumulate: int,
    zero_grad: str,
) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """One optimizer update, the same code on fake and on real tensors, and its optimizer."""
    chosen = optimizers.build(optimizer, [p for p in module.parameters() if p.requires_grad], module=module)
    scaler = FiniteScaler(device) if precision == "fp16-mixed" else None

    def one_step() -> None:
        for _ in range(accumulate):
            loss = forward()
            if accumulate > 1:
                loss = loss / accumulate
            if scaler is not None:
                loss = scaler.scale(loss)
            loss.backward()
            del loss
        if scaler is not None:
            scaler.unscale([p.grad for p in module.parameters() if p.grad is not None])
        chosen.step()
        chosen.zero_grad(set_to_none=zero_grad == "none")

    return one_step, chosen


def _fold(
    session: Session, module: nn.Module, forward: Callable[[], Any], depth: int | None, trunks: list[Trunk]
) -> None:
    """Leave of each trunk of ``module`` four periods, and list it; of a model made shallow, say its ``depth``."""
    if depth is not None:
        trunks += [dataclasses.replace(trunk, periods=depth) for trunk in repeats.find(module, KEPT)]
    else:
        trunks += repeats.find(module)
        if trunks:
            session.pass_over(module, trunks, forward)
            taken = [weakref.ref(p) for block in repeats.shorten(module, trunks) for p in block.parameters()]
            if any(p() is not None for p in taken) and gc.collect() and any(p() is not None for p in taken):
                raise Unfoldable("something else holds on to the blocks left out")
            session.assumptions += [
                f"{t.path or 'the model'}: {t.extra * t.period} blocks are written from {KEPT * t.period} alike, traced"
                for t in trunks
            ]
    session.fold(trunks)


def _assumptions(
    work: Workload, precision: str, optimizer: str, recompute: str, replicas: int, ledger: Ledger, set_to_none: bool
) -> list[str]:
    notes = [*work.assumptions]
    notes.append(
        {
            "fp32": "fp32 throughout, TF32 off (torch's default lets convolutions use it: --precision tf32)",
            "tf32": "fp32 storage; matmuls and convolutions on TF32 tensor cores",
            "bf16": "parameters, gradients and optimizer state in bf16",
            "bf16-mixed": "bf16 autocast over fp32 parameters, gradients and optimizer state",
            "fp16-mixed": "fp16 autocast over fp32 parameters, gradients and state, with loss scaling",
        }[precision]
    )
    notes.append(f"optimizer {optimizer}; the step after a warm-up step; zero_grad(set_to_none={set_to_none})")
    if optimizer == "adamw-8bit":
        notes.append("torchao compiles this optimizer's step; counted op by op, its bytes and peak are upper bounds")
    if recompute == "full":
        notes.append("recompute full: every repeated block is checkpointed")
    if recompute == "selective":
        notes.append("recompute selective: the attention core is checkpointed")
        if ledger.flops.recompute == 0:
            notes.append("no call of torch.nn.functional.scaled_dot_product_attention was found to recompute")
    if replicas > 1:
        notes.append(
            f"{replicas} data-parallel ranks (DDP, gradients as bucket views); a figure of memory is one rank's"
        )
    return notes


# ---- copying a user's module onto fake tensors


@contextlib.contextmanager
def fake_copies(device: torch.device) -> Any:
    """Within this block ``copy.deepcopy`` of a real tensor makes an empty fake one: shape, strides, dtype, no data."""
    undo = Undo()

    def fake(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        if id(tensor) in memo:
            return memo[id(tensor)]  # type: ignore[no-any-return]
        if hasattr(tensor, "__tensor_flatten__"):  # made of several, a quantised weight say: each of them is copied
            kind: Any = type(tensor)
            names, context = tensor.__tensor_flatten__()
            inner = {name: fake(getattr(tensor, name), memo) for name in names}
            new: Tensor = kind.__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())
        else:
            new = torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=device)
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        elif tensor.is_floating_point():
            new.requires_grad_(tensor.requires_grad)
        memo[id(tensor)] = new
        return new

    try:
        undo.set(torch.Tensor, "__deepcopy__", fake)
        undo.set(nn.Parameter, "__deepcopy__", fake)
        yield
    finally:
        undo.restore()


def _has_real(module: nn.Module, batch: Any) -> bool:
    tensors = [*module.parameters(), *module.buffers(), *tensors_in(batch)]
    return any(not isinstance(t, FakeTensor) for t in tensors)


def _map(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {k: _map(v, change) for k, v in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(_map(v, change) for v in batch)
    return batch


def _moved(batch: Any, device: torch.device) -> Any:
    return _map(batch, lambda t: t.to(device))


def _cast(batch: Any, dtype: torch.dtype) -> Any:
    return _map(batch, lambda t: t.to(dtype) if t.is_floating_point() else t)


# ---- recompute


def _blocks(module: nn.Module) -> frozenset[int]:
    """The modules to checkpoint: members of the outermost lists of two or more alike. Raises BadInput for none."""
    found: set[int] = set()

    def look(parent: nn.Module) -> None:
        children = list(parent.children())
        alike = len({type(c) for c in children}) == 1 and len(children) > 1
        if (
            isinstance(parent, (nn.ModuleList, nn.Sequential))
            and alike
            and next(children[0].parameters(), None) is not None
        ):
            found.update(id(c) for c in children)
            return
        for child in children:
            look(child)

    look(module)
    if not found:
        raise BadInput(
            "--recompute full checkpoints the repeated blocks of a ModuleList or Sequential, and this model has none; "
            "use torch.utils.checkpoint inside the model instead"
        )
    return frozenset(found)


@contextlib.contextmanager
def _selective(recompute: str) -> Any:
    """With ``selective``, checkpoint the attention core alone (Korthikanti et al. 2022, section 4)."""
    undo = Undo()
    if recompute == "selective":
        plain = torch.nn.functional.scaled_dot_product_attention

        def attention(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(plain, *args, use_reentrant=False, **kwargs)

        undo.set(torch.nn.functional, "scaled_dot_product_attention", attention)
    try:
        yield
    finally:
        undo.restore()


class FiniteScaler:
    """torch.amp.GradScaler's two kernels, without its look at the values: a trace has none, so a step is finite."""

    def __init__(self, device: torch.device) -> None:
        self._scale = torch.full((), 2.0**16, device=device)
        self._inverse = torch.full((), 2.0**-16, device=device)
        self._found_inf = torch.full((), 0.0, device=device)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the scale."""
        return loss * self._scale

    def unscale(self, gradients: list[Tensor]) -> None:
        """Divide ``gradients`` by the scale, in place."""
        with torch.no_grad():
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, self._found_inf, self._inverse)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale, as GradScaler's method of this name."""
        self.unscale([p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None])

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step, taken."""
        optimizer.step()

    def update(self) -> None:
        """The scale stays."""
