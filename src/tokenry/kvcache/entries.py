"""What a scorer sees of the stored entries of a layer, and how a budget of them is kept: functions on tensors.

A method of eviction is a *scorer* (which entries matter, ``tokenry.kvcache.scores``) and possibly a *merger* (what
becomes of the evicted, for example ``tokenry.kvcache.ems``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from tokenry.kvcache.future_queries import FutureQueries

__all__ = ["Entries", "Merger", "Scorer", "compress", "evict", "merge_into"]

TINY = torch.finfo(torch.float32).tiny


@dataclass
class Entries:
    """What is known about the ``S`` stored entries of a layer, per key head.

    Attributes:
        keys: ``[B, H, S, D]`` as cached (rotated).
        values: ``[B, H, S, D]``.
        positions: ``[B, H, S]`` int64: number of the token in the sequence, padding counted.
        valid: ``[B, S]`` bool: False for padding. Padding comes first.
        sums: ``[B, H, S]`` float32: attention from the observed queries, averaged over a group's heads.
        counts: ``[B, H, S]`` int64: how many observed queries could see the entry.
        recent: ``[B, H, R, S]`` float32: attention rows of the last ``R <= window`` queries; zero where a query
            could not see the entry.
        queries: Forecast of the next queries, for scorers that need ``"queries"``; else None.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    valid: Tensor
    sums: Tensor
    counts: Tensor
    recent: Tensor
    queries: FutureQueries | None = None


class Scorer(Protocol):
    """Ranks stored entries; a higher score stays."""

    @property
    def needs(self) -> Literal["all", "recent", "queries", "nothing"]:
        """What must be observed beside keys and values.

        ``"all"``: column sums of the attention of all queries; ``"recent"``: only the newest queries' rows, which is
        cheaper (``sums`` then holds those rows' sums); ``"queries"``: mean and covariance of the queries, no attention;
        ``"nothing"``: keys, values and positions are enough.
        """
        ...

    def __call__(self, entries: Entries) -> Tensor:
        """Scores ``[B, H, S]`` float32; what padding gets does not matter."""
        ...


class Merger(Protocol):
    """Says which evicted entries live on inside kept ones."""

    def candidates(self, budget: int) -> int:
        """How many evicted entries, best first, may be merged."""
        ...

    def classes(self, keys: Tensor, candidates: Tensor) -> Tensor:
        """Class of each candidate.

        Args:
            keys: ``[B, H, K, D]`` of the kept old entries, in ascending position.
            candidates: ``[B, H, M, D]`` keys of the candidates.

        Returns:
            ``[B, H, M]`` int64: 0 drops the candidate, ``c >= 1`` merges it into kept entry ``c - 1``.
        """
        ...


def evict(scores: Tensor, budget: int, window: int, candidates: int = 0) -> tuple[Tensor, Tensor]:
    """Choose what stays beside the window: the best ``budget - window`` older entries of every head.

    Args:
        scores: ``[..., S]``; on a tie the older entry wins.
        budget: Entries that stay, the window included.
        window: Newest entries that always stay.
        candidates: How many of the next best to return, for merging.

    Returns:
        ``heavy`` ``[..., budget - window]`` indices in ascending order, and ``next best`` ``[..., M]`` indices by
        falling score, ``M <= candidates``.

    Example:
        >>> heavy, rest = evict(torch.tensor([0.3, 0.1, 0.3, 0.2, 0.0]), budget=3, window=1, candidates=1)
        >>> heavy.tolist(), rest.tolist()
        ([0, 2], [3])
    """
    older = scores[..., : scores.shape[-1] - window]
    order = older.argsort(dim=-1, descending=True, stable=True)
    keep = budget - window
    return order[..., :keep].sort(dim=-1).values, order[..., keep : keep + candidates]


def merge_into(kept: Tensor, members: Tensor, classes: Tensor) -> Tensor:
    """Add members to the entries they are merged into; class 0 is thrown away. All heads at once.

    Args:
        kept: ``[B, H, K, ...]``.
        members: ``[B, H, M, ...]``.
        classes: ``[B, H, M]`` in ``0..K``.
    """
    slots = torch.cat([torch.zeros_like(kept[:, :, :1]), kept], dim=2)  # slot 0 is the zero class
    index = classes.view(*classes.shape, *[1] * (kept.ndim - 3)).expand_as(members)
    return slots.scatter_add(2, index, members)[:, :, 1:]


def compress(entries: Entries, scores: Tensor, budget: int, window: int, merger: Merger | None = None) -> Entries:
    """Keep ``budget`` entries per head, and merge what the merger says into them.

    Merging is a weighted mean with the scores as weights, of keys and of values alike, so norms never grow. An entry
    without members stays bit for bit. Running sums of members are added.

    Args:
        entries: ``S >= budget`` entries.
        scores: ``[B, H, S]``, at least 0 where a merger is given.
        budget: Entries that stay, the window included.
        window: Newest entries that always stay and take part in no merging.
        merger: None: the evicted are dropped.

    Returns:
        The ``budget`` entries that stay, in ascending position.
    """
    scores = scores.masked_fill(~entries.valid[:, None], -torch.inf)
    heavy, rest = evict(scores, budget, window, 0 if merger is None else merger.candidates(budget))
    batch, heads, stored = scores.shape
    newest = torch.arange(stored - window, stored, device=scores.device).expand(batch, heads, window)
    kept = torch.cat([heavy, newest], dim=-1)  # [B, H, budget]
    left = Entries(
        keys=_pick(entries.keys, kept),
        values=_pick(entries.values, kept),
        positions=entries.positions.gather(-1, kept),
        valid=entries.valid.gather(-1, kept[:, 0]),  # padding is kept first or not at all, in every head alike
        sums=entries.sums.gather(-1, kept),
        counts=entries.counts.gather(-1, kept),
        recent=_pick(entries.recent.transpose(2, 3), kept).transpose(2, 3),
    )
    if merger is None or rest.shape[-1] == 0:
        return left
    old, members = slice(0, heavy.shape[-1]), scores.gather(-1, rest)
    classes = merger.classes(left.keys[:, :, old], _pick(entries.keys, rest))  # [B, H, M]
    classes = classes.masked_fill(members == -torch.inf, 0)
    weight, member_weight = scores.gather(-1, heavy).clamp_min(0), members.clamp_min(0)
    total = merge_into(weight, member_weight, classes)[..., None]
    for target, source in ((left.keys, entries.keys), (left.values, entries.values)):
        own, others = target[:, :, old].float() * weight[..., None], _pick(source, rest).float()
        mixed = merge_into(own, others * member_weight[..., None], classes) / total.clamp_min(TINY)
        target[:, :, old] = torch.where(total > weight[..., None], mixed.to(target.dtype), target[:, :, old])
    left.sums[..., old] = merge_into(left.sums[..., old], entries.sums.gather(-1, rest), classes)
    rows = _pick(entries.recent.transpose(2, 3), rest)  # [B, H, M, R]
    left.recent[..., old] = merge_into(left.recent[..., old].transpose(2, 3), rows, classes).transpose(2, 3)
    return left


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """Entries ``index`` ``[B, H, K]`` of ``x`` ``[B, H, S, D]``."""
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))
