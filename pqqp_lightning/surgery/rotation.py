"""Rotates a decoder's residual stream: changes the structure from a plan, and rewrites the weights.

QuaRot (Ashkboos et al., arXiv 2404.00456); :mod:`~pqqp_lightning.algorithms.quarot` has the mathematics.
"""

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
from pqqp_lightning.network.offload import offload_of
from pqqp_lightning.surgery.decoder import Attention, Decoder, norm_parts

ROWS_AT_ONCE = 4096
"""Rows of an embedding that are converted to float64 at a time: the whole table would take much memory."""

Change = tuple[str, dict[str, Any]]
"""A Linear layer's name and its arguments of ``rewrite_linear``."""


Norm = tuple[nn.Parameter | None, nn.Parameter | None, float]
"""Gain, bias and epsilon."""


def plan_structure(model: nn.Module, decoder: Decoder, *, fold: bool, online: bool, seed: int) -> dict[str, Any]:
    """Plan the structural changes as plain data for :func:`rotate_structure`.

    Args:
        model: holds the decoder; its weights are not read.
        decoder: from :func:`~pqqp_lightning.surgery.decoder.describe_decoder`.
        fold: fold the norms' gains and rotate the stream. If False, leave both and rotate each norm's output at run
            time.
        online: also rotate the input of each sublayer's last layer at run time: all features of an MLP, whole heads of
            an attention.
        seed: of the rotations.
    """
    run_time: dict[str, list[int]] = {}  # layer to [order, width] of the rotation of its input
    for sublayer in decoder.sublayers:
        if not fold:
            run_time.update({name: [decoder.hidden_size, 1] for name in sublayer.reads})
    for sublayer in decoder.sublayers:
        if online:
            width = sublayer.head_dim if isinstance(sublayer, Attention) else 1
            run_time[sublayer.writes] = [_linear(model, sublayer.writes).in_features // width, width]
    plan: dict[str, Any] = {"seed": seed}
    if fold:
        plan |= _plan_stream(model, decoder)
    plan["online"] = run_time
    for order in sorted({order for order, _ in run_time.values()}):
        # Store a random matrix, since QR may give other digits on another machine. Hadamard matrices are exact.
        if small_factor(order) is None:
            plan[f"factor.{order}"] = make_rotation(order, _generator(seed), random_signs=False).factor
    return plan


def _plan_stream(model: nn.Module, decoder: Decoder) -> dict[str, Any]:
    """The structural changes for a rotated stream."""
    readers = [(sublayer.norm, sublayer.reads) for sublayer in decoder.sublayers]
    if not decoder.tied:
        readers.append((decoder.norm, (decoder.head,)))
    new_biases = []  # a layer that takes up a norm's bias needs a bias itself
    for norm, names in readers:
        _, norm_bias, _ = _norm(model, norm)
        if norm_bias is not None:
            new_biases += [name for name in names if _linear(model, name).bias is None]
    return {
        "hidden_size": decoder.hidden_size,
        "norms": {name: _norm(model, name)[2] for name in decoder.norms},
        "biases": new_biases,
        "gain": [decoder.norm, _norm(model, decoder.norm)[1] is not None] if decoder.tied else None,
        "projected": decoder.embedding if decoder.tied and decoder.centred else None,
    }


def rotate_structure(model: nn.Module, plan: dict[str, Any]) -> None:
    """Change the structure as planned.

    Norms lose their gains, a tied head gets a layer for its gain, layers get biases if their norm had one, and
    rotations at run time are attached.
    """
    if "norms" in plan:
        _restructure_stream(model, plan)
    # Layers with the same rotation share one hook, so that q, k and v rotate their common input once.
    hooks: dict[tuple[int, int], RotateInput] = {}
    for name, (order, width) in plan["online"].items():
        if (order, width) not in hooks:
            hooks[order, width] = RotateInput(online_rotation(plan, order), width)
        hooks[order, width].attach(model.get_submodule(name))


def _restructure_stream(model: nn.Module, plan: dict[str, Any]) -> None:
    for name in plan["biases"]:
        layer = _linear(model, name)
        bias = layer.weight.detach().new_zeros(layer.out_features)
        layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
    for name, epsilon in plan["norms"].items():
        norm: nn.Module = nn.RMSNorm(plan["hidden_size"], epsilon, elementwise_affine=False)
        if plan["gain"] is not None and name == plan["gain"][0]:
            gain, _, _ = _norm(model, name)
            norm = _with_gain(norm, gain, plan["gain"][1])
        _replace(model, name, norm)
    if plan["projected"]:
        embedding = model.get_submodule(plan["projected"])
        assert isinstance(embedding, nn.Embedding)
        _replace(model, plan["projected"], ProjectedEmbedding(embedding))


def online_rotation(plan: dict[str, Any], order: int) -> Rotation:
    """Return the rotation of ``order`` at run time: a Hadamard matrix without signs, or the stored random matrix."""
    factor = plan.get(f"factor.{order}")
    if factor is not None:
        return Rotation(factor.cpu(), order)
    return make_rotation(order, _generator(plan["seed"]), random_signs=False)


@torch.no_grad()
def rotate_decoder(model: nn.Module, decoder: Decoder, plan: dict[str, Any]) -> None:
    """Give ``model`` the structure of ``plan``, and rewrite its weights so that its function does not change."""
    device = model.get_submodule(decoder.embedding).weight.device
    assert isinstance(device, torch.device)
    stream = None
    if "norms" in plan:
        stream = make_rotation(decoder.hidden_size, _generator(plan["seed"])).to(device)
    # Read the norms' gains and biases before the structure changes: it drops them.
    last_norm = _norm(model, decoder.norm)
    changes = list(_changes(model, decoder, plan, stream, device))
    if stream is not None and not decoder.tied:
        gain, shift, _ = last_norm
        changes.append((decoder.head, {"gain": gain, "shift": shift, "inputs": [stream.apply]}))
    rotate_structure(model, plan)
    for name, options in changes:
        layer = _linear(model, name)
        with offload_of(model).turn(layer):
            device = layer.weight.device
            here: dict[str, Any] = {}  # the options, tensors on the weight's device
            for key, value in options.items():
                here[key] = value.to(device) if isinstance(value, Tensor) else value
            _write(layer, *rewrite_linear(layer.weight, layer.bias, **here))
    if stream is not None:
        _rotate_ends(model, decoder, plan, stream, last_norm)


def _rotate_ends(model: nn.Module, decoder: Decoder, plan: dict[str, Any], stream: Rotation, last_norm: Norm) -> None:
    """Rotate the embeddings, with which the stream begins, and the gain before a tied head."""
    for table in filter(None, (decoder.embedding, decoder.positions)):
        # A tied embedding is also the head, which needs its mean: ProjectedEmbedding removes it at run time instead.
        keep_mean = decoder.tied and table == decoder.embedding
        module = model.get_submodule(table)
        with offload_of(model).turn(module):
            weight: Any = module.weight
            for rows in weight.split(ROWS_AT_ONCE):
                wide = rows.double()
                rows.copy_(stream.apply(centre(wide) if decoder.centred and not keep_mean else wide))
    if decoder.tied:
        gain, shift, _ = last_norm
        _write(model.get_submodule(f"{decoder.norm}.gain"), *rotate_gain(stream, gain, shift))
    if plan["projected"]:
        embedding: Any = model.get_submodule(plan["projected"])
        embedding.direction.copy_(mean_direction(stream))


def _changes(
    model: nn.Module, decoder: Decoder, plan: dict[str, Any], stream: Rotation | None, device: torch.device
) -> Iterator[Change]:
    """Yield how to rewrite each Linear layer on the stream; ``stream`` is None if the stream is not rotated."""

    def run_time_rotation(name: str) -> list[Map]:
        if name not in plan["online"]:
            return []
        order, width = plan["online"][name]
        return [rotate_across(online_rotation(plan, order).to(device), width)]

    writes: list[Map] = []  # what happens to outputs that are added to the stream
    if stream is not None and decoder.centred:
        writes.append(centre)
    if stream is not None:
        writes.append(stream.apply)
    for sublayer in decoder.sublayers:
        folded: dict[str, Any] = {}
        if stream is not None:
            folded["gain"], folded["shift"], _ = _norm(model, sublayer.norm)
        # Each value head is rotated, and the output layer undoes it. This needs no computation at run time.
        heads: list[Map] = []
        if isinstance(sublayer, Attention):
            rotation = make_rotation(sublayer.head_dim, _generator(plan["seed"]), random_signs=False)
            heads = [rotate_heads(rotation.to(device))]
        for name in sublayer.reads:
            outputs = heads if isinstance(sublayer, Attention) and name == sublayer.values else []
            inputs = run_time_rotation(name) if stream is None else [stream.apply]
            yield name, {**folded, "inputs": inputs, "outputs": outputs}
        yield sublayer.writes, {"inputs": [*heads, *run_time_rotation(sublayer.writes)], "outputs": writes}


def _write(layer: Any, weight: Tensor, bias: Tensor | None) -> None:
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)


def _with_gain(norm: nn.Module, gain: Tensor | None, bias: bool) -> nn.Sequential:
    """``norm`` followed by an uninitialised Linear layer named ``gain``."""
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
    """Replace the module ``name`` by ``new``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new.train(model.get_submodule(name).training))
