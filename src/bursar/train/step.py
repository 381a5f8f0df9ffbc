"""One optimizer update, the same code on real tensors and on the tracer's: that is why the forecast is of this step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bursar import ranks
from bursar.errors import BadInput
from bursar.train.config import Config
from bursar.workload import optimizers
from bursar.workload.samples import Batch
from bursar.workload.step import FiniteScaler, _blocks

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
    if config.recompute_every and not blocks:
        raise BadInput(f"recompute = {config.recompute!r} needs repeated blocks, and {config.model} has none")
    for block in blocks[:: config.recompute_every] if config.recompute_every else ():
        # No preset draws random numbers in forward, so no random state (5 kB a block) is kept for backward
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    module = ranks.lay_out(module, blocks, config.layout, device)
    trained = [p for p in module.parameters() if p.requires_grad]
    settings = {"lr": config.lr, "weight_decay": config.weight_decay}
    optimizer = optimizers.build(config.optimizer_name, trained, module=module, **settings)
    if config.precision == "fp16-mixed" and scaler is None:
        scaler = torch.amp.GradScaler(device.type)
    peak = float(optimizer.param_groups[0]["lr"])
    run = torch.compile(module) if config.compile else module
    return Trainee(module, run, preset.loss, optimizer, scaler, peak, device)


def _repeated(module: nn.Module) -> list[nn.Module]:
    """The alike members of its lists: what is checkpointed, and sharded, one by one."""
    with contextlib.suppress(BadInput):
        found = _blocks(module)
        return [m for m in module.modules() if id(m) in found]
    return []


def mean_over(loss: Tensor, micro_batches: int) -> Tensor:
    """A micro-batch's share of the step's mean. Gradients add up over micro-batches, so each must carry the 1/N."""
    return loss / micro_batches


def cast(config: Config, batch: Batch) -> Batch:
    """Features in the dtype of the model's weights."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in batch)


def gradients(config: Config, t: Trainee, batch: Batch) -> Tensor:
    """Forward and backward of this rank's samples, one micro-batch after the other: their mean loss, detached."""
    size, mixed = config.batch_size, _AUTOCAST.get(config.precision)
    n, total = len(batch[0]) // size, None
    for i in range(n):
        micro = tuple(x[i * size : (i + 1) * size] for x in batch)
        with ranks.synchronised(t.module, last=i == n - 1):
            with torch.autocast(batch[0].device.type, mixed) if mixed else contextlib.nullcontext():
                loss = mean_over(t.loss(t.run, micro), n) if n > 1 else t.loss(t.run, micro)
            (t.scaler.scale(loss) if t.scaler else loss).backward()
        total = loss.detach() if total is None else total + loss.detach()
        del loss
    assert total is not None
    return total


def update(
    config: Config, t: Trainee, batch: Batch, step: int, watch: Any = contextlib.nullcontext()  # noqa: B008
) -> Tensor:  # fmt: skip
    """One step on this rank's samples: its mean loss, detached. ``watch`` stands around forward and backward."""
    lr = config.lr_at(step, t.peak_lr)
    for group in t.optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    with watch:
        loss = gradients(config, t, batch)
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
    return loss


def rehearse(config: Config, fake: torch.device) -> nn.Module:
    """Two eager updates of one rank on a device without data, for the forecast; the model they trained."""
    micro = config.micro_batches(ranks.count)
    with fake:
        batch = config.preset.make_batch(micro * config.batch_size, config.sequence)
    eager = msgspec.structs.replace(config, compile=False)
    trainee = make(eager, fake, FiniteScaler(fake) if config.precision == "fp16-mixed" else None)
    for step in range(2):
        update(eager, trainee, cast(config, batch), step)
    return trainee.module
