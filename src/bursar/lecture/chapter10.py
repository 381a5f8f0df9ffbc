"""Chapter 10 of the notes: optimizers, memory and the Transformer's totals.

B batch   D width   L layers   T sequence   P parameters   A activations   G gradients   O optimizer state
"""

# ruff: noqa: D103 (a claim's row in catalog/lecture.toml says what its function executes)

from __future__ import annotations

import functools
import importlib
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from bursar import architecture
from bursar.errors import MissingExtra
from bursar.hardware import accelerator
from bursar.lecture import Claim, Finding, claim, close, shared
from bursar.lecture.traces import product_share, step, traced, whole, zeros
from bursar.ledger import Ledger
from bursar.memory import Textbook
from bursar.network import all_gather_bytes, all_reduce_bytes, rounds, zero_bytes
from bursar.run import solve
from bursar.units import format_bytes, format_count, format_flops, format_rate, format_share
from bursar.workload.modules.small import Cruncher
from bursar.workload.step import step as trace_step

H100 = "h100-sxm"
FP32_BYTES = 4
GPT2 = "gpt2:L=2"  # two layers of it: enough for a share or a ratio, and quick to trace
SMALL_GPT = "gpt2:L=2,d=64,h=2,V=128"


def _cruncher() -> Ledger:
    """The notes' step: D = 4, B = 2, L = 2, AdaGrad, fp32."""
    return step("cruncher")


def _textbook() -> Textbook:
    return _cruncher().textbook


def _elements(n_bytes: int) -> int:
    return n_bytes // FP32_BYTES


# ---- the notes' step


@claim("10.5")
def zero_grad(notes: Claim) -> Finding:
    memory = _cruncher().memory
    during, after = memory.at_peak["gradients"], memory.between_steps["gradients"]
    return Finding(
        f"gradients take {format_bytes(during)} in the step and {format_bytes(after)} after it",
        {"freed between steps": during > 0 == after},
        numbers=(during, after),
    )


@claim("10.6")
def parameters(notes: Claim) -> Finding:
    n = _cruncher().model.parameters
    return Finding(str(n), {"counted": n == notes.value}, numbers=(n,))


@claim("10.7")
def activations(notes: Claim) -> Finding:
    ledger = _cruncher()
    outputs = _elements(_textbook().activations)
    saved = _elements(ledger.memory.after_forward["activations"])
    with_data = saved + _elements(ledger.memory.at_peak["inputs"])
    return Finding(
        f"{outputs} as the layers' outputs; autograd saves {saved}, {with_data} with x and y",
        {"outputs of the layers": outputs == notes.value, "saved for backward": saved == notes.value},
        numbers=(outputs, saved, with_data),
    )


@claim("10.8")
def gradients(notes: Claim) -> Finding:
    n = _elements(_cruncher().memory.at_peak["gradients"])
    return Finding(str(n), {"at the peak": n == notes.value}, numbers=(n,))


@claim("10.9")
def optimizer_state(notes: Claim) -> Finding:
    n = _elements(_textbook().optimizer_state)
    return Finding(str(n), {"AdaGrad's sums of squares": n == notes.value}, numbers=(n,))


@claim("10.10")
def total(notes: Claim) -> Finding:
    book = _textbook()
    parts = (book.parameters, book.activations, book.gradients, book.optimizer_state)
    return Finding(
        f"{book.total} bytes = {FP32_BYTES} · ({' + '.join(str(_elements(n)) for n in parts)}); the traced peak is "
        f"{_cruncher().memory.peak_bytes} bytes",
        {"the sum": book.total == notes.value},
        numbers=(book.total, _cruncher().memory.peak_bytes),
    )


def _shares(notes: Claim, order: tuple[str, ...]) -> Finding:
    book = _textbook()
    shares = {name: getattr(book, name) / book.total for name in order}
    return Finding(
        ", ".join(f"{name.replace('_', ' ')} {format_share(share, 2)}" for name, share in shares.items()),
        {"all four, to 2 %": all(close(100 * s, n, 0.02) for s, n in zip(shares.values(), notes.values, strict=True))},
        numbers=tuple(shares.values()),
    )


