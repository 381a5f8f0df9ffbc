"""Where measurements of this machine are kept: its calibration, ops benchmarked since, past forecasts. No torch.

One folder of the user's data, ``BURSAR_DATA`` in its place where set. Each file is written whole or not at all, under a
lock, and carries what it belongs to: nothing measured on another machine, torch or number of threads is ever mixed in.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bursar import calibration, files
from bursar.calibration import Calibration
from bursar.errors import BadInput, NotCalibrated
from bursar.machine import Machine

RUN_BENCH = "run `bursar bench` (a minute), then ask again"
_MOST_PAST = 200  # forecasts kept


def folder() -> Path:
    """The folder, whether or not it is there."""
    given = os.environ.get("BURSAR_DATA")
    if given:
        return Path(given)
    import platformdirs

    return Path(platformdirs.user_data_dir("bursar"))


def save(found: Calibration) -> Path:
    """Keep ``found`` as the machine's calibration; what was remembered under an older one is forgotten."""
    path = folder() / "calibration.toml"
    with _locked():
        files.write(path, calibration.dumps(found))
        (folder() / "remembered.json").unlink(missing_ok=True)
    return path


def load(here: Machine | None = None) -> Calibration:
    """The calibration kept. Raises NotCalibrated where there is none, or none that holds for ``here``."""
    path = folder() / "calibration.toml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise NotCalibrated(f"this machine is not calibrated: there is no {path}; {RUN_BENCH}") from None
    try:
        found = calibration.loads(text, str(path))
    except BadInput as error:
        raise NotCalibrated(f"this machine is not calibrated: {error}") from None
    if here is not None and (differs := here.differs(found.machine)):
        raise NotCalibrated(f"the calibration of {found.date} does not hold here: {'; '.join(differs)}. {RUN_BENCH}")
    return found


# ---- ops benchmarked since


def remembered(of: Calibration) -> dict[str, float]:
    """Seconds by signature, of ops benchmarked under calibration ``of``."""
    found = _read("remembered.json", of)
    return {k: v for k, v in found.items() if isinstance(v, float) and math.isfinite(v) and v > 0}


def remember(of: Calibration, seconds: Mapping[str, float]) -> None:
    """Keep ``seconds`` beside what is kept. A folder that cannot be written costs a benchmark next time."""
    with contextlib.suppress(OSError), _locked():
        _write("remembered.json", of, {**remembered(of), **seconds})


# ---- past forecasts


def past(of: Calibration) -> list[dict[str, Any]]:
    """Forecasts and measurements of steps on this machine, oldest first."""
    found = _read("past.json", of, dated=False).get("steps", [])
    return [p for p in found if p.get("forecast", 0) > 0 and p.get("measured", 0) > 0]


def record(of: Calibration, model: str, forecast: float, measured: float, benchmarked: bool) -> None:
    """Keep one pair of seconds to learn from."""
    if not (math.isfinite(forecast) and math.isfinite(measured) and forecast > 0 and measured > 0):
        return
    one = {"model": model, "forecast": forecast, "measured": measured, "benchmarked": benchmarked}
    with contextlib.suppress(OSError), _locked():
        _write("past.json", of, {"steps": [*past(of), one][-_MOST_PAST:]}, dated=False)


# ---- files


def _stamp(of: Calibration, dated: bool) -> dict[str, Any]:
    machine = asdict(of.machine)
    stamp = {k: machine[k] for k in ("host", "cpu", "threads", "torch", "device")}
    return {**stamp, "date": of.date} if dated else stamp


def _read(name: str, of: Calibration, dated: bool = True) -> dict[str, Any]:
    """What a file holds; empty where it is missing, torn, or of another machine."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        head, _, body = (folder() / name).read_text(encoding="utf-8").partition("\n")
        if head == f"{zlib.crc32(body.encode()):08x}":
            found = json.loads(body)
            if found["schema"] == calibration.SCHEMA and found["of"] == _stamp(of, dated):
                return dict(found["holds"])
    return {}


def _write(name: str, of: Calibration, holds: Mapping[str, Any], dated: bool = True) -> None:
    body = json.dumps({"schema": calibration.SCHEMA, "of": _stamp(of, dated), "holds": holds}, allow_nan=False)
    files.write(folder() / name, f"{zlib.crc32(body.encode()):08x}\n{body}")


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """One writer at a time."""
    folder().mkdir(parents=True, exist_ok=True)
    with (folder() / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
