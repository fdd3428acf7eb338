"""The content of a run folder's JSON files: one type per file, read and written as plain data.

``NotRequired`` marks what runs of older versions lack, or what only some runs have.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class SizeNumbers(TypedDict):
    """Counted size, see :func:`pqqp_lightning.checkpoint.size.size_numbers`.

    Attributes:
        size_bytes: of the whole model.
        nominal_rate: nominal C of the targeted weights.
        sparsity: the fraction of the targeted weights that are zero or gone.
        pruned: the fraction that masks or smaller shapes remove.
        bits_per_weight: stored bits for each targeted weight of the dense model.
        model_sparsity: the fraction of all parameters of the dense model that are zero or gone.
        model_bits_per_weight: stored bits of all parameters for each parameter of the dense model.
    """

    size_bytes: int
    nominal_rate: float
    sparsity: float
    pruned: float
    bits_per_weight: float
    model_sparsity: NotRequired[float]
    model_bits_per_weight: NotRequired[float]


class CoverageNumbers(TypedDict):
    """What a stage covers of the model at its turn, see :class:`pqqp_lightning.network.coverage.Coverage`."""

    parameters: int
    covered: int
    left: dict[str, int]


class Record(SizeNumbers):
    """One finished stage, a line of ``records.jsonl``; see :func:`pqqp_lightning.storage.records.make_record`.

    Attributes:
        metrics: None for a metric that is not finite.
        compression_rate: bytes of the dense model / bytes of this one.
        undone: missing in runs of older versions.
        metrics_before_finetuning: only of a stage that trains.
        logged_steps: logger step at the stage's end.
        coverage: missing for the dense model, for a stage that only trains, and in runs of older versions.
    """

    name: str
    method: str
    options: dict[str, Any]
    metrics: dict[str, float | None]
    compression_rate: float
    elapsed_s: float
    peak_memory_bytes: int
    constraints_verified: bool
    notes: list[str]
    undone: NotRequired[bool]
    metrics_before_finetuning: NotRequired[dict[str, float | None]]
    logged_steps: NotRequired[int]
    coverage: NotRequired[CoverageNumbers]


class LayerNumbers(TypedDict):
    """One targeted layer of the finished model: its shape (O, I), bits, entries that are zero or pruned, and bytes."""

    name: str
    shape: list[int]
    bits: int
    zeros: int
    pruned: int
    size_bytes: int
    adapter: NotRequired[bool]


class CheckpointFiles(TypedDict):
    """The finished model: its folder in the run folder, and the bytes of its files."""

    path: str
    file_bytes: int


class Origin(TypedDict):
    """A run's status ("running", "failed", "stopped" or "finished"), and what its numbers depend on."""

    status: str
    seed: NotRequired[int | None]
    recipe: NotRequired[Any]
    versions: NotRequired[dict[str, str]]
    hardware: NotRequired[dict[str, Any]]


class FitReport(Origin):
    """``report.json``: the records of all stages, and at the end the layers and the checkpoint."""

    stages: list[Record]
    layers: NotRequired[list[LayerNumbers]]
    checkpoint: NotRequired[CheckpointFiles | None]


class DifferenceReport(TypedDict):
    """A difference of scores and its paired bootstrap interval; None for what is unknown."""

    value: float | None
    low: float | None
    high: float | None


class Lead(DifferenceReport):
    """How far the best order is ahead of the second."""

    over: list[str]


class RepeatedOrder(TypedDict):
    """An order's metric with every draw of calibration samples."""

    order: list[str]
    values: list[float | None]


class RepeatsReport(TypedDict):
    """The orders measured with other calibration samples, and how often the best one stays best."""

    seeds: list[int]
    orders: list[RepeatedOrder]
    verdict: str


class Refused(TypedDict):
    """An order that cannot run, and why."""

    order: list[str]
    problems: list[str]


class OrderEntry(TypedDict):
    """One measured order of ``order.json``.

    Attributes:
        stages: the records, dense first.
        metrics: after the last stage, like ``size_bytes``.
        interval: of the deciding metric alone.
        behind: the difference from the best order.
        marks: why it cannot be compared with the others.
    """

    order: list[str]
    stages: list[Record]
    metrics: dict[str, float | None]
    size_bytes: int
    interval: NotRequired[list[float] | None]
    behind: NotRequired[DifferenceReport | None]
    marks: NotRequired[list[str]]


class MarkedOrder(TypedDict):
    """An order, and why it cannot be compared."""

    order: list[str]
    marks: list[str]


class HypothesisReport(TypedDict):
    """The measured order nearest to (or ``exactly``) weakest first, and the stages that are ``equal`` in strength."""

    order: list[str]
    exactly: NotRequired[bool]
    equal: NotRequired[list[str]]
    behind: DifferenceReport


class OrderReport(Origin):
    """``order.json``: every order that was measured, best first."""

    metric: str
    higher_is_better: bool
    verdict: str
    orders: list[OrderEntry]
    best: list[str]
    advantage: dict[str, DifferenceReport]
    refused: list[Refused]
    strategy: NotRequired[str]
    applications: NotRequired[int]
    lead: NotRequired[Lead | None]
    intensity: NotRequired[dict[str, float | None]]
    hypothesis: NotRequired[HypothesisReport | None]
    left_out: NotRequired[list[MarkedOrder]]
    repeats: NotRequired[RepeatsReport | None]
    notes: NotRequired[list[str]]


