"""What a run folder keeps besides the model, to use it: tokenizer, samples, or how images are prepared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from safetensors.torch import save_file
from torch import Tensor

from pqqp_lightning.checkpoint.nested import tensors_in
from pqqp_lightning.checkpoint.probe import first_call, undisturbed
from pqqp_lightning.network.constraints import constrained_layers
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.seeding import keep_random_state
from pqqp_lightning.storage.files import new_folder, write_json
from pqqp_lightning.storage.run_folder import RunFolder

SAMPLES = 4
"""Evaluation samples of a language model that are kept."""
MOST_SAMPLES = 64
"""Samples of other models that are kept, of evaluation and calibration each."""
MOST_BYTES = 8_000_000
"""Of fewer samples, if so many are larger."""


def keep_companions(folder: RunFolder, data: RunData) -> None:
    """Write what the model's use needs: samples; a tokenizer, or the preprocessing of images."""
    with keep_random_state():  # an iterator over a loader draws a seed, and a transform may draw numbers
        if callable(getattr(data.module, "save_tokenizer", None)):
            _keep_text_companions(folder, data)
        else:
            _keep_inputs(folder, data)
        describe = getattr(data.datamodule, "image_preprocessing", None)
        if callable(describe) and not folder.preprocessing.exists():
            write_json(folder.preprocessing, asdict(describe()))


def _keep_text_companions(folder: RunFolder, data: RunData) -> None:
    module: Any = data.module
    ids = _first_samples(data)
    if ids is not None:
        save_file({"input_ids": ids}, folder.samples)
    if not folder.tokenizer.exists():
        with new_folder(folder.tokenizer) as temporary:
            module.save_tokenizer(temporary, getattr(data.datamodule, "tokenizer", None))
        if not any(folder.tokenizer.iterdir()):
            folder.tokenizer.rmdir()


def _first_samples(data: RunData) -> Tensor | None:
    """Token ids [samples, T] of the first evaluation samples without padding; None if these are not rows of tokens."""
    loaders: Any = data.evaluation_loaders()
    loader = loaders[0] if isinstance(loaders, list | tuple) else loaders
    rows: list[Tensor] = []
    for batch in loader:
        ids = batch.get("input_ids") if isinstance(batch, dict) else None
        if not isinstance(ids, Tensor) or ids.dim() != 2 or (rows and len(rows[0]) != ids.shape[1]):
            break
        mask = batch.get("attention_mask")
        if mask is not None:
            ids = ids[mask.bool().all(1)]
        rows += ids.cpu().unbind(0)
        if len(rows) >= SAMPLES:
            break
    return torch.stack(rows[:SAMPLES]) if rows else None


def _keep_inputs(folder: RunFolder, data: RunData) -> None:
    """Write the model's inputs on the first evaluation and calibration samples, with the labels; none if it fails.

    Inputs are the tensors that the validation step passes to the first part of the module that it calls, most often the
    module itself. The metadata names this part.
    """
    try:
        with keep_random_state():
            called, tensors = _inputs_of(data, calibration=False)
            quantized = any(constraints.grid is not None for _, _, constraints in constrained_layers(data.module))
            if quantized and data.has_calibration_data():  # the ranges of its activations come from there
                calibration_called, calibration = _inputs_of(data, calibration=True)
                if calibration_called == called:
                    tensors |= {f"calibration.{name}": x for name, x in calibration.items() if name != "labels"}
    except Exception:  # data and step are the user's; an export then asks for an example
        return
    save_file(tensors, folder.inputs, metadata={"called": called})


def _inputs_of(data: RunData, *, calibration: bool) -> tuple[str, dict[str, Tensor]]:
    """The part of the module that the step calls first, and its inputs by position ("input.0"), with "labels".

    Raises:
        ValueError: the inputs are not tensors alone.
    """
    one = data.first_samples(1, calibration=calibration)
    size_bytes = sum(tensor.nbytes for tensor in tensors_in(one))
    count = max(1, min(MOST_SAMPLES, MOST_BYTES // max(size_bytes, 1)))
    batch = data.first_samples(count, calibration=calibration)
    with undisturbed(data.module):
        called, (given, named) = first_call(data.module, move_data_to_device(batch, data.module.device))
    if named or not given or not all(isinstance(value, Tensor) for value in given):
        raise ValueError("the inputs are not tensors alone")
    tensors = {f"input.{i}": value.detach().cpu().contiguous().clone() for i, value in enumerate(given)}
    labels = _labels_in(batch)
    if labels is not None and labels.shape == tensors["input.0"].shape[:1]:
        tensors["labels"] = labels.cpu().contiguous().clone()
    return called, tensors


def _labels_in(batch: Any) -> Tensor | None:
    """The class of each sample in a batch such as (images, labels) or {..., labels: ...}; None if there is none."""
    if isinstance(batch, Mapping):
        found = batch.get("labels")
    elif isinstance(batch, list | tuple) and len(batch) == 2:
        found = batch[1]
    else:
        found = None
    return found if isinstance(found, Tensor) and not found.is_floating_point() else None
