"""An ONNX graph of a network, and the changes that put codes in place of its weights.

The graph's initializers keep the names of the network's tensors. A weight is replaced by the nodes that compute it from
its codes, under the same name, so that nothing else in the graph changes.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pqqp_lightning.algorithms.grid import Grid, encode
from pqqp_lightning.export.grids import in_rows
from pqqp_lightning.network.layouts import Layout, as_matrix, as_weight

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

OPSET = 21
"""The first with codes of 4 bits, and with scales for blocks of columns."""
PARTS = (".codes", ".scale", ".zero")
"""What the initializers of a coded weight are called, after the weight."""
WIDTHS = (4, 8)
"""Bits of codes that ONNX has."""


class CannotTrace(Exception):
    """torch.onnx does not export the network; the message is its first line."""


def trace(
    network: nn.Module, inputs: Sequence[Tensor], names: Sequence[str], output: str
) -> tuple[ModelProto, int | None]:
    """The network as a graph whose initializers have the names of its tensors.

    Args:
        network: takes ``inputs`` by position, and returns one tensor.
        inputs: [B, ...] each.
        names: of the inputs in the graph.
        output: the name of the output.

    Returns:
        The graph, and the number of samples that it takes at once: None for any number.

    Raises:
        CannotTrace: torch.onnx does not export it.
    """
    dynamic = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    two = tuple(tensor[:2] if len(tensor) > 1 else torch.cat([tensor, tensor]) for tensor in inputs)
    try:  # a single sample would make its number a constant
        return _export(network, two, names, output, dynamic), None
    except CannotTrace:  # its computation may depend on the number of samples
        return _export(network, tuple(tensor[:1] for tensor in inputs), names, output, None), 1


def _export(
    network: nn.Module, inputs: tuple[Tensor, ...], names: Sequence[str], output: str, dynamic: Any
) -> ModelProto:
    import onnx_ir
    from onnxscript.optimizer import fold_constants, remove_unused_nodes

    with _quiet(), torch.no_grad():
        try:
            program: Any = torch.onnx.export(
                network,
                inputs,
                None,
                dynamo=True,
                input_names=list(names),
                output_names=[output],
                opset_version=OPSET,
                dynamic_shapes=dynamic,
                verbose=False,
                optimize=False,  # it multiplies BatchNorm into weights, and renames transposed ones
            )
        except Exception as error:  # of many classes; the network is the user's
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise CannotTrace(lines[-1] if lines else type(error).__name__) from error
        graph = program.model
        kept = set(network.state_dict())

        def should_fold(node: Any) -> bool | None:
            return False if any(value is not None and value.name in kept for value in node.inputs) else None

        fold_constants(graph, should_fold=should_fold)
        remove_unused_nodes(graph)
        model = onnx_ir.to_proto(graph)
    _strip(model)
    return model


def _strip(model: ModelProto) -> None:
    """Remove the exporter's notes: lines of this machine's source code, half a megabyte for a small DeiT."""
    parts: list[Any] = [model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer]
    parts += [*model.graph.input, *model.graph.output, *model.functions]
    for function in model.functions:
        parts += function.node
    for part in parts:
        part.ClearField("doc_string")
        part.ClearField("metadata_props")


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the exporter says nothing."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def initializers(graph: GraphProto) -> dict[str, TensorProto]:
    """The stored tensors of a graph by name."""
    return {tensor.name: tensor for tensor in graph.initializer}


def stored_bits(grid: Grid, widen: bool) -> int:
    """The bits in which the codes of ``grid`` are stored; those that it has where none may be added."""
    return min(width for width in WIDTHS if width >= grid.bits) if widen else grid.bits


def levels_of(matrix: Tensor, grid: Grid) -> np.ndarray:
    """What is stored of each entry [O, I]: code minus middle, signed, of a symmetric grid; else the code."""
    codes = encode(matrix, grid)
    return codes.numpy() if grid.zero is not None else (codes.to(torch.int16) - int(grid.middle)).to(torch.int8).numpy()


def store_codes(model: ModelProto, name: str, weight: Tensor, grid: Grid, layout: Layout, bits: int) -> None:
    """Replace the initializer ``name`` by its codes, and the nodes that compute it from them.

    Args:
        model: to change.
        name: of the weight.
        weight: its values, which lie on ``grid``.
        grid: of its matrix [O, I].
        layout: how the weight holds the matrix.
        bits: 4 or 8, of each code.
    """
    from onnx import helper

    matrix = as_matrix(weight, layout)
    levels = torch.from_numpy(levels_of(matrix, grid))
    graph = model.graph
    graph.initializer.remove(initializers(graph)[name])
    for info in [info for info in graph.value_info if info.name == name]:
        graph.value_info.remove(info)
    grouped = grid.scale.shape[1] > 1
    rows = in_rows(grid, len(matrix))  # [O, G]
    scale = rows.scale.float()
    parts = {".scale": scale if grouped else scale[:, 0]}
    if rows.zero is not None:
        parts[".zero"] = rows.zero if grouped else rows.zero[:, 0]
    parts[".codes"] = levels if grouped else as_weight(levels, weight.shape, layout)
    for part, tensor in parts.items():
        array = tensor.contiguous().numpy()
        graph.initializer.append(_tensor(name + part, array, 32 if part == ".scale" else bits))
    inputs = [name + part for part in (".codes", ".scale", ".zero") if part in parts]
    if not grouped:
        nodes = [helper.make_node("DequantizeLinear", inputs, [name], name=f"{name}.dequantize", axis=0)]
    else:
        nodes = _grouped_nodes(graph, name, inputs, weight, grid, layout)
    for position, node in enumerate(nodes):
        graph.node.insert(position, node)


def _grouped_nodes(
    graph: GraphProto, name: str, inputs: list[str], weight: Tensor, grid: Grid, layout: Layout
) -> list[NodeProto]:
    """The nodes for codes [O, I] with a scale for each group of columns."""
    from onnx import helper, numpy_helper

    matrix = name if layout == "rows" else f"{name}.matrix"
    settings: dict[str, Any] = {"axis": 1, "block_size": grid.group_size}
    nodes = [helper.make_node("DequantizeLinear", inputs, [matrix], name=f"{name}.dequantize", **settings)]
    if layout == "rows":
        return nodes
    out, channels, *kernel = weight.shape  # the matrix has the channels last: [O, *kernel, C]
    shape = numpy_helper.from_array(np.array([out, *kernel, channels], dtype=np.int64), f"{name}.shape")
    graph.initializer.append(shape)
    last = len(kernel) + 1
    order = [0, last, *range(1, last)]
    nodes.append(helper.make_node("Reshape", [matrix, shape.name], [f"{name}.reshaped"], name=f"{name}.reshape"))
    nodes.append(helper.make_node("Transpose", [f"{name}.reshaped"], [name], name=f"{name}.transpose", perm=order))
    return nodes


def _tensor(name: str, array: np.ndarray, bits: int) -> TensorProto:
    """An initializer, its integers in 4 bits if so wanted."""
    import ml_dtypes
    from onnx import numpy_helper

    if bits == 4:
        array = array.astype(ml_dtypes.uint4 if array.dtype == np.uint8 else ml_dtypes.int4)
    return numpy_helper.from_array(array, name)


def decoded_tensors(model: ModelProto) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that follows from the initializers alone, by name, as the library's own evaluator computes it."""
    from onnx import helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    graph = model.graph
    arrays = {name: numpy_helper.to_array(tensor) for name, tensor in initializers(graph).items()}
    for name, array in arrays.items():
        if array.dtype.kind in "fiub":
            yield name, torch.from_numpy(np.array(array))
    for name, nodes in _constant_nodes(graph).items():
        used = {value for node in nodes for value in node.input if value in arrays}
        stored = [initializers(graph)[value] for value in sorted(used)]
        output = helper.make_empty_tensor_value_info(name)
        part = helper.make_model(
            helper.make_graph(nodes, "weight", [], [output], stored), opset_imports=list(model.opset_import)
        )
        outputs: Any = ReferenceEvaluator(part).run(None, {})
        yield name, torch.from_numpy(np.array(outputs[0]))


def _constant_nodes(graph: GraphProto) -> dict[str, list[NodeProto]]:
    """For each weight that is stored as codes, the nodes from its DequantizeLinear to it, by the weight's name."""
    known = set(initializers(graph))
    chains: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        source = node.input[0] if node.input else ""
        rest = all(value in known for value in list(node.input)[1:])
        if node.op_type == "DequantizeLinear" and source in known and rest:
            chains[node.output[0]] = [node]
        elif node.op_type in ("Reshape", "Transpose") and source.endswith((".matrix", ".reshaped")) and rest:
            chains[node.output[0]] = [*chains.pop(source), node]
    return chains
