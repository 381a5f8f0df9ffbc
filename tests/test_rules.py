"""What one op costs: hand arithmetic, a second derivation at random shapes, torch's own counter, and the tables' holes.

B batch   S sequence   H heads   d head size   D width   N images   C channels   m k n the sides of a matrix product
"""

from __future__ import annotations

import functools
import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from bursar import rules
from bursar.rules import Op, Tensor, Work
from bursar.rules.attention import pairs
from bursar.trace import tracing
from bursar.workload import presets

aten = torch.ops.aten
few = settings(max_examples=12, deadline=None, derandomize=True, database=None)
ways = pytest.mark.parametrize("on", [None, "cpu"])


def side(most=9):
    return st.integers(1, most)


def device_of(on):
    return "cpu" if on == "cpu" else "cuda"


def traced(run, on=None):
    """The ledger of ``run(device)``."""
    with tracing(on=on) as t:
        run(device_of(on))
    return t.ledger


def counts(ledger):
    return ledger.flops.forward, ledger.flops.backward


def op_of(ledger, name):
    """The one row of that op."""
    (row,) = [r for r in ledger.recorded if r.op == name]
    return row


def two_layers():
    return nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 10, bias=False))


# ---- known figures


@ways
def test_two_layers_cost_two_flops_per_weight_and_sample_forward_and_twice_that_less_dx_backward(on):
    flops = traced(lambda dev: two_layers().to(dev)(torch.randn(64, 512, device=dev)).sum().backward(), on).flops
    first, second = 2 * 64 * 512 * 512, 2 * 64 * 512 * 10
    assert flops.forward == first + second == 34_209_792
    assert flops.backward == first + 2 * second == 34_865_152  # the first layer has no dX to compute


@ways
def test_backward_costs_twice_forward_when_the_input_wants_a_gradient(on):
    def run(dev):
        two_layers().to(dev)(torch.randn(64, 512, device=dev, requires_grad=True)).sum().backward()

    assert traced(run, on).flops.backward == 2 * 34_209_792 == 68_419_584


class LoRA(nn.Module):
    """A frozen D x D base and two trained factors of rank r."""

    def __init__(self, D, r):
        super().__init__()
        self.base, self.down, self.up = (nn.Linear(*s, bias=False) for s in ((D, D), (D, r), (r, D)))
        self.base.weight.requires_grad_(False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@ways
def test_lora_computes_no_gradient_for_the_frozen_base_but_carries_one_through_it(on):
    def run(dev):
        nn.Sequential(LoRA(512, 8), LoRA(512, 8)).to(dev)(torch.randn(64, 512, device=dev)).sum().backward()

    base, factor = 2 * 64 * 512 * 512, 2 * 64 * 512 * 8
    forward, backward = counts(traced(run, on))
    assert forward == 2 * (base + 2 * factor) == 69_206_016
    # second: dX of base, and dX and dW of both factors; first: dW of both factors, dX of the upper one
    assert backward == (base + 4 * factor) + 3 * factor == 37_224_448


@pytest.mark.parametrize(
    ("on", "dtype", "kernel"),
    [
        (None, torch.bfloat16, "aten._scaled_dot_product_flash_attention"),
        (None, torch.float32, "aten._scaled_dot_product_efficient_attention"),
        ("cpu", torch.float32, "aten._scaled_dot_product_flash_attention_for_cpu"),
    ],
)
def test_causal_attention_counts_only_the_pairs_the_mask_lets_through(on, dtype, kernel):
    def run(dev):
        q, k, v = (torch.randn(2, 4, 64, 32, device=dev, dtype=dtype, requires_grad=True) for _ in range(3))
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    ledger = traced(run, on)
    seen = 64 * 65 // 2
    assert counts(ledger) == (4 * seen * 32 * (2 * 4), 8 * seen * 32 * (2 * 4)) == (2_129_920, 4_259_840)
    assert ledger.flops.recompute == 2 * seen * 32 * (2 * 4)  # QK^T again, because the scores were not kept
    assert ledger.flops.backward + ledger.flops.recompute == 5_324_800
    assert op_of(ledger, kernel).work.full_square_flops == 4 * 64 * 64 * 32 * (2 * 4)
    assert ledger.flops.attention_full_square == (4 + 8 + 2) * 64 * 64 * 32 * (2 * 4)


@ways
def test_a_depthwise_convolution_costs_one_channel_per_group_in_backward_too(on):
    def run(dev):
        convs = nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False) for _ in range(2)))
        convs.to(dev)(torch.randn(2, 32, 32, 32, device=dev)).sum().backward()

    one = 2 * (2 * 32 * 32 * 32) * 9  # nine multiply-adds for each output element
    assert counts(traced(run, on)) == (2 * one, 3 * one) == (2_359_296, 3_538_944)


