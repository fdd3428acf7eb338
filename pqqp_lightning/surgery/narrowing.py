"""A network with fewer units in its coupled groups: carried out on its weights, or rebuilt from plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pqqp_lightning.algorithms.packing import pack_mask
from pqqp_lightning.surgery.coupling import CoupledGroup, Patch
from pqqp_lightning.surgery.slicing import keep, resize

Numbers = list[tuple[str, str, int]]
"""(module name, attribute, value)."""


def kept_parts(
    model: nn.Module, groups: Sequence[CoupledGroup], kept: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """The rows and the columns that stay of every layer and norm that loses some; None where all do.

    Args:
        model: as it is before.
        groups: the groups to prune.
        kept: the units that stay of each group, by its name.
    """
    masks: dict[tuple[str, str], Tensor] = {}
    for group in groups:
        gone = torch.ones(group.width, dtype=torch.bool)
        gone[kept[group.name].cpu()] = False
        for member in group.members:
            if (member.name, member.side) not in masks:
                width = _width(model.get_submodule(member.name), member.side)
                masks[member.name, member.side] = torch.ones(width, dtype=torch.bool)
            masks[member.name, member.side][member.index[gone].flatten()] = False
    indices = {part: mask.nonzero().flatten() for part, mask in masks.items()}
    names = dict.fromkeys(name for name, _ in masks)
    return {name: (indices.get((name, "out")), indices.get((name, "in"))) for name in names}


def plan_narrowing(
    model: nn.Module, groups: Sequence[CoupledGroup], every: Sequence[CoupledGroup], kept: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What :func:`rebuild_narrowed` needs, and which units stayed.

    Args:
        model: as it is before.
        groups: the groups to prune.
        every: all groups of the model; a configuration speaks for all of them.
        kept: the units that stay of each group, by its name.

    Returns:
        ``sizes``: the new rows and columns of each layer (null where they stay); ``numbers``: attributes to set;
        ``<group>:kept``: one bit a unit, packed.
    """
    sizes = {
        name: [None if part is None else len(part) for part in parts]
        for name, parts in kept_parts(model, groups, kept).items()
    }
    units = {group.name: len(kept[group.name]) for group in groups}
    plan: dict[str, Any] = {"sizes": sizes, "numbers": _numbers(groups, every, units)}
    for group in groups:
        mask = torch.zeros(1, group.width, dtype=torch.bool)
        mask[0, kept[group.name].cpu()] = True
        plan[f"{group.name}:kept"] = pack_mask(mask)
    return plan


def rebuild_narrowed(model: nn.Module, plan: dict[str, Any]) -> None:
    """Bring ``model`` to the structure of a plan, values unset."""
    for name, (rows, columns) in plan["sizes"].items():
        resize(model.get_submodule(name), rows, columns)
    _set_numbers(model, plan["numbers"])


def narrow(
    model: nn.Module, groups: Sequence[CoupledGroup], kept: Mapping[str, Tensor], numbers: Numbers
) -> dict[str, list[str]]:
    """Take the other units out of ``model``.

    Returns:
        what of earlier constraints was lost, to the layers.
    """
    lost: dict[str, list[str]] = {}
    for name, (rows, columns) in kept_parts(model, groups, kept).items():
        for what in keep(model.get_submodule(name), rows, columns):
            lost.setdefault(what, []).append(name)
    _set_numbers(model, numbers)
    return lost


def uneven(groups: Sequence[CoupledGroup], units: Mapping[str, int]) -> list[str]:
    """Settings of the configuration for which the layers do not agree on a value once groups have these units."""
    return [key[1] for key, values in _config_values(groups, units).items() if len(values) > 1]


def _numbers(groups: Sequence[CoupledGroup], every: Sequence[CoupledGroup], units: Mapping[str, int]) -> Numbers:
    own = [(p.name, p.attribute, p.value(units[g.name])) for g in groups for p in g.patches if not _is_config(p)]
    touched = {(p.name, p.attribute) for g in groups for p in g.patches if _is_config(p)}
    agreed = {key: values for key, values in _config_values(every, units).items() if len(values) == 1}
    return own + [(*key, values.pop()) for key, values in agreed.items() if key in touched]


def _config_values(every: Sequence[CoupledGroup], units: Mapping[str, int]) -> dict[tuple[str, str], set[int]]:
    values: dict[tuple[str, str], set[int]] = {}
    for group in every:
        for patch in filter(_is_config, group.patches):
            values.setdefault((patch.name, patch.attribute), set()).add(patch.value(units.get(group.name, group.width)))
    return values


def _is_config(patch: Patch) -> bool:
    return patch.attribute.startswith("config.")


def _set_numbers(model: nn.Module, numbers: Sequence[Sequence[Any]]) -> None:
    for name, attribute, value in numbers:
        target: Any = model.get_submodule(name)
        if attribute.startswith("config."):
            target, attribute = target.config, attribute.removeprefix("config.")
        setattr(target, attribute, value)


def _width(module: nn.Module, side: str) -> int:
    tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None and t.dim()]
    return tensors[0].shape[0] if side == "out" else tensors[0].shape[1]
