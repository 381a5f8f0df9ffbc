"""The catalogue's optimizers made real, and what they keep and cost, read off a real step.

Nothing is imported before it is asked for: torchao and pytorch-optimizer come with the extra ``optim``.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bursar.errors import BadInput, MissingExtra
from bursar.optimizers import OPTIMIZERS, ClassBytes, Compared, Cost, Race, optimizer

__all__ = ["OPTIMIZERS", "MuonWithAdamW", "build", "byte_table", "bytes_of", "compare", "cost", "race", "state_tensors"]

_SIDE = 256  # of the square matrix on which an optimizer is measured: 65 536 parameters, whole blocks of 256


def build(
    name: str, parameters: Iterable[Any], *, module: nn.Module | None = None, **settings: Any
) -> torch.optim.Optimizer:
    """The optimizer ``name`` over ``parameters``: tensors, or groups of them as torch takes them.

    ``settings`` (``lr``, ``weight_decay``, …) go before the row's own; one that is None is left out. ``module`` tells
    Muon which matrices are embeddings. Raises UnknownName naming the nearest known, MissingExtra where its library is
    not installed, and BadInput for a setting it does not take.
    """
    row = optimizer(name)
    given = {**row.settings, **{k: v for k, v in settings.items() if v is not None}}
    make = _load(row.make, row.extra, name)
    if make is MuonWithAdamW:
        given["module"] = module
    try:
        made: torch.optim.Optimizer = make(parameters, **given)
    except TypeError as error:
        raise BadInput(f"{name} does not take {', '.join(settings)}: {error}") from error
    return made


def _load(path: str, extra: str, name: str) -> Any:
    module, _, attribute = path.rpartition(".")
    if module == __name__:
        return globals()[attribute]
    try:
        with _quiet():
            return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise MissingExtra(extra or "torch", f"the optimizer {name} is {path}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Importing torchao logs each GPU library that it could not load; none is needed here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def vocabulary_tables(module: nn.Module) -> set[int]:
    """The ids of ``module``'s embedding tables and of the heads over the same vocabulary."""
    tables = [m.weight for m in module.modules() if isinstance(m, nn.Embedding)]
    sizes = {len(t) for t in tables}
    heads = [m.weight for m in module.modules() if isinstance(m, nn.Linear) and m.out_features in sizes]
    return {id(p) for p in (*tables, *heads)}


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for hidden matrices, AdamW for all else: embeddings, heads of their vocabulary, what is not a matrix.

    One optimizer to its user: one list of groups, one state, one ``state_dict``. Without ``module`` every matrix is
    Muon's. Source: Jordan et al. 2024, "Muon", section on which parameters it is for.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        *,
        module: nn.Module | None = None,
    ) -> None:
        tables = vocabulary_tables(module) if module is not None else set()
        given = list(parameters)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        matrices, others = [], []
        for group in groups:
            chosen = {id(p) for p in group["params"] if p.ndim == 2 and id(p) not in tables}
            matrices.append({**group, "params": [p for p in group["params"] if id(p) in chosen]})
            others.append({**group, "params": [p for p in group["params"] if id(p) not in chosen]})
        settings = {"lr": lr, "weight_decay": weight_decay}
        kinds: tuple[tuple[Any, list[Any]], ...] = ((torch.optim.Muon, matrices), (torch.optim.AdamW, others))
        found = [(make, [g for g in part if g["params"]]) for make, part in kinds]
        self._parts = [make(part, **settings) for make, part in found if part]
        super().__init__([g for part in self._parts for g in part.param_groups], settings)
        self._share()

    def _share(self) -> None:
        """The parts work on this optimizer's own groups and state."""
        start = 0
        for part in self._parts:
            part.param_groups = self.param_groups[start : start + len(part.param_groups)]
            part.state = self.state
            start += len(part.param_groups)

    def __setstate__(self, state: dict[str, Any]) -> None:  # load_state_dict ends here
        super().__setstate__(state)
        if "_parts" in self.__dict__:
            self._share()

    def step(self, closure: Any = None) -> Any:
        """One update of both."""
        loss = closure() if closure is not None else None
        for part in self._parts:
            step: Any = type(part).step
            step.__wrapped__(part)  # past the hooks: this step has its own
        return loss


# ---- what an optimizer keeps


def bytes_of(tensor: Tensor) -> int:
    """The bytes behind ``tensor``: of its inner tensors, where it is made of several (8-bit states)."""
    return sum(t.numel() * t.element_size() for t in inner(tensor))


