"""Count adjacent symbol pairs while a list of BPE merges is applied, for several corpora in one pass.

For category i, pair p and merge t,

    c[i, p, t] = occurrences of p in corpus i after merges 1..t-1 and before merge t

All adjacent windows count: "aaaa" holds (a, a) three times although merging it left to right happens only twice.

The distinct words of all corpora stand in one flat array, linked to their neighbours. A merge touches only the places
where its pair stands, all at once (no loop over words), and leaves the list of counts that changed. Since the merges are
known beforehand, places are indexed only for pairs that some later merge needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

__all__ = ["Merge", "PairCounts", "count_pairs"]

Merge = tuple[str, str]


@dataclass(frozen=True, eq=False)
class PairCounts:
    """Pair counts of n categories over T merges, kept as changes.

    A row is the change of one pair's counts at one step; rows are sorted by pair, then step. At step 0 every pair of
    the unmerged text has a row; a row of step t is in force when merge t is due (steps count from 0).

    Attributes:
        pairs: The pairs that ever occur, P of them.
        merge_pair: ``(T,)`` index into ``pairs`` of each merge; -1 where it occurs in no category.
        pair: ``(E,)`` index into ``pairs`` of each row.
        step: ``(E,)`` step of each row.
        change: ``(E, n)`` sparse: by how much the counts change.
        initial: ``(n,)`` number of adjacent pairs before any merge.
        symbols: The symbols in the order of ``token_counts``.
        token_counts: ``(n, symbols)`` sparse: what is left after all merges.
    """

    pairs: list[Merge]
    merge_pair: np.ndarray
    pair: np.ndarray
    step: np.ndarray
    change: sparse.csr_array
    initial: np.ndarray
    symbols: list[str]
    token_counts: sparse.csr_array

    @property
    def steps(self) -> int:
        """T, the number of merges."""
        return len(self.merge_pair)

    def running(self, weights: np.ndarray) -> np.ndarray:
        """Weighted count in force from each row on: ``(n,)`` weights -> ``(E,)``."""
        total = np.cumsum(self.change @ weights)
        first = np.searchsorted(self.pair, np.arange(len(self.pairs)))
        before = np.concatenate([[0.0], total])[first]
        return total - before[self.pair]

    def row(self, pair: np.ndarray, step: np.ndarray) -> np.ndarray:
        """Row in force for each (pair, step), -1 where the pair has not occurred yet."""
        rows = (
            np.searchsorted(self.pair * (self.steps + 1) + self.step, pair * (self.steps + 1) + step, side="right") - 1
        )
        return np.where((rows >= 0) & (self.pair[rows] == pair), rows, -1)

    def counts_at(self, rows: np.ndarray) -> np.ndarray:
        """Counts ``(k, n)`` in force from each of k rows on: the sum of the pair's changes so far."""
        first = np.searchsorted(self.pair, self.pair[rows])
        span = rows - first + 1
        start = np.concatenate([[0], np.cumsum(span)])
        summed = np.arange(start[-1]) - np.repeat(start[:-1] - first, span)
        select = sparse.csr_array((np.ones(len(summed)), summed, start), shape=(len(rows), len(self.pair)))
        return (select @ self.change).toarray()

    def changed(self, category: int, step: int) -> dict[Merge, int]:
        """Counts of one category that changed since the step before, as the values they changed to."""
        rows = np.flatnonzero(self.step == step)
        rows = rows[(self.change @ np.eye(len(self.initial))[category])[rows] != 0]
        values = self.counts_at(rows)[:, category]
        return {self.pairs[p]: int(k) for p, k in zip(self.pair[rows].tolist(), values.tolist(), strict=True)}


