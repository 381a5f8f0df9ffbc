"""The tracer: what it records where, what "cuda" means inside it, and that nothing of it is left behind."""

from __future__ import annotations

import functools
import inspect
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import grad as grad_imported_before
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

from bursar.errors import BadInput, BursarError, DataDependent, TraceFailed, UnknownName
from bursar.ledger import parts
from bursar.rules import KINDS, MODEL_KINDS, PHASES
from bursar.trace import Session, patches, tracing

ways = pytest.mark.parametrize("on", [None, "cpu"])


def device_of(on):
    return "cpu" if on == "cpu" else "cuda"


def traced(run, on=None):
    with tracing(on=on) as t:
        run(device_of(on))
    return t.ledger


def rows_of(ledger, **wanted):
    return [r for r in ledger.recorded if all(getattr(r, k) == v for k, v in wanted.items())]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Two blocks between an embedding and a head; D = 8, V = 20."""

    def __init__(self, tied=False, recompute=None):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList([Block(8) for _ in range(2)])
        self.head = nn.Linear(8, 20, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.recompute = recompute

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = (
                block(x)
                if self.recompute is None
                else checkpoint(block, x, use_reentrant=self.recompute == "reentrant")
            )
        return self.head(x)


def tokens_on(dev, B=3, S=5):
    return torch.zeros(B, S, dtype=torch.long, device=dev)


def train(dev, model=None, steps=2, accumulate=1, B=3):
    model = (model or Net()).to(dev)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        for _ in range(accumulate):
            tokens = tokens_on(dev, B)
            F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


# ---- modules


@ways
def test_an_op_belongs_to_its_module_forward_and_backward(on):
    products = rows_of(traced(train, on), kind="matmul")
    forward, backward = ([r.module for r in products if r.phase == phase] for phase in ("forward", "backward"))
    linears = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("up", "down")] + ["head"]
    assert forward == linears
    assert backward == [name for name in reversed(linears) for _ in ("dX", "dW")]


@ways
def test_norm_and_embedding_are_attributed_in_backward_too(on):
    ledger = traced(train, on)
    for op, modules in (("native_layer_norm", ["blocks.0.norm", "blocks.1.norm"]), ("embedding", ["embed"])):
        assert [r.module for r in rows_of(ledger, op=f"aten.{op}")] == modules
    assert [r.module for r in rows_of(ledger, op="aten.native_layer_norm_backward")] == [
        "blocks.1.norm",
        "blocks.0.norm",
    ]
    assert [r.module for r in rows_of(ledger, op="aten.embedding_dense_backward")] == ["embed"]


def test_code_without_modules_has_phases_and_no_module():
    def run(dev):
        w = torch.randn(4, 3, device=dev, requires_grad=True)
        optimizer = torch.optim.SGD([w])
        (torch.randn(2, 4, device=dev) @ w).sum().backward()
        optimizer.step()

    ledger = traced(run)
    assert {r.module for r in ledger.recorded} == {""}
    assert (ledger.flops.forward, ledger.flops.backward) == (2 * 2 * 4 * 3, 2 * 2 * 4 * 3)
    assert ledger.model.parameters == 12  # what an optimizer steps is a parameter
    assert ledger.memory.at_peak["parameters"] == 48


def test_a_tied_weight_is_one_parameter_used_in_two_places():
    tied, untied = (traced(lambda dev, tied=tied: train(dev, Net(tied))) for tied in (True, False))
    assert untied.model.parameters - tied.model.parameters == 20 * 8
    assert untied.memory.between_steps["parameters"] - tied.memory.between_steps["parameters"] == 4 * 20 * 8
    assert tied.flops.model == untied.flops.model
    assert {r.module for r in rows_of(tied, phase="forward", kind="matmul")} >= {"head"}


def test_a_frozen_layer_has_no_weight_gradient_and_no_state():
    def run(dev):
        model = Net()
        model.blocks[1].up.weight.requires_grad_(False)
        train(dev, model)

    ledger, full = traced(run), traced(train)
    assert full.flops.backward - ledger.flops.backward == 2 * 15 * 8 * 32
    assert ledger.model.parameters - ledger.model.trainable_parameters == 8 * 32
    states = [m.memory.between_steps["optimizer_state"] for m in (full, ledger)]
    assert states[0] - states[1] == 2 * 4 * 8 * 32


@ways
def test_two_micro_batches_are_twice_the_work_in_one_step(on):
    one, two = traced(train, on), traced(functools.partial(train, accumulate=2), on)
    assert (two.flops.forward, two.flops.backward) == (2 * one.flops.forward, 2 * one.flops.backward)
    assert (one.step.micro_batches, one.step.samples, one.step.tokens) == (1, 3, 15)
    assert (two.step.micro_batches, two.step.samples, two.step.tokens) == (2, 6, 30)
    optimizers = [[r.work for r in rows_of(m, kind="optimizer")] for m in (one, two)]
    assert optimizers[0] == optimizers[1]
    phases = [r.phase for r in two.recorded if r.kind in MODEL_KINDS]
    assert [p for i, p in enumerate(phases) if i == 0 or phases[i - 1] != p] == ["forward", "backward"] * 2


def test_the_ledger_is_the_last_step_and_the_first_makes_the_states():
    first, later = (
        traced(functools.partial(train, steps=1)),
        [traced(functools.partial(train, steps=n)) for n in (2, 4)],
    )
    assert later[0].flops == later[1].flops
    assert sum(first.memory.base.values()) == 0
    for memory_class in ("parameters", "optimizer_state"):
        assert later[0].memory.base[memory_class] == later[0].memory.between_steps[memory_class] > 0


def test_of_two_optimizers_each_has_one_step_in_the_ledger():
    def run(dev):
        a, b = nn.Linear(4, 4).to(dev), nn.Linear(4, 2).to(dev)
        first, second = torch.optim.SGD(a.parameters(), foreach=False), torch.optim.SGD(b.parameters(), foreach=False)
        for _ in range(3):
            x = torch.randn(5, 4, device=dev)
            for optimizer in (first, second):
                first.zero_grad()
                second.zero_grad()
                b(a(x)).sum().backward()
                optimizer.step()

    ledger = traced(run)
    assert ledger.flops.forward == 2 * (2 * 5 * 4 * 4 + 2 * 5 * 4 * 2)
    assert len(rows_of(ledger, op="aten.add_", phase="optimizer")) == 4  # two tensors each


def test_an_in_place_op_allocates_nothing_and_a_view_leaves_no_row():
    def run(dev):
        x = torch.randn(4, 6, device=dev)
        x.view(24)[3:].relu_()

    ledger = traced(run)
    assert [(r.op, r.allocated_bytes) for r in ledger.recorded] == [("aten.randn", 96), ("aten.relu_", 0)]
    assert ledger.memory.peak_bytes == 96


@ways
@pytest.mark.parametrize("grad", [lambda *a, **k: torch.autograd.grad(*a, **k), grad_imported_before])
def test_a_gradient_penalty_is_backward_twice_and_no_recompute(on, grad):
    B, D = 6, 4

    def run(dev):
        x, w = torch.randn(B, D, device=dev, requires_grad=True), torch.randn(D, 1, device=dev, requires_grad=True)
        (g,) = grad((x @ w).sum(), x, create_graph=True)
        g.square().sum().backward()

    flops = traced(run, on).flops
    assert flops.forward == 2 * B * D
    assert flops.backward == 2 * B * D + 2 * B * D  # g = 1 w^T, and its dw
    assert flops.recompute == 0


def test_a_closure_that_the_optimizer_calls_is_forward_and_backward():
    def run(dev):
        model, x = nn.Linear(4, 3, bias=False).to(dev), torch.randn(5, 4, device=dev)
        optimizer = torch.optim.SGD(model.parameters())

        def closure():
            optimizer.zero_grad()
            loss = model(x).sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    ledger = traced(run)
    assert (ledger.flops.forward, ledger.flops.backward) == (2 * 5 * 4 * 3, 2 * 5 * 4 * 3)
    assert {r.op for r in rows_of(ledger, phase="optimizer")} == {"aten._foreach_add_"}  # the update alone


# ---- phases


@ways
def test_clipping_belongs_to_the_optimizer_phase(on):
    ledger = traced(train, on)
    first = next(i for i, r in enumerate(ledger.recorded) if r.phase == "optimizer")
    assert any("norm" in r.op for r in rows_of(ledger, phase="optimizer"))
    assert {r.phase for r in ledger.recorded[first:]} == {"optimizer"}
    assert not any("vector_norm" in r.op or "foreach_norm" in r.op for r in rows_of(ledger, phase="backward"))


@ways
@pytest.mark.parametrize("kind", ["reentrant", "saved tensors"])
def test_what_a_checkpoint_runs_again_is_recompute_in_the_same_modules(on, kind):
    plain = traced(lambda dev: train(dev, Net()), on)
    ledger = traced(lambda dev: train(dev, Net(recompute=kind)), on)
    again = rows_of(ledger, phase="recompute", op="aten.addmm")
    assert {r.module for r in again} <= {f"blocks.{i}.{name}" for i in (0, 1) for name in ("up", "down")}
    # the second forward may stop once the last saved tensor is there: down's output is needed by nobody
    per_block = 2 * 15 * 8 * 32 * (2 if kind == "reentrant" else 1)
    assert ledger.flops.recompute == 2 * per_block
    assert (ledger.flops.forward, ledger.flops.backward) == (plain.flops.forward, plain.flops.backward)
    assert plain.flops.recompute == 0


@ways
def test_flops_are_linear_in_the_batch(on):
    one = traced(functools.partial(train, B=1), on).flops
    for B in (2, 7):
        many = traced(functools.partial(train, B=B), on).flops
        assert (many.forward, many.backward) == (B * one.forward, B * one.backward)


@ways
@pytest.mark.parametrize("recompute", [None, "saved tensors"])
def test_kinds_dtypes_phases_and_modules_each_add_up_to_the_total(on, recompute):
    ledger = traced(lambda dev: train(dev, Net(recompute=recompute)), on)
    flops, total = ledger.flops, sum(r.work.flops + r.work.recompute_flops for r in ledger.recorded)
    assert flops.total == total == sum(flops.by_kind.values()) == sum(flops.by_dtype.values())
    for column in ("module", "phase", "kind", "op", "dtype"):
        table = ledger.by(column)
        assert table["flops"].sum() + table["recompute_flops"].sum() == total
        assert table["calls"].sum() == len(ledger) == len(ledger.ops)
        assert table["read_bytes"].sum() + table["written_bytes"].sum() == sum(ledger.bytes_moved.values())
    assert set(ledger.by("phase")["phase"]) <= set(PHASES)
    assert set(ledger.by("kind")["kind"]) <= set(KINDS)
    counted = sum(flops.by_kind[k] for k in MODEL_KINDS)
    assert flops.forward + flops.backward + flops.recompute == counted == flops.hardware
    blocks = parts(ledger.recorded)
    assert sum(part.copies * part.flops for part in blocks) == flops.hardware
    assert sum(part.copies * part.bytes for part in blocks) == sum(ledger.bytes_moved.values())
    assert ledger.by("module", depth=1).filter(module="blocks")["calls"].sum() > 10


def test_grouping_by_an_unknown_column_names_the_known():
    with pytest.raises(BadInput, match="no column 'layer' to group by; it has phase, kind, op, module, dtype"):
        traced(train).by("layer")


# ---- dtypes


def mixed(dev, **how):
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Softmax(-1), nn.Linear(8, 4)).to(dev)
    with torch.autocast(dev, **how):
        loss = F.cross_entropy(net(torch.randn(6, 8, device=dev)), torch.zeros(6, dtype=torch.long, device=dev))
    loss.backward()
    return net


@pytest.mark.parametrize(("how", "low"), [({"dtype": torch.bfloat16}, "bf16"), ({}, "fp16")])
def test_autocast_on_the_accelerator_follows_cuda(how, low):
    nets = []
    ledger = traced(lambda dev: nets.append({p.dtype for q in mixed(dev, **how).parameters() for p in (q, q.grad)}))
    assert {r.dtype for r in rows_of(ledger, kind="matmul")} == {low}
    for op in ("native_layer_norm", "_softmax", "_log_softmax", "nll_loss_forward", "native_layer_norm_backward"):
        assert {r.dtype for r in rows_of(ledger, op=f"aten.{op}")} == {"fp32"}, op
    assert nets == [{torch.float32}]  # parameters and gradients


def test_autocast_on_the_cpu_follows_the_cpu():
    ledger = traced(lambda dev: mixed(dev, dtype=torch.bfloat16), "cpu")
    assert {r.dtype for r in rows_of(ledger, op="aten.native_layer_norm")} == {"bf16"}


def test_a_weight_is_cast_once_per_autocast_block():
    def run(dev):
        layer, x = nn.Linear(8, 8, bias=False).to(dev), torch.randn(2, 8, device=dev, dtype=torch.bfloat16)
        for _ in range(2):
            with torch.autocast(dev, torch.bfloat16):
                layer(layer(x))

    assert len(rows_of(traced(run), op="aten._to_copy")) - 1 == 2  # and the one that moved the layer


def test_adamw_runs_over_lists_on_the_accelerator_and_in_a_loop_on_the_cpu():
    on_gpu, on_cpu = ({r.op for r in rows_of(traced(train, on), phase="optimizer")} for on in (None, "cpu"))
    assert "aten._foreach_addcdiv_" in on_gpu
    assert "aten.addcdiv_" not in on_gpu
    assert "aten.addcdiv_" in on_cpu
    assert not any("_foreach_addcdiv" in op for op in on_cpu)


# ---- what "cuda" means

FORMS = {
    ".cuda()": lambda x: x.cuda(),
    ".cuda(0)": lambda x: x.cuda(0),
    '.to("cuda")': lambda x: x.to("cuda"),
    '.to("cuda:0")': lambda x: x.to("cuda:0"),
    ".to(0)": lambda x: x.to(0),
    ".to(device=)": lambda x: x.to(device=torch.device("cuda")),
    ".to(other)": lambda x: x.to(torch.empty(1, device="cuda")),
    "device=": lambda x: torch.zeros(4, device="cuda"),
    "device=cuda:0": lambda x: torch.zeros(4, device="cuda:0"),
    "_like": lambda x: torch.ones_like(x, device="cuda"),
    "torch.tensor": lambda x: torch.tensor([1.0, 2, 3, 4], device="cuda"),
    "torch.as_tensor": lambda x: torch.as_tensor([1.0, 2, 3, 4], device="cuda"),
    "from numpy": lambda x: torch.from_numpy(np.zeros(4, np.float32)).to("cuda"),
    "module.cuda()": lambda x: nn.Linear(4, 1, bias=False).cuda().weight.view(4),
    'module.to("cuda")': lambda x: nn.Linear(4, 1, bias=False).to("cuda").weight.view(4),
    "module(device=)": lambda x: nn.Linear(4, 1, bias=False, device="cuda").weight.view(4),
}


@pytest.mark.parametrize("form", FORMS)
def test_cuda_in_every_form_is_the_accelerator(form):
    with tracing() as t:
        y = FORMS[form](torch.zeros(4)) + 1
        assert (y.device, y.is_cuda, y.device.type) == (torch.device("cuda:0"), True, "cuda")
    assert [r.shapes[-1] for r in rows_of(t.ledger, op="aten.add")] == [(4,)]


def test_a_device_context_is_the_accelerator():
    with tracing() as t:
        with torch.device("cuda"):
            made = [nn.Linear(4, 2).weight, torch.randn(3), torch.tensor([1.0]), torch.arange(5)]
        assert all(x.is_cuda for x in made)
        assert not torch.zeros(1).is_cuda
    assert t.ledger.memory.peak_bytes >= 4 * (8 + 3 + 1) + 8 * 5


def test_torch_cuda_answers_as_one_device_inside_and_as_itself_outside():
    outside = torch.cuda.is_available(), torch.cuda.device_count()
    with tracing():
        assert torch.cuda.is_available()
        assert torch.cuda.device_count() == 1
        assert torch.cuda.current_device() == 0
        assert torch.cuda.is_bf16_supported()
        torch.cuda.synchronize()
        torch.cuda.manual_seed_all(0)
        torch.manual_seed(0)
    assert (torch.cuda.is_available(), torch.cuda.device_count()) == outside


def test_a_model_left_on_the_cpu_is_named_and_not_counted_as_the_accelerators():
    ledger = traced(lambda dev: nn.Linear(4, 4)(torch.randn(2, 4)).sum().backward())
    assert ledger.flops.total == 0
    assert any("ran on the CPU and are not counted" in a for a in ledger.assumptions)
    assert not traced(train).assumptions


def test_an_unknown_accelerator_is_refused_before_anything_runs():
    with pytest.raises(UnknownName, match="did you mean h100-sxm"), tracing(on="h100"):
        pytest.fail("the block ran")


# ---- attention


@pytest.mark.parametrize(
    ("dtype", "how", "kernel"),
    [
        (torch.bfloat16, {}, "flash"),
        (torch.float16, {"is_causal": True}, "flash"),
        (torch.float32, {}, "efficient"),
        (torch.bfloat16, {"attn_mask": True}, "efficient"),
        (torch.bfloat16, {"kv_heads": 2}, "flash"),
        (torch.float32, {"kv_heads": 2}, "math"),
        (torch.float64, {}, "math"),
        (
            torch.bfloat16,
            {"is_causal": True, "keys": 24},
            "efficient",
        ),  # flash would align the mask to the other corner
    ],
)
def test_attention_runs_the_kernel_that_cuda_would_choose(dtype, how, kernel):
    def run(dev):
        heads, keys = how.get("kv_heads", 4), how.get("keys", 16)
        q = torch.randn(2, 4, 16, 32, device=dev, dtype=dtype, requires_grad=True)
        k, v = (torch.randn(2, heads, keys, 32, device=dev, dtype=dtype) for _ in range(2))
        mask = torch.ones(16, keys, dtype=torch.bool, device=dev) if how.get("attn_mask") else None
        causal = how.get("is_causal", False)
        F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=heads != 4).sum().backward()

    ledger = traced(run)
    ops = {r.op for r in rows_of(ledger, kind="attention")}
    if kernel == "math":
        assert not ops
        assert rows_of(ledger, op="aten.bmm")
    else:
        name = f"aten._scaled_dot_product_{kernel}_attention"
        assert ops == {name, f"{name}_backward"}


def test_a_backend_switched_off_is_not_chosen():
    def run(dev):
        q, k, v = (torch.randn(1, 2, 8, 16, device=dev, dtype=torch.bfloat16) for _ in range(3))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            F.scaled_dot_product_attention(q, k, v)

    assert not rows_of(traced(run), kind="attention")


# ---- nothing is changed afterwards


class Fails(nn.Module):
    """Passes its input on, and fails where it is told to."""

    def __init__(self):
        super().__init__()
        self.where, self.error, self.calls = "", ValueError, 0
        self.register_buffer("seen", torch.zeros(8))
        self.cache = None

    def forward(self, x):
        self.calls += 1
        self.cache = x.detach()
        self.seen = self.seen * 0.9 + x.mean(0).detach()
        if self.where == "forward" or (self.where == "recompute" and self.calls % 2 == 0):
            raise self.error("as told")
        if self.where == "hook":
            x = x * 1
            x.register_hook(self.fail)
        return FailsBackward.apply(x, self) if self.where == "backward" else x.sin()

    def fail(self, *args):
        raise self.error("as told")


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        return x * 2

    @staticmethod
    def backward(ctx, g):
        ctx.module.fail()


class User:
    """A user's own module and optimizer, real, in the middle of training."""

    def __init__(self):
        torch.manual_seed(0)
        self.fails = Fails()
        self.model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), self.fails, nn.Linear(8, 4))
        self.model[4].weight.requires_grad_(False)
        self.model[0].register_forward_hook(lambda module, args, out: None)
        self.model[2].eval()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.step("cpu", self.optimizer)  # a real one
        self.fails.cache = None
        self.forward("cpu").backward()  # gradients stand

    def forward(self, dev):
        x = torch.randn(6, 8).to(dev)
        if self.fails.where == "recompute":
            return self.model[4](checkpoint(self.model[:4], x, use_reentrant=False)).sum()
        return self.model(x).sum()

    def step(self, dev, optimizer):
        optimizer.zero_grad()
        self.forward(dev).backward()
        optimizer.step()
        if self.fails.where == "optimizer":
            self.fails.fail()
        random.random(), np.random.rand()  # noqa: NPY002

    def traced_step(self, on):
        """One step of the user's module as it is (on the CPU) or moved to the accelerator."""
        with tracing(on=on) as t:
            if on is None:
                self.model.to("cuda")
            optimizer = self.optimizer if on == "cpu" else torch.optim.AdamW(self.model.parameters())
            if self.fails.where == "optimizer":
                optimizer.register_step_post_hook(self.fails.fail)
            self.traced = t
            self.step(device_of(on), optimizer)
        return t.ledger


