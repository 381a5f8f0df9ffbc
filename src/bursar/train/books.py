"""The two sides of the account: the step forecast by tracing it, and the same step measured while it runs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from bursar import hardware, roofline, rules
from bursar.errors import NoAnswer, UnknownName
from bursar.ledger import Ledger, Step
from bursar.report.train import Figures
from bursar.trace import tracing
from bursar.trace.recorder import Recorder, _OpInfo
from bursar.train import data, parallel
from bursar.train.config import Config
from bursar.train.step import Trainee, make, update
from bursar.units import format_bytes
from bursar.workload.step import _Scaler


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a step will cost: the whole job's FLOPs, one rank's peak; seconds where the device is in the catalogue."""

    ledger: Ledger
    peak_bytes: int
    priced: roofline.Forecast | None
    notes: tuple[str, ...]

    @property
    def figures(self) -> Figures:
        """As the record has it."""
        flops, seconds = self.ledger.flops, self.priced.seconds if self.priced else None
        return Figures(flops.model, flops.hardware, self.peak_bytes, seconds)


def forecast(config: Config, device: torch.device) -> Forecast:
    """Trace two steps of this very config, without data, memory or ranks, and keep the second."""
    ranks = parallel.ranks
    eager = msgspec.structs.replace(config, compile=False)
    micro, sequence = config.micro_batches(ranks), config.sequence
    with tracing(on="cpu" if device.type == "cpu" else None) as traced:
        fake = torch.device(device.type)
        with fake:
            batch = config.preset.make_batch(micro * config.batch_size, sequence)
        trainee = make(eager, fake, FiniteScaler(fake) if config.precision == "fp16-mixed" else None)
        for step in range(2):
            update(config, trainee, data.cast(batch, config), step)
    samples = micro * config.batch_size * ranks
    ledger = dataclasses.replace(
        traced.ledger,
        step=Step(samples, samples * (sequence or 1), micro),
        replicas=ranks,
    )
    notes = list(traced.ledger.assumptions)
    peak = ledger.memory.peak_bytes
    if ranks > 1 and config.layout == "fsdp":
        memory = dataclasses.replace(ledger, replicas=1).memory
        sharded = sum(memory.at_peak[c] for c in ("parameters", "gradients", "optimizer_state"))
        whole = max(sum(p.numel() * p.element_size() for p in part.parameters()) for part in _units(config))
        peak = memory.peak_bytes - sharded + sharded // ranks + 2 * whole
        notes.append(f"fsdp peak: an estimate, 1/{ranks} of the states and one gathered unit with its gradients")
    if ranks > 1 and config.layout == "ddp" and micro > 1:
        peak += ledger.textbook.gradients
        notes.append("ddp with accumulation holds the gradients twice: beside the buckets until they are averaged")
    if config.compile:
        notes.append("compile: the forecast is the eager step's; FLOPs are the same, fewer bytes move")
    return Forecast(ledger, peak, _priced(ledger, device, ranks, notes), tuple(notes))


def _units(config: Config) -> list[torch.nn.Module]:
    with torch.device("meta"):
        module = config.preset.make_model()
    return [m for m in module.modules() if m is not module and next(m.parameters(), None) is not None]


def _priced(ledger: Ledger, device: torch.device, ranks: int, notes: list[str]) -> roofline.Forecast | None:
    if device.type == "cpu":
        notes.append("seconds are not forecast: no peak and bandwidth are known for this CPU")
        return None
    try:
        row = hardware.by_driver_name(torch.cuda.get_device_name(device))
    except UnknownName as error:
        notes.append(f"seconds are not forecast: {error}")
        return None
    return roofline.forecast(ledger, hardware.Cluster(row, ranks))


def refuse_what_does_not_fit(ahead: Forecast, device: torch.device) -> None:
    """Raise NoAnswer where the forecast peak is more than this machine has."""
    if device.type == "cuda":
        has, need, whose = torch.cuda.mem_get_info(device)[0], ahead.peak_bytes, "free on this GPU"
    else:
        has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        with contextlib.suppress(OSError, ValueError):  # a container's limit; "max" where there is none
            has = min(has, int(Path("/sys/fs/cgroup/memory.max").read_text()))
        need, whose = ahead.peak_bytes * parallel.local_ranks, "of memory here"
    if need > has:
        raise NoAnswer(
            f"does not fit: the step needs {format_bytes(need)} and there are {format_bytes(has)} {whose}; make "
            "batch_size smaller with more accumulate, set recompute = 'full', or shard with layout = 'fsdp'"
        )


class FiniteScaler(_Scaler):
    """GradScaler's kernels for a step whose gradients are all finite; a trace has no values to look at."""

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale."""
        self.unscale([p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None])

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step, taken."""
        optimizer.step()

    def update(self) -> None:
        """The scale stays."""


class FlopMeter(TorchDispatchMode):
    """Prices the ops that really run, by the same rules; ``model`` and ``hardware`` FLOPs of this rank."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = self.hardware = 0
        self._pricing = Recorder(FakeTensorMode(), device.type)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = rules.RULES.get("{}.{}".format(*func._schema.name.split("::")))
        if found is not None and found.kind in rules.MODEL_KINDS:
            outs = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor)]
            work = self._pricing._cost(_OpInfo(func), args, kwargs, outs)[1]
            again = torch._C._current_autograd_node() is not None and torch.is_grad_enabled()  # a checkpoint's second
            self.model += 0 if again else work.flops
            self.hardware += work.flops + work.recompute_flops
        return out


class PeakMeter:
    """The most bytes live in a block: CUDA's own counter; on a CPU the allocator's record, added to what stood."""

    __slots__ = ("bytes",)

    @contextlib.contextmanager
    def watch(self, trainee: Trainee, batch: Iterable[Tensor]) -> Iterator[None]:
        """Measure one step."""
        if trainee.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            yield
            self.bytes = torch.cuda.max_memory_allocated()
            return
        before = _n_bytes([*_held(trainee), *batch])
        run = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        with _hushed():
            run.start()
        try:
            yield
        finally:
            with _hushed():
                run.stop()
        kineto: Any = run.profiler
        found = [(e.start_ns(), e.nbytes()) for e in kineto.kineto_results.events() if e.name() == "[memory]"]
        changes = [change for _, change in sorted(found, key=lambda event: event[0])]
        self.bytes = int(before + max(0, *np.cumsum([0, *changes])))


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """torch's profiler announces itself on the process's stderr; here it is kept off the user's screen."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _held(trainee: Trainee) -> Iterator[Tensor]:
    yield from trainee.module.parameters()
    yield from trainee.module.buffers()
    yield from (v for s in trainee.optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
    if isinstance(trainee.module, torch.nn.parallel.DistributedDataParallel):
        yield from (torch.empty_like(p) for p in trainee.module.parameters())  # the buckets, which nothing lists


def _n_bytes(tensors: Iterable[Tensor]) -> int:
    kept = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())
