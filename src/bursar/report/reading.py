"""Formulas in the field's letters: a letter stands for a number only where the identity is exact.

B batch   S sequence   N parameters   P parameters in matrices   L layers   d model   F feed-forward   V vocabulary
H query heads   K key-value heads   C head size   T positions
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from bursar.architecture import Transformer
from bursar.polynomial import Polynomial

Symbols = Mapping[str, tuple[int, str]]  # letter -> (value, what it stands for)


def decoder_matrices(shape: Transformer) -> int:
    """The same of a decoder, without making it; a tied table multiplies as the head."""
    d, F, V = shape.d_model, shape.d_ff, shape.vocab_size
    Q, E = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    return shape.n_layers * (2 * d * Q + 2 * d * E + (3 if shape.gated_mlp else 2) * d * F) + V * d


def symbols(shape: Transformer | None, matrices: int | None, which: str, parameters: int) -> dict[str, tuple[int, str]]:
    """The letters that formulas are read in."""
    found = {"N": (parameters, "parameters")}
    if matrices:
        found["P"] = (matrices, which)
    if shape is None:
        return found
    L, d, F, V = shape.n_layers, shape.d_model, shape.d_ff, shape.vocab_size
    Q, E = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    mlp = 3 if shape.gated_mlp else 2
    of_p = {
        "12·L·d² + V·d": 12 * L * d * d + V * d,
        f"L·(4·d² + {mlp}·d·F) + V·d": L * (4 * d * d + mlp * d * F) + V * d,
        f"L·(2·d·H·C + 2·d·K·C + {mlp}·d·F) + V·d": L * (2 * d * Q + 2 * d * E + mlp * d * F) + V * d,
    }
    text = next((t for t, value in of_p.items() if value == matrices), None)
    if matrices and text is not None:
        found["P"] = (matrices, f"parameters in matrices, {text}")
    found |= {"L": (L, "layers"), "d": (d, "width of the model")}
    if text is not None and "F" in text:
        found["F"] = (F, "width of the feed-forward")
    if d != Q or (text is not None and "K" in text):
        found |= {"H": (shape.n_heads, "query heads"), "K": (shape.n_kv_heads, "key-value heads"),
                  "C": (shape.head_dim, "head size")}  # fmt: skip
    found["V"] = (V, "vocabulary")
    if shape.position == "learned":
        found["T"] = (shape.max_seq_len, "positions")
    return found


def read_parameters(p: Polynomial, shape: Transformer | None, known: Symbols) -> str:
    """``12·L·d² + V·d + T·d + 13·L·d + 2·d`` of a GPT, the matrices and the rest of others."""
    n, P = known["N"][0], known.get("P", (0, ""))[0]
    if p.text != str(n):
        return p.text
    if shape is not None:
        L, d, V, T = shape.n_layers, shape.d_model, shape.vocab_size, shape.max_seq_len
        for text, value in (
            ("12·L·d² + V·d + T·d + 13·L·d + 2·d", 12 * L * d * d + (V + T + 13 * L + 2) * d),
            ("P + V·d + 2·L·d + d", P + (V + 2 * L + 1) * d),
            ("P + 2·L·d + d", P + (2 * L + 1) * d),
        ):
            if value == n:
                return text
    return "P" if n == P else f"P + {n - P}" if P else str(n)


_PER_WEIGHT = {"forward": (2,), "backward": (4,), "model": (6,), "hardware": (6, 8), "recompute": (0, 2),
               "attention": (0,), "attention_full_square": (0,)}  # fmt: skip


def read_flops(figure: str, p: Polynomial, known: Symbols) -> str:
    """``6·B·S·P + 6·L·d·B·S·(S+1)``: tokens times matrices, and the scores; else the polynomial."""
    tokens = dict.fromkeys(p.letters, 1)
    squares = {"B": 1, "S": 2}
    t = "·".join(tokens)
    linear, square = p.of(**tokens), p.of(**squares) if "S" in tokens else Fraction(0)
    constant = p.of()
    n = known["N"][0]
    if len(p.coefficients) != bool(linear) + bool(square):
        times = constant / n
        return f"{times}·N" if len(p.coefficients) == 1 and constant and times.denominator == 1 else p.text
    P = known.get("P", (0, ""))[0]
    for k in _PER_WEIGHT.get(figure, ()):
        rest = linear - k * P
        product = [f"{k}·{t}·P"] if k and P else []
        if (k and not P) or not (product or square):
            continue
        if square and rest == square:
            return " + ".join([*product, f"{_scores(square, known)}·B·S·(S+1)"])
        if rest == 0:
            return " + ".join([*product, *([f"{_scores(square, known)}·B·S²"] if square else [])])
        if product and not square and abs(rest) < k * P:
            return f"{product[0]} {'+' if rest > 0 else '-'} {abs(rest)}·{t}"
    return p.text


def _scores(coefficient: Fraction, known: Symbols) -> str:
    """The coefficient of S² as a multiple of L·d (or L·H·C), where it is one."""
    letters = ["L", *(("H", "C") if "C" in known and known["H"][0] * known["C"][0] != known["d"][0] else ("d",))]
    if all(letter in known for letter in letters):
        unit = math.prod(known[letter][0] for letter in letters)
        times = coefficient / unit
        if times.denominator == 1:
            return "·".join([*([] if times == 1 else [str(times)]), *letters])
    return str(coefficient)


def read_bytes(p: Polynomial, known: Symbols) -> str:
    """The constant in parameters and tables where that is exact: ``20·N + 16·B·S``."""
    constant, n = p.of(), known["N"][0]
    times, rest = divmod(int(constant), n) if n else (0, int(constant))
    if not times:
        return p.text
    parts = [f"{times}·N"]
    table = known["V"][0] * known["d"][0] if "V" in known else 0
    if rest and table and rest % table == 0:
        parts.append(f"{rest // table}·V·d")
    elif rest:
        parts.append(str(rest))
    others = Polynomial(p.letters, {m: c for m, c in p.coefficients.items() if any(m.powers)})
    return " + ".join([*parts, *([others.text] if others.coefficients else [])]).replace("+ -", "- ")


def read_widths(p: Polynomial) -> str:
    """The polynomial with the highest degrees first."""
    return p.written(p.terms[::-1])
