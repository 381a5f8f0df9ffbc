"""The optimizers a step can be run with, by name: torch's own, with what makes each what it is. One row to add one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bursar.errors import UnknownName


@dataclass(frozen=True, slots=True)
class Optimizer:
    """How to make one, and where its rule comes from."""

    make: type[torch.optim.Optimizer]
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""


OPTIMIZERS: Mapping[str, Optimizer] = {
    "sgd": Optimizer(torch.optim.SGD, {"lr": 1e-2}, "Robbins and Monro 1951"),
    "momentum": Optimizer(torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}, "Polyak 1964"),
    "nesterov": Optimizer(torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}, "Nesterov 1983"),
    "adagrad": Optimizer(torch.optim.Adagrad, {"lr": 1e-2}, "Duchi, Hazan and Singer 2011"),
    "rmsprop": Optimizer(torch.optim.RMSprop, {"lr": 1e-3}, "Tieleman and Hinton 2012, lecture 6.5"),
    "adam": Optimizer(torch.optim.Adam, {"lr": 1e-3}, "Kingma and Ba 2014"),
    "adamw": Optimizer(torch.optim.AdamW, {"lr": 1e-3}, "Loshchilov and Hutter 2017"),
}


def build(name: str, parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
    """The optimizer ``name`` over ``parameters``. Raises UnknownName naming the nearest known."""
    if name not in OPTIMIZERS:
        raise UnknownName("optimizer", name, OPTIMIZERS)
    row = OPTIMIZERS[name]
    return row.make(parameters, **row.settings)
