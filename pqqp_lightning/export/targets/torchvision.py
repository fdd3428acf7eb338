"""A folder for torchvision: a state dict, and the architecture's name, where its structure is torchvision's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import save_file
from torch import Tensor, nn

from pqqp_lightning.errors import Problem
from pqqp_lightning.export.source import FinishedRun
from pqqp_lightning.export.stock_files import read_tensors
from pqqp_lightning.export.stock_network import StockNetwork, stock_network
from pqqp_lightning.export.target import DType, Runtime, Target


class Torchvision(Target[StockNetwork]):
    """Dense tensors in model.safetensors; name, arguments and preprocessing in config.json.

    Args:
        example: for a run that keeps no samples of its inputs: the shape of one, as in 3x224x224, or a .npy file.
    """

    name = "torchvision"
    summary = "a torchvision network's dense weights, with its name and arguments"
    loading: ClassVar[dict[str, str]] = {
        "torchvision": (
            'config = json.load(open("{out}/config.json")); '
            'model = torchvision.models.get_model(config["architecture"], weights=None, **config["model_args"]); '
            'model.load_state_dict(safetensors.torch.load_file("{out}/model.safetensors"))'
        )
    }
    writes = "image networks"
    runtime = Runtime("torchvision", "torchvision", ("torchvision",), "torchvision_outputs.py")
    dtypes: ClassVar[tuple[DType, ...]] = ("float32", "float16", "bfloat16")
    card: ClassVar[dict[str, str]] = {"library_name": "torchvision", "pipeline_tag": "image-classification"}

    def __init__(self, example: str | None = None) -> None:
        self.example = example

    def prepare(self, run: FinishedRun, *, dtype: DType, widen: bool, pad: bool) -> StockNetwork:
        return stock_network(run, "torchvision", _build, example=self.example, dtype=dtype, widen=widen, pad=pad)

    def problems(self, model: StockNetwork) -> list[Problem]:
        return []

    def write(self, model: StockNetwork, folder: Path) -> None:
        tensors = {name: model.in_dtype(tensor).contiguous() for name, tensor in model.stored().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config: dict[str, Any] = {
            "architecture": model.name,
            "model_args": model.arguments,
            "input_size": list(model.samples.inputs[0].shape[1:]),
            **model.samples.preprocessing,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def decoded(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        return read_tensors(folder)


def _build(name: str, arguments: dict[str, Any]) -> nn.Module:
    from torchvision import models

    try:
        return models.get_model(name, weights=None, **arguments)
    except TypeError as error:
        if "image_size" not in str(error) or "image_size" not in arguments:
            raise
    del arguments["image_size"]  # networks for any size do not know it
    return models.get_model(name, weights=None, **arguments)
