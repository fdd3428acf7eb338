"""An ONNX file, for ONNX Runtime, OpenVINO and others: image classifiers, and any module of tensors."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from pqqp_lightning.errors import Problem, RecipeError, shorten
from pqqp_lightning.export.network import AT_ONCE, CodedWeight, ExportedNetwork, network_of_run, refuse_language_model
from pqqp_lightning.export.onnx_graph import (
    PARTS,
    WIDTHS,
    CannotTrace,
    decoded_tensors,
    initializers,
    store_codes,
    stored_bits,
    trace,
)
from pqqp_lightning.export.onnx_integers import IntegerWeight, integer_weights, quantize_activations
from pqqp_lightning.export.samples import samples_of
from pqqp_lightning.export.source import FinishedRun
from pqqp_lightning.export.target import EXTRA, DType, Runtime, Target

if TYPE_CHECKING:
    from onnx import ModelProto

FILE = "model.onnx"
ONNX_RUNTIME = Runtime("ONNX Runtime", "onnxruntime", ("onnxruntime",), "onnx_runtime_outputs.py")
OPENVINO = Runtime("OpenVINO", "openvino", ("openvino",), "openvino_outputs.py")
DEQUANTIZED = "_DequantizeLinear_Output"
"""What ONNX Runtime's quantization appends to the name of a weight that it computes from codes."""
LARGEST_BYTES = 2_000_000_000
"""Of one file: protobuf reads no larger ones."""
AGREES = {"floats": 1e-3, "rounded inputs": 5e-2, "static ranges": 0.8}
"""Largest accepted difference of the outputs, relative to their norm.

Other kernels change a ResNet-18 and a DeiT by about 1e-6. A rounded input between two values of its grid falls either
way. Activations in 8 bits with static ranges are another function than the run's: the digits ResNet differs by 0.2 and
has the same top for 97% of samples, an untrained one by 0.35 to 0.71, whatever was quantized, and a DeiT by less than
0.3. Unrelated outputs differ by 1.4, and outputs of 0 by 1.
"""
Weights = Literal["dense", "dequantize", "qdq"]