def test_resnet50_at_224_costs_8_178_368_512_flops_forward():
    def run(dev):
        presets.build("resnet50").make_model().to(dev)(torch.randn(1, 3, 224, 224, device=dev)).sum().backward()

    stem = 2 * 64 * 112 * 112 * 3 * 7 * 7
    forward, backward = counts(traced(run))
    assert forward == 8_178_368_512
    assert backward == 2 * forward - stem == 16_120_709_120  # the image wants no gradient


@ways
def test_a_checkpoint_that_may_stop_early_recomputes_all_but_the_last_layer(on):
    def run(dev):
        checkpoint(two_layers().to(dev), torch.randn(64, 512, device=dev), use_reentrant=False).sum().backward()

    flops = traced(run, on).flops
    assert flops.recompute == 2 * 64 * 512 * 512 == 33_554_432  # what the last layer saved is there once it is entered
    assert (flops.forward, flops.backward) == (34_209_792, 34_865_152)
    assert flops.hardware == flops.model + 33_554_432


@ways
def test_a_reentrant_checkpoint_recomputes_everything_inside_it(on):
    def run(dev, whole):
        net, x = two_layers().to(dev), torch.randn(64, 512, device=dev, requires_grad=True)
        y = checkpoint(net, x, use_reentrant=True) if whole else net[1](checkpoint(net[0], x, use_reentrant=True))
        y.sum().backward()

    both = traced(functools.partial(run, whole=True), on).flops
    first = traced(functools.partial(run, whole=False), on).flops
    assert both.recompute == both.forward == 34_209_792
    assert first.recompute == 33_554_432
    assert both.backward == first.backward == 68_419_584


def test_a_large_product_is_counted_exactly():
    def run(dev):
        torch.empty(16384, 32768, device=dev) @ torch.empty(32768, 8192, device=dev)

    assert traced(run).flops.forward == 2 * 16384 * 32768 * 8192 == 2**43


# ---- the same figures, derived another way at random shapes


@few
@given(m=side(), k=side(), n=side(), bias=st.booleans(), wants_dx=st.booleans())
def test_a_linear_layer_costs_2k_per_output_and_each_gradient_asked_for_as_much_again(m, k, n, bias, wants_dx):
    def run(dev):
        x = torch.randn(m, k, device=dev, requires_grad=wants_dx)
        nn.Linear(k, n, bias=bias).to(dev)(x).sum().backward()

    per_output = 2 * k  # k multiplies, k adds
    assert counts(traced(run)) == (m * n * per_output, m * n * per_output * (1 + wants_dx))


@few
@given(B=side(5), m=side(), k=st.integers(2, 9), n=side(), beta=st.sampled_from([0, 1]))
def test_batched_products_cost_one_product_per_sample(B, m, k, n, beta):  # with k = 1 einsum multiplies elementwise
    def run(dev):
        a, b, c = (torch.randn(*s, device=dev) for s in ((B, m, k), (B, k, n), (B, m, n)))
        a @ b, torch.baddbmm(c, a, b, beta=beta), torch.addbmm(c[0], a, b), torch.einsum("bmk,bkn->bmn", a, b)

    assert traced(run).flops.forward == 4 * sum(2 * k for _ in range(B * m * n))


@few
@given(m=side(), k=side(), n=side())
def test_the_small_products_cost_two_flops_per_multiply_add(m, k, n):
    def run(dev):
        a, b, v = torch.randn(m, k, device=dev), torch.randn(k, n, device=dev), torch.randn(k, device=dev)
        a @ b, torch.addmm(torch.randn(n, device=dev), a, b), a @ v, torch.addmv(a[:, 0], a, v), v @ v

    matrix = sum(2 for _ in itertools.product(range(m), range(k), range(n)))
    vector = sum(2 for _ in itertools.product(range(m), range(k)))
    assert traced(run).flops.forward == 2 * matrix + 2 * vector + 2 * k


