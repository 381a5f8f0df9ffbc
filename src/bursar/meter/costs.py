"""What a step costs, as few numbers as a meter needs: kept with the user's caches, so that a model is traced once."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import platformdirs
import torch
from torch import nn

import bursar
from bursar import files
from bursar.ledger import Ledger
from bursar.rules import MODEL_KINDS
from bursar.workload.resolve import tensors_in


class Costs(msgspec.Struct, frozen=True):
    """One optimizer step of one rank. FLOPs by the dtype they are computed in; bytes are the peak's."""

    name: str
    samples: int
    tokens: int
    micro_batches: int
    model_flops: Mapping[str, int]
    hardware_flops: Mapping[str, int]
    peak_bytes: int
    uncounted: tuple[str, ...] = ()

    @classmethod
    def of(cls, ledger: Ledger) -> Costs:
        """Those of ``ledger``'s step."""
        model: dict[str, int] = {}
        hardware: dict[str, int] = {}
        for row in ledger.recorded:
            if row.kind in MODEL_KINDS and row.phase != "optimizer" and row.work.flops:
                hardware[row.dtype] = hardware.get(row.dtype, 0) + row.work.flops + row.work.recompute_flops
                if row.phase != "recompute":
                    model[row.dtype] = model.get(row.dtype, 0) + row.work.flops
        step, ranks = ledger.step, ledger.replicas
        return cls(
            ledger.model.name,
            step.samples // ranks,
            step.tokens // ranks,
            step.micro_batches,
            model,
            hardware,
            ledger.memory.peak_bytes,
            tuple(u.op for u in ledger.uncounted),
        )


def of_model(model: nn.Module, batch: Any, **options: Any) -> Costs:
    """The costs of a step of ``model`` on ``batch``, ``options`` as `bursar.step` takes them.

    Traced the first time; a model of the same code, shapes and options is remembered. A remembered file that cannot be
    read is traced again. Raises what `bursar.step` raises.
    """
    kept = folder() / f"{_key(model, batch, options)}.json"
    try:
        return msgspec.json.decode(kept.read_bytes(), type=Costs)
    except (OSError, msgspec.DecodeError):
        pass
    found = Costs.of(bursar.step(model, batch, **options))
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        files.write(kept, msgspec.json.encode(found).decode())
    except OSError:
        return found  # a cache that cannot be written costs a trace next time, and no run
    return found


def folder() -> Path:
    """Where costs are kept."""
    return Path(platformdirs.user_cache_dir("bursar")) / "costs"


def _key(model: nn.Module, batch: Any, options: Mapping[str, Any]) -> str:
    """Equal where the step is: the modules' code and settings, the tensors' shapes, the options, the versions."""
    parts: list[object] = [bursar.__version__, torch.__version__, type(model).__qualname__, model.training, repr(model)]
    for kind in sorted({type(m) for m in model.modules()}, key=lambda k: f"{k.__module__}.{k.__qualname__}"):
        try:
            parts.append(inspect.getsource(kind))
        except (OSError, TypeError):  # typed at a prompt: by name only
            parts.append(f"{kind.__module__}.{kind.__qualname__}")
    for name, module in model.named_modules():
        settings = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str, bool))}
        parts.append((name, sorted(settings.items())))
    parts += [(n, tuple(p.shape), str(p.dtype), p.requires_grad) for n, p in model.named_parameters()]
    parts += [(tuple(t.shape), str(t.dtype)) for t in tensors_in(batch)]
    parts.append(sorted((k, repr(v)) for k, v in options.items()))
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()[:32]
