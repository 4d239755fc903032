"""Public-domain English for training small models: the documents, and which of them are held out."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["english_documents", "is_held_out"]

BLOCK = 6000  # characters


def is_held_out(text: str) -> bool:
    """Whether a document belongs to the held-out 5 %: its hash says so, the same on every machine.

    Example:
        >>> is_held_out("In the beginning")
        False
    """
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 20 == 0


def english_documents(folder: Path) -> Iterator[str]:
    """Blocks of about 6 kB from every ``*.txt.gz`` of a folder, so that held-out text is spread over each file."""
    for path in sorted(folder.glob("*.txt.gz")):
        with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
            paragraphs = file.read().split("\n\n")
        block: list[str] = []
        for paragraph in paragraphs:
            block.append(paragraph)
            if sum(map(len, block)) > BLOCK:
                yield "\n\n".join(block).strip()
                block = []
        if block:
            yield "\n\n".join(block).strip()
