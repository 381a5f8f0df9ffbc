"""What a CPU kernel takes for itself: each formula against the record of the op, and where a trace has it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from bursar.errors import UnknownName
from bursar.meter.memory import PeakMeter
from bursar.rules import scratch as rules
from bursar.rules.scratch import Processor, lstm_workspace, scratch_bytes
from bursar.trace import scratch as asking
from bursar.trace import tracing
from bursar.trace.recorder import Recorder, _OpInfo

aten = torch.ops.aten
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    """A thread's own buffers count once for each."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def by_formula(func, *args):
    """The formula's bytes for a call, as a trace asks for them."""
    info = _OpInfo(func)
    out = func(*args)
    outs = [t for t in (out if isinstance(out, (list, tuple)) else (out,)) if isinstance(t, torch.Tensor)]
    op = Recorder(FakeTensorMode(), "cpu")._op(info, args, None, outs if info.returns_new else [])
    return scratch_bytes(op, asking.processor())


def by_record(func, *args):
    """The allocator's record of the call."""
    return asking.record(func, args, None).scratch_bytes


def rand(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


HALF = torch.bfloat16
SCALARS = 32  # bytes: a Python number becomes a tensor of 8 bytes, and one of the dtype

X, B3 = (64, 512), (4, 48, 16, 16)
VECTOR = rand(512)
CASES = {
    "mse_loss": (aten.mse_loss.default, rand(*X), rand(*X), 1),
    "mse_loss of two dtypes": (aten.mse_loss.default, rand(*X), rand(*X, dtype=HALF), 1),
    "mse_loss bf16": (aten.mse_loss.default, rand(*X, dtype=HALF), rand(*X, dtype=HALF), 1),
    "smooth_l1_loss": (aten.smooth_l1_loss.default, rand(*X), rand(*X), 2),
    "huber_loss": (aten.huber_loss.default, rand(*X), rand(*X), 1, 1.0),
    "binary_cross_entropy": (aten.binary_cross_entropy.default, rand(*X).sigmoid(), rand(*X).sigmoid(), None, 1),
    "with logits": (aten.binary_cross_entropy_with_logits.default, rand(*X), rand(*X).sigmoid(), None, None, 1),
    "mean bf16": (aten.mean.dim, rand(*X, dtype=HALF), [1], True),
    "mean": (aten.mean.dim, rand(*X), [1], True),
    "sum bf16": (aten.sum.dim_IntList, rand(*X, dtype=HALF), [1], True),
    "add of two dtypes": (aten.add.Tensor, rand(*X), rand(*X, dtype=HALF)),
    "add of two dtypes, broadcast": (aten.add.Tensor, rand(*X), rand(1, 512, dtype=HALF)),
    "add in place into bf16": (aten.add_.Tensor, rand(*X, dtype=HALF), rand(*X)),
    "compare two dtypes": (aten.gt.Tensor, rand(*X), rand(*X, dtype=HALF)),
    "add an integer": (aten.add.Tensor, rand(*X), torch.arange(512)),
    "add": (aten.add.Tensor, rand(*X), rand(*X)),
    "masked_fill": (aten.masked_fill.Scalar, rand(*X), rand(*X) > 0, 0.0),
    "native_dropout": (aten.native_dropout.default, rand(*X), 0.1, True),
    "layer_norm_backward": (aten.native_layer_norm_backward.default, rand(*X), rand(*X), [512], rand(64, 1),
                            rand(64, 1), VECTOR, VECTOR, [True, True, True]),
    "layer_norm_backward bf16": (aten.native_layer_norm_backward.default, rand(*X, dtype=HALF), rand(*X, dtype=HALF),
                                 [512], rand(64, 1, dtype=HALF), rand(64, 1, dtype=HALF), rand(512, dtype=HALF),
                                 rand(512, dtype=HALF), [True, True, True]),
    "layer_norm_backward, input alone": (aten.native_layer_norm_backward.default, rand(*X), rand(*X), [512],
                                         rand(64, 1), rand(64, 1), VECTOR, VECTOR, [True, False, False]),
    "group_norm_backward": (aten.native_group_norm_backward.default, rand(*B3), rand(*B3), rand(4, 8), rand(4, 8),
                            rand(48), 4, 48, 256, 8, [True, True, True]),
    "batch_norm": (aten.native_batch_norm.default, rand(*B3), rand(48), rand(48), rand(48), rand(48), True, 0.1, 1e-5),
    "batch_norm_backward": (aten.native_batch_norm_backward.default, rand(*B3), rand(*B3), rand(48), rand(48),
                            rand(48), rand(48), rand(48), True, 1e-5, [True, True, True]),
    "upsample": (aten.upsample_nearest2d.default, rand(*B3), [32, 32]),
    "logsumexp": (aten.logsumexp.default, rand(*X), [1]),
    "log_softmax": (aten._log_softmax.default, rand(*X), 1, False),
    "gelu_backward": (aten.gelu_backward.default, rand(*X), rand(*X)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_formula_of_torchs_own_kernel_is_the_allocators_record(name):
    func, *args = CASES[name]
    slack = 512 if name == "logsumexp" else SCALARS  # its maxima by row
    assert by_formula(func, *args) == pytest.approx(by_record(func, *args), abs=slack)


# B, H, S, D, K: short, middle and long queries, and keys that are not the queries'
ATTENTION = [(2, 4, 128, 32, 128), (2, 2, 100, 16, 100), (2, 4, 200, 48, 300), (1, 4, 700, 64, 700),
             (2, 4, 800, 128, 800)]  # fmt: skip


@pytest.mark.parametrize(("B", "H", "S", "D", "K"), ATTENTION)
def test_attentions_scratch_is_read_off_its_source(B, H, S, D, K):
    q, k, v = (rand(B, n, H, D).transpose(1, 2) for n in (S, K, K))  # as a model's projections leave them
    forward = aten._scaled_dot_product_flash_attention_for_cpu.default
    assert by_formula(forward, q, k, v, 0.0, True) == by_record(forward, q, k, v, 0.0, True)
    out, lse = forward(q, k, v, 0.0, True)
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    args = (torch.randn_like(out), q, k, v, out, lse, 0.0, True)
    assert by_formula(backward, *args) == pytest.approx(by_record(backward, *args), abs=8 * S)
    other = (args[0].contiguous(), *args[1:])  # heads outside the sequence: copied first
    assert by_record(backward, *other) == by_record(backward, *args) + 4 * B * H * S * D


def test_a_thread_has_buffers_of_its_own():
    op = Recorder(FakeTensorMode(), "cpu")._op(
        _OpInfo(aten._scaled_dot_product_flash_attention_for_cpu.default), [rand(2, 4, 128, 32)] * 3, None, []
    )
    one, two = (scratch_bytes(op, Processor(n, "avx512")) for n in (1, 2))
    scores, sums, output = 32 * 128, 2 * 32, 32 * 32
    assert one == 4 * (scores + sums + output)
    assert two == 2 * one


def test_lstm_keeps_what_its_workspace_says():
    """An estimate: 3 % for what it rounds more or less than oneDNN does."""
    for T, B, D, H in ((12, 3, 48, 96), (20, 2, 256, 256), (5, 7, 64, 160)):
        args = (rand(T, B, D), rand(4 * H, D), rand(4 * H, H), rand(4 * H), rand(4 * H), rand(B, H), rand(B, H), False,
                [], 2, H, 1, True, False, False, True)  # fmt: skip
        kept = asking.record(aten.mkldnn_rnn_layer.default, args, None).output_bytes[3]
        assert lstm_workspace(T, B, D, H, 4) == pytest.approx(kept, rel=0.03), (T, B, D, H)


def test_a_name_has_one_formula():
    with pytest.raises(ValueError, match="already has its scratch"):
        rules.scratch("aten.mean")(lambda op, cpu: 0)


# ---- asked


def test_a_kernel_that_is_asked_answers_alike_each_time():
    args = (rand(4, 16, 12, 12), rand(32, 16, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    first = asking.record(aten.convolution.default, args, None)
    assert first == asking.record(aten.convolution.default, args, None)
    assert first.output_bytes == (4 * 4 * 32 * 12 * 12,)
    assert first.scratch_bytes > 0


def test_what_would_take_too_much_or_cannot_be_is_not_called(monkeypatch):
    func = aten.mm.default
    args = (rand(64, 64, dtype=HALF), rand(64, 64, dtype=HALF))
    assert asking.record(func, args, None) is not None
    with monkeypatch.context() as patch:
        patch.setattr(asking, "MOST_BYTES", 1000)
        assert asking.record(func, args, None) is None
    assert asking.record(func, (args[0], torch.empty(0, 64, dtype=HALF)), None) is None
    assert asking.record(func, (args[0], rand(63, 64, dtype=HALF)), None) is None  # no product at all
    with torch.autograd.profiler.profile(use_kineto=True):
        assert asking.record(func, args, None) is None  # somebody else is recording
    assert asking.record(func, args, None) is not None


def conv_step():
    net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.Flatten(),
                        nn.Linear(32 * 256, 4))  # fmt: skip
    x = torch.randn(8, 3, 16, 16)
    optimizer = torch.optim.SGD(net.parameters())

    def step():
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return net, x, step


def traced(make, **how):
    with tracing(on="cpu", **how) as t:
        kept = make()
        kept[-1]()
        kept[-1]()
    return t.ledger


def real_peak(make):
    model, x, step = make()
    step()
    meter = PeakMeter()
    with meter.watch(CPU, [*model.parameters(), x]):
        step()
    return meter.bytes


def test_a_convolutions_scratch_stands_at_the_peak_by_its_name():
    ledger = traced(conv_step)
    named = [h for h in ledger.memory.holdings if "oneDNN's blocked layouts in aten.convolution_backward" in h.module]
    assert [h.memory_class for h in named] == ["temporary"]
    assert ledger.memory.peak_bytes == pytest.approx(real_peak(conv_step), rel=1e-3)
    bare = traced(conv_step, scratch="none").memory.peak_bytes
    assert bare < 0.9 * ledger.memory.peak_bytes
    assert ledger.memory.peak_bytes - named[0].n_bytes <= bare
    assert any("called once each on this CPU" in a for a in ledger.assumptions)
    assert any("by formula" in a for a in traced(conv_step, scratch="formula").assumptions)


def test_between_steps_no_scratch_stands():
    with_it, without = traced(conv_step).memory, traced(conv_step, scratch="none").memory
    assert with_it.between_steps == without.between_steps
    assert with_it.base == without.base


def test_on_a_gpu_nothing_is_asked_and_no_scratch_counted(monkeypatch):
    monkeypatch.setattr(asking, "record", lambda *a: pytest.fail("asked"))
    with tracing() as t:
        conv = nn.Conv2d(3, 32, 3).cuda()
        conv(torch.randn(2, 3, 8, 8, device="cuda")).sum().backward()
    assert not any(" in aten." in s.name for s in t.ledger.storages)


def test_an_unknown_way_of_knowing_is_refused():
    with pytest.raises(UnknownName, match="asked"), tracing(on="cpu", scratch="guess"):
        pass


# ---- what is no scratch, and stands all the same


def test_a_mean_squared_error_holds_the_loss_of_each_element():
    """Loss.cpp makes the scalar by shrinking the tensor of the elements' losses, which stays with it."""

    def make():
        x, y = torch.randn(64, 100, requires_grad=True), torch.randn(64, 100)
        return x, y, lambda: nn.functional.mse_loss(x, y)

    assert make()[-1]().untyped_storage().nbytes() == 4 * 6400
    with tracing(on="cpu") as t:
        loss = make()[-1]()
        assert loss.untyped_storage().nbytes() == 4 * 6400
    assert sum(t.ledger.memory.between_steps.values()) == 3 * 4 * 6400


def test_each_checkpoint_keeps_5056_bytes_of_random_state():
    state = torch.get_rng_state().nbytes
    assert state == 5056

    def make(n, recomputed):
        layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(n))
        x = torch.randn(4, 16)

        def step():
            h = x
            for layer in layers:
                h = checkpoint(layer, h, use_reentrant=False) if recomputed else layer(h)
            kept.append(t.recorder.events[-1])
            h.sum().backward()

        return layers, x, step

    found = {}
    for n in (1, 3):
        kept = []
        with tracing(on="cpu") as t:
            layers, x, step = make(n, True)
            step()
        random = [s for s in t.ledger.storages if s.name == "random state of a checkpoint"]
        found[n] = len([s for s in random if s.memory_class == "activations"])
        assert {s.n_bytes for s in random} == {state}
        assert sum(d for _, i, d in t.ledger.events if t.ledger.storages[i] in random) == 0  # all of it let go
        assert layers is not None
        assert x is not None
    assert found == {1: 1, 3: 3}
