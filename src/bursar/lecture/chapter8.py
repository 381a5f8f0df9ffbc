"""Chapter 8 of the notes: what gradients cost, and the 6·B·P.

B batch   D width   K width out   P parameters   x -> w1 (D, D) -> w2 (D, K)
"""

# ruff: noqa: D103 (a claim's row in catalog/lecture.toml says what its function executes)

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from bursar.lecture import Claim, Finding, claim, close, shared
from bursar.lecture.traces import (
    NOTES_SIZES,
    module_step,
    seconds_by_kind,
    step,
    traced,
    two_layer,
    two_layer_rows,
)
from bursar.ledger import Ledger
from bursar.network import data_parallel, rounds
from bursar.report.gradients import layers
from bursar.run import magnitude, solve
from bursar.units import format_bytes, format_count, format_flops, format_seconds, format_share
from bursar.workload.modules.small import TwoLayer

H100 = "h100-sxm"
GPT2 = "gpt2:L=2"  # two layers of it: enough for a share or a ratio, and quick to trace
SMALL_GPT = "gpt2:L=2,d=64,h=2,V=128"


# ---- the notes' network, row by row


def _row(name: str, counted: Callable[[int, int, int], int], formula: Callable[[int, int, int], int]) -> None:
    """Execute one row of the notes' tables: what the trace counted against the formula, at several sizes."""

    @claim(name)
    def row(notes: Claim) -> Finding:
        found = {sizes: counted(*sizes) for sizes in NOTES_SIZES}
        unit = "" if name == "8.1" else " FLOP"
        return Finding(
            "; ".join(f"{n}{unit} ({_sizes(*sizes)})" for sizes, n in found.items()),
            {f"{notes.notes} at {_sizes(*sizes)}": n == formula(*sizes) for sizes, n in found.items()},
            numbers=tuple(found.values()),
        )


def _sizes(B: int, D: int, K: int) -> str:
    return f"B={B}, D={D}, K={K}"


_row("8.1", lambda B, D, K: two_layer(B, D, K).model.parameters, lambda B, D, K: D * D + D * K)
_row("8.2", lambda B, D, K: two_layer_rows(B, D, K)[0].forward, lambda B, D, K: 2 * B * D * D)
_row("8.3", lambda B, D, K: two_layer_rows(B, D, K)[1].forward, lambda B, D, K: 2 * B * D * K)
_row("8.5", lambda B, D, K: two_layer_rows(B, D, K)[1].d_weight, lambda B, D, K: 2 * B * D * K)
_row("8.6", lambda B, D, K: two_layer_rows(B, D, K)[1].d_input, lambda B, D, K: 2 * B * D * K)
_row("8.7", lambda B, D, K: two_layer_rows(B, D, K)[0].d_weight, lambda B, D, K: 2 * B * D * D)


@claim("8.4")
def forward(notes: Claim) -> Finding:
    found = {sizes: two_layer(*sizes) for sizes in NOTES_SIZES}
    return Finding(
        "; ".join(f"{x.flops.forward} FLOP ({_sizes(*sizes)})" for sizes, x in found.items()),
        {
            "2B(D² + D·K)": all(x.flops.forward == 2 * B * (D * D + D * K) for (B, D, K), x in found.items()),
            "2·B·P": all(x.flops.forward == 2 * B * x.model.parameters for (B, _, _), x in found.items()),
        },
        numbers=tuple(x.flops.forward for x in found.values()),
    )


@shared
def _input_wants_gradient(B: int, D: int, K: int) -> Ledger:
    """The notes' network with an input that asks for its gradient."""
    with torch.device("meta"):
        return module_step(TwoLayer(D, K), torch.empty(B, D, requires_grad=True))


@claim("8.8")
def backward(notes: Claim) -> Finding:
    as_data, as_leaf, three_rows, four_b_p = {}, {}, {}, {}
    for B, D, K in NOTES_SIZES:
        as_data[B, D, K] = two_layer(B, D, K).flops.backward
        as_leaf[B, D, K] = _input_wants_gradient(B, D, K).flops.backward
        three_rows[B, D, K] = 2 * B * (D * D + 2 * D * K)
        four_b_p[B, D, K] = 4 * B * two_layer(B, D, K).model.parameters
    sizes = NOTES_SIZES[0]
    return Finding(
        f"{as_data[sizes]} FLOP at {_sizes(*sizes)}, {_agreeing(as_data, three_rows, four_b_p)}; where x asks for a "
        f"gradient {as_leaf[sizes]}, {_agreeing(as_leaf, three_rows, four_b_p)}",
        {
            "both, for data x": as_data == three_rows and as_data == four_b_p,
            "both, where x asks for a gradient": as_leaf == three_rows and as_leaf == four_b_p,
        },
        numbers=(as_data[sizes], as_leaf[sizes]),
    )


