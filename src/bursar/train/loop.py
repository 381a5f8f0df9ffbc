"""The run: forecast, refuse or begin, train, save, close the books."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bursar import files, ranks
from bursar.errors import BadInput, NoAnswer
from bursar.ledger import Step
from bursar.meter.clock import Clock
from bursar.meter.flops import FlopMeter
from bursar.meter.forecast import Forecast, forecast, refuse_what_does_not_fit
from bursar.meter.memory import PeakMeter, standing
from bursar.report.train import Figures, TrainRecord
from bursar.train import checkpoint
from bursar.train.config import Config
from bursar.train.log import Log
from bursar.train.step import Trainee, cast, gradients, make, rehearse, update
from bursar.workload import samples
from bursar.workload.optimizers import uncompiled

Say = Callable[[str], None]
_REMEDY = "make batch_size smaller with more accumulate, set recompute = 'full', or shard with layout = 'fsdp'"
_COMPILED = "compile: FLOPs, bytes and peak are the eager step's; compiled it moves fewer bytes, and may hold fewer"


def train(
    config: Config, name: str, out: Path | None = None, max_steps: int | None = None, *, resume: bool = False,
    dry_run: bool = False, say: Say = lambda text: None, progress: Say = lambda text: None,
) -> TrainRecord:  # fmt: skip
    """Run what ``config`` says up to step ``max_steps``, and return the account of it.

    ``out`` is the run's folder; one that holds a run already is left alone for ``out-2`` unless ``resume``. ``say``
    gets each remark, ``progress`` a line on the steps done. Raises NoAnswer where the step does not fit or the loss
    diverges, BadInput for what cannot be meant, a changed config on resume among it.
    """
    samples.check(config.preset, config.text)
    device, micro = ranks.device_for(config.device), config.micro_batches(ranks.count)
    n = config.batch_size * micro * ranks.count
    done = Step(n, n * (config.sequence or 1), micro)
    ahead = forecast(partial(rehearse, config), done, config.layout, device)
    record = TrainRecord(
        model=config.model, parameters=ahead.ledger.model.parameters, ranks=ranks.count,
        device="cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        samples_per_step=done.samples, tokens_per_step=done.tokens, measured=Figures(),
        forecast=Figures(ahead.ledger.flops.model, ahead.ledger.flops.hardware, ahead.peak_bytes, ahead.seconds),
        assumptions=[*ahead.notes, *([_COMPILED] if config.compile else [])],
    )  # fmt: skip
    if dry_run:
        return record
    refuse_what_does_not_fit(ahead, device, _REMEDY)
    with ranks.group(device, config.timeout_seconds), contextlib.nullcontext() if config.compile else uncompiled():
        try:
            folder = Path(ranks.first(lambda: str(_folder(out or Path("runs") / name, out is None, resume, say))))
            last = min(config.steps, max_steps or config.steps)
            return _trained(config, folder, last, resume, say, progress, record, ahead, device)
        except OSError as error:
            raise NoAnswer(f"the run cannot go on: {error}; once that is mended, go on with --resume") from error


def _folder(wanted: Path, by_name: bool, resume: bool, say: Say) -> Path:
    """The run's folder: a fresh one, or the one to go on in, the latest of that name if the user gave none."""
    if not resume:
        folder = files.fresh(wanted)
        if folder != wanted:
            say(f"{wanted} holds a run already: this one goes to {folder}")
        return folder
    alike = re.compile(rf"{re.escape(wanted.name)}(-\d+)?").fullmatch
    names = [p for p in wanted.parent.glob("*") if by_name and alike(p.name)]
    folder = max(names, key=lambda p: p.stat().st_mtime, default=wanted)
    if not folder.is_dir():
        raise BadInput(f"no run in {folder} to resume; leave --resume out, or give its folder with --out")
    return folder


