"""The checks of stages that aim at the dense model's weights."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import LightningModule

from pqqp_lightning.errors import Problem, shorten
from pqqp_lightning.network.constraints import constrained_layers
from pqqp_lightning.stages.stage import Stage


def check_aims_at_dense(stage: Stage, model: LightningModule, earlier: Sequence[Stage]) -> list[Problem]:
    """The problems of a ``stage`` whose layers may not correspond to dense ones.

    Args:
        stage: aims at the dense weights.
        model: as it will be at the stage's turn.
        earlier: the stages before it.
    """
    problems = []
    layers = stage.find_layers(model)
    loaded = sorted(name for name, _, _ in constrained_layers(model) if name in layers)
    if loaded:
        text = f"aims at the dense weights, and the model was compressed before this run: {shorten(loaded)}"
        problems.append(Problem(text=text, way_out="Run all stages in one recipe, from the dense model."))
    for before in earlier:
        if not before.comparable_layers:
            text = f"aims at the dense weights, and stage '{before.name}' changed what the layers compute"
            problems.append(Problem(text=text, way_out="Leave one of the two out."))
        elif before.epochs and not stage.allow_undo:
            text = f"aims at the dense weights and would undo the training of stage '{before.name}'"
            problems.append(Problem(text=text, way_out="Put it before that training, or set allow_undo: true."))
    return problems


def describe_gain(ratios: list[float], cause: str) -> list[str]:
    """A note on the squared output errors that ``cause`` makes, each as a fraction of what it was; none without any."""
    if not ratios:
        return []
    mean = sum(ratios) / len(ratios)
    return [
        f"squared output error that {cause} cause: {mean:.3f} of what it was, averaged over the layers "
        f"({min(ratios):.3f} to {max(ratios):.3f})"
    ]
