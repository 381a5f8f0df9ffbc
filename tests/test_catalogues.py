"""`bursar hardware`, `bursar models` and `bursar run` as pages and JSON."""

import json

import pytest

from bursar.architecture import known_models, preset
from bursar.hardware import accelerators
from command import ask


def test_hardware_lists_every_accelerator_within_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = ask(capsys, "hardware")
    assert code == 0
    assert all(a.name in out for a in accelerators())
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("device", [a.name for a in accelerators()])
def test_an_accelerators_page_has_every_figure_with_unit_and_source(capsys, device):
    code, out, _ = ask(capsys, "hardware", device)
    assert code == 0
    assert "FLOP/s" in out
    assert "B/s" in out


def test_an_accelerators_json_has_its_sources(capsys):
    _, out, _ = ask(capsys, "hardware", "h100-sxm", "--json")
    (found,) = json.loads(out)["hardware"]
    assert found["peak_flops_per_s"]["bf16"] == 989.4e12
    assert "peak_flops_per_s" in found["sources"]


def test_models_lists_every_preset_and_json_has_exact_parameters(capsys):
    _, page, _ = ask(capsys, "models")
    assert all(name in page for name in known_models())
    _, out, _ = ask(capsys, "models", "--json")
    found = {m["name"]: m["parameters"] for m in json.loads(out)["models"]}
    assert found == {name: preset(name).parameters() for name in known_models()}


@pytest.mark.parametrize("name", ["gpt2", "llama3-8b", "cruncher", "resnet50", "gpt2:L=2,d=192"])
def test_a_models_page_has_its_parameters(capsys, name):
    code, out, _ = ask(capsys, "models", name)
    assert code == 0
    assert f"{preset(name).parameters():,}" in out


def test_an_unknown_name_is_told_plainly(capsys):
    assert ask(capsys, "hardware", "h100")[0] == 2
    code, _, err = ask(capsys, "models", "gpt9")
    assert code == 2
    assert "did you mean gpt2" in err


def test_a_run_solved_as_json_has_the_contracts_fields(capsys):
    _, out, _ = ask(
        capsys, "run", "--params", "70B", "--tokens", "15T", "--on", "1024xh100-sxm", "--mfu", "0.5", "--json"
    )
    found = json.loads(out)
    assert {"flops", "tokens", "parameters", "gpus", "mfu", "seconds", "days", "gpu_hours", "usd", "kwh",
            "assumptions"} <= set(found)  # fmt: skip
    assert found["flops"] == 6 * 70 * 10**9 * 15 * 10**12
    assert round(found["days"], 2) == 143.94


def test_a_batch_in_tokens_times_the_sequence_again_is_a_warning(capsys):
    code, _, err = ask(capsys, "run", "--params", "175B", "--batch", "4M", "--seq-len", "2048", "--steps", "1",
                       "--on", "h100-sxm")  # fmt: skip
    assert code == 0
    assert "if 4M is already in tokens" in err


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["run", "--params", "70B", "--tokens", "-5", "--on", "h100-sxm"], 2, "negative"),
        (["run", "--params", "70Q", "--tokens", "1T"], 2, "70Q"),
        (["run", "gpt2", "--params", "1B"], 2, "drop"),
        (["run", "--params", "70B", "--tokens", "15T", "--on", "1024xh100-sxm", "--days", "30"], 1, "impossible"),
        (["run", "--flops", "gpt5", "--on", "h100-sxm"], 2, "gpt"),
    ],
)
def test_what_a_run_cannot_be_is_told_plainly(capsys, argv, code, says):
    found, out, err = ask(capsys, *argv)
    assert (found, out) == (code, "")
    assert says in err
