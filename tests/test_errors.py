"""A problem is data until it is shown; then it reads as one sentence with the way out."""

from __future__ import annotations

import copy
import pickle

import pytest

from pqqp_lightning.errors import NOT_GIVEN, Problem, RecipeError

DIVIDES = Problem("group_size", 100, "does not divide in_features=576", "Use 32, 64, 96 or 192.")


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (DIVIDES, "group_size=100 does not divide in_features=576. Use 32, 64, 96 or 192."),
        (
            DIVIDES.within("stages.quantize", "GPTQ"),
            "stages.quantize (GPTQ): group_size=100 does not divide in_features=576. Use 32, 64, 96 or 192.",
        ),
        (Problem("epochs", None, "is not a number"), "epochs=None is not a number."),
        (Problem("grid", text="is missing", way_out="Add it."), "grid is missing. Add it."),
        (Problem(text="needs data", way_out="Give some.").within("data"), "data: needs data. Give some."),
        (
            Problem(value=99, text="is not between 2 and 8").within("bits", "RTN"),
            "bits (RTN): 99 is not between 2 and 8.",
        ),
        (Problem(text="cannot be read: no such file."), "cannot be read: no such file."),
        (Problem("metric", "acc", "is what?"), "metric='acc' is what?"),
        (
            Problem("weight", 2, "is not in (0, 1]", source="recipe.yaml").within("stages.tune.distill"),
            "recipe.yaml: stages.tune.distill: weight=2 is not in (0, 1].",
        ),
    ],
)
def test_wording(problem, words):
    assert str(problem) == words


def test_a_section_goes_in_front_of_the_key():
    placed = DIVIDES.within("stages.quantize", "GPTQ")
    assert (placed.key, placed.argument) == ("stages.quantize.group_size", "group_size")
    whole = Problem(text="needs calibration data").within("stages.quantize")
    assert (whole.key, whole.argument) == ("stages.quantize", "")


def test_problems_that_differ_in_their_value_alone_are_two():
    one, other = (Problem("bits", bits, "is not between 2 and 8") for bits in (1, 9))
    assert list(dict.fromkeys([one, other, one])) == [one, other]
    assert len({Problem("bits", [1], "is a list"), Problem("bits", [1], "is a list")}) == 1  # a list has no hash


@pytest.mark.parametrize("again", [copy.deepcopy, lambda problem: pickle.loads(pickle.dumps(problem))])
def test_a_copy_reads_the_same(again):
    problem = again(Problem("grid", text="is missing"))
    assert problem.value is NOT_GIVEN
    assert str(problem) == "grid is missing."


def test_an_error_holds_all_problems_and_shows_one_a_line():
    error = RecipeError([DIVIDES, "run_dir is full"])
    assert error.problems == [DIVIDES, Problem(text="run_dir is full")]
    assert str(error).splitlines() == [str(DIVIDES), "run_dir is full"]
    assert RecipeError(DIVIDES).problems == RecipeError([DIVIDES]).problems == [DIVIDES]
