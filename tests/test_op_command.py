import json
import subprocess
import sys

import pytest

from bursar.errors import BadInput
from command import ask


def ran(capsys, *words):
    """Exit code, stdout and stderr of ``bursar op``."""
    return ask(capsys, "op", *words)


def answered(capsys, *words):
    code, out, err = ran(capsys, *words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_the_notes_matmul_on_an_h100(capsys) -> None:
    code, out, _ = ran(capsys, "matmul 16384x32768x8192", "--on", "h100-sxm", "--explain")
    assert code == 0
    for part in ("8796093022208", "8.80 TFLOP", "8.89 ms", "compute", "295.3", "100.0 %", "989.4 TFLOP/s"):
        assert part in out


def test_json_is_one_object_with_the_contracts_fields(capsys) -> None:
    found = answered(capsys, "matmul 16384x32768x8192", "--on", "h100-sxm", "--dtype", "fp32,bf16")
    assert (found["schema_version"], found["op"]) == (1, "matmul 16384x32768x8192")
    assert [r["dtype"] for r in found["results"]] == ["fp32", "bf16"]
    bf16 = found["results"][1]
    assert bf16["flops"] == 2**43
    assert bf16["bytes"] == bf16["read_bytes"] + bf16["written_bytes"] == 1_879_048_192
    assert (bf16["on"], bf16["bound_by"], bf16["bound_seconds"]) == ("h100-sxm", "compute", 2**43 / 989.4e12)
    assert (bf16["mfu"], bf16["measured"]) == (None, None)
    assert found["assumptions"]


def test_without_a_device_the_times_are_null_and_the_page_says_why(capsys) -> None:
    assert answered(capsys, "relu 4096x4096")["results"][0]["bound_seconds"] is None
    assert "no --on, so no time" in ran(capsys, "relu 4096x4096")[1]


def test_several_words_say_what_one_quoted_string_says(capsys) -> None:
    words = answered(capsys, "attention", "2x4x64x32", "causal", "backward")
    assert words == answered(capsys, "attention 2x4x64x32 causal backward")
    assert words["op"] == "attention 2x4x64x32 causal backward"
    assert answered(capsys, "einsum", "bij,bjk->bik", "2x3x4", "2x4x5")["results"][0]["flops"] == 240


def test_an_operation_of_several_kernels_lists_them(capsys) -> None:
    assert "Its 2 kernels" in ran(capsys, "matmul 5x6x7 backward")[1]
    assert [x["op"] for x in answered(capsys, "matmul 5x6x7 backward")["results"][0]["kernels"]] == ["aten.mm"] * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["matmull 2x3x4"], "no operation 'matmull'; did you mean matmul"),
        (["matmul 2x3 4x5"], "inner sizes do not match, 3 of 2x3 and 4 of 4x5"),
        (["matmul 2x0x3"], "as in 'matmul 16384x32768x8192'"),
        (["relu 4", "--dtype", "bf17"], "no dtype 'bf17'"),
        (["relu 4", "--on", "h101"], "no accelerator 'h101'"),
        (["relu 4", "--on", "8xh100-sxm"], "one device: give --on h100-sxm"),
        (["relu 4", "--on", "cpu"], "--measure runs the operation"),
        (["relu 4", "--measure", "--seconds", "0"], "no time to measure"),
        (["relu 4", "--measure", "--seconds", "nan"], "no time to measure"),
        (["matmul 64x64x64", "--measure", "--dtype", "fp8"], "priced and not run"),
    ],
)
def test_a_wrong_request_exits_2_with_nothing_on_stdout(capsys, words, message) -> None:
    code, out, err = ran(capsys, *words)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_without_torch_all_but_measure_works(tmp_path) -> None:
    blind = (
        "import sys\n"
        "class Blind:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'torch': raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Blind())\n"
        "import importlib.util as u\n"
        "real = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'torch' else real(name, package)\n"
        "from bursar.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    ask = [sys.executable, "-c", blind, "op", "matmul 64x64x64", "--on", "h100-sxm"]
    found = subprocess.run(ask, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (found.returncode, "524288" in found.stdout) == (0, True)
    found = subprocess.run([*ask, "--measure"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (found.returncode, found.stdout) == (3, "")
    assert "pip install 'bursar[torch]'" in found.stderr


# --measure


def test_measuring_reports_flops_per_second_by_dtype_and_the_speed_up(capsys) -> None:
    pytest.importorskip("torch")
    found = answered(capsys, "matmul 64x64x64", "--measure", "--dtype", "fp32,bf16", "--seconds", "0.01")
    fp32, bf16 = (r["measured"] for r in found["results"])
    for m in (fp32, bf16):
        assert m["flops"] == 2 * 64**3
        assert m["flops_per_s"] == m["flops"] / m["seconds"] > 0
        assert m["repeats"] >= 3
        assert min(m["iqr_seconds"], m["cpu_seconds"]) >= 0
        assert m["threads"] >= 1
        assert min(m["canary_flops_per_s"]) > 0
        assert m["shrunk_by"] == 0
    assert fp32["speed_up"] is None
    assert bf16["speed_up"] == {"over": "fp32", "ratio": bf16["flops_per_s"] / fp32["flops_per_s"]}


def test_a_cpu_has_no_peak_so_no_mfu_and_the_page_says_so(capsys) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    words = ("matmul 64x64x64", "--measure", "--seconds", "0.01")
    assert "MFU: no peak is known for this CPU" in ran(capsys, *words)[1]
    assert answered(capsys, *words)["results"][0]["mfu"] is None
    assert ran(capsys, "matmul 64x64x64", "--measure", "--dtype", "tf32")[0] == 2


@pytest.mark.parametrize(
    "text",
    ["matmul 4x5 5x6 backward no-dx", "matvec 8", "conv1d 2x4x16 4x3 groups=2 transposed", "conv3d 1x2x4x4x4 2x3x3x3",
     "attention 1x2x16x8 kv=1 causal backward", "attention 1x2x16x8 window=4", "einsum ij,jk->ik 4x5 5x6", "gelu 8x8",
     "div 8x8 8", "copy 8x8", "dropout 8x8", "norm 8x8", "softmax 4x8 backward", "layernorm 4x8", "mse 4x8",
     "rmsnorm 4x8 backward", "cross_entropy 4x8 backward", "embedding 16x4 tokens=8 backward", "adamw 100", "adam 100",
     "momentum 100", "adagrad 100"],
)  # fmt: skip
def test_every_kind_of_operation_runs_here(text) -> None:
    pytest.importorskip("torch")
    from bursar.measure import measure
    from bursar.operation import parse

    assert measure(parse(text, "fp32"), seconds=1e-3).seconds > 0


def test_what_is_too_large_is_divided_by_a_power_of_two_that_is_stated(monkeypatch) -> None:
    pytest.importorskip("torch")
    from bursar import measure as m
    from bursar.operation import parse

    monkeypatch.setattr(m, "_free_bytes", lambda device: 2 * 3 * 4 * 256**2)  # room for 256 x 256 in three matrices
    small, large = (parse(f"matmul {n}x{n}x{n}", "fp32") for n in (256, 1024))
    assert m.measure(small, 1e-3).shrunk_by == 0
    found = m.measure(large, 1e-3)
    assert (found.shrunk_by, found.operation.text, found.flops) == (2, "matmul 256x256x256", 2 * 256**3)
    assert any("divided by 2^2" in note and "matmul 256x256x256 ran" in note for note in found.notes)
    assert {x.shrunk_by for x in m.compare([small, large], 1e-3)} == {2}  # all alike, so that they compare
    monkeypatch.setattr(m, "_free_bytes", lambda device: 1)
    with pytest.raises(BadInput, match="too large for this machine"):
        m.measure(small, 1e-3)


def test_a_slow_canary_and_a_waiting_clock_are_noticed() -> None:
    pytest.importorskip("torch")
    from bursar.measure import _busy_notes

    assert _busy_notes(1e9, 1e9, wall=1.0, spread=0.01, cpu=1.9, device="cpu") == []
    assert "0.50 of its speed" in _busy_notes(1e9, 5e8, wall=1.0, spread=0.01, cpu=1.9, device="cpu")[0]
    assert "0.40 s of CPU" in _busy_notes(1e9, 1e9, wall=1.0, spread=0.01, cpu=0.4, device="cpu")[0]
    assert "spread over 50%" in _busy_notes(1e9, 1e9, wall=1.0, spread=0.5, cpu=1.9, device="cpu")[0]


def test_measuring_leaves_torchs_settings_as_they_were() -> None:
    torch = pytest.importorskip("torch")
    from bursar.measure import _prepared

    place = torch.backends.cuda.matmul
    before = place.fp32_precision
    with _prepared("tf32"):
        assert place.fp32_precision == "tf32"
    with _prepared("fp32"):
        assert place.fp32_precision == "ieee"
        assert not torch.tensor(1e-40) * 1  # flushed
    assert place.fp32_precision == before
    assert torch.tensor(1e-40) * 1
