"""``docs/composition.md`` says what the stages' checks say now."""

from pathlib import Path

import composition
import pytest
import tiny

from pqqp_lightning import Stage
from pqqp_lightning.runs.checks import check_stages
from pqqp_lightning.runs.run_data import RunData

PAGE = Path(__file__).parent.parent / "docs" / "composition.md"


@pytest.mark.long
def test_the_page_is_current():
    fresh = composition.render(composition.examine())
    assert PAGE.read_text() == fresh, "out of date: run python tests/composition.py > docs/composition.md"


def cells_of(table):
    """The cells of each stage's row."""
    found = {}
    for line in table.splitlines():
        if line.startswith("| `"):
            name, *cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
            found[name] = cells
    return found


@pytest.mark.parametrize("kind", ["llama", "resnet"])
def test_rows_of_the_page_are_current(kind, tmp_path):
    """The column of one model in the first table, and what may follow SparseGPT and QuaRot in the second."""
    data = RunData(tiny.make_model(kind), datamodule=tiny.make_data(kind, tmp_path))
    models, _, orders = PAGE.read_text().partition("## In which order")
    rows, order = cells_of(models), cells_of(orders)
    column = [*composition.TITLES].index(kind)
    alone = [name for name in composition.STAGES if not check_stages(composition.stages_named(name), data)[-1]]
    assert alone == [name for name in composition.STAGES if rows[name][column] == "yes"]
    for first in ("SparseGPT", "QuaRot"):
        for second, cell in zip(composition.STAGES, order[first], strict=True):
            if first in alone and second in alone and first != second and (cell == "yes" or cell.startswith("no [")):
                refused = check_stages(composition.stages_named(first, second), data)[-1]
                assert bool(refused) == (cell != "yes"), (first, second)


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
