"""This machine: who it is, and how much of it a process may use. No torch.

A calibration belongs to one host, CPU, torch and number of threads; `Machine.differs` says what is not the same.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Machine:
    """What a measurement of speed depends on."""

    host: str
    cpu: str  # the model's name as the system prints it
    cores: int  # this process may run on, by affinity and by the container's quota
    threads: int  # that torch computes with
    torch: str
    device: str = ""  # the GPU's name, where there is one
    memory_bytes: int = 0  # within the container's limit
    cache_bytes: int = 2**21  # of one core alone
    python: str = ""

    def differs(self, other: Machine) -> list[str]:
        """What makes figures measured on ``other`` not hold here, in words."""
        names = {"host": "host", "cpu": "CPU", "threads": "threads", "torch": "torch", "device": "device"}
        mine = ((label, getattr(self, name), getattr(other, name)) for name, label in names.items())
        return [f"{label} {theirs} there, {here} here" for label, here, theirs in mine if here != theirs]


def current(threads: int | None = None, device: str = "") -> Machine:
    """The machine this runs on; ``threads`` as torch says, else as it would be by default."""
    cores = usable_cores()
    if threads is None:
        torch = sys.modules.get("torch")
        threads = torch.get_num_threads() if torch is not None else int(os.environ.get("OMP_NUM_THREADS", cores))
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        version = ""
    cpu = cpu_name()
    return Machine(platform.node(), cpu, cores, threads, version, device, memory_bytes(), cache_bytes(),
                   platform.python_version())  # fmt: skip


def cpu_name() -> str:
    """The CPU's model as /proc/cpuinfo has it, else what Python knows."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores(cpu_max: str | None = None) -> int:
    """Cores by affinity, and by the container's quota (``cpu_max``: what its cpu.max says) where that is less.

    >>> usable_cores("50000 100000")
    1
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cpu_max is None:
        with contextlib.suppress(OSError):
            cpu_max = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii")
    quota, _, period = (cpu_max or "max").strip().partition(" ")
    if quota.isdecimal() and period.isdecimal() and int(period):
        cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def memory_bytes() -> int:
    """Bytes of memory, or the container's limit where that is less."""
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        has = min(has, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return has


def cache_bytes() -> int:
    """Bytes of the second-level cache, which a core has for itself; 2 MiB where the system does not say."""
    with contextlib.suppress(OSError, ValueError):
        size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text(encoding="ascii").strip()
        return int(size.rstrip("KM")) * (2**20 if size.endswith("M") else 2**10)
    return 2**21
