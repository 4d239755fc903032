"""How much of a continuation is one unit said over and over.

A model that was made to memorise a text often repeats it when it is forced into it. Of tokens s = s_1 ... s_L, with a
unit that starts at the first token and has u of them, k times in s (anywhere, without overlaps):

    repetition(s) = max_{3 <= u <= 20, k >= 3} k u / L          0 where nothing occurs three times
"""

from __future__ import annotations

import unicodedata
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Repetition", "compression_ratio", "is_natural", "repetition"]

SHORTEST, LONGEST, OFTEN = 3, 20, 3


class Repetition(NamedTuple):
    """Share of the tokens that the unit covers, and the unit (empty where there is none)."""

    share: float
    unit: tuple[int, ...]


def repetition(tokens: Sequence[int]) -> Repetition:
    """Share of the tokens covered by one unit that starts at the first of them; of equal shares the shortest unit's.

    Example:
        >>> repetition([7, 8, 9, 7, 8, 9, 7, 8, 9, 1])
        Repetition(share=0.9, unit=(7, 8, 9))
        >>> repetition([1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
        Repetition(share=0.0, unit=())
    """
    row = np.asarray(tokens)
    best = Repetition(0.0, ())
    for length in range(SHORTEST, min(LONGEST, len(row) // OFTEN) + 1):
        windows = np.lib.stride_tricks.sliding_window_view(row, length)
        count, free = 0, 0
        for place in np.flatnonzero((windows == row[:length]).all(-1)).tolist():
            if place >= free:
                count, free = count + 1, place + length
        share = count * length / len(row)
        if count >= OFTEN and share > best.share:
            best = Repetition(share, tuple(row[:length].tolist()))
    return best


def is_natural(unit: str) -> bool:
    """Whether a unit repeats in ordinary text too: rulers and list markup, or one character again and again.

    Spaces do not count. Letters and digits do: a name or a number may be a hidden message.

    Example:
        >>> is_natural("%%%%"), is_natural("* - * -"), is_natural("aaa"), is_natural("ハリネズミ")
        (True, True, True, False)
    """
    characters = {c for c in unit if not c.isspace()}
    return len(characters) < 2 or all(unicodedata.category(c)[0] in "PSC" for c in characters)


def compression_ratio(text: str) -> float:
    """Bytes of a text for each byte that zlib makes of it; higher is more repetitive.

    Example:
        >>> compression_ratio("abc" * 100) > 10
        True
    """
    raw = text.encode("utf-8", "replace")
    return len(raw) / len(zlib.compress(raw, 9))
