"""GGUF, the file of llama.cpp: blocks of 32 codes with our scales."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pqqp_lightning.algorithms.grid import encode
from pqqp_lightning.errors import Problem, shorten
from pqqp_lightning.export.gguf_vocabulary import NoVocabulary, Vocabulary, convert_tokenizer, read_vocabulary
from pqqp_lightning.export.gguf_widths import BLOCK, deci_shapes, head_width, widths_of
from pqqp_lightning.export.larger import finer_scales, wider_codes
from pqqp_lightning.export.stock import StockModel
from pqqp_lightning.export.target import ExportedModel, Runtime, Target

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

SCALE_BYTES = 2
"""Of a block's scale, which is float16."""
FILE = "model.gguf"
VOCABULARY = "tokenizer.gguf"
"""The tokenizer as GGUF files hold it, in the run's tokenizer folder."""
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""transformers' model type to llama.cpp's architecture."""
UNEVEN = "deci"
"""The architecture whose blocks have widths of their own. It computes what LLaMA does, with optional biases."""
UNEVEN_TYPES = ("llama", "mistral", "qwen2")
CONVERTER = "Use --to hf, and convert the folder with llama.cpp's convert_hf_to_gguf.py."


@dataclass(frozen=True)
class BlockType:
    """A type of GGUF for blocks of integer levels with one float16 scale."""

    name: str
    bits: int

    def holds(self, levels: np.ndarray) -> bool:
        """Whether all ``levels`` are in range."""
        half = 2 ** (self.bits - 1)
        return bool(levels.min() >= -half and levels.max() < half)


TYPES = (BlockType("Q4_0", 4), BlockType("Q5_0", 5), BlockType("Q8_0", 8))


class GGUF(Target):
    """Levels (code minus zero point) of quantized layers in the smallest type that holds them; the rest dense."""

    name = "gguf"
    summary = "one file for llama.cpp, with our codes in blocks of 32"
    loading: ClassVar[dict[str, str]] = {"llama.cpp": 'llama-cli -m "{out}" -p "Once upon a time"'}
    requires = ("gguf",)
    file = FILE
    runtime = Runtime(
        name="llama.cpp",
        package="xllamacpp",
        modules=("xllamacpp",),
        script="llama_cpp_logits.py",
        # llama.cpp rounds activations: 4e-3 on SmolLM2-135M after the quickstart
        largest_divergence={"float32": 5e-2, "float16": 5e-2, "bfloat16": 5e-2},
    )

    def __init__(self) -> None:
        self._kinds: dict[str, BlockType | None] = {}
        self._vocabulary: Vocabulary | None = None

    def uneven_shapes(self, stock: StockModel, expected: dict[str, Tensor]) -> dict[str, Tensor] | None:
        return deci_shapes(stock, expected) if stock.config.model_type in UNEVEN_TYPES else None

    def problems(self, model: ExportedModel) -> list[Problem]:
        run = str(model.source.folder)
        config = model.stock.config
        problems = [*_architecture_problems(run, config), *self._tokenizer_problems(model)]
        kinds: dict[str, tuple[str, list[str]]] = {}
        for name, grid in model.stock.grids.items():
            whole_rows = grid.scale.shape[1] == 1
            if grid.codebook is not None:
                reason = "with the levels of NF4 or FP4, which GGUF does not have", "Use --to hf."
            elif grid.columns % BLOCK or (grid.group_size % BLOCK and not whole_rows):
                reason = f"with groups or widths that are not multiples of {BLOCK}", f"Use groups of {BLOCK} or more."
            elif not torch.equal(grid.scale.half().float(), grid.scale.float()):
                reason = "with scales that float16 changes", "Use --to compressed-tensors --dtype float32."
            elif (kind := self._kind(model, name)) is None:
                reason = "with levels beyond 8 signed bits", "Quantize with symmetric: true, or fewer bits."
            elif not model.widen and kind.bits > grid.bits:
                reason = f"whose codes GGUF has only with {kind.bits} bits", "Use --widen true."
            else:
                continue
            kinds.setdefault(reason[0], (reason[1], []))[1].append(name)
        for text, (way_out, names) in kinds.items():
            problems.append(Problem("run", run, f"has {shorten(names)} {text}", way_out))
        return problems

    def write(self, model: ExportedModel, folder: Path) -> None:
        from gguf import GGUFWriter

        writer = GGUFWriter(folder / FILE, _architecture(model))
        _write_settings(writer, model)
        if self._vocabulary is None:
            writer.add_tokenizer_model("no_vocab")  # such a model takes and gives token ids
        else:
            self._vocabulary.write(writer)
        for name, tensor in model.stock.stored().items():
            data, kind = self._stored(model, name, tensor)
            writer.add_tensor(_gguf_name(model, name), data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def decoded(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        from gguf import GGUFReader
        from gguf.quants import dequantize

        for tensor in GGUFReader(folder / FILE).tensors:
            values = dequantize(tensor.data, tensor.tensor_type)
            yield tensor.name, torch.from_numpy(np.array(values, dtype=np.float32))

    def expected(self, model: ExportedModel) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in model.stock.stored().items():
            exact = tensor.dim() == 1 or name.removesuffix(".weight") in model.stock.grids
            values = tensor if exact else model.in_dtype(tensor)
            yield _gguf_name(model, name), torch.from_numpy(_permuted(model, name, values.float().numpy()))

    def remarks(self, model: ExportedModel) -> list[str]:
        grids = model.stock.grids
        bits = {name: self._kind_of(model, name).bits for name in grids}
        groups = {name: grid.columns // BLOCK for name, grid in grids.items()}
        remarks = [*wider_codes(model.stock, bits), *finer_scales(model.stock, groups, SCALE_BYTES)]
        if self._vocabulary is not None and self._vocabulary.compared:
            remarks.append(self._vocabulary.compared)
        remarks.append(f"Embedding and dense layers are stored as {model.dtype}, norms as float32.")
        return remarks

    def _tokenizer_problems(self, model: ExportedModel) -> list[Problem]:
        """Read or convert the run's tokenizer; the problem if llama.cpp has none like it, or its size is another."""
        folder = model.source.tokenizer
        if folder is None:
            return []
        run = str(model.source.folder)
        rows = len(model.source.network.get_input_embeddings().weight)  # type: ignore[arg-type]
        if not (folder / VOCABULARY).is_file():
            try:
                self._vocabulary = convert_tokenizer(folder, rows, self.runtime)
            except NoVocabulary as error:
                return [Problem("run", run, str(error), CONVERTER)]
            return []
        self._vocabulary = read_vocabulary(folder / VOCABULARY)
        if self._vocabulary.size != rows:
            return [Problem("run", run, f"has {self._vocabulary.size} tokens for {rows} embeddings", CONVERTER)]
        return []

    def _kind(self, model: ExportedModel, layer: str) -> BlockType | None:
        """The smallest type that holds a layer's levels, which are looked at once."""
        if layer not in self._kinds:
            self._kinds[layer] = _block_type(_levels(model, layer))
        return self._kinds[layer]

    def _kind_of(self, model: ExportedModel, layer: str) -> BlockType:
        kind = self._kind(model, layer)
        assert kind is not None  # problems() has refused it
        return kind

    def _stored(
        self, model: ExportedModel, name: str, tensor: Tensor
    ) -> tuple[np.ndarray, GGMLQuantizationType | None]:
        """The bytes of one tensor and their type."""
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize

        layer = name.removesuffix(".weight")
        if layer in model.stock.grids and name != layer:
            kind = self._kind_of(model, layer)
            rows = _blocks(_levels(model, layer), _scales(model, layer), kind)
            return _permuted(model, name, rows), GGMLQuantizationType[kind.name]
        values = _permuted(model, name, tensor.float().numpy())
        if tensor.dim() == 1 or model.dtype == "float32":
            return values, GGMLQuantizationType.F32
        kind_name = "F16" if model.dtype == "float16" else "BF16"
        return quantize(values, GGMLQuantizationType[kind_name]), GGMLQuantizationType[kind_name]


