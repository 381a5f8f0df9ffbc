"""Every architecture that transformers can build: does one training step of it trace, and is anything uncounted?

    python benchmarks/architectures.py [--sample N] [--only TYPE,TYPE] [--jobs 2] [--markdown FILE]

Each model type's default config, cut to few layers and experts (widths stay: a trace has no data, so they cost
nothing), is written as a config.json and traced as `bursar step config.json` would: forward, backward, AdamW, on the
fake GPU. Each runs in its own process with a time limit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SECONDS = 90  # for one type
SAMPLES, POSITIONS = 2, 32
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "depth",
           "num_encoder_layers", "num_decoder_layers", "num_blocks", "encoder_num_layers", "decoder_num_layers",
           "num_block_layers", "num_attention_layers", "num_mtp_layers", "text_num_hidden_layers")  # fmt: skip
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
MOST_LAYERS, MOST_EXPERTS = 2, 8

# Where cutting a type's default config by rule breaks it: what to set instead, and why.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"vision_config.hidden_size": 8192},  # the tower's output must be the text's width
    "gemma3": {"vision_config.image_size": 896},  # 256 image tokens need 64 patches a side, as in the published model
    "xmod": {"default_language": "en_XX"},  # a model of several languages must be told one
    "wav2vec2-conformer": {"vocab_size": 32},  # a CTC head needs a vocabulary; the default has none
    "aya_vision": {"vision_config.num_attention_heads": 16},  # 14 heads do not divide 1152
}


def cut(config: Any) -> None:
    """Fewer layers and experts, in ``config`` and every config in it; lists with an entry per layer follow."""
    from transformers import PreTrainedConfig, ResNetConfig

    if hasattr(config, "neck_hidden_sizes") or hasattr(config, "backbone_out_indices"):
        return  # a neck reads as many layers as it has inputs
    backbone = getattr(config, "backbone_config", None)
    if getattr(backbone, "model_type", "") == "timm_backbone":
        config.backbone_config = ResNetConfig(out_features=["stage2", "stage3", "stage4"])  # timm is not installed
    for name in _LAYERS:
        n = getattr(config, name, None)
        if type(n) is int and n > 4:  # four may be the stages of a pyramid
            lists = {k: v for k, v in vars(config).items() if isinstance(v, list) and len(v) == n and k[0] != "_"}
            keep = max((len({str(e) for e in v}) for v in lists.values() if isinstance(v[0], str)), default=MOST_LAYERS)
            keep = min(max(keep, MOST_LAYERS), n)
            for key, value in lists.items():
                setattr(config, key, _kinds_first(value, keep))
            setattr(config, name, keep)
            for key in ("out_features", "out_indices", "stage_names", "_out_features", "_out_indices"):
                vars(config).pop(key, None)  # they name layers by number
            config.was_cut = True
    for name in _EXPERTS:
        n = getattr(config, name, None)
        if type(n) is int and n > MOST_EXPERTS:
            setattr(config, name, MOST_EXPERTS)
            for group in ("n_group", "topk_group"):
                if getattr(config, group, None):
                    setattr(config, group, 1)
            for top in ("num_experts_per_tok", "top_k", "moe_top_k", "moe_k"):
                if type(k := getattr(config, top, None)) is int:
                    setattr(config, top, min(k, 2))
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            cut(value)
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("mrope_section"):  # some defaults' sections do not add up to their heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        half = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
        rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    text, vision = getattr(config, "text_config", None), getattr(config, "vision_config", None)
    if hasattr(text, "hidden_size"):  # the default towers of some families do not fit together
        for name in ("out_hidden_size", "projection_dim") if hasattr(vision, "out_hidden_size") else ():
            if hasattr(vision, name):
                setattr(vision, name, text.hidden_size)


def _kinds_first(per_layer: list[Any], keep: int) -> list[Any]:
    """``keep`` entries with every sort of layer among them, in their order."""
    chosen: list[int] = []
    for i, value in enumerate(per_layer):
        if value not in [per_layer[j] for j in chosen]:
            chosen.append(i)
    chosen = chosen[:keep]
    chosen += [i for i in range(len(per_layer)) if i not in chosen][: keep - len(chosen)]
    return [per_layer[i] for i in sorted(chosen)]


def write_config(kind: str, folder: Path) -> Path:
    """The config.json of a cut ``kind``."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind]()
    cut(config)
    for name, value in EXCEPTIONS.get(kind, {}).items():
        owner = config
        *way, last = name.split(".")
        for part in way:
            owner = getattr(owner, part)
        setattr(owner, last, value)
    path = folder / "config.json"
    path.write_text(json.dumps({**_plain(json.loads(config.to_json_string(use_diff=True))), "model_type": kind}))
    return path


def _plain(value: Any) -> Any:
    """Without what numbers layers where layers were cut: it follows from their number."""
    if isinstance(value, dict):
        numbered = ("out_features", "out_indices", "stage_names", "per_layer_config", "_out_features", "_out_indices")
        dropped = ("was_cut", *numbered) if value.get("was_cut") else ()
        if value.get("time_step_limit"):  # transformers refuses its own, a pair written as a list
            dropped = (*dropped, "time_step_limit")
        return {k: _plain(v) for k, v in value.items() if k not in dropped}
    return value


