"""QuaRot (Ashkboos et al., arXiv 2404.00456)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from lightning.pytorch import LightningModule

from pqqp_lightning.errors import Problem, RecipeError, shorten
from pqqp_lightning.network.activation_hooks import Transform, transformed_layers
from pqqp_lightning.network.layers import is_adapter
from pqqp_lightning.stages import Context, ExpectedWeights, Layer, Plan, Stage
from pqqp_lightning.surgery.decoder import describe_decoder
from pqqp_lightning.surgery.rotation import plan_structure, rotate_decoder, rotate_structure


class QuaRot(Stage):
    """Rotates a language model's hidden states so that weights and activations have no outliers; outputs do not change.

    It supports the LLaMA and OPT families. Norms' gains are folded into the layers after them. A randomised Hadamard
    matrix (an orthogonal one where none exists) rotates the residual stream, and a Hadamard matrix for each head
    rotates the values. Put stages that round weights or activations after it. A tied embedding stays tied: the last
    norm's gain becomes one more layer of hidden size x hidden size after that norm. Dropout in a later finetuning acts
    on the rotated stream.

    Folding can harm a model in which small gains mute huge channels of the stream: after it, rounding errors of the
    weights are multiplied by these channels in full. GPTQ sees the inputs and avoids this; RTN gets worse. For RTN use
    ``gains: keep``, ``online: true`` and its ``clip``. docs/methods.md has the figures.

    Example::

        stages:
          rotate:   {class_path: QuaRot}
          quantize: {class_path: GPTQ, init_args: {bits: 4}}

    Args:
        online: also rotate, while the model runs, the inputs of each MLP's last layer and the heads before each
            attention's last layer (fast Hadamard transforms). Use it before quantizing activations. Queries and keys
            are not rotated.
        gains: "fold" as in the paper; "keep" changes neither norms nor residual stream, and rotates each norm's output
            while the model runs: two more transforms in every block, but no additional layer.
        seed: seed of the random signs.
        kwargs: see :class:`~pqqp_lightning.stages.Stage`; leave out targets and ignore, since the whole model is
            rotated.
    """

    source = "Ashkboos et al. 2024, QuaRot, arXiv 2404.00456"
    compresses = True
    keeps_function = True
    comparable_layers = False

    def __init__(
        self, online: bool = False, gains: Literal["fold", "keep"] = "fold", seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.online, self.gains, self.seed = online, gains, seed

    def reason_to_leave(self, layer: Layer) -> str:
        return ""  # a model with a layer that cannot be rotated is refused as a whole

    def check_arguments(self) -> list[Problem]:
        problems = super().check_arguments()
        if self.gains not in ("fold", "keep"):
            problems.append(Problem("gains", self.gains, "is neither 'fold' nor 'keep'"))
        for argument, patterns in (("targets", self.targets), ("ignore", self.ignore)):
            if patterns:
                text = "cannot leave layers out: every layer on the residual stream is rotated"
                problems.append(Problem(argument, patterns, text, f"Drop {argument}."))
        return problems

    def check(self, model: LightningModule, data: Any, earlier: Sequence[Stage]) -> list[Problem]:
        problems = super().check(model, data, earlier)
        # the checks below would only report consequences of the first rotation
        if again := [stage.name for stage in earlier if isinstance(stage, QuaRot)]:
            text = f"the model is already rotated by stage '{again[0]}'"
            return [*problems, Problem(text=text, way_out="Drop one of the two.")]
        way_out = "Put this stage first, or set allow_undo: true."
        problems += self.refuse_after(model, earlier, ("mask", "grid"), "a rotation mixes weights", way_out)
        if rounded := list(transformed_layers(model, Transform)):
            text = f"the inputs of {shorten(rounded)} are already rounded"
            problems.append(Problem(text=text, way_out="Put this stage first."))
        if adapters := [name for name, module in model.named_modules() if is_adapter(module)]:
            text = f"{shorten(adapters)} are adapters kept apart"
            return [*problems, Problem(text=text, way_out="Merge them first, or put this stage first.")]
        try:
            describe_decoder(model)
        except RecipeError as error:
            problems += error.problems
        return problems

    def expected_plan(self, model: LightningModule) -> Plan:
        return plan_structure(
            model, describe_decoder(model), fold=self.gains == "fold", online=self.online, seed=self.seed
        )

    def expected_weights(self, model: LightningModule, weights: ExpectedWeights) -> ExpectedWeights:
        # with allow_undo: a rotation leaves no mask and no grid
        rotated, exact = {}, True
        for name in self.find_layers(model):
            before = weights.weights[name]
            exact = exact and before.kept is None and before.grid is None
            rotated[name] = replace(before, kept=None, row_kept=None, pattern=None, grid=None)
        return weights.changed(rotated, exact)

    @staticmethod
    def restructure(model: LightningModule, plan: Plan) -> None:
        rotate_structure(model, plan)

    def compress(self, model: LightningModule, context: Context) -> Plan:
        plan = self.expected_plan(model)
        rotate_decoder(model, describe_decoder(model), plan)
        return plan
