"""The optimizers: what each keeps is what its `state_dict` holds, and its step is its rule."""

import json
import math
import tomllib
from importlib.resources import files

import pytest
import torch
from torch import nn

import bursar
from bursar.errors import BadInput, MissingExtra, UnknownName
from bursar.optimizers import OPTIMIZERS, family_tree
from bursar.trace import tracing
from bursar.workload import optimizers
from command import ask

NAMES = list(OPTIMIZERS)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(64, 64)
        self.a = nn.Linear(64, 128)
        self.b = nn.Linear(128, 64, bias=False)

    def forward(self, x):
        return self.b(torch.tanh(self.a(self.table(x))))


@pytest.fixture(autouse=True)
def _seeded():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


def _needs(name):
    if OPTIMIZERS[name].extra:
        pytest.importorskip({"adamw-8bit": "torchao"}.get(name, "pytorch_optimizer"))


def _stepped(name, module, batch, **settings):
    made = optimizers.build(name, module.parameters(), module=module, **settings)
    with optimizers.uncompiled():
        for _ in range(2):
            module(batch).pow(2).mean().backward()
            made.step()
            made.zero_grad()
    return made


# ---- state


@pytest.mark.parametrize("name", NAMES)
def test_the_traced_state_is_as_large_as_the_real_state_dict(name):
    _needs(name)
    module, batch = Tiny(), torch.randint(0, 64, (2, 8))
    kept = optimizers.state_tensors(_stepped(name, module, batch))
    on_device = sum(optimizers.bytes_of(t) for key, ts in kept.items() for t in ts if key != "step")  # counters: host
    everywhere = sum(optimizers.bytes_of(t) for ts in kept.values() for t in ts)
    assert bursar.step(Tiny(), batch, optimizer=name).memory.between_steps["optimizer_state"] == on_device
    assert bursar.step(Tiny(), batch, optimizer=name, on="cpu").memory.between_steps["optimizer_state"] == everywhere


@pytest.mark.parametrize(
    ("name", "tensors"),
    [("sgd", 0), ("momentum", 1), ("nesterov", 1), ("adagrad", 1), ("rmsprop", 1), ("adam", 2), ("adamw", 2),
     ("lion", 1), ("lamb", 2), ("muon", 1)],
)  # fmt: skip
def test_the_states_per_parameter_are_those_of_the_law(name, tensors):
    _needs(name)
    found = optimizers.cost(name)
    assert found.state_bytes == 4 * tensors
    assert found.state_bytes_bf16 == 2 * tensors


def test_adafactor_keeps_a_row_and_a_column_of_a_matrix():
    assert optimizers.cost("adafactor").state_bytes == 4 * (256 + 256) / 256**2


def test_8_bit_adam_keeps_2_03_bytes_per_parameter_of_a_large_matrix():
    _needs("adamw-8bit")
    n = 4096 * 4096
    with tracing() as session:
        weight = nn.Parameter(torch.empty(4096, 4096, device="cuda"))
        weight.grad = torch.empty_like(weight)
        optimizers.build("adamw-8bit", [weight]).step()
    kept = session.ledger.memory.between_steps["optimizer_state"]
    assert kept == 2 * (n + 4 * n // 256 + 4 * 256)  # codes, a scale per block of 256, the table of 256 values
    assert kept / n == pytest.approx(2.03, abs=0.02)


def test_8_bit_adam_leaves_tensors_under_4096_elements_in_32_bits():
    _needs("adamw-8bit")
    weight = nn.Parameter(torch.zeros(4095))
    weight.grad = torch.ones(4095)
    made = optimizers.build("adamw-8bit", [weight])
    with optimizers.uncompiled():
        made.step()
    assert {t.dtype for t in optimizers.state_tensors(made)["exp_avg"]} == {torch.float32}


# ---- rules


def test_the_step_of_adagrad_is_the_rule_to_the_last_bit():
    lr, eps = 0.01, 1e-10
    weight = nn.Parameter(torch.randn(7, 5))
    by_hand, total = weight.detach().clone(), torch.zeros(7, 5)
    made = torch.optim.Adagrad([weight], lr=lr, eps=eps, foreach=False)
    ours = optimizers.build("adagrad", [twin := nn.Parameter(by_hand.clone())], lr=lr)
    for _ in range(5):
        g = torch.randn(7, 5)
        weight.grad, twin.grad = g.clone(), g.clone()
        made.step()
        ours.step()
        total = total + g * g
        by_hand = by_hand - lr * (g / (total.sqrt() + eps))
        assert torch.equal(weight, by_hand)
        assert torch.equal(twin, by_hand)


def test_another_epsilon_would_be_seen():
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), 1e-3)
    optimizers.build("adagrad", [weight], lr=0.01).step()
    assert not torch.equal(weight, 1 - 0.01 * weight.grad / (weight.grad**2 + 1e-5).sqrt())  # the course's own code


