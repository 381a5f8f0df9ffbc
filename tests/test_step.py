"""`bursar step` and `bursar.step`: the main job, on presets, a user's own file and Hugging Face configs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bursar
from bursar.errors import BadInput, DataDependent, UnknownName
from bursar.report.gradients import layers
from bursar.report.record import step_record
from bursar.rules import KINDS
from command import ask

CONFIGS = {
    "gpt2": {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 1000, "n_positions": 128,
             "bos_token_id": 0, "eos_token_id": 0},
    "llama": {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128,
              "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 128},
    "bert": {"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128,
             "num_attention_heads": 4, "vocab_size": 1000, "max_position_embeddings": 128},
}  # fmt: skip

USER_FILE = """
import torch, torch.nn as nn, torch.nn.functional as F

class Net(nn.Module):
    def __init__(self, wrong=""):
        super().__init__()
        self.a, self.b, self.wrong = nn.Linear(64, 32), nn.Linear(32, 10), wrong
    def forward(self, x):
        h = F.relu(self.a(x))
        if self.wrong == "item" and h.sum().item() > 0:
            h = h * 2
        if self.wrong == "mask":
            h = h[h > 0]
        if self.wrong == "shape":
            h = h @ torch.ones(7, 3, device=h.device)
        return self.b(h)

