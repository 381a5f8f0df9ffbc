"""Records what a real CUDA device does in one training step, so that the fake accelerator can be held against it.

    python benchmarks/cuda_fixtures.py            on a machine with CUDA, from the root of the repository

Needs torch alone (2.11 or later); bursar itself need not be installed. For each case it runs the reference model's
step three times to warm up and writes, into benchmarks/fixtures/GPU-torchVERSION.json: the ops in order with the dtype
they compute in, the bytes autograd saves, the allocated and reserved peaks, and the step's seconds. The tests compare
the fake accelerator with every file in that folder.
"""

from __future__ import annotations

import datetime
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from reference_models import CASES, build  # noqa: E402  (the tests' models, by path)

FIXTURES = Path(__file__).resolve().parent / "fixtures"
RECORDED = ("mlp/adamw/fp32", "mlp/sgd/fp32", "conv/adamw/fp32", "gpt/adamw/fp32", "gpt/adamw/bf16ac",
            "gpt_math/adamw/fp32", "gpt_drop/adamw/bf16ac", "llama/adamw/bf16ac", "gpt/adamw/ckpt",
            "gpt/adamw/accum2")  # fmt: skip


class Ops(TorchDispatchMode):
    """The names of the ops that reach the device, with the dtype of their first floating-point tensor."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("prim", "profiler"):
            return out
        tensors = [t for t in _tensors((args, kwargs or {}, out)) if t.device.type == self.device_type]
        if tensors:
            dtype = next((t.dtype for t in tensors if t.is_floating_point()), tensors[0].dtype)
            self.names.append(f"{func._schema.name.replace('::', '.')} {str(dtype).removeprefix('torch.')}")
        return out


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _tensors(v)]
    return []


def record(name: str, device: str) -> dict[str, Any]:
    """One case on ``device``: its ops, its memory, its time."""
    torch.manual_seed(0)
    with torch.device(device):
        running = build(CASES[name], device=device)
    for _ in range(3):
        running.step()
    on_cuda = device.startswith("cuda")
    found: dict[str, Any] = {}
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        found["allocated_before_bytes"] = torch.cuda.memory_allocated()
        running.step()
        torch.cuda.synchronize()
        found["allocated_peak_bytes"] = torch.cuda.max_memory_allocated()
        found["reserved_peak_bytes"] = torch.cuda.max_memory_reserved()
        seconds = []
        for _ in range(20):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            running.step()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        found["step_seconds"] = statistics.median(seconds)
        found["step_seconds_range"] = [min(seconds), max(seconds)]
    own = {p.untyped_storage().data_ptr() for p in running.model.parameters()}
    own |= {t.untyped_storage().data_ptr() for t in (running.inputs, running.targets)}
    saved: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        running.step()
    found["saved_bytes"] = sum(saved.values())
    ops = Ops(torch.device(device).type)
    with ops:
        running.step()
    kinds = sorted(set(ops.names))
    number = {kind: i for i, kind in enumerate(kinds)}
    return {**found, "op_names": kinds, "ops": [number[n] for n in ops.names]}


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here: the fixtures are recorded on a machine that has one")
    gpu = torch.cuda.get_device_name()
    fixture = {
        "gpu": gpu,
        "driver": getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)(),
        "cuda": torch.version.cuda,
        "torch": str(torch.__version__),
        "date": str(datetime.date.today()),
        "cases": {name: record(name, "cuda") for name in RECORDED},
    }
    FIXTURES.mkdir(exist_ok=True)
    stem = re.sub(r"[^a-z0-9.]+", "-", f"{gpu}-torch{fixture['torch'].split('+')[0]}".lower()).strip("-")
    path = FIXTURES / f"{stem}.json"
    path.write_text(json.dumps(fixture, indent=None, separators=(",", ":")) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")
    for name, case in fixture["cases"].items():
        print(f"{name:24s} {len(case['ops']):6d} ops  peak {case['allocated_peak_bytes']:>12,} B allocated "
              f"{case['reserved_peak_bytes']:>12,} B reserved  saved {case['saved_bytes']:>12,} B  "
              f"{case['step_seconds'] * 1e3:.3f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
