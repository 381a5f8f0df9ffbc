"""Traces a training step on fake tensors into a ledger. The only code here that others need is `tracing`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from bursar.errors import UnknownName
from bursar.trace.scratch import HOW
from bursar.trace.session import Session


@contextlib.contextmanager
def tracing(on: str | None = None, *, scratch: str = "asked") -> Iterator[Session]:
    """Record what the code inside costs; nothing real is allocated in here and ``"cuda"`` means the fake accelerator.

    ``on`` is a catalogue name, checked at once, ``"cpu"`` for the ops and memory of the CPU backend, or ``"local"``
    for this machine's; without it the ops are a GPU's. Afterwards ``session.ledger`` is the block's last optimizer
    step, earlier ones being warm-up; with no optimizer step, the whole block.

    ``scratch`` says where, on the CPU backend, what a kernel takes for itself comes from: ``"asked"``, a kernel of
    oneDNN's called once on real zeros of its shapes, where that is no large call; ``"formula"``; or ``"none"``.

    Raises UnknownName for an accelerator not in the catalogue, DataDependent where the code needs a tensor's values,
    and whatever the code itself raises. torch, modules, buffers, gradients and random state are left as they were.
    """
    if on == "local":
        on = None if torch.cuda.is_available() else "cpu"
    if on not in (None, "cpu"):
        from bursar.hardware import cluster

        cluster(on)
    if scratch not in HOW:
        raise UnknownName("scratch", scratch, HOW)
    with Session(on, scratch=scratch).open() as session:
        yield session


__all__ = ["Session", "tracing"]
