"""``docs/composition.md`` says what the stages' checks say now."""

from pathlib import Path

import composition

PAGE = Path(__file__).parent.parent / "docs" / "composition.md"


def test_the_page_is_current():
    fresh = composition.render(composition.examine())
    assert PAGE.read_text() == fresh, "run: python tests/composition.py > docs/composition.md"


def test_reasons_lose_the_names_of_one_model():
    problem = "group_size=3 does not divide in_features=64 of 2 layers (a.b, c.d). Use 4."
    assert composition.reason_of(problem) == "group_size=3 does not divide in_features=N of some layers. Use 4."
