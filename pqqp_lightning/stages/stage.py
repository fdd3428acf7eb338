"""The contract of a compression stage: a Lightning callback. Stages run in the order of the list."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import isroutine
from typing import Any, ClassVar, Literal, get_args

from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from tqdm.auto import tqdm

from pqqp_lightning.calibration.statistics import Statistic
from pqqp_lightning.calibration.walk import Compress, Unreached, Walk
from pqqp_lightning.checkpoint.expected import ExpectedWeights
from pqqp_lightning.checkpoint.finished_blocks import FinishedBlocks, Part
from pqqp_lightning.errors import Problem, RecipeError, near_miss, shorten
from pqqp_lightning.network.blocks import Blocks, find_blocks, find_layers, is_selected, model_blocks, tied_weights
from pqqp_lightning.network.constraints import constrained_layers
from pqqp_lightning.network.layer_uses import use_of
from pqqp_lightning.network.layers import Layer, is_packed, kind_name, named_layers, weight_place
from pqqp_lightning.network.name_patterns import matches, value_for
from pqqp_lightning.network.offload import Offload
from pqqp_lightning.seeding import random_state, set_random_state
from pqqp_lightning.stages.arguments import argument_values, arguments_of
from pqqp_lightning.stages.distillation import Distillation
from pqqp_lightning.surgery.parametrized import parametrized_tensors

Plan = dict[str, Any]
SearchSpace = Mapping[str, Sequence[Any]]
"""The values of arguments that a search tries."""
BatchNormStep = Literal["recalibrate", "keep"]

FORWARD_NOT_CALLED = "needs a forward that is called, but the model passes their weights to a function"
NOT_USED = "needs layers that a forward pass in evaluation mode uses (tried on one sample)"


@dataclass
class Context:
    """What the engine gives to a stage's ``compress``.

    Attributes:
        walk: creates the walk over the calibration data for this stage.
        title: the text of progress bars.
        progress: whether to show progress bars.
        notes: notes for the stage's record; the stage appends to it.
        findings: what was found, with the names of the layers.
        undone: whether the stage broke a constraint of an earlier stage; a note says which.
        finished: the blocks that a killed run finished, and those of this run.
        dense: the weight matrix [O, I] that a layer had in the dense model, on the layer's device; None where an
            earlier stage changed what the layer computes. Only for a stage that ``needs_dense``.
        offload: where the model's weights lie: a stage that works on them outside of a walk takes turns.
    """

    walk: Callable[[Blocks], Walk]
    title: str = ""
    progress: bool = True
    notes: list[str] = field(default_factory=list)
    findings: dict[str, list[str]] = field(default_factory=dict)
    undone: bool = False
    dense: Callable[[Layer], Tensor | None] = lambda layer: None
    offload: Offload = field(default_factory=Offload)
    finished: FinishedBlocks = field(default_factory=FinishedBlocks)
    _notes_of_walk: list[str] = field(default_factory=list, init=False)

    def part(self, stage: Stage) -> Part:
        """The next part of the work of ``stage`` that a resumed run does not do again, see :class:`FinishedBlocks`.

        With each block the random state and what was noted are kept, and those attributes of ``stage`` that are not
        arguments. If they are not plain data and tensors, nothing is kept.
        """
        arguments = arguments_of(type(stage))

        def state() -> dict[str, Any]:
            attributes = {}
            for name, value in vars(stage).items():
                if name not in arguments and not isroutine(value):  # Lightning puts methods there
                    attributes[name] = value
            return {
                "notes": [*self.notes],
                "findings": self.findings,
                "notes_of_walk": [*self._notes_of_walk],
                "attributes": attributes,
                "random": random_state(),
            }

        def set_state(kept: dict[str, Any]) -> None:
            self.notes[:] = kept["notes"]
            self.findings = kept["findings"]
            self._notes_of_walk[:] = kept["notes_of_walk"]
            vars(stage).update(kept["attributes"])
            set_random_state(kept["random"])

        return self.finished.part(state, set_state)

    def once(self, stage: Stage, compute: Callable[[], Any]) -> Any:
        """The result of ``compute``, plain data, which a resumed run does not compute again."""
        part = self.part(stage)
        if not part.restore_all({}):
            part.finish(compute())
        return part.value

    def found(self, what: str, layers: Iterable[str]) -> None:
        """Note that ``what`` was found in ``layers``; the record has their number and the first names."""
        self.findings.setdefault(what, []).extend(layers)

    def all_notes(self) -> list[str]:
        """All notes, with one for each kind of finding."""
        return [*self.notes, *(f"{shorten(layers)}: {what}" for what, layers in self.findings.items())]

    def calibrate(
        self,
        blocks: Blocks,
        layers: dict[str, Layer],
        kind: type[Statistic],
        compress: Compress,
        unreached: Unreached | None = None,
        kept: Part | None = None,
    ) -> None:
        """Walk over ``blocks``: collect ``kind`` for ``layers`` and call ``compress`` with each reading.

        ``unreached`` gets the layers that no calibration row reached; without it they end the run. ``kept`` is for a
        stage whose ``compress`` changes nothing but the layers of the reading.
        """
        walk = self.walk(blocks)
        self._notes_of_walk = walk.notes
        try:
            walk.over(layers, kind, compress, unreached, kept)
        except RecipeError as error:
            raise RecipeError([problem.within(f"stages.{self.title}") for problem in error.problems]) from error
        self.notes.extend(walk.notes)
        self._notes_of_walk = []

    def each(self, layers: dict[str, Layer]) -> Iterator[tuple[str, Layer]]:
        """The layers one by one, each in a turn of its weights, with a progress bar."""
        for name, layer in tqdm(
            layers.items(), desc=self.title, unit="layer", disable=not self.progress, leave=False, total=len(layers)
        ):
            holder, _ = weight_place(layer)
            with self.offload.turn(holder):
                yield name, layer


class Stage(Callback):
    """A compression stage. This base class does not compress; it finetunes for ``epochs``.

    A method overrides :meth:`compress`, extends :meth:`check`, and names its ``source``. Ordinary callback hooks run
    during its finetuning. A method that compresses one layer at a time extends
    :class:`~pqqp_lightning.stages.LayerwiseStage` instead.

    Class attributes describe a stage: ``promises`` (the constraints that its weights satisfy, "mask" or "grid"),
    ``needs_calibration``, ``needs_dense`` (the dense model's weights, to repair what earlier stages did to them),
    ``compresses``, ``needs_forward`` (it changes what its layers' modules compute, so that a weight that is passed to a
    function instead cannot take part), ``needs_chain`` (blocks that feed one another directly; the run marks those that
    do not), ``keeps_function`` (the model's outputs do not change),
    ``changes_before_training`` (``compress`` changes the outputs, not only the training after it), and
    ``comparable_layers`` (a layer has the same inputs and outputs as in the dense model, so that its outputs can be
    compared). ``search_space`` has the values of arguments that ``search`` tries if its user names none.

    Args:
        targets: name patterns of the layers to act on, "depthwise" for depthwise convolutions; every layer inside the
            blocks by default.
        ignore: name patterns of layers to skip, "depthwise" for depthwise convolutions.
        epochs: epochs of finetuning after this stage, before the next one.
        learning_rate: the highest learning rate of that finetuning; the model's own by default.
        blocks: module names of the blocks to calibrate one by one; found by structure by default.
        allow_undo: run even if an earlier stage's constraint is lost; the record says what was lost.
        distill: distill the dense model during finetuning: {weight: 0.5, temperature: 2.0}.
        batch_norm: "recalibrate" estimates the running statistics of BatchNorm layers again after the compression, on
            the calibration samples and without labels; "keep" leaves those of the dense model.
    """

    source: ClassVar[str] = ""
    promises: ClassVar[tuple[str, ...]] = ()
    needs_calibration: ClassVar[bool] = False
    needs_dense: ClassVar[bool] = False
    compresses: ClassVar[bool] = False
    needs_forward: ClassVar[bool] = False
    needs_chain: ClassVar[bool] = False
    keeps_function: ClassVar[bool] = False
    changes_before_training: ClassVar[bool] = True
    comparable_layers: ClassVar[bool] = True
    search_space: ClassVar[SearchSpace] = {}

    def __init__(
        self,
        targets: list[str] | None = None,
        ignore: list[str] | None = None,
        epochs: int = 0,
        learning_rate: float | None = None,
        blocks: list[str] | None = None,
        allow_undo: bool = False,
        distill: Distillation | None = None,
        batch_norm: BatchNormStep = "recalibrate",
    ) -> None:
        self.targets, self.ignore = targets, ignore
        self.epochs, self.learning_rate = epochs, learning_rate
        self.blocks, self.allow_undo, self.distill = blocks, allow_undo, distill
        self.batch_norm = batch_norm
        self.name = type(self).__name__.lower()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a ``restructure`` that needs an instance: a checkpoint is loaded without one.

        Raises:
            TypeError: ``restructure`` is not a static method.
        """
        super().__init_subclass__(**kwargs)
        if "restructure" in vars(cls) and not isinstance(vars(cls)["restructure"], staticmethod):
            raise TypeError(
                f"{cls.__name__}.restructure expects an instance, and a checkpoint is loaded without one. Write "
                "@staticmethod, then def restructure(model, plan), and read every number from the plan."
            )

    @property
    def state_key(self) -> str:
        """Lightning's key for this callback's state, unique among stages of one class."""
        return f"{type(self).__qualname__}:{self.name}"

    def arguments(self) -> dict[str, Any]:
        """The arguments that are attributes of the same name, as plain data for records."""
        return argument_values(self)

    @property
    def whole_model_arguments(self) -> dict[str, Any]:
        """The arguments whose values need the whole model in memory at once, each with a value that does not."""
        return {"epochs": 0} if self.epochs > 0 else {}

    @property
    def recalibrates_batch_norm(self) -> bool:
        """Whether BatchNorm statistics are estimated again after :meth:`compress`."""
        changes = self.compresses and self.changes_before_training and not self.keeps_function
        return changes and self.batch_norm == "recalibrate"

    def find_blocks(self, model: nn.Module) -> Blocks:
        """The blocks of ``model``: this stage's own, the model's ``compression_blocks``, or found by structure."""
        return find_blocks(model, self.blocks) if self.blocks else model_blocks(model)

    def find_layers(self, model: nn.Module) -> dict[str, Layer]:
        """The layers of ``model`` that this stage acts on."""
        return {name: layer for name, layer in self._chosen_layers(model).items() if not self._why_left(layer)}

    def reason_to_leave(self, layer: Layer) -> str:
        """Why this stage cannot act on a layer of this kind, after "it"; empty if it can.

        A stage leaves such layers as they are, and the record says so. This base class acts on Linear and Conv2d.
        """
        return "" if isinstance(layer, nn.Linear | nn.Conv2d) else "acts on Linear and Conv2d layers"

    def reason_by_use(self, layer: Layer) -> str:
        """As :meth:`reason_to_leave`, given how the forward pass uses the layer."""
        use = use_of(layer)
        if use == "functional" and self.needs_forward:
            return FORWARD_NOT_CALLED
        return NOT_USED if use == "unused" and self.needs_calibration else ""

    def _why_left(self, layer: Layer) -> str:
        return self.reason_to_leave(layer) or self.reason_by_use(layer)

    def left_layers(self, model: nn.Module) -> dict[str, list[str]]:
        """The layers that ``targets`` and ``ignore`` choose and that this stage leaves, by kind and reason."""
        left: dict[str, list[str]] = {}
        for name, layer in self._chosen_layers(model).items():
            if reason := self._why_left(layer):
                what = f"{kind_name(layer)}, left as they are: {type(self).__name__} {reason}"
                left.setdefault(what, []).append(name)
        return left

    def _chosen_layers(self, model: nn.Module) -> dict[str, Layer]:
        """The layers of every kind that ``targets`` and ``ignore`` choose."""
        if not self.compresses:
            return {}
        return find_layers(model, self.targets, self.ignore, self.find_blocks(model))

    def check(self, model: LightningModule, data: Any, earlier: Sequence[Stage]) -> list[Problem]:
        """Every problem of this stage that can be found before any work; each key is an argument of the stage.

        Args:
            model: the model with the structure, but not the weights, that it will have when the stage runs.
            data: the datamodule, or None.
            earlier: the stages before this one.
        """
        return self.check_arguments() + (self._check_targets(model) if self.compresses else [])

    def check_arguments(self) -> list[Problem]:
        """The problems of the arguments for any model. :meth:`check` includes them."""
        problems = []
        if self.epochs < 0:
            problems.append(Problem("epochs", self.epochs, "is negative", "Use 0 for no finetuning."))
        if self.learning_rate is not None and not self.learning_rate > 0:
            way_out = "Leave it out for the model's own."
            problems.append(Problem("learning_rate", self.learning_rate, "is not above 0", way_out))
        elif self.learning_rate is not None and not self.epochs:
            way_out = "Set epochs, or drop it."
            problems.append(Problem("learning_rate", self.learning_rate, "has no effect with epochs=0", way_out))
        if self.distill is not None:
            problems += [replace(problem, key=f"distill.{problem.key}") for problem in self.distill.check()]
            if not self.epochs:
                text = "has no effect with epochs=0"
                problems.append(Problem("distill", text=text, way_out="Set epochs, or drop it."))
        if self.batch_norm not in get_args(BatchNormStep):  # Python does not enforce the signature
            problems.append(Problem("batch_norm", self.batch_norm, "is not one of recalibrate, keep"))
        return problems

    def refuse_after(
        self, model: nn.Module, earlier: Sequence[Stage], promises: Sequence[str], reason: str, way_out: str
    ) -> list[Problem]:
        """One problem for each earlier stage whose ``promises`` hold on a layer that this stage acts on.

        And one for each kind of promise that the model itself brought along.

        Args:
            model: as in :meth:`check`.
            earlier: the stages before this one.
            promises: of "mask" and "grid".
            reason: how they would be lost ("would turn its zeros into other numbers").
            way_out: what to do instead, a sentence.
        """
        if self.allow_undo:
            return []
        problems = []
        for stage, both in self.overlaps(model, earlier, promises):
            what = " and ".join(p for p in stage.promises if p in promises)
            text = f"{reason}: {shorten(both)} carry the {what} of stage '{stage.name}'"
            problems.append(Problem(text=text, way_out=way_out))
        # A loaded model, or one with masks of torch.nn.utils.prune, has constraints before the first stage.
        own = set(self.find_layers(model))
        for promise in promises:
            held = [name for name, _, constraints in constrained_layers(model) if constraints.has(promise)]
            if both := sorted(own & set(held)):
                text = f"{reason}: {shorten(both)} carry a {promise} that the model had before the run"
                problems.append(Problem(text=text, way_out="Set allow_undo: true, or add them to ignore."))
        return problems

    def overlaps(
        self, model: nn.Module, earlier: Sequence[Stage], promises: Sequence[str]
    ) -> list[tuple[Stage, list[str]]]:
        """Each earlier stage whose ``promises`` hold on layers that this stage acts on, with the layers' names."""
        own = set(self.find_layers(model))
        candidates = [stage for stage in earlier if set(stage.promises) & set(promises)]
        found = [(stage, sorted(own & set(stage.find_layers(model)))) for stage in candidates]
        return [(stage, both) for stage, both in found if both]

    def check_patterns(self, argument: str, layers: Iterable[str]) -> list[Problem]:
        """Problems of an argument that maps name patterns to values: layers and patterns without a match."""
        value = getattr(self, argument)
        if not isinstance(value, dict):
            return []
        problems = []
        if missing := [name for name in layers if value_for(name, value) is None]:
            way_out = "Add a '*' entry, or add them to ignore."
            problems.append(Problem(argument, text=f"has no pattern for {shorten(missing)}", way_out=way_out))
        for pattern in value:
            if not any(matches(name, pattern) for name in layers):
                problems.append(self.unmatched(argument, pattern))
        return problems

    def unmatched(self, argument: str, pattern: str) -> Problem:
        """The problem of a ``pattern`` in ``argument`` that matches none of the stage's layers."""
        text = f"matches none of the layers that the stage acts on (targets={self.targets}, ignore={self.ignore})"
        return Problem(argument, pattern, text, "Take it out, or change targets or ignore.")

    def compress(self, model: LightningModule, context: Context) -> Plan:
        """Compress ``model`` in place and return the plan that rebuilds its structure without data."""
        return {}

    def expected_plan(self, model: LightningModule) -> Plan:
        """The plan that :meth:`compress` will return, up to values, from the structure of ``model`` alone.

        Later stages are checked on a copy of the model with this plan's structure.
        """
        return {}

    def expected_weights(self, model: LightningModule, weights: ExpectedWeights) -> ExpectedWeights:
        """What will be stored of the layers' weights after this stage, from shapes and arguments alone.

        ``search`` counts the size of a model with it before anything runs. A stage that only changes the structure
        needs nothing here: its ``expected_plan`` says it.

        Args:
            model: as in :meth:`check`, before this stage.
            weights: what is stored before this stage.
        """
        return weights

    @staticmethod
    def restructure(model: LightningModule, plan: Plan) -> None:
        """Rebuild shapes, modules and ``requires_grad`` from the plan alone; values do not matter.

        A checkpoint has the plan but not the stage, so that its arguments are not available. By default the structure
        does not change. New modules have the device and dtype of the modules that they replace.
        """

    def finish(self, model: LightningModule, context: Context, plan: Plan) -> Plan:
        """Finish the stage in place after its finetuning, and return the plan of the finished model."""
        return plan

    def moves(self, model: LightningModule) -> list[str]:
        """Names of the layers whose weights this stage's finetuning changes."""
        return [name for name, layer in named_layers(model) if layer.weight.requires_grad]

    def refuse_parametrized(self, model: nn.Module, layers: Iterable[str]) -> list[Problem]:
        """One problem for each kind of computed weight among ``layers``: what a stage writes there would be lost."""
        computed = parametrized_tensors(model)
        of_kind: dict[str, list[str]] = {}
        for name in dict.fromkeys(layers):
            if kind := computed.get(f"{name}.weight") or computed.get(name):
                of_kind.setdefault(kind, []).append(name)
        way_out = "Set trainer.fold_parametrizations: true, which makes plain weights of them, or add them to ignore."
        problems = []
        for kind, names in of_kind.items():
            text = f"{shorten(names)} compute their weights in every forward pass ({kind}): a stage cannot change them"
            problems.append(Problem(text=text, way_out=way_out))
        return problems

    def _check_targets(self, model: LightningModule) -> list[Problem]:
        candidates = dict(named_layers(model))
        chosen = {"targets": self.targets or [], "ignore": self.ignore or []}
        problems = [
            Problem(argument, patterns, "is not a list", f"Write {argument}=[{patterns!r}].")
            for argument, patterns in chosen.items()
            if isinstance(patterns, str)  # its letters would be taken for patterns
        ]
        if problems:
            return problems
        for argument, patterns in chosen.items():
            for pattern in patterns:
                if not any(is_selected(name, layer, [pattern]) for name, layer in candidates.items()):
                    tails = {part for name in candidates for part in (name.rsplit(".", 1)[-1], name)}
                    hint = near_miss(pattern, tails) or f" The model has {shorten(candidates)}."
                    problems.append(Problem(argument, pattern, "matches no layer that stages compress", hint.strip()))
        problems += self._check_target_kinds(candidates)
        # compressing a tied weight would change the other module as well
        tied = tied_weights(model)
        layers = self.find_layers(model)
        if shared := [n for n, layer in layers.items() if id(layer.weight) in tied]:
            verb = "share their weights" if len(shared) > 1 else "shares its weight"
            text = f"{shorten(shared)} {verb} with another module (a tied embedding)"
            problems.append(Problem(text=text, way_out=f"Add {'them' if len(shared) > 1 else 'it'} to ignore."))
        problems += self.refuse_parametrized(model, layers)
        if packed := [n for n, layer in layers.items() if is_packed(layer)]:
            kinds = " and ".join(sorted({type(layers[n]).__name__ for n in packed}))
            way_out = "Load the model unquantized and quantize it with a stage (NF4, FP4, INT8), or add them to ignore."
            text = f"{shorten(packed)} hold packed codes instead of weights ({kinds})"
            problems.append(Problem(text=text, way_out=way_out))
        if not layers and not problems:
            left = self.left_layers(model)
            problems.append(self._only_left(left) if left else self._no_layer(candidates))
        return problems

    def _check_target_kinds(self, candidates: dict[str, Layer]) -> list[Problem]:
        """The problems of ``targets`` that select only layers on which this stage cannot act."""
        problems = []
        for pattern in self.targets or []:
            selected = {name: layer for name, layer in candidates.items() if matches(name, pattern)}
            reasons = {self._why_left(layer) for layer in selected.values()}
            if selected and "" not in reasons:
                kinds = " and ".join(sorted({kind_name(layer) for layer in selected.values()}))
                text = f"selects only {kinds} ({shorten(selected)}), and the stage {' and '.join(sorted(reasons))}"
                way_out = "Take it out, or use another stage for them (Magnitude and RTN act on every kind)."
                problems.append(Problem("targets", pattern, text, way_out))
        return problems

    def _only_left(self, left: dict[str, list[str]]) -> Problem:
        """The problem of a choice that has only layers on which this stage cannot act, see :meth:`left_layers`."""
        described = "; ".join(f"{shorten(names)}: {reason}" for reason, names in left.items())
        text = f"leaves no layer that the stage can act on ({described})"
        way_out = "Set targets to other layers, or use another stage for them (Magnitude and RTN act on every kind)."
        return Problem("targets", self.targets, text, way_out)

    def _no_layer(self, candidates: Iterable[str]) -> Problem:
        """The problem of ``targets`` and ``ignore`` that select none of ``candidates``, the model's layers."""
        way_out = f"The model has {shorten(candidates)}."
        if self.targets is None:
            return Problem("ignore", self.ignore, "leaves no layer", way_out)
        return Problem("targets", self.targets, f"and ignore={self.ignore} leave no layer", way_out)