def numbers(tensor):
    return None if tensor is None else (id(tensor), type(tensor), tensor.device.type, tensor.tolist())


def state_of(user):
    """Everything a trace might touch, as plain comparable values."""
    model, optimizer = user.model, user.optimizer
    modules = list(model.modules())
    return {
        "parameters": [(n, numbers(p), p.requires_grad, numbers(p.grad)) for n, p in model.named_parameters()],
        "buffers": [(n, numbers(b)) for n, b in model.named_buffers()],
        "attributes": [sorted(set(vars(m))) for m in modules],
        "cache": type(user.fails.cache),
        "training": [m.training for m in modules],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in modules],
        "state": [(id(p), {k: numbers(v) for k, v in s.items()}) for p, s in optimizer.state.items()],
        "groups": [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
        "torch rng": torch.get_rng_state().tolist(),
        "python rng": random.getstate(),
        "numpy rng": [str(part) for part in np.random.get_state()],  # noqa: NPY002
        "modes": (len(_get_current_dispatch_mode_stack()), len(_get_current_function_mode_stack())),
        "flags": (torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu")),
        "step hooks": (
            len(_global_optimizer_pre_hooks),
            len(_global_optimizer_post_hooks),
        ),
    }


@ways
def test_a_users_own_module_is_as_it_was(on):
    user = User()
    before = state_of(user)
    ledger = user.traced_step(on)
    assert state_of(user) == before
    assert ledger.flops.forward == 2 * 6 * (8 * 8 + 8 * 4)
    assert ledger.flops.optimizer > 0
    weights = 4 * (8 * 8 + 8 + 8 + 8 + 8 * 4 + 4)
    assert ledger.memory.at_peak["parameters"] == weights
    trained = weights - 4 * 8 * 4  # two moments each, and on the CPU a step count for each of the five tensors
    assert ledger.memory.between_steps["optimizer_state"] == 2 * trained + (5 * 4 if on == "cpu" else 0)


def test_a_real_step_changes_what_a_traced_one_must_not():
    user = User()
    before = state_of(user)
    user.step("cpu", user.optimizer)
    after = state_of(user)
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"parameters", "buffers", "state", "torch rng", "python rng", "numpy rng"}


