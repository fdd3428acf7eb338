"""The LightningDataModules that recipes name; each is imported when it is first asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pqqp_lightning.data.images import ImageData
    from pqqp_lightning.data.questions import Questions
    from pqqp_lightning.data.text import TextData
    from pqqp_lightning.data.tokens import TokenData

__all__ = ["ImageData", "Questions", "TextData", "TokenData"]

_HOMES = {"ImageData": "images", "Questions": "questions", "TextData": "text", "TokenData": "tokens"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
