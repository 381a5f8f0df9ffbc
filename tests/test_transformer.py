"""Two witnesses: the closed form of a decoder's step, derived by hand, equals the trace of its code."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bursar
from bursar.architecture import Transformer, known_models, preset
from bursar.errors import BadInput, UnknownName
from bursar.rules.transformer import PRECISIONS, UPDATES, count

DECODERS = [n for n in known_models() if isinstance(preset(n), Transformer) and preset(n).family in ("gpt", "llama")]


def disagreements(ledger, totals):
    """Where the trace and the closed form differ: (what, traced, closed form)."""
    flops, pairs = ledger.flops, []
    pairs += [(f"flops of {kind}", n, totals.by_kind.get(kind, 0)) for kind, n in flops.by_kind.items()]
    pairs += [(f"bytes of {kind}", n, totals.bytes_moved.get(kind, 0)) for kind, n in ledger.bytes_moved.items()]
    pairs += [(name, getattr(flops, name), getattr(totals, name))
              for name in ("forward", "backward", "recompute", "model", "hardware")]  # fmt: skip
    pairs += [
        ("parameters", ledger.model.parameters, totals.parameters),
        ("saved activations", ledger.memory.saved_activations, totals.saved_bytes),
        ("parameter bytes", ledger.textbook.parameters, totals.parameter_bytes),
        ("optimizer state", ledger.textbook.optimizer_state, totals.state_bytes),
    ]
    return [(what, traced, derived) for what, traced, derived in pairs if traced != derived]


def trace(shape, B, S, precision, optimizer="adamw", recompute="none"):
    """The ledger of a shape that is in no catalogue."""
    from bursar.workload import presets
    from bursar.workload.resolve import Workload
    from bursar.workload.step import run

    made = presets._language_model(shape)
    work = Workload(shape.name, lambda: (made.make_model(), made.make_batch(B, S)), made.loss, B, B * S)
    return run(work, precision, optimizer, recompute)


# ---- by hand


def test_a_gpt_block_multiplies_twelve_d_squared_and_its_scores():
    shape, B, S = preset("gpt3-175b"), 2, 2048
    D, N, pairs = 12288, B * S, S * (S + 1) // 2
    assert count(shape, B, S).block.flops("forward") == 2 * N * 12 * D**2 + 4 * B * pairs * D
    assert count(shape, B, S).block.flops("backward") == 2 * count(shape, B, S).block.flops("forward")


def test_a_gpt_block_in_16_bits_keeps_the_papers_34sbh_less_two_dropout_masks_and_the_scores():
    shape, B, S = preset("gpt3-175b"), 2, 2048
    sbh = S * B * shape.d_model
    assert shape.published_activation_bytes(B, S)[0] == 34 * sbh
    statistics = 4 * (4 * B * S) + 4 * B * S * shape.n_heads + 24  # two norms' mean and 1/σ; log-sum-exp; flash's seed
    assert count(shape, B, S, precision="bf16").block.saved_bytes == (34 - 2) * sbh + statistics


def test_the_parameters_are_those_of_the_architecture():
    for name in DECODERS:
        assert count(preset(name), 1, 1).parameters == preset(name).parameters()


def test_a_whole_model_is_its_embedding_its_blocks_and_its_head():
    one, four = (count(preset(f"llama3-8b:L={L}"), 1, 512, precision="bf16") for L in (1, 4))
    for ask in (lambda t: t.model, lambda t: t.saved_bytes, lambda t: t.bytes_moved["matmul"]):
        block = (ask(four) - ask(one)) // 3
        assert ask(count(preset("llama3-8b"), 1, 512, precision="bf16")) == ask(one) + 31 * block


# ---- against the trace


@pytest.mark.parametrize(("i", "name"), list(enumerate(DECODERS)), ids=DECODERS)
def test_every_decoder_of_the_catalogue_is_counted_alike_by_hand_and_by_trace(i, name):
    precision = ("fp32", "bf16", "bf16-mixed")[i % 3]
    two_layers = f"{name}:L=2"  # the closed form is linear in depth: the test above
    ledger = bursar.step(two_layers, batch_size=2, seq_len=1024, precision=precision)
    assert disagreements(ledger, count(preset(two_layers), 2, 1024, precision=precision)) == []


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_gpt2_in_full_is_counted_alike(precision):
    ledger = bursar.step("gpt2", batch_size=3, seq_len=129, precision=precision)
    assert disagreements(ledger, count(preset("gpt2"), 3, 129, precision=precision)) == []


@st.composite
def steps(draw):
    """A decoder of any shape, and a step of it."""
    family = draw(st.sampled_from(("gpt", "llama")))
    K, groups, C = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from((8, 16, 24)))
    H, S = K * groups, draw(st.integers(2, 65))
    gpt = family == "gpt"
    shape = dataclasses.replace(
        preset("gpt2" if gpt else "llama3-8b"),
        name="drawn",
        n_layers=2,
        d_model=H * C if gpt else draw(st.integers(1, 60)),
        n_heads=H,
        n_kv_heads=H if gpt else K,
        head_dim=C,
        d_ff=draw(st.integers(1, 70)),
        vocab_size=draw(st.integers(2, 110)),
        max_seq_len=S + draw(st.integers(0, 3)),
        tied_embeddings=draw(st.booleans()),
        bias=draw(st.booleans()),
        gated_mlp=not gpt and draw(st.booleans()),
    )
    how = {
        "precision": draw(st.sampled_from(sorted(PRECISIONS))),
        "optimizer": draw(st.sampled_from(sorted(UPDATES))),
        "recompute": draw(st.sampled_from(("none", "none", "full"))),
    }
    return shape, draw(st.integers(1, 3)), S, how


@given(steps())
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_a_decoder_of_any_shape_is_counted_alike_by_hand_and_by_trace(drawn):
    shape, B, S, how = drawn
    ledger, totals = trace(shape, B, S, **how), count(shape, B, S, **how)
    assert disagreements(ledger, totals) == []


def test_a_wrong_closed_form_would_be_noticed():
    ledger = bursar.step("gpt2:L=2,d=64,h=4,V=100,T=64", batch_size=2, seq_len=32)
    wider = count(preset("gpt2:L=2,d=64,h=4,V=100,T=64,F=257"), 2, 32)
    found = {what for what, _, _ in disagreements(ledger, wider)}
    assert found >= {"flops of matmul", "flops of elementwise", "forward", "parameters", "saved activations"}


# ---- for a planner


def test_arrays_of_batches_and_sequences_are_counted_at_once():
    shape = preset("llama3-8b")
    B, S = np.arange(1, 5)[:, None], np.array([2, 1024, 8192])
    for recompute in ("none", "full"):
        all_of_them = count(shape, B, S, precision="bf16", recompute=recompute)
        for i, j in np.ndindex(4, 3):
            one = count(shape, int(B[i, 0]), int(S[j]), precision="bf16", recompute=recompute)
            assert all_of_them.model[i, j] == one.model
            assert all_of_them.saved_bytes[i, j] == one.saved_bytes
            assert all_of_them.bytes_moved["copy"][i, j] == one.bytes_moved["copy"]


def test_arrays_of_shapes_are_counted_at_once():
    from types import SimpleNamespace

    base = dataclasses.asdict(preset("llama2-7b"))
    F = np.array([1024, 11008, 11008])
    H = np.array([8, 16, 32])  # as tensor parallelism shares heads out
    many = count(SimpleNamespace(**{**base, "d_ff": F, "n_heads": H, "n_kv_heads": H}), 1, 2048, precision="bf16")
    for i in range(3):
        row = SimpleNamespace(**{**base, "d_ff": int(F[i]), "n_heads": int(H[i]), "n_kv_heads": int(H[i])})
        one = count(row, 1, 2048, precision="bf16")
        assert (many.model[i], many.saved_bytes[i], many.parameters[i]) == (one.model, one.saved_bytes, one.parameters)


def test_shapes_that_take_different_kernels_are_not_mixed():
    from types import SimpleNamespace

    base = {**dataclasses.asdict(preset("llama2-7b")), "n_kv_heads": np.array([8, 32])}
    with pytest.raises(BadInput, match="count them apart"):
        count(SimpleNamespace(**base), 1, 2048)


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"precision": "fp16-mixed"}, UnknownName, "no precision 'fp16-mixed'"),
        ({"optimizer": "muon"}, UnknownName, "bursar step traces the others"),
        ({"recompute": "selective"}, UnknownName, "no recompute in closed form 'selective'"),
    ],
)
def test_what_has_no_closed_form_is_refused(wrong, error, says):
    with pytest.raises(error, match=says):
        count(preset("gpt2"), 1, 128, **wrong)


def test_heads_that_torch_would_pad_are_refused_in_16_bits_and_counted_in_fp32():
    shape = preset("gpt2:d=72,h=6")
    with pytest.raises(BadInput, match="heads of 8, 16"):
        count(shape, 1, 128, precision="bf16")
    assert count(shape, 1, 128).forward > 0


# ---- mixtures of experts


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name",
    [
        "mixtral-8x7b:L=2,d=64,h=4,kv=2,F=96,V=100,E=6,k=3",
        "mixtral-8x7b:L=1",
        "deepseek-v3:N=3,dense=1,d=64,h=4,q=24,kv=16,nope=16,rope=8,v=16,F=96,M=40,E=6,k=2,V=100",
        "deepseek-v3:N=2,dense=1",
    ],
)
def test_a_mixtures_products_and_parameters_are_counted_alike_by_hand_and_by_trace(name, precision):
    from bursar.rules.mixture import products

    ledger = bursar.step(name, batch_size=3, seq_len=40, precision=precision, optimizer="sgd")
    derived, flops = products(preset(name), 3, 40, precision), ledger.flops
    assert (derived.forward, derived.backward, derived.recompute) == (flops.forward, flops.backward, flops.recompute)
    assert (derived.attention, derived.parameters) == (flops.attention, ledger.model.parameters)


def test_mixtral_8x7b_at_full_attention_takes_340_teraflop_for_4096_tokens():
    from bursar.rules.mixture import products

    # 6 FLOPs for each of the 12.75e9 weights a token meets, and 12·L·d·S² of scores
    d, L, S = 4096, 32, 4096
    weights = L * (2 * d * d + 2 * d * 1024 + 8 * d + 2 * 3 * d * 14336) + 32000 * d
    assert 6 * S * weights + 12 * L * d * S * S == 339_697_553_375_232
    assert products(preset("mixtral-8x7b"), 1, 4096).model == 339_697_553_375_232


def test_a_network_that_is_no_mixture_is_refused():
    from bursar.rules.mixture import products

    with pytest.raises(BadInput, match="no mixture of experts"):
        products(preset("cruncher"), 1, 1)