@claim("10.11")
def table_of_shares(notes: Claim) -> Finding:
    return _shares(notes, ("parameters", "activations", "gradients", "optimizer_state"))


@claim("10.12")
def step_flops(notes: Claim) -> Finding:
    flops = _cruncher().flops
    return Finding(
        f"{flops.six_p_tokens} by the rule, {flops.model} executed ({flops.forward} + {flops.backward})",
        {"by the rule": flops.six_p_tokens == notes.value, "executed": flops.model == notes.value},
        numbers=(flops.six_p_tokens, flops.model),
    )


@claim("10.13")
def forward_and_backward(notes: Claim) -> Finding:
    flops = _cruncher().flops
    return Finding(
        f"{flops.forward} and {flops.backward}",
        {"forward": flops.forward == notes.values[0], "backward": flops.backward == notes.values[1]},
        numbers=(flops.forward, flops.backward),
    )


@claim("10.22")
def pie(notes: Claim) -> Finding:
    return _shares(notes, ("parameters", "gradients", "optimizer_state", "activations"))


# ---- optimizers


@claim("10.18")
def sgd(notes: Claim) -> Finding:
    plain, momentum = _state("sgd"), _state("momentum")
    return Finding(
        f"{plain:g} × P; with momentum {momentum:g} × P", {"plain SGD": plain == notes.value}, numbers=(plain, momentum)
    )


@claim("10.19")
def adagrad(notes: Claim) -> Finding:
    n = _state("adagrad")
    return Finding(f"{n:g} × P", {"its real state": n == notes.value}, numbers=(n,))


@claim("10.20")
def adam(notes: Claim) -> Finding:
    n = _state("adam")
    return Finding(f"{n:g} × P", {"its real state": n == notes.value}, numbers=(n,))


def _state(optimizer: str) -> float:
    """Tensors of state per parameter, off the optimizer's own state after a step."""
    book = step("cruncher", optimizer=optimizer).textbook
    return book.optimizer_state / book.parameters


def _per_parameter(precision: str) -> dict[str, float]:
    """Bytes per parameter of weights, gradients and AdamW's states."""
    ledger = step(SMALL_GPT, batch_size=1, seq_len=32, precision=precision)
    book, n = ledger.textbook, ledger.model.parameters
    return {"P": book.parameters / n, "G": book.gradients / n, "O": book.optimizer_state / n}


@claim("10.23")
def bf16_parameters(notes: Claim) -> Finding:
    fp32, bf16 = _per_parameter("fp32"), _per_parameter("bf16")
    saved = 1 - (bf16["P"] + bf16["G"]) / (fp32["P"] + fp32["G"])
    before = sum(fp32.values())
    with_master = bf16["P"] + bf16["G"] + fp32["O"] + fp32["P"]
    return Finding(
        f"{format_share(saved, 0)} of weights and gradients; AdamW {before:g} bytes per parameter in fp32, "
        f"{with_master:g} in bf16 beside fp32 master weights and states",
        {"weights and gradients": close(100 * saved, notes.value)},
        {"the training state shrinks": with_master < before},
        numbers=(saved, before, with_master),
    )


@claim("10.24")
def fp32_state(notes: Claim) -> Finding:
    state = {precision: _per_parameter(precision)["O"] for precision in ("bf16-mixed", "bf16")}
    return Finding(
        ", ".join(f"{precision}: AdamW keeps {n:g} bytes per parameter" for precision, n in state.items()),
        {precision: n == 2 * FP32_BYTES for precision, n in state.items()},
        numbers=tuple(state.values()),
    )


@claim("10.27")
def checkpointing(notes: Claim) -> Finding:
    plain, again = (step(GPT2, batch_size=1, seq_len=1024, recompute=how) for how in ("none", "full"))
    kept = [x.memory.after_forward["activations"] for x in (plain, again)]
    more = again.flops.hardware / plain.flops.hardware - 1
    return Finding(
        f"two layers of GPT-2 checkpointed: activations {format_bytes(kept[0])} become {format_bytes(kept[1])}, FLOPs "
        f"rise by {format_share(more)}",
        {"less memory": kept[1] < kept[0], "more work": more > 0},
        numbers=(*kept, more),
    )


# ---- what optimizers do


