"""The notes' table of chapter 8, for any model: per layer, what forward, dX and dW cost, with shapes and formula."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from bursar.ledger import Ledger, Row
from bursar.rules import MODEL_KINDS


class Layer(msgspec.Struct):
    """FLOPs of one layer's products in one step, and the formula of its forward product."""

    module: str
    forward: int
    d_input: int
    d_weight: int
    formula: str
    shapes: str


def layers(ledger: Ledger) -> list[Layer]:
    """One entry per module that multiplies, in order of its forward; attention counts all its gradients as dX.

    In backward a product that reads the weight is dX = dY @ W; the other one is dW = X^T @ dY.
    """
    rows: dict[str, list[Row]] = {}
    for row in ledger.recorded:
        if row.kind in MODEL_KINDS and row.phase in ("forward", "backward"):
            rows.setdefault(row.module, []).append(row)
    return [_layer(module, found, ledger.replicas) for module, found in rows.items()]


def _layer(module: str, rows: Sequence[Row], replicas: int) -> Layer:
    forward = [r for r in rows if r.phase == "forward"]
    totals = {"forward": 0, "d_input": 0, "d_weight": 0}
    formulas: list[str] = []
    shapes: list[str] = []
    for row in forward:
        totals["forward"] += row.work.flops * replicas
        formulas.append(_formula(row))
        shapes.append(_shapes(row))
    for row in rows:
        if row.phase != "backward":
            continue
        d_input, d_weight = _split(row, forward)
        totals["d_input"] += d_input * replicas
        totals["d_weight"] += d_weight * replicas
    return Layer(module, **totals, formula=" + ".join(dict.fromkeys(formulas)), shapes="; ".join(dict.fromkeys(shapes)))


def _split(row: Row, forward: Sequence[Row]) -> tuple[int, int]:
    """A backward row's FLOPs as (dX, dW)."""
    if row.kind == "attention":
        return row.work.flops, 0
    if row.kind == "conv":  # one op gives both; it says which by what it returns
        x, weight = row.shapes[1:3]
        outputs = [s for s in row.shapes[3:] if len(s) > 1]  # without the bias
        gives_w = weight in outputs
        gives_x = len(outputs) == 2 or (x in outputs and not gives_w)
        share = row.work.flops // max(1, gives_x + gives_w)
        return share * gives_x, share * gives_w
    if row.reads_weight or not any(f.reads_weight for f in forward):  # dY @ W; or a product of two activations
        return row.work.flops, 0
    return 0, row.work.flops  # X^T @ dY


def _formula(row: Row) -> str:
    if row.kind == "conv":
        weight, out = row.shapes[1], row.shapes[-1]
        positions = "·".join(str(n) for n in out[2:])
        return f"2·{out[0]}·{positions}·{'·'.join(str(n) for n in weight)}"
    if row.kind == "attention":
        query = row.shapes[0]
        causal = row.work.flops != row.work.full_square_flops
        return f"4·pairs·{query[-1]}·{query[0]}·{query[1]}" + (" (causal pairs)" if causal else "")
    a, b = row.shapes[-3:-1]
    batch = f"{a[0]}·" if len(a) == 3 else ""
    return f"2·{batch}{a[-2]}·{a[-1]}·{b[-1]}"


def _shapes(row: Row) -> str:
    if row.kind in ("conv", "attention"):
        return f"{_shape(row.shapes[0])} → {_shape(row.shapes[-1])}"
    return f"{_shape(row.shapes[-3])} @ {_shape(row.shapes[-2])}"


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(str(n) for n in shape)
