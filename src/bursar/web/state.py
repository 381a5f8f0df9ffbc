"""What an address says: one set-up, or two to compare. Names come from tables and numbers have ranges; no more is read.

The address is the whole state, so a link shares it. What equals the default is left out of it, and what the second
set-up has in common with the first is left out of that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Literal
from urllib.parse import urlencode

from bursar.architecture import known_models, preset
from bursar.errors import BadInput, BursarError
from bursar.frameworks import frameworks
from bursar.hardware import accelerators
from bursar.jobs import PRECISIONS, decoder
from bursar.units import parse_count, write_count

EVERY = "every"  # search every layout, not the usual ones
RECOMPUTE = ("none", "selective", "full", "every_k:2", "every_k:4", "every_k:8")
AUTO = "auto"  # the search decides
SECOND = "b."  # before the names of the second set-up's fields
LONGEST = 40  # letters of one value; the longest name of a table has fewer


@dataclass(frozen=True, slots=True)
class Setup:
    """One set-up: what is trained, where, and how. None is what the search decides, or what the catalogue says."""

    model: str = "llama3-70b"
    layers: int | None = None  # of the model, where they differ from the preset's
    tokens: int = 15 * 10**12
    batch: int = 16 * 10**6
    seq: int = 8192
    gpu: str = "h100-sxm"
    gpus: int = 1024
    price: float | None = None
    precision: str = "bf16"
    optimizer: str = "adamw"
    framework: str = "megatron-bridge"
    attention: str = "flash"
    compiled: str = "no"
    recompute: str | None = None
    micro: int | None = None
    zero: int | None = None
    tp: int | None = None
    pp: int | None = None
    cp: int | None = None
    ep: int | None = None
    sp: int | None = None
    virtual: int | None = None
    group: int | None = None
    search: str = "usual"


@dataclass(frozen=True, slots=True)
class State:
    """What the page shows: a set-up, and a second one beside it or none."""

    first: Setup
    second: Setup | None = None


@dataclass(frozen=True, slots=True)
class Field:
    """One field of the form: its values are ``choices``, or whole numbers (``count``) or numbers in a range."""

    name: str
    label: str
    group: Literal["model", "cluster", "run", "layout", "levers"]
    kind: Literal["choice", "count", "number"]
    choices: tuple[str, ...] = ()
    low: float = 1
    high: float = 1
    auto: str = ""  # how "not said" is called: the search decides, or the catalogue says
    unit: str = ""
    stops: tuple[str, ...] = ()  # values that a slider offers
    help: str = ""


class BadField(BadInput):
    """A field of the address that cannot be meant. ``name`` is the field's, as the address has it."""

    def __init__(self, name: str, message: str) -> None:
        self.name = name
        super().__init__(message)


OPTIMIZERS = ("adamw", "adamw-8bit", "adafactor", "lion", "muon", "momentum", "sgd")
GPUS = tuple("1 2 4 8 16 32 64 128 256 512 1024 2048 4096 8192 16384 32768".split())
TOKENS = tuple("1B 2B 5B 10B 20B 50B 100B 200B 500B 1T 2T 5T 10T 15T 20T 50T 100T".split())
BATCHES = tuple("65536 125000 250000 500000 1M 2M 4M 8M 16M 32M 64M".split())
SEQUENCES = tuple("512 1024 2048 4096 8192 16384 32768 65536 131072".split())


