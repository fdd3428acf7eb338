"""Writes a finished model in the formats that other programs load, and checks the result there.

``pqqp_lightning.export(run, to=..., out=...)`` calls :func:`pqqp_lightning.export.export_run.export_run`.

- ``export_run``: one export from reading to report; ``source``: what the run folder holds; ``card``: the model card.
- ``stock``: a language model as an ordinary one of transformers; ``grids``: its codes, widened.
- ``network``: any other network, and ``samples``: inputs for it; ``onnx_graph``: as a graph with codes.
- ``target``: the contract of a format; ``options``: its own; ``targets/``: one file a format; ``discovery`` finds them.
- ``tensor_check``, ``runtime_check``: compare the written files; ``runtimes/``: the scripts that load them elsewhere.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any


class _CallableRoom(ModuleType):
    """This module, callable: ``pqqp_lightning.export`` is both the room and the function that users call."""

    def __call__(self, run: str | Path, **options: Any) -> Any:
        """Export a run; see :func:`pqqp_lightning.export.export_run.export_run`."""
        from pqqp_lightning.export.export_run import export_run

        return export_run(run, **options)


sys.modules[__name__].__class__ = _CallableRoom
