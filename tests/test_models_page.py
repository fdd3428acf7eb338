"""``docs/models.md`` says what runs of small models show now."""

from __future__ import annotations

import re
from pathlib import Path

import architectures
import models_page
import pytest

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
OUT_OF_DATE = "out of date: run python tests/models_page.py > docs/models.md"
ROW = re.compile(r"^\| (.+) \|$", re.M)


def rows(text: str) -> dict[str, list[str]]:
    """The cells of each table row, by the first."""
    cells = [row.split(" | ") for row in ROW.findall(text)]
    return {row[0]: row[1:] for row in cells}


@pytest.mark.parametrize("name", [*architectures.LANGUAGE, *architectures.VISION])
def test_coverage_in_full_size_is_current(name):
    first, *cells = models_page.published_cells(name)
    assert rows(PAGE.read_text())[first][: len(cells)] == cells, OUT_OF_DATE


def test_kinds_of_layers_are_current():
    page = PAGE.read_text()
    reasons = {text: int(number) for number, text in re.findall(r"^(\d+)\. (.*)$", page, re.M)}
    assert "\n".join(models_page.kind_lines(reasons)) in page, OUT_OF_DATE


def test_lightnings_features_are_current():
    assert "\n".join(models_page.feature_lines()) in PAGE.read_text(), OUT_OF_DATE


@pytest.mark.parametrize("test", [test for feature in models_page.LIGHTNING for test in feature.tests])
def test_the_tests_that_the_page_names_are_there(test):
    file, _, name = test.partition(":")
    assert f"def test_{name}(" in (models_page.TESTS / f"test_{file}.py").read_text()


@pytest.mark.parametrize("name", ["llama", "deit_tiny"])
def test_a_small_model_runs_as_the_page_says(name, tmp_path):
    runs, same, *_ = models_page.run_cells(name, tmp_path / "run", {})
    assert (runs, same) == ("yes", "yes")
    assert rows(PAGE.read_text())[name][3:5] == [runs, same]


@pytest.mark.long
def test_the_page_is_current():
    fresh, page = rows(models_page.render()), rows(PAGE.read_text())
    assert list(fresh) == list(page), OUT_OF_DATE
    for name, cells in fresh.items():
        if name not in architectures.LANGUAGE and name not in architectures.VISION:
            assert page[name] == cells, OUT_OF_DATE
            continue
        *words, zeros, bits = cells
        *written, written_zeros, written_bits = page[name]
        assert written == words, OUT_OF_DATE
        if zeros != "-":  # rounding may differ in the last digit between processors
            assert float(zeros.rstrip("%")) == pytest.approx(float(written_zeros.rstrip("%")), abs=2.01), OUT_OF_DATE
            assert float(bits) == pytest.approx(float(written_bits), abs=0.11), OUT_OF_DATE
