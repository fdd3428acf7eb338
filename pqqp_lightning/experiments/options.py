"""The experiments' options: the only place with their names, types, defaults and meaning.

The command line creates its parser and ``--help`` from these classes, and checks recipes with them. Python users pass
an instance to :func:`~pqqp_lightning.experiments.search_orders` and its siblings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pqqp_lightning.argument_types import refuse_wrong_types
from pqqp_lightning.calibration.layer_errors import SAMPLES
from pqqp_lightning.trials.executors import LOCAL


@dataclass(frozen=True, kw_only=True)
class ExperimentOptions:
    """The options of every experiment.

    Args:
        metric: the metric that decides; by default the model's primary metric, or its first one.
        higher_is_better: whether a higher value of the metric is better; not needed for common metrics.
        store: folder of results that experiments share; by default "store" next to the run folder.
    """

    metric: str | None = None
    higher_is_better: bool | None = None
    store: str | None = None

    def __post_init__(self) -> None:
        """Refuse values of another type, which only Python code can pass.

        Raises:
            RecipeError: with every such value.
        """
        refuse_wrong_types(type(self).__init__, vars(self))


@dataclass(frozen=True, kw_only=True)
class SearchOptions(ExperimentOptions):
    """The options of experiments with many measurements.

    Args:
        time_limit: start no new order or measurement after this many minutes.
        executor: "local" measures in this process; "ray" runs as many tasks at a time as there are processors, each
            with as many threads as torch has here (OMP_NUM_THREADS), on this machine or the cluster at RAY_ADDRESS.
    """

    time_limit: float | None = None
    executor: str = LOCAL


@dataclass(frozen=True, kw_only=True)
class OrderOptions(SearchOptions):
    """The options of ``order``.

    Args:
        strategy: "exhaustive" tries all orders; "progressive" starts with the order from the weakest stage to the
            strongest and moves one stage at a time; "predict" measures no order and predicts the best one from the
            layers' errors on calibration data.
        max_runs: measure at most this many complete orders.
        comparable_only: exclude orders that end larger than the smallest one, or that lose a constraint.
        repeats: measure the orders with this many draws of calibration samples, including the recipe's own.
    """

    strategy: str = "exhaustive"
    max_runs: int | None = None
    comparable_only: bool = False
    repeats: int = 1


@dataclass(frozen=True, kw_only=True)
class SweepOptions(SearchOptions):
    """The options of ``sweep``.

    Args:
        grid: values by stage and argument, as in --grid.prune.sparsity [0.5,0.7].
        curve: the stage that quantizes, if the grid does not determine it.
        curve_bits: further bit widths for the curve of quantization alone.
        last: names of stages that stay at the end of every order, in this sequence; the orders are those of the others.
        max_points: refuse a grid with more points.
    """

    grid: dict[str, Any] = field(default_factory=dict)
    curve: str | None = None
    curve_bits: list[int] = field(default_factory=list)
    last: list[str] = field(default_factory=list)
    max_points: int = 200


@dataclass(frozen=True, kw_only=True)
class PipelineOptions(SearchOptions):
    """The options of ``search``.

    Args:
        space: what to choose from: values by stage and argument, as in --space.prune.sparsity [0.3,0.5] or {low: 0.3,
            high: 0.7, step: 0.1}; "optional: true" beside them lets the stage be left out; "order" is any, fixed or a
            list of orders. By default each stage's own search space, in any order.
        target_rate: the dense model's counted size divided by the largest allowed one.
        target_size: the largest allowed counted size, in bytes or as in 60MB.
        target_bits: the largest allowed average of stored bits (codes, scales, masks) for each targeted weight.
        objectives: what to trade off, the deciding metric first: metrics, "size" and "latency_ms". By default the
            deciding metric under a budget, and the metric and the size without one.
        trials: measure at most this many pipelines.
        sampler: "tpe", "nsga2" or "random" of Optuna.
        sampler_seed: seed of the sampler's choices.
        at_once: pipelines that are chosen before the next one is known; 1, or 4 with --executor ray.
        stop_early: stop to evaluate a pipeline once it is clearly behind the best, after an eighth or a quarter of the
            samples; with one objective and --executor local.
        max_points: refuse a space with more pipelines.
    """

    space: dict[str, Any] = field(default_factory=dict)
    target_rate: float | None = None
    target_size: int | float | str | None = None
    target_bits: float | None = None
    objectives: list[str] | None = None
    trials: int = 40
    sampler: str = "tpe"
    sampler_seed: int = 0
    at_once: int | None = None
    stop_early: bool = True
    max_points: int = 5000


@dataclass(frozen=True, kw_only=True)
class AnalysisOptions(ExperimentOptions):
    """The options of ``analyze``.

    Args:
        samples: calibration samples on which the layers' outputs are compared.
    """

    samples: int = SAMPLES