def _agreeing(counted: dict[tuple[int, int, int], int], three_rows: object, four_b_p: object) -> str:
    """Which of the notes' two formulas the count is."""
    names = [name for name, formula in (("2B(D² + 2·D·K)", three_rows), ("4·B·P", four_b_p)) if counted == formula]
    return f"which is {' and '.join(names)}" if names else "which is neither formula"


# ---- other layers, and sums over them


@shared
def _layers_of_kinds() -> dict[str, tuple[int, int, int, int]]:
    """By kind of layer: FLOPs forward and backward, and the rule's, 2·B·in·out and twice that, B counting tokens.

    Each input asks for its gradient, as inside a network; an embedding's indices cannot.
    """
    B, S, D, out = 8, 16, 64, 16

    def attention(x: torch.Tensor) -> torch.Tensor:
        heads = x.unsqueeze(1)
        return F.scaled_dot_product_attention(heads, heads, heads)

    # the layer, its input, and the rule: an embedding's "in" is its table's rows, a convolution's a patch
    kinds: dict[str, tuple[Callable[[], Callable[[torch.Tensor], torch.Tensor]], tuple[int, ...], int]] = {
        "linear": (lambda: nn.Linear(D, out), (B, S, D), 2 * B * S * D * out),
        "convolution": (lambda: nn.Conv2d(3, D, 7, 2, 3), (B, 3, 224, 224), 2 * B * (3 * 7 * 7) * D),
        "attention": (lambda: attention, (B, S, D), 2 * B * S * D * D),
        "embedding": (lambda: nn.Embedding(100, D), (), 2 * B * S * 100 * D),
        "norm": (lambda: nn.LayerNorm(D), (B, S, D), 2 * B * S * D * D),
    }

    def both(make: Callable[[], Callable[[torch.Tensor], torch.Tensor]], shape: tuple[int, ...]) -> tuple[int, int]:
        def run() -> None:
            with torch.device("cuda"):
                x = torch.empty(shape, requires_grad=True) if shape else torch.zeros(B, S, dtype=torch.int64)
                make()(x).sum().backward()

        flops = traced(run).flops
        return flops.forward, flops.backward

    return {kind: (*both(make, shape), rule, 2 * rule) for kind, (make, shape, rule) in kinds.items()}


@claim("8.9")
def any_layer(notes: Claim) -> Finding:
    found = _layers_of_kinds()
    agree = [kind for kind, (fwd, bwd, rule, twice) in found.items() if (fwd, bwd) == (rule, twice)]
    others = ", ".join(f"{kind} {fwd} for {rule}" for kind, (fwd, _, rule, _) in found.items() if kind not in agree)
    return Finding(
        f"forward, counted for what the rule gives: {others}; agrees: {', '.join(agree) or 'none'}",
        {"every kind of layer": len(agree) == len(found)},
        numbers=tuple(n for fwd, bwd, rule, twice in found.values() for n in (fwd, bwd, rule, twice)),
    )


@claim("8.10")
def parameters(notes: Claim) -> Finding:
    found = {
        "Cruncher": step("cruncher"),
        "two-layer": two_layer(*NOTES_SIZES[0]),
        "GPT-2 (2 narrow layers)": _small_gpt(1),
    }
    sums = {name: _sum_of_layers(ledger) for name, ledger in found.items()}
    return Finding(
        ", ".join(f"{name}: Σ in·out {sums[name]}, parameters {x.model.parameters}" for name, x in found.items()),
        {name: sums[name] == x.model.parameters for name, x in found.items()},
        numbers=tuple(n for name, x in found.items() for n in (sums[name], x.model.parameters)),
    )


def _small_gpt(batch_size: int) -> Ledger:
    return step(SMALL_GPT, batch_size=batch_size, seq_len=32)


def _sum_of_layers(ledger: Ledger) -> int:
    """Σ in·out over the products with weights: each does 2·in·out FLOPs per token."""
    with_weights = sum(x.forward for x in layers(ledger) if x.d_weight)
    return with_weights // (2 * ledger.step.tokens)


