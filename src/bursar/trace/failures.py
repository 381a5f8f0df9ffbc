"""Turns what fake tensors cannot do into an error that names the user's line and the remedy."""

from __future__ import annotations

import re
import sys
import traceback
from pathlib import Path

import torch
from torch._subclasses import fake_tensor

from bursar.errors import BursarError, DataDependent, TraceFailed

_OURS = str(Path(__file__).resolve().parent.parent)
_TORCH = str(Path(torch.__file__).resolve().parent)
_NO_FAKE = re.compile(r"There was no fake impl registered for <CustomOpDef\((.*?)\)>")  # torch/_library/custom_ops.py
_NO_DATA = re.compile(
    r"(The tensor has a non-zero number of elements, but its data is not allocated|Cannot access data"
    r"|Could not run 'aten::_local_scalar_dense')"
)
_NEEDS_DATA = (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException)


def note(error: BaseException, module: str) -> None:
    """Remember the innermost module an error passed through."""
    if not hasattr(error, "bursar_module"):
        error.bursar_module = module  # type: ignore[attr-defined]


def user_line(error: BaseException) -> str:
    """``file.py:12: code`` of the innermost frame that is neither torch's nor ours; empty when there is none."""
    found = ""
    for frame in traceback.extract_tb(error.__traceback__):
        path = str(Path(frame.filename).resolve()) if not frame.filename.startswith("<") else frame.filename
        inside = path.startswith((_OURS, _TORCH, sys.base_prefix + "/lib/python")) and "/workload/modules/" not in path
        if not inside:
            found = f"{frame.filename}:{frame.lineno}: {frame.line}"
    return found


def explain(error: BaseException, on: str | None) -> BursarError | None:
    """The error a user should see instead of ``error``, or None when their own is the better one."""
    module, where = getattr(error, "bursar_module", ""), user_line(error) or "an unknown line"
    func = getattr(error, "func", None) or (error.args[0] if error.args else "an op")
    in_cpp = isinstance(error, RuntimeError) and _NO_DATA.match(str(error))
    if in_cpp:
        func = "an op"
    if isinstance(error, _NEEDS_DATA) or in_cpp:
        return DataDependent(
            module,
            where,
            f"{func} needs the values of a tensor and a trace has only shapes. Take the value from a Python number, or "
            "write it without data: torch.where for a branch, a multiplied mask for x[x > 0], no .item() in forward.",
        )
    if isinstance(error, RecursionError):
        return TraceFailed(
            f"the model calls itself without end (in {module or 'the model'}, at {where}): Python's limit of "
            f"{sys.getrecursionlimit()} nested calls was reached. Does a forward call its own module?"
        )
    if isinstance(error, RuntimeError) and str(error).startswith("Storage size calculation overflowed"):
        return TraceFailed(
            f"a tensor of {str(error).rpartition('sizes=')[2]} (in {module or 'the model'}, at {where}) has more bytes "
            "than 64 bits can count; no accelerator holds it. Make the model smaller."
        )
    unregistered = _NO_FAKE.match(str(error)) if isinstance(error, RuntimeError) else None
    if unregistered or isinstance(error, fake_tensor.UnsupportedOperatorException):
        name = unregistered[1] if unregistered else str(func).rsplit(".", 1)[0].replace(".", "::", 1)
        return TraceFailed(
            f"the operator {name} (in {module or 'the model'}, at {where}) has no fake kernel, so the shape of its "
            f"output is unknown. Give it one: @torch.library.register_fake({name!r}) on a function that returns an "
            "empty tensor of that shape."
        )
    return None
