"""A Hugging Face ``config.json`` as a workload: the model's real code from transformers, built without weights.

A config is data: ``auto_map`` and remote code are not looked at, and nothing is fetched.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from bursar.errors import BadInput, MissingExtra, UnknownName
from bursar.workload import presets
from bursar.workload.resolve import Workload, loss_of_output

_LARGEST_CONFIG_BYTES = 10**7


def read_config(path: Path) -> dict[str, Any]:
    """The object in ``path``. Raises BadInput for what is missing, too large, no JSON or no config."""
    try:
        if path.stat().st_size > _LARGEST_CONFIG_BYTES:
            raise BadInput(f"{path} has {path.stat().st_size} bytes; a config.json has a few thousand")
        found = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadInput(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise BadInput(f"{path} is no Hugging Face config: it has no 'model_type'")
    return found


def workload(path: Path, batch_size: int | None = None, seq_len: int | None = None) -> Workload:
    """The language model that ``path`` describes, on random tokens.

    Raises MissingExtra without transformers, UnknownName for a model type transformers does not know, BadInput for a
    config it refuses or a model that is no causal or masked language model.
    """
    given = read_config(path)
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtra("hf", f"{path} is built with transformers' own model code")
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.utils import logging

    kind = given["model_type"]
    if kind not in CONFIG_MAPPING:
        raise UnknownName("model_type", kind, tuple(CONFIG_MAPPING.keys()))
    fields = {k: v for k, v in given.items() if k not in ("model_type", "auto_map", "transformers_version")}
    logging.set_verbosity_error()
    try:
        config = CONFIG_MAPPING[kind](**fields)
    except Exception as error:  # whatever its validation raises, the config is what is wrong
        raise BadInput(f"{path}: transformers refuses this config: {error}") from error
    config.use_cache = False  # a key-value cache is for generation
    if type(config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING and kind != "bert":
        auto: Any = modeling_auto.AutoModelForCausalLM
    elif type(config) in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING:
        auto = modeling_auto.AutoModelForMaskedLM
    else:
        raise BadInput(
            f"{path}: {kind} is no causal or masked language model, so bursar cannot make its batch; write a callable "
            "that returns (module, batch) and give file.py:callable"
        )
    longest = getattr(config, "max_position_embeddings", None)
    samples = batch_size or presets.LM_BATCH_SIZE
    tokens = seq_len or min(presets.LM_SEQ_LEN, longest or presets.LM_SEQ_LEN)
    if longest is not None and tokens > longest:
        raise BadInput(f"{path}: a sequence of {tokens} does not fit max_position_embeddings {longest}")

    def make() -> tuple[nn.Module, Any]:
        model = auto.from_config(config, attn_implementation="sdpa", trust_remote_code=False)
        ids = torch.randint(0, config.vocab_size, (samples, tokens))
        return model, {"input_ids": ids, "labels": torch.randint(0, config.vocab_size, (samples, tokens))}

    name = path.parent.name if path.name == "config.json" else path.stem
    return Workload(
        name or kind,
        make,
        loss_of_output,
        samples,
        samples * tokens,
        assumptions=(f"transformers' own {kind}, attention by SDPA, no padding, one sequence per sample, no cache",),
    )
