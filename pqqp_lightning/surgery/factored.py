"""A Linear layer as the product of two: a basis, which several layers may share, and coefficients of its own."""

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
    """y = coefficients(basis(x)).

    Args:
        basis: [k, I], without bias; layers that share it hold one and the same object.
        coefficients: [O, k], with the bias of the layer that was replaced.
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

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        return self.coefficients(self.basis(inputs))


def factor_layers(model: nn.Module, names: Sequence[str], rank: int) -> list[Factored]:
    """Replace the Linear layers ``names`` of ``model`` by factors of ``rank`` with one shared basis, values unset.

    Device, dtype, ``requires_grad``, the bias and the transforms are those of the layers replaced.
    """
    layers = [model.get_submodule(name) for name in names]
    first = layers[0]
    assert isinstance(first, nn.Linear)
    basis = _like(first, first.in_features, rank)
    replaced = []
    for name, layer in zip(names, layers, strict=True):
        assert isinstance(layer, nn.Linear)
        coefficients = _like(layer, rank, layer.out_features)
        coefficients.bias = layer.bias
        module = Factored(basis, coefficients).train(layer.training)
        move_transforms(layer, module)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
        replaced.append(module)
    return replaced


def factors_of(model: nn.Module) -> dict[str, nn.Linear]:
    """The Linear layers that are factors of a :class:`Factored`, by name; a shared one under its first name."""
    within = {id(f) for m in model.modules() if isinstance(m, Factored) for f in (m.basis, m.coefficients)}
    return {name: m for name, m in model.named_modules() if id(m) in within and isinstance(m, nn.Linear)}


def _like(layer: nn.Linear, inputs: int, outputs: int) -> nn.Linear:
    weight = layer.weight
    made = skip_init(nn.Linear, inputs, outputs, bias=False, device=weight.device, dtype=weight.dtype)
    made.weight.requires_grad_(weight.requires_grad)
    return made


def group_layers(
    layers: Mapping[str, Layer], blocks: Blocks, share: list[str], size: int
) -> tuple[list[list[str]], list[str]]:
    """Groups of up to ``size`` layers that have the same name within consecutive blocks and equally wide inputs.

    Args:
        layers: in the order of the blocks.
        blocks: from :func:`~pqqp_lightning.network.blocks.find_blocks`.
        share: name patterns of the layers that are grouped; every other layer is a group by itself.
        size: layers a group; the last one of a kind may be smaller.

    Returns:
        (groups of names, the names that stand alone only since their neighbours' inputs have another width).
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in layers:
        block = next((b for b in blocks if b and name.startswith(f"{b}.")), None)
        shares = block is not None and matches_any(name, share)
        kinds[name.removeprefix(f"{block}.") if shares else f"alone:{name}"].append(name)
    groups: list[list[str]] = []
    odd: list[str] = []
    for names in kinds.values():
        for start in range(0, len(names), size):
            group = names[start : start + size]
            if len({columns_of(layers[name]) for name in group}) == 1:
                groups.append(group)
            else:
                groups += [[name] for name in group]
                odd += group
    return groups, odd
