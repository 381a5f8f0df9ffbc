"""How large a model and how many tokens a budget of compute is best spent on.

Hoffmann et al. 2022 (arXiv:2203.15556), table 3, their first approach: parameters and tokens of the best model by FLOP;
between rows the ratio of tokens to parameters is interpolated. Beside it their third approach, refitted: Besiroglu et
al. 2024 (arXiv:2404.10102), loss = E + A/N^α + B/D^β.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Final

from bursar.errors import BadInput

# parameters, tokens, and the FLOP of the paper's own accounting, which counts a little less than 6ND at some rows
TABLE_3: Final = (
    (400e6, 8.0e9, 1.92e19), (1e9, 20.2e9, 1.21e20), (10e9, 205.1e9, 1.23e22), (67e9, 1.5e12, 5.76e23),
    (175e9, 3.7e12, 3.85e24), (280e9, 5.9e12, 9.90e24), (520e9, 11.0e12, 3.43e25), (1e12, 21.2e12, 1.27e26),
    (10e12, 216.2e12, 1.30e28),
)  # fmt: skip
E, A, B, ALPHA, BETA = 1.8172, 482.01, 2085.43, 0.3478, 0.3658  # Besiroglu et al. 2024, table 1


@dataclass(frozen=True, slots=True)
class Optimal:
    """The best size and number of tokens for a budget of FLOP; 6 · parameters · tokens is the budget."""

    flops: float
    parameters: float
    tokens: float
    refit_parameters: float
    refit_tokens: float

    @property
    def tokens_per_parameter(self) -> float:
        """Of the first approach: about 20."""
        return self.tokens / self.parameters

    def record(self) -> dict[str, object]:
        """As it stands in ``run --optimal --json``."""
        return {
            "flops": self.flops,
            "parameters": self.parameters,
            "tokens": self.tokens,
            "tokens_per_parameter": self.tokens_per_parameter,
            "refit": {"parameters": self.refit_parameters, "tokens": self.refit_tokens},
            "loss": loss(self.parameters, self.tokens),
            "source": "Hoffmann et al. 2022, table 3; refit: Besiroglu et al. 2024",
        }


def loss(parameters: float, tokens: float) -> float:
    """Nats per token that the refit forecasts, on Hoffmann et al.'s data."""
    return float(E + A / parameters**ALPHA + B / tokens**BETA)


def optimal(flops: float) -> Optimal:
    """The best split of ``flops``. Raises BadInput for what is not above zero.

    >>> found = optimal(5.76e23)  # Gopher's budget: 67B parameters, 1.5T tokens
    >>> round(found.parameters / 1e9), round(found.tokens / 1e12, 2)
    (65, 1.47)
    """
    if not 0 < flops < 1e60:
        raise BadInput(f"flops is {flops!r}; give a number above zero")
    at = math.log(flops)
    rows = [(math.log(f), math.log(d / n)) for n, d, f in TABLE_3]
    ratio = rows[0][1] if at <= rows[0][0] else rows[-1][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(rows):
        if x0 <= at <= x1:
            ratio = y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    n = math.sqrt(flops / (6 * math.exp(ratio)))
    g = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    refit = g * (flops / 6) ** (BETA / (ALPHA + BETA))
    return Optimal(flops, n, flops / (6 * n), refit, flops / (6 * refit))
