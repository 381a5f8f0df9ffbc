"""Odd models, each with a count derived by hand; transformers' own models; what a model may look at.

B batch   S sequence   d model   E experts   k experts per token
"""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bursar
from bursar import architecture
from bursar.errors import BadInput, DataDependent, TraceFailed
from bursar.rules.attention import pairs
from bursar.trace.values import AVERAGE_DRAW, BALANCED, FINITE
from bursar.workload import presets
from bursar.workload.step import run
from command import ask

hf = pytest.importorskip("bursar.workload.hf", reason="transformers is an extra")
WAYS = pytest.mark.parametrize("on", [None, "cpu"])


def config(kind, **sizes):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[kind](**sizes)


def of(kind, batch=2, seq_len=16, on=None, experts=None, precision="fp32", **sizes):
    made = hf.of_config(config(kind, **sizes), kind, batch, seq_len, experts=experts)
    return run(made, on=on, precision=precision, optimizer="sgd", fold=False)  # whose step is short


# ---- Mixtures of experts: the same count by every way of running the experts, on every device


MIXTRAL = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
           "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 100}  # fmt: skip


@WAYS
@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_a_mixture_costs_its_active_experts_whoever_runs_them(experts, on):
    B, S, d, f, L, V, k, E = 2, 16, 64, 96, 1, 100, 2, 4
    block = 2 * d * d + 2 * d * (d // 2) + k * 3 * d * f + d * E  # q, o; k, v; the experts a token meets; the router
    forward = 2 * B * S * (L * block + d * V) + 4 * B * L * d * S * S
    ledger = of("mixtral", B, S, on, experts, **MIXTRAL)
    assert ledger.flops.model_full_square == 3 * forward
    assert not ledger.uncounted
    if experts == "eager":
        assert BALANCED in ledger.assumptions


@WAYS
def test_mixtral_8x7b_at_4096_tokens_takes_its_published_step(on):
    ledger = bursar.step("mixtral-8x7b:L=2", batch_size=1, seq_len=4096, on=on)
    d, f, S, V = 4096, 14336, 4096, 32000
    block = 2 * d * d + 2 * d * 1024 + 2 * 3 * d * f + 8 * d
    per_layer, head = 3 * (2 * S * block + 4 * S * S * d), 3 * 2 * S * d * V
    assert 32 * per_layer + head == 339_697_553_375_232
    assert ledger.flops.model_full_square == 2 * per_layer + head


def test_six_p_tokens_counts_a_mixture_by_its_active_share():
    shape = architecture.preset("mixtral-8x7b")
    assert shape.parameters() == 46_702_792_704
    assert shape.active_parameters() == 46_702_792_704 - 32 * 6 * 3 * 4096 * 14336  # six of eight experts are idle
    ledger = bursar.step("mixtral-8x7b:L=1", batch_size=1, seq_len=32)
    small = architecture.preset("mixtral-8x7b:L=1")
    assert ledger.flops.six_p_tokens == 6 * small.active_parameters() * 32


def test_a_config_of_a_mixture_has_the_active_parameters_of_its_preset():
    ledger = of("mixtral", **MIXTRAL)
    idle = 1 * 2 * 3 * 64 * 96  # layers, experts not chosen, three matrices
    assert ledger.model.active_parameters == ledger.model.parameters - idle


def test_a_mixture_runs_for_real_and_uses_every_expert():
    torch.manual_seed(0)
    preset = presets.build("mixtral-8x7b:L=1,d=32,h=4,kv=2,F=16,E=4,k=2,V=50,T=16")
    model = preset.make_model()
    preset.loss(model, preset.make_batch(4, 16)).backward()
    experts = model.layers[0].feed_forward
    assert experts.experts_in.grad.abs().sum((1, 2)).gt(0).all()
    one = experts(torch.ones(1, 1, 32))
    two = experts(torch.ones(1, 2, 32))
    torch.testing.assert_close(two[0, 1], one[0, 0])  # a token's answer does not depend on its company


# ---- The presets are the models they name


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # what the published weights hold
        ("mixtral-8x7b", 46_702_792_704),
        ("deepseek-v3", 671_026_404_352),  # without the 14 848 router biases, which are buffers
        ("vit-b16", 86_567_656),
        ("t5-base", 222_903_552),
        ("mamba-130m", 129_135_360),
        ("mobilenet-v2", 3_504_872),
        # the body with its pooler is 109 482 240; the head has a transform with its norm, and a bias per token
        ("bert-base", 109_482_240 - (768 * 768 + 768) + (768 * 768 + 768 + 2 * 768 + 30522)),
    ],
)
def test_a_preset_has_the_published_parameters(name, parameters):
    assert architecture.preset(name).parameters() == parameters


