"""Full QDQ: an ONNX graph whose coded layers compute in 8-bit integers, by ONNX Runtime's static quantization.

Weights keep their codes. Each convolution takes up the BatchNorm behind it, which multiplies a row of weights, and so
the row's scale, by one number; a negative one turns the signs of the row's codes. Activations get one range each, from
samples.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pqqp_lightning.export.grids import in_rows
from pqqp_lightning.export.network import CodedWeight
from pqqp_lightning.export.onnx_graph import initializers, levels_of
from pqqp_lightning.network.layouts import as_matrix, as_weight

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

LAYERS = ("Conv", "Gemm", "MatMul")
"""Operators that read weights."""
BETWEEN = ("Add", "Relu", "MaxPool", "GlobalAveragePool", "AveragePool")
"""Operators between the convolutions of a network without LayerNorm, which then stays in integers."""


@dataclass
class IntegerWeight:
    """A weight as its graph stores it.

    Attributes:
        levels: int8, in the shape of the initializer.
        scale: float32 [O].
        axis: of the rows.
    """

    levels: np.ndarray
    scale: np.ndarray
    axis: int = 0

    def values(self) -> np.ndarray:
        """level * scale, float32."""
        shape = [1] * self.levels.ndim
        shape[self.axis] = -1
        return self.levels.astype(np.float32) * self.scale.reshape(shape)


def integer_weights(
    model: ModelProto, coded: Mapping[str, CodedWeight], tensors: Mapping[str, Tensor]
) -> dict[str, IntegerWeight]:
    """Rewrite ``model`` so that its operators read the coded weights directly; the weights by initializer name.

    Transposed weights become initializers of their own, ``NAME.transposed``; BatchNorm is multiplied into the
    convolution before it.
    """
    weights = {}
    for name, entry in coded.items():
        matrix = as_matrix(tensors[name], entry.layout)
        levels = torch.from_numpy(levels_of(matrix, entry.grid))
        scale = in_rows(entry.grid, len(matrix)).scale[:, 0].float().numpy().copy()
        weights[name] = IntegerWeight(as_weight(levels, tensors[name].shape, entry.layout).numpy().copy(), scale)
    _transpose_weights(model, weights)
    read = {value for node in model.graph.node if node.op_type in LAYERS for value in node.input}
    weights = {name: weight for name, weight in weights.items() if name in read}
    _take_up_batch_norm(model, weights)
    for name, weight in weights.items():
        _set(model, name, weight.values())
    used = {value for node in model.graph.node for value in node.input}
    for name, tensor in initializers(model.graph).items():
        if name not in used:
            model.graph.initializer.remove(tensor)
    return weights


def quantize_activations(
    model: ModelProto,
    weights: Mapping[str, IntegerWeight],
    names: Sequence[str],
    samples: Sequence[Tensor],
    at_once: int,
) -> ModelProto:
    """The graph with QuantizeLinear and DequantizeLinear around the operators that read ``weights``.

    Args:
        model: with float weights that lie on their grids.
        weights: by initializer name.
        names: of the inputs.
        samples: from which activations get their ranges (smallest and largest value).
        at_once: samples of a batch.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        """Gives the samples in batches."""

        def __init__(self) -> None:
            self._batches = _batches(names, samples, at_once)

        def get_next(self) -> Any:
            return next(self._batches, None)

    dense = [node.name for node in model.graph.node if node.op_type in LAYERS and not weights.keys() & set(node.input)]
    operators = list(LAYERS)
    if not any(node.op_type == "LayerNormalization" for node in model.graph.node):
        operators += BETWEEN  # rounding the sums of a transformer's residual stream costs too much
    with tempfile.TemporaryDirectory(prefix="pqqp-export-") as folder, _quiet():
        file = Path(folder) / "integers.onnx"
        quantize_static(
            model,
            str(file),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=operators,
            nodes_to_exclude=dense,
            extra_options={
                "ActivationSymmetric": False,
                "MatMulConstBOnly": True,
                "TensorQuantOverrides": {name: _override(weight) for name, weight in weights.items()},
            },
        )
        return onnx.load(file)


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the library does not advise to change the graph first."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _override(weight: IntegerWeight) -> list[dict[str, Any]]:
    """The scale of each row, as the library wants it."""
    from onnxruntime.quantization import QuantType

    rows: list[dict[str, Any]] = [{"scale": np.float32(value), "zero_point": np.int8(0)} for value in weight.scale]
    rows[0] |= {"quant_type": QuantType.QInt8, "axis": weight.axis}
    return rows


