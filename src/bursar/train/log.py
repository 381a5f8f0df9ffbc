"""The losses of a run: log.csv, TensorBoard; and the word to stop where they are lost."""

from __future__ import annotations

import csv
import importlib.util
import math
from pathlib import Path
from typing import Any

from bursar import files, ranks
from bursar.errors import NoAnswer
from bursar.train.config import Config

_WINDOW = 20  # steps whose mean loss is compared, for the noise of small batches
_DIVERGED = 3.0  # times the mean of the first window: a language model starts at ln V, and worse than chance is lost


class Log:
    """``losses`` by step, those before a resume included; rank 0 writes them down."""

    def __init__(self, config: Config, folder: Path, start: int, peak_lr: float) -> None:
        self.config, self.folder, self.peak_lr, self.losses = config, folder, peak_lr, dict[int, float]()
        self.file = folder / "log.csv"
        self.board: Any = _tensorboard(folder) if config.tensorboard and ranks.mine == 0 else None
        if start and self.file.is_file():
            with self.file.open(encoding="utf-8", newline="") as f:
                rows = [r for r in csv.DictReader(f) if r["lr"]]  # a kill may have cut the last line short
            self.losses = {int(r["step"]): float(r["loss"]) for r in rows if int(r["step"]) < start}
        if ranks.mine == 0:
            files.write(self.file, "step,loss,lr\n" + "".join(map(self._row, self.losses)))

    def _row(self, step: int) -> str:
        return f"{step},{self.losses[step]!r},{self.config.lr_at(step, self.peak_lr)!r}\n"

    def add(self, first: int, found: list[float]) -> None:
        """Write down the losses of the steps from ``first`` on. Raises NoAnswer for one that is lost."""
        self.losses.update(enumerate(found, first))
        if ranks.mine == 0:
            with self.file.open("a", encoding="utf-8") as f:
                f.writelines(map(self._row, range(first, first + len(found))))
            for step in range(first, first + len(found)) if self.board else ():
                self.board.add_scalar("loss", self.losses[step], step)
                self.board.add_scalar("lr", self.config.lr_at(step, self.peak_lr), step)
        self._check(first, first + len(found))

    def _check(self, first: int, done: int) -> None:
        """Raise NoAnswer for a loss that is no number, or has grown far above where it began."""
        good = files.latest(self.folder) or "none"
        advice = f"; lower lr, warm up longer or set clip. The last good checkpoint is {good}"
        for step in range(first, done):
            if not math.isfinite(self.losses[step]):
                raise NoAnswer(f"the loss of step {step} is {self.losses[step]}, and nothing of it was saved{advice}")
        if done >= 2 * _WINDOW and len(self.losses) >= done:
            begin, now = (sum(self.losses[s] for s in range(a, a + _WINDOW)) / _WINDOW for a in (0, done - _WINDOW))
            if now > _DIVERGED * abs(begin):
                raise NoAnswer(f"diverged: the mean loss of {_WINDOW} steps rose from {begin:.4g} to {now:.4g}{advice}")

    def close(self) -> None:
        """Flush TensorBoard's file."""
        if self.board:
            self.board.close()


def _tensorboard(folder: Path) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))
