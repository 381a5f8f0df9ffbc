"""`bursar formula`: what it says at any size is what a trace there says; the notes' rules come out as results."""

from __future__ import annotations

import json
import random
import time

import pytest

import bursar
from bursar.architecture import preset
from bursar.errors import BadInput
from bursar.polynomial import Interpolation, Monomial, Polynomial, basis
from command import ask

OWN = """
import torch
from torch import nn

def mlp(batch_size=4, d_model=16, n_layers=2):
    layers = [nn.Linear(d_model, d_model, bias=False) for _ in range(n_layers)]
    return nn.Sequential(*layers), torch.randn(batch_size, d_model)

def fixed():
    return nn.Linear(3, 3), torch.randn(5, 3)

class Similarities(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 16)
    def forward(self, x):
        y = self.embed(x)
        return (y @ y.T).softmax(-1)

def contrastive(batch_size=4):
    return Similarities(), torch.randn(batch_size, 8)

class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 16)
    def forward(self, x):
        n = 1
        while n < x.shape[0]:
            n *= 2
        return self.layer(nn.functional.pad(x, (0, 0, 0, n - x.shape[0])))

def padded(batch_size=4):
    return Padded(), torch.randn(batch_size, 8)

class Gate(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x

def gate(batch_size=4):
    return Gate(8, 8), torch.randn(batch_size, 8)
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return lambda name: f"{path}:{name}"


def value(terms, B, S):
    """A figure from the JSON's terms alone."""
    total = 0
    for t in terms:
        to = t.get("rounded_up_to", 1)
        total += t["coefficient"] * B ** t["B"] * (-(-S // to) * to) ** t["S"] // t.get("divisor", 1)
    return total


# ---- exact at sizes nobody traced


@pytest.fixture(scope="module")
def gpt2():
    began = time.perf_counter()
    found = bursar.formula("gpt2:L=3", on="h100-sxm")
    return found, time.perf_counter() - began


def test_gpt2s_formulas_are_exact_at_unseen_batches_and_sequences(gpt2):
    from bursar.report.formula import formula_record

    record = json.loads(json.dumps(formula_record(gpt2[0])))
    draw = random.Random(11)
    for _ in range(4):
        B, S = draw.randint(1, 60), draw.randint(4, 1024)
        ledger = bursar.step("gpt2:L=3", batch_size=B, seq_len=S)
        for figure, law in record["flops"].items():
            assert value(law["terms"], B, S) == getattr(ledger.flops, figure), (figure, B, S)
        assert value(record["parameters"]["terms"], B, S) == ledger.model.parameters
        peaks = [record["peak_bytes"], *record["peak_bytes"]["elsewhere"]]
        assert max(value(law["terms"], B, S) for law in peaks) == ledger.memory.peak_bytes, (B, S)


def test_the_peaks_formula_holds_as_far_as_it_says_and_no_farther(gpt2):
    peak = gpt2[0].peak
    low, high = peak.seq_lens
    assert high == 1024  # GPT-2 has no more positions
    for S, holds in ((low, True), (low - 1, False)):
        traced = bursar.step("gpt2:L=3", batch_size=8, seq_len=S).memory.peak_bytes
        assert (peak.law.polynomial(8, S) == traced) is holds


def test_the_largest_batch_fits_and_one_more_does_not(gpt2):
    fits = gpt2[0].fits
    usable = fits.usable_bytes
    assert bursar.step("gpt2:L=3", batch_size=fits.batch_size).memory.peak_bytes <= usable
    assert bursar.step("gpt2:L=3", batch_size=fits.batch_size + 1).memory.peak_bytes > usable
    assert fits.seq_len == fits.seq_len_limit == 1024
    assert [text.rsplit(": ", 1)[1] for text in fits.verified] == ["fits", "does not fit", "fits"]
    assert not any("but by the formula" in text for text in fits.verified)


def test_the_notes_rules_come_out_as_results(gpt2):
    flops = gpt2[0].flops
    assert flops["forward"].formula == "2·B·S·P + 2·L·d·B·S·(S+1)"
    assert flops["backward"].formula == "4·B·S·P + 4·L·d·B·S·(S+1)"
    assert flops["model"].formula == "6·B·S·P + 6·L·d·B·S·(S+1)"
    assert flops["attention_full_square"].formula == "14·L·d·B·S²"
    assert gpt2[0].parameters.formula == "12·L·d² + V·d + T·d + 13·L·d + 2·d"
    assert gpt2[0].symbols["P"] == (12 * 3 * 768**2 + 50257 * 768, "parameters in matrices, 12·L·d² + V·d")


def test_what_a_formula_is_written_as_has_the_polynomials_value(gpt2):
    found = gpt2[0]
    names = {letter: v for letter, (v, _) in found.symbols.items()} | {"B": 5, "S": 77}
    for law in (*found.flops.values(), found.parameters, found.peak.law, *found.peak.others):
        text = law.formula.replace("·", "*").replace("²", "**2").replace("⌈S/32⌉", "(-(-S//32))")
        assert eval(text, {}, names) == law.polynomial(5, 77), law.formula


def test_gpt2_matrices_without_their_scores_are_the_polynomial_known_before():
    # 741192192·B·S came out of a trace with symbolic shapes once: six times the matrices
    assert 6 * bursar.formula("gpt2:L=1").symbols["P"][0] == 741192192 - 6 * 11 * 12 * 768**2


def test_grouped_queries_in_fp32_multiply_the_full_square():
    found = bursar.formula("llama3-8b:L=1,d=64,h=4,kv=2,F=96,V=100", batch_size=3, seq_len=64)
    assert found.flops["model"].formula == "6·B·S·P + 12·L·d·B·S²"
    traced = bursar.step("llama3-8b:L=1,d=64,h=4,kv=2,F=96,V=100", batch_size=9, seq_len=53)
    assert found.flops["model"].polynomial(9, 53) == traced.flops.model
    assert max(law.polynomial(9, 53) for law in (found.peak.law, *found.peak.others)) == traced.memory.peak_bytes


def test_one_sample_that_allocates_otherwise_has_a_peak_of_its_own():
    name = "llama3-8b:L=1,d=64,h=4,kv=2,F=96,V=100"  # unfused attention copies a gradient, save for one sample
    found = bursar.formula(name, batch_size=1, seq_len=64)
    assert found.peak.batch_sizes == (1, 1)
    assert found.peak.n_bytes == bursar.step(name, batch_size=1, seq_len=64).memory.peak_bytes
    low, _ = found.peak.seq_lens
    assert found.peak.law.polynomial(1, low) == bursar.step(name, batch_size=1, seq_len=low).memory.peak_bytes


def test_a_mask_that_a_kernel_pads_leaves_the_peak_a_formula_where_it_does_not():
    name = "t5-base:N=1,d=64,h=4,c=16,F=64,V=100"  # the bias of its scores is padded unless 16 divides S
    found = bursar.formula(name, precision="bf16", batch_size=2, seq_len=128)
    assert found.peak.multiple == 16
    traced = bursar.step(name, precision="bf16", batch_size=5, seq_len=112).memory.peak_bytes
    assert max(law.polynomial(5, 112) for law in (found.peak.law, *found.peak.others)) == traced


def test_a_sequence_too_short_to_vary_leaves_formulas_in_b():
    name = "gpt2:L=1,d=64,h=4,V=100,T=8"
    found = bursar.formula(name, seq_len=2)
    assert found.letters == ("B",)
    assert found.flops["model"].polynomial(11) == bursar.step(name, batch_size=11, seq_len=2).flops.model


def test_a_mixtures_tokens_meet_k_of_its_experts():
    found = bursar.formula("mixtral-8x7b:L=1,d=64,h=4,kv=2,F=96,V=100,E=6,k=3", precision="bf16", seq_len=64)
    assert found.symbols["P"][0] == 2 * 64**2 + 2 * 64 * 32 + 6 * 64 + 3 * 3 * 64 * 96 + 100 * 64
    assert found.flops["forward"].formula == "2·B·S·P + 128·B·S·(S+1)"


# ---- other models


def test_crunchers_backward_falls_short_of_4bp_by_the_first_layers_dx():
    flops = bursar.formula("cruncher").flops
    assert (flops["forward"].formula, flops["backward"].formula) == ("2·B·P", "4·B·P - 32·B")  # 2·D² = 32
    assert (flops["forward"].polynomial(2), flops["backward"].polynomial(2)) == (144, 224)


def test_resnet50s_formula_is_in_b_alone():
    found = bursar.formula("resnet50", batch_size=4)
    assert found.letters == ("B",)
    traced = bursar.step("resnet50", batch_size=11)
    assert found.flops["model"].polynomial(11) == traced.flops.model
    assert max(law.polynomial(11) for law in (found.peak.law, *found.peak.others)) == traced.memory.peak_bytes


def test_a_callables_own_widths_are_letters_too(own):
    found = bursar.formula(own("mlp"))
    assert found.widths["forward"].formula == "2·d_model²·n_layers·B"
    assert found.widths["backward"].formula == "4·d_model²·n_layers·B - 2·d_model²·B"
    assert found.widths["parameters"].formula == "d_model²·n_layers"
    assert bursar.formula(own("mlp"), symbols=["n_layers"]).widths["parameters"].formula == "256·n_layers"


def test_a_loss_over_all_pairs_of_the_batch_is_quadratic_in_it(own):
    found = bursar.formula(own("contrastive"))
    assert found.flops["forward"].formula == "256·B + 32·B²"  # 2·B·8·16 and 2·B·B·16


# ---- refused


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("fixed", "let it take a parameter 'batch_size'"),
        ("padded", "forward is no polynomial of degree 2 in B through 3 traces that also holds at (7,)"),
        ("gate", "looks at its data"),
        ("nothing", "no callable in"),
    ],
)
def test_what_has_no_formula_is_refused(own, capsys, name, says):
    code, out, err = ask(capsys, "formula", own(name))
    assert (code, out) == (2, "")
    assert says in err


