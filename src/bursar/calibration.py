"""What `bursar bench` measured of a machine, as a record, and as the TOML file it is kept in. No torch.

The file's first line is a checksum of the rest, so that a torn or edited one is told from a whole one.
"""

from __future__ import annotations

import math
import tomllib
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from bursar.errors import BadInput
from bursar.machine import Machine

SCHEMA = 1
Point = tuple[float, ...]


@dataclass(frozen=True)
class Calibration:
    """Seconds and rates of one machine. Points are sorted; the last number of each is the figure.

    ``matmul`` by dtype and layout (``NT``: the second operand transposed): (M, N, K, seconds). ``attention`` by dtype
    and direction: (S, FLOP/s). ``ops`` by dtype and op: hot and cold (elements, seconds). ``bandwidth`` by what is
    done: (bytes, bytes/s). ``overhead``: seconds an op takes in its place beyond what it takes alone.
    """

    date: str  # ISO 8601
    machine: Machine
    clock: str  # "cpu": a thread's CPU time; "wall"
    seconds: float  # that the measuring took
    canary: Mapping[str, float]  # seconds of a product and of a pass over memory: quiet or not, then and now
    drift: float  # the canaries after over before
    spread: float  # median over all points of half the quartile range over the median
    matmul: Mapping[str, Mapping[str, tuple[Point, ...]]]
    attention: Mapping[str, Mapping[str, tuple[Point, ...]]]
    convolution: Mapping[str, float]  # by direction: its rate over that of the equivalent product
    ops: Mapping[str, Mapping[str, Mapping[str, tuple[Point, ...]]]]
    bandwidth: Mapping[str, tuple[Point, ...]]
    overhead: Mapping[str, float]
    launch: Mapping[str, float] = field(default_factory=dict)  # CUDA only: a kernel's, a graph's
    cpu_share: float = 1.0  # CPU seconds over wall seconds while measuring, per thread

    def best(self, dtype: str) -> float | None:
        """The best FLOP/s that any product reached in ``dtype``; None where none was measured."""
        rates = [2 * m * n * k / s for points in self.matmul.get(dtype, {}).values() for m, n, k, s in points]
        return max(rates, default=None)

    @property
    def memory_bytes_per_s(self) -> float:
        """Of the largest copy, reads and writes together."""
        return self.bandwidth["copy"][-1][-1]

    @property
    def busy(self) -> str:
        """Why the figures are not to be trusted; empty where they are."""
        if not 1 / 1.15 <= self.drift <= 1.15:
            return f"the canaries took {self.drift:.2f} times as long after as before: the machine was busy"
        if self.cpu_share < 0.85 and self.clock == "wall":
            return f"only {self.cpu_share:.0%} of the time was this process's: the machine was busy"
        return ""


def dumps(calibration: Calibration) -> str:
    """The TOML file: a checksum, then every field."""
    known = asdict(calibration)
    body = "\n".join([f"schema = {SCHEMA}", *_toml(known, ())]) + "\n"
    return f'crc32 = "{zlib.crc32(body.encode()):08x}"\n{body}'


def loads(text: str, name: str = "the calibration") -> Calibration:
    """The record of such a file. Raises BadInput for one that is torn, edited, or of another schema."""
    again = "run `bursar bench` again"
    first, _, body = text.partition("\n")
    if first != f'crc32 = "{zlib.crc32(body.encode()):08x}"':
        raise BadInput(f"{name} is not as it was written (its checksum does not fit); {again}")
    try:
        found = tomllib.loads(body)
        if found.pop("schema", None) != SCHEMA:
            raise BadInput(f"{name} was written by another version of bursar; {again}")
        known = {f.name: found[f.name] for f in fields(Calibration) if f.name in found}
        return Calibration(**{**{k: _points(v) for k, v in known.items()}, "machine": Machine(**found["machine"])})
    except (tomllib.TOMLDecodeError, TypeError, KeyError, ValueError) as error:
        raise BadInput(f"{name} cannot be read ({error}); {again}") from None


def _toml(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterable[str]:
    """Lines of ``table``: plain values first, then its tables, each under its own heading."""
    for key, value in table.items():
        if not isinstance(value, Mapping):
            yield f"{_key(key)} = {_value(value)}"
    for key, value in table.items():
        if isinstance(value, Mapping):
            if not value or any(not isinstance(v, Mapping) for v in value.values()):
                yield f"\n[{'.'.join(map(_key, (*path, key)))}]"
            yield from _toml(value, (*path, key))


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else f'"{name}"'


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is no measurement")
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    text = "".join(c if c.isprintable() and c not in '"\\' else " " for c in str(value))
    return f'"{text}"'


def _points(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _points(v) for k, v in value.items()}
    return tuple(_points(v) for v in value) if isinstance(value, list) else value
