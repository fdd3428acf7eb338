"""A Linear layer as the product of two: a basis, which several layers may share, and coefficients of its own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.utils import skip_init

from pqqp_lightning.modules.transforms import move_transforms


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
