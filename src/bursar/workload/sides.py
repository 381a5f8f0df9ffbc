"""The two sides of ``bursar diff`` as written: saved records, workloads, or one file at two revisions."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from bursar import revisions
from bursar.diff import Diff, FileChange, Side, Source, changed_lines, compare
from bursar.errors import BadInput, MissingExtra, TraceFailed
from bursar.hardware import cluster
from bursar.report.record import SCHEMA_VERSION
from bursar.workload import apart
from bursar.workload.apart import Answer, Order

WORKING_TREE = "working tree"
DEFAULTS: Mapping[str, Any] = {"batch_size": None, "seq_len": None, "precision": "fp32", "optimizer": None,
                               "recompute": "none", "accumulate": 1, "zero_grad": "none"}  # fmt: skip


@dataclass(frozen=True)
class _Asked:
    """One side before it is traced."""

    letter: str
    model: str
    revision: str | None = None  # None: as the files stand
    sha: str = ""
    tree: Path | None = None  # the files to take code from, where there is a repository
    origin: Path | None = None

    @property
    def stands_at(self) -> str:
        if self.tree is None:
            return ""
        return f"{self.revision} ({self.sha[:10]})" if self.revision is not None else WORKING_TREE

    @property
    def name(self) -> str:
        return f"{self.letter} ({self.model}" + (f" at {self.stands_at})" if self.stands_at else ")")


def diff(
    a: str,
    b: str | None = None,
    *,
    base: str | None = None,
    head: str | None = None,
    on: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Diff:
    """What changed between workloads ``a`` and ``b``: models as `bursar.step` takes them, or saved ``step --json``.

    With ``base`` the code of ``a`` is that of this git revision, and ``b`` (the same, where none is given) that of
    ``head`` or of the working tree. ``options`` are those of `bursar.step`, for both. Raises BadInput, UnknownName, and
    TraceFailed naming the side that cannot be traced.
    """
    how = {**DEFAULTS, **(options or {})}
    if head is not None and base is None:
        raise BadInput(f"--head {head} is the later of two revisions; give the earlier one too: --base main")
    if b is None and base is None:
        raise BadInput(
            f"one workload is no difference: give a second, as in bursar diff {a} OTHER, or a git revision to compare "
            f"it with, as in bursar diff {a} --base main"
        )
    saved = [None if model is None else _saved(model) for model in (a, b)]
    if all(s is not None for s in saved) and (how != DEFAULTS or on is not None):
        raise BadInput("both sides are saved records, whose step is over: leave the options of the step out")
    if base is not None and any(s is not None for s in saved):
        raise BadInput("a saved record has no revision; leave --base out, or give a model")
    on = on or _device_of(saved)
    if on not in (None, "cpu") and on is not None:
        cluster(on)  # an unknown name is nobody's side
    if any(s is None for s in saved[: 1 if b is None else 2]) and importlib.util.find_spec("torch") is None:
        raise MissingExtra("torch", "a step is traced by running the model's own code")
    with revisions.temporary() as folder:
        asked = [_Asked("A", a), _Asked("B", a if b is None else b)]
        if base is not None:
            asked = _at_revisions(asked, base, head, folder)
        sides = _trace(asked, saved, how, on, folder)
        files, notes = _changed_files(asked, sides) if base is not None else ((), ())
    return compare(sides[0][0], sides[1][0], files, notes)


# ---- saved records


def _saved(model: str) -> dict[str, Any] | None:
    """The record in the file ``model``, if it is one of ``bursar step --json``; None for anything else."""
    path = Path(model)
    if path.suffix != ".json" or not path.is_file():
        return None
    try:
        found = msgspec.json.decode(path.read_bytes())
    except (msgspec.DecodeError, OSError) as error:
        raise BadInput(f"{model} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict) or "schema_version" not in found:
        return None  # a config.json
    if found["schema_version"] != SCHEMA_VERSION or not isinstance(found.get("flops"), dict):
        raise BadInput(
            f"{model} is no record of this bursar's step --json (schema_version {found['schema_version']!r}, known is "
            f"{SCHEMA_VERSION}); write it again"
        )
    return found


def _device_of(saved: Sequence[Mapping[str, Any] | None]) -> str | None:
    """What a saved record was priced on: the other side is priced there too."""
    for record in saved:
        hardware = record.get("hardware") if record else None
        if isinstance(hardware, Mapping):
            count = hardware.get("count", 1)
            return str(hardware.get("name")) if count == 1 else f"{count}x{hardware.get('name')}"
    return None


# ---- revisions


def _at_revisions(asked: Sequence[_Asked], base: str, head: str | None, folder: Path) -> list[_Asked]:
    """The sides with their trees, written below ``folder`` where they are not the working tree."""
    found: list[_Asked] = []
    for side, revision in zip(asked, (base, head), strict=True):
        where = side.model.rpartition(":")[0] if apart.is_code(side.model) else side.model
        is_file = where.endswith((".py", ".json")) or (not apart.is_code(side.model) and Path(where).is_dir())
        if not is_file and not apart.is_code(side.model):
            raise BadInput(
                f"{side.model} stands in no file, so it has no revisions; give file.py:callable, "
                "package.module:callable or a config.json"
            )
        origin = revisions.repository(Path(where).parent if is_file else Path())
        if found and found[0].origin != origin:
            raise BadInput(f"{asked[0].model} and {side.model} are in two repositories; revisions compare within one")
        if revision is None:
            found.append(replace(side, tree=origin, origin=origin))
            continue
        sha = revisions.commit(origin, revision)
        tree = folder / side.letter
        revisions.export(origin, sha, tree)
        side = replace(side, revision=revision, sha=sha, tree=tree, origin=origin)
        if is_file and not (tree / _below(Path(where), origin)).exists():
            raise BadInput(
                f"{side.letter}: there is no {_below(Path(where), origin)} at {side.stands_at}; if it had another name "
                "there, give both: bursar diff OLD.py:callable NEW.py:callable --base " + base
            )
        found.append(side)
    return found


def _below(path: Path, root: Path) -> Path:
    return Path(path.absolute().parent.resolve() / path.name).relative_to(root)


def _order(side: _Asked, how: Mapping[str, Any], on: str | None) -> tuple[Order, Path]:
    """What to trace for ``side``, and the folder to work in."""
    if side.tree is None or side.origin is None:
        return Order(side.model, dict(how), on), Path()
    where, colon, name = side.model.rpartition(":") if apart.is_code(side.model) else (side.model, "", "")
    if where.endswith((".py", ".json")) or not colon:
        where = str(side.tree / _below(Path(where), side.origin))
    here = Path().resolve()
    folder = side.tree / here.relative_to(side.origin) if here.is_relative_to(side.origin) else side.tree
    order = Order(where + colon + name, dict(how), on, str(side.tree), str(side.origin))
    return order, folder if folder.is_dir() else side.tree


def _trace(
    asked: Sequence[_Asked], saved: Sequence[Any], how: Mapping[str, Any], on: str | None, folder: Path
) -> list[tuple[Side, list[str]]]:
    """Both sides traced: a user's code in an interpreter of its own, the two at once."""
    found: list[tuple[Side, list[str]]] = []
    with contextlib.ExitStack() as stack:
        started = []
        for side, record in zip(asked, (saved[0], saved[1]), strict=True):
            alone = record is None and (side.tree is not None or apart.is_code(side.model))
            order, place = _order(side, how, on)
            scratch = folder / f"{side.letter}-child"
            started.append((stack.enter_context(apart.start(order, scratch, place)) if alone else None, order, scratch))
        for side, record, (child, order, scratch) in zip(asked, saved, started, strict=True):
            if record is not None:
                found.append((Side(side.model, record), []))
                continue
            answer = _here(order, side.name) if child is None else apart.answer(child, scratch, side.name, order.root)
            answer.record["model"]["name"] = side.model
            sources = {module: [Source(*place) for place in places] for module, places in answer.sources.items()}
            found.append((Side(side.model, answer.record, side.stands_at, sources), answer.files))
    return found


