"""torch's own op database: every op traces forward and backward, is priced, or stands in a list with its reason.

The first samples of each op here; all of them in ``benchmarks/op_database.py``.
"""

from __future__ import annotations

import zlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bursar.rules import MODEL_KINDS
from bursar.trace import tracing
from op_database import (
    CLEAN,
    UNPRICED,
    ReductionOpInfo,
    UnaryUfuncInfo,
    first_trouble,
    name_of,
    op_db,
    run,
    samples_of,
    survey,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's samples warn of what torch deprecates


def a_third(ops):
    return [op for op in ops if zlib.crc32(name_of(op).encode()) % 3 == 0]


@pytest.mark.parametrize("on", [None, "cpu"])
def test_every_op_of_torchs_database_is_priced_but_for_those_listed_with_a_reason(on):
    ops = a_third(op_db) if on == "cpu" else op_db
    wrong = {name: why for name, _, why in survey(on, 1, ops) if why and name not in UNPRICED[on]}
    assert wrong == {}
    assert len(op_db) - len(UNPRICED[on]) >= 0.98 * len(op_db) > 600


@pytest.mark.parametrize("on", [None, "cpu"])
def test_the_list_of_exceptions_has_no_op_that_could_be_priced(on):
    listed = [op for op in op_db if name_of(op) in UNPRICED[on]]
    assert {name_of(op) for op in listed} == set(UNPRICED[on])
    troubles = {name_of(op): first_trouble(op, on) for op in listed}
    assert [name for name, why in troubles.items() if not why] == []
    needs_a_gpu = {name for name in UNPRICED[on] if name.startswith("jiterator")}
    for name in troubles.keys() - needs_a_gpu:  # no crash, but an error of ours with the way out
        assert troubles[name][0].startswith(CLEAN), troubles[name]


RIGHT_IN_TORCH = (
    "addmm mm bmm baddbmm matmul __rmatmul__ einsum inner tensordot linalg.multi_dot chain_matmul nn.functional.linear "
    "nn.functional.conv1d nn.functional.conv2d nn.functional.conv3d nn.functional.conv_transpose1d "
    "nn.functional.conv_transpose2d nn.functional.conv_transpose3d"
).split()


NO_RULE_IN_TORCH = {"aten.mv", "aten.dot", "aten.vdot"}


def test_products_and_convolutions_count_what_torchs_counter_counts():
    compared = 0
    for op in op_db:
        if op.name not in RIGHT_IN_TORCH or op.variant_test_name:
            continue
        for sample in samples_of(op, 4)[0]:
            with FlopCounterMode(display=False) as theirs, torch.no_grad():
                op.op(sample.input, *sample.args, **sample.kwargs)
            with tracing(on="cpu") as t, torch.no_grad():
                run(op, sample, "cpu", wants_grad=False)
            mine = sum(
                r.work.flops for r in t.ledger.recorded if r.kind in MODEL_KINDS and r.op not in NO_RULE_IN_TORCH
            )
            assert mine == theirs.get_total_flops(), (op.name, sample)
            compared += mine > 0
    assert compared > 30


def forward_rows(op, sample):
    with tracing() as t:
        run(op, sample, "cuda", wants_grad=False)
    return [r for r in t.ledger.recorded if r.kind != "copy" and not r.op.endswith("copy_")]


def test_a_function_of_one_tensor_costs_one_flop_per_element():
    compared = 0
    for op in a_third(op_db):
        if not isinstance(op, UnaryUfuncInfo) or name_of(op) in UNPRICED[None]:
            continue
        sample = samples_of(op, 1)[0][0]
        rows = forward_rows(op, sample)
        if len(rows) != 1 or sample.args or not torch.is_floating_point(sample.input):
            continue
        assert rows[0].work.flops == sample.input.numel(), op.name
        compared += 1
    assert compared > 20


PER_ELEMENT = {"sum": 1, "mean": 1, "amax": 1, "amin": 1, "prod": 1, "nansum": 1, "argmax": 1, "argmin": 1, "all": 1,
               "any": 1, "std": 4, "var": 4, "linalg.vector_norm": 2, "count_nonzero": 1}  # fmt: skip


def test_a_reduction_costs_its_flops_per_input_element():
    compared = set()
    for op in op_db:
        if not isinstance(op, ReductionOpInfo) or op.name not in PER_ELEMENT or op.variant_test_name:
            continue
        for sample in samples_of(op, 3)[0]:
            rows = forward_rows(op, sample)
            if len(rows) == 1 and rows[0].kind == "reduction" and sample.input.numel():
                assert rows[0].work.flops == PER_ELEMENT[op.name] * sample.input.numel(), (op.name, rows)
                compared.add(op.name)
    assert len(compared) >= 10, compared
