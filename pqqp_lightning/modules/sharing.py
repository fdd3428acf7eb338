"""Which layers may share something: those of one kind in consecutive blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from pqqp_lightning.modules.blocks import Blocks
from pqqp_lightning.modules.layers import Layer, columns_of
from pqqp_lightning.modules.naming import matches_any


def group_layers(
    layers: Mapping[str, Layer], blocks: Blocks, share: list[str], size: int
) -> tuple[list[list[str]], list[str]]:
    """Groups of up to ``size`` layers that have the same name within consecutive blocks and equally wide inputs.

    Args:
        layers: in the order of the blocks.
        blocks: from :func:`~pqqp_lightning.modules.blocks.find_blocks`.
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
