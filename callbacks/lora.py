"""LoRA (Hu et al., arXiv 2106.09685) as a recovery stage, through PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from pqqp_lightning.algorithms.lora import Merged, merge_low_rank
from pqqp_lightning.errors import shorten
from pqqp_lightning.network.layer_kinds import is_transposed_linear
from pqqp_lightning.network.layers import matrix_shape, set_weight_matrix
from pqqp_lightning.stages import (
    Context,
    Layer,
    Plan,
    Problem,
    Stage,
    check_aims_at_dense,
    constraints_of,
    correct_outputs,
    weight_matrix,
)
from pqqp_lightning.surgery.adapters import (
    Adapters,
    base_of,
    inject,
    parameters_of,
    remove,
    train_through_merge,
    unused_name,
    update_of,
    wrapped_name,
    wrappers,
)

Initialization = Literal["default", "gaussian", "orthogonal", "pissa", "olora", "eora"]
LINEAR_ONLY = ("orthogonal", "pissa", "olora")
CHANGES_THE_WEIGHT = ("pissa", "olora")
LITTLE = 0.1
"""The record warns if merging keeps less than this share of the adapters' update."""


class LoRA(Stage):
    """Trains low-rank adapters B A next to frozen weights, then merges them without breaking a mask or a grid.

    Merged weights are masked and rounded to their grid again. The record says how far this moved them, and has the
    metrics before merging. With ``merge: false`` the adapters stay separate: they count in the size, and later stages
    act on the weights below them. Running statistics of batch normalisation are updated as in any training.

    Example::

        stages:
          prune:   {class_path: SparseGPT, init_args: {sparsity: 0.5}}
          recover: {class_path: LoRA, init_args: {rank: 8, epochs: 1, learning_rate: 0.0002}}

    Args:
        rank: columns of B and rows of A; more learns more and costs more.
        alpha: the update is alpha / rank * B A.
        dropout: on the adapters' input, in training; in [0, 1).
        initialization: how A and B start. "default" and "gaussian" draw A and start B at zero; "orthogonal" draws both
            so that B A is zero; "pissa" (arXiv 2404.02948) and "olora" (arXiv 2406.01775) move part of the weight into
            them; "eora" (arXiv 2410.21271) sets B A to the correction of this rank that brings the compressed layer's
            outputs nearest to the dense layer's, on the calibration data.
        merge: add the adapters to the weights after training; false keeps them separate.
        merge_aware: on layers with a mask or a grid, train with the weights as they will be after merging, so that
            merging loses nothing (MaskLoRA, arXiv 2312.15230, and LR-QAT, arXiv 2406.06385). A step then costs about
            as much as one of full finetuning. Use it on a grid, where rounding may cancel the update; on a mask it
            made no difference (docs/methods.md).
        epochs: epochs of training, 1 or more; or 0 with initialization: eora and merge: false.
        learning_rate: the highest learning rate, chosen for Adam; null uses the model's own.
        adapter_bits: round A and B to a grid of so many bits, which later training would leave: it needs epochs: 0.
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    source = "Hu et al. 2021, LoRA, arXiv 2106.09685"
    compresses = True
    needs_forward = True

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        initialization: Initialization = "default",
        merge: bool = True,
        merge_aware: bool = False,
        epochs: int = 1,
        learning_rate: float | None = 2e-4,
        adapter_bits: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(epochs=epochs, learning_rate=learning_rate, **kwargs)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.initialization, self.merge, self.merge_aware = initialization, merge, merge_aware
        self.adapter_bits = adapter_bits
        self._validated: dict[str, float] = {}

    @property
    def corrects(self) -> bool:
        """Whether the adapters start as a correction of the compressed weights, and not as zero."""
        return self.initialization == "eora"

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]
        """Whether the correction reads the layers' inputs."""
        return self.corrects

    @property
    def needs_dense(self) -> bool:  # type: ignore[override]
        """Whether the correction aims at the dense weights."""
        return self.corrects

    @property
    def changes_before_training(self) -> bool:  # type: ignore[override]
        """Whether the adapters start as something else than zero."""
        return self.corrects

    def check_arguments(self) -> list[Problem]:
        # without training, the default learning_rate has no effect, but the user did not set it
        problems = [p for p in super().check_arguments() if self.epochs or p.key != "learning_rate"]
        if not self.epochs and not self.corrects:
            way_out = "Use 1 or more, or initialization: eora, which needs no training."
            problems.append(Problem("epochs", self.epochs, "trains no adapter", way_out))
        if not self.epochs and self.corrects and self.merge:
            text = "would mask and round the correction away, which nothing trains"
            problems.append(Problem("merge", self.merge, text, "Set merge: false, or epochs to 1 or more."))
        problems += self._check_adapter_bits()
        if not self.rank > 0:
            problems.append(Problem("rank", self.rank, "is not above 0"))
        if not self.alpha > 0:
            problems.append(Problem("alpha", self.alpha, "is not above 0"))
        if not 0 <= self.dropout < 1:
            problems.append(Problem("dropout", self.dropout, "is not in [0, 1)", "0 leaves it out."))
        if self.initialization == "orthogonal" and self.rank % 2:
            text = "is odd, which initialization='orthogonal' does not support"
            problems.append(Problem("rank", self.rank, text, "Use an even rank."))
        return problems

    def _check_adapter_bits(self) -> list[Problem]:
        bits = self.adapter_bits
        if bits is None:
            return []
        problems = []
        if not 2 <= bits <= 8:
            problems.append(Problem("adapter_bits", bits, "is not from 2 to 8", "Leave it out for the weights' dtype."))
        if self.epochs or not self.corrects:
            text = "needs adapters that are not trained, since training leaves the grid"
            problems.append(Problem("adapter_bits", bits, text, "Drop it, or set initialization: eora and epochs: 0."))
        return problems

    def check(self, model: LightningModule, data: Any, earlier: Sequence[Stage]) -> list[Problem]:
        problems, layers = super().check(model, data, earlier), self.find_layers(model)
        if odd := [name for name, layer in layers.items() if not _is_plain(layer)]:
            text = (
                f"{shorten(odd)} cannot carry an adapter: grouped, dilated or specially padded convolutions, and "
                "layers with a forward of their own"
            )
            problems.append(Problem(text=text, way_out="Add them to ignore."))
        return problems + self._check_initialization(model, layers, earlier)

    def find_layers(self, model: nn.Module) -> dict[str, Layer]:
        """The layers that get adapters: not those used at several places, since an adapter replaces one place only."""
        shared = _shared(model)
        return {name: layer for name, layer in super().find_layers(model).items() if id(layer) not in shared}

    def reason_to_leave(self, layer: Layer) -> str:
        known = isinstance(layer, nn.Linear | nn.Conv2d) or is_transposed_linear(layer)
        return "" if known else "adapts Linear, Conv1D and Conv2d layers"

    def compress(self, model: LightningModule, context: Context) -> Plan:
        plan = self._plan(model)
        required = {id(p) for p in model.parameters() if p.requires_grad}
        adapters = Adapters(**plan["adapters"])
        # PEFT's own start, which "eora" replaces
        inject(model, adapters, True if self.initialization in ("default", "eora") else self.initialization)
        if self.corrects:
            correct_outputs(
                model, self.find_layers(model), self.find_blocks(model), context, adapters, self.adapter_bits
            )
        if not self.epochs:
            return plan
        plan["trained_before"] = [name for name, p in model.named_parameters() if id(p) in required]
        plan["through_merge"] = self.merge and self.merge_aware
        _prepare_training(model, plan)
        self._validated = {}
        return plan

    def expected_plan(self, model: LightningModule) -> Plan:
        """The plan of :meth:`finish`: later stages act on the model after training."""
        return {} if self.merge else self._plan(model)

    def _plan(self, model: LightningModule) -> Plan:
        layers = [wrapped_name(name, model) for name in self.find_layers(model)]
        # The suffix avoids a clash with an attribute of ModuleDict, where PEFT keeps its adapters by name.
        name = unused_name(model, f"{self.name}_adapter")
        return {"adapters": vars(Adapters(name, self.rank, float(self.alpha), self.dropout, layers))}

    @staticmethod
    def restructure(model: LightningModule, plan: Plan) -> None:
        if not plan:  # the adapters are merged
            return
        inject(model, Adapters(**plan["adapters"]))
        if "trained_before" in plan:  # training is not finished
            _prepare_training(model, plan)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the metrics of the model with its adapters."""
        if not trainer.sanity_checking:
            # only this validation's metrics: callback_metrics has those of training, too
            logged = trainer.fit_loop.epoch_loop.val_loop._results.metrics(on_step=False)["callback"]
            self._validated = {name: float(value) for name, value in logged.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"validated": self._validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validated = state_dict["validated"]

    def finish(self, model: LightningModule, context: Context, plan: Plan) -> Plan:
        adapters = Adapters(**plan["adapters"])
        for name in plan["trained_before"]:
            model.get_parameter(name).requires_grad_(True)
        if not self.merge:
            return {"adapters": plan["adapters"]}
        merged: dict[str, list[Merged]] = {}
        for wrapper in wrappers(model, adapters).values():
            layer, update = base_of(wrapper), update_of(wrapper, adapters.name)
            weight, constraints = weight_matrix(layer), constraints_of(layer)
            grid = None if constraints.grid is None else constraints.grid.to(weight.device)
            result = merge_low_rank(weight, update, mask=constraints.mask(weight.device), grid=grid)
            set_weight_matrix(layer, result.weight)
            promised = [] if constraints.mask_bits is None else ["mask"]
            if grid is not None:
                promised.append(f"{grid.bits}-bit grid")
            merged.setdefault(" and ".join(promised), []).append(result)
        remove(model, adapters)
        aware = plan["through_merge"]
        context.notes += [_what_merging_did(promised, results, aware) for promised, results in merged.items()]
        if self._validated:
            shown = ", ".join(f"{name} {value:.6g}" for name, value in self._validated.items())
            context.notes.append(f"before merging, after the last epoch: {shown}")
        return {}

    def moves(self, model: LightningModule) -> list[str]:
        """None, since the weights are frozen and merging keeps their grid."""
        return []

    def _check_initialization(
        self, model: LightningModule, layers: dict[str, Layer], earlier: Sequence[Stage]
    ) -> list[Problem]:
        chosen, problems = self.initialization, []
        if chosen in LINEAR_ONLY and (convolutions := [n for n, x in layers.items() if not isinstance(x, nn.Linear)]):
            text = f"is for Linear layers, not for {shorten(convolutions)}"
            way_out = "Use default or gaussian, or add them to ignore."
            problems.append(Problem("initialization", chosen, text, way_out))
        if self.corrects:
            found = check_aims_at_dense(self, model, earlier)
            # QLoRA itself rounds what no earlier stage compressed
            if (
                layers
                and not found
                and "grid" not in self.promises
                and not self.overlaps(model, earlier, ("mask", "grid"))
            ):
                text = "has nothing to correct: no earlier stage prunes or quantizes its layers"
                found.append(Problem(text=text, way_out="Put it after them."))
            problems += [replace(problem, key="initialization", value=chosen) for problem in found]
        # the other initializations keep the weight, so that an earlier mask or grid still holds
        if chosen not in (*CHANGES_THE_WEIGHT, "eora"):
            return problems
        if small := [n for n, x in layers.items() if self.rank > min(matrix_shape(x))]:
            out_of = "the error" if self.corrects else "the weight"
            text = f"takes rank={self.rank} directions out of {out_of}; {shorten(small)} have fewer"
            way_out = "Lower rank, use default, or add them to ignore."
            problems.append(Problem("initialization", chosen, text, way_out))
        if self.corrects:
            return problems
        undone = self.refuse_after(
            model, earlier, ("mask", "grid"), "would change the weights", "Use default or gaussian."
        )
        return problems + [replace(problem, key="initialization", value=chosen) for problem in undone]


def _prepare_training(model: nn.Module, plan: Plan) -> None:
    """Freeze everything except the adapters; with ``through_merge`` they train on the merged weights."""
    adapters = Adapters(**plan["adapters"])
    own = {id(p) for p in parameters_of(model, adapters)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in own)
    if plan["through_merge"]:
        train_through_merge(model, adapters)


def _what_merging_did(promised: str, merged: list[Merged], aware: bool) -> str:
    """A note for the record. Shares are relative to the norm of all these layers' weights."""
    norm, *parts = (sum(getattr(m, part) ** 2 for m in merged) ** 0.5 for part in ("norm", "update", "moved", "lost"))
    update, moved, lost = (f"{part / max(norm, 1e-30):.2%}" for part in parts)
    layers = f"{len(merged)} layers"
    if not promised:
        return f"merged into {layers}, which moved their weights by {moved}; nothing is lost"
    into = f"merged into the {promised} of {layers}"
    if parts[1] < LITTLE * parts[0]:
        into += f", which left less than {LITTLE:.0%} (use merge: false, or recover before quantizing)"
    if aware:
        return f"{into}, as trained, which moved their weights by {moved}"
    return f"{into}: the adapters had moved their weights by {update}, and the {promised} moved the result by {lost}"


def _shared(model: nn.Module) -> set[int]:
    """The ids of modules that are used at more than one place."""
    seen: set[int] = set()
    shared: set[int] = set()
    for parent in model.modules():
        for child in parent._modules.values():
            if child is not None:
                (shared if id(child) in seen else seen).add(id(child))
    return shared


def _is_plain(layer: Layer) -> bool:
    """Whether the layer only multiplies with its matrix, in a form that PEFT's adapters support."""
    if isinstance(layer, nn.Linear):
        return type(layer).forward is nn.Linear.forward
    if not isinstance(layer, nn.Conv2d):
        return is_transposed_linear(layer)
    plain = type(layer).forward is nn.Conv2d.forward and layer.padding_mode == "zeros"
    return plain and layer.groups == 1 and layer.dilation == (1, 1)