def multiply_adds(shape_out, channels_in, kernel, groups):
    """Every element of the output meets each weight of its filter once."""
    return sum(channels_in // groups * kernel for _ in range(math.prod(shape_out)))


@st.composite
def convolutions(draw):
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 4]))
    kernel, stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    c_in, c_out = groups * draw(side(3)), groups * draw(side(3))
    size = [dilation * (kernel - 1) + draw(side(4)) for _ in range(dims)]
    return dims, draw(side(3)), c_in, c_out, groups, kernel, stride, dilation, draw(st.integers(0, 1)), size


@few
@given(shape=convolutions(), wants_dx=st.booleans(), on=st.sampled_from([None, "cpu"]))
def test_convolutions_of_every_sort_cost_their_multiply_adds(shape, wants_dx, on):
    dims, N, c_in, c_out, groups, kernel, stride, dilation, padding, size = shape
    outs = []

    def run(dev):
        make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        conv = make(c_in, c_out, kernel, stride, padding, dilation, groups).to(dev)
        y = conv(torch.randn(N, c_in, *size, device=dev, requires_grad=wants_dx))
        outs.append(tuple(y.shape))
        y.sum().backward()

    ledger = traced(run, on)
    one = 2 * multiply_adds(outs[0], c_in, kernel**dims, groups)
    assert counts(ledger) == (one, one * (1 + wants_dx))


@few
@given(shape=convolutions(), wants_dx=st.booleans())
def test_a_transposed_convolution_costs_what_its_convolution_would(shape, wants_dx):
    dims, N, c_in, c_out, groups, kernel, stride, dilation, _, size = shape

    def run(dev):
        make = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
        conv = make(c_in, c_out, kernel, stride, groups=groups, dilation=dilation).to(dev)
        conv(torch.randn(N, c_in, *size, device=dev, requires_grad=wants_dx)).sum().backward()

    # every input element meets every weight of its group's filters once
    one = 2 * multiply_adds((N, c_in, *size), c_out, kernel**dims, groups)
    assert counts(traced(run)) == (one, one * (1 + wants_dx))


@given(
    S=st.integers(1, 12), T=st.integers(1, 12), causal=st.booleans(),
    left=st.none() | st.integers(0, 13), right=st.none() | st.integers(0, 13),
)  # fmt: skip
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_pairs_are_those_a_loop_over_queries_and_keys_would_visit(S, T, causal, left, right):
    def visible(i, j):
        past = left is None or j >= i - left
        future = right is None or causal or j <= i + right
        return past and future and (not causal or j <= i)

    assert pairs(S, T, causal, left, right) == sum(visible(i, j) for i in range(S) for j in range(T))


@few
@given(B=side(3), H=side(3), S=side(12), d=st.sampled_from([8, 16, 32]))
def test_without_a_mask_the_fused_kernels_and_plain_products_count_alike(B, H, S, d):
    def run(dev, how):
        q, k, v = (torch.randn(B, H, S, d, device=dev, requires_grad=True) for _ in range(3))
        if how == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) / math.sqrt(d)).softmax(-1) @ v
        y.sum().backward()

    fused, plain = (traced(functools.partial(run, how=how)).flops for how in ("fused", "plain"))
    assert (fused.forward, fused.backward) == (plain.forward, plain.backward)
    assert fused.by_kind["attention"] == fused.hardware
    assert plain.by_kind["matmul"] == plain.hardware == fused.model


