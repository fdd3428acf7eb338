"""Turns a long text into token ids piece by piece: in parallel, and with little memory beside the ids.

A tokenizer takes a text of many megabytes as one string on one core, and returns Python integers, which take about a
hundred bytes a character. Pieces give the same ids only if the text is cut where the tokenizer itself would cut it, so
each place is tried before it is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice

import numpy as np
from tqdm.auto import tqdm

from pqqp_lightning.models.loading import Tokenizer

PIECE = 2**16
"""Characters of a piece, at least."""
PIECES = 16
"""Pieces given to the tokenizer together, which it spreads over the cores."""
CONTEXT = 256
"""Characters on both sides of a cut that are tokenised with and without it."""
TRIES = 8
"""Places to try for one cut. A tokenizer that cannot be cut at any gets the rest of the text whole."""

_LINE_END = re.compile(r"(?<=\w)\n")
"""A line's end after a letter or digit: tokenizers keep punctuation and the line end after it together."""


def token_ids(tokenizer: Tokenizer, text: str, most: int | None = None, title: str = "tokenise") -> np.ndarray:
    """Return the token ids of ``text``, int32 [N], without special tokens: the same as of the text as a whole.

    Args:
        tokenizer: of the model.
        text: any length.
        most: stop soon after this many tokens; None for the whole text.
        title: of the progress bar, which long texts show.
    """
    parts: list[np.ndarray] = []
    count = 0
    with tqdm(total=len(text), desc=title, unit="char", unit_scale=True, leave=False, delay=2) as bar:
        for pieces in _batches(tokenizer, text):
            for ids in tokenizer(pieces, add_special_tokens=False)["input_ids"]:
                parts.append(np.asarray(ids, dtype=np.int32))
                count += len(ids)
            bar.update(sum(map(len, pieces)))
            if most is not None and count >= most:
                break
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)


def begins_with_bos(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer puts its beginning-of-sequence token in front of a text by itself."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and list(tokenizer("x")["input_ids"][:1]) == [bos]


def _batches(tokenizer: Tokenizer, text: str) -> Iterator[list[str]]:
    """The pieces of ``text`` in order, many at a time."""
    pieces: list[str] = []
    start = 0
    while start < len(text):
        stop = _cut(tokenizer, text, start + PIECE)
        pieces.append(text[start:stop])
        start = stop
        if len(pieces) == PIECES:
            yield pieces
            pieces = []
    if pieces:
        yield pieces


def _cut(tokenizer: Tokenizer, text: str, earliest: int) -> int:
    """The first place from ``earliest`` on where cutting ``text`` leaves its tokens as they are; its end if none."""
    for line_end in islice(_LINE_END.finditer(text, earliest), TRIES):
        place = line_end.start()
        before = text[max(0, place - CONTEXT) : place]
        after = text[place : place + CONTEXT]
        whole, left, right = tokenizer([before + after, before, after], add_special_tokens=False)["input_ids"]
        if list(whole) == [*left, *right]:
            return place
    return len(text)
