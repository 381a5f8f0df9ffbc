"""Each class of memory against a count of its own in a real run: `.grad`, `state_dict`, `saved_tensors_hooks`."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bursar.trace import tracing
from bursar.workload.resolve import resolve, tensors_in

GPT = ("gpt2:L=2,d=64,h=2,V=100", 2, 32)
PRESETS = {
    "mlp": ("mlp:H=64,D=32,L=3", 16, None),
    "gpt": GPT,
    "llama": ("llama3-8b:L=2,d=64,h=4,kv=2,F=128,V=100", 2, 32),
    "bert": ("bert-base:L=2,d=64,h=2,V=100", 2, 32),
    "vit": ("vit-b16:L=2,d=64,h=2,F=128,R=32,K=10", 2, None),
    "mixture": ("mixtral-8x7b:L=1,d=64,h=4,kv=2,F=64,E=4,k=2,V=100", 2, 16),
}
WORKLOADS = [
    *((name, "AdamW", {}, "fp32") for name in (*PRESETS, "conv", "lstm")),
    ("gpt", "AdamW", {"fused": True}, "mixed"),
    ("llama", "AdamW", {"foreach": True}, "mixed"),
    ("mlp", "SGD", {}, "fp32"),
    ("mlp", "SGD", {"momentum": 0.9}, "bf16"),
    ("gpt", "Adagrad", {}, "fp32"),
    ("gpt", "RMSprop", {"momentum": 0.9, "centered": True}, "fp32"),
    ("gpt", "Adafactor", {}, "fp32"),
]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.net, self.head = nn.Embedding(50, 32), nn.LSTM(32, 32, 2), nn.Linear(32, 50)

    def forward(self, tokens):
        return self.head(self.net(self.embed(tokens))[0])


class Pictures(nn.Sequential):
    def __init__(self):
        layers = (nn.Sequential(nn.Conv2d(a, b, 3, s), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
                  for a, b, s in ((3, 16, 1), (16, 32, 2)))  # fmt: skip
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def parts(name):
    """Model, batch and loss."""
    if name == "lstm":
        tokens = torch.randint(0, 50, (12, 4))
        return Recurrent(), (tokens,), lambda model, batch: model(*batch).float().square().mean()
    if name == "conv":
        batch = torch.randn(4, 3, 16, 16), torch.randint(0, 10, (4,))
        return Pictures(), batch, lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
    work = resolve(*PRESETS[name])
    return *work.make(), work.loss


def made(name, optimizer, how, precision):
    """Model, batch, optimizer; the forward, and the rest of a step."""
    model, batch, loss_of = parts(name)
    if precision == "bf16":
        model.to(torch.bfloat16)
        batch = tuple(t.to(torch.bfloat16) if t.is_floating_point() else t for t in batch)
    chosen = getattr(torch.optim, optimizer)(model.parameters(), lr=1e-3, **how)

    def forward():
        mixed = precision == "mixed"
        with torch.autocast("cpu", torch.bfloat16) if mixed else contextlib.nullcontext():
            return loss_of(model, batch)

    return model, batch, chosen, forward


def n_bytes(tensors):
    """Of the distinct storages behind ``tensors``."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@functools.cache
def counted(name, optimizer, how, precision):
    """The real run's own counts, in bytes by class."""
    torch.manual_seed(0)
    model, batch, chosen, forward = made(name, optimizer, dict(how), precision)
    parameters = list(model.parameters())

    def update():
        chosen.step()
        chosen.zero_grad()

    forward().backward()
    update()
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    not_activations = {t.untyped_storage().data_ptr() for t in (*parameters, *model.buffers(), *tensors_in(batch))}
    activations = n_bytes([t for t in saved if t.untyped_storage().data_ptr() not in not_activations])
    loss.backward()
    gradients = n_bytes([p.grad for p in parameters if p.grad is not None])
    update()
    state = chosen.state_dict()["state"].values()
    return {
        "parameters": n_bytes(parameters),
        "buffers": n_bytes(model.buffers()),
        "inputs": n_bytes(tensors_in(batch)),
        "gradients": gradients,
        "optimizer_state": n_bytes(v for s in state for v in s.values() if isinstance(v, torch.Tensor)),
        "activations": activations,
    }


@functools.cache
def traced(name, optimizer, how, precision):
    """The second step's memory."""
    with tracing(on="cpu") as t:
        _model, batch, chosen, forward = made(name, optimizer, dict(how), precision)
        for tensor in tensors_in(batch):
            t.recorder.adopt(tensor, "inputs")
        for _ in range(2):
            forward().backward()
            chosen.step()
            chosen.zero_grad()
    return t.ledger.memory


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "optimizer", "how", "precision"), WORKLOADS, ids=str)
def test_each_class_is_what_a_real_run_counts(name, optimizer, how, precision):
    key = name, optimizer, tuple(how.items()), precision
    real, memory = counted(*key), traced(*key)
    for standing in ("parameters", "buffers", "inputs", "optimizer_state"):
        assert memory.between_steps[standing] == real[standing], standing
    assert memory.timeline["gradients"].max() == real["gradients"]
    assert memory.saved_activations == real["activations"]


def test_a_byte_more_in_any_class_would_be_seen():
    key = "gpt", "AdamW", (), "fp32"
    real, memory = counted(*key), traced(*key)
    assert all(real[c] > 0 for c in ("parameters", "gradients", "optimizer_state", "activations", "inputs"))
    assert memory.saved_activations != real["activations"] + 1
    assert len({real[c] for c in ("parameters", "optimizer_state", "activations")}) == 3


def test_what_a_checkpoint_keeps_is_its_input_and_the_random_state():
    def make():
        layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4))
        x = torch.randn(8, 64)

        def forward():
            h = x
            for layer in layers:
                h = checkpoint(layer, h, use_reentrant=False)
            return h.sum()

        return layers, x, forward

    with tracing(on="cpu") as t:
        layers, x, forward = make()
        forward().backward()
    between = 3 * 8 * 64 * 4  # the first one's input is the batch
    states = 4 * torch.get_rng_state().nbytes
    inside = 8 * 64 * 4  # what GELU saves, made again one block at a time
    assert layers is not None
    assert x is not None
    assert between + states <= t.ledger.memory.saved_activations <= between + states + 2 * inside
