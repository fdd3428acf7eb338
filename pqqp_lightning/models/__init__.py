"""The LightningModules that recipes name; each is imported when it is first asked for.

- ``causal_lm``: Hugging Face language models; ``loading``, ``gguf`` and ``transformers_bridge`` read their weights.
- ``image_classifier``: timm and torchvision networks; ``image_networks`` builds them and reads their weights.
- ``optimizers``: what ``configure_optimizers`` returns.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pqqp_lightning.models.causal_lm import CausalLM
    from pqqp_lightning.models.image_classifier import ImageClassifier

__all__ = ["CausalLM", "ImageClassifier"]

# Each model imports its libraries (transformers, timm), which take seconds.
_HOMES = {"CausalLM": "causal_lm", "ImageClassifier": "image_classifier"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
