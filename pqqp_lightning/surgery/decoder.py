"""The residual stream of a language model: the layers that write to it and those that read it, for a rotation.

Two families are recognised by their structure: LLaMA (RMSNorm; LLaMA, SmolLM2, Mistral, Qwen2, Qwen3), and OPT with
norms before each sublayer (LayerNorm, biases, learned positions). All names are those of ``named_modules``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pqqp_lightning.errors import Problem, RecipeError, shorten


@dataclass(frozen=True)
class Sublayer:
    """A norm on the residual stream, the layers that read its output, and the layer that writes to the stream.

    Attributes:
        norm: name of the norm.
        reads: names of the Linear layers that read the norm's output.
        writes: name of the Linear layer whose output is added to the stream.
    """

    norm: str
    reads: tuple[str, ...]
    writes: str


@dataclass(frozen=True)
class Attention(Sublayer):
    """An attention sublayer; ``writes`` reads the heads' outputs.

    Attributes:
        values: name of the layer that computes the values.
        head_dim: features of a head.
    """

    values: str
    head_dim: int


@dataclass
class Decoder:
    """The residual stream of a causal language model.

    Attributes:
        embedding: name of the token embedding, which writes to the stream.
        positions: name of the learned positional embedding, or None.
        norm: name of the last norm.
        head: name of the layer that computes the logits.
        tied: whether head and embedding share one weight.
        centred: whether the norms subtract the mean (LayerNorm).
        hidden_size: features of the stream, H.
        sublayers: in the order of the forward pass.
    """

    embedding: str
    positions: str | None
    norm: str
    head: str
    tied: bool
    centred: bool
    hidden_size: int
    sublayers: list[Sublayer] = field(default_factory=list)

    @property
    def norms(self) -> list[str]:
        """Names of all norms on the stream, in order."""
        return [*(sublayer.norm for sublayer in self.sublayers), self.norm]

    @property
    def linears(self) -> list[str]:
        """Names of all Linear layers that read or write the stream, except the head."""
        names: list[str] = []
        for sublayer in self.sublayers:
            names += [*sublayer.reads, sublayer.writes]
        return names


def describe_decoder(model: nn.Module) -> Decoder:
    """Describe the residual stream of the language model in ``model``.

    Raises:
        RecipeError: ``model`` contains no model of the two families, or one that differs from their structure; lists
            every difference.
    """
    for name, module in model.named_modules():
        inner = getattr(module, "model", None)
        if isinstance(getattr(module, "lm_head", None), nn.Module) and isinstance(inner, nn.Module):
            prefix = f"{name}." if name else ""
            if isinstance(getattr(inner, "layers", None), nn.ModuleList):
                return _Description(model, prefix).llama()
            if isinstance(getattr(getattr(inner, "decoder", None), "layers", None), nn.ModuleList):
                return _Description(model, prefix).opt()
    why = "no lm_head over model.layers or model.decoder.layers"
    text = f"needs a language model of the LLaMA or OPT family, but {type(model).__name__} has none ({why})"
    raise RecipeError(Problem(text=text, way_out="Use a CausalLM of one of them, or drop the stage."))


def norm_parts(norm: nn.Module) -> tuple[nn.Parameter | None, nn.Parameter | None, float]:
    """Return (gain, bias, epsilon) of a norm.

    Raises:
        StopIteration: it has no epsilon.
    """
    names = ("variance_epsilon", "eps")  # Hugging Face's RMSNorms, torch's norms
    epsilon = next(float(getattr(norm, name)) for name in names if getattr(norm, name, None) is not None)
    return getattr(norm, "weight", None), getattr(norm, "bias", None), epsilon


class _Description:
    """Describes the causal language model at ``prefix`` and collects the differences from the expected structure."""

    def __init__(self, model: nn.Module, prefix: str) -> None:
        self._modules = dict(model.named_modules())
        self._prefix = prefix
        self._problems: dict[str, list[str]] = {}

    def llama(self) -> Decoder:
        """Describe a model with the structure of LLaMA."""
        base = f"{self._prefix}model"
        decoder = self._decoder(f"{base}.embed_tokens", None, f"{base}.norm")
        for block in self._blocks(f"{base}.layers"):
            self._only(block, {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
            if self._alive(f"{block}.self_attn"):
                norm = f"{block}.input_layernorm"
                decoder.sublayers.append(self._attention(block, norm, f"{block}.self_attn.o_proj"))
            if self._alive(f"{block}.mlp"):
                norm = f"{block}.post_attention_layernorm"
                reads = (f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj")
                decoder.sublayers.append(Sublayer(norm, reads, f"{block}.mlp.down_proj"))
        return self._checked(decoder)

    def opt(self) -> Decoder:
        """Describe a model with the structure of OPT."""
        base = f"{self._prefix}model.decoder"
        self._refuse_other_opt(base)
        decoder = self._decoder(f"{base}.embed_tokens", f"{base}.embed_positions", f"{base}.final_layer_norm")
        for block in self._blocks(f"{base}.layers"):
            if self._alive(f"{block}.self_attn"):
                norm = f"{block}.self_attn_layer_norm"
                decoder.sublayers.append(self._attention(block, norm, f"{block}.self_attn.out_proj"))
            if self._alive(f"{block}.fc1"):
                decoder.sublayers.append(Sublayer(f"{block}.final_layer_norm", (f"{block}.fc1",), f"{block}.fc2"))
        return self._checked(decoder)

    def _decoder(self, embedding: str, positions: str | None, norm: str) -> Decoder:
        head = f"{self._prefix}lm_head"
        table = self._modules.get(embedding)
        if not isinstance(table, nn.Embedding):
            text = f"{embedding} is a {type(table).__name__}, not an Embedding"
            raise RecipeError(Problem(text=text, way_out="Drop the stage."))
        tied = getattr(self._modules[head], "weight", None) is table.weight
        centred = isinstance(self._modules.get(norm), nn.LayerNorm)
        return Decoder(embedding, positions, norm, head, tied, centred, table.embedding_dim)

    def _attention(self, block: str, norm: str, output: str) -> Attention:
        attention = f"{block}.self_attn"
        reads = tuple(f"{attention}.{part}_proj" for part in "qkv")
        head_dim = getattr(self._modules[attention], "head_dim", None)
        if not isinstance(head_dim, int):
            self._note("no head_dim", attention)
        return Attention(norm, reads, output, reads[2], head_dim if isinstance(head_dim, int) else 1)

    def _blocks(self, layers: str) -> Iterator[str]:
        return (f"{layers}.{name}" for name, _ in self._modules[layers].named_children())

    def _alive(self, name: str) -> bool:
        """Whether the sublayer exists; a stage that removed it may have left a module without weights."""
        module = self._modules.get(name)
        return module is not None and next(module.parameters(), None) is not None

    def _only(self, block: str, expected: set[str]) -> None:
        if more := {name for name, _ in self._modules[block].named_children()} - expected:
            self._note(f"further modules in the block ({', '.join(sorted(more))})", block)

    def _refuse_other_opt(self, base: str) -> None:
        decoder = self._modules[base]
        if getattr(decoder, "project_in", None) is not None:
            self._note("a narrower embedding (project_in)", base)
        norms_first = [getattr(module, "do_layer_norm_before", True) for module in self._modules.values()]
        if not all(norms_first):
            self._note("norms behind the sublayers (do_layer_norm_before=False), as in opt-350m", base)
        elif getattr(decoder, "final_layer_norm", None) is None:
            self._note("no final_layer_norm", base)
        self._raise()

    def _checked(self, decoder: Decoder) -> Decoder:
        for name in [*decoder.linears, decoder.head]:
            module = self._modules.get(name)
            if not isinstance(module, nn.Linear):
                self._note(_expected(module, "a Linear layer"), name)
            elif not module.weight.is_floating_point():
                self._note(f"weights of {module.weight.dtype}", name)
        for name in decoder.norms:
            self._check_norm(name, decoder.centred)
        self._raise()
        return decoder

    def _check_norm(self, name: str, centred: bool) -> None:
        norm = self._modules.get(name)
        if norm is None or not (isinstance(norm, nn.LayerNorm) if centred else _is_rms_norm(norm)):
            self._note(_expected(norm, "a LayerNorm" if centred else "an RMSNorm with a gain"), name)

    def _note(self, what: str, name: str) -> None:
        self._problems.setdefault(what, []).append(name)

    def _raise(self) -> None:
        way_out = (
            "Put the stage before the one that changed this. If the model itself is built like this, use another one "
            "or drop the stage."
        )
        if self._problems:
            raise RecipeError(
                Problem(text=f"{shorten(names)}: {what}; the residual stream cannot be rotated", way_out=way_out)
                for what, names in self._problems.items()
            )


def _expected(module: nn.Module | None, expected: str) -> str:
    return "missing" if module is None else f"a {type(module).__name__}, not {expected}"


def _is_rms_norm(norm: nn.Module) -> bool:
    """Whether ``norm`` computes x / rms(x) * gain.

    The class name does not tell: some RMSNorms multiply by 1 + gain. So run a copy on random numbers and compare.
    """
    if not isinstance(norm.__dict__["_parameters"].get("weight"), nn.Parameter) or hasattr(norm, "bias"):
        return False
    probe: Any = copy.deepcopy(norm).to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(0)
    gain = torch.rand(probe.weight.shape, generator=generator) + 0.5
    x = torch.randn(gain.shape, generator=generator)
    with torch.no_grad():
        probe.weight.copy_(gain)
        try:
            epsilon = norm_parts(norm)[2]
            return torch.allclose(probe(x), x * (x.square().mean() + epsilon).rsqrt() * gain, rtol=1e-4, atol=1e-5)
        except (StopIteration, RuntimeError, TypeError, ValueError):
            return False
