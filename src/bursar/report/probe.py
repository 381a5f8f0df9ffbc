"""The records, the page, the plot and the JSON of ``bursar probe``. No torch: the numbers come from `bursar.probe`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from bursar.errors import BadInput, MissingExtra
from bursar.report.record import SCHEMA_VERSION
from bursar.report.text import line, note, table
from bursar.units import format_count, format_share

VERDICTS = ("healthy", "exploding", "vanishing", "dead")
BAR_WIDTH = 24


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer does to the signal, forward and backward. None: it has no such figure, or theory is silent.

    Moments are over all elements of the layer's output. ``tolerance`` is relative: measured and predicted agree when
    their ratio lies within 1 + tolerance either way.
    """

    name: str
    kind: str
    forward_mean: float
    forward_second_moment: float
    predicted_second_moment: float | None
    tolerance: float | None
    growth: float | None  # of the second moment since the input or the last normalisation
    gain: float | None  # fan_in × the weights' mean square: what a linear layer multiplies the second moment by
    fan_in: int | None
    fan_out: int | None
    activation: str | None  # the function that follows, or is, this layer
    dead_share: float | None  # units that are zero on the whole batch
    zero_share: float | None  # values that are zero
    saturated_share: float | None  # values within 1 % of a bound
    output_gradient_norm: float | None
    gradient_norm: float | None  # of the layer's own parameters
    update_to_weight: float | None
    verdict: str = "healthy"
    message: str = ""

    @property
    def agrees(self) -> bool | None:
        """Whether the measurement is what theory predicts; None where theory is silent."""
        if self.predicted_second_moment is None or self.tolerance is None:
            return None
        if not (self.predicted_second_moment > 0 and self.forward_second_moment > 0):
            return self.predicted_second_moment == self.forward_second_moment
        distance = abs(math.log(self.forward_second_moment / self.predicted_second_moment))
        return distance <= math.log1p(self.tolerance)


@dataclass(frozen=True, slots=True)
class Probe:
    """One model at initialisation, layer by layer in the order they run."""

    model: str
    parameters: int
    loss: float
    layers: tuple[Layer, ...]
    verdict: str
    scheme: str | None = None  # None: the model's own initialisation
    assumptions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Depth:
    """One depth of a sweep: what comes out, and the gradient that reaches the first layer with weights."""

    depth: int
    output_second_moment: float
    gradient_norm: float | None
    verdict: str


@dataclass(frozen=True, slots=True)
class Check:
    """One row of ``--schemes``: a variance by formula and as measured, with the standard error of the measurement."""

    scheme: str
    where: str
    quantity: str
    predicted: float
    measured: float
    standard_error: float
    flag: str = ""

    @property
    def agrees(self) -> bool:
        """Whether the two are within four standard errors."""
        return abs(self.measured - self.predicted) <= 4 * self.standard_error


@dataclass(frozen=True, slots=True)
class SchemeLine:
    """An initialiser as the catalogue shows it."""

    name: str
    formula: str
    preserves: str
    source: str


def worst(points: Sequence[Depth]) -> str:
    """The verdict of a sweep: that of the shallowest depth that is not healthy."""
    return next((x.verdict for x in points if x.verdict != "healthy"), "healthy")


# ---- JSON


class LayerRecord(msgspec.Struct):
    """One layer; figures that do not exist, or are not finite, are null."""

    name: str
    kind: str
    forward_mean: float
    forward_second_moment: float
    predicted_second_moment: float | None
    tolerance: float | None
    agrees: bool | None
    growth: float | None
    gain: float | None
    fan_in: int | None
    fan_out: int | None
    activation: str | None
    dead_share: float | None
    zero_share: float | None
    saturated_share: float | None
    output_gradient_norm: float | None
    gradient_norm: float | None
    update_to_weight: float | None
    verdict: str
    message: str


class DepthRecord(msgspec.Struct):
    """One depth of a sweep."""

    depth: int
    output_second_moment: float
    gradient_norm: float | None
    verdict: str


class BeforeRecord(msgspec.Struct):
    """The model as it initialises itself, where ``--init`` asked for another rule."""

    verdict: str
    layers: list[LayerRecord]


class ProbeRecord(msgspec.Struct, kw_only=True):
    """What ``bursar probe --json`` prints."""

    schema_version: int = SCHEMA_VERSION
    model: str
    parameters: int
    scheme: str | None
    layers: list[LayerRecord]
    verdict: str
    before: BeforeRecord | None
    depths: list[DepthRecord] | None
    assumptions: list[str]


class CheckRecord(msgspec.Struct):
    """One row of ``--schemes``."""

    scheme: str
    where: str
    quantity: str
    predicted: float
    measured: float
    standard_error: float
    agrees: bool
    flag: str


class SchemesRecord(msgspec.Struct, kw_only=True):
    """What ``bursar probe --schemes --json`` prints."""

    schema_version: int = SCHEMA_VERSION
    schemes: list[SchemeLine]
    checks: list[CheckRecord]


