"""A Hugging Face ``config.json`` as a workload: the model's real code from transformers, built without weights.

A config is data: nothing of it is run and nothing is fetched. The head is the one the config names in
``architectures``, else the first of `_HEADS` that the architecture has; the batch is made by `hf_batch`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from bursar.errors import BadInput, MissingExtra, UnknownName
from bursar.workload import presets
from bursar.workload.resolve import Late, Workload, loss_of_output, tensors_in

_YOUR_OWN = "write a callable that returns (module, batch) and give file.py:callable"
_LARGEST_CONFIG_BYTES = 10**7
_NOT_SHAPE = ("model_type", "auto_map", "transformers_version", "quantization_config")

_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")

MOST_HEADS = 4  # to try

# The heads a model may be trained with, what it is for first: transformers' own table of them, and what its labels are.
_HEADS = (
    ("IMAGE_TEXT_TO_TEXT", "tokens"),
    ("MULTIMODAL_LM", "tokens"),
    ("SPEECH_SEQ_2_SEQ", "decoder tokens"),
    ("SEQ_TO_SEQ_CAUSAL_LM", "decoder tokens"),
    ("MASKED_LM", "tokens"),
    ("CAUSAL_LM", "tokens"),
    ("CTC", "transcript"),
    ("RNNT", "transcript"),
    ("TDT", "transcript"),
    ("ZERO_SHOT_IMAGE_CLASSIFICATION", ""),
    ("ZERO_SHOT_OBJECT_DETECTION", ""),
    ("IMAGE_CLASSIFICATION", "class"),
    ("VIDEO_CLASSIFICATION", "class"),
    ("AUDIO_CLASSIFICATION", "class"),
    ("UNIVERSAL_SEGMENTATION", ""),
    ("SEMANTIC_SEGMENTATION", ""),
    ("OBJECT_DETECTION", ""),
    ("DEPTH_ESTIMATION", ""),
    ("IMAGE_TO_IMAGE", ""),
    ("VISUAL_QUESTION_ANSWERING", ""),
    ("DOCUMENT_QUESTION_ANSWERING", ""),
    ("TIME_SERIES_PREDICTION", ""),
    ("TEXT_TO_SPECTROGRAM", ""),
    ("TEXT_TO_WAVEFORM", ""),
    ("QUESTION_ANSWERING", ""),
    ("SEQUENCE_CLASSIFICATION", "class"),
    ("", ""),  # the body alone
    ("PRETRAINING", ""),
    ("MASK_GENERATION", ""),
    ("KEYPOINT_DETECTION", ""),
    ("KEYPOINT_MATCHING", ""),
    ("BACKBONE", ""),
)


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
    """The model that ``path`` describes, with the head it is trained with, on a batch of the sort it takes.

    Raises MissingExtra without transformers, UnknownName for a model type transformers does not know, BadInput for a
    config it refuses, one that asks for its own code, or a model whose batch bursar cannot make.
    """
    given = read_config(path)
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtra("hf", f"{path} is built with transformers' own model code")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.utils import logging

    kind = given["model_type"]
    if kind not in CONFIG_MAPPING:
        if given.get("auto_map"):
            raise BadInput(
                f"{path}: model_type {kind!r} is not in transformers, and its auto_map asks for code that comes with "
                "the weights. bursar does not run the code of a config: write a callable that returns (module, batch) "
                "and give file.py:callable"
            )
        raise UnknownName("model_type", kind, tuple(CONFIG_MAPPING.keys()))
    logging.set_verbosity_error()
    fields = _without(given, ("dtype", "torch_dtype"))
    try:
        config = CONFIG_MAPPING[kind].from_dict({k: v for k, v in fields.items() if k not in _NOT_SHAPE})
    except Exception as error:  # whatever its validation raises, the config is what is wrong
        raise BadInput(f"{path}: transformers refuses this config: {error}") from error
    name = path.parent.name if path.name == "config.json" else path.stem
    notes = ["the config's auto_map is not followed: transformers' own code is used"] if given.get("auto_map") else []
    if given.get("quantization_config"):
        notes.append("the config's quantization_config is left out: weights are trained, in the step's precision")
    return of_config(config, name or kind, batch_size, seq_len, notes=tuple(notes))


def of_config(
    config: Any,
    name: str,
    batch_size: int | None = None,
    seq_len: int | None = None,
    experts: str | None = None,
    notes: tuple[str, ...] = (),
) -> Workload:
    """A workload from transformers' own config object. ``experts`` is its ``experts_implementation``, None the default.

    Raises BadInput for an architecture without a head to train, or a sequence that does not fit its positions.
    """
    from bursar.workload import hf_batch

    for part in hf_batch.parts(config):
        if hasattr(part, "use_cache"):
            part.use_cache = False  # a key-value cache is for generation
    heads = _heads(config)
    model_class = heads[0][0]
    longest = getattr(hf_batch.text_part(config), "max_position_embeddings", None)
    longest = longest if type(longest) is int and longest > 0 else None
    samples = batch_size or presets.LM_BATCH_SIZE
    tokens = seq_len or min(presets.LM_SEQ_LEN, longest or presets.LM_SEQ_LEN)
    if longest is not None and tokens > longest:
        raise BadInput(f"{name}: a sequence of {tokens} does not fit max_position_embeddings {longest}")
    takes_text = "input_ids" in inspect.signature(model_class.forward).parameters
    said: list[str] = []

    def make() -> tuple[nn.Module, Any]:
        first: Exception | None = None
        for head, labels in heads:
            try:
                model = _build(head, config, name, experts)
                if not any(p.requires_grad for p in model.parameters()):
                    raise BadInput(f"{name}: every parameter of {head.__name__} is frozen; {_YOUR_OWN}")
                batch, remarks = hf_batch.make(model, config, samples, tokens, labels, _loss)
            except Exception as error:  # the next head may take what this one does not
                first = first or error
                continue
            said[:] = [
                f"transformers' own {head.__name__}, attention by SDPA where it has it, no padding, one sequence per "
                "sample, no cache",
                *remarks,
                *notes,
            ]
            if first is not None:
                said.insert(1, f"{model_class.__name__} stands aside: no batch was found that it takes")
            return model, batch
        assert first is not None
        raise first

    return Workload(
        name,
        make,
        _loss,
        samples,
        samples * tokens if takes_text else samples,
        active_parameters=_active(model_class, config),
        assumptions=Late(said),
    )


def _build(model_class: Any, config: Any, name: str, experts: str | None) -> nn.Module:
    given = {} if experts is None else {"experts_implementation": experts}
    try:
        with _quiet():
            built: nn.Module = model_class._from_config(config, dtype=torch.get_default_dtype(), **given)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, ZeroDivisionError, AssertionError) as error:
        raise BadInput(
            f"{name}: transformers cannot build a {config.model_type} from this config: {type(error).__name__}: {error}"
        ) from error
    return built


def _heads(config: Any) -> list[tuple[Any, str]]:
    """The model classes to train, the first that works, each with what its labels are ('' for none).

    One, where the config names it; else the head of the first task that the architecture has, its body, other heads.
    """
    from transformers.models.auto import modeling_auto

    found: dict[str, Any] = {}
    for task, _ in _HEADS:
        mapping = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING" if task else "MODEL_MAPPING")
        with contextlib.suppress(KeyError):
            classes = mapping[type(config)]
            found[task] = classes[0] if isinstance(classes, tuple) else classes
    if not found:
        found = {"": part} if (part := _part_class(config)) else {}
    if not found:
        raise BadInput(f"{config.model_type} has no head that bursar knows how to train; {_YOUR_OWN}")
    labels = dict(_HEADS)
    for name in config.architectures or ():
        for task, model_class in found.items():
            if model_class.__name__ == name:
                return [(model_class, labels[task])]
        module = sys.modules[next(iter(found.values())).__module__]
        if (named := getattr(module, str(name), None)) is not None and hasattr(named, "_from_config"):
            return [(named, "class" if str(name).endswith(("SequenceClassification", "ImageClassification")) else "")]
    if getattr(config, "is_decoder", False) and "CAUSAL_LM" in found:
        found.pop("MASKED_LM", None)
    ordered: dict[Any, str] = {}
    for task in (next(iter(found)), *([""] if "" in found else []), *found):
        ordered.setdefault(found[task], labels[task])  # one class may do two tasks
    return list(ordered.items())[:MOST_HEADS]


def _part_class(config: Any) -> Any:
    """The class of a part of other models, a tower say, which no Auto class lists; None where it has none."""
    import transformers

    folder = type(config).__module__.rpartition(".")[0]
    if not folder.startswith("transformers.models."):
        return None
    with contextlib.suppress(ImportError):
        module = importlib.import_module(f"{folder}.modeling_{folder.rpartition('.')[2]}")
        classes = [
            c
            for c in vars(module).values()
            if inspect.isclass(c)
            and issubclass(c, transformers.PreTrainedModel)
            and c.config_class is type(config)
            and not c.__name__.endswith("PreTrainedModel")
            and not c.forward.__qualname__.startswith(("_forward_unimplemented", "Module."))
        ]
        return min(classes, key=lambda c: (not c.__name__.endswith("Model"), len(c.__name__)), default=None)
    return None


def _active(model_class: Any, config: Any) -> int | None:
    """Parameters one token passes through: of routed experts the share that is chosen. None where there are none."""
    from bursar.workload import hf_batch

    text = hf_batch.text_part(config)
    sizes = [
        next((n for name in names if type(n := getattr(text, name, None)) is int and n > 0), 0)
        for names in (("num_experts_per_tok", "moe_top_k", "top_k", "moe_k"), _EXPERTS)
    ]
    if not all(sizes) or sizes[0] >= sizes[1]:
        return None
    try:
        with _quiet(), torch.device("meta"):
            model = model_class._from_config(config)
    except Exception:  # `make` says why
        return None
    parts = {id(p): (name, p.numel()) for name, p in model.named_parameters()}
    routed = sum(n for name, n in parts.values() if "experts" in name.split(".") and "shared" not in name)
    total = sum(n for _, n in parts.values())
    return total - routed + routed * sizes[0] // sizes[1] if routed else None


def _loss(model: nn.Module, batch: Any) -> Tensor:
    """The model's own loss; where it has none, the sum of its outputs' means, so that every output has a gradient."""
    out = model(**batch)
    loss = out.get("loss") if isinstance(out, dict) else getattr(out, "loss", None)
    looks = not torch.is_grad_enabled()  # a pass that only looks at the shapes
    if isinstance(loss, Tensor) and (loss.requires_grad or looks):
        return loss if not loss.dim() else loss.mean()
    floats = [t for t in tensors_in(out) if (t.requires_grad or looks) and t.is_floating_point()]
    if not floats:
        return loss_of_output(model, batch)
    return torch.stack([t.float().mean() for t in floats]).sum()


def _without(value: Any, keys: tuple[str, ...]) -> Any:
    """``value`` without those keys, at any depth: the step's precision decides the dtype, not the config."""
    if isinstance(value, dict):
        return {k: _without(v, keys) for k, v in value.items() if k not in keys}
    return value


@contextlib.contextmanager
def _quiet() -> Any:
    """transformers prints advice about kernels when it builds a model."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
