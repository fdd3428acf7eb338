"""The model card: README.md in the exported folder, as the hub shows it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pqqp_lightning.export.target import Exported, Target

CARD = "README.md"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
"""The hub refuses a card whose base model is not an id."""


def write_card(
    folder: Path, target: Target, model: Exported, remarks: Sequence[str], checks: Sequence[str], name: str
) -> None:
    """Write the model card.

    Args:
        folder: of the export.
        target: its format.
        model: what was written.
        remarks: what was rewritten, lost or made larger.
        checks: what was compared.
        name: of the exported folder, as the loading commands shall show it.
    """
    source = model.source
    head: dict[str, Any] = {**target.card, "tags": ["pqqp-lightning"]}
    if source.base_model and HUB_ID.fullmatch(source.base_model):
        head["base_model"] = source.base_model
    records = source.report.get("stages") or []
    base = source.base_model or model.described
    lines = ["---", yaml.safe_dump(head, sort_keys=False).strip(), "---", "", f"# {name}", ""]
    lines += [f"{base}, compressed by pqqp-lightning and written as {target.summary} ({model.dtype}).", ""]
    if records:
        lines += ["## Stages", "", *_stage_table(records), ""]
    if remarks:
        lines += ["## About these files", "", *[f"- {remark}" for remark in remarks], ""]
    lines += ["## Checked", "", *[f"- {check}" for check in checks], ""]
    lines += ["## Loading", ""]
    for program, words in target.loading_words(Path(name)).items():
        lines += [f"{program}:", "", "```", words, "```", ""]
    if source.recipe:
        lines += ["## Recipe", "", "```yaml", source.recipe.strip(), "```", ""]
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")


def _stage_table(records: Sequence[dict[str, Any]]) -> list[str]:
    """In Markdown: each stage in order, with the metrics after it."""
    metrics: list[str] = []
    for record in records:
        metrics += [metric for metric in record["metrics"] if metric not in metrics]
    rows = [["stage", *metrics, "size (MB)"], ["---"] * (len(metrics) + 2)]
    for record in records:
        values = [record["metrics"].get(metric) for metric in metrics]
        numbers = ["" if value is None else f"{value:.4g}" for value in values]
        method = record.get("method")
        label = record["name"] if not method or method == record["name"] else f"{record['name']} ({method})"
        rows.append([label, *numbers, f"{record['size_bytes'] / 1e6:.1f}"])
    return [f"| {' | '.join(row)} |" for row in rows]