@WAYS
def test_mobilenet_counts_each_channel_of_a_depthwise_convolution_once(on):
    flops = bursar.step("mobilenet-v2", batch_size=1, on=on).flops
    first = 2 * 112 * 112 * 32 * 27  # the first convolution has no gradient for the image
    assert (flops.forward, flops.backward) == (601_548_544, 2 * 601_548_544 - first)


SAME = {
    "bert-base:L=1,d=32,h=2,F=64,V=50,T=16": (
        "bert",
        {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50,
         "max_position_embeddings": 16},
    ),
    "mixtral-8x7b:L=1,d=64,h=4,kv=2,F=96,E=4,k=2,V=100,T=16": ("mixtral", MIXTRAL),
    "t5-base:N=2,d=32,h=2,c=16,F=48,V=50,T=16": (
        "t5", {"num_layers": 2, "d_model": 32, "num_heads": 2, "d_kv": 16, "d_ff": 48, "vocab_size": 50}
    ),
    "mamba-130m:L=1,d=32,N=4,R=2,V=50,T=16": (
        "mamba",
        {"num_hidden_layers": 1, "hidden_size": 32, "state_size": 4, "time_step_rank": 2, "vocab_size": 50},
    ),
    "deepseek-v3:N=2,dense=1,d=32,h=2,q=16,kv=12,nope=8,rope=4,v=8,F=48,M=24,E=4,k=2,V=50,T=16": (
        "deepseek_v3",
        {"num_hidden_layers": 2, "first_k_dense_replace": 1, "hidden_size": 32, "num_attention_heads": 2,
         "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
         "v_head_dim": 8, "intermediate_size": 48, "moe_intermediate_size": 24, "n_routed_experts": 4,
         "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "vocab_size": 50},
    ),
    "vit-b16:L=1,d=32,h=2,F=64,P=8,R=32,K=2": (
        "vit",
        {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8,
         "image_size": 32},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_a_preset_is_transformers_own_model_in_parameters_and_flops(name):
    kind, sizes = SAME[name]
    has_sequence = kind != "vit"
    ours = bursar.step(name, batch_size=2, seq_len=16 if has_sequence else None, optimizer="sgd", fold=False)
    theirs = of(kind, **sizes)
    assert ours.model.parameters == theirs.model.parameters
    assert ours.flops.model_full_square == theirs.flops.model_full_square
    assert not theirs.uncounted


# ---- transformers keeps the kernels of its real run


class Attention(TorchDispatchMode):
    """Whether each attention of a real run was told that it is causal."""

    def __init__(self):
        super().__init__()
        self.causal = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            named = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | (kwargs or {})
            masked = named.get("attn_mask") is not None
            self.causal.append("mask" if masked else "causal" if named.get("is_causal") else "full")
        return func(*args, **(kwargs or {}))


SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 60, "num_hidden_layers": 2}
ONE = {**SMALL, "num_hidden_layers": 1}
KERNELS = {
    "llama": ({**ONE, "num_key_value_heads": 1}, {}),
    "mistral": ({**ONE, "num_key_value_heads": 2, "sliding_window": 8}, {}),  # a window shorter than the sequence
    "gemma3_text": ({**SMALL, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8}, {}),
    "bert": ({**ONE, "attention_probs_dropout_prob": 0.0}, {}),
    "modernbert": ({**SMALL, "local_attention": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
                    "cls_token_id": 1, "sep_token_id": 2}, {}),
    "bart": ({"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 60,
              "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}, {}),
    "gpt2": ({"n_embd": 32, "n_head": 2, "n_layer": 1, "vocab_size": 60, "attn_pdrop": 0.0}, {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("mask", ["no mask", "a mask of ones", "padding"])
def test_attention_is_told_what_a_real_run_tells_it(kind, mask):
    sizes, more = KERNELS[kind]
    work = hf.of_config(config(kind, **sizes), kind, 2, 16)
    model, batch = work.make()
    batch |= more
    if mask != "no mask":
        batch["attention_mask"] = torch.ones(2, 16, dtype=torch.long)
    if mask == "padding":
        batch["attention_mask"][1, 8:] = 0
    with Attention() as real:
        work.loss(model, batch)
    with bursar.tracing(on="cpu") as trace:
        work.loss(model, batch)
    rows = [r for r in trace.ledger.rows if r.op == "aten._scaled_dot_product_flash_attention_for_cpu"]
    assert real.causal
    seen = [r.work.full_square_flops != r.work.flops for r in rows]
    assert seen == [how == "causal" for how in real.causal]


def test_flash_attention_with_a_window_counts_the_windows_pairs():
    S, window, heads, d = 32, 8, 4, 16
    with bursar.tracing() as trace:
        q, k, v = (torch.randn(1, S, heads, d, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, S, S, 0.0, True, False, window_size_left=window - 1, window_size_right=0
        )
    by_hand = sum(min(i + 1, window) for i in range(S))
    assert pairs(S, S, causal=True, left=window - 1) == by_hand
    assert trace.ledger.flops.forward == 4 * by_hand * d * heads


# ---- Other models, by hand


@WAYS
def test_lora_on_a_frozen_base_pays_no_weight_gradient_for_the_base(on):
    class LoRA(nn.Module):
        def __init__(self, n, r):
            super().__init__()
            self.base = nn.Linear(n, n, bias=False).requires_grad_(False)
            self.a, self.b = nn.Linear(n, r, bias=False), nn.Linear(r, n, bias=False)

        def forward(self, x):
            return self.base(x) + self.b(self.a(x))

    B, n, r = 8, 64, 4
    ledger = bursar.step(nn.Sequential(LoRA(n, r), LoRA(n, r)), torch.randn(B, n), on=on)
    base, small = 2 * B * n * n, 2 * B * n * r
    assert ledger.flops.forward == 2 * (base + 2 * small)
    # second layer: dX through the base and through both small ones, dW of both small; first: no dX at its input
    assert ledger.flops.backward == (base + 2 * small + 2 * small) + (small + 2 * small)
    assert ledger.model.trainable_parameters == 2 * 2 * n * r
    assert ledger.model.active_parameters == 2 * (n * n + 2 * n * r)


@WAYS
def test_a_quantised_base_is_multiplied_in_the_precision_it_is_brought_back_to(on):
    class Quantised(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.register_buffer("codes", torch.zeros(n, n, dtype=torch.int8))
            self.register_buffer("scale", torch.ones(n, 1))
            self.adapter = nn.Linear(n, n, bias=False)

        def forward(self, x):
            return F.linear(self.adapter(x), self.codes.to(x.dtype) * self.scale)

    B, n = 8, 32
    ledger = bursar.step(Quantised(n), torch.randn(B, n), on=on)
    assert ledger.flops.forward == 2 * 2 * B * n * n
    assert ledger.flops.backward == 2 * B * n * n + 2 * B * n * n  # dX through the codes, dW of the adapter
    assert not ledger.uncounted


@WAYS
@pytest.mark.parametrize("sparse", [False, True])
def test_a_recommender_multiplies_in_its_networks_only(sparse, on):
    class DLRM(nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = nn.ModuleList([nn.EmbeddingBag(1000, 16, mode="sum", sparse=sparse) for _ in range(3)])
            self.bottom, self.top = nn.Linear(13, 16), nn.Linear(16 + 4 * 4, 1)

        def forward(self, dense, *bags):
            rows = torch.stack([self.bottom(dense), *(t(b) for t, b in zip(self.tables, bags, strict=True))], 1)
            crossed = torch.bmm(rows, rows.transpose(1, 2)).flatten(1)
            return self.top(torch.cat([rows[:, 0], crossed], 1))

    B = 32
    bags = [torch.randint(0, 1000, (B, 5)) for _ in range(3)]
    ledger = bursar.step(DLRM(), (torch.randn(B, 13), *bags), on=on, optimizer="sgd")
    bottom, cross, top = 2 * B * 13 * 16, 2 * B * 4 * 4 * 16, 2 * B * 32
    assert ledger.flops.forward == bottom + cross + top
    assert ledger.flops.backward == bottom + 2 * cross + 2 * top  # no gradient for the dense features
    assert not ledger.uncounted


@WAYS
def test_a_u_net_counts_its_way_down_and_its_way_up(on):
    class UNet(nn.Module):
        def __init__(self, c=8):
            super().__init__()
            self.first, self.down = nn.Conv2d(3, c, 3, padding=1), nn.Conv2d(c, 2 * c, 3, stride=2, padding=1)
            self.up, self.last = nn.ConvTranspose2d(2 * c, c, 2, stride=2), nn.Conv2d(2 * c, 1, 1)

        def forward(self, x):
            high = F.relu(self.first(x))
            return self.last(torch.cat([high, self.up(F.relu(self.down(high)))], 1))

    B, R, c = 2, 16, 8
    first, down = 2 * B * R * R * c * 3 * 9, 2 * B * (R // 2) ** 2 * 2 * c * c * 9
    up, last = 2 * B * (R // 2) ** 2 * 2 * c * c * 4, 2 * B * R * R * 2 * c
    flops = bursar.step(UNet(), torch.randn(B, 3, R, R), on=on).flops
    assert flops.forward == first + down + up + last
    assert flops.backward == first + 2 * (down + up + last)


@WAYS
def test_a_gan_with_two_optimizers_pays_for_the_discriminator_three_times(on):
    dev = "cpu" if on == "cpu" else "cuda"
    B, z, n = 4, 8, 16
    with bursar.tracing(on=on) as trace:
        G, D = nn.Linear(z, n, bias=False).to(dev), nn.Linear(n, 1, bias=False).to(dev)
        og, od = torch.optim.SGD(G.parameters(), 0.1), torch.optim.SGD(D.parameters(), 0.1)
        real, noise = torch.randn(B, n, device=dev), torch.randn(B, z, device=dev)
        fake = G(noise)
        (D(fake.detach()).mean() - D(real).mean()).backward()
        od.step()
        (-D(fake).mean()).backward()
        og.step()
    g, d = 2 * B * z * n, 2 * B * n
    assert trace.ledger.flops.forward == g + 3 * d
    # D's own update: dW for two batches; G's: dX and dW of D, dW of G
    assert trace.ledger.flops.backward == 2 * d + 2 * d + g


@WAYS
def test_a_gradient_penalty_differentiates_twice(on):
    dev = "cpu" if on == "cpu" else "cuda"
    B, n, h = 4, 16, 8
    with bursar.tracing(on=on) as trace:
        w, v = nn.Linear(n, h, bias=False).to(dev), nn.Linear(h, 1, bias=False).to(dev)
        x = torch.randn(B, n, device=dev, requires_grad=True)
        (slope,) = torch.autograd.grad(v(torch.tanh(w(x))).sum(), x, create_graph=True)
        ((slope.norm(dim=1) - 1) ** 2).mean().backward()
    W, V = 2 * B * n * h, 2 * B * h
    flops = trace.ledger.flops
    assert flops.forward == W + V
    # first: dX through v and w. Second, of slope = (s v) t'(h) w: each of its two products has two gradients, but s = 1
    # needs none; then through t'(h) back to w, whose dX is wanted too, for x is a leaf that asks
    assert flops.backward == (V + W) + (2 * W + V) + 2 * W
    assert not trace.ledger.uncounted


@WAYS
def test_tied_embeddings_are_one_parameter_and_two_uses(on):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(50, 16)
            self.head = nn.Linear(16, 50, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids))

    ledger = bursar.step(Tied(), torch.randint(0, 50, (2, 8)), on=on)
    assert ledger.model.parameters == 50 * 16
    assert ledger.flops.model == 3 * 2 * 16 * 16 * 50


# ---- What a model may look at


@WAYS
def test_values_made_of_constants_are_answered_as_a_real_run_answers(on):
    dev = "cpu" if on == "cpu" else "cuda"
    with bursar.tracing(on=on) as trace:
        assert torch.linspace(0, 1, 5, device=dev).tolist() == [0, 0.25, 0.5, 0.75, 1]
        mask = torch.ones(2, 5, dtype=torch.long, device=dev)
        assert (mask == 1).all()
        mask[1, 3:] = 0
        assert not (mask == 1).all()
        assert mask.sum(-1).tolist() == [5, 3]
        assert torch.randn(2, 5, device=dev)[mask.bool()].shape == (8,)
        assert mask.nonzero().shape == (8, 2)
        grid = torch.empty(2, dtype=torch.int64, device=dev)
        grid[0], grid[1] = 3, 4
        assert grid.prod().item() == 12
    assert not trace.ledger.assumptions


@WAYS
def test_what_is_overwritten_by_data_is_no_longer_known(on):
    dev = "cpu" if on == "cpu" else "cuda"
    for spoil in (
        lambda x: x.normal_(),
        lambda x: x[1:].copy_(torch.randn(3, device=dev)),
        lambda x: x.add_(torch.randn(4, device=dev)),
        lambda x: torch._foreach_mul_([x], [torch.randn(4, device=dev)]),
    ):
        with pytest.raises(DataDependent), bursar.tracing(on=on):  # noqa: PT012  (the look comes last)
            x = torch.zeros(4, device=dev)
            assert not x.any()
            spoil(x)
            x.any().item()


def test_what_is_assumed_is_said_and_only_when_it_was_needed():
    with bursar.tracing() as trace:
        scores = torch.randn(8, 4, device="cuda")
        chosen = scores.topk(2).indices
    assert trace.ledger.assumptions == ()
    with bursar.tracing() as trace:
        chosen = torch.randn(8, 4, device="cuda").topk(2).indices
        assert [int((chosen == e).sum()) for e in range(4)] == [4, 4, 4, 4]
        assert torch.rand([]) < 0.6
        assert torch.randn(3, device="cuda").isfinite().all()
    assert set(trace.ledger.assumptions) == {BALANCED, AVERAGE_DRAW, FINITE}


def test_initialisers_and_optimizers_that_look_at_numbers_work():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)
            nn.init.trunc_normal_(self.layer.weight, std=0.02, a=-0.04, b=0.04)
            self.rates = [r.item() for r in torch.linspace(0, 0.1, 3)]

        def forward(self, x):
            return self.layer(x) * self.rates[2]

    for optimizer in ("adafactor", "adamw"):
        ledger = bursar.step(lambda: (Net(), torch.randn(4, 8)), optimizer=optimizer)
        assert ledger.flops.model == 2 * 2 * 4 * 8 * 8


# ---- transformers' architectures: a sample. benchmarks/architectures.py traces all


# One of each kind that is not in REAL below
FAMILIES = ["whisper", "deepseek_v3", "detr", "qwen3_vl", "switch_transformers", "patchtst", "decision_transformer"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_architecture_traces_from_its_config_alone(kind, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import architectures

    ledger = run(hf.workload(architectures.write_config(kind, tmp_path), 2, 32), fold=False)
    assert ledger.flops.model > 0
    assert ledger.flops.backward > ledger.flops.forward
    assert ledger.uncounted == ()


class Products(TorchDispatchMode):
    """FLOPs of a real run's products, by formulas of its own: a second witness that nothing was missed."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.flops += 2 * args[0].numel() * args[1].shape[-1]
        elif name in ("addmm", "baddbmm"):
            self.flops += 2 * args[1].numel() * args[2].shape[-1]
        elif name == "_grouped_mm":
            rows = args[0].numel() if args[0].dim() == 2 else args[0].shape[-2] * args[1].shape[0]
            self.flops += 2 * rows * args[1].shape[-1]
        elif name == "convolution":
            per_output = args[1].shape[1:].numel()
            self.flops += 2 * out.numel() * per_output
        elif name == "convolution_backward":
            per_output = args[2].shape[1:].numel()
            self.flops += 2 * args[0].numel() * per_output * sum(args[-1][:2])
        elif name.startswith("_scaled_dot_product_flash_attention_for_cpu"):
            back = name.endswith("backward")
            q, k, v = args[back : back + 3]
            named = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | (kwargs or {})
            S, T = q.shape[2], k.shape[2]
            seen = S * (S + 1) // 2 if named.get("is_causal") else S * T
            self.flops += 2 * q.shape[0] * q.shape[1] * seen * (q.shape[3] + v.shape[3]) * (1 + back)
        return out


REAL = {
    "llama": {**ONE, "num_key_value_heads": 1},
    "bert": {**ONE, "max_position_embeddings": 16},
    "t5": SAME["t5-base:N=2,d=32,h=2,c=16,F=48,V=50,T=16"][1],
    "vit": SAME["vit-b16:L=1,d=32,h=2,F=64,P=8,R=32,K=2"][1],
    "mamba": SAME["mamba-130m:L=1,d=32,N=4,R=2,V=50,T=16"][1],
    "mixtral": MIXTRAL,
    "convnext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": 32},
    "clip": {"text_config": ONE, "vision_config": {**ONE, "image_size": 32, "patch_size": 8}},
    "wav2vec2": {**ONE, "conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
                 "layerdrop": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("kind", REAL)
def test_a_real_run_multiplies_as_much_as_its_trace(kind):
    torch.manual_seed(0)
    work = hf.of_config(config(kind, **REAL[kind]), kind, 2, 16)
    model, batch = work.make()
    model.train()
    with Products() as real:
        work.loss(model, batch).backward()
    assert run(work, on="cpu", optimizer="sgd", fold=False).flops.model == real.flops


# ---- Bad input


def test_a_config_that_wants_its_own_code_is_refused_and_none_of_it_runs(tmp_path, capsys):
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "brand_new", "auto_map": {"AutoConfig": "evil.Config"}}))
    code, out, err = ask(capsys, "step", str(path))
    assert (code, out) == (2, "")
    assert "does not run the code of a config" in err
    assert not canary.exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 3}, "multiple of the number of attention"),
        ({"model_type": "gpt2", "n_embd": 65, "n_head": 2}, "divisible by num_heads"),
        ({"model_type": "bert", "hidden_size": 64, "num_attention_heads": 5}, "not a multiple of the number"),
    ],
)
def test_shapes_that_conflict_are_told_plainly(text, says, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(text))
    code, out, err = ask(capsys, "step", str(path), "--seq-len", "16")
    assert (code, out) == (2, "")
    assert says in err
    assert "Traceback" not in err


def test_endless_recursion_is_named_and_does_not_end_the_process(tmp_path, capsys):
    (tmp_path / "endless.py").write_text(
        "import torch\n"
        "class Endless(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a = torch.nn.Linear(2, 2)\n"
        "    def forward(self, x):\n"
        "        return self(self.a(x))\n"
        "def make(): return Endless(), torch.randn(1, 2)\n"
    )
    code, out, err = ask(capsys, "step", f"{tmp_path}/endless.py:make")
    assert (code, out) == (2, "")
    assert "recursion" in err.lower()
    assert len(err) < 5000


@WAYS
def test_hooks_and_parametrisations_are_counted_and_stay(on):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    nn.utils.parametrizations.weight_norm(model[0])
    nn.utils.parametrizations.spectral_norm(model[1])
    calls = []
    hook = model[0].register_forward_hook(lambda *_: calls.append(1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ledger = bursar.step(model, torch.randn(4, 16), on=on)
    assert calls
    hook.remove()
    power = 2 * 2 * 16 * 16 + 2 * 2 * 16 * 16  # spectral norm: one iteration is W'u and Wv, then u'(Wv)
    assert 2 * 2 * 4 * 16 * 16 < ledger.flops.forward <= 2 * 2 * 4 * 16 * 16 + power
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not ledger.uncounted


def test_a_huge_config_is_counted_without_being_made(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**MIXTRAL, "model_type": "mixtral", "intermediate_size": 2**30, "hidden_size": 2**20,
                                "num_attention_heads": 4}))  # fmt: skip
    ledger = run(hf.workload(path, 1, 4), optimizer="sgd")
    assert ledger.model.parameters > 4 * 3 * 2**50  # experts, matrices
    path.write_text(json.dumps({**MIXTRAL, "model_type": "mixtral", "intermediate_size": 2**40, "hidden_size": 2**20,
                                "num_attention_heads": 4}))  # fmt: skip
    with pytest.raises(TraceFailed, match="more bytes than 64 bits"):
        run(hf.workload(path, 1, 4), optimizer="sgd")


def test_a_model_type_without_a_head_says_what_to_do(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "flava_image_codebook"}')  # it freezes itself
    code, _, err = ask(capsys, "step", str(path))
    assert code == 2
    assert "file.py:callable" in err


def test_it_is_all_undone():
    masking = sys.modules.get("transformers.masking_utils")
    imports = sys.modules.get("transformers.utils.import_utils")
    if masking is None or imports is None:
        pytest.skip("transformers was not loaded")
    before = (masking.find_packed_sequence_indices, imports.is_fake_tensor)
    of("llama", **KERNELS["llama"][0])
    assert (masking.find_packed_sequence_indices, imports.is_fake_tensor) == before
    with pytest.raises(BadInput):
        hf.of_config(config("llama", **KERNELS["llama"][0], max_position_embeddings=8), "llama", 1, 9)