@ways
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "backward", "hook", "recompute", "optimizer"])
def test_an_error_anywhere_is_the_users_own_and_leaves_nothing_behind(where, error, on):
    user = User()
    hooks = len(user.optimizer._optimizer_step_post_hooks)
    before = state_of(user)
    user.fails.where, user.fails.error, user.fails.calls = where, error, 0
    with pytest.raises(error, match="as told"):
        user.traced_step(on)
    user.fails.where = ""
    assert state_of(user) == before
    assert user.traced.ledger.partial
    assert len(user.traced.ledger) > 0
    while len(user.optimizer._optimizer_step_post_hooks) > hooks:
        user.optimizer._optimizer_step_post_hooks.popitem()
    user.step("cpu", user.optimizer)  # a real step still runs
    assert all(type(p.grad) is torch.Tensor for p in user.model.parameters() if p.grad is not None)
    assert not user.traced_step(on).partial
    assert user.traced.ledger.flops.forward == 2 * 6 * (8 * 8 + 8 * 4)


@ways
def test_an_error_below_a_node_of_autograds_own_comes_out_of_backward(on, monkeypatch):
    def broken(op):
        raise ValueError("no such price")

    from bursar import rules

    monkeypatch.setattr(rules, "RULES", {**rules.RULES, "aten.threshold_backward": rules.Rule("elementwise", broken)})
    with pytest.raises(ValueError, match="no such price"):
        traced(lambda dev: torch.randn(4, device=dev, requires_grad=True).relu().sum().backward(), on)
    monkeypatch.undo()
    assert traced(train, on).flops.forward > 0


