"""Byte strings that begin a text: what of them is whole, and what a begun character may become."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

__all__ = ["completions", "whole_characters"]

STAND_INS: dict[tuple[str, bool], str] = {}  # a character of each category met, always the same one


def whole_characters(data: bytes) -> tuple[str, bytes] | None:
    r"""The whole characters of ``data`` and the bytes of one that is not complete; None if no text begins so.

    Example:
        >>> whole_characters(b"caf\xc3")
        ('caf', b'\xc3')
    """
    try:
        return data.decode(), b""
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            return data[: error.start].decode(), data[error.start :]
        return None


@lru_cache(maxsize=1024)
def completions(part: bytes) -> tuple[str, ...]:
    r"""Of each Unicode category that has characters beginning with the bytes ``part``, one character (any of it).

    Example:
        >>> [unicodedata.category(character) for character in completions(b"\xc3")]
        ['Lu', 'Sm', 'Ll']
    """
    length = 2 if part[0] < 0xE0 else 3 if part[0] < 0xF0 else 4
    prefix = part[0] & (0x7F >> length)
    for byte in part[1:]:
        prefix = prefix << 6 | byte & 0x3F
    bits = 6 * (length - len(part))
    first, last = max(prefix << bits, (0x80, 0x800, 0x10000)[length - 2]), min((prefix + 1) << bits, 0x110000)
    points = range(first, last, max(1, (last - first) // 4096))
    kinds = {(unicodedata.category(chr(p)), chr(p).isspace()): chr(p) for p in points if not 0xD800 <= p < 0xE000}
    return tuple(STAND_INS.setdefault(kind, character) for kind, character in kinds.items())
