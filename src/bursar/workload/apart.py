"""A step traced in an interpreter of its own, so that two versions of one module never meet. Torch is loaded there.

parent                                child: python -m bursar.workload.apart ORDER ANSWER
start(order, …) ── order.json ──►     the parent's sys.path, the repository's part of it from the revision's folder
answer(…)       ◄─ answer.json ──     the step's record, its modules' classes, the files of its code; or the error
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from bursar.errors import BadInput, BursarError, TraceFailed

if TYPE_CHECKING:
    from torch import nn

    from bursar.workload.resolve import Workload

REFERENCE = "h100-sxm"  # where time bounds are asked for without a device
_SAID_LAST = 5  # lines of a dead child's stderr


class Order(msgspec.Struct):
    """What a child is to trace."""

    model: str  # as the user wrote it, from ``folder``
    options: dict[str, Any]  # of bursar.step
    on: str | None
    root: str = ""  # the tree the code is to come from
    origin: str = ""  # the repository that tree is a copy of
    path: list[str] = []


class Answer(msgspec.Struct):
    """What came of it."""

    record: dict[str, Any] = {}
    sources: dict[str, list[tuple[str, int, int]]] = {}  # module -> its classes: file below root, first and last line
    files: list[str] = []  # of the code that was loaded, below root
    error: str = ""
    exit_code: int = 0


def is_code(model: str) -> bool:
    """Whether MODEL names a callable of the user's, ``file.py:callable`` or ``package.module:callable``."""
    from bursar import architecture

    where, _, name = model.rpartition(":")
    if model.split(":")[0] in architecture.known_models():
        return False
    return bool(name) and (where.endswith(".py") or (bool(where) and all(p.isidentifier() for p in where.split("."))))


@contextlib.contextmanager
def start(order: Order, scratch: Path, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A child at work on ``order`` in ``folder``, its files at ``scratch``.*; killed if it outlives the block."""
    order = msgspec.structs.replace(order, path=[str(Path(p or ".").resolve()) for p in sys.path])
    scratch.with_suffix(".order").write_bytes(msgspec.json.encode(order))
    words = [scratch.with_suffix(".order"), scratch.with_suffix(".answer")]
    with scratch.with_suffix(".said").open("wb") as said:
        child = subprocess.Popen(
            [sys.executable, "-P", "-B", "-m", "bursar.workload.apart", *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            cwd=folder,
            start_new_session=True,  # Ctrl-C is for the parent, which then ends the child and what that started
            env={
                **os.environ,
                "PYTHONHASHSEED": "0",
                "PYTHONPATH": os.pathsep.join(order.path),
                "TMPDIR": str(scratch.parent),  # torch's caches and what the user's code forgets go with the folder
            },
        )
    try:
        yield child
    finally:
        if child.poll() is None:
            if hasattr(os, "killpg"):
                os.killpg(child.pid, signal.SIGKILL)
            else:
                child.kill()
        child.wait()


def answer(child: subprocess.Popen[bytes], scratch: Path, side: str, root: str = "") -> Answer:
    """Wait for ``child`` and read what it found, paths without ``root``, which is a folder that goes.

    Raises TraceFailed naming the ``side`` and its error.
    """
    code = child.wait()
    written = scratch.with_suffix(".answer")
    if not written.is_file():
        said = scratch.with_suffix(".said").read_text(errors="replace").strip().splitlines()[-_SAID_LAST:]
        last = "; it said last:\n" + "\n".join(said) if said else ""
        raise TraceFailed(f"{side} cannot be traced: its interpreter ended with code {code} and no record{last}")
    text = written.read_text(encoding="utf-8")
    if root:
        text = text.replace(msgspec.json.encode(root + os.sep).decode().strip('"'), "")
    found = msgspec.json.decode(text, type=Answer)
    if found.error:
        error = TraceFailed(f"{side} cannot be traced: {found.error}")
        error.exit_code = found.exit_code
        raise error
    return found


def traced(order: Order) -> Answer:
    """Trace here and now. Raises what `bursar.step` raises."""
    from bursar.hardware import cluster
    from bursar.report.record import step_record
    from bursar.workload.resolve import _find, from_callable, resolve
    from bursar.workload.step import _check, run

    how = dict(order.options)
    sizes = how.pop("batch_size"), how.pop("seq_len")
    _check(how["precision"], how["optimizer"], how["recompute"], how["accumulate"], how["zero_grad"])
    ranks = 1 if order.on in (None, "cpu") or order.on is None else cluster(order.on).count
    factory = None
    if is_code(order.model):
        where, _, name = order.model.rpartition(":")
        factory = _find(where, name)
        work = from_callable(factory, order.model, *sizes)
    else:
        work = resolve(order.model, *sizes)
    sources: dict[str, list[tuple[str, int, int]]] = {}
    if order.root:
        work = _noting(work, Path(order.root), factory, sources)
    how["optimizer"] = how["optimizer"] or work.optimizer
    ledger = run(work, **how, on=order.on, replicas=ranks)
    forecast = None
    notes: tuple[str, ...] = ()
    if order.on != "cpu":
        try:
            forecast = ledger.on(order.on or REFERENCE)
        except BadInput as error:
            if order.on is not None:
                raise
            notes = (f"no time bound: {error}",)
    record = msgspec.to_builtins(step_record(ledger, forecast, on=order.on))
    record["assumptions"] = [*ledger.assumptions, *notes]  # a forecast's are about its expectation, not its bound
    return Answer(record, sources, _files(order) if order.root else [])


def _noting(work: Workload, root: Path, factory: Any, sources: dict[str, list[tuple[str, int, int]]]) -> Workload:
    """``work``, which notes as it is made where below ``root`` its modules' classes stand; "" is the whole model."""
    import dataclasses

    def make() -> tuple[nn.Module, Any]:
        module, batch = work.make()
        known: dict[Any, list[tuple[str, int, int]]] = {}
        for name, part in module.named_modules():
            kind = type(part)
            if kind not in known:
                known[kind] = [place for c in kind.__mro__ if (place := _place(c, root))]
            sources[name] = known[kind]
        if factory is not None and (place := _place(factory, root)):
            sources[""] = [*sources.get("", ()), place]
        return module, batch

    return dataclasses.replace(work, make=make)


def _place(made: Any, root: Path) -> tuple[str, int, int] | None:
    """Where the source of a class or a function stands, if it is below ``root``."""
    import inspect

    try:
        file = Path(inspect.getsourcefile(made) or "").resolve()
        if not file.is_relative_to(root):
            return None
        lines, first = inspect.getsourcelines(made)
    except (OSError, TypeError):
        return None
    return file.relative_to(root).as_posix(), first, first + len(lines) - 1


def _loaded() -> Iterator[tuple[str, Path]]:
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str):
            yield name, Path(file).resolve()