@ways
def test_every_attribute_changed_in_torch_is_the_same_object_again(on, monkeypatch):
    changed = {}
    plain = patches.Undo.set

    def spy(undo, owner, name, value):
        changed.setdefault((id(owner), name), (owner, name, inspect.getattr_static(owner, name, None)))
        return plain(undo, owner, name, value)

    monkeypatch.setattr(patches.Undo, "set", spy)

    def differing():
        return [n for o, n, before in changed.values() if inspect.getattr_static(o, n, None) is not before]

    with tracing(on=on):
        train(device_of(on))
        assert len(differing()) == len(changed) >= (40 if on is None else 8)  # the twin: inside they are others
    assert differing() == []
    with pytest.raises(ZeroDivisionError), tracing(on=on):
        1 / 0  # noqa: B018
    assert differing() == []


def test_real_training_is_the_same_with_and_without_a_trace_in_between():
    def losses(with_trace):
        torch.manual_seed(0)
        user = User()
        found = []
        for _ in range(3):
            if with_trace:
                user.traced_step("cpu")
                user.traced_step(None)
            user.step("cpu", user.optimizer)
            found.append([p.tolist() for p in user.model.parameters()])
        return found

    assert losses(True) == losses(False)


def test_the_ledger_is_not_there_before_the_block_ends():
    with tracing(on="cpu") as t, pytest.raises(BursarError, match="read it after the `with`"):
        t.ledger  # noqa: B018


