"""torch's own database of ops and their sample inputs, run under a trace: what crashes, what is uncounted, and why not.

Used by the tests, on a few samples of each op, and by ``benchmarks/op_database.py``, on all of them.
"""

from __future__ import annotations

import contextlib
import random
import sys
import types
import unittest
import warnings
import zlib
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves, tree_map

# The database comes with torch's test harness, which derives a class from this package's; nothing here uses it
sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal import common_utils
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.opinfo.core import ReductionOpInfo, UnaryUfuncInfo
# That harness forbids to set torch.backends' flags, for the whole process; other tests set them
torch.backends.__dict__["__allow_nonbracketed_mutation_flag"] = True

from bursar.trace import tracing  # noqa: E402

__all__ = ["ReductionOpInfo", "UnaryUfuncInfo"]  # for the tests, which could not import them

FROM_FIRST = 4  # a generator may make thousands

# What a trace cannot price, why, and the error it gives; on a fake GPU (None) or with on="cpu"
_JITERATOR = "compiles CUDA source when called: needs a GPU's compiler"
UNPRICED = {
    None: {
        "jiterator_unary": _JITERATOR, "jiterator_binary": _JITERATOR, "jiterator_2inputs_2outputs": _JITERATOR,
        "jiterator_4inputs_with_extra_args": _JITERATOR, "jiterator_binary_return_by_ref": _JITERATOR,
        "sparse.mm.reduce": "torch has its backward on the CPU alone",
    },
    "cpu": {
        "tensor_split": "reads in C++ where to split",
        "jiterator_unary": _JITERATOR, "jiterator_binary": _JITERATOR, "jiterator_2inputs_2outputs": _JITERATOR,
        "jiterator_4inputs_with_extra_args": _JITERATOR, "jiterator_binary_return_by_ref": _JITERATOR,
    },
}  # fmt: skip
CLEAN = ("DataDependent", "TraceFailed")  # errors of ours, with a remedy; the rest are torch's own or crashes
_DTYPES = (torch.float32, torch.complex64, torch.int64, torch.bool, torch.float8_e4m3fn)


def name_of(op):
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def dtype_of(op):
    known = op.supported_dtypes("cpu") | op.supported_dtypes("cuda")
    return next(d for d in (*_DTYPES, *known) if d in known)


def samples_of(op, at_most=None):
    """Sample inputs on the host; of the first few, ``at_most`` drawn by a seed that the op's name gives."""
    dtype = dtype_of(op)
    wants_grad = op.supports_autograd and (dtype.is_floating_point or dtype.is_complex)
    torch.manual_seed(0)
    random.seed(0)
    found = []
    with contextlib.ExitStack() as stack:
        for device in (torch.cuda, torch.xpu):  # each sample is seeded, and a device not there keeps a stack of each
            stack.enter_context(mock.patch.object(device, "manual_seed_all"))
        # It looks for torch's own test among the callers, and reads the source of them all: half of the time
        stack.enter_context(mock.patch.object(common_utils, "extract_test_fn", return_value=None))
        for sample in op.sample_inputs("cpu", dtype, requires_grad=wants_grad):
            found.append(sample)
            if at_most is not None and len(found) == FROM_FIRST:
                break
    if at_most is None or len(found) <= at_most:
        return found, wants_grad
    return random.Random(zlib.crc32(name_of(op).encode())).sample(found, at_most), wants_grad


def moved(value, device):
    def move(x):
        if isinstance(x, torch.Tensor):
            return x.detach().to(device).requires_grad_(x.requires_grad)
        return torch.device(device) if isinstance(x, torch.device) else x

    return tree_map(move, value)


def run(op, sample, device, wants_grad):
    """The op forward and, if it can, backward."""
    args, kwargs = moved((sample.input, *sample.args), device), moved(sample.kwargs, device)
    if "device" in kwargs:
        kwargs["device"] = device
    result = sample.output_process_fn_grad(op.op(*args, **kwargs))
    outs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.requires_grad] if wants_grad else []
    if outs:
        sum((x.abs() if x.is_complex() else x).sum() for x in outs).backward()


def trouble(op, sample, on, wants_grad):
    """Why the sample cannot be priced: the error, or the ops uncounted; nothing where it is."""
    try:
        with tracing(on=on) as t:
            run(op, sample, "cpu" if on == "cpu" else "cuda", wants_grad)
    except Exception as error:  # whatever it is, it is reported
        return [f"{type(error).__name__}: {error}".splitlines()[0]]
    return [f"uncounted: {u.op}" for u in t.ledger.uncounted]


def survey(on, at_most=None, ops=None):
    """Yields (op's name, samples run, what is wrong with any of them) for each op of the database."""
    for op in op_db if ops is None else ops:
        samples, wants_grad = samples_of(op, at_most)
        found = {}
        for sample in samples:
            found.update(dict.fromkeys(trouble(op, sample, on, wants_grad)))
        yield name_of(op), len(samples), list(found)


def first_trouble(op, on):
    """What is wrong with the first sample that cannot be priced; nothing where all can."""
    samples, wants_grad = samples_of(op)
    return next((found for sample in samples if (found := trouble(op, sample, on, wants_grad))), [])
