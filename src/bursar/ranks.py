"""The processes that `torchrun` started: who I am, how a model lies over us, what we agree on, who is gone.

One process needs none of it.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel as DDP

from bursar.errors import BadInput, NoAnswer

mine, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # on this machine
# Were DDP's reducer the last to hold the group, it would wait for gloo's thread with the GIL, which that thread wants
# (torch 2.13: seen once in about ten runs). An error's traceback may keep the model that long.
_kept: list[Any] = []
_SURVIVORS_WAIT_SECONDS = 5.0  # for each other, before whoever is silent counts as lost


def device_for(asked: str) -> torch.device:
    """The accelerator of this rank, or the CPU. Raises BadInput where CUDA is asked for and not there."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise BadInput("device = 'cuda', and torch finds no CUDA device here")
    if asked == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def group(device: torch.device, timeout_seconds: float) -> Iterator[None]:
    """Within this block the ranks can talk. Raises NoAnswer naming the ranks that are gone; never waits longer."""
    if count == 1:
        yield
        return
    wait, store, backend = (
        datetime.timedelta(seconds=timeout_seconds),
        None,
        "nccl" if device.type == "cuda" else "gloo",
    )
    try:
        store, _, _ = next(rendezvous("env://", timeout=wait))
        dist.init_process_group(backend, store=store, rank=mine, world_size=count, timeout=wait)
        _kept.append(dist.group.WORLD)
        yield
    except (RuntimeError, dist.DistError) as error:
        if lost := _lost(store):
            names = ", ".join(map(str, lost))
            raise NoAnswer(
                f"rank {mine} waited for rank {names} of {count}, which is gone or hangs (timeout_seconds = "
                f"{timeout_seconds:g}); start the run again with --resume"
            ) from error
        raise
    finally:
        gc.collect()  # a model is a cycle; one that outlived its group ended the process in an abort, 4 times in 16
        with contextlib.suppress(RuntimeError):
            if dist.is_initialized():
                dist.destroy_process_group()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within this block torch does not warn that one process is no group; of all else it does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
        yield


def _lost(store: Any) -> list[int]:
    """The ranks that do not answer through the store, which the launcher keeps."""
    if store is None:
        return [0]  # without a launcher the store lives in rank 0
    try:
        store.set(f"bursar/survivor/{mine}", "here")
        end = time.monotonic() + _SURVIVORS_WAIT_SECONDS
        while missing := [r for r in range(count) if not store.check([f"bursar/survivor/{r}"])]:
            if time.monotonic() > end:
                return missing
            time.sleep(0.05)
    except (RuntimeError, dist.DistError):
        return [0]
    return []


def lay_out(module: nn.Module, blocks: list[nn.Module], layout: str, device: torch.device) -> nn.Module:
    """The module as its layout runs it: replicated (DDP) or sharded, every block and the root (FSDP2).

    Raises BadInput for several ranks and no layout.
    """
    if count > 1 and layout == "single":
        raise BadInput(f"{count} processes and layout = 'single'; give layout = 'ddp' or 'fsdp'")
    if count == 1 or not dist.is_initialized():
        return module
    if layout == "ddp":
        return DDP(module, gradient_as_bucket_view=True, device_ids=[device.index] if device.type == "cuda" else None)
    mesh = init_device_mesh(device.type, (count,))
    for part in (*blocks, module):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    return module


@contextlib.contextmanager
def synchronised(module: nn.Module, last: bool) -> Iterator[None]:
    """Gradients are averaged over the ranks with the step's last micro-batch only."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    with module.no_sync() if isinstance(module, DDP) and not last else contextlib.nullcontext():
        yield


def mean(values: Tensor) -> Tensor:
    """The mean over the ranks, the same on all of them."""
    if count > 1:
        dist.all_reduce(values)
        values /= count
    return values


def first(work: Callable[[], Any]) -> Any:
    """What ``work()`` returns on rank 0, on every rank; where it raises there, every rank raises."""
    value: Any = None
    failed: Exception | None = None
    if mine == 0:
        try:
            value = work()
        except Exception as error:
            failed = error
    box = [(value, type(failed).__name__, str(failed))]
    if count > 1:
        dist.broadcast_object_list(box, 0)
    value, kind, text = box[0]
    if kind != "NoneType":
        raise failed or (BadInput if kind == "BadInput" else NoAnswer)(text)
    return value