def _layer_record(x: Layer) -> LayerRecord:
    return LayerRecord(**{name: getattr(x, name) for name in LayerRecord.__struct_fields__})


def probe_record(
    found: Probe, *, before: Probe | None = None, depths: Sequence[Depth] | None = None, verdict: str | None = None
) -> ProbeRecord:
    """The record of a probe, of the one before ``--init``, and of a sweep."""
    return ProbeRecord(
        model=found.model,
        parameters=found.parameters,
        scheme=found.scheme,
        layers=[_layer_record(x) for x in found.layers],
        verdict=verdict or found.verdict,
        before=BeforeRecord(before.verdict, [_layer_record(x) for x in before.layers]) if before else None,
        depths=None if depths is None else [
            DepthRecord(x.depth, x.output_second_moment, x.gradient_norm, x.verdict) for x in depths
        ],
        assumptions=list(found.assumptions),
    )  # fmt: skip


def schemes_record(schemes: Sequence[SchemeLine], checks: Sequence[Check]) -> SchemesRecord:
    """The record of the initialisers and of their check."""
    rows = [CheckRecord(x.scheme, x.where, x.quantity, x.predicted, x.measured, x.standard_error, x.agrees, x.flag)
            for x in checks]  # fmt: skip
    return SchemesRecord(schemes=list(schemes), checks=rows)


# ---- the page


def render(found: Probe, *, before: Probe | None = None, explain: bool = False) -> Iterator[Any]:
    """Headline, signal by layer, bars, what is wrong and its fix; with ``explain`` the formulas."""
    rule = f", initialised by {found.scheme}" if found.scheme else ""
    yield line(
        f"{found.model}{rule}: {format_count(found.parameters)} parameters, "
        f"{len(found.layers)} layer{'s' if len(found.layers) != 1 else ''}: {found.verdict}",
        style="bold",
    )
    yield from _titled(
        "Second moment of each layer's output, and the gradient of its weights",
        ("layer", *(("before",) if before else ()), "measured", "theory", "±", "gradient", "verdict"),
        [
            (x.name, *((_before(before, x.name),) if before else ()), _number(x.forward_second_moment),
             _number(x.predicted_second_moment), _tolerance(x), _short(x.gradient_norm), x.verdict)
            for x in found.layers
        ],
    )  # fmt: skip
    yield from bars([(x.name, x.forward_second_moment) for x in found.layers], "Second moment, on a logarithmic scale")
    yield from _titled(
        "Mean, units that are never active, values that saturate, and one plain gradient step over the weights",
        ("layer", "mean", "then", "dead", "saturated", "update/weight"),
        [
            (x.name, _number(x.forward_mean), x.activation or "", _share(x.dead_share), _share(x.saturated_share),
             _number(x.update_to_weight))
            for x in found.layers
        ],
    )  # fmt: skip
    said = [x for x in found.layers if x.message]
    if said:
        yield line("What to mend", style="bold")
        for x in _first_of_each(said):
            yield note(f"{x.name}: {x.message}")
    odd = [x.name for x in found.layers if x.agrees is False]
    if odd:
        yield note(f"not what theory predicts for independent zero-mean weights: {', '.join(odd)}")
    if before:
        yield note(f"before, by the model's own rule: {before.verdict}")
    if explain:
        yield from _explain()
    yield line("Assumptions", style="bold")
    for text in found.assumptions:
        yield note(text)


def _first_of_each(layers: Sequence[Layer]) -> Iterator[Layer]:
    """The first layer of each verdict with a message: the rest follow from it."""
    seen = set()
    for x in layers:
        key = x.verdict if x.verdict != "healthy" else x.message
        if key not in seen:
            seen.add(key)
            yield x


def render_depths(model: str, depths: Sequence[Depth], scheme: str | None) -> Iterator[Any]:
    """A sweep over depth."""
    rule = f"initialised by {scheme}" if scheme else "as it initialises itself"
    yield line(f"{model} over depth, {rule}", style="bold")
    yield from _titled(
        "",
        ("depth", "output's second moment", "gradient of the first layer", "verdict"),
        [(str(x.depth), _number(x.output_second_moment), _number(x.gradient_norm), x.verdict) for x in depths],
    )
    yield from bars([(f"L = {x.depth}", x.output_second_moment) for x in depths], "Output's second moment, logarithmic")
    yield from bars([(f"L = {x.depth}", x.gradient_norm) for x in depths], "First layer's gradient norm, logarithmic")


def render_schemes(schemes: Sequence[SchemeLine], checks: Sequence[Check]) -> Iterator[Any]:
    """The initialisers, and their variance by formula beside the measured one."""
    yield from _titled(
        "Initialisers: variance of a weight",
        ("scheme", "variance", "preserves", "source"),
        [(x.name, x.formula, x.preserves, x.source) for x in schemes],
        left=4,
    )
    yield from _titled(
        "Predicted against measured (± one standard error)",
        ("scheme", "where", "quantity", "predicted", "measured", "±", "agree"),
        [
            (x.scheme, x.where, x.quantity, _number(x.predicted), _number(x.measured), _number(x.standard_error),
             "yes" if x.agrees else "no")
            for x in checks
        ],
        left=3,
    )  # fmt: skip
    for x in checks:
        if x.flag:
            yield note(f"{x.scheme}, {x.where}: {x.flag}")


