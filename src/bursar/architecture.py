"""The shapes of models: transformers and a few small networks, and how many parameters a shape has.

Shapes come from `catalog/models.toml` (`preset`) or from a Hugging Face `config.json` (`from_hf_config`); nothing here
runs a model. Letters, as in the notes and in CS336:

    V vocab_size   T max_seq_len   L n_layers   d d_model   h n_heads   kv n_kv_heads   F d_ff       (transformers)
    B batch        D width in      H hidden     K width out L layers    R image side                 (other networks)
    E experts      k of them per token          N layers that are not all alike, or a state's size (Mamba)

A transformer block, and the letters of its weights (`kv·c = d` without grouped-query attention; c is `head_dim`):

    gpt, llama    x + attention(norm(x)),  x + mlp(norm(x)),  then one last norm and the head
    bert          norm(x + attention(x)),  norm(x + mlp(x)),  then the masked-language-model head
    attention     q: d·h·c   k: d·kv·c   v: d·kv·c   o: h·c·d
    mlp           gated (SwiGLU): 3·d·F      plain: 2·d·F
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any, Literal

from bursar.errors import BadInput, UnknownName

Family = Literal["gpt", "llama", "bert"]
Kind = Literal[
    "two-layer", "cruncher", "mlp", "resnet50", "mobilenet-v2", "vit", "t5", "mamba", "mixtral", "deepseek-v3"
]


@dataclass(frozen=True, slots=True)
class Transformer:
    """One transformer's shape: everything its parameters, FLOPs and activations follow from.

    Raises `BadInput` for a shape no model can have (a size below 1, heads that do not divide).
    """

    name: str
    family: Family
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    gated_mlp: bool
    vocab_size: int
    max_seq_len: int
    tied_embeddings: bool
    norm: Literal["layernorm", "rmsnorm"]
    bias: bool  # in every linear layer of a block; never in the head, save BERT's
    position: Literal["learned", "rope"]
    rope_theta: float | None  # None where positions are learned
    norm_eps: float
    source: str
    n_token_types: int = 0  # BERT's segment embedding; the other families have none

    def __post_init__(self) -> None:
        for size in ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab_size", "max_seq_len"):
            if getattr(self, size) < 1:
                raise BadInput(f"{self.name}: {size} must be at least 1, not {getattr(self, size)}")
        if self.n_heads % self.n_kv_heads:
            raise BadInput(
                f"{self.name}: {self.n_heads} query heads cannot share {self.n_kv_heads} key-value heads evenly; "
                "n_kv_heads must divide n_heads"
            )
        if self.family != "llama" and (self.n_heads * self.head_dim, self.n_kv_heads) != (self.d_model, self.n_heads):
            raise BadInput(
                f"{self.name}: a {self.family} has n_heads × head_dim = d_model and a key-value head for each query "
                f"head, not {self.n_heads} × {self.head_dim} for {self.d_model} with {self.n_kv_heads} key-value heads"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise BadInput(f"{self.name}: rotary positions turn pairs, so head_dim must be even, not {self.head_dim}")

    def parameter_groups(self) -> dict[str, int]:
        """Parameters by the part of the model they stand in; `parameters()` is their sum.

        `embedding` holds the token table, and the head's too when the two are tied (`head` is then what the head has
        of its own: nothing, or BERT's transform). Source: the hand derivation in this module's docstring.
        """
        d, f, v, layers = self.d_model, self.d_ff, self.vocab_size, self.n_layers
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        n_in = 2 if self.gated_mlp else 1  # matrices d -> F
        one_norm = d if self.norm == "rmsnorm" else 2 * d  # scale, and LayerNorm's shift

        attention = d * q + 2 * d * kv + q * d
        mlp = (n_in + 1) * d * f
        if self.bias:
            attention += q + 2 * kv + d
            mlp += n_in * f + d

        head = 0 if self.tied_embeddings else v * d
        if self.family == "bert":
            head += (
                d * d + d + one_norm + v
            )  # transform, its norm, the decoder's bias (Devlin et al. 2018, section 3.1)
        return {
            "embedding": v * d + self.n_token_types * d,
            "position": self.max_seq_len * d if self.position == "learned" else 0,
            "attention": layers * attention,
            "mlp": layers * mlp,
            "norm": (2 * layers + 1) * one_norm,  # the odd one: after the blocks, in BERT before them
            "head": head,
        }

    def parameters(self) -> int:
        """Number of trainable parameters, a tied table counted once."""
        return sum(self.parameter_groups().values())

    def twelve_d2_l(self) -> tuple[int, int]:
        """The rule of thumb 12·d²·L, and the exact parameters it stands for: the blocks' attention and mlp.

        It holds for d_ff = 4d, plain, with all heads; norms and biases, tables and head are none of it.

        >>> preset("gpt3-175b").twelve_d2_l()
        (173946175488, 173956792320)
        """
        groups = self.parameter_groups()
        return 12 * self.d_model**2 * self.n_layers, groups["attention"] + groups["mlp"]

    def published_activation_bytes(self, batch: int, seq_len: int) -> tuple[int, int]:
        """Bytes one layer keeps for backward: 34·s·b·h without attention's scores, and the 5·a·s²·b that they add.

        For a GPT block in 16 bits with dropout and stored scores: d_ff = 4d, nothing sharded, nothing recomputed. The
        paper counts neither norms' statistics nor the causal mask. Source: Korthikanti et al. 2022 (arXiv:2205.05198),
        section 4.1, equation 1.

        >>> [preset("gpt3-175b").published_activation_bytes(1, T)[1] for T in (2048, 4096)]
        [2013265920, 8053063680]
        """
        return 34 * seq_len * batch * self.d_model, 5 * self.n_heads * seq_len**2 * batch


@dataclass(frozen=True, slots=True)
class Network:
    """A network that is not a transformer: its kind, and its sizes by letter."""

    name: str
    kind: Kind
    sizes: Mapping[str, int]
    source: str

    def __post_init__(self) -> None:
        for letter, size in self.sizes.items():
            if size < 1:
                raise BadInput(f"{self.name}: {letter} must be at least 1, not {size}")

    def parameters(self) -> int:
        """Number of trainable parameters."""
        return NETWORK_PARAMETERS[self.kind](self.sizes)

    def active_parameters(self) -> int:
        """Parameters that one token passes through: of a mixture's experts the k chosen, of the rest all."""
        if "E" not in self.sizes:
            return self.parameters()
        return NETWORK_PARAMETERS[self.kind]({**self.sizes, "E": self.sizes["k"]}) + _router(self.sizes)

    @property
    def has_sequence(self) -> bool:
        """Whether a sample is a sequence of tokens, at most T of them."""
        return "T" in self.sizes