def _here(order: Order, side: str) -> Answer:
    try:
        return apart.traced(order)
    except TraceFailed as error:
        raise TraceFailed(f"{side} cannot be traced: {error}") from error


def _changed_files(
    asked: Sequence[_Asked], sides: Sequence[tuple[Side, list[str]]]
) -> tuple[tuple[FileChange, ...], tuple[str, ...]]:
    """The files of the traced code that differ, line by line, and a word on the others."""
    (a, b), origin = asked, asked[0].origin
    assert origin is not None  # there are revisions
    assert a.tree is not None
    assert b.tree is not None
    names = revisions.differing(origin, a.sha, b.sha or None)
    code = {file for _, files in sides for file in files} | {_config(side) for side in asked}
    read = [{name: _text(tree / name) for name in names if name in code} for tree in (a.tree, b.tree)]
    found = [FileChange(name, changed_lines(read[0][name], read[1][name])) for name in names if name in code]
    others = [name for name in names if name not in code]
    if not others:
        return tuple(found), ()
    few = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
    return tuple(found), (f"changed too, and not loaded as the model's code: {few}",)


def _config(side: _Asked) -> str:
    """The config.json that is the model, below the repository; nothing for code."""
    if apart.is_code(side.model) or side.origin is None:
        return ""
    path = _below(Path(side.model), side.origin)
    return (path if path.suffix == ".json" else path / "config.json").as_posix()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
