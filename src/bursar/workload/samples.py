"""Real samples for a preset: windows of a memory-mapped token file, or synthetic regression.

A batch is a function of (seed, step): the position to save for an exact resume is the step number, and ranks take
disjoint slices of one global batch.

G samples of the whole step   S sequence   D width in   K width out
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bursar.architecture import Transformer
from bursar.errors import BadInput
from bursar.workload.presets import Preset
from bursar.workload.text import tokenise

Batch = tuple[Tensor, ...]
Draw = Callable[[int, int], Batch]  # draw(step, G): the global batch of a step


def check(preset: Preset, text: Path | None) -> None:
    """Raise BadInput where the text is missing or given to a model that reads none, or nothing here can feed it."""
    reads = isinstance(preset.architecture, Transformer)
    if reads and text is None:
        raise BadInput(f"{preset.name} trains on text: give data = 'a text file' in the config")
    if reads and text is not None and not text.is_file():
        raise BadInput(f"no data file {text}; config key data names a text file, from the config's own folder")
    if text is not None and not reads:
        raise BadInput(f"{preset.name} trains on synthetic data; leave data out")
    if not reads:
        x, y = preset.make_batch(1, None)
        if x.dim() != 2 or not y.is_floating_point():
            raise BadInput(f"{preset.name} wants data that nothing here makes; there is text, and regression")


def prepare(preset: Preset, text: Path | None, tokenizer: str, length: int | None, folder: Path) -> None:
    """Make the token file of ``text`` in ``folder``, once: a resumed run reads what it read before. Raises BadInput."""
    if text is not None and isinstance(preset.architecture, Transformer) and length is not None:
        n = tokenise(text, tokenizer, preset.architecture.vocab_size, folder)
        if n <= length:
            raise BadInput(f"{text} gives {n} tokens; one sequence and its targets need {length + 1}: shorten seq_len")


def source(preset: Preset, seed: int, length: int | None, folder: Path) -> Draw:
    """What draws the batches of a run: from the tokens in its folder, or synthetic."""
    return regression(preset, seed) if length is None else from_tokens(folder / "tokens.npy", seed, length)


def from_tokens(tokens: Path, seed: int, length: int) -> Draw:
    """Windows of ``length`` tokens at random places, (G, S), and the same one token on."""
    read = np.load(tokens, mmap_mode="r")

    def draw(step: int, samples: int) -> Batch:
        starts = np.random.default_rng([seed, step]).integers(0, len(read) - length, samples)
        windows = np.stack([read[s : s + length + 1] for s in starts]).astype(np.int64)
        return torch.from_numpy(windows[:, :-1].copy()), torch.from_numpy(windows[:, 1:].copy())

    return draw


def regression(preset: Preset, seed: int) -> Draw:
    """Gaussian inputs (G, D), and targets that a fixed seeded matrix (D, K) makes of them: the loss can fall to 0."""
    x, y = preset.make_batch(1, None)
    d, k = x.shape[1], y.shape[1:].numel()
    matrix = np.random.default_rng([seed, 1, 1]).standard_normal((d, k)).astype(np.float32) / d**0.5

    def draw(step: int, samples: int) -> Batch:
        inputs = np.random.default_rng([seed, step]).standard_normal((samples, d), dtype=np.float32)
        return torch.from_numpy(inputs), torch.from_numpy(inputs @ matrix).view(samples, *y.shape[1:])

    return draw
