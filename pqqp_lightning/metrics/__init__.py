"""The torchmetrics that models are evaluated with.

- ``perplexity``: finite for damaged models, too. ``multiple_choice``: accuracy on questions.
- ``samples``: what each evaluation sample adds to a metric, and bootstrap intervals from it.
"""

from pqqp_lightning.metrics.multiple_choice import ChoiceAccuracy
from pqqp_lightning.metrics.perplexity import Perplexity

__all__ = ["ChoiceAccuracy", "Perplexity"]