def test_grouped_queries_cost_what_their_query_heads_do():
    def run(dev, kv_heads):
        q = torch.randn(1, 8, 16, 32, device=dev, dtype=torch.bfloat16)
        k, v = (torch.randn(1, kv_heads, 16, 32, device=dev, dtype=torch.bfloat16) for _ in range(2))
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    grouped, full = (traced(functools.partial(run, kv_heads=n)) for n in (2, 8))
    assert grouped.flops.forward == full.flops.forward == 4 * (16 * 17 // 2) * 32 * 8
    assert sum(grouped.bytes_moved.values()) < sum(full.bytes_moved.values())


class Net(nn.Module):
    def __init__(self, tied, recompute=False):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        if tied:
            for layer in self.layers:
                layer.weight = self.layers[0].weight
        self.recompute = recompute

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = checkpoint(self.block, layer, x, use_reentrant=False) if self.recompute else self.block(layer, x)
        return x

    @staticmethod
    def block(layer, x):
        return F.gelu(layer(x)).cos()  # cos needs what gelu returns, so the layer is run again


def net_flops(B=2, S=4, tied=False, recompute=False, on=None):
    def run(dev):
        tokens = torch.zeros(B, S, dtype=torch.long, device=dev)
        Net(tied, recompute).to(dev)(tokens).sum().backward()

    return traced(run, on).flops


@few
@given(B=side(6), S=side(6))
def test_model_flops_are_linear_in_batch_and_in_sequence_without_attention(B, S):
    one, many = net_flops(1, 1), net_flops(B, S)
    assert (many.forward, many.backward) == (B * S * one.forward, B * S * one.backward)


@ways
def test_sharing_a_weight_saves_no_flops(on):
    assert net_flops(tied=True, on=on).model == net_flops(tied=False, on=on).model


@ways
def test_a_checkpoint_raises_hardware_flops_and_nothing_else(on):
    plain, recomputed = net_flops(recompute=False, on=on), net_flops(recompute=True, on=on)
    assert (recomputed.forward, recomputed.backward) == (plain.forward, plain.backward)
    assert plain.hardware == plain.model
    assert recomputed.hardware == plain.hardware + plain.forward


# ---- torch's own counter, where it counts rightly


@pytest.mark.parametrize(
    "make",
    [
        lambda: (nn.Linear(12, 7), (5, 12)),
        lambda: (nn.Linear(12, 7, bias=False), (5, 12)),
        lambda: (nn.Bilinear(4, 4, 3), None),
        lambda: (nn.Conv1d(3, 6, 3), (2, 3, 10)),
        lambda: (nn.Conv2d(3, 6, 3, stride=2, padding=1), (2, 3, 9, 9)),
        lambda: (nn.Conv3d(3, 6, 2), (2, 3, 4, 5, 4)),
        lambda: (nn.ConvTranspose2d(6, 3, 3, stride=2), (2, 6, 5, 5)),
    ],
    ids=["addmm", "mm", "bmm", "conv1d", "conv2d", "conv3d", "conv_transpose2d"],
)
def test_the_count_is_that_of_torch_where_torch_counts_rightly(make):
    module, shape = make()

    def step():
        if shape is None:  # not the module: a batched product
            a, b = (torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, 5, 6, requires_grad=True))
            (a @ b).sum().backward()
        else:
            module(torch.randn(*shape, requires_grad=True)).sum().backward()

    with FlopCounterMode(display=False) as theirs:
        step()
    assert traced(lambda dev: step(), "cpu").flops.model == theirs.get_total_flops() > 0


# ---- the tables

FREE_THOUGH_NO_VIEW_BY_SCHEMA = {
    # bare allocations: they name memory without touching it
    "aten.empty", "aten.empty_like", "aten.empty_strided", "aten.empty_permuted", "aten.new_empty",
    "aten.new_empty_strided",
    # views in place, and views that torch's schema hides from autograd
    "aten.detach_", "aten.as_strided_", "aten.squeeze_", "aten.unsqueeze_", "aten.t_", "aten.transpose_",
    "aten.requires_grad_",
    "aten._unsafe_view", "aten.unsafe_split", "aten.unsafe_chunk", "aten.unsafe_split_with_sizes", "aten.lift",
    # what a storage is, not what is in it
    "aten.set_", "aten.resize_", "aten.resize_as_", "aten.record_stream",
    # questions about shapes, answered on the host
    "aten.sym_size", "aten.sym_stride", "aten.sym_numel", "aten.sym_storage_offset", "aten.is_same_size",
    "aten._shape_as_tensor", "aten._nested_tensor_size", "aten._version", "aten._has_compatible_shallow_copy_type",
    "aten._has_same_storage_numel",
    # one scalar to the host
    "aten._local_scalar_dense", "aten.is_nonzero", "aten._assert_async", "aten._functional_assert_async",
    "aten._assert_scalar", "aten._linalg_check_errors",
    # a sparse tensor is put together of what is there, and asked for its parts; a zero tensor without memory
    "aten._sparse_coo_tensor_unsafe", "aten._sparse_compressed_tensor_unsafe", "aten._coalesced_", "aten._nnz",
    "aten._sparse_coo_tensor_with_dims_and_tensors", "aten.sparse_dim", "aten.dense_dim", "aten.is_coalesced",
    "aten._efficientzerotensor", "aten.sparse_compressed_tensor",
}  # fmt: skip


