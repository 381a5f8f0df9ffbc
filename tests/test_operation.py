import contextlib
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bursar import kernels, rules
from bursar.errors import BadInput, NoAnswer, UnknownName
from bursar.hardware import accelerator
from bursar.operation import FORMS, make, mfu, parse, price, shrunk

H100 = accelerator("h100-sxm")
NOTES = "matmul 16384x32768x8192"


def flops(text: str, dtype: str = "bf16") -> int:
    return price(parse(text, dtype)).flops


# the notes and the course


def test_the_notes_matmul_is_2_to_the_43_flop() -> None:
    priced = price(parse(NOTES), H100)
    assert priced.flops == 2 * 16384 * 32768 * 8192 == 2**43 == 8_796_093_022_208
    assert priced.read_bytes == 2 * (16384 * 32768 + 32768 * 8192)
    assert priced.written_bytes == 2 * 16384 * 8192
    assert priced.bound_by == "compute"
    assert priced.bound_seconds == 2**43 / 989.4e12
    assert priced.mfu_at_bound == pytest.approx(1)


def test_a_bf16_relu_does_a_quarter_of_a_flop_per_byte_and_is_bound_by_memory() -> None:
    priced = price(parse("relu 4096x4096"), H100)
    n = 4096 * 4096
    assert (priced.flops, priced.read_bytes, priced.written_bytes) == (n, 2 * n, 2 * n)
    assert priced.intensity == 0.25
    assert (priced.bound_by, priced.bound_seconds) == ("memory", 4 * n / 3.35e12)
    assert priced.mfu_at_bound is None


def test_a_matrix_times_a_vector_does_almost_one_flop_per_byte() -> None:
    n = 1024
    assert price(parse("matvec 1024")).intensity == 2 * n * n / (2 * (n * n + n + n))  # 0.998
    assert price(parse("matvec 1024x1024")).intensity == pytest.approx(0.998, abs=5e-4)


def test_a_square_product_of_1024_does_341_3_flop_per_byte() -> None:
    assert price(parse("matmul 1024x1024x1024")).intensity == pytest.approx(1024 / 3)


def test_the_ridge_of_an_h100_is_295_3_flop_per_byte() -> None:
    ridge = price(parse(NOTES), H100).ridge
    assert ridge == 989.4e12 / 3.35e12
    assert round(ridge, 1) == 295.3


def test_gpt3s_feed_forward_matrix_in_fp32_is_2_25_gib() -> None:
    weight = parse("matmul 2048x12288x49152", "fp32").operands[1]
    assert weight.n_bytes == 4 * 12288 * 49152 == 2_415_919_104
    assert weight.n_bytes / 2**30 == 2.25


def test_causal_attention_counts_only_the_pairs_the_mask_lets_through() -> None:
    priced = price(parse("attention 2x4x64x32 causal"))
    pairs = 64 * 65 // 2
    assert priced.flops == 4 * pairs * 32 * (2 * 4) == 2_129_920
    assert priced.full_square_flops == 4 * 64 * 64 * 32 * (2 * 4)
    assert flops("attention 2x4x64x32") == priced.full_square_flops


def test_the_first_convolution_of_resnet_on_8_images() -> None:
    text = "conv2d 8x3x224x224 64x7x7 stride=2 padding=3"
    forward = 2 * 8 * 64 * 112 * 112 * 3 * 7 * 7
    assert flops(text) == forward == 1_888_223_232  # "O complex", say the notes
    assert flops(f"{text} backward") == 2 * forward  # dX and dW
    assert flops(f"{text} backward no-dx") == forward  # the first layer's


# forms


def test_a_batch_multiplies_and_two_shapes_say_the_same() -> None:
    assert flops("matmul 8x5x6x7") == 8 * 2 * 5 * 6 * 7 == flops("matmul 8x5x6 @ 8x6x7")
    assert flops("matmul 5x6 6x7") == 2 * 5 * 6 * 7
    assert flops("matmul 8x5x6 6x7") == 2 * 40 * 6 * 7
    assert parse("matmul 8x5x6 6x7").kernels[0].name == "aten.mm"  # the batch is folded into the rows
    assert parse("matmul 2×3 @ 3*4").text == "matmul 2x3 3x4"
    assert parse("matmul 16_384x2x2").shapes == ((16384, 2, 2),)


