"""One batch for any of transformers' models: by what its forward asks for, in the sizes its config gives.

Token ids are one constant, so that their values are known to a trace: a model may look where its image tokens are.

    B samples   S positions   C channels   T frames of sound or film
"""

from __future__ import annotations

import heapq
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bursar.errors import BadInput
from bursar.workload.resolve import tensors_in

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
        if ratios := getattr(self.config, "scaled_images_ratios", None):  # a pyramid of patches
            value: Any = int(self.config.patch_size / min(ratios))
        else:
            value = getattr(vision, "image_size", None) or getattr(self.config, "image_size", None)
            value = value or getattr(self.config, "max_img_size", None)
        if isinstance(value, dict):
            value = [value.get("height", 224), value.get("width", 224)]
        if isinstance(value, (list, tuple)):
            height, width = int(value[0]), int(value[-1])
        else:
            pool = getattr(vision, "pooling_kernel_size", 1)
            side = 224 if type(pool) is not int or pool == 1 else 5 * pool * self.size(vision, "patch_size", default=16)
            height = width = value if type(value) is int and value > 0 else side
        if self.config.model_type == "seggpt":  # which puts a prompt on top
            height //= 2
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
    if s.takes & {"image_grid_thw", "grid_thw", "image_grid_hw", "grid_hw"}:
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


def _patch(s: _Sizes) -> int:
    return s.size(s.vision, "patch_size", "spatial_patch_size", default=14)


def _row(s: _Sizes) -> int:
    patch = _patch(s)
    return s.image()[0] * patch * patch * s.size(s.vision, "temporal_patch_size", default=1)


def _grid(s: _Sizes) -> Tensor:
    return torch.tensor([list(_GRID)] * s.B)


def _film(s: _Sizes) -> Tensor:
    channels, height, width = s.image()
    frames = s.size(s.vision, "num_frames", "frames_per_clip", default=8)
    return torch.randn(s.B, frames, channels, height, width)


def _width(s: _Sizes, *more: str) -> int:
    """The width of the stream of a text model, or of the only model there is."""
    return s.size(text_part(s.config), *more, "hidden_size", "d_model", "embed_dim", "dim", default=768)


def _future(s: _Sizes) -> int:
    return s.size(s.config, "prediction_length", default=32)


def _times(s: _Sizes, length: int) -> Tensor:
    features = getattr(s.config, "num_time_features", 1)
    return torch.randn(s.B, length, features if type(features) is int else 1)


