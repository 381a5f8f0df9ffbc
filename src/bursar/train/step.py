"""One optimizer update, the same code on real tensors and on the tracer's: that is why the forecast is of this step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bursar.errors import BadInput
from bursar.train import parallel
from bursar.train.config import Config
from bursar.train.data import Batch
from bursar.workload import optimizers
from bursar.workload.step import _blocks

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}


@dataclass(slots=True)
class Trainee:
    """A model, what is called to run it (compiled perhaps), its optimizer and its loss scaler."""

    module: nn.Module
    run: Any
    loss: Callable[[Any, Batch], Tensor]
    optimizer: torch.optim.Optimizer
    scaler: Any
    peak_lr: float
    device: torch.device


def make(config: Config, device: torch.device, scaler: Any = None) -> Trainee:
    """The model by the config's seed, laid out over the ranks there are."""
    preset = config.preset
    torch.manual_seed(config.seed)
    with device:
        module = preset.make_model()
    if config.precision == "bf16":
        module.to(torch.bfloat16)
    blocks = _repeated(module) if config.recompute_every or config.layout == "fsdp" else []
    for block in blocks[:: config.recompute_every or len(blocks) + 1] if config.recompute_every else ():
        # No preset draws random numbers in forward, so no random state (5 kB a block) is kept for backward
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    module = parallel.lay_out(module, blocks, config.layout, device)
    optimizer = optimizers.build(config.optimizer_name, [p for p in module.parameters() if p.requires_grad])
    for group in optimizer.param_groups:
        if config.weight_decay is not None and "weight_decay" not in group:
            raise BadInput(f"{config.optimizer_name} has no weight decay; leave weight_decay out")
        if config.weight_decay is not None:
            group["weight_decay"] = config.weight_decay
    if config.precision == "fp16-mixed" and scaler is None:
        scaler = torch.amp.GradScaler(device.type)
    peak = config.lr if config.lr is not None else float(optimizer.param_groups[0]["lr"])
    run = torch.compile(module) if config.compile else module
    return Trainee(module, run, preset.loss, optimizer, scaler, peak, device)


def _repeated(module: nn.Module) -> list[nn.Module]:
    found = _blocks(module)
    return [m for m in module.modules() if id(m) in found]


def mean_over(loss: Tensor, micro_batches: int) -> Tensor:
    """A micro-batch's share of the step's mean. Gradients add up over micro-batches, so each must carry the 1/N."""
    return loss / micro_batches


def update(
    config: Config, trainee: Trainee, batch: Batch, step: int, watch: Any = contextlib.nullcontext()  # noqa: B008
) -> Tensor:  # fmt: skip
    """One step on this rank's samples: its mean loss, detached. ``watch`` stands around forward and backward."""
    t, size = trainee, config.batch_size
    device, cast = batch[0].device.type, _AUTOCAST.get(config.precision)
    n, total = len(batch[0]) // size, None
    lr = config.lr_at(step, t.peak_lr)
    for group in t.optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    with watch:
        for i in range(n):
            micro = tuple(x[i * size : (i + 1) * size] for x in batch)
            with parallel.synchronised(t.module, last=i == n - 1):
                with torch.autocast(device, cast) if cast else contextlib.nullcontext():
                    loss = mean_over(t.loss(t.run, micro), n) if n > 1 else t.loss(t.run, micro)
                (t.scaler.scale(loss) if t.scaler else loss).backward()
            total = loss.detach() if total is None else total + loss.detach()
            del loss
    if t.scaler:
        t.scaler.unscale_(t.optimizer)
    if config.clip is not None:
        torch.nn.utils.clip_grad_norm_(t.module.parameters(), config.clip)
    if t.scaler:
        t.scaler.step(t.optimizer)  # leaves the step out where a gradient is not finite
        t.scaler.update()
    else:
        t.optimizer.step()
    t.optimizer.zero_grad(set_to_none=True)
    assert total is not None
    return total
