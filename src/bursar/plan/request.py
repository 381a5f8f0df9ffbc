"""A request as the command line has it, to what is searched: numbers read, defaults taken, mistakes named."""

from __future__ import annotations

from typing import Final

from bursar.errors import BadInput, UnknownName
from bursar.frameworks import framework as framework_row
from bursar.hardware import Cluster, accelerator, accelerators, cluster
from bursar.jobs import Decoder
from bursar.plan.model import read
from bursar.plan.search import GIVEN, RECOMPUTE, Question, counts
from bursar.units import parse_count, parse_rate

BATCH_TOKENS: Final = 4_000_000  # where nobody says: Llama 3's first batch (Dubey et al. 2024, 3.4.1)
_MOST_GPUS: Final = 1_000_000


def question_of(
    model: str,
    *,
    on: str,
    gpus: str | None = None,
    tokens: str | None = None,
    batch_tokens: str | None = None,
    batch: str | None = None,
    seq_len: str | None = None,
    days: float | None = None,
    budget: str | None = None,
    usd_per_gpu_hour: float | None = None,
    layout: str | None = None,
    precision: str = "bf16",
    recompute: str = "any",
    schedule: str = "1f1b,interleaved",
    attention: str = "flash",
    optimizer: str = "adamw",
    framework: str = "megatron-bridge",
    compiled: bool = False,
    node: int | None = None,
    network: str | None = None,
    top: int = 10,
) -> tuple[Question, list[Cluster]]:
    """The question and the clusters that compete. Raises BadInput or UnknownName for what cannot be meant."""
    if top < 1:
        raise BadInput(f"--top is {top}; give 1 or more")
    shape, S = model_of(model, seq_len, None)
    framework_row(framework)
    if batch is not None and batch_tokens is not None:
        raise BadInput("the batch is given twice, in sequences and in tokens; drop one")
    if batch is not None:
        sequences: float = _count("batch", batch)
    else:
        asked = BATCH_TOKENS if batch_tokens is None else _count("batch_tokens", batch_tokens)
        sequences = asked / S
        if sequences < 1:
            raise BadInput(
                f"a batch of {asked} tokens is less than one sequence of {S}; give --batch-tokens {S} or more"
            )
    notes: tuple[str, ...] = ()
    if not batch and not batch_tokens:
        notes += (f"{BATCH_TOKENS:,} tokens a step, as no batch was given",)
    notes += () if seq_len else (f"sequences of {S} tokens, the model's longest, as none was given",)
    clusters = clusters_of(on, gpus, node, network)
    precisions = tuple(filter(None, (p.strip() for p in precision.split(","))))
    question = Question(
        shape, S, sequences, None if tokens is None else float(_count("tokens", tokens)),
        precisions=precisions,
        schedules=tuple(filter(None, (s.strip() for s in schedule.split(",")))),
        recompute=_recompute(recompute),
        attention=attention, optimizer=optimizer, framework=framework, compiled=compiled,
        fixed=layout_of(layout, clusters[0].count if len(clusters) == 1 else None),
        days=days,
        budget_usd=None if budget is None else float(_count("budget", budget.removeprefix("$"))),
        usd_per_gpu_hour=usd_per_gpu_hour,
        notes=notes,
    )  # fmt: skip
    if (days is not None or budget is not None) and tokens is None:
        raise BadInput("days and a budget are of a whole run: give its --tokens")
    for where in clusters:
        for name in precisions:
            dtype = {"mxfp8": "fp8", "nvfp4": "fp4"}.get(name, name)
            if dtype in ("fp8", "fp4"):
                where.accelerator.peak(dtype)  # an error that names what the device has
    return question, clusters


def model_of(text: str, seq_len: str | int | None, most: int | None) -> tuple[Decoder, int]:
    """The decoder that ``text`` names and the tokens of a sequence: as asked, or its longest up to ``most``."""
    shape, longest = read(text)
    S = min(longest, most or longest) if seq_len is None else _count("seq_len", str(seq_len))
    if shape.learned_positions and shape.learned_positions < S:
        raise BadInput(
            f"{shape.name} has {shape.learned_positions} positions and a sequence of {S} needs more; give --seq-len "
            f"{shape.learned_positions} or less"
        )
    return shape, S


