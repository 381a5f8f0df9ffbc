"""Every architecture that transformers can build: does one training step of it trace, and is anything uncounted?

    python benchmarks/architectures.py [--sample N] [--only TYPE,TYPE] [--jobs 2] [--markdown FILE]

Each model type's default config, cut to few layers and experts (widths stay: a trace has no data, so they cost
nothing), is written as a config.json and traced as `bursar step config.json` would: forward, backward, AdamW, on the
fake GPU. A worker per job runs many types, each with a limit of processor time.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import queue
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

SECONDS = 100  # of processor time, for one type
TYPES = 100  # for one process: what torch and transformers keep of each adds up
SAMPLES, POSITIONS = 2, 32
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "depth",
           "num_encoder_layers", "num_decoder_layers", "num_blocks", "encoder_num_layers", "decoder_num_layers",
           "num_block_layers", "num_attention_layers", "num_mtp_layers", "text_num_hidden_layers")  # fmt: skip
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
MOST_LAYERS, MOST_EXPERTS = 2, 8

_ROPES = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}

_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 24, 24]}  # half of a head of 128

# Where cutting a type's default config by rule breaks it: what to set instead, and why.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"vision_config.hidden_size": 8192},  # the tower's output must be the text's width
    "gemma3": {"vision_config.image_size": 896},  # 256 image tokens need 64 patches a side, as in the published model
    "xmod": {"default_language": "en_XX"},  # a model of several languages must be told one
    "wav2vec2-conformer": {"vocab_size": 32},  # a CTC head needs a vocabulary; the default has none
    "autoformer": {"prediction_length": 24},  # it has no default
    "informer": {"prediction_length": 24},
    "time_series_transformer": {"prediction_length": 24},
    "aya_vision": {"vision_config.num_attention_heads": 16, "vision_config.image_size": 364},  # 14 does not divide 1152
    "aria": {"vision_config.image_size": 980, "vision_config.patch_size": 14},  # it knows two numbers of patches
    "cohere_compass_text": {"rope_parameters": _ROPES},  # no default
    "cohere_compass": {"text_config.rope_parameters": _ROPES},
    "dbrx": {"attn_config.rope_theta": 5e5, "attn_config.clip_qkv": 8.0},  # no default
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse"],
        "vision_config.encoder_config.hidden_size": 896,
        "text_config.num_experts_per_tok": 2,
    },  # no default
    "deepseek_v2": {"num_experts_per_tok": 2},  # no default
    **{kind: {"text_config.rope_parameters": _MROPE} for kind in ("glm4v", "glm46v", "glm_image", "glmga")},
    **{kind: {"rope_parameters": _MROPE} for kind in ("glm4v_text", "glm46v_text", "glm_image_text")},
    "glm4v_moe": {"text_config.rope_parameters": {**_MROPE, "mrope_section": [3, 4, 4]}},
    "glm4v_moe_text": {"rope_parameters": {**_MROPE, "mrope_section": [3, 4, 4]}},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "moonshine_streaming": {"num_key_value_heads": 8},  # no default
    "ministral": {"head_dim": 128},  # no default
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},  # no default
    **{kind: {"head_dim": 128} for kind in ("hunyuan_v1_dense", "hunyuan_v1_moe")},  # no default
    "hunyuan_vl": {"text_config.head_dim": 128, "text_config.rope_parameters": _MROPE},
    "hunyuan_vl_text": {"head_dim": 128, "rope_parameters": _MROPE},
    "reformer": {"axial_pos_shape": [4, 8]},  # its product is the length of a sequence in training
    **{kind: {"attention_window": 16} for kind in ("longformer", "led")},  # a sequence is padded to the window
    "vilt": {"image_size": 64},  # it asks its mask where the picture ends; so many values a trace knows
    "step3p7": {"text_config.sliding_window": 512},  # no default
    "pp_doclayout_v2": {"class_thresholds": [0.5] * 25, "class_order": [0] * 25},  # no default
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},  # no default
    "esm": {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1},  # no default
    "diffusion_gemma": {
        "text_config.num_experts": 8,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 704,
    },  # no default
    "chameleon": {"vocabulary_map": {"<image>": 8711}},  # no default
    "emu3": {"vocabulary_map": {"<image>": 8711}},
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


def write_config(kind: str, folder: Path, whole: bool = False) -> Path:
    """The config.json of ``kind``, cut, or the ``whole`` default."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind]()
    if not whole:
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
    """What became of one type: FLOPs, ops, what is uncounted, or why it failed, cut and whole."""
    started = time.perf_counter()
    found = attempt(kind, whole=False)
    if "error" in found and not found["error"].startswith("UnknownName"):
        again = attempt(kind, whole=True)  # the fault may be the cutting's
        if "error" not in again or again["stage"] == "trace" != found["stage"]:
            found = again
    return {"type": kind, "seconds": round(time.perf_counter() - started, 1), **found}