# ---- parameters of the networks, by hand


def _mlp_parameters(sizes: Mapping[str, int]) -> int:
    """Linear layers with bias: D -> H, L times H -> H, H -> K."""
    d, h, n, k = (sizes[letter] for letter in "DHLK")
    return (d * h + h) + n * (h * h + h) + (h * k + k)


def _resnet50_parameters(sizes: Mapping[str, int]) -> int:
    """He et al. 2015, table 1: convolutions without bias, a BatchNorm (2 per channel) after each, one linear head.

    A bottleneck of width w on c channels is 1x1 (c, w), 3x3 (w, w), 1x1 (w, 4w); the first of a stage also projects
    its input to 4w by a 1x1.
    """
    total = 7 * 7 * 3 * 64 + 2 * 64  # stem
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        total += channels * 4 * width + 2 * 4 * width  # projection
        for _ in range(blocks):
            total += channels * width + 9 * width * width + width * 4 * width + 2 * (width + width + 4 * width)
            channels = 4 * width
    return total + channels * sizes["K"] + sizes["K"]


def _mobilenet_parameters(sizes: Mapping[str, int]) -> int:
    """Sandler et al. 2018, table 2: convolutions without bias, a BatchNorm after each, one linear head."""
    stages = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
    total, channels = 27 * 32 + 2 * 32, 32
    for expansion, out, blocks in stages:
        for _ in range(blocks):
            wide = expansion * channels
            total += (channels * wide + 2 * wide if expansion > 1 else 0) + 9 * wide + 2 * wide + wide * out + 2 * out
            channels = out
    return total + channels * 1280 + 2 * 1280 + 1280 * sizes["K"] + sizes["K"]