def _split(words: list[str], prefix: str, suffix: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Words as one flat array of symbol numbers, the words' lengths, and the symbols."""
    lengths = np.fromiter((len(word) for word in words), np.int64, len(words))
    points = np.frombuffer("".join(words).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)
    ends = np.cumsum(lengths)
    inner, last = np.ones(len(points), bool), np.zeros(len(points), bool)
    inner[ends - lengths] = False
    last[ends - 1] = True
    codes, flat = np.unique(points * 4 + 2 * (inner & bool(prefix)) + (last & bool(suffix)), return_inverse=True)
    symbols = [(prefix if code & 2 else "") + chr(code >> 2) + (suffix if code & 1 else "") for code in codes.tolist()]
    return flat, lengths, symbols


def _sites(at: np.ndarray, following: np.ndarray) -> np.ndarray:
    """Of places of a pair (a, a), those that a left-to-right merge takes: every other one of each run."""
    at = np.sort(at)
    starts = np.ones(len(at), bool)
    starts[1:] = following[at[:-1]] != at[1:]
    index = np.arange(len(at))
    begin = np.maximum.accumulate(np.where(starts, index, 0))
    return at[(index - begin) % 2 == 0]


def count_pairs(
    words: Sequence[Mapping[str, int]], merges: Sequence[Merge], *, prefix: str = "", suffix: str = ""
) -> PairCounts:
    """Apply merges one by one to the words of every category and record how pair counts change.

    Args:
        words: For each category its distinct words (pre-tokens), with how often each occurs.
        merges: The T merges in order; a pair that occurs nowhere leaves the counts unchanged.
        prefix: What the vocabulary writes before every symbol inside a word (WordPiece-like BPE: ``"##"``).
        suffix: What it writes behind the last symbol of a word (older BPE: ``"</w>"``).

    Returns:
        The counts of all categories at all steps.

    Raises:
        ValueError: No words, or a merge that is not a pair of non-empty strings.

    Example:
        >>> counts = count_pairs([{"aaaa": 3, "ab": 1}], [("a", "a")])
        >>> counts.changed(0, 0)
        {('a', 'a'): 9, ('a', 'b'): 1}
    """
    if not words or not any(words):
        raise ValueError("there is nothing to count: no category has a word")
    bad = next((merge for merge in merges if len(merge) != 2 or not all(merge)), None)
    if bad is not None:
        raise ValueError(f"a merge is a pair of two non-empty symbols, got {bad!r}")
    n = len(words)
    listed = [word for counts in words for word in counts if word]
    token, lengths, symbols = _split(listed, prefix, suffix)
    many = np.fromiter((k for counts in words for word, k in counts.items() if word), np.int64, len(listed))
    kind = np.repeat(np.arange(n), [sum(map(bool, counts)) for counts in words])
    weight, category = np.repeat(many, lengths), np.repeat(kind, lengths)
    place = np.arange(len(token))
    following, preceding = place + 1, place - 1
    ends = np.cumsum(lengths)
    following[ends - 1], preceding[ends - lengths] = -1, -1

    number = {symbol: i for i, symbol in enumerate(symbols)}
    for left, right in merges:
        for symbol in (left, right, left + right.removeprefix(prefix)):
            number.setdefault(symbol, len(number))
    size = len(number)
    parts = np.array([[number[a], number[b], number[a + b.removeprefix(prefix)]] for a, b in merges], np.int64)
    parts = parts.reshape(-1, 3)
    watched, turn = np.unique(parts[:, 0] * size + parts[:, 1], return_index=True)
    places: list[list[np.ndarray]] = [[] for _ in merges]

    def keys_at(at: np.ndarray) -> np.ndarray:
        return token[at] * size + token[following[at]]

    def watch(at: np.ndarray, keys: np.ndarray) -> None:
        """Remember places whose pair a merge will need."""
        found = np.searchsorted(watched, keys)
        known = (found < len(watched)) & (watched[np.minimum(found, len(watched) - 1)] == keys)
        steps, at = turn[found[known]], at[known]
        order = np.argsort(steps, kind="stable")
        steps, at = steps[order], at[order]
        cuts = np.flatnonzero(np.diff(steps)) + 1
        for step, group in zip(steps[np.r_[0, cuts]].tolist() if len(steps) else [], np.split(at, cuts), strict=False):
            places[step].append(group)

    def total(keys: np.ndarray, at: np.ndarray, signed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sum signed weights by (pair, category)."""
        cells, back = np.unique(keys * n + category[at], return_inverse=True)
        sums = np.bincount(back, signed, len(cells)).astype(np.int64)
        return cells[sums != 0], sums[sums != 0]

    at = np.flatnonzero(following >= 0)
    keys = keys_at(at)
    log = [(0, *total(keys, at, weight[at]))]
    if len(merges):
        watch(at, keys)
    for step, (a, b, c) in enumerate(parts.tolist()):
        if not places[step]:
            continue
        at = np.concatenate(places[step])
        places[step] = []
        at = at[(token[at] == a) & (following[at] >= 0)]
        at = at[token[following[at]] == b]
        if not len(at):
            continue
        at = _sites(at, following) if a == b else at
        second, before = following[at], preceding[at]
        touched = np.concatenate([before[before >= 0], at, second[following[second] >= 0]])
        touched = np.unique(touched)
        gone = keys_at(touched)
        after = following[second]
        token[at], token[second] = c, -1
        following[at] = after
        preceding[after[after >= 0]] = at[after >= 0]
        following[second] = -1
        before = preceding[at]
        fresh = np.unique(np.concatenate([before[before >= 0], at[after >= 0]]))
        keys = keys_at(fresh)
        both = np.concatenate([gone, keys]), np.concatenate([touched, fresh])
        if step + 1 < len(merges):
            log.append((step + 1, *total(*both, np.concatenate([-weight[touched], weight[fresh]]))))
            watch(fresh, keys)
    return _assemble(log, token, weight, category, list(number), parts, n)


def _assemble(
    log: list[tuple[int, np.ndarray, np.ndarray]],
    token: np.ndarray,
    weight: np.ndarray,
    category: np.ndarray,
    symbols: list[str],
    parts: np.ndarray,
    n: int,
) -> PairCounts:
    """The per-step records as arrays sorted by pair and step."""
    size, steps = len(symbols), len(parts)
    step = np.repeat([entry[0] for entry in log], [len(entry[1]) for entry in log])
    cells = np.concatenate([entry[1] for entry in log])
    delta = np.concatenate([entry[2] for entry in log])
    names, pair = np.unique(cells // n, return_inverse=True)
    rows, back = np.unique(pair * (steps + 1) + step, return_inverse=True)
    change = sparse.csr_array((delta.astype(np.float64), (back, cells % n)), shape=(len(rows), n))
    wanted = parts[:, 0] * size + parts[:, 1]
    found = np.minimum(np.searchsorted(names, wanted), max(len(names) - 1, 0))
    merge_pair = np.where(names[found] == wanted, found, -1) if len(names) else np.full(steps, -1)
    alive = token >= 0
    left = sparse.coo_array((weight[alive], (category[alive], token[alive])), shape=(n, size)).tocsr()
    return PairCounts(
        pairs=[(symbols[k // size], symbols[k % size]) for k in names.tolist()],
        merge_pair=merge_pair,
        pair=rows // (steps + 1),
        step=rows % (steps + 1),
        change=change,
        initial=np.bincount(cells[step == 0] % n, delta[step == 0], n).astype(np.int64),
        symbols=symbols,
        token_counts=left,
    )
