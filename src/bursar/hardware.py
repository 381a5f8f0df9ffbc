"""Accelerators and clusters: what ``catalog/hardware.toml`` says, as frozen records.

A peak belongs to a device variant and a dtype, and is dense.  Nothing here guesses: a name that no row carries is an
error that names the nearest rows, and so is a device name as torch prints it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from bursar.errors import BadInput, NotCalibrated, UnknownName
from bursar.units import format_bytes, parse_count

__all__ = ["Accelerator", "Cluster", "accelerator", "accelerators", "by_driver_name", "cluster", "dtype_name"]

_HINT = "Add a row to catalog/hardware.toml or pass --on local."
_AS_IN = "8xh100-sxm"
_MOST = 10**9
_DTYPES = {
    "float64": "fp64", "double": "fp64", "float32": "fp32", "float": "fp32", "tensorfloat32": "tf32",
    "float16": "fp16", "half": "fp16", "bfloat16": "bf16", "float8_e4m3fn": "fp8", "float8_e5m2": "fp8",
    "float8_e4m3fnuz": "fp8", "float8_e5m2fnuz": "fp8", "float4_e2m1fn_x2": "fp4",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One row of the catalogue.  ``None`` is a figure for which no source was found."""

    name: str  # the catalogue's: h100-sxm
    title: str  # the maker's
    vendor: str
    year: int
    peak_flops_per_s: Mapping[str, float] = field(hash=False)  # by dtype, dense
    memory_bytes: int  # as the maker names it
    memory_bytes_per_s: float
    sources: Mapping[str, str] = field(hash=False, repr=False)  # by field
    driver_names: tuple[str, ...] = ()
    usable_memory_bytes: int | None = None  # as the driver shows it
    scaleup_bytes_per_s: float | None = None  # NVLink and its like: per accelerator, one direction
    scaleup_size: int | None = None  # accelerators it joins, where that is not the node
    node_bytes_per_s: float | None = None  # the network of one node, one direction
    node_size: int | None = None
    pcie_bytes_per_s: float | None = None  # to the host, one direction
    tdp_watts: float | None = None
    l2_bytes: int | None = None
    sm_count: int | None = None  # SMs, or compute units
    measured_matmul_flops_per_s: Mapping[str, float] = field(default_factory=dict, hash=False)
    usd_per_gpu_hour: float | None = None
    price_source: str | None = None
    price_date: str | None = None

    def peak(self, dtype: str) -> float:
        """Dense peak FLOP/s in ``dtype`` (``bf16`` or ``bfloat16``, …).  Raises `BadInput` where the device has none.

        >>> accelerator("h100-sxm").peak("bf16")
        989400000000000.0
        """
        try:
            return self.peak_flops_per_s[dtype_name(dtype)]
        except KeyError:
            known = " ".join(self.peak_flops_per_s)
            raise BadInput(f"{self.name} has no known peak in {dtype}; the catalogue knows {known}") from None

    @property
    def usable_bytes(self) -> int:
        """Memory the driver shows; the maker's figure where that is not known (see `assumptions`)."""
        return self.memory_bytes if self.usable_memory_bytes is None else self.usable_memory_bytes

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What using this row takes for granted."""
        if self.usable_memory_bytes is not None:
            return ()
        return (f"usable memory of {self.name} assumed to be its nominal {format_bytes(self.memory_bytes)}",)

    def ridge(self, dtype: str) -> float:
        """FLOP per byte at which an op in ``dtype`` stops being bound by memory: peak over memory bandwidth."""
        return self.peak(dtype) / self.memory_bytes_per_s


@dataclass(frozen=True, slots=True)
class Cluster:
    """``count`` accelerators of one kind.  Raises `BadInput` for a count below one."""

    accelerator: Accelerator
    count: int = 1
    own_node_size: int | None = None  # where this cluster differs from the catalogue: accelerators of one node,
    own_node_bytes_per_s: float | None = None  # the network of one node, one direction,
    own_scaleup_size: int | None = None  # accelerators that NVLink joins

    @property
    def node_size(self) -> int:
        """Accelerators of one node; 8 where nobody says (see `assumptions`)."""
        return self.own_node_size or self.accelerator.node_size or 8

    @property
    def node_bytes_per_s(self) -> float | None:
        """The network of one node, one direction."""
        return self.own_node_bytes_per_s or self.accelerator.node_bytes_per_s

    @property
    def scaleup_size(self) -> int:
        """Accelerators that NVLink, or its like, joins: a node, or a rack of them."""
        if self.accelerator.scaleup_bytes_per_s is None:
            return 1
        return self.own_scaleup_size or self.accelerator.scaleup_size or self.node_size

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or not 1 <= self.count <= _MOST:
            why = f"give a whole number from 1 to {_MOST:.0e}, as in {_AS_IN}"
            raise BadInput(f"a cluster of {self.count!r} {self.accelerator.name} cannot be; {why}")

    @property
    def name(self) -> str:
        """As the command line takes it: ``1024xh100-sxm``."""
        return self.accelerator.name if self.count == 1 else f"{self.count}x{self.accelerator.name}"

    def peak(self, dtype: str) -> float:
        """Dense peak FLOP/s of all of them together."""
        return self.count * self.accelerator.peak(dtype)


def accelerators() -> tuple[Accelerator, ...]:
    """Every row, in the catalogue's order."""
    return tuple(_catalogue().values())


