"""A user's text as a file of tokens, made once: ``tokens.npy`` and beside it ``tokens.json`` with its checksum."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bursar import files
from bursar.errors import BadInput, MissingExtra

_CHUNK = 1 << 24  # bytes of text read at a time


def tokenise(text: Path, tokenizer: str, vocab_size: int, out: Path) -> int:
    """Make the token file of ``text`` in the folder ``out``, where it is not there yet; the number of its tokens.

    ``tokenizer`` is ``bytes``, or ``bpe`` for a byte-level one trained on this very text. Raises BadInput for a token
    that a vocabulary of ``vocab_size`` does not hold, MissingExtra where the library tokenizers is missing.
    """
    note, file = out / "tokens.json", out / "tokens.npy"
    if not _whole(note, file):
        parts = _by_bytes(text) if tokenizer == "bytes" else _by_bpe(text, vocab_size, out)
        tokens = np.concatenate([*parts, np.empty(0, np.uint8)])
        largest = int(tokens.max(initial=0))
        if largest >= vocab_size:
            raise BadInput(
                f"{text} holds token {largest} and the model knows {vocab_size}: its V must be at least {largest + 1}"
                + (" (256 for any bytes)" if tokenizer == "bytes" else "")
            )
        aside = out / "tokens.new"
        with aside.open("wb") as f:
            np.save(f, tokens.astype(np.min_scalar_type(vocab_size - 1)))
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, file)
        files.write(note, json.dumps({"crc32": files.crc32(file), "tokens": len(tokens)}))
    return int(json.loads(note.read_text(encoding="utf-8"))["tokens"])


def _whole(note: Path, file: Path) -> bool:
    try:
        return bool(json.loads(note.read_text(encoding="utf-8"))["crc32"] == files.crc32(file))
    except (OSError, ValueError, KeyError):
        return False


def _by_bytes(text: Path) -> Iterator[np.ndarray]:
    with text.open("rb") as f:
        while chunk := f.read(_CHUNK):
            yield np.frombuffer(chunk, np.uint8)


def _by_bpe(text: Path, vocab_size: int, out: Path) -> Iterator[np.ndarray]:
    """Byte-level pairs (Sennrich et al. 2016; Radford et al. 2019); the tokenizer is kept beside the tokens."""
    try:
        from tokenizers import ByteLevelBPETokenizer
    except ImportError:
        raise MissingExtra("train", "tokenizer = 'bpe' trains one with the tokenizers library") from None
    if vocab_size < 256:
        raise BadInput(f"a byte-level BPE begins with 256 tokens; the model knows {vocab_size}")
    try:
        with text.open(encoding="utf-8") as f:
            while f.read(_CHUNK):
                pass
    except UnicodeDecodeError as error:
        raise BadInput(f"{text} is no UTF-8 text ({error.reason}); tokenizer = 'bytes' takes any file") from None
    made = ByteLevelBPETokenizer()
    made.train([str(text)], vocab_size=vocab_size, show_progress=False)
    made.save(str(out / "tokenizer.json"))
    with text.open(encoding="utf-8", newline="") as f:
        while lines := f.readlines(_CHUNK):
            yield np.array([i for e in made.encode_batch(lines) for i in e.ids], np.uint32)
