"""The notes' claims: every one of the 111 executed, its verdict the one found by recomputing it by hand."""

import json
import re
import sys

import pytest

import claims
from bursar import lecture, rules
from bursar.cli import main
from bursar.errors import BadInput
from bursar.hardware import Accelerator
from bursar.report.lecture import VERDICTS, lecture_record, render
from bursar.report.text import console
from bursar.rules import Rule, elementwise

# Recomputed apart from bursar: by hand, with torch's own FLOP counter, on real processes.
EXPECTED = {
    id: verdict
    for verdict, ids in {
        "right": "7.1 7.2 7.4 7.5 7.8 7.9 7.11 7.18 7.20 7.21 7.25 7.26 7.27 7.29 "
        "8.1 8.2 8.3 8.4 8.5 8.6 8.7 8.16 8.18 8.20 8.22 8.24 "
        "9.2 9.3 9.4 9.9 9.11 9.14 9.17 9.19 "
        "10.3 10.5 10.6 10.8 10.9 10.17 10.19 10.20 10.21 10.25 10.26 10.27 10.29 10.30 10.31 10.34",
        "depends": "7.3 7.14 7.22 7.24 8.10 8.11 8.13 9.6 9.7 9.16 "
        "10.2 10.7 10.12 10.13 10.14 10.15 10.16 10.24 10.28 10.33 10.36",
        "misleading": "7.7 7.10 7.13 7.15 7.16 7.17 7.19 7.23 8.17 8.21 8.23 "
        "9.5 9.8 9.13 9.15 9.18 9.20 9.21 10.1 10.4 10.23",
        "wrong": "7.6 7.12 7.28 8.8 8.9 8.14 8.15 8.19 9.1 9.10 9.12 10.10 10.11 10.18 10.22 10.32 10.35 10.37",
        "not checkable": "8.12",
    }.items()
    for id in ids.split()
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    pytest.importorskip("torch")
    with claims.one_thread():
        yield


@pytest.fixture(scope="module")
def executed():
    pytest.importorskip("torch")
    return {line.id: line for line in claims.executed()}


def computed_again(id):
    lecture.forget()
    return lecture.evaluate(lecture.notes()[id])


def changed_rule(monkeypatch, name, change):
    """Let the rule of the op ``name`` count ``change(FLOPs)``."""
    old = rules.RULES[name]

    def work(op):
        found = old.work(op)
        return type(found)(change(found.flops), found.read_bytes, found.written_bytes)

    monkeypatch.setitem(rules.RULES, name, Rule(old.kind, work))


def test_the_catalogue_has_all_111_claims_in_order():
    assert list(lecture.notes()) == sorted(EXPECTED, key=lambda id: [int(n) for n in id.split(".")])
    assert len(EXPECTED) == 111
    assert {row.chapter for row in lecture.notes().values()} == set(lecture.CHAPTERS)


def test_no_row_of_the_catalogue_holds_a_verdict_but_those_that_no_code_can_reach():
    assert {row.id: row.verdict for row in lecture.notes().values() if row.verdict} == {"8.12": "not checkable"}
    assert lecture.notes()["8.12"].reason


def lost(verdicts):
    """The claims without the verdict found by hand."""
    return [id for id, verdict in EXPECTED.items() if verdicts.get(id) != verdict]


def test_each_of_the_111_claims_has_its_verdict_and_it_follows(executed):
    assert len(executed) == len(EXPECTED) == 29 + 24 + 21 + 37
    assert lost({id: line.verdict for id, line in executed.items()}) == []


@pytest.mark.parametrize("id", ["7.6", "8.12", "9.10", "10.28"])
def test_a_verdict_that_is_missing_or_another_is_noticed(executed, id):
    verdicts = {id: line.verdict for id, line in executed.items()}
    assert lost({**verdicts, id: None}) == lost({k: v for k, v in verdicts.items() if k != id}) == [id]
    assert lost({**verdicts, id: "depends" if EXPECTED[id] != "depends" else "right"}) == [id]


def test_every_claim_is_executed_but_the_one_that_no_code_settles(executed):
    assert [id for id, line in executed.items() if line.computed is None] == ["8.12"]
    assert all(line.holds for line in executed.values() if line.computed)


def test_executing_a_claim_leaves_the_random_numbers_of_the_process_alone():
    torch = pytest.importorskip("torch")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    lecture.execute(9)
    computed_again("10.4")
    computed_again("10.25")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_samples_of_chapter_9_are_seeded():
    assert lecture.execute(9) == lecture.execute(9)


def test_the_tolerance_of_a_sample_is_four_standard_errors():
    pytest.importorskip("torch")
    from bursar.lecture.chapter9 import tolerance

    errors = []
    import torch

    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        x, w = torch.randn(256, 64, generator=generator), torch.randn(64, 8, generator=generator)
        errors.append(float((x @ w).square().mean()) / 64 - 1)
    spread = float(torch.tensor(errors).std())
    assert tolerance(64, 8) / 4 == pytest.approx(spread, rel=0.15)  # 200 of them know their spread to 5 %


def test_without_the_extra_a_claim_says_so_and_has_no_value(monkeypatch, capsys):
    pytest.importorskip("torch")
    for module in ("pytorch_optimizer", "torchao.optim"):
        monkeypatch.setitem(sys.modules, module, None)
    lines = [lecture.evaluate(lecture.notes()[id]) for id in ("10.3", "10.21", "10.25")]
    assert [(x.computed is None, x.verdict) for x in lines] == [(False, "right"), (True, None), (True, None)]
    out = console()
    for part in render(lines):
        out.print(part)
    page = capsys.readouterr().out
    assert "Not executed here: 10.21 (needs the extra optim), 10.25 (needs the extra optim)" in page
    assert "3 claims: 1 right, 2 not executed" in page


@pytest.mark.parametrize(
    ("id", "says"),
    [
        ("7.6", "8796093022208 FLOP = 2^43"),
        ("7.10", "1888223232"),  # 2 · 8 · 64 · 112 · 112 · 3 · 7 · 7
        ("7.12", "1.00 on an A100"),
        ("7.12", "0.799"),  # 53.916 / 67.5
        ("7.13", "0.469"),  # 463.85 / 989.4
        ("7.15", "10.1 years at MFU 1.0, 20.1 years at MFU 0.5"),
        ("7.16", "641 years"),
        ("7.17", "3203 years"),
        ("7.22", "14.8x"),  # 989.4 / 67
        ("7.22", "against TF32 2.0x"),
        ("7.26", "6.30e24 FLOP"),
        ("7.27", "143.9 days"),
        ("7.28", "2.8 % of 6·N·D"),  # 12 · 96 · 12288 · 2048 / (6 · 174.6e9)
        ("8.4", "167772160"),  # 2 · 1024 · (256² + 256 · 64)
        ("8.8", "201326592 FLOP at B=1024, D=256, K=64, which is 2B(D² + 2·D·K)"),
        ("8.8", "335544320, which is 4·B·P"),
        ("8.9", "convolution 1888223232 for 150528"),
        ("8.11", "Cruncher: counted 368, rule 432"),
        ("8.13", "two-layer 45.5 % and 54.5 %"),
        ("8.15", "20.1 times"),
        ("8.17", "16 become 14 (-12.5 %) and 16"),
        ("8.19", "4.0 times the gradient"),
        ("8.21", "8 all-gather + 4 reduce-scatter, deferred 8 all-gather + 1 reduce-scatter"),
        ("9.5", "mean |out| 102.1"),  # 128 · √(2/π)
        ("9.8", "60 % of 8192 outputs lie there in size, 32 % above and 8 % below"),
        ("9.12", "the bounds are ±384 σ; with a=-3*std, b=3*std max |w| is 0.0234"),  # 3 · 128
        ("9.13", "as written 99.73 %, cut at 3σ 100.00 %"),
        ("9.18", "in/out is 512"),
        ("10.1", "AdaGrad sum, RMSProp square_avg, Adam exp_avg and exp_avg_sq; 5 of 5"),
        ("10.2", "by the notes 0.009901, torch 0.009901"),  # 0.01 · 1e-3 / (1e-3 + 1e-5)
        ("10.2", "under the root, 0.003015"),  # 0.01 · 1e-3 / √(1e-6 + 1e-5)
        ("10.3", "1.00e-03 for a parameter that had one each time, 3.16e-03"),  # 0.01/√100 and 0.01/√10
        ("10.4", "as printed: NameError"),
        ("10.4", "it runs, 1 step of the optimizer; with B = 3: RuntimeError"),
        ("10.14", "70 % of a layer of GPT-3"),  # 80 of 34 + 80: 5 · 96 · 2048 / 12288 = 80
        ("10.25", "2.03137 bytes per parameter"),  # (4096² + 4 · 65536 scales + 4 · 256 of the map) · 2 / 4096²
        ("10.26", "stage 0 16, stage 1 4.188, stage 2 2.219, stage 3 0.25"),  # 4 + 12/64, 2 + 14/64, 16/64
    ],
)
def test_a_computed_value_is(executed, id, says):
    assert says in executed[id].computed


# ---- where verdicts come from


def test_a_verdict_follows_from_the_conditions():
    assert lecture.verdict((True, True), (True,)) == "right"
    assert lecture.verdict((True, True), (True, False)) == "misleading"
    assert lecture.verdict((True, False), (False,)) == "depends"
    assert lecture.verdict((False, False), (True,)) == "wrong"


@pytest.mark.parametrize("id", ["7.5", "7.9", "7.25", "8.2", "8.3", "8.4", "8.5", "8.6", "8.7"])
def test_counting_multiply_and_add_as_one_turns_the_claim(monkeypatch, id):
    for op in ("aten.mm", "aten.addmm"):
        changed_rule(monkeypatch, op, lambda flops: flops // 2)
    assert EXPECTED[id] == "right"
    assert computed_again(id).verdict == ("depends" if id == "7.9" else "wrong")  # half as dear, it dominates still


def test_a_matmul_a_thousand_times_dearer_would_make_the_notes_right(monkeypatch):
    changed_rule(monkeypatch, "aten.mm", lambda flops: 1000 * flops)
    line = computed_again("7.6")
    assert line.verdict == "right"
    assert line.computed.startswith("8796093022208000 FLOP")


def test_a_wrong_rule_of_convolution_turns_its_claim(monkeypatch):
    changed_rule(monkeypatch, "aten.convolution", lambda flops: flops + 1)
    assert computed_again("7.10").verdict == "wrong"


def test_a_wrong_rule_of_elementwise_arithmetic_turns_its_claim(monkeypatch):
    plain = elementwise.pointwise
    monkeypatch.setattr(elementwise, "pointwise", lambda op: plain(op, 2))
    assert computed_again("7.8").verdict == "wrong"


def test_a_sparse_peak_turns_the_claims_of_peak_and_time(monkeypatch):
    dense = Accelerator.peak
    monkeypatch.setattr(Accelerator, "peak", lambda self, dtype: 2 * dense(self, dtype))
    assert [computed_again(id).verdict for id in ("7.4", "7.15", "7.27")] == ["wrong", "wrong", "wrong"]


def test_free_collectives_turn_the_claim_of_accumulation(monkeypatch):
    pytest.importorskip("torch")
    from bursar.lecture import chapter8

    monkeypatch.setattr(chapter8, "rounds", lambda strategy, micro_batches, deferred: {"all_reduce": 1})
    assert computed_again("8.21").verdict == "wrong"


def test_a_truncation_that_cuts_turns_the_claim_of_the_bounds(monkeypatch):
    torch = pytest.importorskip("torch")
    plain = torch.nn.init.trunc_normal_

    def in_sigma(w, std, a, b, generator):
        return plain(w, std=std, a=max(a, -3 * std), b=min(b, 3 * std), generator=generator)

    monkeypatch.setattr(torch.nn.init, "trunc_normal_", in_sigma)
    assert computed_again("9.12").verdict == "right"


def test_an_initialiser_that_is_a_tenth_too_wide_turns_its_claims(monkeypatch):
    torch = pytest.importorskip("torch")
    plain = torch.nn.init.normal_
    monkeypatch.setattr(
        torch.nn.init, "normal_", lambda w, std, generator: plain(w, std=1.1 * std, generator=generator)
    )
    assert [computed_again(id).verdict for id in ("9.5", "9.7", "9.14")] == ["wrong", "wrong", "wrong"]


def test_zero_that_shards_nothing_turns_its_claim(monkeypatch):
    pytest.importorskip("torch")
    from bursar.lecture import chapter10

    monkeypatch.setattr(chapter10, "zero_bytes", lambda stage, ranks, **parts: 16.0)
    assert computed_again("10.26").verdict == "wrong"


def test_an_id_is_executed_once():
    lecture.evaluate(lecture.notes()["7.1"])
    with pytest.raises(ValueError, match=r"claim 7\.1 is executed by amount_and_speed already"):
        lecture.claim("7.1")(lambda notes: None)


# ---- the command


def test_json_has_ids_words_and_values(executed, capsys):
    main(["lecture", "9", "--json"])
    out = json.loads(capsys.readouterr().out)
    assert out["schema_version"] == 1
    assert [c["id"] for c in out["claims"]] == [f"9.{n}" for n in range(1, 22)]
    assert all(set(c) == {"id", "claim", "notes", "computed", "verdict", "correct"} for c in out["claims"])
    by_id = {c["id"]: c for c in out["claims"]}
    assert (by_id["9.11"]["computed"], by_id["9.11"]["verdict"]) == ("0.0078125", "right")
    assert (by_id["9.10"]["computed"][:8], by_id["9.10"]["verdict"]) == ("1.999/in", "wrong")
    assert {c.verdict for c in lecture_record(list(executed.values())).claims} == set(VERDICTS)


def test_the_page_says_each_verdict_in_words_and_counts_them(executed, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    out = console()
    for part in render(list(executed.values())):
        out.print(part)
    page = capsys.readouterr().out
    assert max(map(len, page.splitlines())) <= 80
    assert re.search(r"7\.6  B = 16384.*\n +notes +8\.8e15 FLOP *\n +bursar +8796093022208 FLOP = 2\^43", page)
    for id, line in executed.items():
        assert f"\n{id}  " in page
        assert f"  verdict  {line.verdict}" in page
    assert "111 claims: 50 right, 21 depends, 21 misleading, 18 wrong, 1 not checkable" in page.replace("\n", " ")


def test_explain_names_the_conditions_that_were_tested(capsys):
    main(["lecture", "9", "--explain"])
    assert "tested   assigned to a module, it is listed: yes" in capsys.readouterr().out


def test_an_unknown_chapter_names_those_there_are(capsys):
    with pytest.raises(BadInput, match="no chapter 11 in the notes; give one of 7, 8, 9, 10"):
        lecture.execute(11)
    with pytest.raises(SystemExit) as ended:
        main(["lecture", "11"])
    assert ended.value.code == 2
    assert "7, 8, 9, 10" in capsys.readouterr().err


def test_without_torch_the_command_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        main(["lecture", "7"])
    assert ended.value.code == 3
    assert "pip install 'bursar[torch]'" in capsys.readouterr().err
