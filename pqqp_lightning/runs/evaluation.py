"""Measures the model by Lightning's validation, with what each sample adds to the metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

from lightning.pytorch import LightningModule, Trainer

from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.metrics.samples import Recorded, Samples, gather_samples, recording
from pqqp_lightning.runs.callback_state import SameWeights
from pqqp_lightning.runs.early_stop import Watch, WatchSamples, stoppable
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.seeding import keep_random_state


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found.

    Attributes:
        metrics: by the name under which the model logs them.
        samples: what each sample added to a metric, by metric; empty unless they were kept.
    """

    metrics: dict[str, float]
    samples: dict[str, Samples]


def evaluate(trainer: Trainer, data: RunData, *, keep_samples: bool = False, watch: Watch | None = None) -> Evaluated:
    """Run Lightning's validation; the random state is restored.

    Args:
        trainer: evaluates.
        data: the model and its evaluation data.
        keep_samples: record what each sample adds to the metrics.
        watch: may stop it early; needs ``keep_samples``.

    Raises:
        RecipeError: a callback exchanged the weights for the evaluation.
        StoppedEarly: ``watch`` said so.
    """
    module = data.module
    watching = recording(module) if keep_samples else nullcontext(Recorded(module, {}))
    callbacks = list(trainer.callbacks)
    weights = SameWeights(callbacks)
    trainer.callbacks = weights.callbacks
    try:
        with keep_random_state(), stoppable(module), watching as found:
            if watch is not None:
                trainer.callbacks = [*weights.callbacks, WatchSamples(found, watch)]
            results = trainer.validate(module, dataloaders=data.validation, datamodule=data.datamodule, verbose=False)
    finally:
        trainer.callbacks = callbacks
    weights.require()
    metrics: dict[str, float] = {}
    for result in results:
        metrics.update({name: float(value) for name, value in result.items()})
    samples: dict[str, Samples] = {}
    recorded = gather_samples(found)
    for name, path in _logged_metrics(trainer):
        if name in metrics and path in recorded and recorded[path].reproduces(metrics[name]):
            samples[name] = recorded[path]
    return Evaluated(metrics, samples)


def evaluate_batches(trainer: Trainer, data: RunData, batches: int) -> dict[str, float]:
    """The metrics on the first batches; with 0 it only starts the processes, and converts the model."""
    limit = trainer.limit_val_batches
    trainer.limit_val_batches = batches if limit else limit
    try:
        return evaluate(trainer, data).metrics
    finally:
        trainer.limit_val_batches = limit


def require_metrics(trainer: Trainer, module: LightningModule, metrics: dict[str, float]) -> None:
    """Refuse an evaluation that measured nothing, unless ``limit_val_batches: 0`` asks for none.

    Raises:
        RecipeError: the model logs nothing, or there is no batch.
    """
    if metrics or not trainer.limit_val_batches:
        return
    text = f"validation_step of {type(module).__name__} logs no metric, so that there is nothing to compare"
    problem = Problem(text=text, way_out='Log one: self.log("val_loss", loss).').within("model")
    if not sum(trainer.num_val_batches):
        problem = Problem(text="the evaluation data has no batch", way_out="Give more samples.").within("data")
    raise RecipeError(problem)


def _logged_metrics(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """The names under which the evaluation logged torchmetrics metrics, each with the metric's path in the model.

    This reads Lightning's own pairing, which has no public name. Equal values cannot identify a metric, since two
    metrics may have the same value.
    """
    results = trainer.validate_loop._results
    for logged in results.values():
        path = logged.meta.metric_attribute
        if path is not None:
            for name in dict.fromkeys(results._forked_name(logged, on_step=False)):
                yield name, path