def test_symbols_that_are_no_arguments_are_refused(own):
    with pytest.raises(
        BadInput, match="'width' is no integer argument with a default; the callable's are: d_model, n_l"
    ):
        bursar.formula(own("mlp"), symbols=["width"])


def test_a_module_and_a_cluster_are_refused():
    import torch

    with pytest.raises(BadInput, match="a module has one batch"):
        bursar.formula(torch.nn.Linear(2, 2))
    with pytest.raises(BadInput, match="give --on h100-sxm"):
        bursar.formula("cruncher", on="8xh100-sxm")


def test_an_op_without_a_rule_has_no_formula(tmp_path):
    path = tmp_path / "svd.py"
    path.write_text(
        "import torch\nclass M(torch.nn.Linear):\n    def forward(self, x):\n"
        "        return torch.ops.aten._cdist_forward(super().forward(x), x.detach(), 3.0, None)\n"
        "def make(batch_size=4):\n    return M(4, 4), torch.randn(batch_size, 4)\n"
    )
    uncounted = bursar.step(f"{path}:make").uncounted
    if not uncounted:
        pytest.skip("this op has a rule by now")
    with pytest.raises(BadInput, match="has no rule"):
        bursar.formula(f"{path}:make")


# ---- the command


def test_the_json_is_the_contracts(capsys):
    code, out, _ = ask(capsys, "formula", "cruncher", "--on", "h100-sxm", "--json")
    record = json.loads(out)
    assert code == 0
    assert record["schema_version"] == 1
    assert record["model"] == {"name": "cruncher", "parameters": 36}
    assert record["flops"]["forward"]["terms"] == [{"coefficient": 72, "B": 1, "S": 0}]
    assert record["flops"]["forward"]["formula"] == "2·B·P"
    assert set(record["peak_bytes"]["valid"]) == {"batch_size", "seq_len", "seq_len_multiple_of"}
    assert set(record["fits"]) >= {"hardware", "batch_size", "seq_len"}


