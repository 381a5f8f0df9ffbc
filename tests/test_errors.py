import pytest

from bursar import errors
from bursar.errors import (
    BadInput,
    BursarError,
    DataDependent,
    MissingExtra,
    NoAnswer,
    StepFailed,
    TraceFailed,
    UnknownName,
)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (BursarError, 2),
        (UnknownName, 2),
        (BadInput, 2),
        (DataDependent, 2),
        (TraceFailed, 2),
        (MissingExtra, 3),
        (NoAnswer, 1),
        (StepFailed, 1),
    ],
)
def test_every_error_is_a_bursar_error_with_its_exit_code(kind: type[BursarError], code: int) -> None:
    assert issubclass(kind, BursarError)
    assert kind.exit_code == code


def test_the_drawn_tree_names_every_error_the_module_exports() -> None:
    assert errors.__doc__ is not None
    for name in errors.__all__:
        assert name in errors.__doc__


def test_an_unknown_name_suggests_what_begins_with_it() -> None:
    error = UnknownName("accelerator", "h100", ["l4", "h100-sxm", "h200", "h100-pcie"])
    assert error.near == ("h100-sxm", "h100-pcie")
    assert str(error) == "no accelerator 'h100'; did you mean h100-sxm, h100-pcie?"


def test_an_unknown_name_that_begins_nothing_suggests_what_is_spelt_like_it() -> None:
    assert UnknownName("accelerator", "h10-sxm", ["l4", "h100-sxm"]).near == ("h100-sxm",)


def test_an_unknown_name_ignores_case_and_keeps_the_tables_spelling() -> None:
    assert UnknownName("model", "GPT3-175b", ["gpt3-175B"]).near == ("gpt3-175B",)


def test_a_name_near_nothing_lists_what_is_known() -> None:
    assert str(UnknownName("model", "zzz", ["gpt2", "cruncher"])) == "no model 'zzz'; known: gpt2, cruncher."


def test_an_empty_name_is_near_nothing_though_every_name_begins_with_it() -> None:
    assert UnknownName("model", "", ["gpt2"]).near == ()


def test_an_unknown_name_with_an_empty_table_says_so() -> None:
    assert str(UnknownName("plugin", "x", [])) == "no plugin 'x'; none is known."


def test_a_missing_extra_says_how_to_get_it() -> None:
    assert "pip install 'bursar[torch]'" in str(MissingExtra("torch", "bursar step traces the model"))


def test_a_data_dependent_forward_names_module_line_and_remedy() -> None:
    message = str(DataDependent("encoder.layer.3", "model.py:42", "pass a batch with --batch"))
    assert message == "the forward of encoder.layer.3 looks at its data at model.py:42; pass a batch with --batch"
