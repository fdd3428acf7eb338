"""The experiments: the best order, a sweep, an analysis, a prediction."""

from pqqp_lightning.experiments.analysis import analyze_pair
from pqqp_lightning.experiments.options import AnalysisOptions, OrderOptions, SweepOptions
from pqqp_lightning.experiments.order import search_orders
from pqqp_lightning.experiments.sweep import sweep_grid

__all__ = ["AnalysisOptions", "OrderOptions", "SweepOptions", "analyze_pair", "search_orders", "sweep_grid"]
