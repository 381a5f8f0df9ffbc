"""Memory's half of the balance: the peak forecast for a step against the CPU allocator's own record of that step.

    python benchmarks/balance_memory.py              writes benchmarks/balance_memory.md
    python benchmarks/balance_memory.py lstm unet    the workloads whose name holds one of the words, to the screen

Each workload's step is traced twice on the CPU backend (the second kept), then run for real twice, the second under the
allocator's record (`bursar.meter.memory`). The trace comes first and never sees the real run.
"""

# ruff: noqa: D102  (a module's forward is what its class says)

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bursar
from bursar.ledger import Ledger
from bursar.meter import memory
from bursar.trace import tracing
from bursar.trace.scratch import processor
from bursar.workload.resolve import resolve, tensors_in

HERE = Path(__file__).resolve().parent

# ---- models that are no presets


class ConvNet(nn.Module):
    """Plain convolutions with batch norm, strides and a head."""

    def __init__(self, c: int = 32) -> None:
        super().__init__()
        widths = [(3, c, 1), (c, c, 1), (c, 2 * c, 2), (2 * c, 2 * c, 1), (2 * c, 4 * c, 2)]
        self.features = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(a, b, 3, s, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
              for a, b, s in widths),
            nn.AdaptiveAvgPool2d(1),
        )  # fmt: skip
        self.head = nn.Linear(4 * c, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x).flatten(1))
        return out


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, then an MLP over channels (Liu et al. 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y))) * self.scale
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Stem, stages with down-sampling between them, head."""

    def __init__(self, width: int = 48, depths: tuple[int, ...] = (2, 2)) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 4)]
        for i, depth in enumerate(depths):
            if i:
                layers.append(nn.Conv2d(width * 2 ** (i - 1), width * 2**i, 2, 2))
            layers += [ConvNeXtBlock(width * 2**i) for _ in range(depth)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width * 2 ** (len(depths) - 1), 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layers(x).mean((2, 3)))
        return out


class UNet(nn.Module):
    """Two scales with a skip between them (Ronneberger et al. 2015)."""

    def __init__(self, c: int = 24) -> None:
        super().__init__()

        def double(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(8, b), nn.SiLU(),
                                 nn.Conv2d(b, b, 3, padding=1), nn.GroupNorm(8, b), nn.SiLU())  # fmt: skip

        self.down, self.middle, self.last = double(3, c), double(c, 2 * c), double(2 * c, c)
        self.up, self.out = nn.ConvTranspose2d(2 * c, c, 2, 2), nn.Conv2d(c, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        y = self.up(self.middle(F.max_pool2d(skip, 2)))
        out: Tensor = self.out(self.last(torch.cat((skip, y), 1)))
        return out


class Recurrent(nn.Module):
    """Tokens through an embedding, a recurrent net of torch's, and a head."""

    def __init__(self, kind: type[nn.RNNBase], vocabulary: int = 500, width: int = 128, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.net = kind(width, width, num_layers=layers, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.net(self.embed(tokens))[0])
        return out


class LoRALinear(nn.Module):
    """A frozen layer and its low-rank change (Hu et al. 2021)."""

    def __init__(self, base: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / rank)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + F.linear(F.linear(x, self.a), self.b)
        return out


def lora(model: nn.Module) -> nn.Module:
    """``model`` frozen, with low-rank changes in every linear layer of its blocks."""
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name != "head":
                setattr(module, name, LoRALinear(child))
    return model


# ---- workloads


class Parts(NamedTuple):
    """What a workload is made of."""

    model: nn.Module
    batch: Any
    loss: Callable[[nn.Module, Any], Tensor]


def preset(name: str, batch_size: int, seq_len: int | None = None) -> Callable[[], Parts]:
    """A preset of bursar's catalogue."""

    def make() -> Parts:
        work = resolve(name, batch_size, seq_len)
        return Parts(*work.make(), work.loss)

    return make


def images(model: Callable[[], nn.Module], n: int, size: int) -> Callable[[], Parts]:
    """A classifier of images."""

    def loss(m: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(m(batch[0]), batch[1])

    return lambda: Parts(model(), (torch.randn(n, 3, size, size), torch.randint(0, 10, (n,))), loss)


def unet() -> Parts:
    """Images to images."""

    def loss(m: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(m(batch[0]).float(), batch[1])

    return Parts(UNet(), (torch.randn(4, 3, 64, 64), torch.randn(4, 3, 64, 64)), loss)


def recurrent(kind: type[nn.RNNBase], **sizes: int) -> Callable[[], Parts]:
    """A language model of recurrent layers."""

    def loss(m: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(m(batch[0]).flatten(0, 1).float(), batch[1].flatten())

    return lambda: Parts(
        Recurrent(kind, **sizes), (torch.randint(0, 500, (16, 64)), torch.randint(0, 500, (16, 64))), loss
    )


MLP = preset("mlp:D=256,H=1024,L=4,K=64", 256)
GPT = preset("gpt2:L=4,d=256,h=4,V=2000", 4, 128)
LLAMA = preset("llama3-8b:L=4,d=256,h=8,kv=2,F=704,V=2000", 4, 128)
BERT = preset("bert-base:L=3,d=192,h=6,V=1500", 4, 128)
VIT = preset("vit-b16:L=3,d=192,h=6,F=768,P=16,R=64,K=10", 8)
MOE = preset("mixtral-8x7b:L=2,d=128,h=4,kv=2,F=256,E=4,k=2,V=1000", 2, 64)
CONV = images(ConvNet, 8, 32)
CONVNEXT = images(ConvNeXt, 4, 64)
RESNET = preset("resnet50:R=64,K=10", 4)
MOBILENET = preset("mobilenet-v2:R=64,K=10", 4)


@dataclass(frozen=True)
class Workload:
    """A step: what is trained, by which optimizer, and how."""

    make: Callable[[], Parts]
    optimizer: str = "AdamW"  # a class of torch.optim
    how: dict[str, Any] = field(default_factory=dict)  # its keywords
    precision: str = "fp32"  # bf16: parameters too; mixed: autocast
    accumulate: int = 1
    recompute: str = ""  # the list of blocks to checkpoint
    clip: bool = False
    change: Callable[[nn.Module], nn.Module] | None = None


FOREACH, FUSED = {"foreach": True}, {"fused": True}
WORKLOADS: dict[str, Workload] = {
    "mlp sgd": Workload(MLP, "SGD"),
    "mlp momentum foreach": Workload(MLP, "SGD", {"momentum": 0.9, **FOREACH}),
    "mlp adagrad": Workload(MLP, "Adagrad"),
    "mlp rmsprop foreach": Workload(MLP, "RMSprop", FOREACH),
    "mlp adafactor": Workload(MLP, "Adafactor"),
    "mlp adamw": Workload(MLP),
    "mlp adamw foreach": Workload(MLP, how=FOREACH),
    "mlp adamw fused": Workload(MLP, how=FUSED),
    "mlp adamw clip": Workload(MLP, clip=True),
    "mlp adamw bf16": Workload(MLP, precision="bf16"),
    "mlp adamw mixed": Workload(MLP, precision="mixed"),
    "gpt adamw": Workload(GPT),
    "gpt adamw foreach": Workload(GPT, how=FOREACH),
    "gpt adamw fused": Workload(GPT, how=FUSED),
    "gpt sgd fused": Workload(GPT, "SGD", FUSED),
    "gpt adafactor": Workload(GPT, "Adafactor"),
    "gpt adamw accumulate 4": Workload(GPT, accumulate=4),
    "gpt adamw clip foreach": Workload(GPT, how=FOREACH, clip=True),
    "gpt adamw checkpoint": Workload(GPT, recompute="h"),
    "gpt adamw bf16": Workload(GPT, precision="bf16"),
    "gpt adamw mixed": Workload(GPT, precision="mixed"),
    "gpt adamw mixed checkpoint": Workload(GPT, precision="mixed", recompute="h"),
    "gpt lora adamw": Workload(GPT, change=lora),
    "gpt lora mixed": Workload(GPT, precision="mixed", change=lora),
    "llama adamw": Workload(LLAMA),
    "llama adamw mixed": Workload(LLAMA, precision="mixed"),
    "llama rmsprop": Workload(LLAMA, "RMSprop"),
    "llama adamw mixed accumulate 2 clip": Workload(LLAMA, precision="mixed", accumulate=2, clip=True),
    "llama adamw checkpoint": Workload(LLAMA, recompute="layers"),
    "bert adamw": Workload(BERT),
    "bert adagrad foreach": Workload(BERT, "Adagrad", FOREACH),
    "bert adamw bf16": Workload(BERT, precision="bf16"),
    "vit adamw": Workload(VIT),
    "vit adamw mixed": Workload(VIT, precision="mixed"),
    "moe adamw": Workload(MOE),
    "moe adamw bf16": Workload(MOE, precision="bf16"),
    "conv adamw": Workload(CONV),
    "conv momentum": Workload(CONV, "SGD", {"momentum": 0.9}),
    "conv adamw mixed": Workload(CONV, precision="mixed"),
    "conv adamw bf16": Workload(CONV, precision="bf16"),
    "resnet50 momentum": Workload(RESNET, "SGD", {"momentum": 0.9}),
    "resnet50 adamw mixed": Workload(RESNET, precision="mixed"),
    "mobilenet rmsprop": Workload(MOBILENET, "RMSprop"),
    "convnext adamw": Workload(CONVNEXT),
    "convnext adamw mixed": Workload(CONVNEXT, precision="mixed"),
    "unet adamw": Workload(unet),
    "unet adamw mixed": Workload(unet, precision="mixed"),
    "lstm adamw": Workload(recurrent(nn.LSTM)),
    "lstm adamw mixed": Workload(recurrent(nn.LSTM), precision="mixed"),
    "gru adamw": Workload(recurrent(nn.GRU)),
    "gru sgd clip": Workload(recurrent(nn.GRU), "SGD", clip=True),
}


class Running(NamedTuple):
    """A workload made: ``step`` does one update."""

    model: nn.Module
    batch: Any
    optimizer: torch.optim.Optimizer
    step: Callable[[], None]


def build(work: Workload) -> Running:
    """The workload on CPU tensors: real ones, or the trace's."""
    model, batch, loss_of = work.make()
    if work.change is not None:
        model = work.change(model)
    if work.precision == "bf16":
        model.to(torch.bfloat16)
        batch = tuple(t.to(torch.bfloat16) if t.is_floating_point() else t for t in batch)
    if work.recompute:
        for block in getattr(model, work.recompute):
            block.forward = _checkpointed(block.forward)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = getattr(torch.optim, work.optimizer)(parameters, lr=1e-3, **work.how)

    def step() -> None:
        for _ in range(work.accumulate):
            mixed = work.precision == "mixed"
            with torch.autocast("cpu", torch.bfloat16) if mixed else contextlib.nullcontext():
                loss = loss_of(model, batch)
            (loss / work.accumulate if work.accumulate > 1 else loss).backward()  # type: ignore[no-untyped-call]
            del loss
        if work.clip:
            nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Running(model, batch, optimizer, step)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


# ---- the table

HOW = ("asked", "formula", "none")


class Result(NamedTuple):
    """Peaks in bytes: the allocator's record, and the forecasts by each way of knowing the scratch."""

    name: str
    real: int
    forecast: dict[str, int]
    scratch: str  # what of it stands at the peak, by name

    def error(self, how: str) -> float:
        """(forecast - record) / record."""
        return self.forecast[how] / self.real - 1


def traced(work: Workload, how: str) -> Ledger:
    """The second step on fake CPU tensors."""
    with tracing(on="cpu", scratch=how) as t:
        running = build(work)
        running.step()
        running.step()
    return t.ledger


def measured(work: Workload) -> int:
    """The second step's peak by the allocator's own record."""
    torch.manual_seed(0)
    running = build(work)
    running.step()
    meter = memory.PeakMeter()
    standing = [*memory.standing(running.model, running.optimizer), *tensors_in(running.batch)]
    with meter.watch(torch.device("cpu"), standing):
        running.step()
    return meter.bytes


def compare(name: str) -> Result:
    """Forecast first, by three ways; the real run after."""
    work = WORKLOADS[name]
    ledgers = {how: traced(work, how) for how in HOW}
    named = (h.module for h in ledgers["asked"].memory.holdings if " in aten." in h.module)
    scratch = next((n.partition(" in aten.") for n in named), ("", "", ""))
    gc.collect()
    return Result(
        name, measured(work), {how: ledgers[how].memory.peak_bytes for how in HOW}, f"{scratch[0]} ({scratch[2]})"
        if scratch[0] else "",
    )  # fmt: skip


def page(results: list[Result], threads: int) -> str:
    """The table as Markdown."""
    n = len(results)
    isa = processor().isa

    def within(how: str, share: float) -> int:
        return sum(abs(r.error(how)) <= share for r in results)

    rows = [
        f"| {r.name} | {r.real:,} | {r.forecast['asked'] - r.real:+,} | {r.error('asked'):+.3%} | "
        f"{r.error('formula'):+.3%} | {r.error('none'):+.3%} | {r.scratch} |"
        for r in results
    ]
    errors = {how: max(abs(r.error(how)) for r in results) for how in HOW}
    about = f"""# The books balance: memory

Written by `python benchmarks/balance_memory.py`, {datetime.date.today()}: {platform.machine()} ({isa}),
{threads} threads, Python {platform.python_version()}, torch {torch.__version__}, bursar {bursar.__version__}.

Peak live bytes of a steady step: bursar's forecast (`on="cpu"`, traced before the step ever ran) against the CPU
allocator's own record of that step. Three ways of knowing what a kernel takes for itself: **asked**, a kernel of
oneDNN's called once on zeros of its shapes, which is the default; **formula**, nothing called; **none**, no scratch at
all, as a bare tracker has it. torch's own kernels have formulas in the first two. The last column names the scratch
that stands at the peak.

Within 0.1 %: {within("asked", 1e-3)} of {n} asked, {within("formula", 1e-3)} by formula, {within("none", 1e-3)}
without. Within 1 %: {within("asked", 1e-2)}, {within("formula", 1e-2)}, {within("none", 1e-2)}. Largest error:
{errors["asked"]:.3%} asked, {errors["formula"]:.1%} by formula, {errors["none"]:.1%} without.

| workload | record, B | asked, B | asked | formula | none | scratch at the peak |
|---|---:|---:|---:|---:|---:|---|
"""
    return about + "\n".join(rows) + "\n"


def main() -> None:
    """Write the table, or show some rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    words = parser.parse_args().words
    names = [n for n in WORKLOADS if not words or any(w in n for w in words)]
    results = []
    for name in names:
        results.append(compare(name))
        r = results[-1]
        print(f"{r.name:38} {r.real:>13,} {r.error('asked'):+9.3%} {r.error('formula'):+9.3%} {r.error('none'):+9.3%}  "
              f"{r.scratch}", flush=True)  # fmt: skip
    if not words:
        (HERE / "balance_memory.md").write_text(page(results, torch.get_num_threads()), encoding="utf-8")


if __name__ == "__main__":
    main()