def _titled(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> Iterator[Any]:
    """A table whose title may be wider than it."""
    if title:
        yield line(title, style="bold")
    yield table("", columns, rows, left)


def _explain() -> Iterator[Any]:
    yield line("Where the figures come from", style="bold")
    for text in (
        "linear, conv: E[y²] = fan_in · E[w²] · E[x²] + E[b²], for independent zero-mean weights (He et al. 2015, "
        "equation 7); padding counted by the share of taps that lie inside",
        "ReLU halves E[y²]; other activations: ∫ f(σz)² φ(z) dz, numerically",
        "norms: mean(γ²)·v/(v + ε) + mean(β²); embedding: E[w²] of the rows read; a sum adds, a product multiplies",
        "relative variance of E[y²] after a linear layer: 2/(n_out · d), with d = tr(G)²/‖G‖² the independent samples "
        "in the batch (G the Gram matrix of at most 256 rows); it adds up over layers; tolerance: 4 standard errors",
        "exploding, vanishing: E[y²], or the squared norm of its gradient, above 64 × or below 1/256 of where the "
        "path last began (the input, or a norm), each widened by 3 standard errors",
        "dead: at least 90 % of a ReLU's units are zero on the whole batch, or no gradient reaches the weights",
    ):
        yield note(text)


def bars(points: Sequence[tuple[str, float | None]], title: str) -> Iterator[Any]:
    """Unicode bars of positive figures on a logarithmic axis that holds 1."""
    logs = [math.log10(y) for _, y in points if y and math.isfinite(y)]
    if not logs:
        return
    low, high = min(*logs, 0.0), max(*logs, 0.0)
    low, high = math.floor(low - 1e-9), max(math.ceil(high + 1e-9), math.floor(low) + 1)
    yield from _titled(f"{title}: 1e{low} … 1e{high}", ("", ""), [(n, _bar(y, low, high)) for n, y in points], left=2)


def _bar(y: float | None, low: int, high: int) -> str:
    if y is None:
        return ""
    if not math.isfinite(y):
        return "█" * BAR_WIDTH + "▶ not finite"
    if y <= 0:
        return "0"
    eighths: int = round((math.log10(y) - low) / (high - low) * BAR_WIDTH * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.4g}"


def _short(x: float | None) -> str:
    return "" if x is None else f"{x:.3g}"


def _tolerance(x: Layer) -> str:
    if x.tolerance is None:
        return "silent"
    return f"{100 * x.tolerance:.2g} %" if x.tolerance < 10 else f"× {1 + x.tolerance:.2g}"


def _share(x: float | None) -> str:
    return "" if x is None else format_share(x)


def _before(before: Probe | None, name: str) -> str:
    return next((_short(x.forward_second_moment) for x in before.layers if x.name == name), "") if before else ""


# ---- the picture


def check_plot(path: Path) -> None:
    """Raise before the work is done: BadInput for a suffix, MissingExtra without matplotlib."""
    import importlib.util

    if path.suffix not in (".png", ".svg"):
        raise BadInput(f"--plot writes .png or .svg, not {path.name!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("plot", "a picture is drawn by matplotlib")


def save_plot(path: Path, found: Probe, *, before: Probe | None = None, depths: Sequence[Depth] | None = None) -> None:
    """Second moment and gradient norm over the layers, or over depth, to a .png or .svg file."""
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    forward, backward = figure.subplots(2, 1, sharex=True)
    if depths is not None:
        x = [d.depth for d in depths]
        forward.plot(x, [_drawable(d.output_second_moment) for d in depths], "o-")
        backward.plot(x, [_drawable(d.gradient_norm) for d in depths], "o-")
        backward.set_xlabel("depth")
    else:
        for which, label in ((before, "before"), (found, found.scheme or "measured")):
            if which is not None:
                n = range(len(which.layers))
                forward.plot(n, [_drawable(a.forward_second_moment) for a in which.layers], "o-", label=label)
                backward.plot(n, [_drawable(a.gradient_norm) for a in which.layers], "o-", label=label)
        theory = [_drawable(a.predicted_second_moment) for a in found.layers]
        forward.plot(range(len(theory)), theory, "x", label="theory")
        forward.legend()
        backward.set_xlabel("layer")
    for axes, name in ((forward, "second moment"), (backward, "gradient norm")):
        axes.set_yscale("log")
        axes.set_ylabel(name)
    forward.set_title(f"{found.model}: {found.verdict}")
    figure.savefig(path)


def _drawable(y: float | None) -> float:
    return y if y is not None and y > 0 and math.isfinite(y) else math.nan
