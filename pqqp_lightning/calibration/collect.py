"""Hooks that collect statistics of a block's layer inputs, one statistic for all layers that read the same input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pqqp_lightning.calibration.functional import FunctionalReader
from pqqp_lightning.calibration.statistics import PairedHessian, Statistic
from pqqp_lightning.calibration.token_mask import TokenMask, positions_of
from pqqp_lightning.network.layers import Layer, columns_of, geometry, input_rows, spatial_dimensions


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
def watching_inputs(modules: Mapping[str, nn.Module | Layer], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``see`` with name and input whenever one of ``modules`` runs inside the context."""
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
        for name, module in modules.items()
        if isinstance(module, nn.Module)  # the others are read where they are used
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

    The weights of layers that were not called are looked for in the products of torch functions. A fused weight has a
    statistic for each of its parts (experts), which each see rows of their own.

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
        self._reader: FunctionalReader | None = None
        self._any_used = False
        self._mask: TokenMask | None = None  # of the current forward pass
        self._is_dense = False  # whether the current forward pass is the dense model's
        self._dense_inputs: dict[str, list[Tensor]] = {}  # of its latest forward pass, in the order of the calls
        self.unmasked: dict[str, None] = {}

    @property
    def readings(self) -> list[Reading]:
        """The readings, in the order in which their layers were first called."""
        return list({id(r): r for r in self._reading_of.values()}.values())

    def uncalled(self) -> list[str]:
        """Return the layers that no forward pass has reached."""
        return [name for name in self._layers if name not in self._reading_of]

    def uncalled_on_all_ranks(self) -> list[str]:
        """Return the layers that no rank's forward pass has reached.

        In a distributed run, afterwards every rank has the same readings in the same order, with zeros where only
        other ranks had rows.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            own = [(list(reading.layers), len(reading.statistic.counts)) for reading in self.readings]
            every: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(every, own)
            known = self._reading_of
            self._reading_of = {}
            for names, groups in (item for rank in every for item in rank):
                if names[0] in self._reading_of:
                    continue
                reading = known.get(names[0])
                if reading is None:
                    first = self._layers[names[0]]
                    statistic = self._kind(groups, columns_of(first), first.weight.device)
                    reading = Reading({name: self._layers[name] for name in names}, statistic)
                self._reading_of.update(dict.fromkeys(names, reading))
        return self.uncalled()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Collect from the forward passes inside the context."""
        self._reader = FunctionalReader(self._layers, self._see_use)
        try:
            with self._reader.beside_calls(self._layers), watching_inputs(self._layers, self._see):
                yield
        finally:
            self._reader = None  # it refers back to this object, and statistics must be freed with their block

    @contextmanager
    def forward_pass(self, mask: TokenMask | None = None) -> Iterator[None]:
        """Wrap one forward pass: end it early where possible, and forget its inputs afterwards.

        Args:
            mask: the positions of the batch that count.
        """
        self._calls.clear()
        self._mask = mask
        # Looking at every function costs time, which a block whose layers are all called as modules does not need.
        look = self._any_used or bool(self.uncalled())
        with suppress(StopForward), self._reader if look and self._reader is not None else nullcontext():
            yield
        for reading in self.readings:
            reading.latest = None
        # A pass may stop early only if every layer ran exactly once: a layer that runs twice has more inputs to come.
        self._may_stop = sorted(self._calls) == sorted(self._layers)

    @contextmanager
    def dense_pass(self, mask: TokenMask | None = None) -> Iterator[None]:
        """Wrap a forward pass of the dense model on a batch, before :meth:`forward_pass` on the same batch.

        A :class:`PairedHessian` pairs the inputs of both passes.
        """
        self._mask = mask
        self._is_dense = True
        self._dense_inputs.clear()
        try:
            with self._reader if self._reader is not None else nullcontext():
                yield
        finally:
            self._is_dense = False

    def _see(self, name: str, inputs: Tensor) -> None:
        if self._is_dense:
            self._dense_inputs.setdefault(name, []).append(inputs)
            return
        self._calls.append(name)
        reading = self._reading_of.get(name)
        if reading is None:
            self._add_layer(name, inputs)
        elif next(iter(reading.layers)) == name:  # the reading's first layer counts for all of them
            reading.latest = inputs
            self._add_rows(reading.statistic, name, inputs)
        elif reading.latest is not inputs:
            first_name = next(iter(reading.layers))
            raise RuntimeError(
                f"{name} and {first_name} shared an input in the first calibration batch, but not in a later one"
            )
        if self._may_stop and len(self._calls) == len(self._layers):
            raise StopForward

    def _see_use(self, name: str, inputs: Tensor, part: int | None, parts: int) -> None:
        """Collect the input of a weight that is used functionally, or of one part of it."""
        self._any_used = True
        if self._is_dense and parts > 1:
            return  # experts read other rows in the dense model
        if parts == 1:
            self._see(name, inputs)
            return
        self._calls.append(name)
        reading = self._reading_of.get(name)
        if reading is None:
            layer = self._layers[name]
            statistic = self._kind(parts, columns_of(layer), layer.weight.device)
            reading = self._reading_of[name] = Reading({name: layer}, statistic)
        if len(reading.statistic.counts) != parts:
            raise RuntimeError(f"{name} is used whole in one calibration batch and in parts in another")
        if part is not None:
            inputs = self._that_count(name, inputs)
            reading.statistic.add_to(part, inputs.reshape(-1, inputs.shape[-1]))
            return
        for number, rows in enumerate(inputs):
            # Where every expert gets all tokens, those of the others are zeroed.
            reading.statistic.add_to(number, rows[rows.ne(0).any(dim=1)])

    def _add_rows(self, statistic: Statistic, name: str, inputs: Tensor) -> None:
        """Add the layer's input, paired with that in the dense model if there was such a pass."""
        rows = self._rows(name, inputs)
        dense = self._dense_inputs.get(name)
        if isinstance(statistic, PairedHessian) and dense:
            dense_rows = self._rows(name, dense.pop(0))
            if dense_rows.shape == rows.shape:
                statistic.add_pair(rows, dense_rows)
                return
        statistic.add(rows)

    def _rows(self, name: str, inputs: Tensor) -> Tensor:
        """The rows [groups, T, I] of the layer's input that count."""
        return input_rows(self._layers[name], self._that_count(name, inputs))

    def _that_count(self, name: str, inputs: Tensor) -> Tensor:
        """The positions of the layer's input that count."""
        if self._mask is None or spatial_dimensions(self._layers[name]):
            return inputs
        if self._mask.misses(inputs):
            self.unmasked[name] = None
        return positions_of(inputs, self._mask)

    def _add_layer(self, name: str, inputs: Tensor) -> None:
        """Add a layer to the reading that has the same input, or start a new reading."""
        layer = self._layers[name]
        for reading in self.readings:
            first_layer = next(iter(reading.layers.values()))
            if reading.latest is inputs and geometry(first_layer) == geometry(layer):
                reading.layers[name] = layer
                self._reading_of[name] = reading
                return
        groups = len(self._rows(name, inputs))
        statistic = self._kind(groups, columns_of(layer), layer.weight.device)
        self._add_rows(statistic, name, inputs)
        self._reading_of[name] = Reading({name: layer}, statistic, inputs)


def check_reading(reading: Reading) -> None:
    """Check that a statistic is usable.

    Raises:
        ArithmeticError: the activations are NaN or infinite.
    """
    if not bool(torch.isfinite(reading.statistic.total).all()):
        raise ArithmeticError("its calibration inputs hold NaN or infinite values")
