"""What the reference trainer adds to a hand-written loop, on the CPU: the two take turns, step by step, in one process.

    python benchmarks/train_overhead.py [runs]

Both do the same steps on the same batches of equal models; all of the trainer's book-keeping between two updates is on
its clock. The first steps, in which FLOPs and memory are metered, and the one checkpoint at the end are left out: they
do not grow with the run. The clock is the process's CPU time in one thread, and each step is compared with its
neighbour, for on a shared machine the speed of both drifts by far more than what is measured.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from bursar.train import config, loop
from bursar.train.step import make
from bursar.workload import samples

STEPS, SKIPPED = 100, 5
TABLE = {"model": "gpt2:L=2,d=128,h=4,V=256,T=128", "data": "text.txt", "seq_len": 64, "steps": STEPS, "batch_size": 16,
         "lr": 1e-3, "clip": 1.0, "tensorboard": False, "device": "cpu", "checkpoint_every": STEPS}  # fmt: skip
clock = time.process_time


class ByHand:
    """The least loop that does the same: draw, forward, backward, clip, step; the loss is read every ten steps."""

    def __init__(self, made: config.Config, folder: Path) -> None:
        trainee = make(made, torch.device("cpu"))
        self.made, self.draw, self.kept = made, samples.source(made.preset, made.seed, made.sequence, folder), []
        self.model, self.optimizer = trainee.module, trainee.optimizer

    def step(self, step: int) -> float:
        """One step; its seconds."""
        began = clock()
        for group in self.optimizer.param_groups:
            group["lr"] = self.made.lr_at(step, 1e-3)
        x, y = self.draw(step, 16)
        loss = self.model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.kept.append(loss.detach())
        if step % 10 == 9:
            torch.stack(self.kept).tolist()
            self.kept.clear()
        return clock() - began


def pairs(made: config.Config, folder: Path) -> list[tuple[float, float]]:
    """(trainer, by hand) seconds of each step of one run."""
    hand, trainer, by_hand, plain, left = ByHand(made, folder), [], [], loop.update, [0.0]

    def update(*args, **kwargs):
        trainer.append(clock() - left[0])
        by_hand.append(hand.step(args[3]))
        left[0] = clock()
        return plain(*args, **kwargs)

    loop.update = update
    try:
        loop.train(made, "run", folder / "run")
    finally:
        loop.update = plain
    # What the trainer did between two updates, the first of them included, belongs to the first
    return list(zip(trainer[1:], by_hand[:-1], strict=True))[SKIPPED:]


def main() -> None:
    """Print one line a run, and the summary."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    torch.set_num_threads(1)
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        folder, made = Path(name), config.decode(TABLE, Path(__file__).parent.parent / "examples")
        samples.prepare(made.preset, made.text, made.tokenizer, made.sequence, folder)
        for run in range(runs):
            found = pairs(made, folder)
            ratios.append(statistics.median(a / b for a, b in found))
            one, other = (statistics.median(times) * 1e3 for times in zip(*found, strict=True))
            print(f"run {run}: trainer {one:.2f} ms, by hand {other:.2f} ms; {ratios[-1] - 1:+.2%}, {len(found)} pairs")
    print(f"overhead {statistics.median(ratios) - 1:+.2%} ({min(ratios) - 1:+.2%} … {max(ratios) - 1:+.2%}), "
          f"torch {torch.__version__}, one thread")  # fmt: skip


if __name__ == "__main__":
    main()
