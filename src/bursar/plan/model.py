"""MODEL, as a user writes it, to the decoder that planning lays out: a preset or a `config.json`. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from bursar import architecture
from bursar.architecture import Network
from bursar.errors import BadInput, UnknownName
from bursar.jobs import Decoder, Latent, decoder

SEQ_LEN: Final = 4096  # where nobody says and the model has no longest

# Keys of config.json whose shapes are a Llama's with other numbers: what transformers calls them.
_LLAMA_LIKE: Final = ("mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3")


def read(text: str) -> tuple[Decoder, int]:
    """The decoder that ``text`` names, and the longest sequence it was made for (`SEQ_LEN` where nothing says).

    Raises UnknownName for a name that no preset has, BadInput for what is no decoder or a config that cannot be read.
    """
    name = text.split(":")[0]
    if name in architecture.known_models():
        shape = architecture.preset(text)
        longest = SEQ_LEN if isinstance(shape, Network) else shape.max_seq_len
        return decoder(shape), longest
    path = Path(text)
    if path.suffix == ".json" or (path.is_dir() and (path / "config.json").is_file()):
        return _from_config(path if path.suffix == ".json" else path / "config.json")
    if ".py" in text or ":" in text:
        raise BadInput(
            f"{text} is code: plan and levers need a shape, a preset or a Hugging Face config.json; "
            "bursar step traces code, on one device"
        )
    raise UnknownName("model", text, architecture.known_models(), "Or give a config.json.")


def _from_config(path: Path) -> tuple[Decoder, int]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise BadInput(f"{path} is no JSON: {error}") from None
    if isinstance(config, Mapping) and config.get("model_type") in _LLAMA_LIKE:
        return llama_like(config, path.parent.name or path.stem)
    shape = architecture.from_hf_config(config, path.parent.name or path.stem)
    return decoder(shape), shape.max_seq_len


def llama_like(config: Mapping[str, Any], name: str) -> tuple[Decoder, int]:
    """Mistral, Mixtral, Qwen and DeepSeek from their ``config.json``. Raises BadInput for a key that is not there."""

    def size(*keys: str, default: int | None = None) -> int:
        for key in keys:
            value = config.get(key)
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                    raise BadInput(f"config.json: '{key}' must be a whole number, not {value!r}")
                return value
        if default is None:
            raise BadInput(f"config.json of a {config['model_type']} needs '{keys[0]}'")
        return default

    d, heads = size("hidden_size"), size("num_attention_heads")
    if not d or not heads:
        raise BadInput("config.json: 'hidden_size' and 'num_attention_heads' must be at least 1")
    experts = size("n_routed_experts", "num_local_experts", "num_experts", default=0)
    d_ff = size("intermediate_size")
    moe_d_ff = size("moe_intermediate_size", default=d_ff)
    shared = size("n_shared_experts", default=0)
    latent = None
    if config.get("kv_lora_rank"):
        latent = Latent(
            size("q_lora_rank", default=0), size("kv_lora_rank"), size("qk_nope_head_dim"), size("qk_rope_head_dim"),
            size("v_head_dim"),
        )  # fmt: skip
    windowed = config.get("use_sliding_window", config["model_type"] in ("mistral", "mixtral"))
    made = Decoder(
        name, size("num_hidden_layers"), d, heads, size("num_key_value_heads", default=heads),
        size("head_dim", default=d // heads), d_ff, True, size("vocab_size"), bool(config.get("tie_word_embeddings")),
        n_experts=experts,
        experts_per_token=size("num_experts_per_tok", default=2) if experts else 0,
        moe_d_ff=moe_d_ff if experts else 0,
        n_shared_experts=shared,
        shared_d_ff=shared * moe_d_ff if experts else 0,
        first_dense_layers=size("first_k_dense_replace", default=0),
        moe_every=size("moe_layer_freq", "decoder_sparse_step", default=1) or 1,
        sliding_window=size("sliding_window", default=0) if windowed else 0,
        latent=latent,
        mtp_layers=size("num_nextn_predict_layers", default=0),
    )  # fmt: skip
    return made, size("max_position_embeddings", default=SEQ_LEN)
