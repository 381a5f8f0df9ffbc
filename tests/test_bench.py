"""This machine measured: quickly, for real. What is asserted are shapes and orders, never seconds."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

import bursar
from bursar import bench, pricing, store
from bursar.bench import clock, grids
from bursar.bench.single import Bench
from bursar.context import FAR, HOT, placed, signature
from bursar.errors import NoAnswer, NotCalibrated
from bursar.ledger import Call, Operand
from command import ask

TINY = dataclasses.replace(bench.QUICK, sizes=(32, 64), reference=(16, 16, 2, 2), most_bytes=2**16)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def measured():
    return bench.calibrate(TINY)


@pytest.fixture
def kept(measured):
    quiet = dataclasses.replace(measured, drift=1.0)
    store.save(quiet)
    return quiet


def test_a_calibration_has_every_curve_and_goes_through_its_file(measured):
    assert set(measured.matmul["fp32"]) == {"NN", "NT"}
    assert len(measured.matmul["fp32"]["NN"]) == 2**3
    assert all(p[-1] > 0 for points in measured.matmul["fp32"].values() for p in points)
    assert {"relu", "add", "native_layer_norm_backward", "embedding"} <= set(measured.ops["fp32"])
    assert {"read", "write", "copy"} <= set(measured.bandwidth)
    assert {"floor", "call", "backward", "optimizer", "inner", "forward_cold"} <= set(measured.overhead)
    assert measured.clock == "cpu"
    assert store.calibration.loads(store.calibration.dumps(measured)) == measured


def test_calibrating_leaves_the_process_as_it_was():
    torch.set_flush_denormal(False)
    before = torch.get_rng_state()
    with bench.prepared():
        assert float(torch.tensor(1e-40) * 1) == 0.0
        torch.rand(3)
    assert float(torch.tensor(1e-40) * 1) > 0
    assert torch.equal(torch.get_rng_state(), before)


# ---- one op by itself


def every_call(net, batch, **options):
    step = bursar.step(net, batch, on="local", **options)
    return step, placed(step, 2**21)


class Mixed(torch.nn.Module):
    """Most of what needs its values seen to: indices, targets, pooling, a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 8)
        self.lstm = torch.nn.LSTM(8, 8, batch_first=True)
        self.conv = torch.nn.Conv1d(8, 8, 3, padding=1)
        self.head = torch.nn.Linear(8, 7)

    def forward(self, ids):
        x = self.lstm(self.embed(ids))[0]
        x = torch.nn.functional.max_pool2d(self.conv(x.transpose(1, 2)).relu().unsqueeze(1), 2).squeeze(1)
        x = self.head(x.repeat_interleave(2, 1).transpose(1, 2).gather(1, ids[:, :4, None].expand(-1, -1, 8)))
        return torch.nn.functional.cross_entropy(x.flatten(0, 1), ids[:, :4].flatten())


def test_every_op_of_a_step_can_be_run_by_itself():
    step, places = every_call(Mixed(), torch.arange(12).view(2, 6) % 4)
    alone = Bench(2**21)
    seconds = {p.call.op: alone.seconds(p.call, p.state, budget=0.0) for p in places}
    assert [op for op, s in seconds.items() if s is None] == []
    assert all(s > 0 for s in seconds.values())
    assert len(step.calls) == len(step) == len(places)


def test_an_op_that_cannot_be_run_by_itself_is_left_to_the_curves():
    state = placed(bursar.step(torch.nn.Linear(2, 2), torch.ones(1, 2), on="local"), 2**21)[0].state
    for call in (
        Call("aten.no_such_op.default", (), (), (), 0, 0),
        Call(
            "aten.mm.default",
            (Operand((2, 3), (3, 1), "float32", 0), Operand((2, 3), (3, 1), "float32", 1)),
            (),
            (),
            0,
            0,
        ),
        Call("aten.relu.default", (Operand((2**20, 2**20), (2**20, 1), "float32", 0),), (), (), 0, 0),
        Call("triton.kernel", (), (), (), 0, 0),
    ):
        assert Bench(2**21).seconds(call, state) is None


def test_operands_that_share_a_storage_share_it_when_run():
    seen = []
    alone = Bench(2**21)
    x = Operand((4,), (1,), "float32", 5)
    made = Call("aten.mul.Tensor", (x, x), (), (), 0, 0)
    args, _, _ = alone._filled(torch.ops.aten.mul.Tensor, made, {}, {}, {5: HOT})
    seen.append(args[0].data_ptr() == args[1].data_ptr())
    args, _, _ = alone._filled(
        torch.ops.aten.mul.Tensor, made._replace(args=(x, x._replace(storage=6))), {}, {}, {5: HOT, 6: FAR}
    )
    seen.append(args[0].data_ptr() == args[1].data_ptr())
    assert seen == [True, False]


def test_the_clock_for_one_thread_is_its_own():
    assert clock.name() == "cpu"
    seconds, spread = clock.median(lambda: sum(range(1000)), budget=1e-4)
    assert seconds > 0
    assert spread >= 0


# ---- --on local


SMALL = ("step", "mlp:H=32,D=16", "--batch-size", "4", "--on", "local")


def test_without_a_calibration_local_is_an_error_that_names_the_way(capsys):
    code, _, err = ask(capsys, *SMALL)
    assert code == 3
    assert "bursar bench" in err
    code, _, err = ask(capsys, *SMALL, "--measure")
    assert code == 3


