"""The meter in a live loop: seconds, tokens, MFU that cannot lie, and other people's loops."""

from __future__ import annotations

import os
import signal
import warnings

import pytest
import torch
from torch import nn

import bursar
from bursar.errors import BadInput, UnknownName
from bursar.meter import costs
from bursar.meter.adapters import lightning_callback, trainer_callback
from bursar.meter.costs import Costs, of_model
from bursar.meter.live import Meter

PEAK = 989.4e12  # an H100's bf16


def known(**changes):
    """A step of 2^40 FLOPs in bf16 on 4096 tokens, a quarter of them again for recomputation."""
    flops = 2**40
    given = {"name": "net", "samples": 4, "tokens": 4096, "micro_batches": 1, "model_flops": {"bf16": flops},
             "hardware_flops": {"bf16": flops * 5 // 4}, "peak_bytes": 10**9, **changes}  # fmt: skip
    return Costs(**given)


class Clock:
    """Time that passes when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def run(meter, clock, seconds):
    with meter:
        for s in seconds:
            clock.now += s
            meter.step()


def test_seconds_tokens_and_mfu_are_what_the_clock_and_the_ledger_say():
    clock, said = Clock(), []
    meter = Meter(
        known(), device="h100-sxm", log=lambda numbers, step: said.append((step, numbers)), every=2, clock=clock
    )
    run(meter, clock, [9.0, 0.01, 0.03])  # the first is warm-up
    ((step, numbers),) = said
    assert step == 3
    assert numbers["bursar/step_seconds"] == pytest.approx(0.02)
    assert numbers["bursar/tokens_per_s"] == pytest.approx(4096 / 0.02)
    assert numbers["bursar/mfu"] == pytest.approx(2**40 / PEAK / 0.02)
    assert numbers["bursar/hfu"] == pytest.approx(1.25 * numbers["bursar/mfu"])
    assert numbers["bursar/forecast_peak_bytes"] == 10**9
    assert 0 < numbers["bursar/memory_bytes"] <= numbers["bursar/memory_peak_bytes"]


def test_each_dtype_is_divided_by_its_own_peak():
    clock = Clock()
    mixed = known(model_flops={"bf16": 2**40, "fp32": 2**36}, hardware_flops={"bf16": 2**40, "fp32": 2**36})
    meter = Meter(mixed, device="h100-sxm", log=lambda *a: None, every=1, clock=clock)
    run(meter, clock, [1, 1])
    assert meter.readings[0].mfu == pytest.approx(2**40 / PEAK + 2**36 / 66.9e12, rel=1e-3)


def test_without_a_known_device_there_is_no_mfu_but_a_reason():
    clock = Clock()
    meter = Meter(known(), log=lambda *a: None, every=1, clock=clock)
    run(meter, clock, [1, 1])
    reading = meter.readings[0]
    if not torch.cuda.is_available():
        assert (reading.mfu, reading.hfu) == (None, None)
        assert "no known peak" in reading.why
        assert "bursar/mfu" not in reading.numbers()
        assert reading.why in meter.summary()


def test_a_dtype_the_device_has_no_peak_for_is_refused():
    meter = Meter(known(model_flops={"fp8": 1}, hardware_flops={"fp8": 1}), device="a100-80g-sxm", log=lambda *a: None)
    assert "no MFU" in meter._refused


def test_a_device_that_nobody_knows_is_an_error_at_once():
    with pytest.raises(UnknownName, match="h100"):
        Meter(known(), device="h100")


@pytest.mark.parametrize(
    ("changes", "seconds", "cause"),
    [
        ({}, 1e-4, "smaller than the 4096 tokens"),
        ({"micro_batches": 8}, 3e-4, "once per optimizer step"),
        ({"model_flops": {"fp32": 2**40}, "hardware_flops": {"fp32": 2**40}}, 2e-3, "bf16 or TF32"),
    ],
)
def test_over_100_percent_is_impossible_and_the_cause_is_named(changes, seconds, cause):
    clock = Clock()
    meter = Meter(known(**changes), device="h100-sxm", log=lambda *a: None, every=1, clock=clock)
    run(meter, clock, [1, seconds])
    assert meter.readings[0].mfu is None
    assert "impossible" in meter.readings[0].why
    assert cause in meter.readings[0].why


def test_a_clock_set_back_and_intervals_of_nothing_are_left_out():
    clock = Clock()
    meter = Meter(known(), log=lambda *a: None, every=2, clock=clock)
    run(meter, clock, [1, 0.5, -3.0, 0.0, 0.5])
    assert [r.step_seconds for r in meter.readings] == [0.5]
    assert meter.dropped == 2
    assert "2 intervals" in meter.summary()


def test_waiting_for_data_is_a_share_of_the_step():
    clock = Clock()

    def loader():
        for i in range(4):
            clock.now += 0.3
            yield i

    meter = Meter(None, log=lambda *a: None, every=3, clock=clock)
    with meter:
        for _ in meter.batches(loader()):
            clock.now += 0.7
            meter.step()
    assert meter.readings[0].data_wait_share == pytest.approx(0.3)
    assert "30% waiting for data" in meter.readings[0].line()


def test_an_evaluation_belongs_to_no_step():
    clock = Clock()
    meter = Meter(None, log=lambda *a: None, every=1, clock=clock)
    with meter:
        for evaluates in (False, False, True, False):
            clock.now += 1
            meter.step()
            if evaluates:
                with meter.paused():
                    clock.now += 50
    assert [r.step_seconds for r in meter.readings] == [1, 1]


def test_two_meters_do_not_mind_each_other():
    fast, slow = Clock(), Clock()
    a, b = (Meter(None, log=lambda *a: None, every=1, clock=c) for c in (fast, slow))
    with a, b:
        for _ in range(3):
            fast.now, slow.now = fast.now + 1, slow.now + 5
            a.step()
            b.step()
    assert [r.step_seconds for r in a.readings] == [1, 1]
    assert [r.step_seconds for r in b.readings] == [5, 5]


def test_a_run_that_is_interrupted_prints_its_summary(capsys):
    clock = Clock()

    def interrupted():
        yield from [1, 1, 1, 1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Meter(None, clock=clock), clock, interrupted())
    err = capsys.readouterr().err
    assert "3 steps metered" in err
    assert "no MFU: the meter was given no ledger" in err


def test_a_run_killed_with_sigint_prints_its_summary(capsys):
    clock = Clock()

    def killed():
        yield from [1, 1, 1]
        os.kill(os.getpid(), signal.SIGINT)
        yield from [1] * 1000

    with pytest.raises(KeyboardInterrupt):
        run(Meter(None, clock=clock), clock, killed())
    assert "2 steps metered" in capsys.readouterr().err


def test_only_rank_0_reports_and_tokens_are_the_whole_jobs(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    clock, said = Clock(), []
    meter = Meter(known(), log=lambda *a: said.append(a), every=1, clock=clock)
    run(meter, clock, [1, 2])
    assert said == []
    assert meter.readings[0].tokens_per_s == 4 * 4096 / 2


def test_a_summary_writer_and_a_wrong_logger():
    class Writer:
        def __init__(self):
            self.said = []

        def add_scalar(self, name, value, step):
            self.said.append((name, step))

    clock, writer = Clock(), Writer()
    run(Meter(None, log=writer, every=1, clock=clock), clock, [1, 1])
    assert ("bursar/step_seconds", 2) in writer.said
    with pytest.raises(BadInput, match="cannot log"):
        Meter(None, log=3)
    with pytest.raises(BadInput, match="every=1"):
        Meter(None, every=0)


# ---- costs


class Net(nn.Module):
    def __init__(self, hidden=32):
        super().__init__()
        self.up, self.down = nn.Linear(16, hidden), nn.Linear(hidden, 4)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(costs.platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    return tmp_path


def test_costs_are_the_ledgers_own(cache):
    ledger = bursar.step(Net(), torch.randn(8, 16), precision="bf16-mixed", optimizer="sgd", accumulate=2)
    found = Costs.of(ledger)
    assert sum(found.model_flops.values()) == ledger.flops.model
    assert sum(found.hardware_flops.values()) == ledger.flops.hardware
    assert (found.samples, found.tokens, found.micro_batches) == (16, 16, 2)
    assert found.peak_bytes == ledger.memory.peak_bytes
    eight = Costs.of(bursar.step(Net(), torch.randn(8, 16), on="8xh100-sxm"))
    assert (eight.samples, sum(eight.model_flops.values())) == (8, 2 * 8 * (16 * 32 + 32 * 4) * 3 - 2 * 8 * 16 * 32)


def test_a_model_seen_before_is_not_traced_again(cache, monkeypatch):
    batch = torch.randn(8, 16)
    first = of_model(Net(), batch, precision="bf16")
    monkeypatch.setattr(bursar, "step", lambda *a, **k: pytest.fail("traced again"))
    assert of_model(Net(), batch, precision="bf16") == first
    assert Meter.of(Net(), batch, precision="bf16", meter={"device": "h100-sxm"}).costs == first


@pytest.mark.parametrize("change", ["hidden", "batch", "option", "frozen", "torn"])
def test_another_step_is_traced_anew(cache, change):
    model, batch, options = Net(), torch.randn(8, 16), {"precision": "bf16"}
    of_model(model, batch, **options)
    if change == "torn":
        for kept in costs.folder().iterdir():
            kept.write_bytes(kept.read_bytes()[:20])
    model = Net(64) if change == "hidden" else model
    batch = torch.randn(4, 16) if change == "batch" else batch
    options = {"precision": "fp32"} if change == "option" else options
    if change == "frozen":
        model.up.requires_grad_(False)
    assert of_model(model, batch, **options) == Costs.of(bursar.step(model, batch, **options))


# ---- other people's loops


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        x = torch.full((16,), float(i % 5))
        return {"x": x, "labels": x[:4]}


class WithLoss(Net):
    def forward(self, x, labels=None):
        y = super().forward(x)
        return {"loss": ((y - labels) ** 2).mean(), "logits": y}


def test_transformers_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    logged = []

    class Listener(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(dict(logs))

    meter = Meter(known(), device="h100-sxm", log=lambda *a: None, every=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=5, logging_steps=1,
            report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        callbacks = [trainer_callback(meter), Listener()]
        transformers.Trainer(WithLoss(), arguments, train_dataset=Data(), callbacks=callbacks).train()
    assert sum(r.steps for r in meter.readings) == 4  # five optimizer steps, the first warm-up
    assert any("bursar/step_seconds" in entry for entry in logged)


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import CSVLogger

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = WithLoss()

        def training_step(self, batch, i):
            return self.net(**batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    meter = Meter(known(), device="h100-sxm", log=lambda *a: None, every=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_steps=5, accumulate_grad_batches=2, accelerator="cpu", callbacks=[lightning_callback(meter)],
            logger=CSVLogger(tmp_path), enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(Module(), torch.utils.data.DataLoader(Data(), batch_size=2))
        trainer.logger.save()
    assert sum(r.steps for r in meter.readings) == 4
    assert "bursar/step_seconds" in next(tmp_path.rglob("metrics.csv")).read_text()


def test_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.tracking import GeneralTracker

    class Tracker(GeneralTracker):
        name, requires_logging_directory = "list", False

        def __init__(self):
            super().__init__()
            self.said = []

        @property
        def tracker(self):
            return self

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None, **kwargs):
            self.said.append((step, values))

    tracker = Tracker()
    accelerator = accelerate.Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("run")
    model, optimizer = accelerator.prepare(WithLoss(), torch.optim.SGD(Net().parameters(), lr=0.1))
    with Meter(known(), log=accelerator.log, every=1) as meter:
        for i in range(3):
            accelerator.backward(model(**{k: v[None] for k, v in Data()[i].items()})["loss"])
            optimizer.step()
            meter.step()
    assert [step for step, _ in tracker.said] == [2, 3]
    assert "bursar/step_seconds" in tracker.said[0][1]
