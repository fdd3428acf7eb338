"""A folder that timm loads by itself: an image network with dense weights, where its structure is timm's own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.export.source import FinishedRun
from pqqp_lightning.export.stock_files import read_tensors
from pqqp_lightning.export.stock_network import StockNetwork, stock_network
from pqqp_lightning.export.target import DType, Runtime, Target


class Timm(Target[StockNetwork]):
    """Dense tensors, and the architecture's name and preprocessing, in timm's own layout.

    Args:
        example: for a run that keeps no samples of its inputs: the shape of one, as in 3x224x224, or a .npy file.
    """

    name = "timm"
    summary = "a timm network's dense weights, as timm loads them"
    loading: ClassVar[dict[str, str]] = {"timm": 'timm.create_model("local-dir:{out}", pretrained=True)'}
    writes = "image networks"
    runtime = Runtime("timm", "timm", ("timm",), "timm_outputs.py")
    dtypes: ClassVar[tuple[DType, ...]] = ("float32", "float16", "bfloat16")
    card: ClassVar[dict[str, str]] = {"library_name": "timm", "pipeline_tag": "image-classification"}

    def __init__(self, example: str | None = None) -> None:
        self.example = example

    def prepare(self, run: FinishedRun, *, dtype: DType, widen: bool, pad: bool) -> StockNetwork:
        return stock_network(run, "timm", _build, example=self.example, dtype=dtype, widen=widen, pad=pad)

    def problems(self, model: StockNetwork) -> list[Problem]:
        from timm.models import save_for_hf

        if "data_config" in inspect.signature(save_for_hf).parameters:
            return []
        return [Problem("to", self.name, "needs a later timm", "Install it: pip install -U timm.")]

    def write(self, model: StockNetwork, folder: Path) -> None:
        from timm.models import save_for_hf

        inputs = model.samples.inputs[0]
        data_config: dict[str, Any] = {"input_size": list(inputs.shape[1:]), "crop_pct": 1.0}
        data_config |= model.samples.preprocessing
        reference: Any = model.reference
        reference.to(model.torch_dtype)
        save_for_hf(
            reference, str(folder), model_args=model.arguments, safe_serialization=True, data_config=data_config
        )

    def decoded(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        return read_tensors(folder)

    def remarks(self, model: StockNetwork) -> list[str]:
        if model.samples.preprocessing:
            return []
        return ["The run does not say how its images are normalised; config.json has the architecture's own numbers."]


def _build(name: str, arguments: dict[str, Any]) -> nn.Module:
    import timm

    try:
        return timm.create_model(name, pretrained=False, **arguments)
    except TypeError as error:
        if "img_size" not in str(error) or "img_size" not in arguments:
            raise RecipeError(Problem("run", text=f"cannot be built by timm ({error})")) from error
    del arguments["img_size"]  # networks for any size do not know it
    return timm.create_model(name, pretrained=False, **arguments)
