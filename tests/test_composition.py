"""``docs/composition.md`` says what the stages' checks say now."""

from pathlib import Path

import composition
import tiny

from pqqp_lightning import Stage

PAGE = Path(__file__).parent.parent / "docs" / "composition.md"


def test_the_page_is_current():
    fresh = composition.render(composition.examine())
    assert PAGE.read_text() == fresh, "out of date: run python tests/composition.py > docs/composition.md"


def test_reasons_lose_the_names_of_one_model():
    problem = "group_size=3 does not divide in_features=64 of 2 layers (a.b, c.d). Use 4."
    assert composition.reason_of(problem) == "group_size=3 does not divide in_features=N of some layers. Use 4."


class Shrink(Stage):
    """A method that cannot do without two arguments.

    Example::

        stages:
          shrink: {class_path: Shrink, init_args: {factor: 0.5, where: all, epochs: 3}}
    """

    source = "a test"

    def __init__(self, factor, where, **kwargs):
        super().__init__(**kwargs)
        self.factor, self.where = factor, where


def test_a_new_stage_is_made_with_the_arguments_that_it_needs():
    stage = tiny.make_stage(Shrink, "small")
    assert (stage.factor, stage.where, stage.epochs, stage.name) == (0.5, "all", 0, "small")
