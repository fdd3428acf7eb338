"""The experiments: the best order, a sweep, the best pipeline under a budget, an analysis, a prediction."""

from pqqp_lightning.experiments.analysis import analyze_pair
from pqqp_lightning.experiments.options import AnalysisOptions, OrderOptions, PipelineOptions, SweepOptions
from pqqp_lightning.experiments.order import search_orders
from pqqp_lightning.experiments.search import search_pipelines
from pqqp_lightning.experiments.sweep import sweep_grid

__all__ = [
    "AnalysisOptions",
    "OrderOptions",
    "PipelineOptions",
    "SweepOptions",
    "analyze_pair",
    "search_orders",
    "search_pipelines",
    "sweep_grid",
]
