"""From figures to verdicts: which layers are healthy, and for the others the cause and what to change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bursar.report.probe import Layer

GREW, SHRANK = 64.0, 1 / 256  # of E[x²]: 8 × up, 16 × down in the values, since the path began
DEAD_SHARE = 0.9  # of a layer's units, never active on the batch
ERRORS = 4  # standard errors within which theory and measurement agree
MARGIN = 3  # standard errors by which sampling widens the healthy band


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a verdict needs beside the layer's own figures."""

    growth: float  # E[y²] over that at the start of the path
    depth: int  # layers with weights on the path
    drift: float  # relative variance of the growth
    path: frozenset[int]  # layers it came through, itself among them, since a norm or a function without a rule
    bias_share: float  # of E[y²], from its bias
    rescaled: bool  # a norm follows, so its scale does not matter
    residual: bool  # it is added to a stream, so it may be small
    trained: bool  # some of its parameters want a gradient
    weight_second: float | None = None
    weight_count: int = 0
    in_first: bool = False


def judge(layers: Sequence[Layer], evidence: Sequence[Evidence]) -> tuple[tuple[Layer, ...], str]:
    """The layers with verdict and message, and the model's verdict: that of the first layer that is not healthy."""
    judged = [_forward(x, e) for x, e in zip(layers, evidence, strict=True)]
    judged = _backward(judged, evidence)
    overall = next((x.verdict for x in judged if x.verdict != "healthy"), "healthy")
    return tuple(judged), overall


def _forward(x: Layer, e: Evidence) -> Layer:
    fault = _fan_fault(x, e)
    band = math.exp(MARGIN * math.sqrt(e.drift))
    if not math.isfinite(x.forward_second_moment):
        return replace(x, verdict="exploding", message=fault or "its output is not finite: exploding")
    if x.dead_share is not None and x.dead_share >= DEAD_SHARE:
        share = f"{100 * x.dead_share:.0f} %"
        return replace(
            x,
            verdict="dead",
            message=f"{share} of its units are zero on the whole batch: dead; its bias is too negative, or its input "
            "is far from zero mean: set the bias to 0 and centre the input",
        )
    if e.rescaled:
        return replace(x, message=fault)
    rate = e.growth ** (1 / max(1, e.depth)) if e.growth > 0 else 0.0
    if e.growth * (1 - e.bias_share) > GREW * band:
        return replace(x, verdict="exploding", message=fault or _grows(x, e, rate))
    if e.growth < SHRANK / band and not e.residual:
        return replace(x, verdict="vanishing", message=fault or _shrinks(x, e, rate))
    return replace(x, message=fault)


def _backward(layers: list[Layer], evidence: Sequence[Evidence]) -> list[Layer]:
    """The gradient's way back along each path: its squared norm at a layer over that at the path's last layer."""
    vanished = any(x.verdict == "vanishing" for x in layers)
    last: dict[int, int] = {}
    for i, (x, e) in enumerate(zip(layers, evidence, strict=True)):
        if not e.rescaled and x.output_gradient_norm:
            last |= dict.fromkeys(e.path, i)
    out = []
    for i, (x, e) in enumerate(zip(layers, evidence, strict=True)):
        if x.verdict != "healthy" or x.output_gradient_norm is None:
            out.append(x)
            continue
        end = layers[last.get(i, i)].output_gradient_norm or 0.0
        band = math.exp(MARGIN * math.sqrt(evidence[last.get(i, i)].drift))
        ratio = (x.output_gradient_norm / end) * (x.output_gradient_norm / end) if end > 0 else 1.0
        said = f"its gradient's squared norm is {_times(ratio)} × that at the end of the path"
        if not math.isfinite(x.output_gradient_norm):
            x = replace(x, verdict="exploding", message="its gradient is not finite: exploding")
        elif e.trained and x.gradient_norm == 0:
            word = "vanishing" if vanished else "dead"
            why = "shrinks the signal to nothing" if vanished else "is zero or inactive, look there"
            x = replace(x, verdict=word, message=f"no gradient reaches its weights: {word}; what follows it {why}")
        elif not e.rescaled and not e.residual and ratio > GREW * band:
            x = replace(x, verdict="exploding", message=x.message or f"{said}: exploding on the way back; {_remedy(x)}")
        elif not e.rescaled and not e.residual and ratio < SHRANK / band and _is_plain(x):
            x = replace(x, verdict="vanishing", message=x.message or f"{said}: vanishing on the way back; {_remedy(x)}")
        out.append(x)
    return out


def _is_plain(x: Layer) -> bool:
    """A matrix or a convolution: what an attention passes back to its queries and keys is small at a healthy start."""
    return x.fan_in is not None


def _fan_fault(x: Layer, e: Evidence) -> str:
    """The std taken from the wrong side of the weight, or from none."""
    if e.weight_second is None or x.fan_in is None or x.fan_out is None:
        return ""
    error = ERRORS * math.sqrt(2 / max(1, e.weight_count)) + 1e-6
    if error > 0.25 or abs(e.weight_second * x.fan_in - 1) <= error:
        return ""  # too few weights to tell, or the right side
    if abs(e.weight_second - 1) <= error and x.fan_in >= GREW:
        return f"output variance {x.fan_in}: the weights are unscaled, N(0, 1); take std = 1/√fan_in = 1/√{x.fan_in}"
    off = abs(e.weight_second * x.fan_out - 1)
    wrong_side = 1e-5 < off <= error  # nearer than numbers drawn at random come: an orthogonal matrix
    if wrong_side and max(x.fan_in, x.fan_out) >= 4 * min(x.fan_in, x.fan_out):
        used, right = (1, 0) if e.in_first else (0, 1)
        return (
            f"output variance {_times(x.fan_in / x.fan_out)}: the std used shape[{used}], which is fan-out; "
            f"take shape[{right}], 1/√{x.fan_in}"
        )
    return ""


def _grows(x: Layer, e: Evidence, rate: float) -> str:
    how = f"second moment grows {_times(rate)}× per layer" if e.depth > 1 else f"output variance {_times(e.growth)}"
    return f"{how}: exploding; {_remedy(x)}"


def _shrinks(x: Layer, e: Evidence, rate: float) -> str:
    if e.growth == 0:
        return "its output is zero: vanishing; are its weights, or its input's, all zero?"
    how = (
        f"second moment shrinks {_times(1 / rate)}× per layer" if e.depth > 1 else f"output variance {_times(e.growth)}"
    )
    return f"{how}: vanishing; {_remedy(x)}"


def _remedy(x: Layer) -> str:
    rule = "--init kaiming (variance 2/fan_in) before a ReLU, fan-in (1/fan_in) without one"
    if x.gain is None:
        return rule
    return f"its weights' variance is {_times(x.gain)}/fan_in; try {rule}"


def _times(x: float) -> str:
    """A factor as one reads it: 512, 16, 0.33."""
    if not math.isfinite(x):
        return "without bound"
    near = round(x)
    if x >= 1e5:
        return f"{x:.3g}"
    return f"{near}" if near >= 10 or (near and abs(x / near - 1) < 0.005) else f"{x:.2g}"