@cache
def form() -> tuple[Field, ...]:
    """The fields, in the order the page shows them."""
    devices = tuple(a.name for a in accelerators())
    return (
        Field("model", "Model", "model", "choice", models()),
        Field("layers", "Layers", "model", "count", high=1000, auto="the model's"),
        Field("gpu", "Accelerator", "cluster", "choice", devices),
        Field("gpus", "How many", "cluster", "count", high=262_144, stops=GPUS),
        Field("price", "Price", "cluster", "number", low=0.01, high=10_000, auto="catalogue", unit="$ per GPU-hour"),
        Field("tokens", "Tokens, whole run", "run", "count", high=10**15, stops=TOKENS),
        Field("batch", "Tokens, each step", "run", "count", high=10**9, stops=BATCHES),
        Field("seq", "Sequence", "run", "count", low=16, high=1_048_576, unit="tokens", stops=SEQUENCES),
        Field("precision", "Precision", "levers", "choice", PRECISIONS),
        Field("optimizer", "Optimizer", "levers", "choice", OPTIMIZERS),
        Field("recompute", "Recompute", "levers", "choice", RECOMPUTE, auto="search"),
        Field("attention", "Attention", "levers", "choice", ("flash", "fused", "naive")),
        Field("compiled", "Compiled", "levers", "choice", ("no", "yes")),
        Field("framework", "Framework", "levers", "choice", tuple(frameworks())),
        Field("search", "Search", "layout", "choice", ("usual", EVERY), help="every: all layouts, seconds to a minute"),
        Field("tp", "Tensor", "layout", "count", high=1024, auto="search"),
        Field("pp", "Pipeline", "layout", "count", high=1024, auto="search"),
        Field("cp", "Context", "layout", "count", high=1024, auto="search"),
        Field("ep", "Expert", "layout", "count", high=1024, auto="search"),
        Field("zero", "ZeRO stage", "layout", "count", low=0, high=3, auto="search"),
        Field("group", "Sharding group", "layout", "count", high=262_144, auto="search"),
        Field("sp", "Sequence parallel", "layout", "count", low=0, high=1, auto="search"),
        Field("virtual", "Virtual stages", "layout", "count", high=64, auto="search"),
        Field("micro", "Micro-batch", "layout", "count", high=4096, auto="search", unit="sequences"),
    )  # fmt: skip


@cache
def models() -> tuple[str, ...]:
    """The presets that planning can lay out."""
    found = []
    for name in known_models():
        try:
            decoder(preset(name))
        except BursarError:
            continue
        found.append(name)
    return tuple(found)


def parse(pairs: Sequence[tuple[str, str]]) -> State:
    """The state that an address's fields say. Raises BadField, with the field's name and what is accepted."""
    known = {f.name: f for f in form()}
    given: dict[str, str] = {}
    for name, text in pairs:
        plain = name.removeprefix(SECOND)
        if plain not in known and name != "compare":
            raise BadField(shown(name), f"no field {shown(name)!r}; known: {', '.join(known)}")
        if name in given:
            raise BadField(name, f"{name} is given twice")
        given[name] = text
    compare = given.pop("compare", "")
    if compare not in ("", "0", "1"):
        raise BadField("compare", f"compare is {shown(compare)!r}; give 1 or 0")
    first = replace(Setup(), **_values(given, known, ""))
    others = {n: t for n, t in given.items() if n.startswith(SECOND)}
    if compare == "0" or not (compare or others):
        return State(first)
    return State(first, replace(first, **_values(others, known, SECOND)))


def _values(given: Mapping[str, str], known: Mapping[str, Field], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, text in given.items():
        if name.startswith(SECOND) != bool(prefix):
            continue
        field = known[name.removeprefix(SECOND)]
        text = text.strip()
        if text:  # an empty field is one nobody filled in
            found[field.name] = value(field, text, name)
    return found


def value(field: Field, text: str, name: str) -> Any:
    """``text`` as a value of ``field``. Raises BadField."""
    if len(text) > LONGEST:
        raise BadField(name, f"{field.label}: {len(text)} letters are too many")
    if field.auto and text.lower() == AUTO:
        return None
    if field.kind == "choice":
        if text not in field.choices:
            raise BadField(name, f"{field.label}: no {shown(text)!r}; known: {', '.join(field.choices)}")
        return text
    try:
        number: float = parse_count(text) if field.kind == "count" else float(text)
    except (BursarError, ValueError):
        what = "a whole number such as 8, 16M or 15T" if field.kind == "count" else "a number such as 2.5"
        raise BadField(name, f"{field.label}: cannot read {shown(text)!r}; give {what}") from None
    if not field.low <= number <= field.high:  # NaN is neither
        low, high = written(field.low), written(field.high)
        raise BadField(name, f"{field.label}: {shown(text)} is out of range; give {low} to {high}")
    return number


def shown(text: str) -> str:
    """What someone sent, short enough to be said back."""
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def written(value: Any) -> str:
    """A value as the form and the address have it; ``parse`` reads it back."""
    if value is None:
        return AUTO
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return write_count(int(value))
    return str(value)


def query(state: State) -> str:
    """The shortest address of ``state``, without the question mark; empty for the default."""
    found = list(_differing(state.first, Setup(), ""))
    if state.second is not None:
        found += [("compare", "1"), *_differing(state.second, state.first, SECOND)]
    return urlencode(found)


def _differing(setup: Setup, base: Setup, prefix: str) -> Iterable[tuple[str, str]]:
    for f in fields(Setup):
        mine = getattr(setup, f.name)
        if mine != getattr(base, f.name):
            yield prefix + f.name, written(mine)
