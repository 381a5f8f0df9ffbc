"""Names are the user's: markup and control characters in them reach the pages as text, and JSON as they are."""

import json
import unicodedata

import pytest

from command import ask

NASTY = ["<img src=x onerror=alert(1)>", "two\nlines", "\x1b[31mred\x1b[0m", "\u202egnp", "[bold]rich[/bold]"]
MODEL = """
import torch
from torch import nn
NASTY = {nasty!r}
class Block(nn.Module):
    def __init__(self, looks):
        super().__init__()
        self.layer, self.looks = nn.Linear(8, 8), looks
    def forward(self, x):
        if self.looks and x.sum() > 0:
            return x
        return self.layer(x)
class Net(nn.Module):
    def __init__(self, looks):
        super().__init__()
        for i, name in enumerate(NASTY):
            self.add_module(name, Block(looks == i))
    def forward(self, x):
        for block in self.children():
            x = block(x)
        return x
def make(): return Net(None), torch.randn(4, 8)
{makes}
"""


@pytest.fixture
def model(tmp_path):
    makes = "\n".join(f"def look{i}(): return Net({i}), torch.randn(4, 8)" for i in range(len(NASTY)))
    (tmp_path / "nasty.py").write_text(MODEL.format(nasty=NASTY, makes=makes))
    return f"{tmp_path}/nasty.py"


def obeyed(text):
    """What a terminal or a reader's eye would obey in ``text`` instead of showing it."""
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cf") and c != "\n"}


def test_a_page_shows_control_characters_and_obeys_none(model, capsys):
    code, out, err = ask(capsys, "step", f"{model}:make", "--gradients")
    assert code == 0
    assert not obeyed(out + err)
    assert "<img src=x onerror=alert(1)>" in out
    assert "[bold]rich[/bold]" in out
    assert "\\x1b[31mred" in out
    assert "two\\x0alines" in out


def test_json_keeps_names_as_they_are(model, capsys):
    code, out, _ = ask(capsys, "step", f"{model}:make", "--gradients", "--json")
    assert code == 0
    assert obeyed(out) <= {"\u202e"}  # JSON writes control characters out; what else a string holds is data
    assert {layer["module"].removesuffix(".layer") for layer in json.loads(out)["gradients"]} == set(NASTY)


@pytest.mark.parametrize("i", range(len(NASTY)))
def test_an_error_names_the_module_and_obeys_nothing_in_its_name(i, model, capsys):
    code, out, err = ask(capsys, "step", f"{model}:look{i}")
    assert (code, out) == (2, "")
    assert not obeyed(err)
    assert "looks at its data" in err
    assert len(err.splitlines()) < 6
