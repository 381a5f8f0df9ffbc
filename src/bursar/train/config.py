"""What a training run is told: one TOML file, decoded strictly."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from bursar.errors import BadInput, UnknownName
from bursar.workload import optimizers, presets

_Count = Annotated[int, msgspec.Meta(ge=1)]
_Positive = Annotated[float, msgspec.Meta(gt=0)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
FREE_TO_CHANGE = {"log_every", "checkpoint_every", "keep", "tensorboard", "timeout_seconds"}  # they change no number
_WHOLE = {"adafactor", "lamb"}  # not under FSDP2 (torch 2.13, pytorch-optimizer 4.1)


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run. Samples of a step = batch_size · accumulate · ranks, for the whole job."""

    model: str  # a preset: "gpt2:L=2,d=128,h=4,V=256,T=128", "cruncher", "mlp"
    steps: _Count
    batch_size: _Count  # the micro-batch of one rank, in samples
    data: str = ""  # a text file, from the config's own folder; empty for regression on synthetic data
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    seq_len: _Count | None = None  # None: the model's longest, at most 1024
    accumulate: _Count | None = None  # micro-batches per rank and step; None: 1, or what global_batch_size asks for
    global_batch_size: _Count | None = None  # samples of a step over all ranks, the same whatever their number
    precision: Literal["fp32", "bf16", "bf16-mixed", "fp16-mixed"] = "fp32"
    optimizer: str = ""  # empty: the preset's
    lr: _Positive | None = None  # None: the optimizer's
    weight_decay: Annotated[float, msgspec.Meta(ge=0)] | None = None
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: Annotated[int, msgspec.Meta(ge=0)] = 0
    final_lr_share: _Share = 0.1  # of lr, where the cosine ends
    clip: _Positive | None = None  # the gradient's largest norm
    recompute: str = "none"  # none, full, or every-2: one block in two is checkpointed
    compile: bool = False
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    layout: Literal["single", "ddp", "fsdp"] = "single"
    timeout_seconds: _Positive = 600.0  # how long a rank waits for another
    checkpoint_every: _Count = 100
    keep: _Count = 2
    log_every: _Count = 10
    tensorboard: bool = True  # where it is installed

    @property
    def preset(self) -> presets.Preset:
        """The model, ready to be made."""
        return presets.build(self.model)

    @property
    def text(self) -> Path | None:
        """The text to train on; None for synthetic data."""
        return Path(self.data) if self.data else None

    @property
    def optimizer_name(self) -> str:
        """The optimizer asked for, else the preset's."""
        return self.optimizer or self.preset.default_optimizer

    @property
    def sequence(self) -> int | None:
        """Tokens per sample; None for a model without a sequence."""
        return self.seq_len or self.preset.default_seq_len

    @property
    def recompute_every(self) -> int:
        """One block in this many is checkpointed; 0: none."""
        return {"none": 0, "full": 1}.get(self.recompute) or int(self.recompute.partition("-")[2] or 0)

    def micro_batches(self, ranks: int) -> int:
        """Micro-batches of one rank in one step. Raises BadInput where the global batch does not divide."""
        if self.global_batch_size is None:
            return self.accumulate or 1
        micro, rest = divmod(self.global_batch_size, self.batch_size * ranks)
        if rest or self.accumulate not in (None, micro):
            raise BadInput(
                f"global_batch_size = {self.global_batch_size} is not batch_size {self.batch_size} × {ranks} ranks × "
                f"{self.accumulate or 'a whole number of micro-batches'}; change one of them"
            )
        return micro

    def lr_at(self, step: int, peak: float) -> float:
        """The learning rate of step ``step`` (from 0): linear warm-up, then constant or a cosine (Loshchilov 2016)."""
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return peak
        done = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        share = self.final_lr_share + (1 - self.final_lr_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return peak * share


def read(path: Path) -> Config:
    """The config in a TOML file, its ``data`` made absolute. Raises BadInput naming the key and the nearest known."""
    if not path.is_file():
        raise BadInput(f"no config {path}; bursar train takes a TOML file with at least model, steps and batch_size")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is no TOML: {error}") from None
    return decode(table, path.parent)


def decode(table: dict[str, Any], folder: Path) -> Config:
    """The config a table means; relative ``data`` is looked for in ``folder``."""
    for key in table:
        if key not in Config.__struct_fields__:
            raise BadInput(str(UnknownName("config key", key, Config.__struct_fields__)))
    try:
        config = msgspec.convert(table, Config)
    except msgspec.ValidationError as error:
        said, _, key = str(error).partition(" - at `$.")
        raise BadInput(f"config key {key.rstrip('`')}: {said}" if key else f"config: {said}") from None
    if not re.fullmatch(r"none|full|every-[1-9]\d*", config.recompute):
        raise BadInput(f"config key recompute: none, full or every-2 (one block in two), not {config.recompute!r}")
    if config.optimizer_name not in optimizers.OPTIMIZERS:
        raise BadInput(f"config key optimizer: {UnknownName('optimizer', config.optimizer, optimizers.OPTIMIZERS)}")
    if config.seq_len is not None and config.preset.default_seq_len is None:
        raise BadInput(f"config key seq_len: {config.model} has no sequence")
    if config.layout == "fsdp" and config.optimizer_name in _WHOLE:
        raise BadInput(f"{config.optimizer_name} changes a norm over all shards in place, which DTensor refuses: "
                       "take layout = 'ddp', or another optimizer")  # fmt: skip
    return msgspec.structs.replace(config, data=str((folder / config.data).resolve()) if config.data else "")


def differing(now: Config, before: dict[str, Any]) -> list[str]:
    """``key = new (was old)`` for each key that changes what is computed."""
    table = msgspec.to_builtins(now)
    return [
        f"{key} = {table.get(key)!r} (was {before.get(key)!r})"
        for key in sorted({*table, *before} - FREE_TO_CHANGE)
        if table.get(key) != before.get(key)
    ]
