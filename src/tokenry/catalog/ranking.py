"""Find a method in the words of the problem: BM25 over the cards, forgiving typing errors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import bm25s
import numpy as np
from rapidfuzz import fuzz, process

from tokenry.catalog.entries import Card, cards

__all__ = ["Hit", "search"]

SMALL_WORDS = (
    "a an and are as at be by can do does for from how i in is it my of on or so than that the their this to want "
    "we what when which while with without you your"
)
STOP = frozenset(SMALL_WORDS.split())
# How often a field's words count: a name says more than a remark.
WEIGHTS = {"slug": 4, "title": 4, "tags": 3, "does": 3, "use_when": 1, "paper": 1, "family": 2, "compare": 1}


@dataclass(frozen=True)
class Hit:
    """A found method with its score (higher is nearer)."""

    slug: str
    title: str
    does: str
    score: float


def _words(text: str) -> list[str]:
    words = re.findall(r"[a-z0-9]+", text.lower().replace("key-value", "kv").replace("key value", "kv"))
    return [_stem(w) for w in words if w not in STOP]


def _stem(word: str) -> str:
    """Cut the commonest English endings, so that "caches", "cached" and "cache" meet."""
    for ending in ("ations", "ation", "ing", "ers", "er", "ed", "es", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def _document(card: Card) -> list[str]:
    words: list[str] = []
    for field, weight in WEIGHTS.items():
        value = getattr(card, field)
        words += _words(" ".join(value) if isinstance(value, list) else value) * weight
    for name in [*card.models, *card.mixers, *card.authors]:
        words += _words(name)
    return words


@cache
def _index() -> tuple[list[Card], bm25s.BM25, list[str]]:
    known = list(cards().values())
    documents = [_document(card) for card in known]
    retriever = bm25s.BM25()
    retriever.index(documents, show_progress=False)
    return known, retriever, sorted({word for words in documents for word in words})


def _repair(word: str, vocabulary: list[str]) -> list[str]:
    """The word if the cards know it, else the known words nearest to it."""
    if word in vocabulary:
        return [word]
    near = process.extract(word, vocabulary, scorer=fuzz.ratio, limit=2, score_cutoff=72)  # pyrefly: ignore[no-matching-overload]  the stubs know no list of words
    return [found for found, _, _ in near]


def search(query: str, limit: int = 10) -> list[Hit]:
    """Methods that fit a query, best first.

    Args:
        query: Words of the problem, or a name. Typing errors are forgiven.
        limit: How many at most.

    Raises:
        ValueError: The query has no word in it.
    """
    words = _words(query)
    if not words:
        raise ValueError(f"the query {query!r} has no word to look for")
    known, retriever, vocabulary = _index()
    repaired = [found for word in words for found in _repair(word, vocabulary)]
    if not repaired:
        return []
    scores = np.asarray(retriever.get_scores(repaired))
    order = np.argsort(-scores, kind="stable")[:limit]
    return [
        Hit(known[i].slug, known[i].title, known[i].does, round(float(scores[i]), 3)) for i in order if scores[i] > 0
    ]
