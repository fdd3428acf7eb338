"""The LightningDataModules that recipes name; each is imported when it is first asked for.

- ``text``, ``tokens``, ``images``: the datamodules. ``questions``: multiple-choice questions beside a text.
- ``tokenizing``: token ids of a long text.
- ``text_sources``, ``image_sources``, ``hub_tables``: read the raw data from a file, a folder or the hub.
- ``augmentation``: image transforms by name.
- ``loaders``, ``samplers``: DataLoaders whose order depends on the seed and the epoch only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pqqp_lightning.data.images import ImageData
    from pqqp_lightning.data.questions import Questions
    from pqqp_lightning.data.text import TextData
    from pqqp_lightning.data.tokens import TokenData

__all__ = ["ImageData", "Questions", "TextData", "TokenData"]

# A datamodule imports its libraries (datasets, torchvision): a text recipe must not wait for those of images.
_HOMES = {"ImageData": "images", "Questions": "questions", "TextData": "text", "TokenData": "tokens"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
