"""``pqqp-lightning export``: writes a run's model for other programs, and prints what was written and checked."""

from __future__ import annotations

from pqqp_lightning.cli.run_options import RunOptions
from pqqp_lightning.export.discovery import known_targets
from pqqp_lightning.export.export_run import CheckFailed, Export, check_export, export_run
from pqqp_lightning.export.hub import NotUploaded
from pqqp_lightning.report.formatting import human_bytes


def _show(done: Export) -> None:
    """Print what was written, what to know about it, what was checked, and how to load it."""
    size, own = human_bytes(done.size_bytes), human_bytes(done.own_bytes)
    lines = [f"{done.out}: {size} (the run's own checkpoint: {own}).", *done.remarks, *done.checks]
    if done.uploaded:
        lines.append(f"Uploaded to {done.uploaded}.")
    lines += [f"{program}: {words}" for program, words in done.loading.items()]
    print("\n".join(lines))


EXPORT = RunOptions(
    "export",
    export_run,
    _show,
    check_export,
    "pqqp-lightning export RUN --to TARGET --out PATH",
    "pqqp-lightning export runs/quickstart --to hf --out model",
    when_missing={"to": lambda: f"Choose one of {', '.join(known_targets())}."},
    targets=known_targets,
    failures=(CheckFailed, NotUploaded),
)