def test_on_local_a_step_has_seconds_a_peak_and_an_answer(capsys, kept):
    code, out, _ = ask(capsys, *SMALL, "--json")
    assert code == 0
    answer = json.loads(out)
    time = answer["time"]
    assert time["basis"] == "calibrated"
    assert time["lower_seconds"] < time["seconds"] < time["upper_seconds"]
    assert sum(time["bound_by"].values()) == pytest.approx(time["seconds"])
    assert answer["fits"] is True
    assert answer["hardware"] == {"name": "local", "count": 1}
    assert any("best product measured" in a for a in answer["assumptions"])
    page = ask(capsys, *SMALL)[1]
    assert "calibrated" in page


def test_an_op_is_benchmarked_once_and_remembered(capsys, kept, monkeypatch):
    ran = []
    plain = Bench.seconds
    monkeypatch.setattr(
        Bench, "seconds", lambda self, call, state, **k: ran.append(call.op) or plain(self, call, state, **k)
    )
    assert ask(capsys, *SMALL, "--no-benchmark")[0] == 0
    assert ran == []
    assert ask(capsys, *SMALL)[0] == 0
    first = len(ran)
    assert first > 10
    assert len(store.remembered(kept)) == first
    assert ask(capsys, *SMALL)[0] == 0
    assert len(ran) == first


def test_past_its_budget_the_rest_stays_with_the_curves(kept):
    step = bursar.step(torch.nn.Linear(4, 4), torch.ones(2, 4), on="local")
    assert bench.complete(step, kept, budget_seconds=-1.0) == {}
    assert len(bench.complete(step, kept)) == len(
        {signature(p.call, p.state) for p in placed(step, kept.machine.cache_bytes)}
    )


def test_a_ledger_prices_itself_on_local(kept):
    step = bursar.step(torch.nn.Linear(4, 4), torch.ones(2, 4), on="local")
    assert step.on("local").seconds == pytest.approx(pricing.price(step, kept).forecast.seconds)
    torch.set_num_threads(2)
    with pytest.raises(NotCalibrated, match="threads"):
        step.on("local")
    torch.set_num_threads(1)


# ---- both books


def test_the_two_books_have_seconds_by_part_and_are_remembered(capsys, kept, monkeypatch):
    from bursar.meter import measured as metered

    monkeypatch.setattr(metered, "BUDGET_SECONDS", 0.0)
    monkeypatch.setattr(metered, "_busy", lambda *a: "")
    code, out, _ = ask(capsys, *SMALL, "--measure", "--json")
    answer = json.loads(out)
    line = next(x for x in answer["lines"] if x["what"] == "seconds")
    assert code == int(not answer["balances"])
    assert line["tolerance"] >= 0.25
    for parts in (answer["by_kind"], answer["by_phase"], answer["by_module"]):
        assert math.fsum(p["forecast_seconds"] for p in parts) == pytest.approx(line["predicted"])
        assert math.fsum(p["measured_seconds"] for p in parts) == pytest.approx(line["measured"])
        differences = [abs(p["forecast_seconds"] - p["measured_seconds"]) for p in parts]
        assert differences == sorted(differences, reverse=True)
    (one,) = store.past(kept)
    assert (one["forecast"], one["measured"]) == (line["predicted"], line["measured"])
    assert "past steps measured here" in ask(capsys, *SMALL)[1]


def test_a_busy_machine_is_not_judged_and_teaches_nothing(capsys, kept, monkeypatch):
    from bursar.meter import measured as metered

    monkeypatch.setattr(metered, "BUDGET_SECONDS", 0.0)
    monkeypatch.setattr(metered, "_busy", lambda *a: "the machine was busy")
    code, out, _ = ask(capsys, *SMALL, "--measure")
    assert code == 0
    assert "not judged" in out
    assert store.past(kept) == []


# ---- the command


def test_the_command_measures_keeps_and_shows(capsys, monkeypatch):
    monkeypatch.setattr(bench, "QUICK", TINY)
    code, out, err = ask(capsys, "bench", "--quick", "--json")
    assert code == 0
    assert "measuring products in fp32" in err
    answer = json.loads(out)
    assert answer["best_flops_per_s"]["fp32"] > 0
    assert answer["machine"]["threads"] == 1
    assert answer["mfu"] is None or torch.cuda.is_available()
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = ask(capsys, "bench", "--show")
    assert code == 0
    assert "█" in out
    assert max(map(len, out.splitlines())) <= 80
    assert json.loads(ask(capsys, "bench", "--show", "--json")[1]) == {**answer}


def test_show_without_a_calibration_is_an_error(capsys):
    code, _, err = ask(capsys, "bench", "--show")
    assert code == 3
    assert "bursar bench" in err


def test_the_calls_of_the_named_ops_are_all_known_to_torch():
    for _, made in grids.named(16, "fp32"):
        op = torch.ops
        for part in made.op.split("."):
            op = getattr(op, part)
        assert op is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: the GPU's bench is written and not run")
def test_cuda_is_measured():
    from bursar.bench import cuda

    assert cuda.matmul("bf16", (512,))["NN"][0][-1] > 0
    assert cuda.launch(20)["graph_kernel"] < cuda.launch(20)["kernel"]


def test_a_clock_that_goes_back_is_left_out_and_one_that_stands_is_refused():
    from bursar.meter.measured import _timed

    readings = iter([0.0, 1.0, 1.0, 0.5, 2.0, 2.0, *(float(x) for n in range(3, 40) for x in (n, n + 0.5))])
    found = _timed(lambda: None, torch.device("cpu"), clock=lambda: next(readings))
    assert found.dropped == 2
    assert found.walls[0] == 1.0
    assert set(found.walls[1:]) == {0.5}
    with pytest.raises(NoAnswer, match="clock"):
        _timed(lambda: None, torch.device("cpu"), clock=lambda: 1.0)
