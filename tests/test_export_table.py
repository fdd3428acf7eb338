"""``docs/export.md`` says what the targets do now."""

from pathlib import Path

import export_table
import pytest
from exports import checks_here  # noqa: F401  # a fixture

PAGE = Path(__file__).parent.parent / "docs" / "export.md"
pytest.importorskip("compressed_tensors")
pytest.importorskip("xllamacpp")


@pytest.mark.long
def test_the_page_is_current(checks_here):  # noqa: F811
    assert PAGE.read_text() == export_table.page(), "out of date: run python tests/export_table.py > docs/export.md"


@pytest.mark.parametrize("title", ["`RTN`", "`QuaRot`", "SparseGPT, GPTQ"])
def test_a_row_of_the_page_is_current(title, tmp_path, checks_here):  # noqa: F811
    found = export_table.examine(title, "llama", tmp_path)
    row = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| {title} |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")][1:]
    for name, cell in zip(export_table.targets(), cells[:: len(export_table.KINDS)], strict=True):
        assert cell == found[name][0] or (cell.startswith("no [") and found[name][0] not in ("yes", "padded"))
