"""A git repository's files as they were at a revision, in a folder of their own. No torch.

Nothing is written into the repository: a revision is read into an index of its own and checked out from there, with no
worktree to register and no hook to run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from bursar.errors import BadInput


def repository(place: Path) -> Path:
    """The top folder of the git repository that ``place`` stands in. Raises BadInput where there is none."""
    folder = next(p for p in (place, *place.resolve().parents) if p.is_dir())
    try:
        return Path(_git(folder, "rev-parse", "--show-toplevel").rstrip("\n")).resolve()
    except BadInput as error:
        raise BadInput(f"{place} is in no git repository, so it has no revisions to compare: {error}") from None


def commit(root: Path, revision: str) -> str:
    """The commit that ``revision`` (a branch, a tag, HEAD~1, …) names, 40 digits. Raises BadInput for none."""
    if revision and not revision.startswith("-"):
        with contextlib.suppress(BadInput):
            return _git(root, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").strip()
    raise BadInput(
        f"no revision {revision!r} in {root.name}; give a branch, a tag or a commit that git log knows "
        "(a shallow clone knows few: git fetch --unshallow)"
    )


def export(root: Path, sha: str, target: Path) -> None:
    """Write every file of commit ``sha`` below ``target``. Raises BadInput where git cannot."""
    target.mkdir()
    index = {"GIT_INDEX_FILE": str(target.with_name(target.name + ".index"))}
    _git(root, "read-tree", sha, **index)
    _git(root, "checkout-index", "--all", "--force", f"--prefix={target}{os.sep}", **index)


def differing(root: Path, before: str, after: str | None) -> list[str]:
    """The files that differ between two commits, or between one and the working tree (None), new ones included."""
    found = _git(root, "diff", "--name-only", "--no-renames", "-z", before, *([after] if after else []), "--")
    if after is None:
        found += _git(root, "ls-files", "--others", "--exclude-standard", "-z")
    return sorted({name for name in found.split("\0") if name})


@contextlib.contextmanager
def temporary() -> Iterator[Path]:
    """A folder that is gone afterwards: also after an error, Ctrl-C or SIGTERM."""
    made = Path(tempfile.mkdtemp(prefix="bursar-diff-")).resolve()
    try:
        with _told_to_stop():
            yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def _told_to_stop() -> Iterator[None]:
    """SIGTERM, with which CI takes a job back, unwinds like any exit."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # only there may signals be set
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _git(folder: Path, *words: str, **environment: str) -> str:
    # Where a hook or another tool calls us, git's own variables would point us to its repository
    inherited = {k: v for k, v in os.environ.items() if k not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            check=False,
            env={**inherited, "LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0", **environment},
        )
    except FileNotFoundError:
        raise BadInput("git is not installed, and revisions are read with it") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise BadInput(f"git {words[0]}: {said[-1] if said else f'exit code {done.returncode}'}")
    return done.stdout.decode(errors="surrogateescape")