def pair(): return Net(), torch.randn(4, 64)
def alone(): return Net()
def sized(batch_size=3): return Net().to("cuda"), (torch.randn(batch_size, 64, device="cuda"),)
def keywords(): return Net(), {"x": torch.randn(4, 64)}
def item(): return Net("item"), torch.randn(4, 64)
def mask(): return Net("mask"), torch.randn(4, 64)
def shape(): return Net("shape"), torch.randn(4, 64)
def three(): return 3
def mistake(): raise ValueError("my own mistake")
def huge(): return nn.Linear(4_000_000, 2_500_000), torch.randn(2, 4_000_000)
real = Net()
def instance(): return real, torch.randn(4, 64)
"""


@pytest.fixture
def user_file(tmp_path: Path) -> str:
    path = tmp_path / "my_net.py"
    path.write_text(USER_FILE)
    return str(path)


@pytest.fixture
def config(tmp_path: Path):
    def write(kind: str, **changes: object) -> str:
        path = tmp_path / kind / "config.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**CONFIGS[kind], **changes}))
        return str(path)

    return write


def record(capsys: pytest.CaptureFixture[str], *argv: str) -> dict:
    code, out, err = ask(capsys, *argv, "--json")
    assert code == 0, err
    return json.loads(out)


# ---- the contract


def test_the_json_of_cruncher_has_the_notes_numbers(capsys):
    found = record(capsys, "step", "cruncher")
    assert found["schema_version"] == 1
    assert found["model"] == {"name": "cruncher", "parameters": 36, "trainable_parameters": 36}
    assert found["step"] == {"samples": 2, "tokens": 2, "micro_batches": 1}
    assert (found["flops"]["six_p_tokens"], found["flops"]["model"]) == (6 * 2 * 36, 144 + 224)
    assert found["memory"]["textbook"] == {
        "parameters": 4 * 36, "activations": 4 * 16, "gradients": 4 * 36, "optimizer_state": 4 * 36, "total": 496,
    }  # fmt: skip
    assert found["time"] is None
    assert found["fits"] is None
    assert found["hardware"] is None


def test_the_json_has_every_field_of_the_contract(capsys):
    found = record(capsys, "step", "gpt2:L=2", "--batch-size", "1", "--precision", "bf16", "--on", "h100-sxm")
    assert set(found) == {"schema_version", "model", "step", "flops", "bytes_moved", "memory", "collectives", "time",
                          "fits", "hardware", "modules", "assumptions", "versions"}  # fmt: skip
    assert {"model", "hardware", "forward", "backward", "recompute", "optimizer", "by_kind", "by_dtype", "total",
            "six_p_tokens", "attention", "attention_full_square", "uncounted"} <= set(found["flops"])  # fmt: skip
    assert {"seconds", "roofline_seconds", "lower_seconds", "upper_seconds", "mfu", "mfu_full_square", "hfu",
            "bound_by"} <= set(found["time"])  # fmt: skip
    assert set(found["time"]["bound_by"]) == {"compute", "memory", "network", "overhead"}
    assert found["hardware"] == {"name": "h100-sxm", "count": 1}
    assert found["fits"] is True
    assert set(found["flops"]["by_kind"]) == set(KINDS)
    assert set(found["memory"]) == {"peak_bytes", "allocated_bytes", "reserved_bytes", "workspaces",
                                    "saved_activation_bytes", "at_peak",
                                    "between_steps", "textbook"}  # fmt: skip
    assert set(found["versions"]) == {"bursar", "torch"}


def test_the_parts_of_the_json_add_up(capsys):
    found = record(capsys, "step", "gpt2:L=2", "--batch-size", "1", "--precision", "bf16-mixed", "--on", "h100-sxm")
    flops, memory, time = found["flops"], found["memory"], found["time"]
    assert flops["model"] == flops["forward"] + flops["backward"]
    assert flops["hardware"] == flops["model"] + flops["recompute"]
    assert flops["total"] == sum(flops["by_kind"].values()) == sum(flops["by_dtype"].values())
    assert sum(flops["by_kind"][k] for k in ("matmul", "attention", "conv")) == flops["hardware"]
    assert sum(memory["at_peak"].values()) == memory["peak_bytes"] <= memory["reserved_bytes"]
    assert found["bytes_moved"]["total"] == sum(found["bytes_moved"]["by_kind"].values())
    assert sum(time["bound_by"].values()) == pytest.approx(time["seconds"])
    assert time["lower_seconds"] == time["roofline_seconds"] < time["seconds"] < time["upper_seconds"]
    assert time["seconds"] == pytest.approx(1.45 * time["roofline_seconds"])
    assert time["mfu"] < time["hfu"] < 1


def test_mfu_is_model_flops_at_dense_peak_over_time(capsys):
    found = record(capsys, "step", "gpt2:L=2", "--batch-size", "1", "--precision", "bf16", "--on", "h100-sxm")
    ideal = found["flops"]["model"] / 989.4e12  # every product in bf16, but the position table's none
    assert found["time"]["mfu"] == pytest.approx(ideal / found["time"]["seconds"], rel=1e-6)


def test_stdout_holds_one_json_object_and_nothing_else():
    run = subprocess.run(
        [sys.executable, "-m", "bursar", "step", "cruncher", "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout)["model"]["parameters"] == 36
    assert run.stderr == ""


@pytest.mark.parametrize(
    ("model", "batch", "seq", "forward_plus_backward", "parameters"),
    [
        ("llama3-8b", 1, 8192, 421_651_971_833_856, 8_030_261_248),
        ("llama3-70b", 1, 8192, 3_680_063_270_682_624, 70_553_706_496),
    ],
)
def test_llama_3_costs_what_the_shapes_say(model, batch, seq, forward_plus_backward, parameters):
    ledger = bursar.step(model, batch_size=batch, seq_len=seq, precision="bf16")
    assert ledger.flops.model == forward_plus_backward
    assert ledger.model.parameters == parameters
    layers_, d, heads, head_dim, kv, f, vocab = {
        "llama3-8b": (32, 4096, 32, 128, 8, 14336, 128256),
        "llama3-70b": (80, 8192, 64, 128, 8, 28672, 128256),
    }[model]
    per_token = layers_ * (2 * d * heads * head_dim + 2 * d * kv * head_dim + 3 * d * f) + d * vocab
    pairs = seq * (seq + 1) // 2
    assert ledger.flops.model == 3 * (2 * per_token * seq + layers_ * heads * 4 * pairs * head_dim)


@pytest.mark.parametrize(
    ("model", "parameters", "full_square", "causal"),
    [
        ("course-gpt2-xl", 2_127_057_600, 4_513_336_524_800, 4_352_432_537_600),
        ("course-gpt2-xl-f4288", 1_640_452_800, 3_516_769_894_400, None),
    ],
)
def test_the_courses_gpt2_xl_costs_what_its_answer_sheet_says(model, parameters, full_square, causal):
    ledger = bursar.step(model, batch_size=1, precision="bf16")
    assert ledger.model.parameters == parameters
    assert ledger.flops.model_full_square == 3 * full_square  # forward, and backward twice that
    if causal:
        assert ledger.flops.forward == causal


def test_every_preset_traces_at_a_small_size(capsys):
    from bursar.architecture import Transformer, known_models, preset

    for name in known_models():
        shape = preset(name)
        small = f"{name}:L=1" if isinstance(shape, Transformer) else name
        argv = ["step", small, "--batch-size", "1"]
        found = record(capsys, *argv, *(["--seq-len", "16"] if isinstance(shape, Transformer) else []))
        assert found["flops"]["uncounted"] == [], name
        assert found["flops"]["model"] > 0
        assert found["model"]["parameters"] == preset(small).parameters()


# ---- layers, rules, levers


def test_gradients_are_the_notes_table_for_two_layers(capsys):
    found = record(capsys, "step", "two-layer:B=64,D=512,K=10", "--gradients")
    B, D, K = 64, 512, 10
    first, second = found["gradients"]
    assert (first["forward"], first["d_input"], first["d_weight"]) == (2 * B * D * D, 0, 2 * B * D * D)
    assert (second["forward"], second["d_input"], second["d_weight"]) == (2 * B * D * K,) * 3
    assert found["flops"]["backward"] == 2 * B * (D * D + 2 * D * K) == 34_865_152


def test_dx_and_dw_are_told_apart_when_batch_and_widths_are_all_equal():
    ledger = bursar.step("two-layer:B=32,D=32,K=32")
    first, second = layers(ledger)
    product = 2 * 32 * 32 * 32
    assert (first.forward, first.d_input, first.d_weight) == (product, 0, product)
    assert (second.forward, second.d_input, second.d_weight) == (product, product, product)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed", "fp16-mixed"])
def test_layers_add_up_to_forward_and_backward_in_every_precision(precision):
    ledger = bursar.step("gpt2:L=2,d=64,h=4,V=128", batch_size=2, seq_len=32, precision=precision)
    found = layers(ledger)
    assert sum(x.forward for x in found) == ledger.flops.forward
    assert sum(x.d_input + x.d_weight for x in found) == ledger.flops.backward
    linear = [x for x in found if x.d_weight]
    assert all(x.d_input == x.d_weight == x.forward for x in linear)


def test_full_recompute_does_the_blocks_forward_again():
    plain = bursar.step("gpt2:L=3,d=64,h=4,V=128", batch_size=2, seq_len=32, precision="bf16")
    full = bursar.step("gpt2:L=3,d=64,h=4,V=128", batch_size=2, seq_len=32, precision="bf16", recompute="full")
    assert full.flops.model == plain.flops.model
    head = 2 * 64 * 64 * 128  # tokens x d x V, outside the blocks
    last = 2 * 64 * 256 * 64 * 3  # each block's closing product: nothing saved comes after it, so torch stops before
    assert full.flops.recompute - plain.flops.recompute == plain.flops.forward - head - last
    assert full.memory.after_forward["activations"] < plain.memory.after_forward["activations"]


def test_selective_recompute_does_the_attention_core_again():
    plain = bursar.step("gpt2:L=3,d=64,h=4,V=128", batch_size=2, seq_len=32, precision="bf16")
    selective = bursar.step(
        "gpt2:L=3,d=64,h=4,V=128", batch_size=2, seq_len=32, precision="bf16", recompute="selective"
    )
    core = 3 * 2 * 4 * 4 * (32 * 33 // 2) * 16  # layers x batch x heads x 4 x pairs x head size
    assert selective.flops.recompute - plain.flops.recompute == core
    assert selective.flops.model == plain.flops.model


def test_recompute_full_without_repeated_blocks_says_so():
    with pytest.raises(BadInput, match="repeated blocks"):
        bursar.step("two-layer", recompute="full")


def test_accumulation_multiplies_flops_and_tokens_and_not_the_batch_in_memory():
    once = bursar.step("gpt2:L=1,d=64,h=4,V=128", batch_size=2, seq_len=32)
    four = bursar.step("gpt2:L=1,d=64,h=4,V=128", batch_size=2, seq_len=32, accumulate=4)
    assert four.flops.model == 4 * once.flops.model
    assert four.flops.optimizer - once.flops.optimizer == 0
    assert (four.step.samples, four.step.tokens, four.step.micro_batches) == (8, 8 * 32, 4)
    assert four.memory.at_peak["inputs"] == once.memory.at_peak["inputs"]


def test_data_parallel_ranks_multiply_the_jobs_flops_and_reduce_gradients_once():
    one = bursar.step("gpt2:L=1,d=64,h=4,V=128", batch_size=2, seq_len=32, on="h100-sxm")
    eight = bursar.step("gpt2:L=1,d=64,h=4,V=128", batch_size=2, seq_len=32, on="8xh100-sxm")
    assert eight.flops.model == 8 * one.flops.model
    assert eight.step.tokens == 8 * one.step.tokens
    found = step_record(eight, eight.on("8xh100-sxm"))
    gradient_bytes = 4 * eight.model.trainable_parameters
    assert found.collectives == [
        {"op": "all_reduce", "group": "dp", "ranks": 8, "calls": 1, "bytes": 2 * (gradient_bytes * 7 // 8)}
    ]
    assert found.memory["between_steps"]["gradients"] == gradient_bytes  # DDP's buckets stay


@pytest.mark.parametrize(
    ("precision", "per_parameter"), [("fp32", (4, 4, 8)), ("bf16", (2, 2, 4)), ("bf16-mixed", (4, 4, 8))]
)
def test_precision_decides_the_bytes_of_parameters_gradients_and_state(precision, per_parameter):
    book = bursar.step("gpt2:L=1,d=64,h=4,V=128", batch_size=1, seq_len=8, precision=precision).textbook
    P = bursar.step("gpt2:L=1,d=64,h=4,V=128", batch_size=1, seq_len=8).model.parameters
    assert (book.parameters, book.gradients, book.optimizer_state) == tuple(n * P for n in per_parameter)


@pytest.mark.parametrize(
    ("optimizer", "tensors"),
    [("sgd", 0), ("momentum", 1), ("nesterov", 1), ("adagrad", 1), ("rmsprop", 1), ("adam", 2), ("adamw", 2)],
)
def test_optimizer_state_is_read_off_the_optimizer(optimizer, tensors):
    ledger = bursar.step("two-layer:B=4,D=16,K=8", optimizer=optimizer)
    assert ledger.memory.between_steps["optimizer_state"] == tensors * 4 * (16 * 16 + 16 * 8)


def test_tf32_and_fp32_are_different_peaks():
    fp32 = bursar.step("two-layer", precision="fp32").flops.by_dtype
    tf32 = bursar.step("two-layer", precision="tf32").flops.by_dtype
    assert "tf32" not in fp32
    assert tf32["tf32"] == 34_209_792 + 34_865_152


# ---- a user's own model


@pytest.mark.parametrize("callable_", ["pair", "keywords", "instance"])
def test_a_users_file_traces(capsys, user_file, callable_):
    found = record(capsys, "step", f"{user_file}:{callable_}")
    products = 2 * 4 * (64 * 32 + 32 * 10)
    assert found["flops"]["forward"] == products
    assert found["flops"]["backward"] == products + 2 * 4 * 32 * 10
    assert found["step"]["samples"] == 4


def test_a_callable_that_takes_sizes_is_given_them(capsys, user_file):
    assert record(capsys, "step", f"{user_file}:sized", "--batch-size", "7")["step"]["samples"] == 7


def test_a_batch_that_was_guessed_is_an_assumption(capsys, user_file):
    found = record(capsys, "step", f"{user_file}:alone")
    assert any("guessed: features (8, 64)" in note for note in found["assumptions"])


def test_ten_trillion_parameters_are_answered_plainly(capsys, user_file):
    found = record(capsys, "step", f"{user_file}:huge", "--on", "h100-sxm")
    assert found["model"]["parameters"] == 4_000_000 * 2_500_000 + 2_500_000
    assert found["fits"] is False


def test_a_module_given_to_step_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    model.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batch = torch.randn(4, 8)
    rng = torch.get_rng_state()
    ledger = bursar.step(model, batch)
    assert ledger.flops.forward == 2 * 4 * 8 * 8
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    assert all(p.device.type == "cpu" for p in model.parameters())


def test_tied_weights_stay_tied_in_the_copy():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(32, 8), nn.Linear(8, 32, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(tokens))

    ledger = bursar.step(Tied(), torch.randint(0, 32, (2, 5)))
    assert ledger.model.parameters == 32 * 8
    assert ledger.step.tokens == 10


def test_a_loss_of_ones_own():
    model = nn.Linear(8, 3)
    ledger = bursar.step(
        model, (torch.randn(4, 8), torch.randint(0, 3, (4,))), loss=lambda m, b: F.cross_entropy(m(b[0]), b[1])
    )
    assert "aten.nll_loss_forward" in set(ledger.ops["op"])


# ---- Hugging Face configs


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_costs_what_its_shape_says(capsys, config, kind):
    found = record(capsys, "step", config(kind), "--batch-size", "2", "--seq-len", "64", "--precision", "bf16")
    L, d, T, V, B, S = 2, 64, 128, 1000, 2, 64
    weights = {
        "gpt2": L * (4 * d * d + 8 * d * d) + d * V,
        "llama": L * (2 * d * d + 2 * d * 32 + 3 * d * T) + d * V,
        "bert": L * (4 * d * d + 2 * d * T) + d * d + d * V,
    }[kind]
    pairs = S * S if kind == "bert" else S * (S + 1) // 2
    attention = L * B * 4 * pairs * d  # all heads together are d wide
    rope = (
        2 * (d // 4 // 2) * S if kind == "llama" else 0
    )  # transformers makes its angles by a product, without gradient
    assert found["flops"]["forward"] - attention - 2 * weights * B * S in (0, rope, B * rope)
    assert found["flops"]["attention"] == 3 * attention + attention // 2  # QK^T once more in backward
    assert found["flops"]["uncounted"] == []


def test_a_decoders_config_keeps_the_causal_flash_kernel_of_its_real_run(config):
    ledger = bursar.step(config("gpt2"), batch_size=2, seq_len=64, precision="bf16")
    assert "aten._scaled_dot_product_flash_attention" in set(ledger.ops["op"])
    assert ledger.flops.attention < ledger.flops.attention_full_square


def test_a_config_folder_is_a_config(capsys, config):
    folder = str(Path(config("gpt2")).parent)
    assert record(capsys, "step", folder, "--seq-len", "8")["model"]["name"] == "gpt2"


def test_a_config_never_runs_code(capsys, config, tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    path = config("gpt2", auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"})
    record(capsys, "step", path, "--seq-len", "8")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is no JSON"),
        ("[1]", "no 'model_type'"),
        ('{"model_type": "gpt22"}', "did you mean gpt2"),
        ('{"model_type": "gpt2", "n_embd": "wide"}', "refuses"),
        ('{"model_type": "flava_image_codebook"}', "every parameter of FlavaImageCodebook is frozen"),
        ("[" * 100_000, "is no JSON"),
    ],
)
def test_a_bad_config_is_told_plainly(capsys, tmp_path, text, says):
    path = tmp_path / "config.json"
    path.write_text(text)
    code, out, err = ask(capsys, "step", str(path))
    assert (code, out) == (2, "")
    assert says in err


# ---- bad input


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["step", "gpt9"], 2, "did you mean gpt2"),
        (["step", "gpt2", "--on", "h100"], 2, "did you mean h100-sxm, h100-pcie"),
        (["step", "gpt2", "--on", "0xh100-sxm"], 2, "whole number from 1"),
        (["step", "gpt2", "--on", "local"], 3, "not calibrated"),
        (["step", "gpt2", "--precision", "bf17"], 2, "did you mean bf16"),
        (["step", "gpt2", "--optimizer", "adamm"], 2, "did you mean adam"),
        (["step", "gpt2", "--recompute", "fully"], 2, "did you mean full"),
        (["step", "gpt2", "--batch-size", "0"], 2, "trains nothing"),
        (["step", "gpt2", "--batch-size", "-3"], 2, "trains nothing"),
        (["step", "gpt2", "--accumulate", "0"], 2, "train nothing"),
        (["step", "gpt2", "--seq-len", "5000"], 2, "1024 learned positions"),
        (["step", "resnet50", "--seq-len", "5"], 2, "no sequence"),
        (["step", "nofile.py:x"], 2, "no file"),
        (["step", "gpt2:Q=3"], 2, "gpt2"),
        (["step", "v100:L=2"], 2, "no model"),
        (["step", "gpt2:L=1", "--precision", "bf16", "--on", "v100-32g-sxm"], 2, "no known peak in bf16"),
        (["step", "gpt2", "--compile"], 2, "not counted yet"),
        (["step", "gpt2", "--on", "8xh100-sxm", "--layout", "fsdp=8"], 2, "not counted yet"),
        (["step", "gpt2", "--on", "8xh100-sxm", "--layout", "dp=4"], 2, "dp=8"),
        (["step", "gpt2", "--frobnicate"], 2, "Unknown option"),
        (["step"], 2, "requires an argument"),
        (["stepp", "gpt2"], 2, "step"),
    ],
)
def test_bad_input_is_told_plainly(capsys, argv, code, says):
    found, out, err = ask(capsys, *argv)
    assert found == code
    assert out == ""
    assert says in err
    assert "Traceback" not in err


@pytest.mark.parametrize("callable_", ["item", "mask"])
def test_a_forward_that_needs_data_names_line_and_remedy(capsys, user_file, callable_):
    code, out, err = ask(capsys, "step", f"{user_file}:{callable_}")
    assert (code, out) == (2, "")
    assert "my_net.py:" in err
    assert "no .item() in forward" in err
    assert "Traceback" not in err


def test_a_shape_mismatch_is_the_users_own_traceback_trimmed(capsys, user_file):
    code, _, err = ask(capsys, "step", f"{user_file}:shape")
    assert code == 2
    assert "my_net.py" in err
    assert "h @ torch.ones(7, 3" in err
    assert "site-packages" not in err


def test_a_users_own_mistake_is_theirs(capsys, user_file):
    code, _, err = ask(capsys, "step", f"{user_file}:mistake")
    assert code == 2
    assert err.rstrip().endswith("ValueError: my own mistake")
    assert "in mistake" in err


def test_what_is_no_module_is_said(capsys, user_file):
    assert "returned int" in ask(capsys, "step", f"{user_file}:three")[2]
    assert "known:" in ask(capsys, "step", f"{user_file}:nosuch")[2]


def test_a_batch_size_that_would_change_nothing_is_refused(capsys, user_file):
    code, _, err = ask(capsys, "step", f"{user_file}:pair", "--batch-size", "9")
    assert code == 2
    assert "let it take a parameter 'batch_size'" in err


def test_the_python_errors_are_the_commands_errors():
    with pytest.raises(UnknownName, match="did you mean adamw"):
        bursar.step("gpt2", optimizer="adamww")
    with pytest.raises(BadInput, match="needs a batch"):
        bursar.step(nn.Linear(2, 2))
    with pytest.raises(BadInput, match="is no model"):
        bursar.step(3)  # type: ignore[arg-type]

    class Looks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * float(x.sum())

    with pytest.raises(DataDependent, match=r"test_step\.py"):
        bursar.step(nn.Sequential(nn.Linear(2, 2), Looks()), torch.ones(1, 2))


# ---- the page


@pytest.mark.parametrize("columns", ["80", "160"])
def test_the_page_fits_its_columns(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    code, out, _ = ask(capsys, "step", "cruncher", "--gradients", "--on", "h100-sxm")
    assert code == 0
    assert max(len(line) for line in out.splitlines()) <= int(columns)
    for figure in ("496 B", "144 FLOP", "224 FLOP", "368 FLOP", "432 FLOP", "29.03 %", "12.90 %"):
        assert figure in out


def test_a_modules_name_cannot_command_the_terminal(capsys, tmp_path):
    path = tmp_path / "evil.py"
    path.write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.add_module('\\x1b[31m<b>[bold]x', torch.nn.Linear(2, 2))\n"
        "    def forward(self, x):\n"
        "        return next(iter(self.children()))(x)\n"
        "def make(): return Net(), torch.ones(1, 2)\n"
    )
    code, out, _ = ask(capsys, "step", f"{path}:make", "--gradients")
    assert code == 0
    assert "\x1b" not in out
    assert "\\x1b[31m<b>[bold]x" in out


def test_explain_names_formula_and_source(capsys):
    _, out, _ = ask(capsys, "step", "gpt2:L=1", "--precision", "bf16", "--on", "h100-sxm", "--explain")
    assert "989.4 TFLOP/s" in out
    assert "ml-engineering" in out


def test_a_flag_may_stand_in_the_environment_or_in_bursar_toml(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BURSAR_STEP_ACCUMULATE", "3")
    assert record(capsys, "step", "cruncher")["step"]["micro_batches"] == 3
    monkeypatch.delenv("BURSAR_STEP_ACCUMULATE")
    (tmp_path / "bursar.toml").write_text("[step]\naccumulate = 2\n")
    assert record(capsys, "step", "cruncher")["step"]["micro_batches"] == 2


def test_the_ledger_is_written_as_parquet(capsys, tmp_path):
    import polars

    path = tmp_path / "ledger.parquet"
    assert ask(capsys, "step", "cruncher", "--parquet", str(path))[0] == 0
    table = polars.read_parquet(path)
    assert table.filter(polars.col("phase") == "forward")["flops"].sum() >= 144


# ---- light starts


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["run", "--params", "70B", "--tokens", "15T", "--on", "1024xh100-sxm"], ["hardware"], ["models"]],
)
def test_answers_that_need_no_torch_do_not_import_it(argv):
    code = (
        "import sys, contextlib, io\n"
        "from bursar.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        f"    main({argv!r})\n"
        "print(*sorted({'torch', 'polars', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_without_torch_a_step_says_how_to_get_it(capsys, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torch" else real(name, *a))
    code, _, err = ask(capsys, "step", "gpt2")
    assert code == 3
    assert "pip install 'bursar[torch]'" in err


def test_blocks_alike_are_folded_and_nothing_is_lost():
    from bursar.ledger import parts

    ledger = bursar.step("gpt2:L=5,d=64,h=4,V=128", batch_size=2, seq_len=32)
    found = parts(ledger.recorded)
    blocks = next(part for part in found if part.module == "h.0–4")
    assert blocks.copies == 5
    assert sum(part.copies * part.flops for part in found) == ledger.flops.hardware
    assert sum(part.copies * part.bytes for part in found) == sum(ledger.bytes_moved.values())
    assert sum(r.module.startswith("h.0") for r in ledger.recorded) > 0


# ---- the memory of the step, drawn


def test_the_page_of_cruncher_has_the_notes_sum_in_both_conventions(capsys):
    assert record(capsys, "step", "cruncher")["memory"]["saved_activation_bytes"] == 4 * 18
    _, out, _ = ask(capsys, "step", "cruncher")
    rows = {line[:22].strip(): line[22:].split() for line in out.splitlines()}
    assert rows["layer outputs"][:4] == ["64", "B", "16", "12.90"]
    assert rows["or saved activations"][:4] == ["72", "B", "18", "14.29"]
    assert rows["total"][:4] == ["496", "B", "124", "100.00"]
    assert rows["total with saved"][:4] == [str(496 - 64 + 72), "B", "126", "100.00"]


def test_each_bar_is_as_long_as_every_other_and_its_cells_are_the_shares(capsys):
    _, out, _ = ask(capsys, "step", "cruncher")
    bars = [line.split()[-1] for line in out.splitlines() if "░░" in line]
    assert [len(bar) for bar in bars] == [48, 48]
    for bar, activations in zip(bars, (64, 72), strict=True):
        for fill, n_bytes in zip("█▓▒░", (144, activations, 144, 144), strict=True):
            assert abs(bar.count(fill) - 48 * n_bytes / (3 * 144 + activations)) < 1


@pytest.mark.parametrize(("zero_grad", "kept"), [("none", 0), ("zeros", 4 * 36)])
def test_gradients_are_gone_between_steps_unless_they_are_kept_as_zeros(capsys, zero_grad, kept):
    memory = bursar.step("cruncher", zero_grad=zero_grad).memory
    gradients = memory.course(48)["gradients"]
    assert (gradients[0], max(gradients), gradients[-1]) == (kept, 4 * 36, kept)
    _, out, _ = ask(capsys, "step", "cruncher", "--zero-grad", zero_grad)
    drawn = next(line for line in out.splitlines() if line.startswith("  gradients       "))[18:66]
    assert (drawn[0], drawn[-1]) == (("█", "█") if kept else (" ", " "))


def test_the_course_of_memory_reaches_the_peak_of_each_class_and_ends_between_steps():
    memory = bursar.step("gpt2:L=2,d=64,h=2,V=128", batch_size=1, seq_len=32).memory
    course = memory.course(20)
    for name, live in memory.timeline.items():
        if name != "row":
            assert len(course[name]) == 20
            assert max(course[name]) == max(memory.base[name], int(live.max()))
            assert course[name][-1] == memory.between_steps[name]


def test_the_rule_of_twelve_stands_beside_the_exact_count(capsys):
    assert "12·d²·L = 84.9M: -0.1% against" in ask(capsys, "models", "gpt2")[1]
    assert "12·d²·L" in ask(capsys, "step", "gpt2:L=1", "--batch-size", "1", "--seq-len", "8")[1]
    assert "12·d²·L" not in ask(capsys, "step", "cruncher")[1]


def test_an_unknown_zero_grad_is_refused():
    with pytest.raises(UnknownName, match="zeros"):
        bursar.step("cruncher", zero_grad="zero")
