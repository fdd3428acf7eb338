"""A decoder's weights rewritten for a rotated residual stream, and the structure that goes with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pqqp_lightning.algorithms.hadamard import Rotation, make_rotation, small_factor
from pqqp_lightning.algorithms.quarot import (
    Map,
    centre,
    mean_direction,
    rewrite_linear,
    rotate_across,
    rotate_gain,
    rotate_heads,
)
from pqqp_lightning.network.activation_hooks import ProjectedEmbedding, RotateInput
from pqqp_lightning.surgery.decoder import Attention, Decoder, Sublayer, norm_parts

ROWS_AT_ONCE = 4096
"""Rows of an embedding that are in float64 at a time."""

Change = tuple[str, dict[str, Any]]
"""A Linear layer's name and the options of ``rewrite_linear``."""


Norm = tuple[nn.Parameter | None, nn.Parameter | None, float]
"""Gain, bias and epsilon."""


def plan_structure(model: nn.Module, decoder: Decoder, *, fold: bool, online: bool, seed: int) -> dict[str, Any]:
    """What :func:`rotate_structure` needs to know to do its work on a fresh model.

    Args:
        model: holds the decoder; its weights are not read.
        decoder: from :func:`~pqqp_lightning.surgery.decoder.describe_decoder`.
        fold: fold the norms' gains and rotate the stream; else leave both and rotate each norm's output at run time.
        online: rotate the inputs of each sublayer's last layer as well: all of an MLP's, the heads of an attention.
        seed: of the rotations.
    """
    at_run_time = {} if fold else {name: [decoder.hidden_size, 1] for s in decoder.sublayers for name in s.reads}
    if online:
        at_run_time |= {s.writes: _parts(_linear(model, s.writes), s) for s in decoder.sublayers}
    plan = {"seed": seed, **(_plan_stream(model, decoder) if fold else {}), "online": at_run_time}
    for order in sorted({order for order, _ in at_run_time.values()}):
        if small_factor(order) is None:  # its random matrix is stored: another machine may compute other digits
            plan[f"factor.{order}"] = make_rotation(order, _generator(seed), random_signs=False).factor
    return plan


def _plan_stream(model: nn.Module, decoder: Decoder) -> dict[str, Any]:
    """What changes in the structure where the stream is rotated."""
    folded = [(s.norm, s.reads) for s in decoder.sublayers]
    if not decoder.tied:
        folded.append((decoder.norm, (decoder.head,)))
    shifted = [name for norm, reads in folded for name in reads if _norm(model, norm)[1] is not None]
    return {
        "hidden_size": decoder.hidden_size,
        "norms": {name: _norm(model, name)[2] for name in decoder.norms},
        "biases": [name for name in shifted if _linear(model, name).bias is None],
        "gain": [decoder.norm, _norm(model, decoder.norm)[1] is not None] if decoder.tied else None,
        "projected": decoder.embedding if decoder.tied and decoder.centred else None,
    }


def rotate_structure(model: nn.Module, plan: dict[str, Any]) -> None:
    """Norms without gains, a layer for a tied head's gain, biases where norms had some, rotations at run time."""
    if "norms" in plan:
        _restructure_stream(model, plan)
    hooks: dict[tuple[int, int], RotateInput] = {}
    for name, (order, width) in plan["online"].items():
        hook = hooks.get((order, width)) or RotateInput(online_rotation(plan, order), width)
        hooks.setdefault((order, width), hook).attach(model.get_submodule(name))


def _restructure_stream(model: nn.Module, plan: dict[str, Any]) -> None:
    for name in plan["biases"]:
        layer = _linear(model, name)
        bias = layer.weight.detach().new_zeros(layer.out_features)
        layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
    for name, epsilon in plan["norms"].items():
        bare = nn.RMSNorm(plan["hidden_size"], epsilon, elementwise_affine=False)
        last = plan["gain"] is not None and name == plan["gain"][0]
        _replace(model, name, _with_gain(bare, _norm(model, name)[0], plan["gain"][1]) if last else bare)
    if plan["projected"]:
        embedding = model.get_submodule(plan["projected"])
        assert isinstance(embedding, nn.Embedding)
        _replace(model, plan["projected"], ProjectedEmbedding(embedding))


def online_rotation(plan: dict[str, Any], order: int) -> Rotation:
    """The rotation of ``order`` at run time: a plain Hadamard matrix where there is one."""
    factor = plan.get(f"factor.{order}")
    if factor is not None:
        return Rotation(factor.cpu(), order)
    return make_rotation(order, _generator(plan["seed"]), random_signs=False)