def trace(kind: str) -> dict[str, Any]:
    """What became of one type: FLOPs, ops, what is uncounted, or why it failed."""
    from bursar.workload import hf
    from bursar.workload.step import run

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            ledger = run(hf.workload(write_config(kind, Path(folder)), SAMPLES, POSITIONS))
            found: dict[str, Any] = {
                "flops": ledger.flops.model,
                "ops": len(ledger),
                "head": next((a for a in ledger.assumptions if a.startswith("transformers' own")), "")
                .split()[2]
                .strip(","),
                "uncounted": [u.op for u in ledger.uncounted],
                "notes": [a for a in ledger.assumptions if "not counted" in a or "balanced" in a or "0.5" in a],
            }
        except BaseException as error:
            last = [f for f in traceback.extract_tb(error.__traceback__) if "transformers" in f.filename][-1:]
            where = f"{Path(last[0].filename).name}:{last[0].lineno} {last[0].line}" if last else ""
            found = {
                "error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300],
                "where": where[:160],
            }
    return {"type": kind, "seconds": round(time.perf_counter() - started, 1), **found}


def in_process(kind: str) -> dict[str, Any]:
    """`trace` in a fork of this process, which has torch and transformers loaded, killed after SECONDS."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        os.close(reads)
        try:
            signal.alarm(SECONDS)
            resource.setrlimit(resource.RLIMIT_AS, (24 * 2**30, 24 * 2**30))
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            os.write(writes, json.dumps(trace(kind)).encode())
        finally:
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if answer:
        return json.loads(answer)
    return {"type": kind, "seconds": SECONDS, "error": f"no answer: wait status {status} (a signal, or {SECONDS} s)"}


# What is no failure to trace: transformers itself does not build the model, here or at all
_NOT_BUILT = (
    ("has no head", "no Auto class builds it: it is a part of another model, and is traced in that"),
    ("requires the", "needs a package that is not installed"),
    ("No module named", "needs a package that is not installed"),
    ("cannot build", "transformers does not build a model from its default config, cut"),
    ("refuses this config", "transformers refuses its own default config, cut"),
    ("missing the required", "has no forward"),
    ("Could not find", "transformers does not find the class"),
    ("Unrecognized model type", "transformers refuses its own default config, cut"),
)


def not_built(row: dict[str, Any]) -> str:
    """Why transformers has no model of this type to trace; empty where it has."""
    return next((why for sign, why in _NOT_BUILT if sign in row.get("error", "")), "")


def page(rows: list[dict[str, Any]]) -> str:
    """The table as committed."""
    import torch
    import transformers

    import bursar

    built = [r for r in rows if not not_built(r)]
    traced = [r for r in built if "error" not in r]
    clean = [r for r in traced if not r["uncounted"]]
    lines = [
        "# Architectures of transformers, traced",
        "",
        f"{datetime.date.today()}, `benchmarks/architectures.py`, bursar {bursar.__version__}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, {os.cpu_count()} cores. "
        "One training step (forward, backward, AdamW) on the fake GPU, the default config cut to few layers.",
        "",
        f"- {len(rows)} model types; transformers builds {len(built)} of them here",
        f"- **{len(traced)} of {len(built)} traced ({len(traced) / max(1, len(built)):.1%})**, "
        f"{len(clean)} with nothing uncounted",
        "",
        "## Not traced",
        "",
        "| type | why | at |",
        "|---|---|---|",
        *(f"| {r['type']} | {_cell(r['error'])} | {_cell(r.get('where', ''))} |" for r in built if "error" in r),
        "",
        "## Traced, with ops that have no rule",
        "",
        *(f"- {r['type']}: {', '.join(r['uncounted'])}" for r in traced if r["uncounted"]),
        "",
        "## Not built by transformers here",
        "",
    ]
    for why in dict.fromkeys(why for _, why in _NOT_BUILT):
        types = [r["type"] for r in rows if not_built(r) == why]
        if types:
            lines.append(f"- {why} ({len(types)}): {', '.join(types)}")
    lines += ["", "## Traced", "", "| type | head | ops | model FLOPs | assumed |", "|---|---|---:|---:|---|"]
    for r in traced:
        lines.append(f"| {r['type']} | {r['head']} | {r['ops']} | {r['flops']:,} | {_cell('; '.join(r['notes']))} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text for a cell of a table, without this machine's paths."""
    text = re.sub(r"(/[\w.\-]+)+/(site-packages/)?", "", text)
    text = re.sub(r"tmp\w{8}", "config", text)
    return text.replace("|", "\\|").replace("<", "‹").replace(">", "›")[:200]


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--sample", type=int)
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--only", default="")
    asked.add_argument("--jobs", type=int, default=2)
    asked.add_argument("--json", type=Path)
    asked.add_argument("--markdown", type=Path)
    options = asked.parse_args()
    warnings.simplefilter("ignore")
    import torch
    import transformers.models.bert.modeling_bert  # noqa: F401  (what every type needs, loaded before the forks)
    from transformers.models.auto import modeling_auto  # noqa: F401
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    import bursar.workload.hf_batch
    import bursar.workload.step  # noqa: F401
    from bursar.trace import accelerator

    torch.set_num_threads(1)
    accelerator.install()

    kinds = sorted(CONFIG_MAPPING_NAMES)
    if options.only:
        kinds = options.only.split(",")
    if options.sample:
        kinds = sorted(random.Random(options.seed).sample(kinds, options.sample))
    rows = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(in_process, kinds):
            rows.append(row)
            said = row.get("error") or ", ".join(row["uncounted"]) or f"{row['flops']:,} FLOPs"
            print(f"{row['type']:32} {row['seconds']:5} s  {said}  {row.get('where', '')}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=0))
    traced = [r for r in rows if "error" not in r]
    print(f"{len(traced)} of {len(rows)}; uncounted in {sum(bool(r['uncounted']) for r in traced)}", file=sys.stderr)
    if options.markdown:
        options.markdown.write_text(page(rows))


if __name__ == "__main__":
    main()