def _follow(
    make: Callable[[list[torch.Tensor]], torch.optim.Optimizer], gradients: Sequence[float]
) -> tuple[list[float], set[str]]:
    """A parameter's values from 0 on, a gradient at a time, and the names of what the optimizer keeps for it."""
    p = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = make([p])
    values = []
    for g in gradients:
        p.grad = torch.full_like(p, g)
        optimizer.step()
        values.append(p.item())
    return values, {name for name, kept in optimizer.state[p].items() if kept is not None and name != "step"}


LR, EPSILON, DECAY = 0.01, 1e-8, 0.9
GRADIENTS = (0.5, -0.2, 0.8, 0.1)


def _by_hand(rule: str) -> list[float]:
    """The same values by the rule as written: `first` is the average of gradients, `second` of their squares."""
    p = first = second = 0.0
    values = []
    for t, g in enumerate(GRADIENTS, 1):
        if rule == "SGD":
            p -= LR * g
        elif rule == "Momentum":
            first = DECAY * first + g
            p -= LR * first
        elif rule == "AdaGrad":
            second += g * g
            p -= LR * g / (math.sqrt(second) + EPSILON)
        elif rule == "RMSProp":
            second = DECAY * second + (1 - DECAY) * g * g
            p -= LR * g / (math.sqrt(second) + EPSILON)
        else:
            first = DECAY * first + (1 - DECAY) * g
            second = DECAY * second + (1 - DECAY) * g * g
            mean, square = first / (1 - DECAY**t), second / (1 - DECAY**t)
            p -= LR * mean / (math.sqrt(square) + EPSILON)
        values.append(p)
    return values


@claim("10.1")
def family(notes: Claim) -> Finding:
    kinds: dict[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]] = {
        "SGD": lambda p: torch.optim.SGD(p, LR),
        "Momentum": lambda p: torch.optim.SGD(p, LR, momentum=DECAY),
        "AdaGrad": lambda p: torch.optim.Adagrad(p, LR, eps=EPSILON),
        "RMSProp": lambda p: torch.optim.RMSprop(p, LR, alpha=DECAY, eps=EPSILON),
        "Adam": lambda p: torch.optim.Adam(p, LR, betas=(DECAY, DECAY), eps=EPSILON),
    }
    found = {name: _follow(make, GRADIENTS) for name, make in kinds.items()}
    agree = {
        name: all(close(a, b, 1e-9) for a, b in zip(values, _by_hand(name), strict=True))
        for name, (values, _) in found.items()
    }
    kept = {name: names for name, (_, names) in found.items()}
    sums_gradients = {"momentum_buffer", "exp_avg"}
    return Finding(
        "kept per parameter: " + ", ".join(f"{name} {' and '.join(sorted(k)) or 'nothing'}" for name, k in kept.items())
        + f"; {sum(agree.values())} of {len(agree)} do to {len(GRADIENTS)} gradients what their rule says",
        {f"{name}'s rule": ok for name, ok in agree.items()},
        {"AdaGrad builds on momentum": bool(kept["AdaGrad"] & sums_gradients)},
        numbers=tuple(values[-1] for values, _ in found.values()),
    )  # fmt: skip


@claim("10.2")
def adagrad_update(notes: Claim) -> Finding:
    g, lr, epsilon = (notes.given[name] for name in ("gradient", "lr", "epsilon"))
    by_notes = lr * g / (math.sqrt(g * g) + epsilon)
    by_torch = -_follow(lambda p: torch.optim.Adagrad(p, lr, eps=epsilon), [g])[0][0]
    by_course = lr * g / math.sqrt(g * g + epsilon)
    default = -_follow(lambda p: torch.optim.Adagrad(p, lr), [g])[0][0]
    return Finding(
        f"first step at g = {g:g}, ε = {epsilon:g}: by the notes {by_notes:.6f}, torch {by_torch:.6f} "
        f"({default:.6f} with its own ε), the course's code, ε under the root, {by_course:.6f}",
        {
            "torch.optim.Adagrad": close(by_torch, by_notes, 1e-12),
            "the course's code": close(by_course, by_notes, 1e-12),
        },
        numbers=(by_notes, by_torch, by_course, default),
    )


