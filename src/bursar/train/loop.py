"""The run: forecast, refuse or begin, train, save, close the books."""

from __future__ import annotations

import csv
import importlib.util
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bursar.errors import BadInput, NoAnswer
from bursar.report.train import Figures, TrainRecord
from bursar.train import books, checkpoint, data, parallel
from bursar.train.config import Config
from bursar.train.step import Trainee, make, update

_WINDOW = 20  # steps whose mean loss is compared, for the noise of small batches
_DIVERGED = 3.0  # times the mean of the first window: a language model starts at ln V, and worse than chance is lost

Say = Callable[[str], None]


def train(
    config: Config, name: str, out: Path | None = None, max_steps: int | None = None, *, resume: bool = False,
    dry_run: bool = False, say: Say = lambda text: None,
) -> TrainRecord:  # fmt: skip
    """Run what ``config`` says up to step ``max_steps``, and return the account of it.

    ``out`` is the run's folder; one that holds a run already is left alone for ``out-2`` unless ``resume``. ``say``
    gets each remark. Raises NoAnswer where the step does not fit or the loss diverges, BadInput for what cannot be
    meant, a changed config on resume among it.
    """
    data.check(config)
    device = parallel.device_for(config.device)
    ahead = books.forecast(config, device)
    record = TrainRecord(
        model=config.model, parameters=ahead.ledger.model.parameters, device=_name(device), ranks=parallel.ranks,
        samples_per_step=ahead.ledger.step.samples, tokens_per_step=ahead.ledger.step.tokens,
        forecast=ahead.figures, measured=Figures(), assumptions=list(ahead.notes),
    )  # fmt: skip
    if dry_run:
        return record
    books.refuse_what_does_not_fit(ahead, device)
    with parallel.group(config.layout, device, config.timeout_seconds):
        try:
            return _trained(config, name, out, max_steps or config.steps, resume, say, record, ahead, device)
        except OSError as error:
            raise NoAnswer(f"the run cannot go on: {error}; once that is mended, go on with --resume") from error


def _trained(
    config: Config, name: str, out: Path | None, max_steps: int, resume: bool, say: Say, record: TrainRecord,
    ahead: books.Forecast, device: torch.device,
) -> TrainRecord:  # fmt: skip
    """The run among its ranks. The model is gone when this returns, before the ranks part (see `parallel.group`)."""
    folder = Path(parallel.first(lambda: str(_folder(out, name, resume, say))))
    parallel.first(lambda: data.prepare(config, folder))
    trainee, start = make(config, device), 0
    if resume:
        found, manifest, passed = parallel.first(lambda: checkpoint.newest(folder, config))
        for text in passed:
            say(text)
        if found is None:
            say(f"{folder} holds no checkpoint yet: starting at step 0")
        else:
            start = checkpoint.load(found, manifest, trainee)
    return _Run(config, trainee, folder, start, say).to(min(config.steps, max_steps), record, ahead)


def _name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else str(torch.cuda.get_device_name(device))


