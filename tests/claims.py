"""The notes' claims executed once for all tests of a process."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from bursar import lecture
from bursar.report.lecture import Line


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one core: these samples are small, and threads that wait for each other take longer."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@functools.cache
def executed() -> tuple[Line, ...]:
    """Every claim, in the notes' order."""
    with one_thread():
        return tuple(lecture.execute())
