"""A Linear layer as the product of two: a basis, which several layers may share, and the layer's own coefficients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn.utils import skip_init

from pqqp_lightning.network.activation_hooks import move_transforms
from pqqp_lightning.network.blocks import Blocks
from pqqp_lightning.network.layers import Layer, columns_of
from pqqp_lightning.network.name_patterns import matches_any


class Factored(nn.Module):
    """Computes y = coefficients(basis(x)).

    Args:
        basis: [k, I], without bias; layers that share it hold the same object.
        coefficients: [O, k], with the bias of the replaced layer.
    """

    def __init__(self, basis: nn.Linear, coefficients: nn.Linear) -> None:
        super().__init__()
        self.basis, self.coefficients = basis, coefficients

    @property
    def in_features(self) -> int:
        """I."""
        return self.basis.in_features

    @property
    def out_features(self) -> int:
        """O."""
        return self.coefficients.out_features

    @property
    def weight(self) -> Tensor:
        """The product [O, I], for code that reads a layer's weight (torch's fused encoder kernel)."""
        return self.coefficients.weight @ self.basis.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias [O], or None."""
        return self.coefficients.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        return self.coefficients(self.basis(inputs))


def factor_layers(model: nn.Module, names: Sequence[str], rank: int) -> list[Factored]:
    """Replace the Linear layers ``names`` of ``model`` by factors of ``rank`` with one shared basis.

    The factors are not initialised. They take device, dtype, ``requires_grad``, bias and transforms of the replaced
    layers.
    """
    layers = [model.get_submodule(name) for name in names]
    first = layers[0]
    assert isinstance(first, nn.Linear)
    basis = _linear_like(first, first.in_features, rank)
    replaced = []
    for name, layer in zip(names, layers, strict=True):
        assert isinstance(layer, nn.Linear)
        coefficients = _linear_like(layer, rank, layer.out_features)
        coefficients.bias = layer.bias
        module = Factored(basis, coefficients).train(layer.training)
        move_transforms(layer, module)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
        replaced.append(module)
    return replaced


def factors_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the Linear layers that are factors of a :class:`Factored`, by name; a shared one under its first name."""
    factors: set[int] = set()
    for module in model.modules():
        if isinstance(module, Factored):
            factors.update((id(module.basis), id(module.coefficients)))
    return {name: m for name, m in model.named_modules() if id(m) in factors and isinstance(m, nn.Linear)}


def _linear_like(layer: nn.Linear, inputs: int, outputs: int) -> nn.Linear:
    """An uninitialised Linear without bias, on the device and in the dtype of ``layer``."""
    weight = layer.weight
    linear = skip_init(nn.Linear, inputs, outputs, bias=False, device=weight.device, dtype=weight.dtype)
    linear.weight.requires_grad_(weight.requires_grad)
    return linear


def group_layers(
    layers: Mapping[str, Layer], blocks: Blocks, share: list[str], size: int
) -> tuple[list[list[str]], list[str]]:
    """Group layers of consecutive blocks that have the same name within their block and inputs of the same width.

    Args:
        layers: in the order of the blocks.
        blocks: from :func:`~pqqp_lightning.network.blocks.find_blocks`.
        share: name patterns of the layers to group; every other layer forms a group of one.
        size: layers per group; the last group of a kind may be smaller.

    Returns:
        (groups of names, names of the layers that could not be grouped because the input widths differ).
    """
    kinds: dict[str, list[str]] = defaultdict(list)  # name within the block to full names
    for name in layers:
        block = next((b for b in blocks if b and name.startswith(f"{b}.")), None)
        if block is not None and matches_any(name, share):
            kinds[name.removeprefix(f"{block}.")].append(name)
        else:
            kinds[f"alone:{name}"].append(name)  # a key of its own: a group of one
    groups: list[list[str]] = []
    ungrouped: list[str] = []
    for names in kinds.values():
        for start in range(0, len(names), size):
            group = names[start : start + size]
            if len({columns_of(layers[name]) for name in group}) == 1:
                groups.append(group)
            else:
                groups += [[name] for name in group]
                ungrouped += group
    return groups, ungrouped
