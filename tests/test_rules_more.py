"""Recurrent layers, linear algebra, Fourier, sparse, resizing, operators that take functions: hand arithmetic for each.

B batch   T time steps   I input   H hidden   S sequence   E width   m k n the sides of a matrix product
"""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import bursar
from bursar import rules
from bursar.errors import DataDependent, TraceFailed
from bursar.rules import Op, Tensor, linalg
from bursar.trace import tracing

ways = pytest.mark.parametrize("on", [None, "cpu"])


def traced(run, on=None):
    """The ledger of ``run(device)``."""
    with tracing(on=on) as t:
        run("cpu" if on == "cpu" else "cuda")
    return t.ledger


def counts(ledger):
    assert ledger.uncounted == ()
    return ledger.flops.forward, ledger.flops.backward


# ---- products


@ways
def test_a_matrix_times_a_vector_costs_two_flops_per_element(on):
    ledger = traced(lambda dev: torch.randn(64, 32, device=dev) @ torch.randn(32, device=dev), on)
    assert counts(ledger) == (2 * 64 * 32, 0) == (4_096, 0)


@ways
def test_einsum_multiplies_from_left_to_right(on):
    def run(dev):
        a, b, c = (torch.randn(*s, device=dev) for s in ((64, 32), (32, 128), (128, 16)))
        torch.einsum("ij,jk,kl->il", a, b, c)

    assert counts(traced(run, on)) == (2 * 64 * 32 * 128 + 2 * 64 * 128 * 16, 0) == (786_432, 0)


@ways
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_grouped_product_costs_what_its_rows_cost(on, dtype):
    def run(dev):
        x, w = (torch.randn(*s, device=dev, dtype=dtype, requires_grad=True) for s in ((64, 32), (4, 32, 16)))
        torch._grouped_mm(x, w, offs=torch.tensor([16, 32, 48, 64], dtype=torch.int32, device=dev)).sum().backward()

    assert counts(traced(run, on)) == (2 * 64 * 32 * 16, 2 * 2 * 64 * 32 * 16) == (65_536, 131_072)


@ways
def test_fp8_and_integer_products_cost_what_others_do(on):
    def fp8(dev):
        a, b = (torch.randn(*s, device=dev).to(torch.float8_e4m3fn) for s in ((64, 32), (16, 32)))
        one = torch.ones((), device=dev)
        torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)

    def integers(dev):
        torch._int_mm(*(torch.ones(*s, dtype=torch.int8, device=dev) for s in ((64, 32), (32, 16))))

    assert counts(traced(fp8, on)) == counts(traced(integers, on)) == (65_536, 0)


@ways
def test_a_complex_product_is_four_real_ones(on):
    ledger = traced(lambda dev: torch.randn(3, 4, device=dev, dtype=torch.complex64) @ torch.randn(
        4, 5, device=dev, dtype=torch.complex64), on)  # fmt: skip
    assert counts(ledger) == (8 * 3 * 4 * 5, 0)


@ways
def test_a_bilinear_layer_meets_its_weights_and_then_the_second_input(on):
    B, first, second, out = 3, 8, 6, 5

    def run(dev):
        nn.Bilinear(first, second, out).to(dev)(torch.randn(B, first, device=dev), torch.randn(B, second, device=dev))

    assert counts(traced(run, on)) == (2 * B * out * first * second + 2 * B * out * second, 0)


@ways
def test_an_encoder_layer_in_eval_costs_the_same_fused_or_not(on):
    B, S, E, hidden = 2, 32, 64, 128

    def run(dev):
        layer = nn.TransformerEncoderLayer(E, 4, hidden, batch_first=True).to(dev).eval()
        with torch.no_grad():
            layer(torch.randn(B, S, E, device=dev))

    per_token = 2 * (4 * E * E + 2 * E * hidden)
    assert counts(traced(run, on)) == (B * S * per_token + 4 * B * S * S * E, 0) == (4_718_592, 0)


def test_muon_orthogonalises_in_five_steps_of_three_products():
    def run(dev):
        parameters = [nn.Parameter(torch.randn(128, 64, device=dev)) for _ in range(2)]
        for p in parameters:
            p.grad = torch.randn_like(p)
        torch.optim.Muon(parameters).step()

    products = 2 * 64 * 128 * 64 + 2 * 64**3 + 2 * 64 * 64 * 128  # A = XX^T, A @ A, (bA + cA²) @ X with X (64, 128)
    assert traced(run).flops.by_kind["matmul"] == 2 * 5 * products == 26_214_400


