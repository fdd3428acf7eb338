"""``docs/export.md`` says what the targets do now."""

from pathlib import Path

import export_table
import pytest
from exports import checks_here  # noqa: F401  # a fixture

PAGE = Path(__file__).parent.parent / "docs" / "export.md"
pytest.importorskip("compressed_tensors")
pytest.importorskip("xllamacpp")
pytest.importorskip("onnxscript")
pytest.importorskip("openvino")


@pytest.mark.long
def test_the_page_is_current(checks_here):  # noqa: F811
    assert PAGE.read_text() == export_table.page(), "out of date: run python tests/export_table.py > docs/export.md"


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("`RTN`", "llama"),
        ("`QuaRot`", "llama"),
        ("SparseGPT, GPTQ", "llama"),
        ("RTN 8, ActivationQuantization", "llama"),
        ("`RTN`", "deit"),
    ],
)
def test_a_row_of_the_page_is_current(title, kind, tmp_path, checks_here):  # noqa: F811
    found = export_table.examine(title, kind, tmp_path)
    group, kinds = next(item for item in export_table.GROUPS.items() if kind in item[1])
    _, _, table = PAGE.read_text().partition(f"## {group}\n")
    row = next(line for line in table.splitlines() if line.startswith(f"| {title} |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")][1:]
    for name, cell in zip(export_table.targets(group), cells[:: len(kinds)], strict=True):
        assert cell == found[name][0] or (cell.startswith("no [") and found[name][0] not in ("yes", "padded"))
