"""This machine's calibration: what it is made of, how it is kept, and what a step costs by it."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import zlib

import pytest

from bursar import calibration, pricing, store
from bursar.calibration import Calibration
from bursar.context import FAR, HOT, NEAR, Placed, State, placed, signature
from bursar.errors import BadInput, NotCalibrated
from bursar.hardware import accelerator
from bursar.ledger import Call, Ledger, Operand, Row
from bursar.machine import Machine, usable_cores
from bursar.memory import Storage
from bursar.rules import Work

MIB = 2**20
HERE = Machine("host", "A CPU", 2, 1, "2.13.0", "", 16 * 2**30, 2 * MIB, "3.11")


def cube(rate):
    """Products of 64, 256 and 1024 a side at ``rate`` FLOP/s."""
    sizes = (64, 256, 1024)
    return tuple((m, n, k, 2 * m * n * k / rate) for m in sizes for n in sizes for k in sizes)


def known(**changes):
    """100 GFLOP/s for NN, 50 for NT; 2 ns an element hot and 4 far; 10 GB/s; a floor of 1 µs."""
    line = {"hot": ((1000, 2e-6), (1000000, 2e-3)), "cold": ((1000, 4e-6), (1000000, 4e-3))}
    given = {
        "date": "2026-11-29T00:00:00+00:00", "machine": HERE, "clock": "cpu", "seconds": 40.0,
        "canary": {"matmul": 1e-3, "memory": 1e-3}, "drift": 1.0, "spread": 0.02,
        "matmul": {"fp32": {"NN": cube(100e9), "NT": cube(50e9)}},
        "attention": {"fp32": {"forward": ((64, 20e9), (1024, 80e9)), "backward": ((64, 20e9), (1024, 40e9))}},
        "convolution": {"forward": 0.5, "backward": 0.5}, "ops": {"fp32": {"relu": line}},
        "bandwidth": {"read": ((2**14, 10e9),), "write": ((2**14, 10e9),), "copy": ((2**14, 10e9), (2**26, 10e9))},
        "overhead": {"floor": 1e-6, "call": 2e-6, "module": 3e-6, "view": 1e-6, "backward": 4e-6, "inner": -5e-7,
                     "optimizer": 1e-6, "forward_cold": 8e-6, "backward_cold": 6e-6, "optimizer_cold": 0.0},
        **changes,
    }  # fmt: skip
    return Calibration(**given)


def tensor(*shape, storage=0, transposed=False):
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return Operand(shape, (1, shape[0]) if transposed else stride, "float32", storage)


def ledger(*ops):
    """A ledger of (phase, kind, Call, Work)."""
    storages = [Storage(i, 4 * 10**6, 0) for i in range(10)]
    rows = [
        Row(phase, kind, call.op.rpartition(".")[0], "", "fp32", (), (), work, 0) for phase, kind, call, work in ops
    ]
    return Ledger(rows, storages, [], device="cpu", calls=tuple(call for _, _, call, _ in ops))


def call(op, *args, out=(), site=0, views=0):
    return Call(op, args, (), out, site, views)


def at(made, *, inputs=(FAR, FAR), phase="forward", new_site=True, entered=False, stream=0.0, cold=1.0):
    return Placed(made, State(inputs, FAR, NEAR), phase, new_site, entered, stream, cold)


# ---- an op's seconds, by hand


@pytest.mark.parametrize(("transposed", "rate"), [(False, 100e9), (True, 50e9)])
def test_a_product_takes_its_flops_at_the_rate_of_its_layout(transposed, rate):
    made = call("aten.mm.default", tensor(512, 512), tensor(512, 512, transposed=transposed))
    row = ledger(("forward", "matmul", made, Work(2 * 512**3, 8 * 512**2, 4 * 512**2))).rows[0]
    assert pricing.Curves(known()).seconds(row, at(made)) == pytest.approx(2 * 512**3 / rate)


def test_an_op_by_name_is_read_off_its_curve_between_hot_and_far():
    made = call("aten.relu.default", tensor(100, 100), out=(tensor(100, 100),))
    row = ledger(("forward", "elementwise", made, Work(10**4, 4 * 10**4, 4 * 10**4))).rows[0]
    curves = pricing.Curves(known())
    for cold, each in ((0.0, 2e-9), (1.0, 4e-9), (0.5, 3e-9)):
        assert curves.seconds(row, at(made, inputs=(FAR,), cold=cold)) == pytest.approx(each * 10**4)


def test_a_convolution_is_the_product_of_its_columns_times_what_convolutions_reach():
    x, w, y = tensor(2, 16, 32, 32), tensor(64, 16, 3, 3), tensor(2, 64, 32, 32)
    made = call("aten.convolution.default", x, w, None, out=(y,))
    flops = 2 * (2 * 32 * 32) * 64 * (16 * 9)
    row = ledger(("forward", "conv", made, Work(flops, 1, 1))).rows[0]
    assert pricing.Curves(known()).seconds(row, at(made)) == pytest.approx(flops / 100e9 / 0.5)


def test_attention_goes_by_its_length():
    q = tensor(1, 4, 256, 64)  # halfway between 64 and 1024 tokens, by logarithms: sqrt(20 · 80) = 40 GFLOP/s
    made = call("aten._scaled_dot_product_flash_attention_for_cpu.default", q, q, q)
    row = ledger(("forward", "attention", made, Work(10**9, 1, 1))).rows[0]
    assert pricing.Curves(known()).seconds(row, at(made)) == pytest.approx(10**9 / 40e9)


def test_an_op_without_a_curve_goes_by_its_bytes_above_the_floor():
    made = call("aten.erfinv.default", tensor(1000, 1000), out=(tensor(1000, 1000),))
    row = ledger(("forward", "elementwise", made, Work(10**6, 4 * 10**6, 4 * 10**6))).rows[0]
    assert pricing.Curves(known()).seconds(row, at(made)) == pytest.approx(1e-6 + 8e6 / 10e9)


def test_the_place_of_an_op_adds_calls_views_modules_and_cold_code():
    curves = pricing.Curves(known())
    made = call("aten.relu.default", tensor(8), views=2)
    assert curves.around(at(made)) == pytest.approx(2e-6 + 2 * 1e-6)
    assert curves.around(at(made, entered=True, stream=0.5)) == pytest.approx(2e-6 + 2e-6 + 3e-6 + 4e-6)
    assert curves.around(at(made, new_site=False, stream=1.0)) == pytest.approx(-5e-7 + 1e-6)
    assert curves.around(at(made, phase="backward", stream=1.0)) == pytest.approx(4e-6 + 1e-6 + 6e-6)
    assert curves.around(at(made, phase="optimizer")) == pytest.approx(1e-6 + 2e-6)


# ---- a step


def two_ops():
    a, b = tensor(512, 512, storage=1), tensor(512, 512, storage=2)
    return ledger(
        ("forward", "matmul", call("aten.mm.default", a, b, out=(tensor(512, 512, storage=3),), site=1),
         Work(2 * 512**3, 2 * MIB, MIB)),
        ("backward", "elementwise", call("aten.relu.default", tensor(512, 512, storage=3),
                                         out=(tensor(512, 512, storage=4),), site=2), Work(512**2, MIB, MIB)),
    )  # fmt: skip


def test_a_step_is_the_sum_of_its_rows_and_bound_by_adds_up():
    found = pricing.price(two_ops(), known())
    assert found.forecast.seconds == pytest.approx(sum(found.seconds))
    assert sum(found.forecast.bound_by.values()) == pytest.approx(found.forecast.seconds)
    assert found.forecast.basis == "calibrated"
    assert found.forecast.row_seconds == found.seconds
    assert found.benchmarked == 0
    assert found.forecast.cluster.name == "local"
    # MFU is against the best product measured, 100 GFLOP/s
    assert found.forecast.mfu == pytest.approx(2 * 512**3 / 100e9 / found.forecast.seconds)


def test_what_was_benchmarked_takes_the_place_of_the_curve():
    step = two_ops()
    place = placed(step, HERE.cache_bytes)[0]
    seconds = {signature(place.call, place.state): 1.0}
    plain, better = pricing.price(step, known()), pricing.price(step, known(), seconds)
    assert better.seconds[0] == pytest.approx(1.0 + 2e-6 + 8e-6)  # the call in Python, and code swept by the row before
    assert better.seconds[1] == plain.seconds[1]
    assert better.benchmarked == pytest.approx(1.0 / better.forecast.seconds)
    assert [p.call.op for p in pricing.wanted(step, known(), seconds)] == ["aten.relu.default"]
    assert [p.call.op for p in pricing.wanted(step, known(), {})] == ["aten.mm.default", "aten.relu.default"]


def test_a_ledger_without_calls_is_refused():
    with pytest.raises(BadInput, match="on='local'"):
        pricing.price(dataclasses.replace(two_ops(), calls=()), known())


def test_the_interval_is_learnt_from_this_machines_own_errors():
    assert pricing.interval([], False) == (0.25, 0)
    past = [{"forecast": 1.0, "measured": math.exp(0.2), "benchmarked": True}] * 12
    spread, learnt = pricing.interval(past, True)
    assert learnt == 12
    assert spread == pytest.approx(math.sqrt((4 * 0.1**2 + 12 * 0.2**2) / 16))
    assert pricing.interval(past, False) == (0.25, 0)  # of the other kind of forecast it says nothing
    narrow = pricing.price(two_ops(), known(), {"x": 1.0}, past[:1] * 0).forecast
    wide = pricing.price(two_ops(), known(), {"x": 1.0}, past).forecast
    assert wide.upper_seconds / wide.seconds == pytest.approx(math.exp(1.2816 * spread))
    assert wide.upper_seconds > narrow.upper_seconds


def test_a_cpu_without_a_peak_for_a_dtype_computes_it_like_fp32():
    assert pricing.device(known()).peak("fp16") == pytest.approx(100e9)
    assert pricing.device(known()).usable_bytes == 16 * 2**30


# ---- where operands are


def test_operands_are_hot_near_or_far_by_the_bytes_moved_since():
    x, y, big = tensor(1000, storage=1), tensor(1000, storage=2), tensor(1000, 1000, storage=3)
    add = call("aten.add.Tensor", x, y)
    step = ledger(
        ("forward", "elementwise", add, Work(1, 1, 1)),
        ("forward", "elementwise", add, Work(1, 1, 1)),
        ("forward", "elementwise", call("aten.relu_.default", big), Work(1, 1, 1)),
        ("forward", "elementwise", add, Work(1, 1, 1)),
    )
    states = [p.state for p in placed(step, 2 * MIB)]
    assert states[1].inputs == (HOT, HOT)  # just used
    assert states[3].inputs == (NEAR, NEAR)  # 4 MB have moved since, over a cache of 2 MiB
    assert states[3].code == NEAR
    assert placed(step, 2**18)[3].state.inputs == (FAR, FAR)  # of a small core's caches that is many
    assert placed(step, 2 * MIB)[3].stream == 1.0
    assert placed(step, 2 * MIB)[1].stream == pytest.approx(8000 / (2 * MIB))


def test_an_output_is_as_near_as_the_block_freed_last_of_its_size():
    step = two_ops()
    step = dataclasses.replace(
        step,
        storages=[Storage(i, MIB, 0) for i in range(5)],
        events=[(0, 3, MIB), (1, 4, MIB), (1, 4, -MIB)],
    )
    first, _ = placed(step, 2 * MIB)
    assert first.state.output == HOT  # storage 4 was freed at the end of the step before, touched 0 bytes ago
    assert placed(dataclasses.replace(step, events=[]), 2 * MIB)[0].state.output == FAR


def test_a_signature_tells_shapes_strides_and_whole_numbers_but_not_step_sizes():
    state = State((HOT,), HOT, HOT)

    def of(*args):
        return signature(call("aten.x.default", *args), state)

    assert of(tensor(2, 3), 0.1) == of(tensor(2, 3, storage=7), 0.2)
    assert of(tensor(2, 3), 1) != of(tensor(2, 3), 2)
    assert of(tensor(2, 3)) != of(tensor(2, 3, transposed=True))
    assert of(tensor(2, storage=1), tensor(2, storage=1)) != of(tensor(2, storage=1), tensor(2, storage=2))
    assert of(tensor(2)) != signature(call("aten.x.default", tensor(2)), State((FAR,), HOT, HOT))


# ---- kept


def test_the_file_says_what_the_record_says():
    assert calibration.loads(calibration.dumps(known())) == known()


def test_a_calibration_torn_at_any_byte_is_refused():
    text = calibration.dumps(known())
    for n in range(0, len(text), 7):
        with pytest.raises(BadInput, match="run `bursar bench` again"):
            calibration.loads(text[:n])


def test_an_edited_calibration_is_refused_and_so_is_another_schema():
    text = calibration.dumps(known())
    with pytest.raises(BadInput, match="checksum"):
        calibration.loads(text.replace("A CPU", "B CPU"))
    body = text.partition("\n")[2].replace("schema = 1", "schema = 99")
    with pytest.raises(BadInput, match="another version"):
        calibration.loads(f'crc32 = "{zlib.crc32(body.encode()):08x}"\n{body}')


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"host": "other"}, "host"),
        ({"cpu": "B CPU"}, "CPU"),
        ({"torch": "2.12.0"}, "torch"),
        ({"threads": 2}, "threads"),
    ],
)
def test_a_calibration_of_another_machine_torch_or_number_of_threads_is_refused(change, says):
    store.save(known())
    assert store.load(HERE) == known()
    with pytest.raises(NotCalibrated, match=rf"does not hold here: {says}.*bursar bench"):
        store.load(dataclasses.replace(HERE, **change))


def test_without_a_calibration_the_way_to_one_is_named():
    with pytest.raises(NotCalibrated, match="run `bursar bench`"):
        store.load(HERE)
    store.folder().mkdir()
    (store.folder() / "calibration.toml").write_bytes(b"\xff\xfe torn")
    with pytest.raises(NotCalibrated, match="not calibrated"):
        store.load(HERE)


def test_what_was_benchmarked_is_remembered_until_the_next_calibration():
    store.save(known())
    store.remember(known(), {"a": 1.0, "b": 2.0})
    store.remember(known(), {"b": 3.0})
    assert store.remembered(known()) == {"a": 1.0, "b": 3.0}
    assert store.remembered(known(machine=dataclasses.replace(HERE, cpu="B CPU"))) == {}
    assert store.remembered(known(date="2027-01-01T00:00:00+00:00")) == {}
    path = store.folder() / "remembered.json"
    path.write_text(path.read_text()[:-5])
    assert store.remembered(known()) == {}
    store.save(known())
    assert not path.exists()


def test_past_errors_outlive_a_calibration_but_not_the_machine():
    store.record(known(), "gpt2", 1.0, 1.1, True)
    store.record(known(), "gpt2", 1.0, 0.0, True)  # no measurement
    store.record(known(), "gpt2", math.nan, 1.0, True)
    later = known(date="2027-01-01T00:00:00+00:00")
    assert store.past(later) == [{"model": "gpt2", "forecast": 1.0, "measured": 1.1, "benchmarked": True}]
    assert store.past(known(machine=dataclasses.replace(HERE, threads=2))) == []


def _writes(n):
    for i in range(10):
        store.remember(known(), {f"{n}-{i}": 1.0})


def test_writers_at_once_lose_nothing():
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_writes, args=(n,)) for n in range(3)]
    for w in writers:
        w.start()
    for w in writers:
        w.join()
    assert len(store.remembered(known())) == 30


def test_a_folder_that_cannot_be_written_costs_no_run(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BURSAR_DATA", str(tmp_path / "file" / "below"))
    store.remember(known(), {"a": 1.0})
    store.record(known(), "m", 1.0, 1.0, True)
    assert store.remembered(known()) == {}


def test_no_measurement_that_is_no_number_gets_into_the_file():
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="no measurement"):
            calibration.dumps(known(seconds=wrong))


def test_a_busy_machine_is_told_by_its_canaries():
    assert known().busy == ""
    assert "busy" in known(drift=1.3).busy
    assert "busy" in known(drift=0.7).busy


def test_threads_are_bounded_by_the_containers_quota():
    assert usable_cores("100000 100000") == 1
    assert usable_cores("150000 100000") == min(2, len(os.sched_getaffinity(0)))
    assert usable_cores("max 100000") == usable_cores("") == len(os.sched_getaffinity(0))


def test_the_json_of_a_calibration_is_strict(tmp_path):
    from bursar.report import bench

    assert json.loads(json.dumps(bench.record(known(), tmp_path), allow_nan=False))["best_flops_per_s"]["fp32"] > 0


def test_on_a_known_accelerator_the_page_says_achieved_over_peak(tmp_path):
    from bursar.report import bench

    card = dataclasses.replace(HERE, device="NVIDIA H100 80GB HBM3")
    found = known(machine=card, matmul={"bf16": {"NN": cube(463.9e12)}, "fp32": {"NN": cube(53.9e12)}})
    over = bench.mfu(found)
    assert over["bf16"] == pytest.approx(463.9 / 989.4)  # the course's own run: 0.469
    assert over["fp32"] == pytest.approx(53.9e12 / accelerator("h100-sxm").peak("fp32"))
    assert bench.mfu(known()) is None
