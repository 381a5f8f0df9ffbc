"""Mixtures of experts in closed form: the products and the attention of a step, from the sizes alone. No torch.

A token meets k of E experts and every row of the router; DeepSeek-V3 adds a shared expert, dense first layers, and
latent attention, whose queries and keys are wider than its values. Sizes by letter are `catalog/models.toml`'s.

    B batch   S sequence   D model   F, M widths of a dense network and of an expert   h heads   kv key-value heads

Source: Jiang et al. 2024 (arXiv:2401.04088), section 2; DeepSeek-AI 2024 (arXiv:2412.19437), section 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bursar.architecture import Network
from bursar.errors import BadInput

Count = Any  # an int, or an array of them


@dataclass(frozen=True, slots=True)
class Products:
    """FLOPs of one training step of the kinds matmul and attention; parameters. Ints, or arrays as B and S were."""

    forward: Count
    backward: Count
    recompute: Count  # the scores that a fused attention does again in backward
    attention: Count  # the attention kind over all phases; none where the scores are products of their own
    parameters: int
    active_parameters: int  # in the matrices that one token is multiplied by

    @property
    def model(self) -> Count:
        """Forward + backward."""
        return self.forward + self.backward


def products(model: Network, B: Count, S: Count, precision: str = "fp32") -> Products:
    """One step of Mixtral or DeepSeek-V3 on B samples of S tokens, causal, on a GPU.

    With fp32 (and tf32) grouped queries have no fused kernel on CUDA: their scores are products, full-square.
    Raises BadInput for a network that is no mixture.
    """
    if model.kind not in _MATRICES:
        raise BadInput(f"{model.name} is no mixture of experts; the closed form here covers {', '.join(_MATRICES)}")
    s = model.sizes
    layers, matrices, d_query, d_value, grouped = _MATRICES[model.kind](s)
    weights = 2 * B * S * matrices
    if grouped and precision in ("fp32", "tf32"):
        forward = weights + 2 * layers * B * s["h"] * S * S * (d_query + d_value)
        return Products(forward, 2 * forward, 0, 0, model.parameters(), matrices)
    pairs = layers * B * s["h"] * (S * (S + 1) // 2)
    attention, again = 2 * pairs * (d_query + d_value), 2 * pairs * d_query
    forward = weights + attention
    return Products(forward, 2 * forward, again, 3 * attention + again, model.parameters(), matrices)


def _mixtral(s: Mapping[str, int]) -> tuple[int, int, int, int, bool]:
    """Layers, matrices a token meets, head sizes of queries and values, whether key-value heads are shared."""
    d, c = s["d"], s["d"] // s["h"]
    block = 2 * d * d + 2 * d * s["kv"] * c + s["E"] * d + s["k"] * 3 * d * s["F"]
    return s["L"], s["L"] * block + s["V"] * d, c, c, s["kv"] < s["h"]


def _deepseek(s: Mapping[str, int]) -> tuple[int, int, int, int, bool]:
    """The same: queries and keys through a narrow latent each; ``rope`` channels of the keys serve all heads."""
    d, h, query = s["d"], s["h"], s["nope"] + s["rope"]
    latent = d * s["q"] + s["q"] * h * query + d * (s["kv"] + s["rope"]) + s["kv"] * h * (s["nope"] + s["v"])
    attention = latent + h * s["v"] * d
    mixture = s["E"] * d + (s["k"] + 1) * 3 * d * s["M"]
    matrices = s["N"] * attention + s["dense"] * 3 * d * s["F"] + (s["N"] - s["dense"]) * mixture
    return s["N"], matrices + s["V"] * d, query, s["v"], False


_MATRICES = {"mixtral": _mixtral, "deepseek-v3": _deepseek}
KINDS = frozenset(_MATRICES)