def _vit_parameters(s: Mapping[str, int]) -> int:
    """Dosovitskiy et al. 2020, section 3.1: patches, class token, positions, blocks with biases, last norm, head."""
    d, f, patches = s["d"], s["F"], (s["R"] // s["P"]) ** 2
    block = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 2 * 2 * d
    return (3 * s["P"] ** 2 * d + d) + d + (patches + 1) * d + s["L"] * block + 2 * d + d * s["K"] + s["K"]


def _t5_parameters(s: Mapping[str, int]) -> int:
    """Raffel et al. 2019: no biases; each stack has 32 position biases per head and a last norm; one tied table."""
    d, attention, mlp = s["d"], 4 * s["d"] * s["h"] * s["c"], 2 * s["d"] * s["F"]
    encoder, decoder = attention + mlp + 2 * d, 2 * attention + mlp + 3 * d
    return s["V"] * d + s["N"] * (encoder + decoder) + 2 * (d + 32 * s["h"])


def _mamba_parameters(s: Mapping[str, int]) -> int:
    """Gu and Dao 2023, section 3.4: inner width 2d, a convolution of 4, state N, step of rank R; tied table."""
    d, i, n, r = s["d"], 2 * s["d"], s["N"], s["R"]
    mixer = d * 2 * i + (4 * i + i) + i * (r + 2 * n) + (r * i + i) + i * n + i + i * d
    return s["V"] * d + s["L"] * (mixer + d) + d


def _mixtral_parameters(s: Mapping[str, int]) -> int:
    """Jiang et al. 2024, section 2: Llama's attention, E gated experts and a router in every layer, untied head."""
    d, kv = s["d"], s["kv"] * s["d"] // s["h"]
    block = 2 * d * d + 2 * d * kv + s["E"] * 3 * d * s["F"] + s["E"] * d + 2 * d
    return 2 * s["V"] * d + s["L"] * block + d


def _deepseek_parameters(s: Mapping[str, int]) -> int:
    """DeepSeek-AI 2024, section 2.1: latent attention, then a dense network in the first layers and experts after."""
    d, h = s["d"], s["h"]
    attention = d * s["q"] + s["q"] + s["q"] * h * (s["nope"] + s["rope"])
    attention += d * (s["kv"] + s["rope"]) + s["kv"] + s["kv"] * h * (s["nope"] + s["v"]) + h * s["v"] * d
    mixture = (s["E"] + 1) * 3 * d * s["M"] + s["E"] * d  # one expert more that all share, and the router
    mlps = s["dense"] * 3 * d * s["F"] + (s["N"] - s["dense"]) * mixture
    return 2 * s["V"] * d + s["N"] * (attention + 2 * d) + mlps + d


def _router(s: Mapping[str, int]) -> int:
    """What a token meets of the routers beyond those of its own k experts: every expert's row."""
    return (s["E"] - s["k"]) * s["d"] * (s["L"] if "L" in s else s["N"] - s["dense"])


NETWORK_PARAMETERS: dict[Kind, Callable[[Mapping[str, int]], int]] = {
    "two-layer": lambda s: s["D"] * s["D"] + s["D"] * s["K"],
    "cruncher": lambda s: s["L"] * s["D"] * s["D"] + s["D"],
    "mlp": _mlp_parameters,
    "resnet50": _resnet50_parameters,
    "mobilenet-v2": _mobilenet_parameters,
    "vit": _vit_parameters,
    "t5": _t5_parameters,
    "mamba": _mamba_parameters,
    "mixtral": _mixtral_parameters,
    "deepseek-v3": _deepseek_parameters,
}


# ---- the catalogue

# What a family settles, so that a row need not say it. Eps: each family's own code and config.
FAMILIES: dict[Family, dict[str, Any]] = {
    "gpt": {
        "gated_mlp": False,
        "tied_embeddings": True,
        "norm": "layernorm",
        "bias": True,
        "position": "learned",
        "rope_theta": None,
        "norm_eps": 1e-5,
    },
    "llama": {
        "gated_mlp": True,
        "tied_embeddings": False,
        "norm": "rmsnorm",
        "bias": False,
        "position": "rope",
        "rope_theta": 10000.0,
        "norm_eps": 1e-5,
    },
    "bert": {
        "gated_mlp": False,
        "tied_embeddings": True,
        "norm": "layernorm",
        "bias": True,
        "position": "learned",
        "rope_theta": None,
        "norm_eps": 1e-12,
        "n_token_types": 2,
    },
}

# What may follow a transformer's name, `llama3-8b:L=4,kv=2`, and the field it sets.
TRANSFORMER_KEYS: dict[str, str] = {
    "L": "n_layers",
    "d": "d_model",
    "h": "n_heads",
    "kv": "n_kv_heads",
    "F": "d_ff",
    "V": "vocab_size",
    "T": "max_seq_len",
}


@cache
def _catalogue() -> Mapping[str, Transformer | Network]:
    """Every row of `catalog/models.toml`, by name."""
    rows = tomllib.loads(files("bursar").joinpath("catalog", "models.toml").read_text(encoding="utf-8"))
    return MappingProxyType({name: _from_row(name, row) for name, row in rows.items()})


def _from_row(name: str, row: dict[str, Any]) -> Transformer | Network:
    """One row of the catalogue as a record."""
    if "kind" in row:
        return Network(name, row["kind"], MappingProxyType(row["sizes"]), row["source"])
    return _transformer(name, **row)


def _transformer(name: str, family: Family, **given: Any) -> Transformer:
    """A transformer from the fields given, the rest its family's or following from them."""
    fields_of_it: dict[str, Any] = {**FAMILIES[family], "n_kv_heads": given["n_heads"], **given}
    if "head_dim" not in given:
        fields_of_it["head_dim"] = _head_dim(name, given["d_model"], given["n_heads"])
    return Transformer(name=name, family=family, **fields_of_it)


def _head_dim(name: str, d_model: int, n_heads: int) -> int:
    """`d_model / n_heads`, which must come out even."""
    if n_heads < 1 or d_model % n_heads:
        raise BadInput(f"{name}: a width of {d_model} does not divide into {n_heads} heads")
    return d_model // n_heads


def known_models() -> tuple[str, ...]:
    """The names of all presets, in the catalogue's order."""
    return tuple(_catalogue())


def preset_keys(name: str) -> tuple[str, ...]:
    """The keys a preset's name may be followed by. Raises `UnknownName` for a name that is not in the catalogue."""
    row = _row(name)
    return tuple(TRANSFORMER_KEYS) if isinstance(row, Transformer) else tuple(row.sizes)


def parse_preset(text: str) -> tuple[str, dict[str, int]]:
    """Split `two-layer:D=512,K=10` into `("two-layer", {"D": 512, "K": 10})`.

    Keys come back as `preset_keys` spells them; the same letter in the other case is understood too (`d` for `D`, `H`
    for `h`), as no preset uses both. Raises `UnknownName` for a model or a key that is not known, and `BadInput` for a
    value that is not a whole number of at least 1.

    >>> parse_preset("two-layer:D=512,K=10")
    ('two-layer', {'D': 512, 'K': 10})
    >>> parse_preset("gpt2:D=256,h=4")
    ('gpt2', {'d': 256, 'h': 4})
    """
    name, colon, rest = text.partition(":")
    _row(name)
    sizes: dict[str, int] = {}
    for item in rest.split(",") if colon else ():
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise BadInput(
                f"cannot read '{item.strip()}' in '{text}'; write {name}:{preset_keys(name)[0]}=8, commas between"
            )
        try:
            size = int(value)
        except ValueError:
            raise BadInput(f"{key} in '{text}' must be a whole number, not '{value}'") from None
        _set_size(sizes, name, key, size)
    return name, sizes


def preset(text: str, **sizes: int) -> Transformer | Network:
    """The shape behind a preset's name, `gpt2` or `gpt2:L=2,d=256`, or `preset("gpt2", L=2, d=256)`.

    What a transformer is not told follows what it is told: `head_dim` is `d / h`, multi-head attention stays
    multi-head when `h` changes, and a feed-forward of `4d` stays `4d` when `d` changes; any other `F` stays as it is.
    Raises as `parse_preset` does, and `BadInput` for sizes that do not fit together.
    """
    name, given = parse_preset(text)
    for key, size in sizes.items():
        _set_size(given, name, key, size)
    row = _row(name)
    if not given:
        return row
    full_name = f"{name}:" + ",".join(f"{key}={size}" for key, size in given.items())
    if isinstance(row, Network):
        return replace(row, name=full_name, sizes=MappingProxyType({**row.sizes, **given}))
    return _resized(row, full_name, {TRANSFORMER_KEYS[key]: size for key, size in given.items()})


def _row(name: str) -> Transformer | Network:
    """The catalogue's row, or `UnknownName`."""
    if name not in _catalogue():
        raise UnknownName("model", name, known_models())
    return _catalogue()[name]


def _set_size(sizes: dict[str, int], name: str, key: str, size: int) -> None:
    """Write `size` under the key's one spelling."""
    known = preset_keys(name)
    spelled = key if key in known else key.swapcase()
    if spelled not in known:
        raise UnknownName(f"size of {name}", key, known)
    if spelled in sizes:
        raise BadInput(f"{name}: {spelled} is given twice")
    if not _is_whole(size):
        raise BadInput(f"{name}: {spelled} must be a whole number, not {size!r}")
    if size < 1:
        raise BadInput(f"{name}: {spelled} must be at least 1, not {size}")
    sizes[spelled] = size


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # True is an int to Python, not to a user


def _resized(base: Transformer, name: str, given: dict[str, int]) -> Transformer:
    """`base` with the fields given, and those that follow from them."""
    d_model, n_heads = given.get("d_model", base.d_model), given.get("n_heads", base.n_heads)
    follows: dict[str, int] = {}
    if "d_model" in given or "n_heads" in given:
        follows["head_dim"] = _head_dim(name, d_model, n_heads)
    if base.n_kv_heads == base.n_heads:
        follows["n_kv_heads"] = n_heads
    if base.d_ff == 4 * base.d_model:
        follows["d_ff"] = 4 * d_model
    changes: dict[str, Any] = {**follows, **given}
    return replace(base, name=name, **changes)


# ---- Hugging Face config.json

# field of Transformer -> key of the config, per model_type: what has to be there, ...
_HF_REQUIRED: dict[str, dict[str, str]] = {
    "gpt2": {
        "n_layers": "n_layer",
        "d_model": "n_embd",
        "n_heads": "n_head",
        "vocab_size": "vocab_size",
        "max_seq_len": "n_positions",
    },
    "llama": {
        "n_layers": "num_hidden_layers",
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "d_ff": "intermediate_size",
        "vocab_size": "vocab_size",
        "max_seq_len": "max_position_embeddings",
    },
    "bert": {
        "n_layers": "num_hidden_layers",
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "d_ff": "intermediate_size",
        "vocab_size": "vocab_size",
        "max_seq_len": "max_position_embeddings",
    },
}
# ... and what may be left out or null (the family's value, or what follows from the shape, is then taken)
_HF_OPTIONAL: dict[str, dict[str, str]] = {
    "gpt2": {"d_ff": "n_inner", "tied_embeddings": "tie_word_embeddings", "norm_eps": "layer_norm_epsilon"},
    "llama": {
        "n_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "tied_embeddings": "tie_word_embeddings",
        "norm_eps": "rms_norm_eps",
        "rope_theta": "rope_theta",
    },
    "bert": {
        "tied_embeddings": "tie_word_embeddings",
        "norm_eps": "layer_norm_eps",
        "n_token_types": "type_vocab_size",
    },
}
_HF_FAMILY: dict[str, Family] = {"gpt2": "gpt", "llama": "llama", "bert": "bert"}
# Switches that would add parameters this module does not count: only the value written here is accepted.
_HF_FIXED: dict[str, dict[str, object]] = {
    "gpt2": {"add_cross_attention": False},
    "llama": {},
    "bert": {"add_cross_attention": False, "position_embedding_type": "absolute"},
}
_FIELD_TYPE = {field.name: field.type for field in fields(Transformer)}


def from_hf_config(config: Mapping[str, object], name: str = "") -> Transformer:
    """The shape a Hugging Face `config.json` (already parsed) describes; no code of the model is run.

    `model_type` must be gpt2, llama or bert: the language model with its head (`GPT2LMHeadModel`, `LlamaForCausalLM`,
    `BertForMaskedLM`). `rope_scaling` is not read, as it changes no shape. Raises `UnknownName` for another
    `model_type` and `BadInput`, naming the key, for one that is missing or malformed.
    """
    if not isinstance(config, Mapping):
        raise BadInput(f"a config.json holds one object of keys and values, not a {type(config).__name__}")
    model_type = config.get("model_type")
    if model_type is None:
        raise BadInput(f"config.json has no 'model_type'; bursar reads {', '.join(_HF_FAMILY)}")
    if not isinstance(model_type, str) or model_type not in _HF_FAMILY:
        raise UnknownName("model_type", str(model_type), tuple(_HF_FAMILY))
    for key, only in _HF_FIXED[model_type].items():
        if config.get(key, only) != only:
            raise BadInput(f"config.json: bursar counts {model_type} with '{key}' {only!r} only, not {config[key]!r}")

    given: dict[str, Any] = {}
    for field, key in _HF_REQUIRED[model_type].items():
        if config.get(key) is None:
            raise BadInput(f"config.json of a {model_type} needs '{key}'")
        given[field] = _checked(field, key, config[key])
    for field, key in _HF_OPTIONAL[model_type].items():
        if config.get(key) is not None:
            given[field] = _checked(field, key, config[key])

    if model_type == "gpt2":
        given.setdefault("d_ff", 4 * given["d_model"])  # `n_inner: null` means 4·n_embd
    if model_type == "llama":
        given["bias"] = _llama_bias(config)
        rope = config.get("rope_parameters")  # where transformers 5 keeps rope_theta
        if isinstance(rope, Mapping) and rope.get("rope_theta") is not None:
            given["rope_theta"] = _checked("rope_theta", "rope_parameters.rope_theta", rope["rope_theta"])

    label = name or str(config.get("_name_or_path") or model_type)
    return _transformer(label, _HF_FAMILY[model_type], source=f"config.json of model_type {model_type}", **given)


def _checked(field: str, key: str, value: object) -> object:
    """`value` if it is what the field holds: a positive whole number, a positive number, or true/false."""
    kind = _FIELD_TYPE[field]
    if kind == "bool":
        good, wanted = isinstance(value, bool), "true or false"
    elif kind == "int":
        good, wanted = _is_whole(value), "a whole number of at least 1"
    else:
        good, wanted = isinstance(value, int | float) and not isinstance(value, bool), "a number above 0"
    if not good or (not isinstance(value, bool) and not value > 0):  # type: ignore[operator]  # a number by now
        raise BadInput(f"config.json: '{key}' must be {wanted}, not {value!r}")
    return value


def _llama_bias(config: Mapping[str, object]) -> bool:
    """Whether the blocks have biases: `attention_bias` and `mlp_bias`, which must agree."""
    given = {key: config.get(key) or False for key in ("attention_bias", "mlp_bias")}
    for key, value in given.items():
        if not isinstance(value, bool):
            raise BadInput(f"config.json: '{key}' must be true or false, not {value!r}")
    if given["attention_bias"] != given["mlp_bias"]:
        raise BadInput(
            "config.json: bursar counts biases everywhere or nowhere; 'attention_bias' and 'mlp_bias' differ"
        )
    return bool(given["attention_bias"])