def _architecture(model: ExportedModel) -> str:
    """llama.cpp's name of the architecture."""
    return UNEVEN if model.stock.uneven else ARCHITECTURES[model.stock.config.model_type]


def _architecture_problems(run: str, config: Any) -> list[Problem]:
    """What llama.cpp's architectures, as they are written here, do not compute."""
    if config.model_type not in ARCHITECTURES:
        text = f"holds a model of type {config.model_type}, and --to gguf writes {', '.join(ARCHITECTURES)}"
        return [Problem("run", run, text, "Use --to hf.")]
    problems = []
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        problems.append(Problem("run", run, f"scales its positions ({rope['rope_type']})", CONVERTER))
    if getattr(config, "hidden_act", "silu") != "silu":
        problems.append(Problem("run", run, f"computes {config.hidden_act} in its MLPs", CONVERTER))
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        problems.append(Problem("run", run, f"attends to a window of {window} tokens", CONVERTER))
    return problems


def _write_settings(writer: GGUFWriter, model: ExportedModel) -> None:
    """What llama.cpp needs to know about the architecture."""
    config: Any = model.stock.config
    head_dim = head_width(config)
    blocks = widths_of(model.stock.weights, config)
    channels = [widths.channels for widths in blocks]
    heads = [widths.heads for widths in blocks]
    key_heads = [widths.key_heads for widths in blocks]
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_name(model.source.base_model or config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(channels if model.stock.uneven else channels[0])
    writer.add_head_count(heads if model.stock.uneven else heads[0])
    writer.add_head_count_kv(key_heads if model.stock.uneven else key_heads[0])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.get("rope_theta") or config.rope_theta)
    writer.add_vocab_size(config.vocab_size)


