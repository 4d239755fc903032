"""Counted n-grams of token ids, exact, on disk, read through a memory map.

    P_i(v | c) = count(c, v) / sum_v' count(c, v')      c: i tokens of one document, v: the token that follows

A sorted array per context length: an (i+1)-gram is the number *id of its context* x V + *next token*, and its place in the
sorted array is its own id as a context of the next length. So a look-up is a binary search, and the arrays need no more
memory than the pages that are touched.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["NGramModel"]

FORMAT = "tokenry-ngrams-1"


@dataclass(frozen=True)
class NGramModel:
    """Counts of what followed every context of 1 to n tokens.

    Attributes:
        vocab_size: Tokens of the vocabulary; ids from another one are refused.
        keys: Per context length: the sorted numbers of the n-grams, int64.
        counts: Per context length: how often each was seen.
        totals: Per context length: how often each context was seen with a token behind it.

    Example:
        >>> model = NGramModel.from_documents([[1, 2, 3, 1, 2, 4]], vocab_size=5, orders=2)
        >>> model.probabilities(np.array([[1, 2]]), np.array([[3, 4, 0]]), 2).tolist()
        [[0.5, 0.5, 0.0]]
    """

    vocab_size: int
    keys: tuple[np.ndarray, ...]
    counts: tuple[np.ndarray, ...]
    totals: tuple[np.ndarray, ...]

    @property
    def orders(self) -> int:
        """Longest context, in tokens."""
        return len(self.keys)

    @classmethod
    def from_documents(cls, documents: Iterable[Sequence[int]], vocab_size: int, orders: int = 5) -> NGramModel:
        """Count documents of token ids; no n-gram reaches over the border of a document.

        Args:
            documents: Token ids of each.
            vocab_size: Size of the model's vocabulary.
            orders: Longest context. Default 5 (paper: 2- to 6-grams).

        Raises:
            ValueError: There is no document, or an id outside the vocabulary.
        """
        if orders < 1:
            raise ValueError(f"orders={orders}: a context has at least one token")
        pieces = [np.asarray(document, dtype=np.int64) for document in documents]
        if not any(len(piece) for piece in pieces):
            raise ValueError("no n-grams without text: give at least one document with tokens")
        ids = np.concatenate(pieces)
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise ValueError(
                f"token ids must be 0 to {vocab_size - 1}, got {int(ids.min())} to {int(ids.max())}; the documents were "
                "encoded with another tokenizer"
            )
        left = np.concatenate([np.arange(len(piece), 0, -1) for piece in pieces])  # tokens up to the document's end
        keys, counts, totals = [], [], []
        context, contexts = ids, vocab_size  # id of the context that starts at each position
        for length in range(1, orders + 1):
            starts = np.flatnonzero(left > length)  # a context of this length and a token behind it
            grams = context[starts] * vocab_size + ids[starts + length]
            found, place, seen = np.unique(grams, return_inverse=True, return_counts=True)
            keys.append(found)
            counts.append(seen.astype(np.int64))
            totals.append(np.bincount(context[starts], minlength=contexts).astype(np.int64))
            context = np.full(len(ids), -1, dtype=np.int64)
            context[starts], contexts = place.reshape(-1), len(found)
        return cls(vocab_size, tuple(keys), tuple(counts), tuple(totals))

    @classmethod
    def from_texts(cls, texts: Iterable[str], tokenizer: Any, orders: int = 5) -> NGramModel:
        """Count texts, encoded by ``tokenizer`` without special tokens."""
        encoded = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
        return cls.from_documents(encoded, len(tokenizer), orders)

    def save(self, folder: Path | str) -> None:
        """Write the arrays into a folder."""
        where = Path(folder)
        where.mkdir(parents=True, exist_ok=True)
        for name in ("keys", "counts", "totals"):
            for i, array in enumerate(getattr(self, name), 1):
                np.save(where / f"{name}{i}.npy", array, allow_pickle=False)
        facts = {"format": FORMAT, "vocab_size": self.vocab_size, "orders": self.orders}
        (where / "ngrams.json").write_text(json.dumps(facts) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: Path | str) -> NGramModel:
        """Open a saved folder through memory maps: nothing is read until it is looked up.

        Raises:
            ValueError: The folder holds no n-gram model, or a damaged one.
        """
        where = Path(folder)
        try:
            facts = json.loads((where / "ngrams.json").read_text("utf-8"))
            if facts.get("format") != FORMAT:
                raise ValueError(f"format {facts.get('format')!r}")
            arrays = [
                tuple(
                    np.load(where / f"{name}{i + 1}.npy", mmap_mode="r", allow_pickle=False)
                    for i in range(facts["orders"])
                )
                for name in ("keys", "counts", "totals")
            ]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{where} holds no n-gram model that NGramModel.save wrote: {error}") from error
        return cls(facts["vocab_size"], *arrays)

    def probabilities(self, history: np.ndarray, tokens: np.ndarray, order: int) -> np.ndarray:
        """Share of ``tokens`` after the last ``order`` tokens of each history.

        Args:
            history: ``(R, H)`` token ids, the newest last, ``H >= order``.
            tokens: ``(R, n)`` candidates.
            order: Length of the context.

        Returns:
            ``(R, n)`` float64; 0 where the context was never seen.
        """
        if not len(self.keys[order - 1]):
            return np.zeros(tokens.shape)  # no document is longer than the context
        context = history[:, -order].astype(np.int64)  # (R,) id of a context that grows to the right
        known = np.ones(len(context), dtype=bool)
        for length in range(1, order):
            context, seen = self._find(length, context * self.vocab_size + history[:, length - order])
            known &= seen
        total = np.where(known, self.totals[order - 1][context], 0)[:, None]  # (R, 1)
        place, seen = self._find(order, context[:, None] * self.vocab_size + tokens)
        count = np.where(seen & known[:, None], self.counts[order - 1][place], 0)
        return count / np.maximum(total, 1)

    def _find(self, length: int, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Place of each number among the n-grams with ``length`` tokens of context (any, if absent), and whether it is there."""
        keys = self.keys[length - 1]
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return place, keys[place] == wanted
