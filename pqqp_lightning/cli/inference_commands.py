"""``pqqp-lightning generate`` and ``classify``: use a run's model, and print what it says."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pqqp_lightning.cli.run_options import RunOptions
from pqqp_lightning.inference.classification import Answer, Classified, classify_images
from pqqp_lightning.inference.generation import Generated, generate_text
from pqqp_lightning.report.blocks import Table
from pqqp_lightning.report.terminal import print_table

ROWS = 40
"""Images in the printed table; the CSV has all."""

GENERATE = RunOptions(
    "generate",
    generate_text,
    'pqqp-lightning generate RUN --prompt "TEXT" [options]',
    'pqqp-lightning generate runs/quickstart --prompt "Once upon a time"',
    {"prompt": 'Write --prompt "Once upon a time", or --prompt - to read it from stdin.'},
)
CLASSIFY = RunOptions(
    "classify",
    classify_images,
    "pqqp-lightning classify RUN IMAGES... [options]",
    "pqqp-lightning classify runs/resnet18 photos --out classes.csv",
    {"images": "Name image files, or a folder of them, behind the run."},
)


def run_generate(arguments: Sequence[str]) -> None:
    """Stream text to stdout; its speed goes to stderr.

    Raises:
        RecipeError: with every problem of the command line or the run.
    """
    if asks_for_help(arguments):
        print(GENERATE.help(), end="")
        return
    done: Generated = GENERATE.call(arguments)
    speed = done.tokens / max(done.elapsed_s, 1e-9)
    print(f"{done.tokens} tokens, {speed:.1f} tokens/s.", file=sys.stderr)


def run_classify(arguments: Sequence[str]) -> None:
    """Print the table of the images' classes; what was skipped goes to stderr.

    Raises:
        RecipeError: with every problem of the command line or the run.
    """
    if asks_for_help(arguments):
        print(CLASSIFY.help(), end="")
        return
    done: Classified = CLASSIFY.call(arguments)
    for file, reason in done.skipped.items():
        print(f"{file}: skipped: {reason}", file=sys.stderr)
    print_table(_table(done.answers[:ROWS]))
    more = len(done.answers) - ROWS
    if more > 0:
        print(f"... and {more} more.")
    skipped = f", {len(done.skipped)} skipped" if done.skipped else ""
    print(f"{done.out}: {len(done.answers)} images{skipped}.")


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether the words after the command ask for its help."""
    return any(word in ("-h", "--help") for word in arguments)


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
