"""Files that are whole or not there: written aside, on the disk before their name is, and known by a checksum.

A folder is sealed: its ``manifest.json`` names each file with size and CRC-32, and the folder gets its name last.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

from bursar.errors import BadInput

_CHUNK = 1 << 24  # bytes read at a time
_MANIFEST = "manifest.json"


def crc32(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with path.open("rb") as f:
        while chunk := f.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def write(path: Path, text: str) -> None:
    """``text`` as the file ``path``, which is the old one until all of it is on the disk."""
    aside = path.with_name(f"{path.name}.new")
    with aside.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, path)
    sync(path.parent)


def sync(folder: Path) -> None:
    """Have the disk know the names in ``folder``."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def seal(folder: Path, final: Path, about: dict[str, Any], keep: int) -> None:
    """Write the manifest of what is in ``folder``, ``about`` in it, name it ``final``, and point ``latest`` to it.

    Of the folders named as ``final`` up to its first dash, the ``keep`` newest stay, and none that comes after it.
    """
    files = {p.name: [p.stat().st_size, crc32(p)] for p in sorted(folder.iterdir())}
    write(folder / _MANIFEST, json.dumps({**about, "files": files}, indent=1))
    drop(final)  # a corrupt one that was passed over
    os.rename(folder, final)
    write(final.parent / "latest", final.name)
    alike = _alike(final.parent, final.name.partition("-")[0])
    kept = [p for p in alike if p.name <= final.name][:keep]
    for old in set(alike) - set(kept):
        drop(old)


def latest(parent: Path) -> str:
    """The name of the folder sealed last; empty where there is none."""
    with contextlib.suppress(OSError):
        return (parent / "latest").read_text(encoding="utf-8").strip()
    return ""


def newest(parent: Path, prefix: str, form: str) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest whole folder ``prefix-…``, its manifest, and what was passed over and why; None where there is none.

    Sweeps away what a killed process left half done.
    """
    for litter in (*parent.glob(".saving-*"), *parent.glob(".dropped-*")):
        shutil.rmtree(litter, ignore_errors=True)
    first, passed = latest(parent), list[str]()
    for path in sorted(_alike(parent, prefix), key=lambda p: p.name != first):  # stable: the rest stay newest first
        try:
            return path, manifest(path, form), passed
        except BadInput as error:
            passed.append(str(error))
    return None, {}, passed


def _alike(parent: Path, prefix: str) -> list[Path]:
    return sorted(parent.glob(f"{prefix}-*"), reverse=True)


def manifest(folder: Path, form: str) -> dict[str, Any]:
    """The manifest, of format ``form``, of a folder whose every file is as it was sealed. Raises BadInput saying which
    is not."""
    try:
        found: dict[str, Any] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        files = dict(found["files"]) if found["format"] == form else {}
    except (OSError, ValueError, KeyError, TypeError):
        files = {}
    if not files:
        raise BadInput(f"{folder} has no {_MANIFEST} of format {form}")
    for name, (size, crc) in files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size or crc32(file) != crc:
            raise BadInput(f"{folder} is corrupt: {name} is missing or not as it was written")
    return found


def empty(folder: Path) -> None:
    """Make ``folder``, and nothing in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def drop(folder: Path) -> None:
    """Delete a folder; half deleted it has another name, ``.dropped-…``."""
    if folder.exists():
        gone = folder.with_name(f".dropped-{folder.name}")
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def fresh(wanted: Path) -> Path:
    """An empty folder: ``wanted``, or where that holds something ``wanted-2``, and so on."""
    folder, n = wanted, 1
    while folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        n += 1
        folder = wanted.with_name(f"{wanted.name}-{n}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
