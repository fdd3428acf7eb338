"""The arguments and checks that pruning stages share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule

from pqqp_lightning.algorithms.selection import Pattern
from pqqp_lightning.checkpoint.expected import ExpectedWeights
from pqqp_lightning.errors import Problem, RecipeError, shorten
from pqqp_lightning.network.layers import Layer, channels_of
from pqqp_lightning.network.name_patterns import value_for, values_of
from pqqp_lightning.stages.layerwise import LayerwiseStage
from pqqp_lightning.stages.stage import Stage

PatternArgument = str | int
"""``"2:4"``, or the number 124, which is how YAML 1.1 reads an unquoted 2:4."""


def parse_pattern(value: PatternArgument) -> Pattern:
    """(N, M) of ``"N:M"``: N kept of every M.

    Raises:
        RecipeError: another form, or not 0 < N < M.
    """
    if isinstance(value, int):  # YAML 1.1 reads an unquoted 2:4 as 2 * 60 + 4
        n, m = divmod(value, 60)
        value = f"{n}:{m}"
    else:
        left, _, right = value.partition(":")
        n, m = (int(left), int(right)) if left.isdigit() and right.isdigit() else (0, 0)
    if not 0 < n < m:
        way_out = "Write it quoted, as in pattern: '2:4'."
        raise RecipeError(Problem("pattern", value, "is not N:M with 0 < N < M", way_out))
    return n, m


class PruningStage(LayerwiseStage):
    """A stage that removes weights.

    Args:
        sparsity: fraction of the weights to remove, in (0, 1); or name pattern to fraction.
        pattern: "N:M" instead: N kept of every M consecutive inputs ("2:4"); or name pattern to "N:M".
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    promises = ("mask",)

    def __init__(
        self,
        sparsity: float | dict[str, float] | None = None,
        pattern: PatternArgument | dict[str, PatternArgument] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.sparsity, self.pattern = sparsity, pattern

    def amount(self, name: str) -> dict[str, Any]:
        """``sparsity`` or ``pattern`` for one layer, as the algorithms take them."""
        pattern: Any = None if self.pattern is None else value_for(name, self.pattern)
        if pattern is not None:
            return {"pattern": parse_pattern(pattern)}
        return {"sparsity": None if self.sparsity is None else value_for(name, self.sparsity)}

    def expected_weights(self, model: LightningModule, weights: ExpectedWeights) -> ExpectedWeights:
        pruned = {}
        for name, layer in self.find_layers(model).items():
            amount, before = self.amount(name), weights.weights[name]
            if "pattern" in amount:
                pruned[name] = before.with_pattern(amount["pattern"])
            else:
                pruned[name] = before.with_sparsity(amount["sparsity"], self._parts(layer))
        return weights.changed(pruned)

    def _parts(self, layer: Layer) -> int:
        """The number of equal parts of the matrix that each lose the same fraction."""
        return 1

    def check_arguments(self) -> list[Problem]:
        problems = super().check_arguments()
        way_out = "Set one: sparsity: 0.5, or pattern: '2:4'."
        if self.sparsity is None and self.pattern is None:
            problems.append(Problem(text="neither of sparsity and pattern given", way_out=way_out))
        elif self.sparsity is not None and self.pattern is not None:
            text = f"cannot stand beside sparsity={self.sparsity!r}"
            problems.append(Problem("pattern", self.pattern, text, way_out))
        return problems + self._check_amounts()

    def check(self, model: LightningModule, data: Any, earlier: Sequence[Stage]) -> list[Problem]:
        problems, layers = super().check(model, data, earlier), self.find_layers(model)
        if self._check_amounts():
            return problems
        problems += self.check_patterns("sparsity", layers) + self.check_patterns("pattern", layers)
        odd: dict[tuple[int, int, int], list[str]] = {}
        for name, layer in layers.items():
            pattern = self.amount(name).get("pattern")
            width = channels_of(layer)
            if pattern is not None and width % pattern[1]:
                odd.setdefault((*pattern, width), []).append(name)
        for (n, m, width), names in odd.items():
            text = f"does not divide the {width} input channels of {shorten(names)}"
            problems.append(Problem("pattern", f"{n}:{m}", text, "Add them to ignore, or use sparsity."))
        return problems

    def _check_amounts(self) -> list[Problem]:
        problems = []
        for sparsity in values_of(self.sparsity):
            if not 0 < sparsity < 1:
                problems.append(Problem("sparsity", sparsity, "is not in (0, 1)", "0.5 removes half of the weights."))
        for pattern in values_of(self.pattern):
            try:
                parse_pattern(pattern)
            except RecipeError as error:
                problems += error.problems
        return problems
