"""Folding: the ledger written from four blocks equals the one traced from all, row for row."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import bursar
from bursar import folding
from bursar.folding import Unfoldable, splice
from bursar.workload import repeats


def same(folded, whole):
    """Rows, memory and every total."""
    assert folded.recorded == whole.recorded
    assert folded.ops.equals(whole.ops)
    for figure in ("peak_bytes", "reserved_bytes", "at_peak", "between_steps", "textbook", "holdings"):
        assert getattr(folded.memory, figure) == getattr(whole.memory, figure), figure
    timelines = (folded.memory.timeline, whole.memory.timeline)
    assert all((timelines[0][c] == timelines[1][c]).all() for c in folded.memory.at_peak)
    for figure in ("model", "step", "flops", "bytes_moved", "uncounted", "replicas"):
        assert getattr(folded, figure) == getattr(whole, figure), figure


def was_folded(ledger):
    """A ledger written from a shallow copy holds the recorded step alone."""
    return ledger.first_row == 0


def both(model, batch=None, **options):
    folded = bursar.step(model, batch, **options)
    whole = bursar.step(model, batch, fold=False, **options)
    same(folded, whole)
    return folded


# ---- splicing


def test_splice_repeats_the_third_stretch_up_and_the_second_down():
    up = splice([0, 1, 2, 3], lambda a, b: True, 2, [""] * 4)
    assert up == [(0, 0, True), (1, 0, True), (2, 0, True), (2, 1, True), (2, 2, True), (3, 2, True)]
    down = splice([3, 2, 1, 0], lambda a, b: True, 2, [""] * 4)
    assert down == [(0, 2, True), (1, 2, True), (2, 2, True), (2, 1, True), (2, 0, True), (3, 0, True)]


def test_what_stands_between_two_blocks_goes_with_the_first():
    order = splice([None, 0, None, 1, None, 2, None, 3, None], lambda a, b: True, 1, [""] * 9)
    assert [i for i, _, _ in order] == [0, 1, 2, 3, 4, 5, 6, 5, 6, 7, 8]


@pytest.mark.parametrize("tags", [[1, 2], [0, 1, 3], [0, 1, 0, 1], [2, 1, 0]])
def test_blocks_not_passed_in_turn_do_not_fold(tags):
    with pytest.raises(Unfoldable):
        splice(tags, lambda a, b: True, 2, [""] * len(tags))


def test_stretches_that_differ_do_not_fold():
    with pytest.raises(Unfoldable):
        splice([0, 1, 2, 3], lambda a, b: False, 2, [""] * 4)


# ---- presets: no block beyond the fourth is even built


@pytest.mark.parametrize("model", ["gpt2:L=9,d=32,h=2,V=50,T=32", "llama3-8b:L=8,d=64,h=4,kv=2,F=96,V=50"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "bf16", "recompute": "full"},
        {"precision": "bf16-mixed", "optimizer": "sgd", "accumulate": 2},
        {"precision": "fp16-mixed", "recompute": "selective"},
        {"on": "cpu", "optimizer": "momentum"},
        {"zero_grad": "zeros", "optimizer": "lion"},
        {"optimizer": "muon"},
        {"on": "8xh100-sxm"},
    ],
    ids=str,
)
def test_a_preset_folds(model, options):
    assert was_folded(both(model, batch_size=2, seq_len=16, **options))


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw-8bit", "lamb", "adagrad", "rmsprop"])
def test_every_optimizer_folds_or_is_traced_whole(optimizer):
    both("gpt2:L=7,d=64,h=2,V=50,T=16", batch_size=2, seq_len=16, optimizer=optimizer)


@pytest.mark.parametrize("model", ["mlp:L=12", "cruncher:L=12"])
def test_a_stack_of_linear_layers_folds(model):
    assert was_folded(both(model))


def test_a_deep_model_costs_no_more_rows_to_trace():
    def traced(depth):
        ledger = bursar.step(f"gpt2:L={depth},d=32,h=2,V=50,T=16", seq_len=16)
        return ledger.model.parameters, len(ledger.recorded)

    (p, rows), (q, more) = traced(10), traced(1000)
    block = 12 * 32 * 32 + 13 * 32
    assert q - p == 990 * block
    assert more - rows == 990 * (traced(11)[1] - rows)


# ---- a user's own module


class Block(nn.Module):
    def __init__(self, width, index=0, hidden=2):
        super().__init__()
        self.index = index
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden * width)
        self.down = nn.Linear(hidden * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, blocks, forward=None):
        super().__init__()
        self.inputs = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(16, 4)
        self.pass_blocks = forward

    def forward(self, x):
        x = self.inputs(x)
        if self.pass_blocks is not None:
            x = self.pass_blocks(self, x)
        else:
            for block in self.blocks:
                x = block(x)
        return self.head(x)


def batch():
    return torch.randn(4, 8)


def test_a_users_module_folds_and_stays_as_it_was():
    model = Stack([Block(16, i) for i in range(10)])
    before = [id(m) for m in model.modules()]
    ledger = both(model, batch())
    assert was_folded(ledger)
    assert any("blocks: 6 blocks are written from 4 alike" in a for a in ledger.assumptions)
    assert [id(m) for m in model.modules()] == before


def test_a_sequential_folds():
    model = nn.Sequential(nn.Linear(8, 16), *[Block(16) for _ in range(9)], nn.Linear(16, 2))
    assert was_folded(both(model, batch()))


def test_a_pattern_of_several_blocks_folds():
    model = Stack([Block(16, hidden=(2, 2, 3)[i % 3]) for i in range(24)])
    assert repeats.find(model)[0].period == 3
    assert was_folded(both(model, batch(), recompute="full"))


def test_the_first_blocks_may_differ():
    model = Stack([Block(16, hidden=4) for _ in range(3)] + [Block(16) for _ in range(9)] + [Block(16, hidden=5)])
    found = repeats.find(model)[0]
    assert (found.start, found.period, found.periods) == (3, 1, 9)
    assert was_folded(both(model, batch()))


def test_two_lists_fold_each():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = Stack([Block(16) for _ in range(8)])
            self.decoder = Stack([Block(16, hidden=3) for _ in range(7)])

        def forward(self, x):
            return self.encoder(x).sum() + self.decoder(x).sum()

    assert was_folded(both(Two(), batch()))


def skips(model, x):
    """A U-Net: the second half reads what the first half kept."""
    kept, half = [], len(model.blocks) // 2
    for i, block in enumerate(model.blocks):
        if i >= half:
            x = x + kept.pop()
        x = block(x)
        if i < half:
            kept.append(x)
    return x


def every_third(model, x):
    for i, block in enumerate(model.blocks):
        x = block(x)
        if i % 3 == 2:
            x = torch.tanh(x)
    return x


def one_in_the_middle(model, x):
    for i, block in enumerate(model.blocks):
        x = block(x)
        if i == 6:
            x = torch.tanh(x)
    return x


def shorter_and_shorter(model, x):
    for block in model.blocks:
        x = block(x[: max(1, len(x) - 1)] if len(x) > 2 else x)
    return x


def the_seventh_again(model, x):
    for block in model.blocks:
        x = block(x)
    return model.blocks[6](x)


def all_summed(model, x):
    outs = []
    for block in model.blocks:
        x = block(x)
        outs.append(x)
    return torch.stack(outs).sum(0)


@pytest.mark.parametrize(
    "forward", [skips, every_third, one_in_the_middle, shorter_and_shorter, the_seventh_again, all_summed]
)
def test_a_model_that_treats_its_blocks_differently_is_traced_whole(forward):
    ledger = both(Stack([Block(16, i) for i in range(12)], forward), batch())
    assert not was_folded(ledger)


def test_the_skim_is_what_notices(monkeypatch):
    """Without it, the tanh in the middle would be lost in silence."""
    monkeypatch.setattr("bursar.trace.session.check", lambda *a: None)
    model = Stack([Block(16, i) for i in range(12)], one_in_the_middle)
    folded = bursar.step(model, batch())
    assert was_folded(folded)
    assert len(folded) < len(bursar.step(model, batch(), fold=False))


def test_blocks_that_share_a_weight_do_not_fold():
    blocks = [Block(16) for _ in range(8)]
    for block in blocks[1:]:
        block.up.weight = blocks[0].up.weight
    assert not was_folded(both(Stack(blocks), batch()))


def test_a_block_with_a_hook_does_not_fold_with_the_others():
    blocks = [Block(16) for _ in range(8)]
    blocks[5].register_forward_hook(lambda module, args, out: out * 2)
    assert not was_folded(both(Stack(blocks), batch()))


def test_frozen_blocks_fold_apart_from_trained_ones():
    blocks = [Block(16) for _ in range(14)]
    for block in blocks[:7]:
        block.requires_grad_(False)
    both(Stack(blocks), batch())


def test_a_block_someone_else_holds_is_traced_whole():
    kept = []

    def make():
        model = Stack([Block(16) for _ in range(9)])
        kept.append(list(model.blocks))
        return model, batch()

    assert not was_folded(both(make))


def test_an_error_is_the_users_own():
    def broken(model, x):
        for block in model.blocks:
            x = block(x)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        bursar.step(Stack([Block(16) for _ in range(9)], broken), batch())


# ---- transformers' models


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "num_hidden_layers": 9, "num_key_value_heads": 2},
        {"model_type": "gemma2", "num_hidden_layers": 14, "sliding_window": 8, "head_dim": 8},
        {"model_type": "bert", "num_hidden_layers": 7},
        {"model_type": "gpt2", "n_layer": 8, "n_embd": 32, "n_head": 4},
        {"model_type": "t5", "num_layers": 7, "num_decoder_layers": 8, "d_model": 32, "d_ff": 64, "d_kv": 8},
    ],
    ids=lambda c: c["model_type"],
)  # fmt: skip
def test_a_config_folds(config, tmp_path):
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, **config}))
    assert was_folded(both(str(tmp_path), batch_size=2, seq_len=16))


def test_names_are_those_of_the_whole_model():
    ledger = bursar.step(Stack([Block(16, i) for i in range(10)]), batch())
    modules = {r.module for r in ledger.recorded if ".up" in r.module}
    assert modules == {f"blocks.{i}.up" for i in range(10)}


def test_a_trunk_knows_its_copies():
    trunk = folding.Trunk("layers", 1, 2, 10)
    assert trunk.in_full("layers.4.mlp") == "layers.4.mlp"  # second period
    assert trunk.in_full("layers.5.mlp") == "layers.17.mlp"  # third
    assert trunk.in_full("layers.9") == "layers.21"  # after the last
    assert trunk.in_full("head") == "head"
    assert trunk.copies("layers.6.mlp") == 7
    assert trunk.copies("layers.7.mlp") == trunk.copies("layers.0") == 1