def _patches(s: _Sizes) -> int:
    """How many patches an image has."""
    _, height, width = s.image()
    patch = s.size(s.vision, "patch_size", default=16)
    return (height // patch) * (width // patch)


def _positions(s: _Sizes) -> Tensor:
    """Column and row of each patch. (B, patches, 2)"""
    side = max(1, round(_patches(s) ** 0.5))
    at = torch.arange(_patches(s))
    return torch.stack([at % side, at // side], -1).expand(s.B, -1, -1)


def _zeros(s: _Sizes, *shape: int) -> Tensor:
    return torch.zeros(s.B, *(shape or (s.S,)), dtype=torch.long)


def _ones(s: _Sizes, *shape: int) -> Tensor:
    return torch.ones(s.B, *(shape or (s.S,)), dtype=torch.long)


_Makers = tuple[Callable[[_Sizes], Any], ...]

# What a forward's parameter is given, by name: the first form, and others where architectures differ in what they mean
_MAKERS: dict[str, _Makers] = {
    "input_ids": (
        lambda s: s.ids(),
        lambda s: torch.full((s.B, s.S, _codebooks(s.config)), 5),
        lambda s: torch.full((s.B, _codebooks(s.config), s.S), 5),
        lambda s: torch.full((s.B, s.S, _codebooks(s.config) + 1), 5),  # and one of text
        lambda s: torch.full((s.B * _codebooks(s.config), s.S), 5),
    ),
    "attention_mask": (lambda s: _ones(s), lambda s: _ones(s, 16000), lambda s: _sound_mask(s)),
    "decoder_input_ids": (
        lambda s: s.ids(),
        lambda s: torch.full((s.B, s.S, _codebooks(s.config)), 5),
        lambda s: torch.full((s.B * _codebooks(s.config), s.S), 5),
    ),
    "decoder_attention_mask": (lambda s: _ones(s),),
    "token_type_ids": (lambda s: _zeros(s), lambda s: _zeros(s, s.S, 7)),  # a table's cells have seven
    "position_ids": (lambda s: torch.arange(s.S).expand(s.B, -1), lambda s: torch.arange(s.S).expand(3, s.B, -1)),
    "bbox": (lambda s: _zeros(s, s.S, 4),),
    "pixel_values": (
        lambda s: _images(s),
        lambda s: torch.randn(s.B, 1, *s.image()),
        lambda s: torch.randn(s.B, 2, *s.image()),
        lambda s: torch.randn(s.B, *s.image()),
        lambda s: _film(s),
        lambda s: torch.randn(s.B, _patches(s), s.image()[0] * s.size(s.vision, "patch_size", default=16) ** 2),
        lambda s: torch.randn(s.B * _GRID[0] * _GRID[1] * _GRID[2], _row(s)),
        lambda s: torch.randn(s.B, _GRID[0] * _GRID[1] * _GRID[2], _row(s)),
        lambda s: torch.randn(s.B * _GRID[0] * _GRID[1] * _GRID[2], 2 * _row(s)),
        lambda s: torch.randn(s.B * _GRID[1] * _GRID[2], s.image()[0], *[_patch(s)] * 2),
        lambda s: torch.randn(s.B, 1, 1, *s.image()),
        lambda s: torch.randn(s.B, 2, 3, *s.image()[1:]),
    ),
    "pixel_values_videos": (lambda s: _film(s), lambda s: torch.randn(s.B * _GRID[1] * _GRID[2], _row(s))),
    "image_grid_thw": (lambda s: _grid(s),),
    "video_grid_thw": (lambda s: _grid(s),),
    "grid_thw": (lambda s: _grid(s),),
    "image_grid_hw": (lambda s: _grid(s)[:, 1:],),
    "grid_hw": (lambda s: _grid(s)[:, 1:],),
    "image_merge_sizes": (lambda s: torch.ones(s.B, dtype=torch.long),),
    "merge_sizes": (lambda s: torch.ones(s.B, dtype=torch.long),),
    "target_sizes": (lambda s: _grid(s)[:, 1:],),
    "spatial_shapes": (lambda s: torch.tensor([[16, 16]] * s.B),),
    "image_sizes": (lambda s: torch.tensor([list(s.image()[1:])] * s.B),),
    "input_features": (
        lambda s: _frames(s),
        lambda s: _frames(s).transpose(1, 2),
        lambda s: torch.randn(s.B, 1, 128, s.size(s.audio, *_BINS, default=80)),
        lambda s: torch.randn(s.B, s.size(s.audio, *_BINS, default=80), 128),
        lambda s: torch.randn(s.B, s.size(s.audio, *_BINS, default=80), 3000),
        lambda s: torch.randn(s.B, 128, _bins(s)),
        lambda s: torch.randn(s.B, _bins(s), 200),
        lambda s: torch.randn(s.B, 128, 128),
        lambda s: torch.randn(s.B, 128, 4 * s.size(s.audio, *_BINS, default=80)),
        lambda s: torch.randn(s.B, 128, _width(s)),
    ),
    "audio_mel": (lambda s: torch.randn(s.B, 128, s.size(s.audio, "input_feat_size", default=128)),),
    "audio_mel_mask": (lambda s: torch.zeros(s.B, 128, dtype=torch.bool),),
    "spectrogram_labels": (lambda s: torch.zeros(s.B, s.S, s.size(s.config, "num_mel_bins", default=80)),),
    "pixel_position_ids": (lambda s: _positions(s),),
    "image_position_ids": (lambda s: _positions(s),),
    "input_values": (
        lambda s: _values(s),
        lambda s: torch.randn(s.B, 16000),
        lambda s: torch.randn(s.B, 1, 16000),
        lambda s: torch.randn(s.B, 128, s.size(s.audio, *_BINS, default=80)),
        lambda s: torch.randn(s.B, s.size(s.audio, *_BINS, default=80), 128),
        lambda s: torch.randn(s.B, 24000 * 2),
        lambda s: torch.randn(s.B, 1, 24000 * 2),
    ),
    "audio_values": (lambda s: torch.randn(s.B, s.size(s.audio, "audio_channels", default=1), 16000),),
    "hidden_states": (
        lambda s: _images(s),
        lambda s: torch.randn(s.B, s.S, _width(s)),
        lambda s: torch.randn(s.B * _GRID[1] * _GRID[2], _row(s)),
        lambda s: torch.randn(s.B, _width(s, "latent_channels", "num_mel_bins"), s.S),
        lambda s: torch.randn(s.B, 1, 16000),
        lambda s: _frames(s),
        lambda s: torch.randn(s.S, _width(s)),
    ),
    "input_features_mask": (lambda s: _sound_mask(s),),
    "feature_attention_mask": (lambda s: _sound_mask(s),),
    "mask": (lambda s: torch.ones(s.B, 128, dtype=torch.bool),),
    "padding_mask": (lambda s: _ones(s, 16000), lambda s: _sound_mask(s)),
    "audio_feature_lengths": (lambda s: _sound_mask(s).sum(-1),),
    "feature_lens": (lambda s: _sound_mask(s).sum(-1),),
    "pixel_attention_mask": (
        lambda s: _ones(s, 1, *s.image()[1:]),
        lambda s: _ones(s, *s.image()[1:]),
        lambda s: _ones(s, 1),
        lambda s: _ones(s, 256),
    ),
    "pixel_mask": (lambda s: _ones(s, *s.image()[1:]),),
    "flattened_patches": (
        lambda s: torch.ones(s.B, 256, s.size(s.vision, "patch_embed_hidden_size", default=768) + 2),
    ),
    "bool_masked_pos": (lambda s: torch.arange(_patches(s)).expand(s.B, -1) % 2 == 0,),
    "conditional_pixel_values": (lambda s: torch.randn(s.B, *s.image()),),
    "prompt_pixel_values": (lambda s: torch.randn(s.B, *s.image()),),
    "prompt_masks": (lambda s: torch.randn(s.B, *s.image()),),
    "prompt_depth": (lambda s: torch.randn(s.B, 1, *s.image()[1:]),),
    "past_values": (lambda s: _series(s, _history(s)), lambda s: torch.randn(s.B, _history(s))),
    "past_observed_mask": (lambda s: torch.ones_like(_series(s, _history(s))),),
    "past_time_features": (lambda s: _times(s, _history(s)),),
    "future_values": (lambda s: _series(s, _future(s)),),
    "future_time_features": (lambda s: _times(s, _future(s)),),
    "static_categorical_features": (
        lambda s: _zeros(s, s.size(s.config, "num_static_categorical_features", default=1)),
    ),
    "freq": (lambda s: _zeros(s, 1),),
    "visual_feats": (lambda s: torch.randn(s.B, 36, s.config.visual_feat_dim),),
    "visual_pos": (lambda s: torch.rand(s.B, 36, 4),),
    "visual_embeds": (lambda s: torch.randn(s.B, 36, s.size(s.config, "visual_embedding_dim", default=512)),),
    "inputs_embeds": (lambda s: torch.randn(s.B, s.S, _width(s)),),
    "query_embeds": (lambda s: torch.randn(s.B, s.size(s.config, "num_query_tokens", default=32), _width(s)),),
    "encoder_hidden_states": (
        lambda s: torch.randn(
            s.B, 16, s.size(s.config, "encoder_hidden_size", "cross_attention_hidden_size", default=_width(s))
        ),
    ),
    "decoder_input_values": (lambda s: torch.randn(s.B, 64, s.size(s.config, "num_mel_bins", default=80)),),
    "speaker_embeddings": (lambda s: torch.randn(s.B, s.size(s.config, "speaker_embedding_dim", default=512)),),
    "inputs": (lambda s: s.ids(), lambda s: torch.randn(s.B, *s.image()), lambda s: torch.randn(s.B, s.S, _width(s))),
    "spectrogram": (lambda s: torch.randn(s.B, 64, s.size(s.config, "model_in_dim", "num_mel_bins", default=80)),),
    "duration_labels": (lambda s: _ones(s),),
    "pitch_labels": (lambda s: torch.randn(s.B, s.S, 1),),
    "energy_labels": (lambda s: torch.randn(s.B, s.S, 1),),
    "classes_input_ids": (lambda s: torch.full((2 * s.B, 8), 5),),
    "classes_attention_mask": (lambda s: torch.ones(2 * s.B, 8, dtype=torch.long),),
    "tasks_input_ids": (lambda s: torch.full((s.B, 8), 5),),
    "tasks_attention_mask": (lambda s: _ones(s, 8),),
    "classes_structure": (lambda s: torch.full((s.B,), 2),),
    "task_inputs": (lambda s: torch.full((s.B, s.size(s.config, "task_seq_len", default=77)), 5),),
    "image_embeds_position_mask": (
        lambda s: torch.arange(max(s.S, 80)).expand(s.B, -1) < s.size(s.config, "latent_query_num", default=64),
    ),
    "states": (lambda s: torch.randn(s.B, s.S, s.config.state_dim),),
    "actions": (
        lambda s: torch.randn(
            s.B, s.size(s.config, "chunk_size", default=s.S), s.size(s.config, "act_dim", "max_action_dim", default=1)
        ),
    ),
    "state": (lambda s: torch.randn(s.B, s.size(s.config, "max_state_dim", default=32)),),
    "image_attention_mask": (lambda s: _ones(s, s.S, 1),),
    "latents": (
        lambda s: torch.randn(s.B, s.S, _width(s)),
        lambda s: torch.randn(s.B, _width(s), s.S),
    ),
    "context": (lambda s: torch.randn(s.B, s.S, _width(s)),),
    "image": (lambda s: torch.randn(s.B, *s.image()),),
    "rewards": (lambda s: torch.randn(s.B, s.S, 1),),
    "returns_to_go": (lambda s: torch.randn(s.B, s.S, 1),),
    "timesteps": (lambda s: _zeros(s), lambda s: _zeros(s, 1)[:, 0]),
    "entity_ids": (lambda s: _ones(s, 4),),
    "entity_position_ids": (lambda s: _zeros(s, 4, 8),),
    "input_points": (lambda s: torch.rand(s.B, 1, 2, 2) * 64,),
    "noise": (lambda s: torch.randn(s.B, s.size(s.config, "model_in_channels", default=64), 64),),
    "mm_token_type_ids": (lambda s: _zeros(s),),
    "patch_lengths": (lambda s: torch.full((s.B, s.S // 4), 4),),
    "return_loss": (lambda s: True,),
}
# And what stands for the names that are not in the table
_BY_ENDING: dict[str, _Makers] = {
    "_mask": (lambda s: _ones(s), lambda s: _ones(s, *s.image()[1:]), lambda s: _ones(s, _patches(s))),
    "_ids": (lambda s: _zeros(s), lambda s: torch.arange(s.S).expand(s.B, -1)),
    "_values": (lambda s: torch.randn(s.B, *s.image()), lambda s: torch.randn(s.B, 16000)),
    "_embeds": (lambda s: torch.randn(s.B, s.S, _width(s)),),
    "_states": (lambda s: torch.randn(s.B, s.S, _width(s)),),
    "_features": (lambda s: torch.randn(s.B, s.S, _width(s)),),
    "_lengths": (lambda s: torch.full((s.B,), s.S),),
}
# Given wherever the forward has them
_ALWAYS = frozenset(
    """
    input_ids bbox pixel_values image_grid_thw image_sizes input_features input_values input_features_mask
    feature_attention_mask return_loss visual_feats visual_pos past_values past_time_features
    past_observed_mask future_values future_time_features patch_lengths states actions rewards returns_to_go
    timesteps spectrogram_labels duration_labels pitch_labels energy_labels
""".split()
)
_MAIN = ("pixel_values", "input_features", "input_values")
_TEXT_ONLY = frozenset({"input_ids", "attention_mask", "decoder_input_ids", "token_type_ids", "labels"})
MOST_TRIES = 40


def _codebooks(config: Any) -> int:
    """How many tokens of sound stand at one position."""
    names = ("num_codebooks", "n_codebooks", "num_code_groups", "num_channels", "n_q")
    return next((n for c in parts(config) for name in names if type(n := getattr(c, name, None)) is int), 1)


def _bins(s: _Sizes) -> int:
    """The width of a frame of sound, of whichever part says it."""
    return next((n for c in parts(s.config) for name in _BINS if type(n := getattr(c, name, None)) is int), 80)


def _makers(name: str) -> _Makers:
    """How the parameter of that name can be filled, first what is likely."""
    if (name.startswith(("output_", "use_", "return_")) and name not in _MAKERS) or name.endswith("past_key_values"):
        return ()  # a flag, or a cache
    return _MAKERS.get(name) or next((m for end, m in _BY_ENDING.items() if name.endswith(end)), ())


@dataclass(frozen=True)
class _Choice:
    """What differs from the batch that is made first: parameters in another form, given besides or not; no labels."""

    forms: tuple[tuple[str, int], ...] = ()
    added: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    labelled: bool = True

    def __str__(self) -> str:
        said = [f"{name} in form {form + 1}" for name, form in self.forms]
        said += [f"{name} given" for name in self.added] + [f"no {name}" for name in self.dropped]
        return ", ".join([*said, *([] if self.labelled else ["no labels: the loss is the mean of each output"])])


def make(
    model: nn.Module, config: Any, B: int, S: int, labels: str, loss: Callable[[nn.Module, Any], Tensor]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The keyword arguments of ``model.forward`` for B samples of S positions, and what was assumed for them.

    A model of text is given what its kind takes, with ``labels`` of that sort. What other models take differs more than
    their configs say, so the batch is tried: where ``loss`` of the model fails, the parameters named in its error are
    given too, or one parameter takes another form, and the try that came furthest is followed. Raises the error of the
    first try where none of `MOST_TRIES` works.
    """
    from bursar.trace.session import looking

    parameters = inspect.signature(model.forward).parameters
    if getattr(config, "is_encoder_decoder", False):
        for key in ("pad_token_id", "decoder_start_token_id"):
            if getattr(config, key, None) is None:
                setattr(config, key, 0)
    first: Exception | None = None
    tried = {_Choice()}
    # How many modules the try it follows called, negative; its number; the choice; how that try ended
    todo: list[tuple[int, int, _Choice, str]] = [(0, 0, _Choice(), "")]
    on_meta = any(p.is_meta for p in model.parameters())
    plain = not getattr(config, "is_encoder_decoder", False) and _codebooks(config) == 1
    for _ in range(MOST_TRIES):
        if not todo:
            break
        came_to, _, choice, end = heapq.heappop(todo)
        batch: dict[str, Any] = {}
        with looking() as calls:
            try:
                _fill(batch, model, config, B, S, labels, choice)
                if on_meta or (choice == _Choice() and plain and set(batch) <= _TEXT_ONLY):
                    return batch, ()
                training = model.training
                model.train().to(torch.empty(0).device)  # some parameters are made on the host wherever the model is
                with torch.device("cpu"):  # where a running model's factories make their tensors
                    loss(model, batch)
                model.train(training)
                return batch, (
                    f"the batch is what the model was found to take: {choice}",
                ) if choice != _Choice() else ()
            except Exception as error:
                first = first or error
                ended = f"{len(calls)} {error!r}"
                if len(calls) < -came_to or ended == end:
                    continue  # a step back, or none
                for following in _others(choice, batch, parameters, error):
                    if following not in tried:
                        tried.add(following)
                        heapq.heappush(todo, (-len(calls), len(tried), following, ended))
    assert first is not None
    raise first


def _others(choice: _Choice, batch: dict[str, Any], parameters: Any, error: Exception) -> Iterator[_Choice]:
    """What to try after ``error``: first what it names; inputs that the model can do without go late."""
    says = str(error)
    left = ("labels", *choice.added, *choice.dropped)
    missing = [n for n in parameters if n not in batch and n not in left and _makers(n)]
    named = tuple(n for n in missing if re.search(rf"\b{n}\b", says))
    if named:
        yield replace(choice, added=choice.added + named)
    if "labels" in batch:
        yield replace(choice, labelled=False)
    optional = [n for n in batch if parameters[n].default is not inspect.Parameter.empty and n not in choice.added]
    without = {
        n: replace(choice, dropped=(*choice.dropped, *(m for m in (n, f"{n}_mask") if m in batch)))
        for n in optional
        if n not in ("input_ids", "labels")
    }
    yield from (c for n, c in without.items() if n not in _MAIN)
    forms = dict(choice.forms)
    for form in range(max((len(_makers(name)) for name in batch), default=0)):
        for name in batch:
            if form < len(_makers(name)) and form != forms.get(name, 0):
                yield replace(choice, forms=tuple({**forms, name: form}.items()))
    yield from (c for n, c in without.items() if n in _MAIN)  # a picture goes after what describes it
    if "NoneType" in says or not batch or isinstance(error, ValueError):
        for name in missing:
            if name not in ("attention_mask", "position_ids", "inputs_embeds", "decoder_attention_mask"):
                yield replace(choice, added=(*choice.added, name))


def _fill(batch: dict[str, Any], model: nn.Module, config: Any, B: int, S: int, labels: str, choice: _Choice) -> None:
    """Put a batch of that choice into ``batch``. Raises BadInput, naming the argument that there is no maker for."""
    parameters = inspect.signature(model.forward).parameters
    needed = {n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    main = getattr(model, "main_input_name", "input_ids")
    s = _Sizes(config, B, S, set(parameters))
    wanted = [n for n in parameters if n in needed or n in _ALWAYS or n == main or n in choice.added]
    wanted = [n for n in wanted if n not in choice.dropped and not _left_out(config, n)]
    if {"input_values", "input_features"} <= set(wanted) and not {"input_values", "input_features"} <= needed:
        wanted.remove("input_values" if main == "input_features" else "input_features")
    if {"spatial_shapes", "pixel_attention_mask"} <= s.takes:
        wanted += ["spatial_shapes"]
        batch["pixel_attention_mask"] = _ones(s, 256)
    forms = dict(choice.forms)
    for name in wanted:
        if makers := _makers(name):
            batch[name] = makers[forms.get(name, 0)](s)
        elif name in needed:
            raise BadInput(
                f"{config.model_type}: the forward of {type(model).__name__} needs {name!r} and bursar cannot make it; "
                "write a callable that returns (module, batch) and give file.py:callable"
            )
    if "labels" in parameters and labels and choice.labelled:
        batch["labels"] = _labels(s, labels)
    masked = "attention_mask" in parameters and "attention_mask" not in choice.dropped
    if "input_features" in batch and "input_ids" not in parameters and masked:
        batch["attention_mask"] = _sound_mask(s)
    if "input_ids" in batch:
        _insert_features(model, s, batch)


_TOWERS = (("pixel_values", "vision_config"), ("input_features", "audio_config"), ("input_values", "audio_config"))


def _left_out(config: Any, name: str) -> bool:
    """Whether the parameter is for a tower that the config could have and has not."""
    return any(name.startswith(given) and getattr(config, part, config) is None for given, part in _TOWERS)


def _labels(s: _Sizes, what: str) -> Tensor:
    if what == "class":
        return torch.zeros(s.B, dtype=torch.long)
    if what == "transcript":
        return torch.full((s.B, 8), min(s.token(), s.vocab() - 1))
    return s.ids()


_IMAGE_TOKENS = ("image_token_id", "image_token_index", "image_token", "im_patch_id", "image_patch_id")

# What stands for a picture or a sound in the text, what makes its features, and of what
_INSERTED = (
    (_IMAGE_TOKENS, "get_image_features", "pixel_values"),
    (_IMAGE_TOKENS, "get_image_features", "pixel_values_images"),
    (("video_token_id", "video_token_index"), "get_video_features", "pixel_values"),
    (("audio_token_id", "audio_token_index"), "get_audio_features", "input_features"),
    (("audio_token_id", "audio_token_index"), "get_audio_features", "input_values"),
)


def _insert_features(model: nn.Module, s: _Sizes, batch: dict[str, Any]) -> None:
    """Put as many image and sound tokens into the text as there are features, as a processor would."""
    inserted: list[Tensor] = []
    for names, method, given in _INSERTED:
        features = next((getattr(m, method) for m in model.modules() if hasattr(m, method)), None)
        if features is None or given not in batch:
            continue
        token = _token_for(s, names)
        if token is None:
            continue
        takes = inspect.signature(features).parameters
        if method == "get_video_features" and given not in takes:
            continue
        with torch.device("cpu"):  # where a running model's factories make their tensors
            wanted = {n for n, p in takes.items() if p.default is p.empty or n not in ("input_ids", "labels")}
            passes_on = any(p.kind is p.VAR_KEYWORD for p in takes.values()) and given not in takes
            wanted |= {given, f"{given}_mask"} if passes_on else set()
            out = features(**{k: v for k, v in batch.items() if k in wanted})
        out = getattr(out, "pooler_output", out)
        count = sum(t.numel() // t.shape[-1] for t in tensors_in(out)) // s.B
        inserted.append(torch.full((s.B, count), token))
    if not inserted:
        return
    length = sum(t.shape[1] for t in inserted)
    ids = torch.cat([*inserted, s.ids(max(s.S - length, 16))], 1)
    batch["input_ids"] = ids
    if "mm_token_type_ids" in s.takes:
        kinds = torch.zeros_like(ids)
        kinds[:, :length] = 1
        batch["mm_token_type_ids"] = kinds
    for name in ("attention_mask", "labels", "token_type_ids"):
        if name in batch:
            batch[name] = torch.ones_like(ids) if name == "attention_mask" else torch.zeros_like(ids)


def _token_for(s: _Sizes, names: tuple[str, ...]) -> int | None:
    """The token that stands for a feature: the config's, the last of the vocabulary where it leaves it open."""
    for config in parts(s.config):
        for name in names:
            if type(token := getattr(config, name, None)) is int:
                return token
    for config in parts(s.config):
        for name in names:
            if name in vars(config):
                setattr(config, name, s.vocab() - 1)
                return s.vocab() - 1
    return None
