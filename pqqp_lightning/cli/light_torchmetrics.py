"""Imports torchmetrics in two steps, so that the command line refuses a bad recipe without loading every metric.

Lightning needs only ``torchmetrics.Metric`` and ``MetricCollection``. The package imports all its metrics, and with
them transformers, torchvision and scipy, which doubles the time until a bad recipe is refused
(https://github.com/Lightning-AI/torchmetrics/issues/2242). Here the package first has these two classes only. Access to
any other name imports the rest. Only the command line does this; in a user's own program torchmetrics is imported as
usual.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

PACKAGE = "torchmetrics"
LIGHT = {"Metric": "metric", "MetricCollection": "collections"}
"""The classes that Lightning imports from the package, and their modules."""


def import_torchmetrics_lightly() -> None:
    """Make the next import of torchmetrics light. No effect if it is already imported."""
    if PACKAGE not in sys.modules:
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != PACKAGE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _LightLoader(spec.loader)
        return spec


class _LightLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        vars(module)["_logger"] = logging.getLogger(PACKAGE)  # its modules import it from the package
        try:
            import_module(f"{PACKAGE}.utilities")  # first, because its modules import each other in a cycle
            for name, home in LIGHT.items():
                vars(module)[name] = getattr(import_module(f"{PACKAGE}.{home}"), name)
        except (ImportError, AttributeError):
            # In another version of torchmetrics the two classes may need more of the package: import it as usual.
            for name in [name for name in sys.modules if name.startswith(f"{PACKAGE}.")]:
                del sys.modules[name]
            self._loader.exec_module(module)
            return

        def load_the_rest(name: str) -> Any:
            if name.startswith("__"):  # Python asks modules for __path__ and others
                raise AttributeError(f"module {PACKAGE!r} has no attribute {name!r}")
            vars(module).pop("__getattr__", None)
            self._loader.exec_module(module)
            return getattr(module, name)

        vars(module)["__getattr__"] = load_the_rest
