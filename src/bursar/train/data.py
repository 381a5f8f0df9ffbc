"""Samples: windows of a memory-mapped token file, or synthetic regression. A batch is a function of (seed, step).

So the position to save for an exact resume is the step number, and ranks take disjoint slices of one global batch.

G samples of the whole step   S sequence   D width in   K width out
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bursar.architecture import Transformer
from bursar.errors import BadInput, MissingExtra
from bursar.train.config import Config

Batch = tuple[Tensor, ...]
_CHUNK = 1 << 24  # bytes of text read at a time


def source(config: Config, out: Path) -> Callable[[int, int], Batch]:
    """``draw(step, G)``: the global batch of a step. Raises BadInput for data that cannot feed the model."""
    shape = config.preset.architecture
    if not isinstance(shape, Transformer):
        return _regression(config)
    tokens, length = np.load(out / "tokens.npy", mmap_mode="r"), config.sequence or 0

    def draw(step: int, samples: int) -> Batch:
        starts = np.random.default_rng([config.seed, step]).integers(0, len(tokens) - length, samples)
        windows = np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64)
        return torch.from_numpy(windows[:, :-1].copy()), torch.from_numpy(windows[:, 1:].copy())

    return draw


def _regression(config: Config) -> Callable[[int, int], Batch]:
    """Gaussian inputs, and targets that a fixed seeded matrix makes of them: a loss that can fall to nearly 0."""
    x, y = config.preset.make_batch(1, None)
    if x.dim() != 2 or not y.is_floating_point():
        raise BadInput(f"{config.model} wants data that the trainer cannot make; it trains on text or on regression")
    d, k = x.shape[1], y.shape[1:].numel()
    matrix = np.random.default_rng([config.seed, 1, 1]).standard_normal((d, k)).astype(np.float32) / d**0.5

    def draw(step: int, samples: int) -> Batch:
        inputs = np.random.default_rng([config.seed, step]).standard_normal((samples, d), dtype=np.float32)
        return torch.from_numpy(inputs), torch.from_numpy(inputs @ matrix).view(samples, *y.shape[1:])

    return draw


def cast(batch: Batch, config: Config) -> Batch:
    """Features in the dtype of the model's weights."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in batch)


def check(config: Config) -> None:
    """Raise BadInput where the text is missing, or given to a model that reads none."""
    reads = isinstance(config.preset.architecture, Transformer)
    if reads and not config.data:
        raise BadInput(f"{config.model} trains on text: give data = 'a text file' in the config")
    if reads and not Path(config.data).is_file():
        raise BadInput(f"no data file {config.data}; config key data names a text file, from the config's own folder")
    if config.data and not reads:
        raise BadInput(f"{config.model} trains on synthetic data; leave data out")


def prepare(config: Config, out: Path) -> None:
    """Make ``tokens.npy`` in the run's folder from the text, once: a resumed run reads what it read before."""
    shape = config.preset.architecture
    if not isinstance(shape, Transformer):
        return
    note, file = out / "tokens.json", out / "tokens.npy"
    if not _whole(note, file):
        check(config)
        parts = _by_bytes(config) if config.tokenizer == "bytes" else _by_bpe(config, shape.vocab_size, out)
        tokens = np.concatenate([*parts, np.empty(0, np.uint8)])
        largest = int(tokens.max(initial=0))
        if largest >= shape.vocab_size:
            raise BadInput(
                f"{config.data} holds token {largest} and {config.model} knows {shape.vocab_size}: its V must be at "
                f"least {largest + 1}" + (" (256 for any bytes)" if config.tokenizer == "bytes" else "")
            )
        partial = out / "tokens.partial"
        with partial.open("wb") as f:
            np.save(f, tokens.astype(np.min_scalar_type(shape.vocab_size - 1)))
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, file)
        note.write_text(json.dumps({"crc32": crc32(file), "tokens": len(tokens)}), encoding="utf-8")
    n, need = json.loads(note.read_text(encoding="utf-8"))["tokens"], (config.sequence or 0) + 1
    if n < need:
        raise BadInput(f"{config.data} gives {n} tokens; one sequence and its targets need {need}: shorten seq_len")


def _whole(note: Path, file: Path) -> bool:
    try:
        return bool(json.loads(note.read_text(encoding="utf-8"))["crc32"] == crc32(file))
    except (OSError, ValueError, KeyError):
        return False


def crc32(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with path.open("rb") as f:
        while chunk := f.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def _by_bytes(config: Config) -> Iterator[np.ndarray]:
    with Path(config.data).open("rb") as f:
        while chunk := f.read(_CHUNK):
            yield np.frombuffer(chunk, np.uint8)


def _by_bpe(config: Config, vocab_size: int, out: Path) -> Iterator[np.ndarray]:
    """Byte-level pairs (Sennrich et al. 2016; Radford et al. 2019) trained on this very text, kept in the folder."""
    try:
        from tokenizers import ByteLevelBPETokenizer
    except ImportError:
        raise MissingExtra("train", "tokenizer = 'bpe' trains one with the tokenizers library") from None
    if vocab_size < 256:
        raise BadInput(f"a byte-level BPE begins with 256 tokens; {config.model} knows {vocab_size}")
    made = ByteLevelBPETokenizer()
    made.train([config.data], vocab_size=vocab_size, show_progress=False)
    made.save(str(out / "tokenizer.json"))
    with Path(config.data).open(encoding="utf-8", newline="") as f:
        while lines := f.readlines(_CHUNK):
            yield np.array([i for e in made.encode_batch(lines) for i in e.ids], np.uint32)