def _folder(out: Path | None, name: str, resume: bool, say: Say) -> Path:
    """The run's folder: the one to go on in, or a fresh one."""
    wanted = out or Path("runs") / name
    if resume:
        names = [
            p
            for p in wanted.parent.glob(f"{wanted.name}*")
            if re.fullmatch(rf"{re.escape(wanted.name)}(-\d+)?", p.name)
        ]
        if out is None and names:
            wanted = max(names, key=lambda p: p.stat().st_mtime)
        if not wanted.is_dir():
            raise BadInput(f"no run in {wanted} to resume; leave --resume out, or give its folder with --out")
        return wanted
    folder, n = wanted, 1
    while folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        n += 1
        folder = wanted.with_name(f"{wanted.name}-{n}")
    if folder != wanted:
        say(f"{wanted} holds a run already: this one goes to {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class _Run:
    """The loop's state between steps: losses, clocks, files."""

    def __init__(self, config: Config, trainee: Trainee, folder: Path, start: int, say: Say) -> None:
        self.config, self.trainee, self.folder, self.start, self.say = config, trainee, folder, start, say
        self.losses: dict[int, float] = {}
        self.waiting: list[torch.Tensor] = []  # losses still on the device
        self.steady_steps, self.steady_seconds = 0, 0.0
        self.log = folder / "log.csv"
        if start and self.log.is_file():
            with self.log.open(encoding="utf-8", newline="") as f:
                rows = [r for r in csv.DictReader(f) if r["lr"]]  # a kill may have cut the last line short
                self.losses = {int(r["step"]): float(r["loss"]) for r in rows if int(r["step"]) < start}
        if parallel.rank == 0:
            partial = folder / "log.partial"
            partial.write_text("step,loss,lr\n" + "".join(self._row(s) for s in self.losses), encoding="utf-8")
            os.replace(partial, self.log)
        self.board = _tensorboard(folder) if config.tensorboard and parallel.rank == 0 else None

    def _row(self, step: int) -> str:
        return f"{step},{self.losses[step]!r},{self.config.lr_at(step, self.trainee.peak_lr)!r}\n"

    def to(self, last: int, record: TrainRecord, ahead: books.Forecast) -> TrainRecord:
        """Train up to step ``last`` and fill in the record."""
        config, t, measured, micro = (
            self.config,
            self.trainee,
            record.measured,
            self.config.micro_batches(parallel.ranks),
        )
        draw, size = data.source(config, self.folder), config.batch_size
        mine = [(m * parallel.ranks + parallel.rank) * size + i for m in range(micro) for i in range(size)]
        saved = clock = None
        began = time.perf_counter()
        for step in range(self.start, last):
            batch = tuple(x[mine].to(t.device) for x in data.cast(draw(step, len(mine) * parallel.ranks), config))
            if step == self.start and not config.compile:
                flops = books.FlopMeter(t.device)
                self.waiting.append(update(config, t, batch, step, flops))
                measured.flops, measured.hardware_flops = flops.model * parallel.ranks, flops.hardware * parallel.ranks
            elif step == self.start + 2:  # DDP lays its buckets out anew in the second
                peak = books.PeakMeter()
                with peak.watch(t, batch):
                    self.waiting.append(update(config, t, batch, step))
                measured.peak_bytes = peak.bytes
            else:
                self.waiting.append(update(config, t, batch, step))
            done, saving = step + 1, (step + 1) % config.checkpoint_every == 0 or step + 1 == last
            if saving or done % config.log_every == 0 or step < self.start + 3:
                steps = len(self.waiting)
                self.read(done, last)
                now = time.perf_counter()
                if clock is not None:
                    self.steady_steps, self.steady_seconds = (
                        self.steady_steps + steps,
                        self.steady_seconds + now - clock,
                    )
                if saving:
                    saved = checkpoint.save(self.folder, config, t, done)
                clock = time.perf_counter() if step > self.start + 1 else None
        return self.close(record, ahead, saved, time.perf_counter() - began)

    def read(self, done: int, last: int) -> None:
        """Fetch the losses of the steps up to ``done``, log them. Raises NoAnswer where they are lost."""
        found = parallel.mean(torch.stack([x.float() for x in self.waiting])).tolist()
        first, self.waiting = done - len(found), []
        self.losses.update(enumerate(found, first))
        if parallel.rank == 0:
            with self.log.open("a", encoding="utf-8") as f:
                f.writelines(self._row(s) for s in range(first, done))
            if self.board:
                for s in range(first, done):
                    self.board.add_scalar("loss", self.losses[s], s)
                    self.board.add_scalar("lr", self.config.lr_at(s, self.trainee.peak_lr), s)
            rate = f", {self.steady_seconds / self.steady_steps * 1e3:.1f} ms a step" if self.steady_steps else ""
            progress(f"step {done}/{last}  loss {found[-1]:.4f}{rate}")
        self.check(first, done)

    def check(self, first: int, done: int) -> None:
        """Raise NoAnswer for a loss that is no number, or has grown far above where it began."""
        good = checkpoint.pointer(self.folder) or "none"
        advice = f"; lower lr, warm up longer or set clip. The last good checkpoint is {good}"
        for s in range(first, done):
            if not math.isfinite(self.losses[s]):
                raise NoAnswer(f"the loss of step {s} is {self.losses[s]}, and nothing of it was saved{advice}")
        if done >= 2 * _WINDOW and len(self.losses) >= done:
            begin, now = (sum(self.losses[s] for s in range(a, a + _WINDOW)) / _WINDOW for a in (0, done - _WINDOW))
            if now > _DIVERGED * abs(begin):
                raise NoAnswer(f"diverged: the mean loss of {_WINDOW} steps rose from {begin:.4g} to {now:.4g}{advice}")

    def close(self, record: TrainRecord, ahead: books.Forecast, saved: Path | None, seconds: float) -> TrainRecord:
        """The account: what was done, and what a step took."""
        if self.board:
            self.board.close()
        done = max(self.losses, default=-1) + 1
        record.steps, record.tokens, record.out = done, done * record.tokens_per_step, str(self.folder)
        record.first_loss, record.final_loss = self.losses.get(0), self.losses.get(done - 1)
        latest = checkpoint.pointer(self.folder)
        record.checkpoint = str(saved or (self.folder / latest if latest else "")) or None
        record.run_seconds = seconds
        if self.steady_steps:
            record.measured.seconds = one = self.steady_seconds / self.steady_steps
            record.tokens_per_second = record.tokens_per_step / one
            if ahead.priced is not None:
                record.mfu = ahead.priced.ideal_seconds["model"] / one
                record.mfu_full_square = ahead.priced.ideal_seconds["full_square"] / one
        return record


def progress(text: str) -> None:
    """One line on stderr: rewritten on a terminal, a line each in a pipe."""
    live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    sys.stderr.write(f"\r\x1b[K{text}" if live else f"{text}\n")
    sys.stderr.flush()


def _tensorboard(folder: Path) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))