class Onnx(Target[ExportedNetwork]):
    """One ONNX file.

    Args:
        weights: how quantized layers are stored. dequantize: their codes, and nodes that compute the weights from them.
            qdq: these, and activations in 8 bits with static ranges, which integer kernels run. dense: floats.
        example: for a run that keeps no samples of its inputs: the shape of one, as in 3x224x224, or a .npy file.
    """

    name = "onnx"
    summary = "one file for ONNX Runtime and OpenVINO: image classifiers, and any module of tensors"
    loading: ClassVar[dict[str, str]] = {
        "ONNX Runtime": 'onnxruntime.InferenceSession("{out}")  # needs pip install onnxruntime',
        "OpenVINO": 'openvino.Core().compile_model("{out}", "CPU")  # needs pip install openvino',
    }
    writes = "image classifiers and modules of tensors"
    requires = ("onnx", "onnxscript")
    file = FILE
    dtypes: ClassVar[tuple[DType, ...]] = ("float32",)
    card: ClassVar[dict[str, str]] = {"library_name": "onnx"}

    def __init__(self, weights: Weights = "dequantize", example: str | None = None) -> None:
        self.weights = weights
        self.example = example
        self._graph: Any = None  # of onnx, float weights
        self._named: set[str] = set()  # the network's tensors that the graph uses
        self._integers: dict[str, IntegerWeight] = {}  # of --weights qdq

    @property
    def runtimes(self) -> tuple[Runtime, ...]:
        return (ONNX_RUNTIME, OPENVINO)

    def prepare(self, run: FinishedRun, *, dtype: DType, widen: bool, pad: bool) -> ExportedNetwork:
        refuse_language_model(run, self.name)
        if pad:
            text = "means nothing for --to onnx, which writes any structure as it is"
            raise RecipeError(Problem("pad", True, text, "Leave --pad out."))
        model = network_of_run(
            run, samples_of(run, self.example), dtype=dtype, widen=widen, largest_relative=AGREES["floats"]
        )
        if model.rounding_layers():
            model = replace(model, largest_relative=AGREES["rounded inputs"])
        if self.weights == "qdq":
            model = replace(model, largest_relative=AGREES["static ranges"])
        return model if self._code_problems(model) else self._traced(model)

    def _traced(self, model: ExportedNetwork) -> ExportedNetwork:
        """Trace the graph; the model with what it takes at once."""
        run = model.source
        output = "logits" if hasattr(run.module, "num_classes") else "output"
        try:
            with model.without_rounding() if self.weights == "qdq" else nullcontext():
                self._graph, at_once = trace(model.network, model.samples.inputs, model.input_names, output)
        except CannotTrace as error:
            text = f"cannot be written as ONNX by torch.onnx ({error})"
            way_out = "Change the model's forward, or use pqqp_lightning.load(RUN) for it."
            raise RecipeError(Problem("run", str(run.folder), text, way_out)) from error
        self._named = set(initializers(self._graph.graph)) & set(model.weights)
        changes = list(model.changes)
        if at_once is not None:
            changes.append("The model takes one sample at a time: its computation depends on their number.")
        return replace(model, changes=changes, at_once=at_once or AT_ONCE)

    def problems(self, model: ExportedNetwork) -> list[Problem]:
        problems = self._code_problems(model)
        if not problems and (size_bytes := self._graph.ByteSize()) > LARGEST_BYTES:
            text = f"takes {size_bytes / 1e9:.1f} GB, and an ONNX file holds 2"
            problems.append(Problem("run", str(model.source.folder), text, "Use pqqp_lightning.load(RUN) for it."))
        return problems

    def _code_problems(self, model: ExportedNetwork) -> list[Problem]:
        """What stands against the codes, without looking at the graph."""
        if self.weights == "qdq":
            return self._integer_problems(model)
        odd = [name for name, coded in self._coded(model).items() if coded.grid.bits not in WIDTHS]
        if model.widen or not odd:
            return []
        text = f"leaves {shorten(odd, what='weight')} in bits that ONNX does not have"
        return [Problem("widen", False, text, "Use --widen true.")]

    def write(self, model: ExportedNetwork, folder: Path) -> None:
        import onnx

        written: ModelProto = self._graph
        tensors = model.weights
        if self.weights == "qdq":
            self._integers = integer_weights(written, self._coded(model), tensors)
            samples = model.samples.calibration or model.samples.inputs
            written = quantize_activations(written, self._integers, model.input_names, samples, model.at_once)
            onnx.save(written, folder / FILE)
            return
        for name, coded in self._coded(model).items():
            bits = self._bits(coded, model.widen)
            store_codes(written, name, tensors[name], coded.grid, coded.layout, bits)
        onnx.checker.check_model(written)
        onnx.save(written, folder / FILE)

    def decoded(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        import onnx

        for stored_name, tensor in decoded_tensors(onnx.load(folder / FILE)):
            name = stored_name.removesuffix(DEQUANTIZED)
            if self._integers:
                if name in self._integers:
                    yield name, tensor
            elif name in self._named and not name.endswith(PARTS):
                yield name, tensor

    def expected(self, model: ExportedNetwork) -> Iterator[tuple[str, Tensor]]:
        for name, integers in self._integers.items():
            yield name, torch.from_numpy(integers.values())
        for name, tensor in model.weights.items():
            if name in self._named and not self._integers:
                yield name, model.in_dtype(tensor)

    def remarks(self, model: ExportedNetwork) -> list[str]:
        coded = self._coded(model)
        remarks = []
        if self.weights == "dense" and model.coded:
            remarks.append(f"Quantized weights are written as {model.dtype} values (--weights dense).")
        if wider := [name for name, c in coded.items() if self._bits(c, model.widen) > c.grid.bits]:
            remarks.append(f"The codes of {shorten(wider, what='weight')} are stored in more bits; no value changes.")
        if self.weights == "qdq":
            return [*remarks, *self._integer_remarks(model)]
        if coded:
            remarks.append("Programs compute in floats with these codes: the file is smaller, not faster.")
        if rounding := list(model.rounding_layers()):
            remarks.append(f"{shorten(rounding)} round their inputs in floats, as in the run, which takes time.")
        remarks.append(f"The weights that carry no codes are {model.dtype}.")
        return remarks

    def _bits(self, coded: CodedWeight, widen: bool) -> int:
        """In which the codes of a weight are stored."""
        return 8 if self.weights == "qdq" else stored_bits(coded.grid, widen)

    def _integer_problems(self, model: ExportedNetwork) -> list[Problem]:
        """What integer kernels do not read."""
        coded = self._coded(model)
        run = str(model.source.folder)
        other = "Use --weights dequantize."
        problems = []
        if importlib.util.find_spec("onnxruntime") is None:
            problems.append(
                Problem("weights", "qdq", "needs onnxruntime, which is not installed", f"Install it: {EXTRA}.")
            )
        if not coded:
            problems.append(Problem("run", run, "has no layer with integer codes", "Use --weights dense."))
        if grouped := [name for name, c in coded.items() if c.grid.scale.shape[1] > 1]:
            text = (
                f"has {shorten(grouped, what='weight')} with scales for groups of columns, which integer kernels lack"
            )
            problems.append(Problem("run", run, text, f"{other} Or quantize without group_size."))
        if asymmetric := [name for name, c in coded.items() if c.grid.zero is not None]:
            text = f"has {shorten(asymmetric, what='weight')} with zero points, which integer kernels lack"
            problems.append(Problem("run", run, text, f"{other} Or quantize with symmetric: true."))
        if narrow := [name for name, rounding in model.rounding_layers().items() if rounding.bits != 8]:
            text = f"rounds the inputs of {shorten(narrow)} to other than 8 bits, which integer kernels lack"
            problems.append(Problem("run", run, text, f"{other} Or use ActivationQuantization with bits: 8."))
        if not model.widen and (wider := [name for name, c in coded.items() if c.grid.bits != 8]):
            text = f"leaves {shorten(wider, what='weight')} in bits that integer kernels lack"
            problems.append(Problem("widen", False, text, "Use --widen true."))
        return problems

    def _integer_remarks(self, model: ExportedNetwork) -> list[str]:
        """What integers change."""
        used = model.samples.calibration or model.samples.inputs
        kind = "calibration" if model.samples.calibration else model.samples.kind
        remarks = [
            f"Activations have 8 bits in ranges from {len(used[0])} {kind} samples, biases 32; BatchNorm is multiplied "
            "into the scales."
        ]
        if model.rounding_layers():
            remarks.append("The run rounds activations with a scale for each sample; here ranges are fixed.")
        return remarks

    def _coded(self, model: ExportedNetwork) -> dict[str, CodedWeight]:
        """The weights that are written as codes."""
        if self.weights == "dense":
            return {}
        return {name: coded for name, coded in model.coded.items() if name in self._named or self._graph is None}
