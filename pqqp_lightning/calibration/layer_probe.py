"""Observes on one batch how the forward pass uses each layer: called, used functionally, or not used."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from pqqp_lightning.calibration.collect import watching_inputs
from pqqp_lightning.calibration.functional import FunctionalReader
from pqqp_lightning.calibration.walk import calibrating
from pqqp_lightning.network.layer_uses import LayerUse
from pqqp_lightning.network.layers import Layer


def observe_uses(model: nn.Module, layers: Mapping[str, Layer], run: Callable[[], object]) -> dict[str, LayerUse]:
    """Run the model once in evaluation mode and tell how it uses each of ``layers``.

    A layer that the pass did not use, while it used the same layer of a sibling, is left out of the result: it is an
    expert that this batch did not take, and nothing is known about it.

    Args:
        model: the network that holds ``layers``.
        layers: name to layer.
        run: runs the model on the probe batch.
    """
    called: set[str] = set()
    functional: set[str] = set()

    def use(name: str, inputs: Tensor, part: int | None, parts: int) -> None:
        functional.add(name)

    reader = FunctionalReader(layers, use)
    hooks = watching_inputs(layers, lambda name, inputs: called.add(name))
    with calibrating(model), reader.beside_calls(layers), hooks, reader:
        run()
    uses: dict[str, LayerUse] = {}
    used_patterns = {pattern for name in called | functional for pattern in _sibling_patterns(name)}
    for name in layers:
        if name in called:
            uses[name] = "called"
        elif name in functional:
            uses[name] = "functional"
        elif not used_patterns.intersection(_sibling_patterns(name)):
            uses[name] = "unused"
    return uses


def _sibling_patterns(name: str) -> list[str]:
    """The name with one of its numbers left open, for each number: those of its siblings in a list."""
    parts = name.split(".")
    patterns = []
    for position, part in enumerate(parts):
        if part.isdigit():
            patterns.append(".".join([*parts[:position], "*", *parts[position + 1 :]]))
    return patterns
