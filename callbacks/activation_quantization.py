"""Dynamic quantization of activations, keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from pqqp_lightning.errors import Problem, shorten
from pqqp_lightning.network.activation_hooks import QuantizeHeads, QuantizeInput, leave_fast_path, transformed_layers
from pqqp_lightning.network.layer_uses import use_of
from pqqp_lightning.network.layers import is_called
from pqqp_lightning.stages import Context, Layer, Plan, Stage
from pqqp_lightning.stages.stage import NOT_USED

CACHED = ("k_proj", "v_proj")


class ActivationQuantization(Stage):
    """Rounds the inputs of layers while the model runs, with a scale for each token (each image for convolutions).

    Weights do not change, and the checkpoint does not shrink. The metrics after this stage are those of a model that
    computes with inputs of few bits. Later stages calibrate on the rounded inputs. Put QuaRot, with online: true,
    before it.

    Example::

        stages:
          rotate:      {class_path: QuaRot, init_args: {online: true}}
          activations: {class_path: ActivationQuantization, init_args: {bits: 8, kv_bits: 8}}
          quantize:    {class_path: GPTQ, init_args: {bits: 4}}

    Args:
        bits: 2 to 8.
        kv_bits: 2 to 8, for keys and values (the outputs of k_proj and v_proj, before rotary positions), with a scale
            for each token and head; not rounded by default.
        symmetric: without zero points; False for asymmetric grids.
        clip: largest value on the grid, as a fraction of each token's largest, in (0, 1]; QuaRot uses 0.9 at 4 bits.
        outliers: do not round input columns with a value above this threshold in a batch (LLM.int8() uses 6.0); no
            threshold by default.
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    source = "per-token dynamic quantization; outliers as in Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339"
    compresses = True
    needs_forward = True

    def __init__(
        self,
        bits: int = 8,
        kv_bits: int | None = None,
        symmetric: bool = True,
        clip: float = 1.0,
        outliers: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.bits, self.kv_bits, self.symmetric = bits, kv_bits, symmetric
        self.clip, self.outliers = clip, outliers

    def reason_to_leave(self, layer: Layer) -> str:
        return "" if is_called(layer) else "rounds the inputs of modules that are called"

    def check_arguments(self) -> list[Problem]:
        problems = super().check_arguments()
        for argument, value in (("bits", self.bits), ("kv_bits", self.kv_bits)):
            if value is not None and not 2 <= value <= 8:
                problems.append(Problem(argument, value, "is not between 2 and 8"))
        if not 0 < self.clip <= 1:
            problems.append(Problem("clip", self.clip, "is not in (0, 1]", "1.0 cuts nothing off."))
        if self.outliers is not None and not self.outliers > 0:
            way_out = "LLM.int8() takes 6.0; leave it out for none."
            problems.append(Problem("outliers", self.outliers, "is not above 0", way_out))
        return problems

    def check(self, model: LightningModule, data: Any, earlier: Sequence[Stage]) -> list[Problem]:
        problems = super().check(model, data, earlier)
        rounded = set(transformed_layers(model, QuantizeInput))
        if twice := [n for n in self.find_layers(model) if rounded & {n, n.removesuffix(".base_layer")}]:
            text = f"the inputs of {shorten(twice)} are already rounded"
            problems.append(Problem(text=text, way_out="Give the stages disjoint targets, or drop one."))
        if self.kv_bits is None:
            return problems
        cached = self._cached(model)
        if not cached:
            names = " or ".join(CACHED)
            text = f"has no effect: no layer that the stage acts on is a {names} of an attention with a head_dim"
            problems.append(Problem("kv_bits", self.kv_bits, text, "Leave kv_bits out."))
        if again := sorted(set(cached) & set(transformed_layers(model, QuantizeHeads))):
            text = f"would round the outputs of {shorten(again)} a second time"
            problems.append(Problem("kv_bits", self.kv_bits, text, "Drop one of the two stages."))
        return problems

    def expected_plan(self, model: LightningModule) -> Plan:
        return {
            "layers": list(self.find_layers(model)),
            "bits": self.bits,
            "heads": {} if self.kv_bits is None else self._cached(model),
            "kv_bits": self.kv_bits,
            "symmetric": self.symmetric,
            "clip": self.clip,
            "outliers": self.outliers,
        }

    @staticmethod
    def restructure(model: LightningModule, plan: Plan) -> None:
        options = {name: plan[name] for name in ("symmetric", "clip")}
        # One module for all layers: q, k and v have the same input, which is then rounded once.
        inputs = QuantizeInput(plan["bits"], outliers=plan["outliers"], **options)
        for name in plan["layers"]:
            inputs.attach(model.get_submodule(name))
            leave_fast_path(model, name)
        for name, head_dim in plan["heads"].items():
            QuantizeHeads(plan["kv_bits"], head_dim, **options).attach(model.get_submodule(name))

    def compress(self, model: LightningModule, context: Context) -> Plan:
        plan = self.expected_plan(model)
        self.restructure(model, plan)
        return plan

    def reason_by_use(self, layer: Layer) -> str:
        return super().reason_by_use(layer) or (NOT_USED if use_of(layer) == "unused" else "")

    def _cached(self, model: nn.Module) -> dict[str, int]:
        """The modules that compute keys and values, with the width of a head."""
        layers, found = list(self.find_layers(model)), {}
        # An adapter wraps k_proj: the stage's layer is then below it, as k_proj.base_layer.
        for name, _ in model.named_modules():
            parent, _, last = name.rpartition(".")
            if last not in CACHED or not any(n == name or n.startswith(f"{name}.") for n in layers):
                continue
            head_dim = getattr(model.get_submodule(parent), "head_dim", None)
            if isinstance(head_dim, int):
                found[name] = head_dim
        return found