def test_backward_of_a_product_is_dx_and_dw_each_equal_to_forward() -> None:
    backward = parse("matmul 5x6x7 backward")
    assert [[t.shape for t in op.inputs] for op in backward.kernels] == [[(5, 7), (7, 6)], [(6, 5), (5, 7)]]
    assert price(backward).flops == 2 * (2 * 5 * 6 * 7)
    assert flops("matmul 5x6x7 backward no-dx") == 2 * 5 * 6 * 7


def test_backward_of_attention_is_twice_forward_and_the_scores_once_more() -> None:
    priced = price(parse("attention 2x4x64x32 causal backward"))
    assert priced.flops == 2 * 2_129_920
    assert priced.recompute_flops == 2_129_920 // 2
    assert priced.intensity == (priced.flops + priced.recompute_flops) / priced.bytes


def test_a_window_of_w_sees_itself_and_the_w_minus_1_before() -> None:
    pairs = sum(min(i + 1, 4) for i in range(16))
    assert flops("attention 1x1x16x8 window=4") == 4 * pairs * 8
    assert flops("attention 1x1x16x8 window=16") == flops("attention 1x1x16x8 causal")


def test_shared_keys_cost_the_queries_flops_and_fewer_bytes() -> None:
    shared, full = price(parse("attention 2x8x64x32 kv=2")), price(parse("attention 2x8x64x32"))
    assert shared.flops == full.flops
    assert full.read_bytes - shared.read_bytes == 2 * 2 * (2 * 6 * 64 * 32)  # keys and values of 6 heads
    assert flops("attention 1x1x1x8 keys=100") == 4 * 100 * 8  # one token decoded


def test_a_transposed_convolution_multiplies_each_input_position() -> None:
    assert flops("conv2d 2x4x8x8 6x3x3 stride=2 transposed") == 2 * 2 * (4 * 6 * 3 * 3) * 8 * 8
    assert parse("conv2d 2x4x8x8 6x3x3 stride=2 transposed").kernels[0].output.shape == (2, 6, 17, 17)
    assert flops("conv1d 2x4x10 4x3 groups=4") == 2 * 2 * 4 * 8 * 3  # depthwise
    assert flops("conv3d 1x2x4x4x4 3x1x1x1 stride=2x2x2") == 2 * 3 * 2 * 2**3
    assert flops("conv1d 1x1x10 1x3 dilation=2 padding=2") == 2 * 10 * 3


def test_an_einsum_is_priced_by_its_pairs_from_the_left() -> None:
    assert flops("einsum 'bij,bjk->bik' 2x3x4 2x4x5") == 2 * 2 * 3 * 4 * 5
    assert flops("einsum ij,jk,kl->il 3x4 4x5 5x2") == 2 * 3 * 4 * 5 + 2 * 3 * 5 * 2
    assert flops("einsum ij,jk 3x4 4x5") == 2 * 3 * 4 * 5  # numpy's rule gives ->ik
    assert parse("einsum 'bij, bjk -> bik' 2x3x4 2x4x5").text == "einsum 'bij,bjk->bik' 2x3x4 2x4x5"
    assert [op.name for op in parse("einsum i,j->ij 3 4").kernels] == ["aten.mul"]
    assert flops("einsum ii-> 3x3") == 3  # the diagonal is a view


def test_elementwise_and_reductions() -> None:
    assert flops("add 4096x4096") == 4096 * 4096
    assert price(parse("add 4x8 8", "fp32")).read_bytes == 4 * (4 * 8 + 8)
    assert flops("gelu 4x8 backward") == 4 * 8
    assert flops("softmax 4x8") == 5 * 4 * 8
    assert flops("sum 4x8") == 4 * 8
    assert price(parse("embedding 50257x768 tokens=1024", "fp32")).bytes == 8 * 1024 + 2 * 4 * 1024 * 768
    assert price(parse("copy 4x8", "fp32")).bytes == 2 * 4 * 32


def test_the_adamw_step_takes_14_flops_and_28_bytes_per_parameter_in_fp32() -> None:
    priced = price(parse("adamw 124M", "fp32"))
    assert priced.flops == 14 * 124_000_000
    assert priced.bytes == (4 + 3) * 4 * 124_000_000  # reads p, g, m, v; writes p, m, v


