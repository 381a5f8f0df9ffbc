from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import reference_models as reference
from bursar import architecture
from bursar.architecture import Transformer, known_models
from bursar.errors import BadInput, UnknownName
from bursar.workload import presets
from bursar.workload.modules.llama import Llama

TINY_GPT = "gpt2:L=2,d=32,h=2,V=50,T=16"
TINY_BERT = "bert-base:L=2,d=32,h=2,F=64,V=50,T=16"
TINY = {
    "mixtral": "mixtral-8x7b:L=2,d=32,h=4,kv=2,F=48,E=4,k=2,V=50,T=16",
    "deepseek-v3": "deepseek-v3:N=3,dense=1,d=32,h=2,q=16,kv=12,nope=8,rope=4,v=8,F=48,M=24,E=4,k=2,V=50,T=16",
    "t5": "t5-base:N=2,d=32,h=2,c=16,F=48,V=50,T=16",
    "mamba": "mamba-130m:L=2,d=32,N=4,R=2,V=50,T=16",
    "vit": "vit-b16:L=2,d=32,h=2,F=64,P=8,R=32,K=7",
}
TINY_LLAMA = "llama3-8b:L=2,d=32,h=4,kv=2,F=48,V=50,T=16"


def on_meta(name):
    with torch.device("meta"):
        return presets.build(name).make_model()


