"""``pqqp-lightning generate`` and ``classify``: use a run's model, and print what it says."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pqqp_lightning.cli.run_options import RunOptions
from pqqp_lightning.inference.classification import Answer, Classified, check_classification, classify_images
from pqqp_lightning.inference.generation import Generated, check_generation, generate_text
from pqqp_lightning.report.blocks import Table
from pqqp_lightning.report.terminal import print_table

ROWS = 40
"""Images in the printed table; the CSV has all."""


def _show_speed(done: Generated) -> None:
    """The text itself was streamed to stdout; its speed goes to stderr."""
    speed = done.tokens / max(done.elapsed_s, 1e-9)
    print(f"{done.tokens} tokens, {speed:.1f} tokens/s.", file=sys.stderr)


def _show_classes(done: Classified) -> None:
    """Print the table of the images' classes; what was skipped goes to stderr."""
    for file, reason in done.skipped.items():
        print(f"{file}: skipped: {reason}", file=sys.stderr)
    print_table(_table(done.answers[:ROWS]))
    more = len(done.answers) - ROWS
    if more > 0:
        print(f"... and {more} more.")
    skipped = f", {len(done.skipped)} skipped" if done.skipped else ""
    print(f"{done.out}: {len(done.answers)} images{skipped}.")


def _table(answers: Sequence[Answer]) -> Table:
    head = ["file", "class", "probability"]
    if any(len(answer.classes) > 1 for answer in answers):
        head.append("next")
    rows = []
    for answer in answers:
        shares = [f"{probability:.1%}" for probability in answer.probabilities]
        further = [f"{name} {share}" for name, share in zip(answer.classes[1:], shares[1:], strict=True)]
        rows.append([str(answer.file), answer.classes[0], shares[0], ", ".join(further)][: len(head)])
    return Table("", head, rows, words=(0, 1, 3))


GENERATE = RunOptions(
    "generate",
    generate_text,
    _show_speed,
    check_generation,
    'pqqp-lightning generate RUN --prompt "TEXT" [options]',
    'pqqp-lightning generate runs/quickstart --prompt "Once upon a time"',
    when_missing={"prompt": lambda: 'Write --prompt "Once upon a time", or --prompt - to read it from stdin.'},
)
CLASSIFY = RunOptions(
    "classify",
    classify_images,
    _show_classes,
    check_classification,
    "pqqp-lightning classify RUN IMAGES... [options]",
    "pqqp-lightning classify runs/resnet18 photos --out classes.csv",
    when_missing={"images": lambda: "Name image files, or a folder of them, behind the run."},
)