# ---- recurrent layers


def recurrent(kind, on, wants_dx=False, **more):
    def run(dev):
        shape = (4, 10, 32) if more.get("batch_first") else (10, 4, 32)
        kind(32, 64, **more).to(dev)(torch.randn(*shape, device=dev, requires_grad=wants_dx))[0].sum().backward()

    return counts(traced(run, on))


@ways
@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("wants_dx", [False, True])
def test_a_recurrent_layer_meets_both_weights_at_every_step(on, kind, gates, wants_dx):
    T, B, inputs, H = 10, 4, 32, 64
    of_x, of_h = 2 * B * gates * H * inputs, 2 * B * gates * H * H  # per step
    dx = T * of_x if wants_dx else 0
    # both dW at every step; back through time into every state but the first, which wants no gradient
    assert recurrent(kind, on, wants_dx) == (T * (of_x + of_h), T * (of_x + of_h) + (T - 1) * of_h + dx)


@ways
def test_an_lstm_of_ten_steps_costs_1_966_080_flops_forward_and_3_145_728_backward(on):
    assert recurrent(nn.LSTM, on) == (1_966_080, 3_145_728)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("bias", [True, False])
def test_deep_and_bidirectional_layers_count_alike_on_both_devices(kind, bias):
    more = {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": bias}
    assert recurrent(kind, None, True, **more) == recurrent(kind, "cpu", True, **more)


def test_a_cudnn_layer_counts_what_its_steps_do():
    def tensor(*shape):
        return Tensor(shape, "fp32", 4 * math.prod(shape))

    x, h = tensor(10, 4, 32), tensor(1, 4, 64)
    weights = [tensor(256, 32), tensor(256, 64), tensor(256), tensor(256)]
    forward = Op("aten._cudnn_rnn", {"input": x, "weight": weights, "hx": h, "cx": h}, (tensor(10, 4, 64),))
    backward = Op("aten._cudnn_rnn_backward", {**forward.args, "output_mask": (False, False, False, True)}, (x,))
    assert [rules.cost(op)[1].flops for op in (forward, backward)] == [1_966_080, 3_145_728]


# ---- lookups


@ways
@pytest.mark.parametrize(("mode", "divides"), [("sum", 0), ("mean", 1), ("max", 0)])
@pytest.mark.parametrize("sparse", [False, True])
def test_an_embedding_bag_adds_up_its_rows_and_spreads_the_gradient(on, mode, divides, sparse):
    if mode == "max" and sparse:
        pytest.skip("torch has none")
    bags, picked, D = 4, 20, 16

    def run(dev):
        bag = nn.EmbeddingBag(100, D, mode=mode, sparse=sparse).to(dev)
        bag(torch.zeros(picked, dtype=torch.long, device=dev), torch.arange(bags, device=dev) * 5).sum().backward()

    ledger = traced(run, on)
    assert ledger.uncounted == ()
    forward, backward = (
        next(r for r in ledger.recorded if r.op == f"aten._embedding_bag{s}") for s in ("", "_backward")
    )
    assert forward.work.flops == picked * D + divides * bags * D
    assert backward.work.flops == picked * D
    if sparse:
        assert backward.work.written_bytes == picked * D * 4 + picked * 8  # values and one index per row


# ---- linear algebra, by the textbook


@pytest.mark.parametrize(
    ("run", "flops"),
    [
        (lambda a: torch.linalg.cholesky(a), 30**3 // 3),
        (lambda a: torch.linalg.lu_factor(a), 2 * 30**3 // 3),
        (lambda a: torch.linalg.det(a), 2 * 30**3 // 3),
        (lambda a: torch.linalg.solve(a, a[:, :4]), 2 * 30**3 // 3 + 2 * 30**2 * 4),
        (lambda a: torch.linalg.solve(a, a[0]), 2 * 30**3 // 3 + 2 * 30**2),
        (lambda a: torch.linalg.inv(a), 2 * 30**3),
        (lambda a: torch.linalg.solve_triangular(a, a[:, :4], upper=True), 30**2 * 4),
        (lambda a: torch.linalg.qr(a[:, :12]), 2 * (2 * 30 * 12**2 - 2 * 12**3 // 3)),  # R, and as much for Q
        (lambda a: torch.linalg.eigh(a), 9 * 30**3),
        (lambda a: torch.linalg.svd(a[:, :12], full_matrices=False), 14 * 30 * 12**2 + 8 * 12**3),
        (lambda a: torch.linalg.lstsq(a[:, :12], a[:, :2]),
         2 * 30 * 12**2 - 2 * 12**3 // 3 + 4 * 30 * 12 * 2 - 2 * 12**2 * 2 + 12**2 * 2),
        (lambda a: torch.linalg.matrix_exp(a), 5 * 2 * 30**3),
    ],
    ids="cholesky lu det solve solve_vector inv triangular qr eigh svd lstsq matrix_exp".split(),
)  # fmt: skip
@ways
def test_factorisations_cost_lapacks_count(run, flops, on):
    ledger = traced(lambda dev: run(torch.randn(30, 30, device=dev)), on)
    assert ledger.uncounted == ()
    assert ledger.flops.forward == flops


def test_a_square_factorisation_equals_the_sum_over_its_columns():
    n = 40  # LU: below each pivot, a column scaled and a block updated by an outer product
    by_hand = sum((n - i - 1) + 2 * (n - i - 1) ** 2 for i in range(n))
    assert linalg.lu_flops(n, n) == pytest.approx(by_hand, rel=0.03)
    tall = sum(4 * (60 - i) * (n - i) for i in range(n))  # QR: each reflector meets the rest of the matrix, 4 a cell
    assert linalg.qr_flops(60, n) == pytest.approx(tall, rel=0.06)


def test_values_alone_are_cheaper_than_vectors():
    a = Tensor((30, 12), "fp32", 30 * 12 * 4)
    square = Tensor((30, 30), "fp32", 30 * 30 * 4)
    values = Tensor((12,), "fp32", 48)
    # fake tensors always ask for vectors (torch's rule for subclasses), so these are asked of the rules themselves
    svd = Op("aten._linalg_svd", {"A": a, "full_matrices": False, "compute_uv": False}, (values,))
    eigh = Op("aten._linalg_eigh", {"A": square, "compute_v": False}, (values,))
    assert rules.cost(svd)[1].flops == 4 * 30 * 12**2 - 4 * 12**3 // 3
    assert rules.cost(eigh)[1].flops == 4 * 30**3 // 3


def test_what_is_iterative_says_that_it_was_estimated():
    assert linalg.ITERATIVE in traced(lambda dev: torch.linalg.svd(torch.randn(5, 5, device=dev))).assumptions


@ways
def test_a_fourier_transform_costs_5_n_log_n_and_half_of_it_where_one_side_is_real(on):
    def run(dev):
        torch.fft.rfft(torch.randn(3, 1024, device=dev))
        torch.fft.fft2(torch.randn(8, 16, device=dev, dtype=torch.complex64))

    assert traced(run, on).flops.by_kind["reduction"] == 3 * 5 * 1024 * 10 // 2 + 5 * 128 * 7


# ---- sparse


@pytest.mark.filterwarnings("ignore:Sparse")  # torch's own: its invariants are unchecked, CSR is beta
@ways
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_a_sparse_product_costs_two_flops_per_element_stored_and_column(on, layout):
    def run(dev):
        at = torch.zeros(2, 20, dtype=torch.long, device=dev)
        values = torch.randn(20, device=dev)
        if layout == "coo":
            a = torch.sparse_coo_tensor(at, values, (64, 32))
        else:
            a = torch.sparse_csr_tensor(torch.zeros(65, dtype=torch.long, device=dev), at[0], values, size=(64, 32))
        a @ torch.randn(32, 16, device=dev)

    ledger = traced(run, on)
    assert counts(ledger) == (2 * 20 * 16, 0)
    (row,) = [r for r in ledger.recorded if r.op == "aten.mm"]
    indices = 20 * 8 * 2 if layout == "coo" else 20 * 8 + 65 * 8
    assert row.work.read_bytes == 20 * 4 + indices + 32 * 16 * 4


def test_a_sparse_matrix_carries_the_gradient_back_to_the_dense_one():
    real = torch.eye(8).to_sparse()

    def run(dev):
        a = real.to(dev)
        torch.sparse.mm(a, torch.randn(8, 3, device=dev, requires_grad=True)).sum().backward()

    assert counts(traced(run)) == (2 * 8 * 3, 2 * 8 * 3)


# ---- resizing


@ways
@pytest.mark.parametrize(("mode", "taps"), [("bilinear", 4), ("bicubic", 16)])
def test_resizing_costs_two_flops_per_tap_forward_and_backward(on, mode, taps):
    def run(dev):
        x = torch.randn(2, 3, 8, 8, device=dev, requires_grad=True)
        F.interpolate(x, scale_factor=2, mode=mode).sum().backward()

    rows = {r.op: r.work.flops for r in traced(run, on).recorded if "upsample" in r.op}
    assert rows == {f"aten.upsample_{mode}2d": 2 * taps * 2 * 3 * 16 * 16,
                    f"aten.upsample_{mode}2d_backward": 2 * taps * 2 * 3 * 16 * 16}  # fmt: skip


# ---- operators that take functions


@ways
def test_a_while_loop_runs_as_often_as_its_condition_says(on):
    def run(dev):
        w = torch.randn(32, 32, device=dev)
        start = (torch.tensor(0, device=dev), torch.randn(4, 32, device=dev))
        torch._higher_order_ops.while_loop(lambda i, x: i < 5, lambda i, x: (i + 1, x @ w), start)

    ledger = traced(run, on)
    assert counts(ledger) == (5 * 2 * 4 * 32 * 32, 0) == (40_960, 0)
    assert "a while_loop went round 5 times, found by running its condition" in ledger.assumptions


def test_a_while_loop_that_ends_by_its_data_names_the_line():
    def run(dev):
        torch._higher_order_ops.while_loop(lambda x: x.sum() < 5, lambda x: (x + 1,), (torch.randn(3, device=dev),))

    with pytest.raises(DataDependent, match=r"test_rules_more\.py"):
        traced(run)


@ways
def test_of_a_branch_on_data_the_dearer_one_counts_and_the_ledger_says_so(on):
    def run(dev):
        w = torch.randn(32, 32, device=dev, requires_grad=True)
        x = torch.randn(4, 32, device=dev)
        torch.cond(x.sum() > 0, lambda x: x @ w, lambda x: x @ w @ w, (x,)).sum().backward()

    one = 2 * 4 * 32 * 32
    ledger = traced(run, on)
    assert counts(ledger) == (2 * one, 3 * one)
    assert any("branch of torch.cond" in a for a in ledger.assumptions)


@ways
def test_scan_and_map_cost_their_body_once_per_step(on):
    from torch._higher_order_ops.map import map as over
    from torch._higher_order_ops.scan import scan

    def run(dev):
        w = torch.randn(32, 32, device=dev, requires_grad=True)
        xs = torch.randn(6, 4, 32, device=dev)
        over(lambda x: x @ w, xs).sum().backward()
        scan(lambda c, x: (c @ w + x, c.clone()), torch.zeros(4, 32, device=dev), xs)[0].sum().backward()

    one = 2 * 4 * 32 * 32
    # map: dW each; scan: dW each, and into every state but the first
    assert counts(traced(run, on)) == (12 * one, 6 * one + 6 * one + 5 * one)


def flex(dev, mask=None, S=256, score_mod=None):
    q, k, v = (torch.randn(2, 4, S, 32, device=dev, requires_grad=True) for _ in range(3))
    blocks = create_block_mask(mask, None, None, S, S, device=dev) if mask else None
    flex_attention(q, k, v, score_mod=score_mod, block_mask=blocks).sum().backward()


def test_flex_attention_counts_the_pairs_its_mask_function_lets_through():
    heads, S, d = 2 * 4, 256, 32
    for mask, pairs in (
        (None, S * S),
        (lambda b, h, q, k: q >= k, S * (S + 1) // 2),
        (lambda b, h, q, k: (q >= k) & (q - k < 64), 64 * 65 // 2 + (S - 64) * 64),
    ):
        ledger = traced(lambda dev, mask=mask: flex(dev, mask))
        assert counts(ledger) == (4 * heads * pairs * d, 8 * heads * pairs * d)
        assert ledger.flops.recompute == 2 * heads * pairs * d
        assert ledger.flops.attention_full_square == 14 * heads * S * S * d


def test_flex_attention_with_a_mask_made_of_data_counts_every_pair_and_says_so():
    def run(dev):
        documents = torch.randint(0, 3, (256,), device=dev)
        flex(dev, lambda b, h, q, k: documents[q] == documents[k])

    ledger = traced(run)
    assert ledger.flops.forward == 4 * 8 * 256 * 256 * 32
    assert any(a.startswith("flex attention's mask") for a in ledger.assumptions)


def test_a_trace_after_flex_attention_is_as_before():
    def step(dev):
        nn.Linear(8, 8).to(dev)(torch.randn(2, 8, device=dev)).sum().backward()

    before = traced(step).flops
    traced(flex)
    assert traced(step).flops == before


@ways
def test_a_triton_kernel_is_named_until_it_has_a_rule(on, monkeypatch):
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_mutation

    class Kernel:
        __name__ = "add_kernel"

    index = kernel_side_table.add_kernel(Kernel())

    def run(dev):
        x, y = torch.randn(10, device=dev), torch.empty(10, device=dev)
        triton_kernel_wrapper_mutation(kernel_idx=index, constant_args_idx=0, grid=[(1, 1, 1)],
                                       tma_descriptor_metadata={}, kwargs={"x": x, "y": y})  # fmt: skip

    (found,) = traced(run, on).uncounted
    assert (found.op, found.calls, found.bytes) == ("triton.add_kernel", 1, 80)
    monkeypatch.setattr(rules, "RULES", dict(rules.RULES))
    bursar.rule("triton::add_kernel", kind="elementwise")(lambda op: op["x"].numel)
    ledger = traced(run, on)
    assert (ledger.uncounted, ledger.flops.by_kind["elementwise"]) == ((), 10)


@ways
def test_per_sample_gradients_by_torch_func_cost_a_product_per_sample(on):
    def run(dev):
        layer, x = nn.Linear(32, 16).to(dev), torch.randn(4, 32, device=dev)

        def loss(parameters, x):
            return torch.func.functional_call(layer, parameters, (x,)).sum()

        torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(dict(layer.named_parameters()), x)

    assert counts(traced(run, on)) == (2 * 4 * 32 * 16, 2 * 4 * 32 * 16)


@ways
def test_a_tensor_may_grow_in_place(on):
    def run(dev):
        x = torch.ones(10, device=dev)
        x.resize_(1000)
        return x + 1

    ledger = traced(run, on)
    assert max(s.n_bytes for s in ledger.storages) == 4000


# ---- a user's own op


@torch.library.custom_op("bursar_tests::product", mutates_args=())
def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b


@product.register_fake
def _(a, b):
    return a.new_empty(a.shape[0], b.shape[1])


@torch.library.custom_op("bursar_tests::shapeless", mutates_args=())
def shapeless(a: torch.Tensor) -> torch.Tensor:
    return a.clone()


def multiply(dev):
    product(torch.randn(16, 32, device=dev), torch.randn(32, 8, device=dev))


@ways
@pytest.mark.parametrize("name", ["bursar_tests::product", "bursar_tests.product"])
def test_a_custom_op_is_named_until_one_decorated_function_counts_it(on, name, monkeypatch):
    (found,) = traced(multiply, on).uncounted
    assert found.op == "bursar_tests.product"
    monkeypatch.setattr(rules, "RULES", dict(rules.RULES))

    @bursar.rule(name, kind="matmul")
    def flops(op):
        return 2 * op["a"].numel * op["b"].shape[1]

    assert counts(traced(multiply, on)) == (2 * 16 * 32 * 8, 0) == (8_192, 0)


def test_the_three_lines_that_an_uncounted_op_prints_count_it(monkeypatch):
    (found,) = traced(multiply).uncounted
    assert len(found.fix.splitlines()) == 3
    assert '@bursar.rule("bursar_tests::product"' in found.fix
    monkeypatch.setattr(rules, "RULES", dict(rules.RULES))
    exec(found.fix, {"bursar": bursar})  # the page's text is a program
    ledger = traced(multiply)
    assert (ledger.uncounted, ledger.flops.by_kind["elementwise"]) == ((), 16 * 8)


def test_a_rule_for_what_is_no_ops_name_is_an_error():
    with pytest.raises(ValueError, match=re.escape("'product' is no op's name; write library::op")):
        bursar.rule("product", kind="matmul")


@ways
def test_a_custom_op_without_a_fake_kernel_is_named_with_its_remedy(on):
    with pytest.raises(TraceFailed, match=r"bursar_tests::shapeless.*torch\.library\.register_fake"):
        traced(lambda dev: shapeless(torch.randn(3, device=dev)), on)
