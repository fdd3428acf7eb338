"""Compares every tensor that a target's own library decodes from the written files with what the run holds."""

from __future__ import annotations

from pathlib import Path

import torch

from pqqp_lightning.export.target import Exported, Target


def compare_tensors(target: Target, model: Exported, folder: Path) -> tuple[int, list[str]]:
    """Decode the files in ``folder``, and compare each tensor bit for bit.

    Returns:
        How many tensors were compared, and what differs, in whole sentences.
    """
    expected = dict(target.expected(model))
    differing = []
    seen = set()
    for name, tensor in target.decoded(folder):
        seen.add(name)
        wanted = expected.get(name)
        if wanted is None:
            differing.append(f"{name} is in the files only.")
        elif tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            found = f"{tensor.dtype} {list(tensor.shape)}"
            differing.append(f"{name} is {found} instead of {wanted.dtype} {list(wanted.shape)}.")
        elif not torch.equal(tensor, wanted):
            count = int((tensor != wanted).sum())
            largest = float((tensor.double() - wanted.double()).abs().max())
            differing.append(f"{name}: {count:,} of {wanted.numel():,} entries differ, by up to {largest:.3g}.")
    differing += [f"{name} is missing." for name in expected if name not in seen]
    return len(seen), differing