def _gguf_name(model: ExportedModel, name: str) -> str:
    """llama.cpp's name of a tensor."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    config: Any = model.stock.config
    architecture = MODEL_ARCH[_architecture(model).upper()]
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return found


def _permuted(model: ExportedModel, name: str, rows: np.ndarray) -> np.ndarray:
    """The rows of q and k in llama.cpp's order: it rotates neighbours where transformers rotates halves of a head."""
    config: Any = model.stock.config
    layer = name.rpartition(".")[0]
    if _architecture(model) not in ("llama", UNEVEN) or not layer.endswith(("q_proj", "k_proj")):
        return rows
    halves = rows.reshape(-1, 2, head_width(config) // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def _block_type(levels: np.ndarray) -> BlockType | None:
    """The smallest type that holds the levels."""
    return next((kind for kind in TYPES if kind.holds(levels)), None)


def _levels(model: ExportedModel, layer: str) -> np.ndarray:
    """Code minus zero point: int16 [O, I]."""
    grid = model.stock.grids[layer]
    codes = encode(model.stock.weights[f"{layer}.weight"], grid).to(torch.int16)
    zero = grid.expanded_zero()
    return (codes - (zero.to(torch.int16) if isinstance(zero, Tensor) else int(zero))).numpy()


def _scales(model: ExportedModel, layer: str) -> np.ndarray:
    """The scale of each block: float16 [O, I / 32]."""
    grid = model.stock.grids[layer]
    rows = len(model.stock.weights[f"{layer}.weight"])
    scale = grid.scale.half().expand(rows, -1).numpy()
    return np.repeat(scale, grid.columns // BLOCK // scale.shape[1], axis=1)


def _blocks(levels: np.ndarray, scales: np.ndarray, kind: BlockType) -> np.ndarray:
    """The bytes of each row: for each block its scale, then its levels as the type packs them."""
    rows = len(levels)
    head = np.ascontiguousarray(scales[..., None]).view(np.uint8)  # [O, B, 2]
    blocks = levels.reshape(rows, -1, BLOCK)
    if kind.name == "Q8_0":
        parts = [head, blocks.astype(np.int8).view(np.uint8)]
    else:
        unsigned = (blocks + 2 ** (kind.bits - 1)).astype(np.uint8)
        low = unsigned & 15
        nibbles = low[..., : BLOCK // 2] | (low[..., BLOCK // 2 :] << 4)
        parts = [head, nibbles]
        if kind.name == "Q5_0":
            parts.insert(1, np.packbits(unsigned >> 4, axis=-1, bitorder="little"))  # the fifth bits
    return np.concatenate(parts, axis=-1).reshape(rows, -1)
