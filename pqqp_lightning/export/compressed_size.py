"""How large written files become in a general compressor: only there do zeros without a pattern save room."""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from pqqp_lightning.report.formatting import human_bytes

PIECE = 2**22
"""Bytes that are compressed at a time."""
PIECES = 32
"""The most pieces that are compressed: 128 MiB take about a second with zstd. Larger files are sampled evenly."""


def compressed_remark(folder: Path) -> str:
    """One sentence: the size of the files in ``folder``, and what a compressor makes of it."""
    name, compress = _compressor()
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    step = max(1, -(-size // (PIECE * PIECES)))
    read = compressed = 0
    for number, piece in enumerate(_pieces(files)):
        if number % step == 0:
            read += len(piece)
            compressed += len(compress(piece))
    about = "about " if step > 1 else ""
    return f"The files are {human_bytes(size)}, with {name} {about}{human_bytes(round(size * compressed / read))}."


def _compressor() -> tuple[str, Callable[[bytes], bytes]]:
    """Its name and function: zstd where the package zstandard is installed, else zlib of the standard library."""
    if importlib.util.find_spec("zstandard") is None:
        return "zlib", lambda piece: zlib.compress(piece, 1)
    import zstandard

    return "zstd", zstandard.ZstdCompressor().compress


def _pieces(files: list[Path]) -> Iterator[bytes]:
    """The bytes of all files, up to :data:`PIECE` at a time."""
    for file in files:
        with file.open("rb") as opened:
            while piece := opened.read(PIECE):
                yield piece