class _StartsWithEmbedding(nn.Module):
    """An embedding, then two linear layers without bias; P counts what multiplies."""

    def __init__(self, D: int) -> None:
        super().__init__()
        self.table = nn.Embedding(100, D)
        self.layers = nn.Sequential(nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layers(self.table(ids))  # type: ignore[no-any-return]  # nn.Sequential is untyped


@claim("8.11")
def six_b_p(notes: Claim) -> Finding:
    D, n_ids = 64, (4, 16)
    with torch.device("meta"):
        embedded = module_step(_StartsWithEmbedding(D), torch.zeros(n_ids, dtype=torch.int64))
    found = {
        "Cruncher": (step("cruncher").flops.model, step("cruncher").flops.six_p_tokens),
        "two-layer": (two_layer(*NOTES_SIZES[0]).flops.model, two_layer(*NOTES_SIZES[0]).flops.six_p_tokens),
        "an embedding first": (embedded.flops.model, 6 * _sum_of_layers(embedded) * embedded.step.tokens),
    }
    return Finding(
        ", ".join(f"{name}: counted {counted}, rule {rule}" for name, (counted, rule) in found.items()),
        {name: counted == rule for name, (counted, rule) in found.items()},
        numbers=tuple(n for pair in found.values() for n in pair),
    )


@claim("8.13")
def shares(notes: Claim) -> Finding:
    found = {
        "two-layer": two_layer(*NOTES_SIZES[0]),
        "Cruncher": step("cruncher"),
        "GPT-2 (2 layers)": _gpt2("bf16-mixed"),
    }
    split = {name: x.flops.forward / x.flops.model for name, x in found.items()}
    return Finding(
        ", ".join(f"{name} {format_share(f)} and {format_share(1 - f)}" for name, f in split.items()),
        {name: close(100 * f, notes.value, 0.02) for name, f in split.items()},
        numbers=tuple(split.values()),
    )


@claim("8.14")
def tokens(notes: Claim) -> Finding:
    B, seq_len, stated = notes.given["B"], notes.given["seq_len"], notes.given["tokens"]
    in_a_step = step(SMALL_GPT, batch_size=2, seq_len=32).step.tokens
    n_steps = round(stated / (B * seq_len))
    one, run = (
        solve(parameters=notes.given["parameters"], batch=B, seq_len=seq_len, steps=n, on=f"1024x{H100}").tokens or 0
        for n in (1, n_steps)
    )
    return Finding(
        f"{B} · {seq_len} = {format_count(one)} tokens are one step (a traced step of 2 · 32: {in_a_step}); "
        f"{format_count(run)} are {format_count(n_steps)} steps",
        {"one batch is the run": close(one, stated)},
        numbers=(one, run, n_steps, in_a_step),
    )


@claim("8.15")
def matches_gpt3(notes: Claim) -> Finding:
    run = solve(parameters=notes.given["parameters"], tokens=notes.given["tokens"], on=f"1024x{H100}")
    times = run.flops / magnitude("gpt3").flops
    return Finding(
        f"{format_flops(run.flops)} is {times:.1f} times GPT-3's {format_flops(magnitude('gpt3').flops)}",
        {"within a factor of 2": 0.5 <= times <= 2},
        numbers=(run.flops, times),
    )


# ---- batch, precision, accumulation


@claim("8.16")
def batch(notes: Claim) -> Finding:
    found = {B: _small_gpt(B) for B in (1, 2, 4)}
    sent = {B: sum(c.bytes for c in x.on(f"8x{H100}").collectives) for B, x in found.items()}
    flops = {B: x.flops.model for B, x in found.items()}
    return Finding(
        "; ".join(f"B={B}: {format_flops(flops[B])}, {format_bytes(sent[B])} sent by each of 8 ranks" for B in found),
        {
            "FLOPs are proportional to B": all(n == B * flops[1] for B, n in flops.items()),
            "a larger batch sends no more": all(n == sent[1] > 0 for n in sent.values()),
        },
        numbers=(*flops.values(), *sent.values()),
    )


def _gpt2(precision: str) -> Ledger:
    return step(GPT2, batch_size=1, seq_len=1024, precision=precision)


def _gradient_bytes(ledger: Ledger) -> int:
    """The most bytes of gradients that live at once."""
    return int(ledger.memory.timeline["gradients"].max())


@claim("8.17")
def bf16_gradients(notes: Claim) -> Finding:
    found = {precision: _gpt2(precision) for precision in ("fp32", "bf16", "bf16-mixed")}
    n = found["fp32"].model.parameters
    per_parameter = {precision: _gradient_bytes(x) / n for precision, x in found.items()}
    state = sum(found["fp32"].memory.between_steps[c] for c in ("parameters", "optimizer_state")) / n
    before, after = (state + per_parameter[p] for p in ("fp32", "bf16"))
    saved = 1 - per_parameter["bf16"] / per_parameter["fp32"]
    under_autocast = 1 - per_parameter["bf16-mixed"] / per_parameter["fp32"]
    return Finding(
        f"gradients take {per_parameter['fp32']:g} bytes per parameter in fp32, {per_parameter['bf16']:g} in bf16 and "
        f"{per_parameter['bf16-mixed']:g} under bf16 autocast; with AdamW's fp32 weights and states {before:g} become "
        f"{after:g} (-{format_share(1 - after / before)}) and {state + per_parameter['bf16-mixed']:g}",
        {"the gradient tensors, all in bf16": close(100 * saved, notes.value)},
        {
            "half of the whole training state": close(100 * (1 - after / before), notes.value),
            "mixed precision by autocast": close(100 * under_autocast, notes.value),
        },
        numbers=(*per_parameter.values(), before, after),
    )


@claim("8.18")
def bf16_flops(notes: Claim) -> Finding:
    found = {precision: _gpt2(precision) for precision in ("fp32", "bf16", "bf16-mixed")}
    flops = {precision: x.flops.model for precision, x in found.items()}
    conversions = {precision: sum(r.op == "aten._to_copy" for r in x.recorded) for precision, x in found.items()}
    seconds = {precision: sum(seconds_by_kind(x, H100).values()) for precision, x in found.items()}
    return Finding(
        f"two layers of GPT-2: {format_flops(flops['fp32'])} in fp32, {format_flops(flops['bf16'])} in bf16, "
        f"{format_flops(flops['bf16-mixed'])} under autocast, which adds "
        f"{conversions['bf16-mixed'] - conversions['fp32']} conversions; at least {format_seconds(seconds['fp32'])} "
        f"become {format_seconds(seconds['bf16-mixed'])} on an H100",
        {
            "the same FLOPs": len(set(flops.values())) == 1,
            "autocast converts": conversions["bf16-mixed"] > conversions["fp32"],
        },
        numbers=(*flops.values(), *conversions.values(), *seconds.values()),
    )


@shared
def _accumulated(n: int, divided: bool, cleared: bool) -> tuple[float, float]:
    """The gradient of the accumulation loop over that of the whole batch, after one step and after two.

    Run for real, on a linear model with a mean loss. The weights stay as they are, so that the second step is the same.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, generator=generator, requires_grad=True)
    x, y = (torch.randn(shape, generator=generator) for shape in ((4 * n, 8), (4 * n,)))
    (whole,) = torch.autograd.grad(F.mse_loss(x @ weight, y), weight)
    ratios = []
    for _ in range(2):
        for micro_x, micro_y in zip(x.chunk(n), y.chunk(n), strict=True):
            loss = F.mse_loss(micro_x @ weight, micro_y)
            (loss / n if divided else loss).backward()
        assert weight.grad is not None
        ratios.append((weight.grad.norm() / whole.norm()).item())
        if cleared:
            weight.grad = None
    return ratios[0], ratios[1]


@claim("8.19")
def accumulation_loop(notes: Claim) -> Finding:
    n = 4
    as_written, divided, both = (_accumulated(n, *how) for how in ((False, False), (True, False), (True, True)))
    return Finding(
        f"the loop as written, {n} micro-batches: {as_written[0]:.1f} times the gradient of the whole batch, in the "
        f"second step {as_written[1]:.1f} times; with loss / {n} {divided[0]:.1f} and {divided[1]:.1f}; with zero_grad "
        f"too {both[0]:.1f} and {both[1]:.1f}",
        {"as written": all(close(r, 1, 1e-4) for r in as_written)},
        numbers=(*as_written, *divided, *both),
    )


@claim("8.20")
def accumulation_flops(notes: Claim) -> Finding:
    found = [step(SMALL_GPT, batch_size=B, seq_len=32, accumulate=n).flops.model for B, n in ((8, 1), (2, 4), (1, 8))]
    return Finding(
        f"8 sequences in 1, 4 and 8 micro-batches: {', '.join(format_flops(n) for n in found)}",
        {"the same whatever the micro-batches": len(set(found)) == 1},
        numbers=tuple(found),
    )


@claim("8.21")
def accumulation_communication(notes: Claim) -> Finding:
    n = 4
    ddp, ddp_deferred, ddp_once = (rounds("ddp", *how) for how in ((n, False), (n, True), (1, False)))
    fsdp, fsdp_deferred, fsdp_once = (rounds("fsdp", *how) for how in ((n, False), (n, True), (1, False)))
    return Finding(
        f"{n} micro-batches under DDP: {_calls(ddp)} as written, {_calls(ddp_deferred)} with no_sync; under FSDP "
        f"{_calls(fsdp)}, deferred {_calls(fsdp_deferred)}; one large batch {_calls(ddp_once)}, {_calls(fsdp_once)}",
        {"DDP with no_sync, against every micro-batch": _total(ddp_deferred) < _total(ddp)},
        {
            "the loop as written, under DDP, against one large batch": _total(ddp) < _total(ddp_once),
            "FSDP, even deferred, against one large batch": _total(fsdp_deferred) < _total(fsdp_once),
        },
        numbers=tuple(v for r in (ddp, ddp_deferred, fsdp, fsdp_deferred, fsdp_once) for v in r.values()),
    )


def _calls(found: dict[str, int]) -> str:
    return " + ".join(f"{n} {op.replace('_', '-')}" for op, n in found.items())


def _total(found: dict[str, int]) -> int:
    return sum(found.values())


# ---- what the notes conclude


@claim("8.22")
def backward_is_twice(notes: Claim) -> Finding:
    flops = {"GPT-2 (2 layers)": _gpt2("bf16-mixed").flops, "narrow ones": _small_gpt(1).flops}
    ratios = {name: f.backward / f.forward for name, f in flops.items()}
    return Finding(
        ", ".join(f"{name}: {ratio:.3g} times forward" for name, ratio in ratios.items()),
        {
            "for language models": all(ratio == notes.value for ratio in ratios.values()),
            "the main cost": all(f.backward > f.model / 2 for f in flops.values()),
        },
        numbers=tuple(ratios.values()),
    )


@claim("8.23")
def where_to_optimise(notes: Claim) -> Finding:
    alone, together = (
        _gpt2("bf16-mixed"),
        step(GPT2, batch_size=1, seq_len=1024, precision="bf16-mixed", on=f"8x{H100}"),
    )
    on_a_rank = together.flops.backward / together.replicas
    gradient_bytes = alone.textbook.gradients
    dense, sparse = (sum(c.bytes for c in data_parallel(8, n)) for n in (gradient_bytes, gradient_bytes // 100))
    fusable = [r for r in alone.recorded if r.kind in ("elementwise", "reduction", "copy") and r.phase == "backward"]
    fused = sum(r.work.flops for r in fusable)
    moved = sum(r.work.read_bytes + r.work.written_bytes for r in fusable)
    share = alone.flops.backward / alone.flops.model
    return Finding(
        f"two layers of GPT-2: backward is {format_flops(alone.flops.backward)}, on each of 8 ranks "
        f"{format_flops(on_a_rank)}; sending 1 % of the gradients cuts {format_bytes(dense)} on the wire to "
        f"{format_bytes(sparse)}; what compile can fuse moves {format_bytes(moved)} and does {format_flops(fused)}",
        {"backward is the main cost": share > 0.5},
        {
            "communication is part of its FLOPs": on_a_rank != alone.flops.backward,
            "what compile fuses does 1 % of them": fused >= alone.flops.backward / 100,
        },
        numbers=(alone.flops.backward, on_a_rank, dense, sparse, moved, fused),
    )


@claim("8.24")
def golden_formula(notes: Claim) -> Finding:
    given = notes.given
    run = solve(parameters=given["parameters"], tokens=given["tokens"], on=f"{given['gpus']}x{H100}", mfu=given["mfu"])
    by_formula = 6 * given["parameters"] * given["tokens"] / (given["gpus"] * run.peak_flops_per_s * given["mfu"])
    back = solve(
        parameters=given["parameters"], tokens=given["tokens"], on=f"{given['gpus']}x{H100}", seconds=by_formula
    ).mfu
    return Finding(
        f"{format_seconds(run.seconds)} for 70B on 15T, {given['gpus']} H100 at MFU {given['mfu']}; solved back for "
        f"MFU {back:.3f}",
        {"6·P·tokens / (GPUs · peak · MFU)": close(run.seconds, by_formula, 1e-9) and close(back, given["mfu"], 1e-9)},
        numbers=(run.seconds, run.days),
    )