@claim("10.3")
def frequent(notes: Claim) -> Finding:
    steps, every = 100, 10
    p = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adagrad([p], LR)
    for t in range(1, steps + 1):
        before = p.detach().clone()
        p.grad = torch.tensor([1.0, float(t % every == 0)])
        optimizer.step()
    often, seldom = (before - p.detach()).tolist()
    return Finding(
        f"AdaGrad's step {steps}, gradients of 1: {often:.2e} for a parameter that had one each time, {seldom:.2e} for "
        f"one that had one every {every} steps",
        {"the frequent one moves less": often < seldom},
        numbers=(often, seldom),
    )


# The notes' listing, line by line; what it leaves to the reader is given or not.
SNIPPET = """
model = Cruncher(dim=D, num_layers=2)
optimizer = AdaGrad(model.parameters(), lr=0.01)
x = torch.randn(B, D)
y = torch.tensor([4., 5.])
pred_y = model(x)
loss = F.mse_loss(pred_y, y)
loss.backward()
optimizer.step()
optimizer.zero_grad(set_to_none=True)
"""


def _run_snippet(**given: object) -> str:
    """What comes of the listing with ``given`` defined: the error's name, or nothing."""
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of shapes that broadcast; the error says it too
            torch.manual_seed(0)
            exec(SNIPPET, {"torch": torch, "F": F, **given})
    except (NameError, RuntimeError) as error:
        return f"{type(error).__name__}, {error}"
    return ""


@claim("10.4")
def training_snippet(notes: Claim) -> Finding:
    steps: list[int] = []

    class Counted(torch.optim.Adagrad):
        def step(self, closure: Any = None) -> Any:
            steps.append(1)
            return super().step(closure)

    known = {"Cruncher": lambda dim, num_layers: Cruncher(dim, num_layers), "AdaGrad": Counted, "D": 4}
    alone, complete, other = _run_snippet(), _run_snippet(**known, B=2), _run_snippet(**known, B=3)
    return Finding(
        f"as printed: {alone}; with Cruncher, AdaGrad, D and B = 2 given: "
        f"{complete or f'it runs, {len(steps)} step of the optimizer'}; with B = 3: {other}",
        {"with what it needs given": not complete},
        {"as printed": not alone, "for another B": not other, "it is a loop": len(steps) > 1},
        numbers=(len(steps),),
    )


@claim("10.21")
def lamb(notes: Claim) -> Finding:
    Lamb = _extra("pytorch_optimizer", "Lamb", "LAMB comes from pytorch-optimizer")
    n = 64
    p = torch.ones(n, n, requires_grad=True)
    optimizer = Lamb([p], lr=1e-3)
    p.grad = torch.ones_like(p)
    optimizer.step()
    kept = [name for name, x in optimizer.state[p].items() if isinstance(x, torch.Tensor) and x.numel() == p.numel()]
    n_tensors = sum(optimizer.state[p][name].numel() for name in kept) / p.numel()
    return Finding(
        f"{n_tensors:g} × P ({' and '.join(kept)}, pytorch-optimizer's)",
        {"its real state": n_tensors == notes.value},
        numbers=(n_tensors,),
    )


