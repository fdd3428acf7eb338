"""Hooks that collect statistics of a block's layer inputs, one statistic for all layers that read the same input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pqqp_lightning.calibration.statistics import Statistic
from pqqp_lightning.calibration.token_mask import TokenMask, positions_of
from pqqp_lightning.network.layers import Layer, columns_of, geometry, groups_of, input_rows, spatial_dimensions


class StopForward(Exception):
    """Raised by a hook to end a forward pass whose remaining layers are not needed."""


@dataclass
class Reading:
    """A statistic and the layers whose inputs it describes.

    Attributes:
        layers: name to layer; all read the same input.
        statistic: of this input.
        latest: the input in the current forward pass, by which layers that share it are recognised.
    """

    layers: dict[str, Layer]
    statistic: Statistic
    latest: Tensor | None = field(default=None, repr=False)


@contextmanager
def watching_inputs(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``see`` with name and input whenever one of ``modules`` runs inside the context."""
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Collector:
    """Collects one statistic for each distinct input of ``layers`` over forward passes of their block.

    Layers that read the same tensor object (q, k and v projections) share a reading. The first pass determines these
    layers, and every later pass checks that they still share their input. From the second pass on, the forward pass
    ends as soon as every layer has been called, so that the rest of the block is not computed.

    Args:
        layers: name to layer.
        kind: the statistic's class.

    Attributes:
        unmasked: names of the layers whose inputs did not have the positions of a batch with padding, so that padded
            ones may have been counted.
    """

    def __init__(self, layers: dict[str, Layer], kind: type[Statistic]) -> None:
        self._layers, self._kind = layers, kind
        self._reading_of: dict[str, Reading] = {}
        self._calls: list[str] = []
        self._may_stop = False
        self._mask: TokenMask | None = None  # of the current forward pass
        self.unmasked: dict[str, None] = {}

    @property
    def readings(self) -> list[Reading]:
        """The readings, in the order in which their layers were first called."""
        return list({id(r): r for r in self._reading_of.values()}.values())

    def uncalled(self) -> list[str]:
        """Return the layers that no forward pass has reached."""
        return [name for name in self._layers if name not in self._reading_of]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Collect from the forward passes inside the context."""
        with watching_inputs(self._layers, self._see):  # type: ignore[arg-type]
            yield

    @contextmanager
    def forward_pass(self, mask: TokenMask | None = None) -> Iterator[None]:
        """Wrap one forward pass: end it early where possible, and forget its inputs afterwards.

        Args:
            mask: the positions of the batch that count.
        """
        self._calls.clear()
        self._mask = mask
        with suppress(StopForward):
            yield
        for reading in self.readings:
            reading.latest = None
        # A pass may stop early only if every layer ran exactly once: a layer that runs twice has more inputs to come.
        self._may_stop = sorted(self._calls) == sorted(self._layers)

    def _see(self, name: str, inputs: Tensor) -> None:
        self._calls.append(name)
        reading = self._reading_of.get(name)
        if reading is None:
            self._add_layer(name, inputs)
        elif next(iter(reading.layers)) == name:  # the reading's first layer counts for all of them
            reading.latest = inputs
            reading.statistic.add(self._rows(name, inputs))
        elif reading.latest is not inputs:
            first_name = next(iter(reading.layers))
            raise RuntimeError(
                f"{name} and {first_name} shared an input in the first calibration batch, but not in a later one"
            )
        if self._may_stop and len(self._calls) == len(self._layers):
            raise StopForward

    def _rows(self, name: str, inputs: Tensor) -> Tensor:
        """The rows [groups, T, I] of the layer's input that count."""
        if self._mask is not None and not spatial_dimensions(self._layers[name]):
            if self._mask.misses(inputs):
                self.unmasked[name] = None
            inputs = positions_of(inputs, self._mask)
        return input_rows(self._layers[name], inputs)

    def _add_layer(self, name: str, inputs: Tensor) -> None:
        """Add a layer to the reading that has the same input, or start a new reading."""
        layer = self._layers[name]
        for reading in self.readings:
            first_layer = next(iter(reading.layers.values()))
            if reading.latest is inputs and geometry(first_layer) == geometry(layer):
                reading.layers[name] = layer
                self._reading_of[name] = reading
                return
        statistic = self._kind(groups_of(layer), columns_of(layer), layer.weight.device)
        statistic.add(self._rows(name, inputs))
        self._reading_of[name] = Reading({name: layer}, statistic, inputs)


def check_reading(reading: Reading) -> None:
    """Check that a statistic is usable.

    Raises:
        ArithmeticError: it has no row, or the activations are NaN or infinite.
    """
    if int(reading.statistic.rows) == 0:
        raise ArithmeticError("no calibration token reached it")
    if not bool(torch.isfinite(reading.statistic.total).all()):
        raise ArithmeticError("its calibration inputs hold NaN or infinite values")
