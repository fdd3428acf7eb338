"""Removes units of coupled groups: narrows the layers of a trained network, or rebuilds narrow ones from plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pqqp_lightning.algorithms.packing import pack_mask
from pqqp_lightning.network.offload import offload_of
from pqqp_lightning.surgery.coupling import CoupledGroup, Patch
from pqqp_lightning.surgery.slicing import resize, slice_module

Numbers = list[tuple[str, str, int]]
"""Attributes to set: (module name, attribute, value)."""


def kept_parts(
    model: nn.Module, groups: Sequence[CoupledGroup], kept: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """Return the kept rows and columns of every layer and norm in the groups.

    Args:
        model: before the change.
        groups: the groups to prune.
        kept: the kept units of each group, by its name.

    Returns:
        Module name to (row indices, column indices); None if all of them stay.
    """
    # A layer may belong to two groups, one for its rows and one for its columns, or to several for either.
    masks: dict[tuple[str, str], Tensor] = {}
    for group in groups:
        removed = torch.ones(group.width, dtype=torch.bool)
        removed[kept[group.name].cpu()] = False
        for member in group.members:
            part = (member.name, member.side)
            if part not in masks:
                width = _width(model.get_submodule(member.name), member.side)
                masks[part] = torch.ones(width, dtype=torch.bool)
            masks[part][member.index[removed].flatten()] = False
    indices = {part: mask.nonzero().flatten() for part, mask in masks.items()}
    names = dict.fromkeys(name for name, _ in masks)
    return {name: (indices.get((name, "out")), indices.get((name, "in"))) for name in names}


def plan_narrowing(
    model: nn.Module, groups: Sequence[CoupledGroup], every: Sequence[CoupledGroup], kept: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Plan the removal as plain data for :func:`rebuild_narrowed`.

    Args:
        model: before the change.
        groups: the groups to prune.
        every: all groups of the model, since one configuration may state the width of all of them.
        kept: the kept units of each group, by its name.

    Returns:
        ``sizes``: the new numbers of rows and columns of each layer (null if unchanged); ``numbers``: attributes to
        set; ``<group>:kept``: one bit per unit, packed, for the record.
    """
    sizes: dict[str, list[int | None]] = {}
    for name, (rows, columns) in kept_parts(model, groups, kept).items():
        sizes[name] = [None if rows is None else len(rows), None if columns is None else len(columns)]
    units = {group.name: len(kept[group.name]) for group in groups}
    plan: dict[str, Any] = {"sizes": sizes, "numbers": _numbers(groups, every, units)}
    for group in groups:
        mask = torch.zeros(1, group.width, dtype=torch.bool)
        mask[0, kept[group.name].cpu()] = True
        plan[f"{group.name}:kept"] = pack_mask(mask)
    return plan


def rebuild_narrowed(model: nn.Module, plan: dict[str, Any]) -> None:
    """Give ``model`` the structure of a plan; its smaller weights are uninitialised."""
    for name, (rows, columns) in plan["sizes"].items():
        resize(model.get_submodule(name), rows, columns)
    _set_numbers(model, plan["numbers"])


def narrow(
    model: nn.Module, groups: Sequence[CoupledGroup], kept: Mapping[str, Tensor], numbers: Numbers
) -> dict[str, list[str]]:
    """Remove all units from ``model`` that are not kept.

    Returns:
        Descriptions of lost constraints, to the names of the layers.
    """
    lost: dict[str, list[str]] = {}
    for name, (rows, columns) in kept_parts(model, groups, kept).items():
        module = model.get_submodule(name)
        with offload_of(model).turn(module):
            descriptions = slice_module(module, rows, columns)
        for description in descriptions:
            lost.setdefault(description, []).append(name)
    _set_numbers(model, numbers)
    return lost


def conflicting_settings(groups: Sequence[CoupledGroup], units: Mapping[str, int]) -> list[str]:
    """Return the settings of the configuration that would need several values for groups with these ``units``."""
    return [setting for (_, setting), values in _config_values(groups, units).items() if len(values) > 1]


def _numbers(groups: Sequence[CoupledGroup], every: Sequence[CoupledGroup], units: Mapping[str, int]) -> Numbers:
    """The attributes to set: those of the groups' modules, then those of configurations."""
    numbers: Numbers = []
    config_keys: set[tuple[str, str]] = set()
    for group in groups:
        for patch in group.patches:
            if _is_config(patch):
                config_keys.add((patch.name, patch.attribute))
            else:
                numbers.append((patch.name, patch.attribute, patch.value(units[group.name])))
    # If the layers need different values of a setting, it stays unchanged.
    for (name, setting), values in _config_values(every, units).items():
        if (name, setting) in config_keys and len(values) == 1:
            numbers.append((name, setting, values.pop()))
    return numbers


def _config_values(every: Sequence[CoupledGroup], units: Mapping[str, int]) -> dict[tuple[str, str], set[int]]:
    """The values that the groups need for each setting of a configuration: (module name, attribute) to values."""
    values: dict[tuple[str, str], set[int]] = {}
    for group in every:
        for patch in filter(_is_config, group.patches):
            value = patch.value(units.get(group.name, group.width))
            values.setdefault((patch.name, patch.attribute), set()).add(value)
    return values


def _is_config(patch: Patch) -> bool:
    return patch.attribute.startswith("config.")


def _set_numbers(model: nn.Module, numbers: Sequence[Sequence[Any]]) -> None:
    for name, attribute, value in numbers:
        target: Any = model.get_submodule(name)
        if attribute.startswith("config."):
            target = target.config
        setattr(target, attribute.removeprefix("config."), value)


def _width(module: nn.Module, side: str) -> int:
    """Rows or columns of a layer; the entries of a norm, which may have no weight but running statistics."""
    tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None and t.dim()]
    return tensors[0].shape[0] if side == "out" else tensors[0].shape[1]
