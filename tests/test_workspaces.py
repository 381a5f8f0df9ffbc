"""What libraries set aside on a GPU: from their sources, by hand."""

from __future__ import annotations

import functools

import pytest

from bursar.hardware import cluster
from bursar.workload.step import step
from bursar.workspaces import workspaces

MiB = 2**20


@functools.cache
def ledger(precision="bf16-mixed"):
    return step("gpt2:L=1,d=96,h=4,V=100", batch_size=2, seq_len=200, precision=precision)


def named(on, precision="bf16-mixed"):
    return {w.name.split()[0].rstrip(","): w for w in workspaces(ledger(precision), cluster(on))}


@pytest.mark.parametrize(("on", "each"), [("h100-sxm", 32 * MiB), ("h200", 32 * MiB), ("a100-80g-sxm", 8_519_680),
                                          ("l4", 8_519_680)])  # fmt: skip
def test_cublas_keeps_a_workspace_for_forwards_thread_and_one_for_backwards(on, each):
    found = named(on)["cuBLAS"]
    assert found.n_bytes == 2 * each
    assert found.allocated


def test_flash_attentions_backward_sums_the_querys_gradient_in_fp32():
    rows, columns = 256, 32  # 200 queries filled up to 128s, a head of 24 to 32s
    assert named("h100-sxm")["flash"].n_bytes == 4 * 2 * 4 * rows * (columns + 1)
    assert "flash" not in named("h100-sxm", "fp32")  # another kernel


def test_a_communicators_buffers_are_outside_the_allocator_and_only_with_ranks():
    assert "NCCL's" not in named("h100-sxm")
    found = named("8xh100-sxm")["NCCL's"]
    assert not found.allocated
    assert found.source == "nccl#964"


def test_of_other_makers_nothing_is_said():
    assert workspaces(ledger(), cluster("mi300x")) == ()
