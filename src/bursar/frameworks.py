"""Training frameworks: what each does where nobody says otherwise. Rows of `catalog/frameworks.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from bursar.errors import UnknownName


@dataclass(frozen=True, slots=True)
class Framework:
    """One row. Bytes are of one element."""

    name: str
    title: str
    parameter_bytes: float
    gradient_bytes: Mapping[str, float]  # by precision of the products
    state_bytes: float  # AdamW's two states and, where parameters are 16 bit, the fp32 master copy
    zero_stage: int
    recompute: str
    attention: str
    sequence_parallel: int
    dropout: int
    overlap_gradients: bool
    vocab_multiple: int
    fused_kernels: bool
    fused_gradients: bool
    fused_loss: bool
    early_stop: bool
    flash: str
    tp_overlap: float
    overlap_parameters: bool
    optimizer_bytes: float
    source: str
    gather_calls: int = 1
    overlap_gathers: bool = True


@cache
def frameworks() -> Mapping[str, Framework]:
    """Every row, by name."""
    text = files("bursar").joinpath("catalog", "frameworks.toml").read_text(encoding="utf-8")
    return {name: Framework(name, **row) for name, row in tomllib.loads(text).items()}


# Frameworks that share another's code and habits
_SAME = {
    "megatron-core": "megatron", "megatron-lm": "megatron",
    "gpt-neox": "megatron-deepspeed",
    "llm-foundry": "fsdp", "pytorch-fsdp": "fsdp",
    "pytorch": "plain", "torch": "plain", "huggingface": "plain", "transformers": "plain", "litgpt": "plain",
}  # fmt: skip


def framework(name: str) -> Framework:
    """The row called ``name``, or the one whose code it runs. Raises UnknownName.

    >>> framework("megatron-core").name
    'megatron'
    """
    rows = frameworks()
    plain = name.strip().lower()
    found = rows.get(_SAME.get(plain, plain))
    if found is None:
        raise UnknownName("framework", name, rows, "Add a row to catalog/frameworks.toml.")
    return found