def attempt(kind: str, whole: bool) -> dict[str, Any]:
    """One try with the cut or the whole default config. ``stage`` is how far it came: config, build, trace, done."""
    from bursar.errors import BadInput
    from bursar.workload import hf
    from bursar.workload.step import run

    stage = "config"
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = write_config(kind, Path(folder), whole)
            try:
                work = hf.workload(path, SAMPLES, POSITIONS)
            except BadInput as error:
                if "does not fit max_position_embeddings" not in str(error):
                    raise
                work = hf.workload(path, SAMPLES)  # as long as fits
            stage = "trace"
            ledger = run(work, fold=whole)
            head = next((a for a in ledger.assumptions if a.startswith("transformers' own")), "")
            return {
                "stage": "done",
                "whole": whole,
                "flops": ledger.flops.model,
                "ops": len(ledger),
                "head": head.split()[2].strip(","),
                "uncounted": [u.op for u in ledger.uncounted],
                "notes": [a for a in ledger.assumptions if any(sign in a for sign in _NOTED)],
            }
        except BaseException as error:
            last = [f for f in traceback.extract_tb(error.__traceback__) if "transformers" in f.filename][-1:]
            where = f"{Path(last[0].filename).name}:{last[0].lineno} {last[0].line}" if last else ""
            says = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return {
                "stage": "build" if "cannot build" in says else stage,
                "whole": whole,
                "error": says,
                "where": where,
            }


_NOTED = ("not counted", "balanced", "0.5", "found to take", "stands aside", "finite", "blank")


def work() -> None:
    """A worker: torch and transformers loaded once, a type's name per line in, its row per line out."""
    out = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (24 * 2**30, 24 * 2**30))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # at its end the worker dies, and another takes its place
        row = trace(line.strip())
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(row), file=out, flush=True)


class Worker:
    """A process that traces one type after another; a new one when it died of one or has done `TYPES`."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.done = 0

    def ask(self, kind: str) -> dict[str, Any]:
        """The row of ``kind``."""
        if self.process is None or self.done >= TYPES:
            self.end()
            command = [sys.executable, __file__, "--worker"]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self.done = 0
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(kind, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        self.done += 1
        if answer:
            return json.loads(answer)
        code = self.process.wait()
        self.process = None
        why = (
            f"more than {SECONDS} s of processor time" if code == -signal.SIGPROF else f"the process ended with {code}"
        )
        return {"type": kind, "seconds": SECONDS, "stage": "trace", "error": why}

    def end(self) -> None:
        """No more types."""
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait()
            self.process = None


# What is no failure to trace: transformers itself does not build the model here, from its default config or at all
_NOT_BUILT = (
    ("has no head", "no class of its own with a forward: a part of another model, traced in that"),
    ("requires the", "needs a package that is not installed"),
    ("No module named", "needs a package that is not installed"),
    ("cannot build", "its default config, cut and whole, does not build"),
    ("refuses this config", "transformers refuses its own default config"),
    ("validator", "transformers refuses its own default config"),
    ("missing the required", "its class has no forward: its parts are trained, and stand here themselves"),
    ("is frozen", "every parameter is frozen"),
    ("Could not find", "transformers does not find the class"),
    ("Unrecognized model type", "transformers refuses its own default config"),
)


_INPUTS = ("pixel_values", "input_features", "input_values")


def not_built(row: dict[str, Any]) -> str:
    """Why transformers has no model of this type to train; empty where it has."""
    return next((why for sign, why in _NOT_BUILT if sign in row.get("error", "")), "")


def auto_types() -> set[str]:
    """The types that one of transformers' Auto classes builds; the others are parts of models: towers, codecs."""
    from transformers.models.auto import modeling_auto

    names = [n for n in dir(modeling_auto) if n.startswith("MODEL_") and n.endswith("MAPPING_NAMES")]
    return {kind for name in names for kind in getattr(modeling_auto, name)}


