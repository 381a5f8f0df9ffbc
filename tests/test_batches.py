"""A batch is tried until the model takes it; and a look at a model leaves no trace in the ledger."""

import functools
import sys
import types

import pytest
import torch
from torch import nn

import bursar
from bursar.errors import DataDependent
from bursar.trace.session import Session
from bursar.trace.values import PICTURES
from bursar.workload.step import run

transformers = pytest.importorskip("transformers", reason="transformers is an extra")
from bursar.workload import hf, hf_batch  # noqa: E402  (needs transformers)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 2)


class SeveralPictures(Toy):
    def forward(self, pixel_values):
        _batch, _pictures, _channels, _height, _width = pixel_values.shape
        return self.layer(pixel_values)


class Masked(Toy):
    def forward(self, pixel_values, sound_mask=None, other_mask=None):
        if sound_mask is None:
            raise ValueError("You have to specify sound_mask")
        assert other_mask is None
        return self.layer(pixel_values)


class NoLabels(Toy):
    def forward(self, pixel_values, labels=None):
        if labels is not None:
            raise RuntimeError("these labels do not fit")
        return self.layer(pixel_values)


class Never(Toy):
    def forward(self, pixel_values):
        raise RuntimeError(f"no {pixel_values.dim()}")


def made(model, labels=""):
    config = transformers.PreTrainedConfig(image_size=32, num_channels=3)
    return hf_batch.make(model, config, 2, 16, labels, lambda m, batch: m(**batch).mean())


def test_another_form_is_taken_where_the_first_does_not_fit():
    batch, said = made(SeveralPictures())
    assert batch["pixel_values"].shape == (2, 1, 3, 32, 32)
    assert said == ("the batch is what the model was found to take: pixel_values in form 2",)


def test_what_an_error_names_is_given():
    batch, said = made(Masked())
    assert set(batch) == {"pixel_values", "sound_mask"}
    assert "sound_mask given" in said[0]


def test_labels_that_do_not_fit_are_left_out_and_it_is_said():
    batch, said = made(NoLabels(), "class")
    assert set(batch) == {"pixel_values"}
    assert "no labels: the loss is the mean of each output" in said[0]


def test_where_nothing_is_taken_the_first_error_is_raised():
    with pytest.raises(RuntimeError, match="no 4"):
        made(Never())


def test_a_tower_that_was_asked_for_its_features_keeps_its_name_in_the_model():
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**small, image_size=32, patch_size=16),
        text_config=transformers.LlamaConfig(**small, vocab_size=50),
        image_token_index=49,
    )
    ledger = run(hf.of_config(config, "llava", 2, 16))
    names = {row.module.split(".")[0] for row in ledger.recorded if row.kind == "matmul"}
    assert names == {"model", "lm_head"}
    assert any("vision_tower" in row.module for row in ledger.recorded)


def test_transformers_is_patched_once_however_many_models_there_are():
    session = Session(None)
    with session.open():
        for _ in range(3):
            model = nn.Linear(2, 2).to("cuda")
            model(torch.ones(1, 2, device="cuda"))
        names = [name for owner, name, _ in session._patches._old if "transformers" in getattr(owner, "__name__", "")]
        assert len(names) == len(set(names))
        assert len(session.roots) == 3


def test_a_table_that_transformers_keeps_does_not_outlive_its_trace(monkeypatch):
    class Positions:
        @staticmethod
        @functools.wraps(torch.arange)
        def table(n):
            return cached(n)

    cached = functools.lru_cache(lambda n: torch.arange(n))
    name = "transformers.models.toy.modeling_toy"
    Positions.__module__ = name
    module = types.ModuleType(name)
    module.Positions = Positions
    monkeypatch.setitem(sys.modules, name, module)
    real = Positions.table(3)
    with bursar.tracing():
        assert Positions.table(3) is not real
    assert type(Positions.table(3)) is torch.Tensor


def test_small_real_numbers_may_be_looked_at():
    rates = torch.linspace(0, 0.1, 3)
    with bursar.tracing() as trace:
        assert rates.tolist() == pytest.approx([0, 0.05, 0.1])
        assert torch.Tensor([0.25]).item() == 0.25
    assert trace.ledger.assumptions == ()


def test_pictures_are_taken_not_to_be_blank_and_nothing_else_is_taken_of_zeros():
    with bursar.tracing() as trace:
        pictures = torch.randn(2, 1, 3, 8, 8, device="cuda")
        blank = (pictures == 0.0).sum((-1, -2, -3)) == 3 * 8 * 8
        assert pictures[~blank].shape == (2, 3, 8, 8)
    assert trace.ledger.assumptions == (PICTURES,)
    with pytest.raises(DataDependent), bursar.tracing():
        bool((torch.randn(2, 8, device="cuda") == 0.0).any())