def _batches(names: Sequence[str], samples: Sequence[Tensor], at_once: int) -> Iterator[dict[str, np.ndarray]]:
    for parts in zip(*[tensor.split(at_once) for tensor in samples], strict=True):
        yield {name: part.numpy() for name, part in zip(names, parts, strict=True)}


def _transpose_weights(model: ModelProto, weights: dict[str, IntegerWeight]) -> None:
    """Store transposed what a Transpose turns: the library looks for the weights of a MatMul in initializers."""
    from onnx import helper

    for node in [node for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in weights]:
        name = node.input[0]
        order = list(helper.get_node_attr_value(node, "perm"))
        before = weights[name]
        turned = f"{name}.transposed"
        if turned not in weights:
            weights[turned] = IntegerWeight(
                np.ascontiguousarray(before.levels.transpose(order)), before.scale, order.index(before.axis)
            )
            _set(model, turned, weights[turned].values())
        _replace_input(model, node.output[0], turned)
        model.graph.node.remove(node)
        if not any(name in other.input for other in model.graph.node):
            model.graph.initializer.remove(initializers(model.graph)[name])
            del weights[name]


def _take_up_batch_norm(model: ModelProto, weights: dict[str, IntegerWeight]) -> None:
    """Multiply each BatchNorm into the convolution that it follows, if nothing else reads the convolution."""
    from onnx import helper

    graph = model.graph
    for norm in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        stored = initializers(graph)
        made_by = [node for node in graph.node if norm.input[0] in node.output]
        readers = [node for node in graph.node if norm.input[0] in node.input]
        if len(made_by) != 1 or len(readers) != 1 or made_by[0].op_type != "Conv":
            continue
        conv = made_by[0]
        name = conv.input[1]
        users = [node for node in graph.node if name in node.input]
        if name not in weights or len(users) != 1 or any(value not in stored for value in norm.input[1:]):
            continue
        gain, offset, mean, variance = [_array(stored[value]).astype(np.float64) for value in norm.input[1:]]
        epsilon = next((helper.get_attribute_value(a) for a in norm.attribute if a.name == "epsilon"), 1e-5)
        factor = gain / np.sqrt(variance + epsilon)  # [O]
        if not _multiply(weights[name], factor):
            continue
        bias = np.zeros_like(mean)
        if len(conv.input) > 2 and conv.input[2]:
            if conv.input[2] not in stored:
                continue
            bias = _array(stored[conv.input[2]]).astype(np.float64)
        while len(conv.input) < 3:
            conv.input.append("")
        conv.input[2] = f"{name}.bias_with_norm"
        _set(model, conv.input[2], ((bias - mean) * factor + offset).astype(np.float32))
        conv.output[0] = norm.output[0]
        graph.node.remove(norm)


def _multiply(weight: IntegerWeight, factor: np.ndarray) -> bool:
    """Multiply the rows of a weight; False, and nothing changes, if a sign cannot be turned: -128 has no opposite."""
    shape = [-1] + [1] * (weight.levels.ndim - 1)
    sign = np.where(factor < 0, -1, 1).reshape(shape)
    levels = weight.levels.astype(np.int16) * sign
    levels *= (factor != 0).reshape(shape)  # a scale of 0 has no levels: the row is 0
    if levels.max(initial=0) > 127:
        return False
    weight.levels = levels.astype(np.int8)
    weight.scale = np.where(factor == 0, weight.scale, weight.scale * np.abs(factor)).astype(np.float32)
    return True


def _array(tensor: Any) -> np.ndarray:
    from onnx import numpy_helper

    return numpy_helper.to_array(tensor)


def _set(model: ModelProto, name: str, array: np.ndarray) -> None:
    """Store ``array`` as the initializer ``name``."""
    from onnx import numpy_helper

    stored = initializers(model.graph)
    tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
    if name in stored:
        stored[name].CopyFrom(tensor)
    else:
        model.graph.initializer.append(tensor)


def _replace_input(model: ModelProto, old: str, new: str) -> None:
    node: NodeProto
    for node in model.graph.node:
        for position, value in enumerate(node.input):
            if value == old:
                node.input[position] = new
