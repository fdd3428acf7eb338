"""One export: read the run, refuse what the format cannot hold, write, check, move into place, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from pqqp_lightning.argument_types import path_problems, wrong_types
from pqqp_lightning.errors import Problem, RecipeError, shorten
from pqqp_lightning.export.card import CARD, write_card
from pqqp_lightning.export.compressed_size import compressed_remark
from pqqp_lightning.export.destination import check_kind, check_out, destination, failed_name, new_parents
from pqqp_lightning.export.discovery import find_target
from pqqp_lightning.export.hub import check_hub, upload
from pqqp_lightning.export.runtime_check import Agreement, RuntimeFailed
from pqqp_lightning.export.source import read_run
from pqqp_lightning.export.target import DTYPES, DType, Exported, Target
from pqqp_lightning.export.tensor_check import compare_tensors
from pqqp_lightning.storage.run_folder import check_run_folder

FAILED = "CHECK_FAILED.txt"
"""Marks a folder whose check failed, and says why."""


class CheckFailed(Exception):
    """The written model is not the run's. The folder is marked with :data:`FAILED`."""


@dataclass
class Export:
    """What an export did.

    Attributes:
        out: the folder or file that was written.
        size_bytes: of everything in it.
        own_bytes: of the run's own checkpoint.
        remarks: what was rewritten, and what the format loses or makes larger.
        checks: what was compared, in whole sentences.
        agreements: with the run's outputs, by program that was run.
        failures: what differs; empty for a good export.
        loading: how to load it, by program.
        uploaded: its address on the hub; empty if it was not uploaded.
    """

    out: Path
    size_bytes: int = 0
    own_bytes: int = 0
    remarks: list[str] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    agreements: dict[str, Agreement] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    loading: dict[str, str] = field(default_factory=dict)
    uploaded: str = ""

    @property
    def agreement(self) -> Any:
        """That with the first program; None if none was run."""
        return next(iter(self.agreements.values()), None)


def export_run(
    run: str | Path,
    *,
    to: str,
    out: str | Path,
    dtype: DType | None = None,
    widen: bool = True,
    pad: bool = False,
    check: bool = True,
    push_to_hub: str | None = None,
    **options: Any,
) -> Export:
    """Write the model of a run in a format that other programs load.

    Nothing is quantized again: codes, scales and zero points are written as they are. The result appears at ``out`` as
    a whole, after its checks.

    Args:
        run: the run folder.
        to: the target, such as hf.
        out: the folder to write, which may exist if it is empty; or the file, as in model.gguf.
        dtype: of everything that is not stored as codes: float16, bfloat16 or float32. By default float16 for language
            models, float32 for others.
        widen: store codes in more bits where the target has no such width. No value changes.
        pad: write zeros in place of channels, heads or sublayers that were removed unevenly. This is exact.
        check: compare every written tensor with the run's, and load the result in another process where its program is
            installed.
        push_to_hub: upload the folder, with its model card, as this model of the Hugging Face hub, such as me/my-model.
            The export is complete before; a failed check is not uploaded.
        options: those of the target alone, such as weights="qdq" of onnx; see the ``Args`` of its class, or --help.

    Raises:
        RecipeError: with everything that stands against the export, before anything is written.
        CheckFailed: the result differs from the run; its folder is marked.
        NotUploaded: the hub cannot be reached, or refuses.
    """
    if problems := check_export(
        run, to=to, out=out, dtype=dtype, widen=widen, pad=pad, check=check, push_to_hub=push_to_hub, **options
    ):
        raise RecipeError(problems)
    run, out = Path(run).expanduser(), Path(out).expanduser()
    target, model = _prepare(run, find_target(to, **options), dtype, widen, pad)
    done = Export(out, own_bytes=model.source.checkpoint_bytes, loading=target.loading_words(out))
    zeros = _zeros_remark(model)
    done.remarks = [*model.rewritten, *zeros, *target.remarks(model), *model.incomplete]
    rank_zero_info(" ".join([f"Writing {run} to {out}{new_parents(out)}.", *done.remarks]))
    with destination(out, target, lambda: bool(done.failures)) as folder:
        target.write(model, folder)
        if zeros:
            done.remarks.append(compressed_remark(folder))
        done.size_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if check:
            _check(target, model, folder, done)
        else:
            done.checks.append("Not checked (--check false).")
        write_card(folder, target, model, done.remarks, done.checks, push_to_hub or out.name)
        for file in folder.rglob("*"):
            if file.is_file():  # safetensors writes files that only their owner may read
                file.chmod((folder / CARD).stat().st_mode)
        if done.failures:
            (folder / FAILED).write_text("\n".join(done.failures) + "\n", encoding="utf-8")
    if done.failures:
        shown = " ".join(done.failures[:3]) + (f" And {len(done.failures) - 3} more." if done.failures[3:] else "")
        where = f"The file is {failed_name(out)}." if target.is_file(out) else f"The folder is marked with {FAILED}."
        raise CheckFailed(f"{out}: the check failed: {shown} {where}")
    if push_to_hub is not None:
        done.uploaded = upload(out, push_to_hub)
    return done


