"""Checkpoints through `torch.distributed.checkpoint`: a folder that is there is whole (see `bursar.files`).

.saving-00000020/   written, hashed and fsynced here, then renamed to
step-00000020/      shards and manifest.json: format, step, config, each file's size and CRC-32
latest              the name of the newest, replaced in one go
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.distributed.checkpoint import filesystem, state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from bursar import files, ranks
from bursar.errors import BadInput, NoAnswer
from bursar.train.config import Config, differing
from bursar.train.step import Trainee

FORMAT = "bursar-checkpoint-1"


def save(folder: Path, config: Config, trainee: Trainee, step: int) -> Path:
    """Write the state before step ``step``. Raises NoAnswer where the disk refuses; the older ones stay as they are."""
    aside, final = folder / f".saving-{step:08d}", folder / f"step-{step:08d}"
    held = (p.to_local() if hasattr(p, "to_local") else p for p in trainee.module.parameters())
    finite = torch.tensor(float(all(bool(p.isfinite().all()) for p in held)))
    if ranks.mean(finite.to(trainee.device)) < 1:
        raise NoAnswer(f"step {step}: a parameter is not finite, so nothing was saved; lower lr, or set clip")
    scaler = trainee.scaler.state_dict() if trainee.scaler else None
    about = {"format": FORMAT, "step": step, "ranks": ranks.count, "config": msgspec.to_builtins(config),
             "scaler": scaler, "torch": str(torch.__version__)}  # fmt: skip
    try:
        ranks.first(lambda: files.empty(aside))
        writer = filesystem.FileSystemWriter(aside)
        with ranks.alone():
            state_dict_saver.save(_state(trainee), storage_writer=writer, no_dist=ranks.count == 1)
        ranks.first(lambda: files.seal(aside, final, about, config.keep))
    except (CheckpointException, OSError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        why = next((e for e, _ in error.failures.values()), error) if isinstance(error, CheckpointException) else error
        good = files.latest(folder) or "none"
        raise NoAnswer(f"cannot save {final}: {why}; the last good checkpoint is {good}") from error
    return final


def newest(folder: Path, config: Config) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest good checkpoint, its manifest, and what was passed over and why.

    ``(None, {}, [])`` where there is none yet. Raises BadInput where all are bad, or the config has changed.
    """
    path, manifest, passed = files.newest(folder, "step", FORMAT)
    if path is None and passed:
        raise BadInput(f"no good checkpoint to resume: {'; '.join(passed)}")
    if path and (changed := differing(config, manifest["config"])):
        raise BadInput(f"{path} was trained with another config: {'; '.join(changed)}. Start anew without --resume")
    return path, manifest, [f"{bad}; going on from {path.name}" for bad in passed if path]


def load(path: Path, manifest: dict[str, Any], trainee: Trainee) -> int:
    """Put a verified checkpoint into the trainee; the step to go on with."""
    state = _state(trainee)
    if manifest["ranks"] != ranks.count:  # each rank's random state is its own
        state = {key: state[key] for key in ("model", "optimizer")}
    with ranks.alone():
        state_dict_loader.load(state, storage_reader=filesystem.FileSystemReader(path), no_dist=ranks.count == 1)
    model, optimizer = state["model"], state["optimizer"]
    set_state_dict(trainee.module, trainee.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    if trainee.scaler:
        trainee.scaler.load_state_dict(manifest["scaler"])
    if key := next((k for k in state if k.startswith("random")), None):
        torch.set_rng_state(state[key])
    return int(manifest["step"])


def _state(trainee: Trainee) -> dict[str, Any]:
    model, optimizer = get_state_dict(trainee.module, trainee.optimizer)
    return {"model": model, "optimizer": optimizer, f"random.{ranks.mine}": torch.get_rng_state()}
