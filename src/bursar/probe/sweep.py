"""A model by name: made, probed, and probed again at other depths."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bursar import architecture
from bursar.errors import BadInput
from bursar.probe.measure import check_size, compare, remarks_of, watching
from bursar.probe.schemes import scheme
from bursar.report.probe import Depth, Probe
from bursar.workload.resolve import loss_of_output, parameters, resolve

SEQ_LEN, SEQUENCES = 128, 2  # enough independent rows, and a second or two on a CPU
SAMPLES = 64  # of a model without a sequence: Cruncher's own 2 tell little
IMAGES = ("resnet50",)  # keep their preset's batch
MAX_DEPTH = 1024
NARROW = {"mlp": 512}  # H in a sweep: its own 2048 is 530 million weights over 1..64


def probe_named(
    model: str, init: str | None, batch_size: int | None, seq_len: int | None, lr: float, seed: int
) -> tuple[Probe, ...]:
    """The probe of the model so named, and after it, with ``init``, that of the re-initialised one.

    Raises what `workload.resolve` raises, BadInput for a model too large, UnknownName for ``init``.
    """
    if init is not None:
        scheme(init)
    name = model.split(":")[0]
    if _has_sequence(model):
        batch_size = SEQUENCES if batch_size is None else batch_size
        seq_len = _shorter(model) if seq_len is None else seq_len
    elif name in architecture.known_models() and name not in IMAGES and batch_size is None:
        batch_size = SAMPLES
    said: list[tuple[Tensor, str]] = []
    with torch.random.fork_rng(devices=[]), watching(said):
        torch.manual_seed(seed)
        work = resolve(model, batch_size, seq_len)
        if name in architecture.known_models():
            check_size(parameters(work), work.name)  # before it takes the memory
            torch.manual_seed(seed)
        module, batch = work.make()
    remarks = remarks_of(module, said)
    found = compare(
        module,
        batch,
        loss=None if work.loss is loss_of_output else work.loss,
        init=init,
        name=work.name,
        lr=lr,
        seed=seed,
        remarks=remarks,
        keep=False,
    )
    return tuple(replace(p, assumptions=(*p.assumptions, *work.assumptions)) for p in found)


def over_depth(
    model: str,
    depths: Sequence[int],
    init: str | None,
    batch_size: int | None,
    seq_len: int | None,
    lr: float,
    seed: int,
) -> tuple[Probe, list[Depth]]:
    """The probe at the last of ``depths``, and a point for each. Raises BadInput for a model without L."""
    points = []
    found: Probe | None = None
    for depth in depths:
        found = probe_named(_at_depth(model, depth), init, batch_size, seq_len, lr, seed)[-1]
        first = next((x.gradient_norm for x in found.layers if x.gradient_norm is not None), None)
        points.append(Depth(depth, found.layers[-1].forward_second_moment, first, found.verdict))
    assert found is not None  # parse_depths gives at least one
    return found, points


def narrowed(model: str) -> str:
    """The model that a sweep takes: narrower than the preset, where no H is asked for. Width changes no second moment.

    >>> narrowed("mlp"), narrowed("mlp:D=64,H=64"), narrowed("gpt2:d=96")
    ('mlp:H=512', 'mlp:D=64,H=64', 'gpt2:d=96')
    """
    name, _, sizes = model.partition(":")
    if name not in NARROW or any(part.startswith("H=") for part in sizes.split(",")):
        return model
    return f"{name}:{','.join([*filter(None, [sizes]), f'H={NARROW[name]}'])}"


def parse_depths(text: str) -> list[int]:
    """``12`` → [12]; ``1..64`` → powers of two between the ends, and the ends. Raises BadInput.

    >>> parse_depths("1..64"), parse_depths("3..20"), parse_depths("12")
    ([1, 2, 4, 8, 16, 32, 64], [3, 4, 8, 16, 20], [12])
    """
    found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text.strip())
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= low <= high <= MAX_DEPTH:
        raise BadInput(f"no depth {text!r}; give one as in 12, or a range as in 1..64, of at most {MAX_DEPTH}")
    powers = [2**k for k in range(high.bit_length()) if low < 2**k < high]
    return sorted({low, *powers, high})


def _at_depth(model: str, depth: int) -> str:
    """The preset's name with L = ``depth``."""
    name, _, sizes = model.partition(":")
    if name not in architecture.known_models():
        raise BadInput(f"--depth changes L of a preset; {model} is none: try mlp:D=64,H=64 or gpt2:d=96")
    shape = architecture.preset(name)
    if isinstance(shape, architecture.Network) and "L" not in shape.sizes:
        raise BadInput(f"{name} has no number of layers L; --depth needs one: mlp, cruncher, or a language model")
    kept = [part for part in sizes.split(",") if part and not part.startswith("L=")]
    return f"{name}:{','.join([f'L={depth}', *kept])}"


def _has_sequence(model: str) -> bool:
    name = model.split(":")[0]
    if name in architecture.known_models():
        return isinstance(architecture.preset(name), architecture.Transformer)
    path = Path(name)
    return path.suffix == ".json" or (path / "config.json").is_file()


def _shorter(model: str) -> int:
    """128, or the preset's longest sequence."""
    name = model.split(":")[0]
    if name not in architecture.known_models():
        return SEQ_LEN
    shape = architecture.preset(model)
    return min(SEQ_LEN, shape.max_seq_len) if isinstance(shape, architecture.Transformer) else SEQ_LEN