def accelerator(name: str) -> Accelerator:
    """The row called ``name``.  Raises `UnknownName` with the nearest rows.

    >>> accelerator("h100")
    Traceback (most recent call last):
    bursar.errors.UnknownName: no accelerator 'h100'; did you mean h100-sxm, h100-pcie, h100-nvl? Add a row to \
catalog/hardware.toml or pass --on local.
    """
    rows = _catalogue()
    try:
        return rows[name.strip().lower()]
    except KeyError:
        if name.strip().lower() == "local":
            raise NotCalibrated(
                "this machine is not calibrated, so --on local has no figures; name an accelerator of the catalogue, "
                "or take --on cpu for the ops and memory of the CPU backend"
            ) from None
        raise UnknownName("accelerator", name, rows, _HINT) from None


def by_driver_name(name: str) -> Accelerator:
    """The one row whose ``driver_names`` has ``name`` in full, as ``torch.cuda.get_device_name()`` prints it.

    >>> by_driver_name("NVIDIA H100 80GB HBM3").name
    'h100-sxm'
    """
    by_name = {driver: row for row in accelerators() for driver in row.driver_names}
    try:
        return by_name[name.strip()]
    except KeyError:
        raise UnknownName("accelerator with the driver name", name, by_name, _HINT) from None


def cluster(text: str) -> Cluster:
    """``"1024xh100-sxm"`` or, for one, ``"h100-sxm"``.  Raises `BadInput` for a bad count, `UnknownName` for a name.

    >>> cluster("1024xh100-sxm").count, cluster("mi300x").count
    (1024, 1)
    """
    rows = _catalogue()
    asked = text.strip().lower()
    found = re.fullmatch(r"([^a-z]*|.*?)\s*[x×*]\s*(\S+)", asked)
    # mi300x and rtx-4090 carry an x of their own: only what stands before a name, or is no letter, is taken for a count
    if asked in rows or found is None or not (found[2] in rows or re.fullmatch(r"[^a-z]+", found[1])):
        return Cluster(accelerator(text))
    try:
        count = parse_count(found[1])
    except BadInput as error:
        raise BadInput(f"{text!r} does not say how many: {error}; as in {_AS_IN}") from None
    return Cluster(accelerator(found[2]), count)


def dtype_name(dtype: str) -> str:
    """The catalogue's name of a dtype: ``torch.bfloat16`` and ``bfloat16`` are ``bf16``.

    >>> dtype_name("torch.bfloat16"), dtype_name("TF32")
    ('bf16', 'tf32')
    """
    plain = dtype.strip().lower().removeprefix("torch.")
    return _DTYPES.get(plain, plain)


@cache
def _catalogue() -> Mapping[str, Accelerator]:
    text = files("bursar").joinpath("catalog", "hardware.toml").read_text(encoding="utf-8")
    return {name: _row(name, table) for name, table in tomllib.loads(text).items()}


def _row(name: str, table: dict[str, Any]) -> Accelerator:
    fields = dict(table)
    return Accelerator(
        name=name,
        title=fields.pop("name"),
        sources=fields.pop("source"),
        driver_names=tuple(fields.pop("driver_names", ())),
        **fields,
    )