def inner(tensor: Tensor) -> list[Tensor]:
    """The plain tensors here that ``tensor`` is made of: itself, or those that ``__tensor_flatten__`` names."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [t for part in parts if isinstance(part, Tensor) for t in inner(part)]  # a DTensor names its mesh too


def state_tensors(made: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    """The tensors of its ``state_dict``, by key."""
    found: dict[str, list[Tensor]] = {}
    for state in made.state_dict()["state"].values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                found.setdefault(key, []).append(value)
    return found


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """torchao compiles its step; here it runs as written, where no compiler need be."""
    with torch.compiler.set_stance("force_eager"):
        yield


@cache
def cost(name: str) -> Cost:
    """What ``name`` keeps (from the real ``state_dict`` after a step) and does (a traced step), on a 256² matrix."""
    from bursar.trace import tracing

    kept: dict[torch.dtype, float] = {}
    state: dict[str, str] = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = nn.Parameter(torch.zeros(_SIDE, _SIDE, dtype=dtype))
        weight.grad = torch.full_like(weight, 0.5)
        made = build(name, [weight])
        with uncompiled():
            made.step()
        tensors = state_tensors(made)
        kept[dtype] = sum(bytes_of(t) for ts in tensors.values() for t in ts if t.dim()) / weight.numel()
        if dtype == torch.float32:
            state = {key: _shape(ts[0]) for key, ts in tensors.items()}
    with tracing() as session:
        fake = nn.Parameter(torch.empty(_SIDE, _SIDE, device="cuda"))
        chosen = build(name, [fake])
        for _ in range(2):  # the first makes the states
            fake.grad = torch.empty_like(fake)
            session.mark()
            chosen.step()
    rows = session.ledger.recorded
    n = _SIDE * _SIDE
    return Cost(
        state,
        kept[torch.float32],
        kept[torch.bfloat16],
        sum(r.work.flops for r in rows if r.phase == "optimizer") / n,
        sum(r.work.read_bytes + r.work.written_bytes for r in rows if r.phase == "optimizer") / n,
    )


def _shape(tensor: Tensor) -> str:
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "uint8"}
    parts = inner(tensor)
    return " + ".join(f"{'×'.join(map(str, t.shape)) or 'scalar'} {names.get(t.dtype, t.dtype)}" for t in parts)


# ---- bytes per parameter of a training state, class by class


def byte_table() -> list[ClassBytes]:
    """AdamW's training state in bytes per parameter under each precision, counted on real tensors after a real step.

    One 1024² matrix, its real gradient and ``state_dict``. The 8-bit row is left out where torchao is not installed.
    """
    fp32, bf16 = torch.float32, torch.bfloat16
    rows = [
        _counted("fp32", fp32),
        _counted("bf16, all of it (torch's AdamW)", bf16),
        _counted("bf16, fp32 states", bf16, states_over="a copy"),
        _counted("bf16, fp32 states and master", bf16, states_over="a master"),
        _counted("bf16 autocast", fp32, autocast=True),
    ]
    with contextlib.suppress(MissingExtra):
        rows.append(_counted("fp32, 8-bit states", fp32, name="adamw-8bit"))
    return rows


def _counted(
    label: str, dtype: torch.dtype, *, name: str = "adamw", states_over: str = "", autocast: bool = False
) -> ClassBytes:
    """``states_over``: whether the optimizer works on an fp32 copy made for each update, or on one that is kept."""
    layer = nn.Linear(1024, 1024, bias=False, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        layer(torch.ones(1, 1024, dtype=dtype)).sum().backward()
    weight, gradient = layer.weight, layer.weight.grad
    assert gradient is not None
    updated = weight
    if states_over:
        updated = nn.Parameter(weight.detach().float())
        updated.grad = gradient.float()
    made = build(name, [updated])
    with uncompiled():
        made.step()
    state = [t for ts in state_tensors(made).values() for t in ts if t.dim()]
    n = weight.numel()
    master = bytes_of(updated) if states_over == "a master" else 0
    return ClassBytes(label, bytes_of(weight) / n, bytes_of(gradient) / n, master / n, sum(map(bytes_of, state)) / n)


# ---- the optimizers side by side

RACE_STEPS = 50
RACE_TASK = "an MLP of 43 408 parameters (64→128→128→128→16, ReLU) learns 256 outputs of a fixed random network"
_TIMES = (1.0, 3.0, 10.0, 30.0, 100.0)  # of the row's learning rate; the best of them is shown


def _available() -> Iterator[str]:
    for name, row in OPTIMIZERS.items():
        with contextlib.suppress(MissingExtra):
            _load(row.make, row.extra, name)
            yield name


def compare(model: str, batch_size: int | None = None, seq_len: int | None = None) -> list[Compared]:
    """One traced step of ``model`` under each optimizer that is installed, in fp32."""
    from bursar.workload.step import step

    found = []
    for name in _available():
        ledger = step(model, batch_size=batch_size, seq_len=seq_len, optimizer=name)
        memory = ledger.memory
        found.append(Compared(name, memory.between_steps["optimizer_state"], memory.peak_bytes, ledger.flops.optimizer))
    return found


def race() -> list[Race]:
    """The measured losses of each installed optimizer on the same small task from the same start, on the CPU."""
    return [min((_run(name, t) for t in _TIMES), key=_final) for name in _available()]


def _final(run: Race) -> float:
    return run.losses[-1] if run.losses[-1] == run.losses[-1] else float("inf")  # NaN is last


def _run(name: str, times: float) -> Race:
    from bursar.workload.presets import build as preset

    learner = preset("mlp:D=64,H=128,L=2,K=16")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inputs = torch.randn(256, 64)
        targets = torch.tanh(inputs @ torch.randn(64, 32) / 8) @ torch.randn(32, 16) / 32**0.5
        module = learner.make_model()
        lr = times * OPTIMIZERS[name].settings["lr"]
        made = build(name, module.parameters(), module=module, lr=lr, weight_decay=0.0)
        losses = []
        with uncompiled():
            for _ in range(RACE_STEPS):
                loss = nn.functional.mse_loss(module(inputs), targets)
                losses.append(loss.item())
                loss.backward()
                made.step()
                made.zero_grad()
            losses.append(nn.functional.mse_loss(module(inputs), targets).item())
    return Race(name, lr, tuple(losses))