@torch.no_grad()
def rotate_decoder(model: nn.Module, decoder: Decoder, plan: dict[str, Any]) -> None:
    """Give ``model`` the structure of ``plan`` and its weights the values that keep its function."""
    device = model.get_submodule(decoder.embedding).weight.device
    assert isinstance(device, torch.device)
    stream = make_rotation(decoder.hidden_size, _generator(plan["seed"])).to(device) if "norms" in plan else None
    last = _norm(model, decoder.norm)
    changes = list(_changes(model, decoder, plan, stream, device))
    if stream is not None and not decoder.tied:
        changes.append((decoder.head, {"gain": last[0], "shift": last[1], "inputs": [stream.apply]}))
    rotate_structure(model, plan)
    for name, options in changes:
        layer = _linear(model, name)
        _write(layer, *rewrite_linear(layer.weight, layer.bias, **options))
    if stream is not None:
        _rotate_ends(model, decoder, plan, stream, last)


def _rotate_ends(model: nn.Module, decoder: Decoder, plan: dict[str, Any], stream: Rotation, last: Norm) -> None:
    """What the stream begins with, and a tied head's gain."""
    for table in filter(None, (decoder.embedding, decoder.positions)):
        keep_mean = decoder.tied and table == decoder.embedding
        _rotate_rows(model.get_submodule(table).weight, stream, centred=decoder.centred and not keep_mean)
    if decoder.tied:
        _write(model.get_submodule(f"{decoder.norm}.gain"), *rotate_gain(stream, last[0], last[1]))
    if plan["projected"]:
        embedding: Any = model.get_submodule(plan["projected"])
        embedding.direction.copy_(mean_direction(stream))


def _changes(
    model: nn.Module, decoder: Decoder, plan: dict[str, Any], stream: Rotation | None, device: torch.device
) -> Iterator[Change]:
    """How each Linear layer on the stream is rewritten; ``stream`` is None where it stays as it is."""

    def at_run_time(name: str) -> list[Map]:
        if name not in plan["online"]:
            return []
        order, width = plan["online"][name]
        return [rotate_across(online_rotation(plan, order).to(device), width)]

    writes: list[Map] = [] if stream is None else [*([centre] if decoder.centred else []), stream.apply]
    for sublayer in decoder.sublayers:
        folded: dict[str, Any] = {}
        if stream is not None:
            folded["gain"], folded["shift"], _ = _norm(model, sublayer.norm)
        heads: list[Map] = []
        if isinstance(sublayer, Attention):
            rotation = make_rotation(sublayer.head_dim, _generator(plan["seed"]), random_signs=False)
            heads = [rotate_heads(rotation.to(device))]
        for name in sublayer.reads:
            outputs = heads if isinstance(sublayer, Attention) and name == sublayer.values else []
            inputs = at_run_time(name) if stream is None else [stream.apply]
            yield name, {**folded, "inputs": inputs, "outputs": outputs}
        yield sublayer.writes, {"inputs": [*heads, *at_run_time(sublayer.writes)], "outputs": writes}


def _parts(layer: nn.Linear, sublayer: Sublayer) -> list[int]:
    """[n, width]: how many parts of the layer's input are mixed at run time, and how wide each is."""
    width = sublayer.head_dim if isinstance(sublayer, Attention) else 1
    return [layer.in_features // width, width]


def _write(layer: Any, weight: Tensor, bias: Tensor | None) -> None:
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)


def _rotate_rows(table: Any, rotation: Rotation, *, centred: bool) -> None:
    for rows in table.split(ROWS_AT_ONCE):
        wide = rows.double()
        rows.copy_(rotation.apply(centre(wide) if centred else wide))


def _with_gain(norm: nn.Module, gain: Tensor | None, bias: bool) -> nn.Sequential:
    """``norm`` and a layer behind it, named ``gain``."""
    assert gain is not None
    layer = nn.utils.skip_init(nn.Linear, len(gain), len(gain), bias, device=gain.device, dtype=gain.dtype)
    layer.requires_grad_(gain.requires_grad)
    sequence = nn.Sequential()
    sequence.add_module("norm", norm)
    sequence.add_module("gain", layer)
    return sequence


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _norm(model: nn.Module, name: str) -> Norm:
    return norm_parts(model.get_submodule(name))


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place of the module ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new.train(model.get_submodule(name).training))
