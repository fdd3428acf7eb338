"""What a format stores larger than the run does: codes in more bits, scales for smaller groups. In whole sentences."""

from __future__ import annotations

from collections.abc import Mapping

from pqqp_lightning.errors import shorten
from pqqp_lightning.export.stock import StockModel
from pqqp_lightning.report.formatting import human_bytes


def wider_codes(stock: StockModel, bits: Mapping[str, int]) -> list[str]:
    """The remark on layers whose codes are stored in ``bits``, more than their grids have; none if there are none."""
    wider = {name: grid for name, grid in stock.grids.items() if bits[name] > grid.bits}
    if not wider:
        return []
    more_bits = sum((bits[name] - grid.bits) * stock.weights[f"{name}.weight"].numel() for name, grid in wider.items())
    before = _listed({grid.bits for grid in wider.values()})
    after = _listed({bits[name] for name in wider})
    larger = f"in {after} bits instead of {before} ({human_bytes(more_bits // 8)} more)"
    return [f"The codes of {shorten(wider)} are stored {larger}; no value changes."]


def finer_scales(stock: StockModel, groups: Mapping[str, int], scale_bytes: int) -> list[str]:
    """The remark on layers whose scales are repeated for smaller groups; none if there are none.

    Args:
        stock: the model with the run's grids.
        groups: a row, as they are stored, by layer.
        scale_bytes: of a stored scale.
    """
    finer = []
    more = 0
    for name, grid in stock.grids.items():
        added = groups[name] - grid.scale.shape[1]
        if added > 0:
            finer.append(name)
            more += added * len(stock.weights[f"{name}.weight"]) * scale_bytes
    if not finer:
        return []
    larger = f"for smaller groups ({human_bytes(more)} more)"
    return [f"The scales of {shorten(finer)} are repeated {larger}; no value changes."]


def _listed(numbers: set[int]) -> str:
    """``"2 or 3"``."""
    return " or ".join(str(number) for number in sorted(numbers))
