"""Ranks: who I am, how the model lies over all of us, and what to say when one is gone. One rank needs none of it."""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from bursar.errors import BadInput, NoAnswer

rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
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
def group(layout: str, device: torch.device, timeout_seconds: float) -> Iterator[None]:
    """Within this block the ranks can talk. Raises NoAnswer naming the ranks that are gone; never waits longer."""
    if ranks == 1:
        yield
        return
    if layout == "single":
        raise BadInput(f"{ranks} processes and layout = 'single'; give layout = 'ddp' or 'fsdp'")
    wait = datetime.timedelta(seconds=timeout_seconds)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=wait)
    _kept.append(dist.group.WORLD)
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        if lost := _lost():
            names = ", ".join(map(str, lost))
            raise NoAnswer(
                f"rank {rank} waited for rank {names} of {ranks}, which is gone or hangs (timeout_seconds = "
                f"{timeout_seconds:g}); start the run again with --resume"
            ) from error
        raise
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _lost() -> list[int]:
    """The ranks that do not answer through the store, which the launcher keeps."""
    store: Any = dist.distributed_c10d._get_default_store()
    try:
        store.set(f"bursar/survivor/{rank}", "here")
        end = time.monotonic() + _SURVIVORS_WAIT_SECONDS
        while missing := [r for r in range(ranks) if not store.check([f"bursar/survivor/{r}"])]:
            if time.monotonic() > end:
                return missing
            time.sleep(0.05)
    except (RuntimeError, dist.DistError):
        return [0]  # without a launcher the store lives in rank 0
    return []


def lay_out(module: nn.Module, blocks: list[nn.Module], layout: str, device: torch.device) -> nn.Module:
    """The module as its layout runs it: replicated (DDP) or sharded, every block and the root (FSDP2)."""
    if ranks == 1 or not dist.is_initialized():
        return module
    if layout == "ddp":
        return DDP(module, gradient_as_bucket_view=True, device_ids=[device.index] if device.type == "cuda" else None)
    mesh = init_device_mesh(device.type, (ranks,))
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
    if ranks > 1:
        dist.all_reduce(values)
        values /= ranks
    return values


def agree(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if ranks == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def first(work: Callable[[], Any]) -> Any:
    """What ``work()`` returns on rank 0, on every rank; where it raises there, every rank raises."""
    value: Any = None
    failed: Exception | None = None
    if rank == 0:
        try:
            value = work()
        except Exception as error:
            failed = error
    value, kind, text = agree((value, type(failed).__name__, str(failed)))
    if kind != "NoneType":
        raise failed or (BadInput if kind == "BadInput" else NoAnswer)(text)
    return value