def check_export(
    run: str | Path,
    *,
    to: str,
    out: str | Path,
    dtype: DType | None = None,
    widen: bool = True,
    pad: bool = False,
    check: bool = True,
    push_to_hub: str | None = None,
    **options: Any,
) -> list[Problem]:
    """What is wrong with the arguments of :func:`export_run`, before the model is loaded."""
    problems = wrong_types(export_run, {"to": to, "widen": widen, "pad": pad, "check": check})
    problems += path_problems(run=run, out=out)
    if problems:
        return problems
    run, out = Path(run).expanduser(), Path(out).expanduser()
    problems = check_out(out, run)
    target = None
    try:
        target = find_target(to, **options)
        problems += check_kind(out, target)
    except RecipeError as error:
        problems += error.problems
    problems += _check_dtype(dtype, target.dtypes if target else DTYPES, to)
    return [*problems, *check_hub(push_to_hub, out, target), *check_run_folder(run)]


def _prepare(run: Path, target: Target, dtype: DType | None, widen: bool, pad: bool) -> tuple[Target, Exported]:
    """The target and what it writes.

    Raises:
        RecipeError: with all problems of the model.
    """
    model = target.prepare(read_run(run), dtype=dtype or target.dtypes[0], widen=widen, pad=pad)
    problems = [*model.problems, *_check_range(model), *target.problems(model)]
    if problems:
        raise RecipeError(problems)
    return target, model


def _check_dtype(dtype: str | None, known: Sequence[str], to: str) -> list[Problem]:
    if dtype is None or dtype in known:
        return []
    text = f"is not one of {', '.join(DTYPES)}" if dtype not in DTYPES else f"is not written by --to {to}"
    return [Problem("dtype", dtype, text, f"Use {known[0]}.")]


def _check_range(model: Exported) -> list[Problem]:
    """The problem if values are too large for the exported dtype."""
    largest = torch.finfo(model.torch_dtype).max
    too_large = [
        name
        for name, tensor in model.weights.items()
        if tensor.is_floating_point() and tensor.numel() and float(tensor.abs().max()) > largest
    ]
    if not too_large:
        return []
    text = f"cannot hold the values of {shorten(too_large, what='weight')}"
    return [Problem("dtype", model.dtype, text, "Use --dtype bfloat16 or float32.")]


def _zeros_remark(model: Exported) -> list[str]:
    """What happens to pruned entries, if there are many."""
    entries = zeros = 0
    for name in model.compressible:
        tensor = model.weights[name]
        entries += tensor.numel()
        zeros += int((tensor == 0).sum())
    if not entries or zeros / entries < 0.2:
        return []
    return [f"{zeros / entries:.0%} zeros are kept as values: this format does not store them compactly."]


def _check(target: Target, model: Exported, folder: Path, done: Export) -> None:
    """Compare the tensors, then the outputs."""
    count, done.failures = compare_tensors(target, model, folder)
    if done.failures:
        return
    done.checks.append(f"{count} tensors, decoded from the files, equal the run's in {model.dtype}.")
    for runtime in target.runtimes:
        if runtime.missing():
            done.checks.append(f"Not checked in {runtime.name}: pip install {runtime.package}.")
            continue
        if lacking := model.missing_for(runtime):
            done.checks.append(f"Not checked in {runtime.name}: it needs {lacking}, and the run has none.")
            continue
        try:
            agreement = model.compare(runtime, folder)
        except RuntimeFailed as error:
            done.failures.append(f"{runtime.name} does not load it: {error}.")
            continue
        done.agreements[runtime.name] = agreement
        words = f"{runtime.name} {agreement.version} in a process of its own: {agreement.words()}."
        if limit := agreement.limit():
            done.failures.append(f"Outputs differ too much ({limit}): {words}")
        else:
            done.checks.append(words)
