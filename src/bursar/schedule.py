"""Pipeline schedules: how long stages wait for one another. No torch.

    p stages   v chunks of a stage   m micro-batches   F, B, W one micro-batch's forward, backward, weights' gradient

In every schedule the slowest stage does its m micro-batches one after the other; the rest of the time it waits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bursar.errors import UnknownName
from bursar.jobs import SCHEDULES

Seconds = Any


def bubble_seconds(
    schedule: str, stages: Any, chunks: Any, slowest: Seconds, total: Seconds, weight_share: float = 1 / 3
) -> Seconds:
    """Seconds the slowest stage waits in one step.

    ``slowest`` and ``total`` are F + B of one micro-batch on the slowest stage and on all together; ``weight_share`` is
    W's part of F + B. Raises UnknownName for a schedule that is none.

    gpipe, 1f1b   the others' F + B once, (p-1)(F+B) where stages are equal (Narayanan et al. 2021, 2.2.1)
    interleaved   that over v (2.2.2)
    zero-bubble   (p-1)(F+B-2W): weights' gradients fill the rest (Qi et al. 2023, ZB-H1, table 2)
    dualpipev     (p/2-1)(F+B+B-3W) (DeepSeek-AI 2024, table 2, half of the devices as its V shape folds the stages)
    """
    if schedule not in SCHEDULES:
        raise UnknownName("pipeline schedule", schedule, SCHEDULES, "They are what Layout.schedule takes.")
    others = np.maximum(total - slowest, 0.0)
    if schedule == "interleaved":
        return others / chunks
    if schedule == "zero-bubble":
        return others * (1 - 2 * weight_share)
    if schedule == "dualpipev":
        pairs = np.maximum(stages / 2 - 1, 0) / np.maximum(stages - 1, 1)
        backward = 2 * weight_share
        return others * pairs * (1 + backward - 3 * weight_share)
    return others


def layers_of_stages(
    n_layers: Any, stages: Any, chunks: Any, before: Any = 1.0, after: Any = 1.0
) -> tuple[Any, Any, Any]:
    """Layers of the fullest stage, of the first and of the last.

    Where p times v divides the layers, each has as many. Elsewhere what stands ``before`` and ``after`` the layers, in
    layers' worth, takes their place: one each where a partition counts the embedding and the head as layers (Megatron's
    ``account_for_embedding_in_pipeline_split``, DeepSpeed's), their time over a layer's where stages are laid out by
    hand.

    >>> [tuple(int(n) for n in layers_of_stages(L, 8, 1)) for L in (96, 94, 70)]
    [(12, 12, 12), (12, 11, 11), (9, 8, 8)]
    """
    parts = stages * chunks
    even = n_layers % parts == 0
    filled = np.ceil((n_layers + before + after) / stages)  # chunks need not be alike
    most = np.where(even, n_layers / stages, np.minimum(filled, n_layers))
    first, last = (np.where(even, n_layers / stages, np.maximum(np.floor(most - n), 0)) for n in (before, after))
    return most, first, last
