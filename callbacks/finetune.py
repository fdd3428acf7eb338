"""Training as a stage of its own."""

from __future__ import annotations

from pqqp_lightning.stages import Distillation, Stage


class Finetune(Stage):
    """Trains for ``epochs`` without compressing; it can be anywhere in the list, even first.

    Masks of earlier stages are kept: pruned weights stay zero under any optimizer.

    Example::

        stages:
          recover: {class_path: Finetune, init_args: {epochs: 2, learning_rate: 0.0001}}
    """

    source = "ordinary training; masks are held"

    def __init__(
        self, epochs: int = 1, learning_rate: float | None = None, distill: Distillation | None = None
    ) -> None:
        """Make the stage.

        Args:
            epochs: epochs of training.
            learning_rate: the highest learning rate; the model's own by default.
            distill: learn from the dense model: {weight: 0.5, temperature: 2.0}.
        """
        super().__init__(epochs=epochs, learning_rate=learning_rate, distill=distill)
