"""Live bytes: the CPU allocator's own record, exact references, the seven classes, and the notes' hand count."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bursar.memory import CLASSES
from bursar.trace import Session, tracing
from bursar.workload import presets
from reference_models import CASES, Llama, build

GiB = 2**30


@functools.cache
def traced(name):
    """The ledger of a case's second step."""
    with tracing(on="cpu") as t:
        case = build(name)
        case.step()
        case.step()
    return t.ledger


def n_bytes(tensors):
    """Bytes of the distinct storages behind ``tensors``."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On a busy machine threads that wait for each other spin: one costs a third of the CPU time of two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def measured_peak(name):
    """The same step run for real: what stood before it, and the allocator's record of what came and went in it."""
    torch.manual_seed(0)
    case = build(name)
    case.step()  # makes the optimizer's state
    parameters = list(case.model.parameters())
    state = [v for s in case.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    before = n_bytes([*parameters, *case.model.buffers(), *(p.grad for p in parameters), *state, case.inputs,
                      case.targets])  # fmt: skip
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        case.step()
    events = [(e.start_ns(), e.nbytes()) for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [change for _, change in sorted(events, key=lambda event: event[0])]
    return before + max(0, *np.cumsum(changes))


@pytest.mark.parametrize("name", CASES)
def test_the_peak_is_the_cpu_allocators_own_within_a_thousandth(name):
    assert traced(name).memory.peak_bytes == pytest.approx(measured_peak(name), rel=1e-3)


def test_without_the_scratch_of_convolutions_the_peak_would_be_too_low():
    with tracing(on="cpu", scratch="none") as t:
        case = build("conv/adamw/fp32")
        case.step()
        case.step()
    assert t.ledger.memory.peak_bytes < 0.97 * traced("conv/adamw/fp32").memory.peak_bytes


def test_the_reference_steps_peak_at_the_recorded_bytes():
    assert traced("gpt/adamw/fp32").memory.peak_bytes == 123_793_624
    assert traced("gpt/adamw/accum2").memory.peak_bytes == 137_742_556


# ---- Llama-3 8B, on the accelerator


@functools.cache
def llama_8b(recompute):
    """bf16 throughout, one sequence of 8192, AdamW: the second step."""
    session = Session(None)
    with session.open(), torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model, tokens = Llama(recompute=recompute), torch.randint(0, 128256, (1, 8192))
        finally:
            torch.set_default_dtype(torch.float32)
        optimizer = torch.optim.AdamW(model.parameters())
        for step in range(2):
            if step:
                session.mark()
            model(tokens, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
    return session.ledger


def test_llama_8b_holds_its_weights_and_two_moments_between_steps():
    ledger = llama_8b(False)
    between = ledger.memory.between_steps
    assert ledger.model.parameters == 8_030_261_248
    assert between["parameters"] == 2 * 8_030_261_248
    assert between["optimizer_state"] == 2 * 2 * 8_030_261_248
    assert f"{sum(between.values()) / GiB:.3f}" == "44.873"
    assert sum(ledger.memory.base.values()) == sum(between.values())  # a step ends where it began


def test_llama_8b_peaks_at_93_904_gib_and_under_full_recomputation_at_74_788():
    assert f"{llama_8b(False).memory.peak_bytes / GiB:.3f}" == "93.904"
    assert f"{llama_8b(True).memory.peak_bytes / GiB:.3f}" == "74.788"  # where the foreach optimizer peaks


# ---- classes


@pytest.mark.parametrize("name", ["gpt/adamw/fp32", "gpt/adamw/ckpt", "conv/adamw/fp32", "mlp/adamw/zero_grad_keep"])
def test_the_classes_partition_the_live_bytes_at_every_event(name):
    memory = traced(name).memory
    live = sum(memory.base.values()) + np.cumsum(memory.event_deltas)
    assert (sum(memory.timeline[c] for c in CLASSES) == live).all()
    assert all((memory.timeline[c] >= 0).all() for c in CLASSES)
    assert sum(memory.at_peak.values()) == memory.peak_bytes == live.max()
    assert sum(h.n_bytes for h in memory.holdings) == memory.peak_bytes
    assert sum(memory.between_steps.values()) == live[-1]


def test_a_class_dropped_from_the_sum_would_be_seen():
    memory = traced("gpt/adamw/fp32").memory
    assert sum(memory.at_peak[c] for c in CLASSES if c != "activations") < memory.peak_bytes


@pytest.mark.parametrize(("optimizer", "tensors"), [("sgd", 0), ("sgdm", 1), ("adagrad", 1), ("adamw", 2)])
def test_between_steps_stand_parameters_and_the_optimizers_tensors(optimizer, tensors):
    between = traced(f"mlp/{optimizer}/fp32").memory.between_steps
    weights = 512 * 2048 + 2048 + 4 * (2048 * 2048 + 2048) + 2048 * 128 + 128
    counters = 12 * 4 * (optimizer in ("adagrad", "adamw"))  # one fp32 step count for each of the twelve tensors
    assert between["parameters"] == 4 * weights
    assert between["optimizer_state"] == tensors * 4 * weights + counters
    assert between["inputs"] == 4 * 256 * (512 + 128)
    assert between["gradients"] == between["activations"] == between["buffers"] == 0


def test_gradients_that_are_zeroed_and_not_freed_stand_between_steps():
    kept, freed = (traced(f"mlp/adamw/{name}").memory for name in ("zero_grad_keep", "fp32"))
    assert kept.between_steps["gradients"] == kept.between_steps["parameters"] > 0
    assert freed.between_steps["gradients"] == 0


def test_batch_norm_keeps_two_vectors_and_a_count_as_buffers():
    channels = 64 + 64 + 128 + 128 + 256
    assert traced("conv/adamw/fp32").memory.between_steps["buffers"] == 2 * 4 * channels + 5 * 8


def test_what_dies_after_the_block_is_no_part_of_the_step():
    def step():
        with tracing() as t:
            model = nn.Linear(8, 8).cuda()
            optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
            model(torch.randn(2, 8, device="cuda")).sum().backward()
            optimizer.step()
            assert model is not None
        return t.ledger  # model and optimizer are freed here

    between = step().memory.between_steps
    assert between["parameters"] == between["gradients"] == between["optimizer_state"] == 4 * (64 + 8)


def test_a_storage_resized_in_place_is_followed():
    with tracing(on="cpu") as t:
        x = torch.zeros(100)
        x.untyped_storage().resize_(0)
        y = torch.zeros(10)
        assert y is not None
    assert t.ledger.memory.peak_bytes == 400
    assert sum(t.ledger.memory.between_steps.values()) == 40


# ---- the notes' Cruncher: D 4, two layers and a head, batch 2


def cruncher(optimizer):
    with tracing(on="cpu") as t:
        preset = presets.build("cruncher")
        model, batch = preset.make_model(), preset.make_batch(2, None)
        step = optimizer(model.parameters())
        preset.loss(model, batch).backward()
        step.step()
    return t.ledger


def test_autograd_keeps_eighteen_elements_of_cruncher():
    after_forward = cruncher(torch.optim.SGD).memory.after_forward
    assert after_forward["activations"] == 4 * (2 * 4 + 2 * 4 + 2)  # two hidden outputs, and the output for the loss
    assert after_forward["inputs"] == 4 * (2 * 4 + 2)  # x is kept too, but it is the batch's own


def test_the_notes_count_496_bytes_for_cruncher_with_adagrad():
    book = cruncher(torch.optim.Adagrad).memory.textbook
    weights = 4 * (2 * 4 * 4 + 4 * 1)
    assert (book.parameters, book.gradients, book.optimizer_state) == (weights, weights, weights) == (144,) * 3
    assert book.activations == 4 * (2 * 4 + 2 * 4) == 64
    assert book.total == 496


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_keeps_for_its_second_forward_is_an_activation(reentrant):
    with tracing() as t:
        layers = [torch.nn.Linear(64, 64, device="cuda") for _ in range(4)]
        x = torch.randn(8, 64, device="cuda", requires_grad=True)
        for _ in range(2):
            h = x
            for layer in layers:
                h = torch.utils.checkpoint.checkpoint(
                    lambda z, layer=layer: layer(z).relu(), h, use_reentrant=reentrant
                )
            h.sum().backward()
    kept = t.ledger.memory.saved_activations
    between_layers = 3 * 8 * 64 * 4  # the first layer's input is the batch
    inside_one = 8 * 64 * 4  # what relu saves, made again one layer at a time
    assert between_layers <= kept <= between_layers + 2 * inside_one


def test_two_gradients_of_one_weight_are_summed_in_place_as_in_a_real_run():
    """The engine adds the second to the first; into a fake tensor it would not, one gradient of 4 MB too many."""

    def step():
        weight = nn.Parameter(torch.full((1000, 1000), 1e-3))
        x = torch.ones(8, 1000)
        return weight, x, lambda: (torch.relu(x @ weight) @ weight).sum().backward()

    with tracing(on="cpu") as t:
        weight, x, run = step()
        run()
    weight, x, run = step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [(e.start_ns(), e.nbytes()) for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [change for _, change in sorted(events, key=lambda event: event[0])]
    real = n_bytes([weight, x]) + max(0, *np.cumsum(changes))
    assert t.ledger.memory.peak_bytes == pytest.approx(real, rel=1e-3)
    assert real < 13_000_000  # the weight and two gradients of 4 MB; with their sum elsewhere it would be 16
