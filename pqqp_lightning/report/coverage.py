"""Says what stages leave of a model, and shows the whole model's zeros and bits where they differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from pqqp_lightning.report.formatting import SIZE_COLUMNS, size_columns
from pqqp_lightning.storage.reports import CoverageNumbers, Record

ENOUGH = 0.9
"""A stage that covers this share of the parameters needs no words."""
OF_MODEL = " (model)"
EXPLANATION = (
    "zeros, bits/weight and nominal C are of the weights that the stages cover. The numbers in parentheses, size and C "
    "are of the whole model."
)


def coverage_text(coverage: CoverageNumbers) -> str:
    """``"11% of the parameters; left: 3-D expert weights 85%, embeddings 4%"``, without kinds that round to 0%."""
    total = max(1, coverage["parameters"])
    covered = round(100 * coverage["covered"] / total)
    share = "less than 1%" if coverage["covered"] and not covered else f"{covered}%"
    left = left_text(coverage)
    return f"{share} of the parameters" + (f"; left: {left}" if left else "")


def left_text(coverage: CoverageNumbers) -> str:
    """``"3-D expert weights 85%, embeddings 4%"``, without kinds that round to 0%."""
    left = []
    for kind, parameters in coverage["left"].items():
        percent = round(100 * parameters / max(1, coverage["parameters"]))
        if percent:
            left.append(f"{kind} {percent}%")
    return ", ".join(left)


def coverage_notes(records: Sequence[Record]) -> list[tuple[str, str]]:
    """What stages cover that leave more than a tenth of the model: (names, words), equal words once."""
    names: dict[str, dict[str, None]] = defaultdict(dict)
    for record in records:
        coverage = record.get("coverage")
        if coverage is not None and coverage["covered"] < ENOUGH * coverage["parameters"]:
            names[coverage_text(coverage)][record["name"]] = None
    notes = []
    for text, stages in names.items():
        notes.append((", ".join(stages), f"{'cover' if len(stages) > 1 else 'covers'} {text}."))
    return notes


def shows_whole_model(records: Sequence[Record]) -> bool:
    """Whether the whole model's zeros or bits differ from the targeted weights' enough to be read beside them."""
    for record in records:
        sparsity, bits = record.get("model_sparsity"), record.get("model_bits_per_weight")
        if sparsity is None or bits is None:  # of an older version
            continue
        other_zeros = abs(record["sparsity"] - sparsity) >= 0.05
        other_bits = abs(record["bits_per_weight"] - bits) >= 0.1 * bits
        if other_zeros or other_bits:
            return True
    return False


def size_head(whole_model: bool) -> list[str]:
    """Names of the columns of :func:`size_cells`."""
    zeros, bits, *others = SIZE_COLUMNS
    return [f"{zeros}{OF_MODEL}", f"{bits}{OF_MODEL}", *others] if whole_model else list(SIZE_COLUMNS)


def size_cells(record: Record, whole_model: bool) -> list[str]:
    """The columns of :func:`size_columns`; with ``whole_model`` the whole model's zeros and bits in parentheses."""
    zeros, bits, *others = size_columns(record)
    sparsity, model_bits = record.get("model_sparsity"), record.get("model_bits_per_weight")
    if whole_model and sparsity is not None and model_bits is not None:
        zeros += f" ({100 * sparsity:.1f}%)"
        bits += f" ({model_bits:.2f})"
    return [zeros, bits, *others]