def _files(order: Order) -> list[str]:
    """The files of the code that was loaded, below the root. Raises BadInput where another version was loaded."""
    import bursar

    root, origin = Path(order.root), Path(order.origin)
    apart = (Path(bursar.__file__).resolve().parent, Path(sys.prefix), Path(sys.base_prefix))
    found = set()
    for name, file in _loaded():
        if file.is_relative_to(root):
            found.add(file.relative_to(root).as_posix())
        elif (
            file.is_relative_to(origin)
            and "site-packages" not in file.parts
            and not any(map(file.is_relative_to, apart))
        ):
            raise BadInput(
                f"module {name} was loaded from the working tree ({file.relative_to(origin)}), not from the revision: "
                "is it found by a path set at run time, or not in git at that revision?"
            )
    return sorted(found)


def _take_code_from(order: Order) -> None:
    """Let imports find the tree's version of what the repository holds, and everything else where it was."""
    root, origin = Path(order.root), Path(order.origin)

    def of_tree(entry: str) -> str:
        path = Path(entry)
        return str(root / path.relative_to(origin)) if path.is_relative_to(origin) else entry

    mapped = [new if Path(new := of_tree(entry)).exists() else entry for entry in order.path]
    sys.path[:] = [*mapped, *(str(p) for p in (root / "src", root) if p.is_dir() and str(p) not in mapped)]


def _told(error: BaseException) -> str:
    """An error in one line: ours as it stands, the user's own with the line it came from."""
    if isinstance(error, BursarError):
        return str(error)
    from bursar.trace.failures import user_line

    where, module = user_line(error), getattr(error, "bursar_module", "")
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return said + (f" (at {where})" if where else "") + (f", in module {module}" if module else "")


def main(order_file: str, answer_file: str) -> None:
    """Trace what the order says and write the answer, errors included."""
    order = msgspec.json.decode(Path(order_file).read_bytes(), type=Order)
    try:
        if order.root:
            import torch  # noqa: F401  the environment's, before the tree has a say

            _take_code_from(order)
        else:
            sys.path[:] = order.path
        found = traced(order)
    except BaseException as error:  # SystemExit of the user's too
        found = Answer(error=_told(error), exit_code=error.exit_code if isinstance(error, BursarError) else 2)
    whole = Path(answer_file + ".part")
    whole.write_bytes(msgspec.json.encode(found))
    whole.replace(answer_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
