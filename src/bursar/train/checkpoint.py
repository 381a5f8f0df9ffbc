"""Checkpoints through `torch.distributed.checkpoint`: a folder that is there is whole.

.saving-00000020/   written, hashed and fsynced here, then renamed to
step-00000020/      shards and manifest.json: format, step, config, each file's size and CRC-32
latest              the name of the newest, replaced in one go
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.distributed.checkpoint import filesystem, state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from bursar.errors import BadInput, NoAnswer
from bursar.train import parallel
from bursar.train.config import Config, differing
from bursar.train.data import crc32
from bursar.train.step import Trainee

FORMAT = "bursar-checkpoint-1"


def save(folder: Path, config: Config, trainee: Trainee, step: int) -> Path:
    """Write the state before step ``step``. Raises NoAnswer where the disk refuses; the older ones stay as they are."""
    temporary, final = folder / f".saving-{step:08d}", folder / f"step-{step:08d}"
    finite = torch.tensor(float(all(bool(_local(p).isfinite().all()) for p in trainee.module.parameters())))
    if parallel.mean(finite.to(trainee.device)) < 1:
        raise NoAnswer(f"step {step}: a parameter is not finite, so nothing was saved; lower lr, or set clip")
    try:
        parallel.first(lambda: _empty(temporary))
        with _alone():
            state_dict_saver.save(
                _state(trainee), storage_writer=filesystem.FileSystemWriter(temporary), no_dist=parallel.ranks == 1
            )
        parallel.first(lambda: _seal(temporary, final, config, trainee, step))
    except (CheckpointException, OSError) as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary)
        why = next((e for e, _ in error.failures.values()), error) if isinstance(error, CheckpointException) else error
        raise NoAnswer(
            f"cannot save {final}: {why}; the last good checkpoint is {pointer(folder) or 'none'}"
        ) from error
    return final


def _empty(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _seal(temporary: Path, final: Path, config: Config, trainee: Trainee, step: int) -> None:
    manifest = {
        "format": FORMAT,
        "step": step,
        "ranks": parallel.ranks,
        "config": msgspec.to_builtins(config),
        "scaler": trainee.scaler.state_dict() if trainee.scaler else None,
        "torch": str(torch.__version__),
        "files": {p.name: [p.stat().st_size, crc32(p)] for p in sorted(temporary.iterdir())},
    }
    _write(temporary / "manifest.json", json.dumps(manifest, indent=1))
    _sync(temporary)
    folder = final.parent
    _drop(final)  # a corrupt one that was passed over
    os.rename(temporary, final)
    _write(folder / "latest.new", final.name)
    os.replace(folder / "latest.new", folder / "latest")
    _sync(folder)
    kept = [p for p in _all(folder) if p.name <= final.name][: config.keep]
    for old in set(_all(folder)) - set(kept):
        _drop(old)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _drop(checkpoint: Path) -> None:
    if checkpoint.exists():
        gone = checkpoint.with_name(f".dropped-{checkpoint.name}")  # half deleted, it must not look like one
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(checkpoint, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)


def pointer(folder: Path) -> str:
    """The name of the newest checkpoint; empty where there is none."""
    with contextlib.suppress(OSError):
        return (folder / "latest").read_text(encoding="utf-8").strip()
    return ""


def newest(folder: Path, config: Config) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest good checkpoint, its manifest, and what was passed over and why.

    ``(None, {}, [])`` where there is none yet. Raises BadInput where all are bad, or the config has changed.
    """
    for litter in (*folder.glob(".saving-*"), *folder.glob(".dropped-*")):
        shutil.rmtree(litter, ignore_errors=True)
    first, passed = pointer(folder), list[str]()
    for path in sorted(_all(folder), key=lambda p: p.name != first):  # stable: the rest stay newest first
        try:
            manifest = verify(path)
        except BadInput as error:
            passed.append(str(error))
            continue
        if changed := differing(config, manifest["config"]):
            raise BadInput(f"{path} was trained with another config: {'; '.join(changed)}. Start anew without --resume")
        return path, manifest, [f"{bad}; going on from {path.name}" for bad in passed]
    if passed:
        raise BadInput(f"no good checkpoint to resume: {'; '.join(passed)}")
    return None, {}, []


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file is as it was written. Raises BadInput saying which is not."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        files = dict(manifest["files"]) if manifest["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        files = {}
    if not files:
        raise BadInput(f"{path} is no checkpoint of bursar train (no manifest.json of format {FORMAT})")
    for name, (size, crc) in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size or crc32(file) != crc:
            raise BadInput(f"{path} is corrupt: {name} is missing or not as it was written")
    return dict(manifest)


def load(path: Path, manifest: dict[str, Any], trainee: Trainee) -> int:
    """Put a verified checkpoint into the trainee; the step to go on with."""
    state = _state(trainee)
    if manifest["ranks"] != parallel.ranks:  # each rank's random state is its own
        state = {key: state[key] for key in ("model", "optimizer")}
    with _alone():
        state_dict_loader.load(state, storage_reader=filesystem.FileSystemReader(path), no_dist=parallel.ranks == 1)
    set_state_dict(
        trainee.module, trainee.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    if trainee.scaler:
        trainee.scaler.load_state_dict(manifest["scaler"])
    if key := next((k for k in state if k.startswith("random")), None):
        torch.set_rng_state(state[key])
    return int(manifest["step"])


def _state(trainee: Trainee) -> dict[str, Any]:
    model, optimizer = get_state_dict(trainee.module, trainee.optimizer)
    return {"model": model, "optimizer": optimizer, f"random.{parallel.rank}": torch.get_rng_state()}


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One process is no mistake, and needs no warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
