"""The most bytes live in a block, by the allocator's own record; and how many there are."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bursar.meter.guard import note
from bursar.workload.optimizers import inner


class PeakMeter:
    """``bytes``: the most that were live in the block, what stood before it included."""

    __slots__ = ("bytes",)

    @contextlib.contextmanager
    def watch(self, device: torch.device, standing: Iterable[Tensor]) -> Iterator[None]:
        """CUDA's own counter; on a CPU the allocator's record of the block, added to the bytes of ``standing``."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            yield
            self.bytes = torch.cuda.max_memory_allocated()
            note(peak_bytes=self.bytes)
            return
        before = n_bytes(standing)
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
        note(peak_bytes=self.bytes)


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


def standing(module: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """What stands between two steps: weights, buffers, optimizer state, DDP's buckets."""
    yield from module.parameters()
    yield from module.buffers()
    yield from (v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
    if isinstance(module, nn.parallel.DistributedDataParallel):
        yield from (torch.empty_like(p) for p in module.parameters())  # the buckets, which nothing lists


def n_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of the storages behind ``tensors``, each once; of a sharded one this rank's."""
    kept = [part.untyped_storage() for t in tensors for part in inner(t)]
    return sum({s.data_ptr(): s.nbytes() for s in kept}.values())


def there_are(device: torch.device) -> int:
    """The bytes that this process may still take on ``device``: free on a GPU, a machine's or container's memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # a container's limit; "max" where there is none
        has = min(has, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return has
