"""What is measured after every stage."""

from pqqp_lightning.metrics.multiple_choice import ChoiceAccuracy
from pqqp_lightning.metrics.perplexity import Perplexity

__all__ = ["ChoiceAccuracy", "Perplexity"]