def test_the_backward_of_a_sum_is_a_view_that_costs_nothing_and_says_so() -> None:
    priced = price(parse("sum 4x8 backward"), H100)
    assert (priced.flops, priced.bytes, priced.intensity, priced.bound_seconds, priced.bound_by) == (
        0,
        0,
        None,
        0,
        None,
    )
    assert any("view" in note for note in priced.assumptions)


@pytest.mark.parametrize("name", FORMS)
def test_every_example_of_every_form_is_read_priced_and_read_again(name: str) -> None:
    operation = parse(FORMS[name].example)
    again = parse(operation.text)
    assert again == operation
    assert price(operation, H100).bytes > 0
    for power in (1, 3, 30):
        assert price(shrunk(operation, power)).flops <= price(operation).flops


def test_sizes_are_divided_by_a_power_of_two_and_kernels_and_heads_stay() -> None:
    assert shrunk(parse(NOTES), 2).text == "matmul 4096x8192x2048"
    assert shrunk(parse("conv2d 8x64x56x56 32x3x3 padding=1"), 1).text == "conv2d 4x64x28x28 32x3x3 padding=1"
    assert shrunk(parse("attention 2x4x64x32 window=8 kv=2"), 1).text == "attention 1x4x32x32 window=4 kv=2"


# on a device


def test_a_bound_is_the_sum_of_each_kernels_and_both_kinds_can_bind() -> None:
    priced = price(parse("matvec 1024 backward"), H100)
    assert priced.bound_seconds == sum(max(x.compute_seconds, x.memory_seconds) for x in priced.kernels)
    assert price(parse("matmul 8192x8192x8192", "fp32"), H100).ridge == 67e12 / 3.35e12
    assert price(parse("matmul 64x64x64"), H100).bound_by == "memory"


def test_tf32_stores_fp32_and_multiplies_at_its_own_peak() -> None:
    tf32, fp32 = (price(parse("matmul 4096x4096x4096", d), H100) for d in ("tf32", "fp32"))
    assert tf32.bytes == fp32.bytes
    assert fp32.compute_seconds / tf32.compute_seconds == pytest.approx(494.7 / 67)


def test_a_product_in_a_dtype_the_device_has_not_is_refused() -> None:
    with pytest.raises(BadInput, match="v100-32g-sxm has no known peak in bf16"):
        price(parse(NOTES), accelerator("v100-32g-sxm"))


def test_mfu_above_1_is_refused_with_the_likely_cause() -> None:
    assert mfu(67 * 10**12, 2.0, H100, "fp32") == 0.5
    with pytest.raises(NoAnswer, match=r"1\.49 of the dense fp32 peak of h100-sxm.*TF32"):
        mfu(10**14, 1.0, H100, "fp32")


# what cannot be meant


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("matmull 2x3x4", r"no operation 'matmull'; did you mean matmul"),
        ("attention 2x4x64x32 casual", r"no option of attention 'casual'; did you mean causal\?"),
        ("relu 4x4 causal", r"no option of relu 'causal'"),
    ],
)
def test_an_unknown_word_names_the_nearest(text: str, error: str) -> None:
    with pytest.raises(UnknownName, match=error):
        parse(text)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "no operation given; for example 'matmul"),
        ("matmul", r"it has 0 shapes and takes 1 or 2; .* as in 'matmul 16384x32768x8192'"),
        ("matmul 64x32", "3 sizes, or 4 with a batch, not 2; .* as in"),
        ("matmul 2x3 4x5", "inner sizes do not match, 3 of 2x3 and 4 of 4x5"),
        ("matmul 0x2x3", "cannot read '0x2x3' as a shape: whole numbers from 1"),
        ("matmul -2x3x4", "cannot read '-2x3x4' as a shape"),
        ("matmul 2xKx4", "cannot read '2xKx4' as a shape"),
        ("matmul 2.5x3x4", "as a shape"),
        ("matmul 2x3x99999999999999", "no size above"),
        ("matmul 2x3x4 no-dx", "backward no-dx"),
        ("add 4x3 4x2", "do not broadcast, 3 against 2"),
        ("conv2d 2x3x4 4x4", "4 sizes, then 3, not 3 and 2"),
        ("conv2d 1x3x4x4 8x5x5", "leaves no output"),
        ("conv2d 1x3x4x4 8x3x3 groups=2", "groups=2 divides not both 3 input"),
        ("conv2d 1x3x4x4 8x3x3 stride=0", "stride of conv2d is a whole number from 1"),
        ("conv2d 1x3x4x4 8x3x3 stride=1x1x1", "one number or 2, not 3"),
        ("attention 2x4x64x32 kv=3", "4 query heads cannot share 3"),
        ("attention 2x4x64x32 causal=1", "stands alone"),
        ("einsum ij,jk->ik 2x3", "2 operands and 1 shapes"),
        ("einsum ij,jk->ik 2x3 4x5", "j is 3 in one operand and 4 in 4x5"),
        ("einsum ij->iz 2x3", "letters of the result"),
        ("einsum ...i->i 2x3", "ellipsis"),
        ("einsum 'ij 2x3", "quotation mark"),
        ("embedding 10x4", "tokens=N"),
        ("adamw 12 backward", "has no backward"),
        ("maximum 4x4 backward", "backward of maximum is not known"),
        ("matvec 2x3x4", "a matrix has two sizes"),
    ],
)
def test_a_shape_that_does_not_fit_shows_what_does(text: str, error: str) -> None:
    with pytest.raises(BadInput, match=error):
        parse(text)