def page(rows: list[dict[str, Any]]) -> str:
    """The table as committed."""
    import torch
    import transformers

    import bursar

    auto = auto_types()
    built = [r for r in rows if not not_built(r)]
    whole = [r for r in built if r["type"] in auto]
    traced = [r for r in built if "error" not in r]
    assumed = [" ".join(r["notes"]) for r in traced]

    def share(of: list[dict[str, Any]]) -> str:
        n = sum("error" not in r for r in of)
        return f"{n} of {len(of)} ({n / max(1, len(of)):.1%})"

    lines = [
        "# Architectures of transformers, traced",
        "",
        f"{datetime.date.today()}, `benchmarks/architectures.py`, bursar {bursar.__version__}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, {os.cpu_count()} cores. "
        "One training step (forward, backward, AdamW) on the fake GPU. The config is the type's default, cut to few "
        "layers and experts; whole where that does not run; with the fields of `EXCEPTIONS` where the default lacks "
        "what the model needs.",
        "",
        f"- {len(rows)} model types, {sum(r['type'] in auto for r in rows)} of them built by an Auto class; the others "
        "are parts (towers, decoders, codecs), traced alone where they have a class of their own",
        f"- **of the types an Auto class builds here, {share(whole)} trace a training step**; with the parts, "
        f"{share(built)}",
        f"- {sum(not r['uncounted'] for r in traced)} of the {len(traced)} have nothing uncounted",
        f"- of these, {sum('found to take' in a for a in assumed)} on a batch found by trying, "
        f"{sum('no labels' in a for a in assumed)} of them without labels (the loss is the mean of each output); "
        f"{sum('stands aside' in a for a in assumed)} by another head than the first, or the body, for no batch was "
        "found that the first takes",
        f"- {sum(any(f'no {n}' in a for n in _INPUTS) for a in assumed)} on text alone, without picture or sound: "
        f"{', '.join(r['type'] for r, a in zip(traced, assumed, strict=True) if any(f'no {n}' in a for n in _INPUTS))}",
        "",
        "## Not traced",
        "",
        "| type | why | at |",
        "|---|---|---|",
        *(
            f"| {r['type']}{' (part)' * (r['type'] not in auto)} | {_cell(r['error'])} | {_cell(r.get('where', ''))} |"
            for r in sorted(built, key=lambda r: (r["type"] not in auto, r["type"]))
            if "error" in r
        ),
        "",
        "## Traced, with ops that have no rule",
        "",
        *([f"- {r['type']}: {', '.join(r['uncounted'])}" for r in traced if r["uncounted"]] or ["None."]),
        "",
        "## Not built by transformers here",
        "",
    ]
    for why in dict.fromkeys(why for _, why in _NOT_BUILT):
        types = [r for r in rows if not_built(r) == why]
        if types:
            lines += [f"{why[0].upper()}{why[1:]} ({len(types)}):", ""]
            lines += [f"- {r['type']}: {_cell(r['error'])}" for r in types]
            lines.append("")
    lines += ["## Traced", "", "| type | head | ops | model FLOPs | assumed |", "|---|---|---:|---:|---|"]
    for r in traced:
        lines.append(f"| {r['type']} | {r['head']} | {r['ops']} | {r['flops']:,} | {_cell('; '.join(r['notes']))} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text for a cell of a table: one line, without this machine's paths, ending where a word does."""
    text = re.sub(r"(/[\w.\-]+)+/(site-packages/)?", "", text)
    text = re.sub(r"tmp\w{8}: ", "", text)
    text = text.partition(". Take the value from a Python number")[0].partition("; write a callable")[0]
    text = text.partition("You can install it")[0].partition("Please install it")[0]
    for sign, written in (("|", "\\|"), ("<", "‹"), (">", "›")):
        text = text.replace(sign, written)
    return text.strip() if len(text) < 300 else f"{text[:300].rpartition(' ')[0]} …"


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    asked.add_argument("--sample", type=int)
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--only", default="")
    asked.add_argument("--after", type=Path, help="keep what this file of --json has traced, do the rest")
    asked.add_argument("--jobs", type=int, default=2)
    asked.add_argument("--json", type=Path)
    asked.add_argument("--markdown", type=Path)
    options = asked.parse_args()
    if options.worker:
        work()
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kinds = sorted(CONFIG_MAPPING_NAMES)
    if options.only:
        kinds = options.only.split(",")
    if options.sample:
        kinds = sorted(random.Random(options.seed).sample(kinds, options.sample))
    rows: list[dict[str, Any]] = []
    if options.after:
        last = {r["type"]: r for line in options.after.read_text().splitlines() if (r := json.loads(line))}
        kinds = [k for k in kinds if "error" in last.get(k, {"error": ""})]
        rows = [r for kind, r in last.items() if kind not in kinds]
    todo, answered = iter(kinds), queue.Queue[dict[str, Any]]()

    def one_after_another() -> None:
        worker = Worker()
        for kind in todo:  # next() of one iterator is atomic
            answered.put(worker.ask(kind))
        worker.end()

    for _ in range(options.jobs):
        threading.Thread(target=one_after_another, daemon=True).start()
    with contextlib.ExitStack() as open_files:
        log = options.json and open_files.enter_context(options.json.open("a"))
        for _ in kinds:
            row = answered.get()
            rows.append(row)
            if log:
                print(json.dumps(row), file=log, flush=True)
            said = row.get("error") or ", ".join(row["uncounted"]) or f"{row['flops']:,} FLOPs"
            print(f"{row['type']:32} {row['seconds']:5} s  {said}  {row.get('where', '')}", flush=True)
    traced = [r for r in rows if "error" not in r]
    print(f"{len(traced)} of {len(rows)}; uncounted in {sum(bool(r['uncounted']) for r in traced)}", file=sys.stderr)
    if options.markdown:
        options.markdown.write_text(page(sorted(rows, key=lambda r: r["type"])))


if __name__ == "__main__":
    main()