class CurvePoint(TypedDict):
    """Quantization alone with some arguments: its nominal C, score M and metrics."""

    knobs: dict[str, Any]
    rate: float
    score: float
    metrics: dict[str, float | None]


class CurveReport(TypedDict):
    """Quantization alone over C, for one choice of its other arguments."""

    label: str
    points: list[CurvePoint]
    falls_steadily: bool


class PairReport(TypedDict):
    """A, G, C_P, C_Q, C*_P and C*_P - C_Q of a point; None if not measured or not finite."""

    advantage: DifferenceReport | None
    score_pruned: float | None
    score_quantized: float | None
    gap: float | None
    rate_pruned: float | None
    rate_quantized: float | None
    equivalent_ratio: float | None
    beyond: str
    limit: float | None
    ratio_difference: float | None


class PointOrder(TypedDict):
    """A measured order of a point, with the record of its last stage."""

    order: list[str]
    record: Record
    marks: list[str]


class PointReport(TypedDict):
    """One point of a sweep: arguments and steps by stage, orders with the best first, and those that cannot run."""

    knobs: dict[str, dict[str, Any]]
    steps: dict[str, str]
    orders: list[PointOrder]
    refused: list[Refused]
    pair: NotRequired[PairReport]


class MonotoneFit(TypedDict):
    """The nondecreasing function nearest to A, at each x, and the share of A's variance that it explains."""

    x: list[float]
    y: list[float]
    explained: float | None


class Correlation(TypedDict):
    """Correlation of A with a quantity: Spearman's rank correlation and the monotone fit."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    chance: float | None
    points: int
    fit: MonotoneFit | None


class PairHypothesis(TypedDict):
    """The hypothesis on the pairs of all points; ``verdict`` holds sentences."""

    advantage: str
    verdict: list[str]
    gap: Correlation
    ratio_difference: Correlation


class AloneReport(TypedDict):
    """A stage that was measured alone, and its intensity."""

    step: str
    stage: str
    knobs: dict[str, Any]
    intensity: float | None
    record: Record


class SweepReport(Origin):
    """``sweep.json``: every point; for a pruning and a quantizing stage also the curve and the hypothesis."""

    metric: str
    higher_is_better: bool
    stages: list[str]
    alone: list[AloneReport]
    points: list[PointReport]
    notes: list[str]
    grid: NotRequired[dict[str, Any]]
    applications: NotRequired[int]
    dense: NotRequired[Record]
    last: NotRequired[list[str]]
    pruning: NotRequired[str]
    quantizing: NotRequired[str]
    curves: NotRequired[list[CurveReport]]
    hypothesis: NotRequired[PairHypothesis]
    figures: NotRequired[list[str]]


class BudgetReport(TypedDict):
    """A search's budget: the option and its value, and the largest counted size or average of bits."""

    name: str
    value: float | int | str | None
    size_bytes: float | None
    bits: float | None


class PipelineEntry(TypedDict):
    """A pipeline that a search chose: its stages in order with the arguments that the space sets.

    ``expected_bytes`` was known before it ran. ``record`` is that of its last stage; None if it was stopped after the
    part of the evaluation that ``behind`` is from. ``applications`` is how many stage applications all pipelines up to
    this one need.
    """

    number: int
    order: list[str]
    steps: list[str]
    arguments: dict[str, dict[str, Any]]
    expected_bytes: int
    exact: bool
    fits: bool
    record: Record | None
    values: dict[str, float | None]
    interval: list[float] | None
    behind: DifferenceReport | None
    stopped: str
    applications: int


class SearchReport(Origin):
    """``search.json``: the pipelines that were measured, the front, and the answer.

    ``front`` and ``best`` are numbers of pipelines; the front is sorted by size.
    """

    metric: str
    higher_is_better: bool
    objectives: list[str]
    sampler: str
    budget: BudgetReport
    space: dict[str, Any]
    fitting: int
    over: int
    refused: int
    smallest: dict[str, Any]
    dense: Record
    trials: list[PipelineEntry]
    front: list[int]
    best: int | None
    verdict: str
    importance: dict[str, float]
    applications: int
    notes: list[str]
    figures: NotRequired[list[str]]


class LayerErrors(TypedDict):
    """A layer's relative squared output error after each stage and each order."""

    name: str
    errors: dict[str, float]


class AdditivityReport(TypedDict):
    """How far the blocks' errors add up, see calibration.layer_errors."""

    ratio: float
    cosine: float
    parts: int


class AnalysisReport(Origin):
    """``analysis.json``: two stages compared by layer; keys name sequences of stages: ``"prune->quantize"``."""

    metric: str
    higher_is_better: bool
    stages: list[str]
    orders: list[list[str]]
    samples: int
    records: dict[str, Record]
    advantage: DifferenceReport | None
    best: list[str]
    layers: list[LayerErrors]
    gone: dict[str, list[str]]
    selectivity: dict[str, tuple[int, int]]
    additivity: AdditivityReport | None
    figures: NotRequired[list[str]]


class MeasuredBefore(TypedDict):
    """The result of an earlier search with the same stages."""

    verdict: str
    best: list[str]
    metric: str
    behind: dict[str, DifferenceReport]


class PredictionReport(Origin):
    """``prediction.json``: the order predicted from calibration, and each stage's intensity."""

    strategy: str
    predicted: list[str]
    exactly: bool
    intensity: dict[str, float | None]
    samples: int
    layers: int
    gone: NotRequired[dict[str, int]]
    refused: list[Refused]
    measured: MeasuredBefore | None