def _extra(module: str, name: str, why: str) -> Any:
    """``module.name`` of the extra `optim`. Raises MissingExtra."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # torchao tells of CUDA libraries that a CPU does not load
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise MissingExtra("optim", why) from error
    finally:
        logging.disable(before)


def _tensor_bytes(x: torch.Tensor) -> int:
    """Bytes of a tensor, of a quantised one those of its parts."""
    if hasattr(x, "__tensor_flatten__"):
        return sum(_tensor_bytes(getattr(x, part)) for part in x.__tensor_flatten__()[0])
    return x.numel() * x.element_size()


@claim("10.25")
def eight_bits(notes: Claim) -> Finding:
    AdamW8bit = _extra("torchao.optim", "AdamW8bit", "8-bit AdamW comes from torchao")
    n = notes.given["n"]

    def per_parameter(make: Callable[..., torch.optim.Optimizer]) -> float:
        p = torch.empty(n, n, device="meta", requires_grad=True)  # the state's sizes follow from the shape
        optimizer = make([p], lr=1e-3)
        p.grad = torch.empty_like(p)
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()
        state = optimizer.state[p]
        return sum(_tensor_bytes(x) for name, x in state.items() if name != "step") / p.numel()

    small, full = per_parameter(AdamW8bit), per_parameter(torch.optim.AdamW)
    return Finding(
        f"{small:.5f} bytes per parameter on a {n}×{n} matrix where AdamW keeps {full:g}: "
        f"{format_share(1 - small / full)} less (torchao's)",
        {"about a byte for each of the two": close(small, 2, 0.02)},
        numbers=(small, full),
    )


@claim("10.26")
def zero_stages(notes: Claim) -> Finding:
    parameters, ranks = notes.given["parameters"], notes.given["ranks"]
    found = [zero_bytes(stage, ranks) for stage in range(4)]
    state = zero_bytes(1, ranks, parameters=0, gradients=0)
    whole_state = zero_bytes(0, ranks, parameters=0, gradients=0)
    return Finding(
        f"{format_count(parameters)} parameters on {ranks} ranks, bytes per parameter and rank: "
        + ", ".join(f"stage {stage} {n:.4g}" for stage, n in enumerate(found))
        + f"; stage 1 keeps {format_bytes(parameters * found[1])} a rank, of which "
        f"{format_bytes(parameters * state)} are optimizer state",
        {"each rank keeps its share of the state": close(state * ranks, whole_state, 1e-12)},
        numbers=tuple(found),
    )


# ---- activations of attention


@shared
def _block_bytes(seq_len: int, kernel: Any) -> int:
    """What one block of a small GPT keeps for backward, with attention's scores stored or not, in bf16."""
    one, two = (
        _saved(f"gpt2:L={layers},d=256,h=4,V=128,T={seq_len}", seq_len, kernel) for layers in (1, 2)
    )  # the difference is a block
    return two - one


def _saved(model: str, seq_len: int, kernel: Any) -> int:
    with sdpa_kernel(kernel):
        ledger = trace_step(model, batch_size=1, seq_len=seq_len, precision="bf16", optimizer="sgd")
    return ledger.memory.after_forward["activations"]


@claim("10.14")
def activations_of_attention(notes: Claim) -> Finding:
    T = 512
    kernels = {"stored scores": SDPBackend.MATH, "FlashAttention": SDPBackend.FLASH_ATTENTION}
    grown = {name: _block_bytes(2 * T, kernel) / _block_bytes(T, kernel) for name, kernel in kernels.items()}
    rest, scores = _gpt3().published_activation_bytes(1, 2048)
    share = scores / (rest + scores)
    return Finding(
        f"twice the sequence ({T} to {2 * T}), a block of width 256 keeps "
        + ", ".join(f"{times:.2f} times with {name}" for name, times in grown.items())
        + f"; by sbh(34 + 5as/h) the scores are {format_share(share, 0)} of a layer of GPT-3 at 2048",
        {f"more than in proportion, with {name}": times > 2.1 for name, times in grown.items()},
        numbers=(*grown.values(), share),
    )


def _attention_memory(T: int, chunk: int, *, training: bool = False, checkpointed: bool = False) -> int:
    """Peak bytes of scores = q·kᵀ, softmax, times v, with ``chunk`` of the T queries at a time."""
    d = 64

    def part(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.t()).softmax(-1) @ v

    def run() -> None:
        q, k, v = (zeros(T, d).requires_grad_(training) for _ in range(3))
        again: Any = functools.partial(checkpoint, part, use_reentrant=False) if checkpointed else part
        out = torch.cat([again(rows, k, v) for rows in q.split(chunk)])
        if training:
            out.sum().backward()

    return traced(run).memory.peak_bytes


@claim("10.28")
def chunks(notes: Claim) -> Finding:
    T, chunk = 1024, 64
    ways: dict[str, dict[str, bool]] = {
        "forward alone": {},
        "training": {"training": True},
        "training with each chunk checkpointed": {"training": True, "checkpointed": True},
    }
    found = {how: [_attention_memory(n, chunk, **way) for n in (T, 2 * T)] for how, way in ways.items()}
    whole_ones = _attention_memory(T, T, training=True)
    return Finding(
        f"training on {T} tokens peaks at {format_bytes(whole_ones)} with whole attention; {chunk} queries at a "
        f"time, then with {2 * T} tokens: "
        + ", ".join(f"{how} {format_bytes(a)}, {b / a:.1f} times" for how, (a, b) in found.items()),
        {f"{how}: the T² part is gone": b / a < 2.5 for how, (a, b) in found.items()},
        numbers=(whole_ones, *(n for pair in found.values() for n in pair)),
    )