def overloads(name):
    packet = getattr(aten, name.removeprefix("aten."))
    return [getattr(packet, overload) for overload in packet.overloads()]


def is_view(op):
    return any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)


def test_every_free_op_is_a_view_by_torchs_schema_or_stands_in_a_short_list():
    no_views = {
        name
        for name in rules.FREE
        if not any(is_view(op) for op in overloads(name) if any("Tensor" in str(r.type) for r in op._schema.returns))
    }
    assert no_views == FREE_THOUGH_NO_VIEW_BY_SCHEMA


def test_a_copy_is_not_a_view_by_that_measure():
    assert not any(is_view(op) for name in ("aten.clone", "aten.mm", "aten._to_copy") for op in overloads(name))


def test_every_rule_is_for_an_op_that_torch_has():
    names = [n for n in rules.RULES if n.startswith("aten.")]
    assert [n for n in names if not hasattr(aten, n.removeprefix("aten."))] == []
    assert not hasattr(aten, "no_such_op")


def test_no_op_is_both_free_and_priced():
    assert not rules.FREE & rules.RULES.keys()


def test_an_op_that_is_not_free_moves_bytes():
    def run(dev):
        tokens = torch.zeros(2, 4, dtype=torch.long, device=dev)
        net = nn.Sequential(Net(tied=False), nn.LayerNorm(16), nn.Dropout(0.1), nn.Flatten(), nn.Linear(64, 3)).to(dev)
        optimizer = torch.optim.AdamW(net.parameters())
        F.cross_entropy(net(tokens), tokens[:, 0]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

    for on in (None, "cpu"):
        rows = traced(run, on).recorded
        assert len(rows) > 50
        for row in rows:
            assert row.op in rules.FREE or row.work.read_bytes + row.work.written_bytes > 0, row


# ---- nothing is zero in silence


@torch.library.custom_op("bursar_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@twice.register_fake
def _(x):
    return torch.empty_like(x)


@ways
def test_ops_without_a_rule_are_named_with_their_calls_and_bytes(on):
    def run(dev):
        twice(twice(torch.randn(6, 4, device=dev)))

    (found,) = traced(run, on).uncounted
    assert (found.op, found.calls) == ("bursar_tests.twice", 2)
    assert found.bytes == 2 * (6 * 4 + 6 * 4) * 4  # read and written, twice


def test_a_custom_op_with_a_rule_is_counted(monkeypatch):
    monkeypatch.setattr(rules, "RULES", dict(rules.RULES))
    rules.rule("bursar_tests.twice", kind="elementwise")(lambda op: op.moving(op["x"].numel))
    ledger = traced(lambda dev: twice(torch.randn(6, 4, device=dev)))
    assert ledger.uncounted == ()
    assert ledger.flops.by_kind["elementwise"] == 24


def test_an_unknown_op_costs_none_and_not_nothing():
    x = Tensor((3,), "fp32", 12)
    assert rules.cost(Op("mine.op", {"x": x}, (x,))) is None
    assert rules.cost(Op("mine.op", {"x": x}, (x,), frozenset({"pointwise"}))) == ("elementwise", Work(3, 12, 12))
    assert rules.cost(Op("mine.op", {"x": x}, (Tensor((), "fp32", 4),), frozenset({"reduction"}))) == (
        "reduction",
        Work(3, 12, 4),
    )


def test_registering_an_op_twice_is_an_error():
    with pytest.raises(ValueError, match=re.escape("aten.mm already has a rule, mm")):
        rules.rule("aten.mm", kind="matmul")(lambda op: Work())
    assert rules.RULES["aten.mm"].work is rules.matmul.mm


def test_a_kind_that_is_none_is_an_error_that_names_the_kinds():
    with pytest.raises(ValueError, match="no kind 'matmull'; the kinds are matmul, attention"):
        rules.rule("aten.fresh", kind="matmull")
    assert "aten.fresh" not in rules.RULES


# ---- bytes moved


def moved(name, run):
    """Bytes read and written by the one op ``name`` in ``run(device)``."""
    work = op_of(traced(run), name).work
    return work.read_bytes, work.written_bytes


def test_a_square_reads_its_input_once():
    def square(dev):
        x = torch.randn(10, device=dev)
        x * x

    def product(dev):
        torch.randn(10, device=dev) * torch.randn(10, device=dev)

    assert moved("aten.mul", square) == (40, 40)
    assert moved("aten.mul", product) == (80, 40)


def test_a_broadcast_view_is_read_as_stored():
    def run(dev):
        torch.randn(1, 5, device=dev).expand(100, 5) + torch.randn(100, 5, device=dev)

    assert moved("aten.add", run) == ((5 + 500) * 4, 500 * 4)


def test_an_embedding_reads_the_rows_it_touches():
    def run(dev):
        F.embedding(torch.zeros(3, dtype=torch.long, device=dev), torch.randn(1000, 8, device=dev))

    rows = 3 * 8 * 4
    assert moved("aten.embedding", run) == (3 * 8 + rows, rows)


def test_a_copy_does_not_read_its_target():
    def run(dev):
        torch.empty(10, device=dev).copy_(torch.zeros(10, device=dev, dtype=torch.bfloat16))

    assert moved("aten.copy_", run) == (10 * 2, 10 * 4)


def test_an_out_tensor_is_written_and_not_read():
    def run(dev):
        torch.mm(torch.ones(2, 3, device=dev), torch.ones(3, 4, device=dev), out=torch.empty(2, 4, device=dev))

    assert moved("aten.mm", run) == ((6 + 12) * 4, 8 * 4)


@pytest.mark.parametrize(("beta", "scores_read"), [(0, 0), (1, 1)])
def test_baddbmm_reads_self_only_when_beta_asks_for_it(beta, scores_read):
    def run(dev):
        a, b, c = (torch.empty(*s, device=dev) for s in ((2, 3, 5), (2, 5, 4), (2, 3, 4)))
        torch.baddbmm(c, a, b, beta=beta)

    assert moved("aten.baddbmm", run) == ((30 + 40 + 24 * scores_read) * 4, 24 * 4)


def test_a_foreach_op_moves_every_tensor_of_its_lists():
    def run(dev):
        xs, ys = ([torch.ones(n, device=dev) for n in (3, 4)] for _ in range(2))
        torch._foreach_add_(xs, ys)
        torch._foreach_addcmul_(xs, ys, ys)
        torch._foreach_copy_(xs, ys)

    rows = {r.op: r.work for r in traced(run).recorded}
    assert rows["aten._foreach_add_"] == Work(7, 14 * 4, 7 * 4)
    assert rows["aten._foreach_addcmul_"] == Work(3 * 7, 14 * 4, 7 * 4)
    assert rows["aten._foreach_copy_"] == Work(0, 7 * 4, 7 * 4)


def test_views_move_nothing_and_leave_no_row():
    def run(dev):
        x = torch.empty(4, 6, device=dev)
        x.view(2, 12)[0].unsqueeze(0).expand(3, 12).detach().t().permute(1, 0)

    assert [r.op for r in traced(run).recorded] == ["aten.empty"]


def test_integer_arithmetic_is_no_flop():
    def run(dev):
        n = torch.ones(5, dtype=torch.long, device=dev)
        (n + n).sum()

    assert traced(run).flops.total == 0


def test_a_complex_number_put_together_is_moved_and_not_computed():
    part = Tensor((16, 64), "fp32", 4096)
    made = Tensor((16, 64), "complex64", 8192)
    op = Op("aten.complex", {"real": part, "imag": part}, (made,), frozenset({"pointwise"}))
    assert rules.cost(op) == ("copy", rules.Work(0, 8192, 8192))