def device_of(on: str) -> Cluster:
    """The one device, or the few, that ``--on`` names."""
    found = clusters_of(on, None)
    if len(found) > 1:
        raise BadInput(f"levers are pulled on one kind of device; {on} names {len(found)}")
    return found[0]


def clusters_of(on: str, gpus: str | None, node: int | None = None, network: str | None = None) -> list[Cluster]:
    """What ``--on`` and ``--gpus`` name: one cluster, or several that compete."""
    names = [name.strip() for name in on.split(",") if name.strip()]
    if not names:
        raise BadInput("--on names no accelerator; give one, such as 1024xh100-sxm")
    rows = {row.name for row in accelerators()}
    counted = {name: cluster(name) for name in names if name.lower() not in rows}
    made: list[Cluster] = []
    if node is not None and not 1 <= node <= 1024:
        raise BadInput(f"a node of {node} accelerators cannot be; give 1 to 1024")
    speed = None if network is None else parse_rate(network, "bytes")
    if speed is not None and speed <= 0:
        raise BadInput(f"a network of {network} sends nothing; give a rate, such as 400GB/s")
    for name in names:
        if name in counted:
            if gpus is not None:
                raise BadInput(f"the number of accelerators is given twice: by {name} and by --gpus {gpus}; drop one")
            made.append(Cluster(counted[name].accelerator, counted[name].count, node, speed))
            continue
        device = accelerator(name)
        low, high = (1, 1) if gpus is None else _range(gpus)
        size = node or device.node_size or 8
        made += [Cluster(device, n, node, speed) for n in counts(low, high, size)]
    return made


def layout_of(text: str | None, n_ranks: int | None) -> dict[str, int]:
    """``tp=8,pp=4`` as the axes that are fixed. Raises for an axis that is none, and for ranks that do not divide."""
    fixed: dict[str, int] = {}
    for part in filter(None, (text or "").split(",")):
        name, equals, value = part.partition("=")
        name = {"zero": "zero_stage", "sp": "sequence_parallel", "vpp": "virtual_stages"}.get(
            name.strip(), name.strip()
        )
        if name not in GIVEN:
            raise UnknownName("axis of a layout", name, GIVEN)
        if not equals:
            raise BadInput(f"--layout {part}: give a number, such as {name}=8")
        n = parse_count(value)
        least = 0 if name in ("zero_stage", "sequence_parallel") else 1
        most = {"zero_stage": 3, "sequence_parallel": 1}.get(name, _MOST_GPUS)
        if not least <= n <= most:
            raise BadInput(f"--layout {name}={n} cannot be; give {least} to {most}")
        fixed[name] = n
    if n_ranks is not None:
        product = 1
        for name in ("tp", "pp", "cp", "dp"):
            if name in fixed:
                product *= fixed[name]
                if n_ranks % product:
                    near = sorted(
                        (d for d in range(1, n_ranks + 1) if n_ranks % d == 0), key=lambda d: abs(d - product)
                    )
                    raise BadInput(
                        f"{text} needs a multiple of {product} accelerators, and there are {n_ranks}: "
                        f"{product} does not divide it; nearest that do: {' and '.join(map(str, sorted(near[:2])))}"
                    )
    return fixed


def _recompute(text: str) -> tuple[tuple[str, int], ...]:
    if text.strip() == "any":
        return RECOMPUTE
    made = []
    for word in filter(None, (w.strip() for w in text.split(","))):
        name, _, every = word.partition(":")
        if name == "every_k":
            k = parse_count(every or "1")
            if k < 1:
                raise BadInput("recompute every_k:0 recomputes nothing; give 1 or more, or none")
            made.append(("full", k))
        elif name in ("none", "selective", "full"):
            made.append((name, 1))
        else:
            raise UnknownName("recompute", word, ("any", "none", "selective", "full", "every_k:2"))
    return tuple(made)


def _range(text: str) -> tuple[int, int]:
    low, dots, high = text.partition("..")
    first = _count("gpus", low)
    last = _count("gpus", high) if dots else first
    if last > _MOST_GPUS:
        raise BadInput(f"{last} accelerators are more than there are; give {_MOST_GPUS} or less")
    if first > last:
        raise BadInput(f"--gpus {text} is empty; give the smaller number first")
    return first, last


def _count(name: str, text: str) -> int:
    n = parse_count(text)
    if n < 1:
        raise BadInput(f"{name} is {text}; give 1 or more")
    return n