def test_the_page_says_how_it_was_derived(capsys):
    code, out, _ = ask(capsys, "formula", "cruncher", "--explain")
    assert code == 0
    assert "4·B·P - 32·B" in out
    assert "How derived" in out
    assert "checked, and exact, at sizes not used for them: (B) = (7)" in out


# ---- polynomials


def test_an_interpolation_is_exact_and_a_wrong_check_is_seen():
    points = [(x, y) for x in (2, 3) for y in (4, 8, 12)]
    truth = Polynomial(("B", "S"), {Monomial((1, 2)): 3, Monomial((1, 1)): 5, Monomial((0, 0)): 7})
    made = Interpolation(("B", "S"), points, basis((1, 2)))
    values = [int(truth(*p)) for p in points]
    assert made.fit(values, [((11, 100), int(truth(11, 100)))]).text == "7 + 5·B·S + 3·B·S²"
    assert made.fit(values, [((11, 100), int(truth(11, 100)) + 1)]) is None


def test_what_a_kernel_pads_is_found_by_the_check():
    points = [(2, 64), (2, 128), (3, 64), (3, 128)]
    padded = [4 * b * s for b, s in points]  # all multiples of 32
    made = Interpolation(("B", "S"), points, basis((1, 1)), (1, 8, 32))
    found = made.fit(padded, [((5, 33), 4 * 5 * 64)])
    assert found.text == "128·B·⌈S/32⌉"
    assert found(1, 1) == 128


def test_the_closed_form_and_the_interpolation_are_one_polynomial(gpt2):
    from bursar.rules.transformer import count

    for B, S in ((1, 1), (6, 1000)):
        totals = count(preset("gpt2:L=3"), B, S)
        assert gpt2[0].flops["model"].polynomial(B, S) == totals.model
        assert gpt2[0].flops["hardware"].polynomial(B, S) == totals.hardware