# ---- the Transformer


@claim("10.15")
def largest_cost(notes: Claim) -> Finding:
    found = {B: step("gpt2", batch_size=B, seq_len=1024).memory.at_peak for B in (1, 8)}
    largest = {B: max(classes, key=lambda c: classes[c]) for B, classes in found.items()}
    return Finding(
        "; ".join(
            f"GPT-2, batch {B}: optimizer state {format_bytes(x['optimizer_state'])}, the largest is "
            f"{largest[B].replace('_', ' ')} with {format_bytes(x[largest[B]])}"
            for B, x in found.items()
        ),
        {f"batch {B}": name == "optimizer_state" for B, name in largest.items()},
        numbers=tuple(x["optimizer_state"] for x in found.values()),
    )


@claim("10.16")
def share_of_matmuls(notes: Claim) -> Finding:
    shares = {"GPT-2": product_share(step("gpt2", batch_size=1, seq_len=1024)), "Cruncher": product_share(_cruncher())}
    return Finding(
        ", ".join(f"{name} {format_share(share)}" for name, share in shares.items()),
        {name: share > notes.value / 100 for name, share in shares.items()},
        numbers=tuple(shares.values()),
    )


@claim("10.17")
def attention(notes: Claim) -> Finding:
    found = {T: step(SMALL_GPT, batch_size=1, seq_len=T).flops.attention_full_square for T in (32, 64)}
    times = found[64] / found[32]
    return Finding(
        f"{found[32]} FLOP at T = 32, {found[64]} at 64: {times:g} times", {"four times": times == 4}, numbers=(times,)
    )


def _gpt3() -> architecture.Transformer:
    shape = architecture.preset("gpt3-175b")
    assert isinstance(shape, architecture.Transformer)
    return shape


@claim("10.29")
def rule_of_twelve(notes: Claim) -> Finding:
    found = {name: architecture.preset(name) for name in ("gpt2-xl", "gpt3-175b")}
    ratios, whole_ratios = {}, {}
    for name, x in found.items():
        assert isinstance(x, architecture.Transformer)
        groups = x.parameter_groups()
        rule = 12 * x.d_model**2 * x.n_layers
        ratios[name] = rule / (groups["attention"] + groups["mlp"])
        whole_ratios[name] = rule / x.parameters()
    return Finding(
        ", ".join(
            f"{name} {format_share(r)} of its blocks, {format_share(whole_ratios[name])} of all"
            for name, r in ratios.items()
        ),
        {f"{name}'s blocks": close(ratio, 1) for name, ratio in ratios.items()},
        numbers=(*ratios.values(), *whole_ratios.values()),
    )


@claim("10.30")
def gpt3_parameters(notes: Claim) -> Finding:
    shape = _gpt3()
    rule = 12 * shape.d_model**2 * shape.n_layers
    return Finding(
        f"{format_count(rule, 5)} by the rule, {format_count(shape.parameters(), 5)} in full",
        {"by the rule": close(rule, notes.value * 1e9)},
        numbers=(rule, shape.parameters()),
    )


@claim("10.31")
def flops_per_step(notes: Claim) -> Finding:
    found = {name: whole(name, 2048) for name in ("gpt3-175b", "llama3-70b")}
    factors = {name: x.model_flops / (x.parameters * x.tokens) for name, x in found.items()}
    return Finding(
        ", ".join(f"{name} {factor:.2f} · batch · {found[name].tokens} · P" for name, factor in factors.items()),
        {f"{name}, to 5 %": close(factor, 6, 0.05) for name, factor in factors.items()},
        numbers=tuple(factors.values()),
    )


