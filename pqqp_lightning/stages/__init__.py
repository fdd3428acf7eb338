"""The contract that a method extends, its helpers, and how stages are discovered.

A method file imports what it needs from here and from :mod:`pqqp_lightning.algorithms`.
"""

from pqqp_lightning.algorithms.selection import Pattern
from pqqp_lightning.calibration.collect import Reading
from pqqp_lightning.calibration.statistics import Hessian, SquaredNorm, Statistic
from pqqp_lightning.checkpoint.expected import DenseScales, ExpectedGrid, ExpectedWeight, ExpectedWeights
from pqqp_lightning.errors import Problem
from pqqp_lightning.network.constraints import constraints_of
from pqqp_lightning.network.layers import Layer, weight_matrix
from pqqp_lightning.stages.correction import correct_outputs
from pqqp_lightning.stages.dense_target import check_aims_at_dense
from pqqp_lightning.stages.distillation import Distillation
from pqqp_lightning.stages.hessian import check_hessian_arguments, factorize
from pqqp_lightning.stages.layerwise import Compressed, Found, LayerInputs, LayerwiseStage, equal_runs, write_back
from pqqp_lightning.stages.one_shot_pruning import OneShotPruning
from pqqp_lightning.stages.pruning import PatternArgument, PruningStage, parse_pattern
from pqqp_lightning.stages.quantization import BlockSize, CodebookStage, GridStage, GroupSize, QuantizationStage
from pqqp_lightning.stages.repair import DenseAimedStage, RepairInputs, RepairStage, check_inputs
from pqqp_lightning.stages.sensitivity import Sensitivity, measure_costs
from pqqp_lightning.stages.stage import Context, Plan, SearchSpace, Stage

__all__ = [
    "BlockSize",
    "CodebookStage",
    "Compressed",
    "Context",
    "DenseAimedStage",
    "DenseScales",
    "Distillation",
    "ExpectedGrid",
    "ExpectedWeight",
    "ExpectedWeights",
    "Found",
    "GridStage",
    "GroupSize",
    "Hessian",
    "Layer",
    "LayerInputs",
    "LayerwiseStage",
    "OneShotPruning",
    "Pattern",
    "PatternArgument",
    "Plan",
    "Problem",
    "PruningStage",
    "QuantizationStage",
    "Reading",
    "RepairInputs",
    "RepairStage",
    "SearchSpace",
    "Sensitivity",
    "SquaredNorm",
    "Stage",
    "Statistic",
    "check_aims_at_dense",
    "check_hessian_arguments",
    "check_inputs",
    "constraints_of",
    "correct_outputs",
    "equal_runs",
    "factorize",
    "measure_costs",
    "parse_pattern",
    "weight_matrix",
    "write_back",
]