def test_a_dtype_has_to_be_one_the_operation_runs_in() -> None:
    with pytest.raises(UnknownName, match="no dtype 'bf17'; did you mean bf16"):
        parse(NOTES, "bf17")
    with pytest.raises(BadInput, match="relu does not run in fp8"):
        parse("relu 4", "fp8")
    assert parse(NOTES, "bfloat16").dtype == "bf16"
    fp8 = price(parse("matmul 2x3x4", "fp8"))
    assert (fp8.read_bytes, fp8.written_bytes) == (6 + 12, 2 * 8)


@given(st.text(alphabet="matulreconvdigs 0123456789x=@->',.", max_size=40))
def test_no_text_raises_anything_but_our_errors(text: str) -> None:
    for name in ("", "matmul ", "conv2d ", "attention ", "einsum "):
        with contextlib.suppress(BadInput, UnknownName):
            parse(name + text)


# against the tracer


def traced(operation):  # what the tracer records when torch runs it
    torch = pytest.importorskip("torch")
    import bursar
    from bursar.measure import DTYPES, runner

    with bursar.tracing() as t:
        inputs = [
            torch.zeros(x.shape, device="cuda", dtype=DTYPES.get(x.dtype, torch.float32)) for x in operation.operands
        ]
        with torch.set_grad_enabled(bool(operation.options.get("backward"))):
            runner(operation, inputs)()
    phase = "backward" if operation.options.get("backward") else "forward"
    return [row for row in t.ledger.rows if row.phase == phase and row.kind != "copy"]


def counted(work):
    return work.flops, work.recompute_flops, work.full_square_flops


def agrees(operation, *, bytes_too=True) -> None:
    rows, priced = traced(operation), price(operation)
    assert sum(row.work.flops for row in rows) == priced.flops
    assert sum(row.work.recompute_flops for row in rows) == priced.recompute_flops
    if bytes_too:
        by_name = [
            sorted((x.op, x.work.flops, x.work.read_bytes, x.work.written_bytes) for x in ops)
            for ops in (rows, priced.kernels)
        ]
        assert by_name[0] == by_name[1]


SIZE = st.integers(1, 6)
NAMES = [*kernels.UNARY, *kernels.BINARY, "maximum", "dropout", "sum", "mean", "max", "norm", "var", "softmax",
         "log_softmax", "layernorm", "rmsnorm", "mse"]  # fmt: skip
traced_property = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@traced_property
@given(B=SIZE, m=SIZE, k=SIZE, n=SIZE, batched=st.booleans(), backward=st.booleans())
def test_products_cost_what_the_tracer_records(B, m, k, n, batched, backward) -> None:
    shape = (B, m + 1, k + 1, n + 1) if batched else (m + 1, k + 1, n + 1)
    operation = make("matmul", (shape,), "bf16", {"backward": True} if backward else {})
    rows = traced(operation)
    assert sorted(x.work.flops for x in rows) == sorted(x.work.flops for x in price(operation).kernels)
    assert sum(x.work.read_bytes for x in rows) == price(operation).read_bytes