def _trained(config: Config, folder: Path, last: int, resume: bool, say: Say, progress: Say, record: TrainRecord,
             ahead: Forecast, device: torch.device) -> TrainRecord:  # fmt: skip
    """The run among its ranks. The model is gone when this returns, before the ranks part (see `ranks`)."""
    preset, text, sequence = config.preset, config.text, config.sequence
    ranks.first(lambda: samples.prepare(preset, text, config.tokenizer, sequence, folder))
    draw = samples.source(preset, config.seed, sequence, folder)
    t, start, saved = make(config, device), 0, None
    if resume:
        saved, manifest, passed = ranks.first(lambda: checkpoint.newest(folder, config))
        for text in passed or ([] if saved else [f"{folder} holds no checkpoint yet: starting at step 0"]):
            say(text)
        start = checkpoint.load(saved, manifest, t) if saved else 0
    log, clock = Log(config, folder, start, t.peak_lr), Clock()
    size, micro = config.batch_size, config.micro_batches(ranks.count)
    mine = [(m * ranks.count + ranks.mine) * size + i for m in range(micro) for i in range(size)]
    waiting: list[torch.Tensor] = []  # losses still on the device
    for step in range(start, last):
        batch = tuple(x[mine].to(device) for x in cast(config, draw(step, len(mine) * ranks.count)))
        if step == start:
            waiting.append(_counted(config, t, batch, step, record.measured))
        elif step == start + 2:  # DDP lays its buckets out anew in the second
            peak = PeakMeter()
            with peak.watch(device, [*standing(t.module, t.optimizer), *batch]):
                waiting.append(update(config, t, batch, step))
            record.measured.peak_bytes = peak.bytes
        else:
            waiting.append(update(config, t, batch, step))
        done = step + 1
        saving = done % config.checkpoint_every == 0 or done == last
        if saving or done % config.log_every == 0 or step < start + 3:
            found = ranks.mean(torch.stack([x.float() for x in waiting])).tolist()
            clock.stop(len(found))
            log.add(done - len(found), found)
            rate = f", {clock.per_step * 1e3:.1f} ms a step" if clock.per_step else ""
            progress(f"step {done}/{last}  loss {found[-1]:.4f}{rate}")
            waiting.clear()
            if saving:
                saved = checkpoint.save(folder, config, t, done)
            if step > start + 1:  # the first are metered, or compile
                clock.start()
    log.close()
    return _closed(record, ahead, log, clock, folder, saved)


def _counted(config: Config, t: Trainee, batch: samples.Batch, step: int, measured: Figures) -> torch.Tensor:
    """An update whose FLOPs are counted. Compiled code runs past the meter, so there its gradients are counted eagerly
    first, and thrown away: the update that follows is the compiled one, as after a resume."""
    flops = FlopMeter(t.device)
    if config.compile:
        with flops:
            gradients(config, dataclasses.replace(t, run=t.module), batch)
        t.optimizer.zero_grad(set_to_none=True)
        loss = update(config, t, batch, step)
    else:
        loss = update(config, t, batch, step, flops)
    measured.flops, measured.hardware_flops = flops.model * ranks.count, flops.hardware * ranks.count
    return loss


def _closed(record: TrainRecord, ahead: Forecast, log: Log, clock: Clock, folder: Path,
            saved: Path | None) -> TrainRecord:  # fmt: skip
    """The account: what was done, and what a step took."""
    done = max(log.losses, default=-1) + 1
    record.steps, record.tokens, record.out = done, done * record.tokens_per_step, str(folder)
    record.first_loss, record.final_loss = log.losses.get(0), log.losses.get(done - 1)
    record.checkpoint, record.run_seconds = str(saved) if saved else None, clock.age
    if one := clock.per_step:
        record.measured.seconds = one
        record.tokens_per_second = record.tokens_per_step / one
        if ahead.priced is not None:
            record.mfu = ahead.priced.ideal_seconds["model"] / one
            record.mfu_full_square = ahead.priced.ideal_seconds["full_square"] / one
    return record
