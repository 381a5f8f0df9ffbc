"""One batch for any of transformers' models: by what its forward asks for, in the sizes its config gives.

Token ids are one constant, so that their values are known to a trace: a model may look where its image tokens are.

    B samples   S positions   C channels   T frames of sound or film
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bursar.errors import BadInput

_TEXT = (
    "vlm_config",
    "text_config",
    "language_config",
    "llm_config",
    "decoder",
    "text_encoder",
    "thinker_config",
    "decoder_config",
)
_VISION = (
    "vision_config",
    "vision_tower_config",
    "vit_config",
    "image_config",
    "backbone_config",
    "encoder",
    "vision_encoder_config",
)
_AUDIO = ("audio_config", "audio_encoder_config", "speech_config", "encoder_config", "audio_encoder", "encoder")


def parts(config: Any) -> Iterator[Any]:
    """``config`` and every config inside it."""
    from transformers import PreTrainedConfig

    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from parts(value)


def _part(config: Any, names: tuple[str, ...]) -> Any:
    """The first of the named parts of ``config``, the whole where it has none."""
    from transformers import PreTrainedConfig

    for name in names:
        found = getattr(config, name, None)
        if isinstance(found, PreTrainedConfig):
            return _part(found, names)
    return config


def text_part(config: Any) -> Any:
    """What describes the language model in a config of several models."""
    return _part(config, _TEXT)


@dataclass
class _Sizes:
    """What the makers below ask for."""

    config: Any
    B: int
    S: int
    takes: set[str]

    def size(self, part: Any, *names: str, default: int) -> int:
        """The first of ``names`` that the part of the config, or the whole, has as a number."""
        for config in (part, self.config):
            for name in names:
                value = getattr(config, name, None)
                if isinstance(value, (list, tuple)) and value and isinstance(value[0], int):
                    value = value[0]
                if type(value) is int and value > 0:
                    return value
        return default

    @property
    def vision(self) -> Any:
        return _part(self.config, _VISION)

    @property
    def audio(self) -> Any:
        return _part(self.config, _AUDIO)

    def image(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        vision = self.vision
        value = getattr(vision, "image_size", None) or getattr(self.config, "image_size", None)
        if isinstance(value, dict):
            value = [value.get("height", 224), value.get("width", 224)]
        if isinstance(value, (list, tuple)):
            height, width = int(value[0]), int(value[-1])
        else:
            height = width = value if type(value) is int and value > 0 else 224
        return self.size(vision, "num_channels", "in_channels", "in_chans", default=3), height, width

    def token(self) -> int:
        """An ordinary token: none that the config gives a meaning."""
        special = {
            value
            for config in parts(self.config)
            for name, value in vars(config).items()
            if type(value) is int and (name.endswith(("token_id", "token_index")) or "token_id" in name)
        }
        vocab = self.vocab()
        return next((t for t in range(min(5, vocab - 1), vocab) if t not in special), 0)

    def vocab(self) -> int:
        return self.size(text_part(self.config), "vocab_size", default=1000)

    def ids(self, length: int | None = None) -> Tensor:
        return torch.full((self.B, length or self.S), self.token())


# What a config calls the width of a frame of sound
_BINS = ("input_dim", "input_feat_dim", "input_size", "feature_projection_input_dim", "num_mel_bins", "n_mels",
         "feature_size", "input_feat_per_channel", "num_features")  # fmt: skip


def _frames(s: _Sizes) -> Tensor:
    """Log-mel features. (B, mels, T), or (B, T, mels) for the architectures that take time first."""
    mels = s.size(s.audio, *_BINS, default=80)
    if s.config.model_type.startswith("clap"):
        return torch.randn(s.B, 1, 1024, mels)
    positions = s.size(s.audio, "max_source_positions", default=0)
    if positions and s.config.model_type not in ("speech_to_text",):
        return torch.randn(s.B, mels, 2 * positions)
    return torch.randn(s.B, 128, mels)


def _values(s: _Sizes) -> Tensor:
    """Sound as it is, one second at 16 kHz, or a spectrogram where the model has bins. (B, T), (B, C, T), (B, T, F)."""
    bins = getattr(s.config, "num_mel_bins", None)
    if type(bins) is int and hasattr(s.config, "max_length"):
        return torch.randn(s.B, s.config.max_length, bins)
    if any(hasattr(part, "conv_dim") for part in parts(s.config)):  # wav2vec and its kin
        return torch.randn(s.B, 16000)
    return torch.randn(s.B, s.size(s.config, "audio_channels", default=1), 16000)


def _sound_mask(s: _Sizes) -> Tensor:
    """All of the sound is there. (B, T)"""
    features = _frames(s)
    takes_time_last = s.size(s.audio, "max_source_positions", default=0)
    return torch.ones(s.B, features.shape[-1 if takes_time_last else 1], dtype=torch.long)


def _history(s: _Sizes) -> int:
    lags: list[int] = getattr(s.config, "lags_sequence", None) or [0]
    return s.size(s.config, "context_length", "prediction_length", default=32) + max(lags)


def _series(s: _Sizes, length: int) -> Tensor:
    """A time series. (B, T), or (B, T, C) of several at once."""
    channels = s.size(s.config, "num_input_channels", "input_size", default=1)
    many = channels > 1 or hasattr(s.config, "num_input_channels")
    return torch.randn(s.B, length, channels) if many else torch.randn(s.B, length)


def _images(s: _Sizes) -> Tensor:
    """(B, C, H, W), with frames in a video model (B, T, C, H, W), patches in rows where a grid goes with them."""
    channels, height, width = s.image()
    if "spatial_shapes" in s.takes:
        return torch.randn(s.B, 256, channels * s.size(s.vision, "patch_size", default=16) ** 2)
    if "image_grid_thw" in s.takes or "grid_thw" in s.takes:
        return torch.randn(s.B * _GRID[0] * _GRID[1] * _GRID[2], _row(s))
    pinpoints = getattr(s.config, "image_grid_pinpoints", None)
    if pinpoints and "image_sizes" in s.takes:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        tiles = image_size_to_num_patches([height, width], pinpoints, height)
        return torch.randn(s.B, tiles, channels, height, width)
    if s.config.model_type in _SEVERAL_IMAGES:
        return torch.randn(s.B, 1, channels, height, width)
    if s.config.model_type in ("lightglue", "superglue", "efficientloftr"):  # what matches two pictures
        return torch.randn(s.B, 2, channels, height, width)
    frames = getattr(s.config, "num_frames", None) or getattr(s.vision, "num_frames", None)
    if type(frames) is int and "pixel_values_videos" not in s.takes:
        return torch.randn(s.B, frames, channels, height, width)
    return torch.randn(s.B, channels, height, width)


# Architectures that take several pictures per sample, so that one more dimension
_SEVERAL_IMAGES = ("idefics", "idefics2", "idefics3", "smolvlm", "modernvbert", "colmodernvbert", "granite_docling")
_GRID = (1, 16, 16)  # frames, rows and columns of patches


def _row(s: _Sizes) -> int:
    patch = s.size(s.vision, "patch_size", "spatial_patch_size", default=14)
    return s.image()[0] * patch * patch * s.size(s.vision, "temporal_patch_size", default=1)


def _grid(s: _Sizes) -> Tensor:
    return torch.tensor([list(_GRID)] * s.B)


def _film(s: _Sizes) -> Tensor:
    channels, height, width = s.image()
    frames = s.size(s.vision, "num_frames", "frames_per_clip", default=8)
    return torch.randn(s.B, frames, channels, height, width)


# What a forward's parameter is given, by name
_MAKERS: dict[str, Callable[[_Sizes], Any]] = {
    "input_ids": lambda s: s.ids(),
    "attention_mask": lambda s: torch.ones(s.B, s.S, dtype=torch.long),
    "decoder_input_ids": lambda s: s.ids(),
    "token_type_ids": lambda s: torch.zeros(s.B, s.S, dtype=torch.long),
    "bbox": lambda s: torch.zeros(s.B, s.S, 4, dtype=torch.long),
    "pixel_values": _images,
    "pixel_values_videos": _film,
    "image_grid_thw": _grid,
    "grid_thw": _grid,
    "input_features": _frames,
    "input_values": _values,
    "image_sizes": lambda s: torch.tensor([list(s.image()[1:])] * s.B),
    "hidden_states": lambda s: _images(s),
    "input_features_mask": _sound_mask,
    "feature_attention_mask": _sound_mask,
    "pixel_attention_mask": lambda s: torch.ones(s.B, 256, dtype=torch.long),
    "spatial_shapes": lambda s: torch.tensor([[16, 16]] * s.B),
    "past_values": lambda s: _series(s, _history(s)),
    "past_observed_mask": lambda s: torch.ones_like(_series(s, _history(s))),
    "past_time_features": lambda s: torch.randn(s.B, _history(s), s.size(s.config, "num_time_features", default=1)),
    "future_values": lambda s: _series(s, s.size(s.config, "prediction_length", default=32)),
    "future_time_features": lambda s: torch.randn(
        s.B, s.size(s.config, "prediction_length", default=32), s.size(s.config, "num_time_features", default=1)
    ),
    "visual_feats": lambda s: torch.randn(s.B, 36, s.config.visual_feat_dim),
    "visual_pos": lambda s: torch.rand(s.B, 36, 4),
    "inputs_embeds": lambda s: torch.randn(
        s.B, s.S, s.size(text_part(s.config), "hidden_size", "d_model", default=768)
    ),
    "return_loss": lambda s: True,
}
_ALWAYS = ("input_ids", "bbox", "pixel_values", "image_grid_thw", "image_sizes", "input_features", "input_values",
           "input_features_mask", "feature_attention_mask", "return_loss", "visual_feats", "visual_pos", "past_values",
           "past_time_features", "past_observed_mask", "future_values", "future_time_features")  # fmt: skip


def make(model: nn.Module, config: Any, B: int, S: int, labels: str) -> dict[str, Any]:
    """The keyword arguments of ``model.forward`` for B samples of S positions, with ``labels`` of that sort.

    Raises BadInput, naming the argument, for a forward that needs what there is no maker for.
    """
    parameters = inspect.signature(model.forward).parameters
    needed = {n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    if getattr(config, "is_encoder_decoder", False):
        for key in ("pad_token_id", "decoder_start_token_id"):
            if getattr(config, key, None) is None:
                setattr(config, key, 0)
    main = getattr(model, "main_input_name", "input_ids")
    s = _Sizes(config, B, S, set(parameters))
    wanted = [n for n in parameters if n in needed or n in _ALWAYS or n == main]
    if "input_values" in wanted and "input_features" in wanted:
        wanted.remove("input_values" if main == "input_features" else "input_features")
    if {"spatial_shapes", "pixel_attention_mask"} <= s.takes:
        wanted += ["spatial_shapes", "pixel_attention_mask"]
    batch: dict[str, Any] = {}
    for name in wanted:
        if name in _MAKERS:
            batch[name] = _MAKERS[name](s)
        elif name in needed:
            raise BadInput(
                f"{config.model_type}: the forward of {type(model).__name__} needs {name!r} and bursar cannot make it; "
                "write a callable that returns (module, batch) and give file.py:callable"
            )
    if "labels" in parameters and labels:
        batch["labels"] = _labels(s, labels)
    if "input_features" in batch and "input_ids" not in parameters and "attention_mask" in parameters:
        batch["attention_mask"] = _sound_mask(s)
    if "input_ids" in batch:
        _insert_features(model, s, batch)
    return batch


def _labels(s: _Sizes, what: str) -> Tensor:
    if what == "class":
        return torch.zeros(s.B, dtype=torch.long)
    if what == "transcript":
        return torch.full((s.B, 8), min(s.token(), s.vocab() - 1))
    return s.ids()


# What stands for a picture or a sound in the text, what makes its features, and of what
_INSERTED = (
    (("image_token_id", "image_token_index"), "get_image_features", "pixel_values"),
    (("audio_token_id", "audio_token_index"), "get_audio_features", "input_features"),
)


def _insert_features(model: nn.Module, s: _Sizes, batch: dict[str, Any]) -> None:
    """Put as many image and sound tokens into the text as there are features, as a processor would."""
    inserted: list[Tensor] = []
    for names, method, given in _INSERTED:
        token = next((t for n in names if type(t := getattr(s.config, n, None)) is int), None)
        features = getattr(model, method, None) or getattr(getattr(model, "model", None), method, None)
        if token is None or features is None or given not in batch:
            continue
        takes = inspect.signature(features).parameters
        with torch.no_grad(), torch.device("cpu"):  # where a running model's factories make their tensors
            wanted = {n for n, p in takes.items() if p.default is p.empty or n not in ("input_ids", "labels")}
            passes_on = any(p.kind is p.VAR_KEYWORD for p in takes.values()) and given not in takes
            wanted |= {given, f"{given}_mask"} if passes_on else set()
            out = features(**{k: v for k, v in batch.items() if k in wanted})
        out = getattr(out, "pooler_output", out)
        count = sum(t.numel() // t.shape[-1] for t in (out if isinstance(out, (list, tuple)) else [out])) // s.B
        inserted.append(torch.full((s.B, count), token))
        if "mm_token_type_ids" in s.takes:
            batch["mm_token_type_ids"] = torch.ones(s.B, count, dtype=torch.long)
    if not inserted:
        return
    length = sum(t.shape[1] for t in inserted)
    ids = torch.cat([*inserted, s.ids(max(s.S - length, 16))], 1)
    batch["input_ids"] = ids
    if "mm_token_type_ids" in batch:
        kinds = torch.zeros_like(ids)
        kinds[:, :length] = 1
        batch["mm_token_type_ids"] = kinds
    for name in ("attention_mask", "labels", "token_type_ids"):
        if name in batch:
            batch[name] = torch.ones_like(ids) if name == "attention_mask" else torch.zeros_like(ids)