class Ops(TorchDispatchMode):
    """The name of each op and the shapes of its tensor arguments, in order."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((func.overloadpacket, [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]))
        return func(*args, **(kwargs or {}))


def step_ops(model, loss_of):
    with Ops() as ops:
        loss_of(model).backward()
    return ops.seen


# ---- the modules are the shapes


@pytest.mark.parametrize("name", known_models())
def test_a_module_has_the_parameters_its_shape_says(name):
    model = on_meta(name)
    assert sum(p.numel() for p in model.parameters()) == architecture.preset(name).parameters()


@pytest.mark.parametrize("change", [{"bias": True}, {"tied_embeddings": True}, {"gated_mlp": False}, {"head_dim": 16}])
def test_a_llama_unlike_the_presets_has_the_parameters_its_shape_says(change):
    shape = architecture.preset(TINY_LLAMA)
    assert isinstance(shape, Transformer)
    shape = replace(shape, **change)
    with torch.device("meta"):
        assert sum(p.numel() for p in Llama(shape).parameters()) == shape.parameters()


def test_resnet50_has_torchvisions_names_in_torchvisions_order():
    state = on_meta("resnet50").state_dict()
    keys = list(state)
    assert keys[:7] == [
        "conv1.weight",
        "bn1.weight",
        "bn1.bias",
        "bn1.running_mean",
        "bn1.running_var",
        "bn1.num_batches_tracked",
        "layer1.0.conv1.weight",
    ]
    assert keys[-2:] == ["fc.weight", "fc.bias"]
    assert len(keys) == 320  # 53 convolutions, 53 norms of five tensors, two of the head
    assert {"layer1.0.downsample.0.weight", "layer4.2.conv3.weight", "layer4.0.downsample.1.running_var"} <= set(keys)
    assert tuple(state["layer2.0.conv2.weight"].shape) == (128, 128, 3, 3)
    assert on_meta("resnet50").layer2[0].conv2.stride == (2, 2)  # v1.5


def test_resnet50_takes_twice_4_089_billion_multiply_adds_for_an_image():
    with torch.device("meta"):
        preset = presets.build("resnet50")
        model, (images, _) = preset.make_model(), preset.make_batch(1, None)
        with FlopCounterMode(display=False) as counter:
            model(images)
    assert counter.get_total_flops() == 8_178_368_512


def test_llama_modules_carry_metas_names():
    names = dict(on_meta(TINY_LLAMA).named_parameters())
    block = ("attention.wq", "attention.wk", "attention.wv", "attention.wo")
    block += ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "attention_norm", "ffn_norm")
    expected = {f"layers.{i}.{name}.weight" for i in (0, 1) for name in block}
    assert set(names) == expected | {"embed.weight", "norm.weight", "head.weight"}


# ---- running them


@pytest.mark.parametrize("name", [TINY_GPT, TINY_LLAMA, "course-gpt2-xl-2mat:L=1,d=32,h=2,V=50,T=16"])
def test_a_language_model_gives_logits_or_a_loss_near_that_of_a_uniform_guess(name):
    torch.manual_seed(0)
    preset = presets.build(name)
    model = preset.make_model()
    tokens, targets = preset.make_batch(3, 8)
    assert model(tokens).shape == (3, 8, 50)
    assert preset.loss(model, (tokens, targets)).item() == pytest.approx(torch.tensor(50.0).log().item(), rel=0.05)


@pytest.mark.parametrize("name", [TINY_GPT, TINY_LLAMA])
def test_a_language_model_does_not_look_ahead(name):
    torch.manual_seed(0)
    preset = presets.build(name)
    model = preset.make_model()
    tokens, _ = preset.make_batch(1, 8)
    changed = tokens.clone()
    changed[0, -1] = (tokens[0, -1] + 1) % 50
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :-1], after[:, :-1])
    assert not torch.allclose(before[:, -1], after[:, -1])


@pytest.mark.parametrize(
    ("name", "out"),
    [
        ("two-layer:D=8,K=3", (5, 3)),
        ("cruncher", (5,)),
        ("mlp:D=8,H=16,L=2,K=3", (5, 3)),
        ("resnet50:R=32,K=7", (5, 7)),
    ],
)
def test_a_network_answers_with_one_row_per_sample_and_trains(name, out):
    torch.manual_seed(0)
    preset = presets.build(name)
    model = preset.make_model()
    batch = preset.make_batch(5, None)
    assert model(batch[0]).shape == out
    preset.loss(model, batch).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_every_preset_runs_a_step_on_meta_tensors_as_small_as_it_goes():
    small = {"gpt": TINY_GPT, "llama": TINY_LLAMA, "bert": TINY_BERT}
    for name in known_models():
        shape = architecture.preset(name)
        tiny = small[shape.family] if isinstance(shape, Transformer) else TINY.get(shape.kind, "")
        given = tiny.partition(":")[2]
        with torch.device("meta"):
            preset = presets.build(f"{name}:{given}" if given else name)
            preset.loss(preset.make_model(), preset.make_batch(1, preset.default_seq_len)).backward()


def test_presets_can_be_built_on_tensors_without_data():
    with FakeTensorMode():
        for name in (TINY_GPT, TINY_LLAMA, "cruncher", "two-layer", "resnet50"):
            preset = presets.build(name)
            model, batch = preset.make_model(), preset.make_batch(2, None)
            assert all(isinstance(p.data, FakeTensor) for p in model.parameters())
            preset.loss(model, batch).backward()


def test_cruncher_does_what_the_notes_write():
    torch.manual_seed(0)
    model = presets.build("cruncher").make_model()
    assert sum(p.numel() for p in model.parameters()) == 36
    first, second = model.layers
    x = torch.randn(2, 4)
    torch.testing.assert_close(model(x), (x @ first.weight @ second.weight @ model.final.weight)[:, 0])


def test_the_preset_llama_runs_the_ops_of_the_reference_llama():
    preset = presets.build(TINY_LLAMA)
    batch = preset.make_batch(2, 16)
    same = reference.Llama(50, 32, 2, 4, n_kv_heads=2, hidden=48)
    ours = step_ops(preset.make_model(), lambda model: preset.loss(model, batch))
    assert ours == step_ops(same, lambda model: model(*batch))
    longer = reference.Llama(50, 32, 3, 4, n_kv_heads=2, hidden=48)
    assert ours != step_ops(longer, lambda model: model(*batch))


def test_the_preset_gpt_runs_the_ops_of_the_reference_gpt():
    preset = presets.build(TINY_GPT)
    batch = preset.make_batch(2, 16)
    same = reference.GPT(50, 16, 32, 2, 2)
    assert step_ops(preset.make_model(), lambda m: preset.loss(m, batch)) == step_ops(same, lambda m: m(*batch))


# ---- initialisation


def test_what_writes_to_gpts_residual_stream_starts_smaller_by_the_root_of_twice_the_depth():
    torch.manual_seed(0)
    model = presets.build("gpt2:L=8,d=128,h=2,V=512,T=16").make_model()
    block = model.h[0]
    assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)  # √(2·8) = 4
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.lm_head.weight is model.wte.weight
    assert block.ln_1.weight.unique().tolist() == [1.0]
    assert block.attn.c_attn.bias.unique().tolist() == [0.0]


# ---- defaults and errors


def test_defaults():
    def defaults(name):
        preset = presets.build(name)
        return preset.default_batch_size, preset.default_seq_len, preset.default_optimizer

    assert defaults("gpt2") == (8, 1024, "adamw")
    assert defaults("llama3-8b") == (8, 1024, "adamw")
    assert defaults("gpt2:T=128") == (8, 128, "adamw")
    assert defaults("cruncher") == (2, None, "adagrad")
    assert defaults("two-layer") == (64, None, "adamw")
    assert defaults("two-layer:B=4") == (4, None, "adamw")
    assert defaults("resnet50") == (8, None, "adamw")


def test_sizes_may_be_given_as_arguments():
    assert presets.build("two-layer", D=8, K=3).architecture == architecture.preset("two-layer:D=8,K=3")


def test_a_table_of_learned_positions_bounds_the_sequence_and_rotary_positions_do_not():
    gpt, llama = presets.build(TINY_GPT), presets.build(TINY_LLAMA)
    assert gpt.make_batch(1, 16)[0].shape == (1, 16)
    with pytest.raises(BadInput, match="17 does not fit its table of 16"):
        gpt.make_batch(1, 17)
    assert llama.make_batch(1, 17)[0].shape == (1, 17)


@pytest.mark.parametrize(
    ("name", "batch_size", "seq_len"), [(TINY_GPT, 0, 8), (TINY_GPT, 1, 0), ("cruncher", 0, None), ("cruncher", 2, 8)]
)
def test_a_batch_that_cannot_be_meant_is_refused(name, batch_size, seq_len):
    with pytest.raises(BadInput):
        presets.build(name).make_batch(batch_size, seq_len)


def test_an_unknown_preset_is_an_error():
    with pytest.raises(UnknownName):
        presets.build("gpt5")