def test_adamw_takes_14_flops_per_parameter():
    assert optimizers.cost("adamw").flops == 14


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    module = Tiny()
    kept = _stepped("muon", module, torch.randint(0, 64, (2, 8))).state
    assert "exp_avg" in kept[module.table.weight]
    assert "exp_avg" in kept[module.a.bias]
    assert "momentum_buffer" in kept[module.a.weight]
    assert "exp_avg" in kept[module.b.weight]  # 64 wide, as is the vocabulary: taken for its head


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_goes_round(name):
    _needs(name)
    module, batch = Tiny(), torch.randint(0, 64, (2, 8))
    first = _stepped(name, module, batch)
    again = optimizers.build(name, module.parameters(), module=module)
    again.load_state_dict(first.state_dict())
    with optimizers.uncompiled():
        module(batch).pow(2).mean().backward()
        again.step()
    sizes = [{k: sum(map(optimizers.bytes_of, ts)) for k, ts in optimizers.state_tensors(o).items()}
             for o in (first, again)]  # fmt: skip
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", NAMES)
def test_each_lowers_a_loss(name):
    _needs(name)
    module, batch = Tiny(), torch.randint(0, 64, (2, 8))
    before = module(batch).pow(2).mean().item()
    _stepped(name, module, batch, lr=1e-3)
    assert module(batch).pow(2).mean().item() < before


# ---- the table


def test_adagrad_does_not_build_on_momentum():
    parents = {row.name: row.builds_on for row in OPTIMIZERS.values()}
    assert (parents["momentum"], parents["adagrad"], parents["rmsprop"]) == ("sgd", "sgd", "adagrad")
    assert (parents["adam"], parents["adamw"], parents["nesterov"]) == ("rmsprop", "adam", "momentum")


def test_the_tree_holds_every_optimizer_once():
    assert sorted(row.name for _, row in family_tree()) == sorted(NAMES)


def test_every_row_has_its_rule_its_source_and_a_learning_rate():
    rows = tomllib.loads(files("bursar").joinpath("catalog/optimizers.toml").read_text(encoding="utf-8"))
    for row in rows.values():
        assert row["rule"]
        assert row["source"]
        assert row["settings"]["lr"] > 0


def test_an_unknown_name_and_a_setting_nobody_takes_are_told():
    with pytest.raises(UnknownName, match="did you mean adam"):
        optimizers.build("adm", [])
    with pytest.raises(BadInput, match="sgd does not take rho"):
        optimizers.build("sgd", [nn.Parameter(torch.zeros(1))], rho=1)


def test_a_missing_library_names_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.optim", None)
    with pytest.raises(MissingExtra, match=r"bursar\[optim\]"):
        optimizers.build("adamw-8bit", [nn.Parameter(torch.zeros(1))])


def test_a_trace_does_not_spoil_the_8_bit_tables_of_the_process():
    _needs("adamw-8bit")
    bursar.step("cruncher:D=64", optimizer="adamw-8bit")
    from torchao.optim import subclass_8bit

    table = subclass_8bit.get_qmap_signed()
    assert len(table) == 256
    assert (min(table), max(table)) == pytest.approx((-1, 1), abs=0.01)


# ---- bytes per parameter and the race


def test_the_training_state_in_bytes_per_parameter():
    found = {row.precision: row.total for row in optimizers.byte_table()}
    assert found["fp32"] == 4 + 4 + 8
    assert found["bf16, all of it (torch's AdamW)"] == 2 + 2 + 4
    assert found["bf16, fp32 states"] == 2 + 2 + 8
    assert found["bf16, fp32 states and master"] == 2 + 2 + 4 + 8
    assert found["bf16 autocast"] == 4 + 4 + 8
    _needs("adamw-8bit")
    assert found["fp32, 8-bit states"] == pytest.approx(4 + 4 + 2.03, abs=0.02)


def test_the_race_starts_everyone_at_the_same_loss():
    runs = [optimizers._run(name, 1.0) for name in ("sgd", "adam")]
    assert runs[0].losses[0] == runs[1].losses[0]
    assert all(run.losses[-1] < run.losses[0] for run in runs)
    assert all(math.isfinite(loss) for run in runs for loss in run.losses)


# ---- the command


def test_the_list_names_all_with_their_rule_and_source(capsys):
    code, out, err = ask(capsys, "optimizers", "--json")
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads(out)["optimizers"]}
    assert list(rows) == NAMES
    assert rows["adamw"]["per_parameter"]["flops"] == 14
    code, out, _ = ask(capsys, "optimizers")
    assert code == 0
    assert all(row.source in out for row in OPTIMIZERS.values())


def test_without_torch_the_list_still_has_names_rules_and_sources(capsys, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torch" else find(name, *a))
    code, out, _ = ask(capsys, "optimizers", "adagrad")
    assert code == 0
    assert "θ − η·g/(√s + ε)" in out
    assert "not installed here" in out
    code, _, err = ask(capsys, "optimizers", "--compare", "mlp")
    assert code == 3
    assert "bursar[torch]" in err


def test_compare_shows_memory_and_the_race(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(optimizers, "_available", lambda: iter(("sgd", "adam")))
    argv = ["optimizers", "--compare", "cruncher"]
    path = tmp_path / "race.svg"
    if pytest.importorskip("matplotlib"):
        argv += ["--plot", str(path)]
    code, out, err = ask(capsys, *argv, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [row["state_bytes"] for row in found["memory"]] == [0, 2 * 4 * 36]
    assert len(found["race"][0]["losses"]) == optimizers.RACE_STEPS + 1
    assert path.read_text().startswith("<?xml")
    code, out, _ = ask(capsys, *argv[:3])
    assert code == 0
    assert "█" in out


def test_a_plot_of_nothing_and_a_foreign_format_are_refused(capsys, monkeypatch):
    assert ask(capsys, "optimizers", "--plot", "x.png")[0] == 2
    assert ask(capsys, "optimizers", "nadir")[0] == 2