@traced_property
@given(
    N=SIZE, g=st.integers(1, 2), cin=st.integers(1, 3), cout=st.integers(1, 3), size=st.integers(5, 9),
    f=st.integers(1, 3), stride=st.integers(1, 2), padding=st.integers(0, 1), spatial=st.integers(1, 3),
    transposed=st.booleans(), backward=st.booleans(),
)  # fmt: skip
def test_convolutions_cost_what_the_tracer_records(
    N, g, cin, cout, size, f, stride, padding, spatial, transposed, backward
) -> None:
    options = {"stride": (stride,), "padding": (min(padding, f - 1),), "groups": g}
    options |= {"transposed": True} if transposed else {}
    options |= {"backward": True} if backward else {}
    shapes = ((N, g * cin, *[size] * spatial), (g * cout, *[f] * spatial))
    agrees(make(f"conv{spatial}d", shapes, "fp32", options))


@traced_property
@given(B=SIZE, group=st.integers(1, 3), kv=st.integers(1, 2), S=st.integers(1, 20), causal=st.booleans(),
       backward=st.booleans())  # fmt: skip
def test_attention_costs_what_the_tracer_records(B, group, kv, S, causal, backward) -> None:
    options = {"kv": kv} | ({"causal": True} if causal else {}) | ({"backward": True} if backward else {})
    operation = make("attention", ((B, group * kv, S, 8),), "bf16", options)
    rows, priced = traced(operation), price(operation)
    assert [counted(r.work) for r in rows if r.kind == "attention"] == [counted(x.work) for x in priced.kernels]
    moved = sum(r.work.read_bytes + r.work.written_bytes for r in rows)
    assert 0 <= moved - priced.bytes <= 24  # torch's random state for dropout


@pytest.mark.parametrize("seed", range(25))
def test_einsums_cost_what_the_tracer_records(seed) -> None:
    rng = random.Random(seed)
    sizes = {s: rng.randint(1, 5) for s in "abcde"}
    operands = ["".join(rng.sample("abcde", rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
    used = sorted(set("".join(operands)))
    result = "".join(rng.sample(used, rng.randint(0, len(used))))
    equation = ",".join(operands) + "->" + result
    operation = make("einsum", tuple(tuple(sizes[s] for s in o) for o in operands), "fp32", {"equation": equation})
    rows = traced(operation)
    assert [(r.op, r.work.flops) for r in rows] == [(x.op, x.work.flops) for x in price(operation).kernels], equation


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_elementwise_and_row_ops_cost_what_the_tracer_records(name, backward) -> None:
    if backward and name in ("maximum", "max", "norm", "var"):
        pytest.skip("its backward is not offered")
    agrees(make(name, ((4, 8),), "bf16", {"backward": True} if backward else {}))


def test_broadcast_operands_are_read_once_and_their_gradient_is_summed() -> None:
    for name in kernels.BINARY:
        agrees(make(name, ((4, 8), (8,)), "bf16", {}))
        operation = make(name, ((4, 8), (8,)), "bf16", {"backward": True})
        agrees(operation, bytes_too=name in ("add", "sub", "mul"))


def test_lookups_losses_and_products_with_vectors_cost_what_the_tracer_records() -> None:
    for text in ("embedding 50x8 tokens=6", "embedding 50x8 tokens=6 backward", "matvec 4x8", "cross_entropy 4x8"):
        agrees(parse(text, "fp32"))
    assert flops("matvec 4x8 backward") == sum(r.work.flops for r in traced(parse("matvec 4x8 backward")))


def test_every_pointwise_kernel_carries_the_tag_torch_gives_it() -> None:
    torch = pytest.importorskip("torch")
    texts = [f"{name} 4x4{back}" for name in (*kernels.UNARY, *kernels.BINARY) for back in ("", " backward")]
    for op in (op for text in texts for op in parse(text).kernels):
        overloads = getattr(torch.ops.aten, op.name.removeprefix("aten."))
        tagged = any(torch.Tag.pointwise in getattr(overloads, o).tags for o in overloads.overloads())
        assert op.name in rules.RULES or tagged, op.name