def test_a_marked_step_begins_at_the_mark():
    session = Session(None)
    with session.open():
        train("cuda", steps=1)
        session.mark()
        torch.ones(3, device="cuda") * 2
    assert [r.op for r in session.ledger.recorded] == ["aten.ones", "aten.mul"]


# ---- what a trace cannot do


class LooksAtData(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.inner = nn.Identity()
        self.how = how

    def forward(self, x):
        return self.how(self.inner(x))


def line_of(function):
    return f"{Path(__file__).name}:{inspect.getsourcelines(function)[1]}"


def item(x):
    return x * x.sum().item()


def branch(x):
    return x if x.sum() > 0 else -x


def select(x):
    return x[x > 0]


def nonzero(x):
    return x.nonzero()


@ways
@pytest.mark.parametrize("how", [item, branch, select, nonzero])
def test_code_that_needs_values_is_told_where_and_what_to_do(how, on):
    model = nn.Sequential(nn.Linear(4, 4), LooksAtData(how))
    with pytest.raises(DataDependent) as caught:
        traced(lambda dev: model.to(dev)(torch.randn(2, 4, device=dev)), on)
    error = caught.value
    file, line = line_of(how).split(":")
    assert f"{file}:{int(line) + 1}" in error.where
    assert error.module == "1"
    assert "torch.where" in error.remedy
    assert error.exit_code == 2
    assert type(model[0].weight) is nn.Parameter


def test_a_number_known_without_the_data_is_no_obstacle():
    def run(dev):
        x = torch.randn(2, 4, device=dev)
        return x * torch.tensor(3.0).item() * x.shape[0]

    assert len(rows_of(traced(run), op="aten.mul")) == 2


@torch.library.custom_op("bursar_tests::without_fake", mutates_args=())
def without_fake(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


def test_a_custom_op_without_a_fake_kernel_is_named_with_the_remedy():
    with pytest.raises(TraceFailed, match=r"bursar_tests::without_fake.*register_fake\('bursar_tests::without_fake'\)"):
        traced(lambda dev: without_fake(torch.randn(2, device=dev)))


@ways
def test_a_shape_mismatch_is_the_users_own_error(on):
    with pytest.raises(RuntimeError, match="5"):
        traced(lambda dev: nn.Linear(4, 4).to(dev)(torch.randn(2, 5, device=dev)), on)