@claim("10.32")
def gpt3_step(notes: Claim) -> Finding:
    given = notes.given
    n = _gpt3().parameters()
    found = {
        tokens: solve(parameters=n, tokens=tokens, on=H100).flops for tokens in (given["batch_tokens"], given["batch"])
    }
    steps = solve(parameters=n, tokens=given["run_tokens"], on=H100).flops / found[given["batch_tokens"]]
    return Finding(
        ", ".join(f"{format_flops(flops)} for {format_count(tokens)} tokens" for tokens, flops in found.items())
        + f"; the run is {format_count(steps, 4)} steps of the first",
        {f"{format_count(tokens)} tokens": close(flops, notes.value, 0.1) for tokens, flops in found.items()},
        numbers=(*found.values(), steps),
    )


# ---- bandwidth and capacity


@claim("10.33")
def memory_wall(notes: Claim) -> Finding:
    ridge = accelerator(H100).ridge("bf16")
    m, k, n = (notes.given[letter] for letter in "BDK")
    found = {
        "the notes' matmul": traced(lambda: zeros(m, k, dtype=torch.bfloat16) @ zeros(k, n, dtype=torch.bfloat16)),
        "ReLU": traced(lambda: zeros(1024, 1024, dtype=torch.bfloat16).relu()),
    }
    works = {name: x.recorded[-1].work for name, x in found.items()}
    intensity = {name: w.flops / (w.read_bytes + w.written_bytes) for name, w in works.items()}
    return Finding(
        ", ".join(f"{name} in bf16 {x:.4g} FLOP per byte" for name, x in intensity.items())
        + f"; the H100 is bound by memory below {ridge:.4g}",
        {f"{name} is bound by memory": x < ridge for name, x in intensity.items()},
        numbers=(*intensity.values(), ridge),
    )


@claim("10.34")
def bandwidth(notes: Claim) -> Finding:
    found = {on: accelerator(on).memory_bytes_per_s for on in (H100, "h100-pcie")}
    return Finding(
        ", ".join(f"{on} {format_rate(rate, 'B')}" for on, rate in found.items()),
        {"the SXM5 part": close(found[H100], notes.value * 1e12)},
        numbers=tuple(found.values()),
    )


@claim("10.35")
def weights_alone(notes: Claim) -> Finding:
    n = notes.given["parameters"]
    two_bytes, fp32 = _per_parameter("bf16"), _per_parameter("fp32")
    weights, training = n * two_bytes["P"], n * sum(fp32.values())
    return Finding(
        f"{format_bytes(weights)} at {two_bytes['P']:g} bytes each; AdamW's training state is {format_bytes(training)}",
        {"the parameters alone": close(weights, notes.value * 1e12, 0.05)},
        numbers=(weights, training),
    )


@claim("10.36")
def data_movement(notes: Claim) -> Finding:
    found = {
        "GPT-2, batch 1": step("gpt2", batch_size=1, seq_len=1024, precision="bf16-mixed"),
        "a layer of GPT-3's shape, batch 8": step("gpt3-175b:L=1", batch_size=8, seq_len=2048, precision="bf16-mixed"),
    }
    bound = {name: x.on(H100).bound_by for name, x in found.items()}
    return Finding(
        ", ".join(
            f"{name}: {format_share(b['memory'] / (b['memory'] + b['compute']), 0)} of the time bound by memory"
            for name, b in bound.items()
        ),
        {name: b["memory"] > b["compute"] for name, b in bound.items()},
        numbers=tuple(b["memory"] / (b["memory"] + b["compute"]) for b in bound.values()),
    )


@claim("10.37")
def fsdp(notes: Claim) -> Finding:
    ranks, n_bytes = 64, step(GPT2, batch_size=1, seq_len=1024).textbook.parameters
    calls = rounds("fsdp", 1, deferred=False)
    sharded = sum(calls.values()) * all_gather_bytes(ranks, n_bytes)
    plain = all_reduce_bytes(ranks, n_bytes)
    return Finding(
        f"on {ranks} ranks FSDP sends {sharded / plain:g} times what data parallelism does ({format_bytes(sharded)} "
        f"and {format_bytes(plain)}), and keeps 1/{ranks} of the {format_bytes(n_bytes)} of weights",
        {"it moves less data": sharded < plain},
        numbers=(sharded, plain),
    )
