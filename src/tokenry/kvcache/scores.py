"""Scores of cached entries from the attention they got.

For entry i, with ``a[q, i]`` the attention of query q averaged over the heads of a group:

    plain sum        Σ_q a[q, i]                                     (favours early tokens: more queries saw them)
    global           g_i = 1 / (number of queries that can see i) · Σ_q a[q, i]
    local            l_i = mean of a[q, i] over the last w queries that can see i
    global-local     max(ĝ_i, l_i)  or  ĝ_i + l_i,     ĝ = g · Σl / Σg   (equal mass)

Functions work on tensors ``[..., S]``; the small classes are the scorers that caches take.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenry.kvcache.compression import Entries

__all__ = [
    "AttentionSum",
    "GlobalAttention",
    "GlobalLocal",
    "LocalAttention",
    "Recency",
    "global_local_score",
    "global_score",
    "local_score",
]

TINY = torch.finfo(torch.float32).tiny


def global_score(sums: Tensor, counts: Tensor) -> Tensor:
    """Mean attention over the queries that can see each entry.

    Args:
        sums: ``[..., S]`` attention received.
        counts: ``[..., S]`` number of queries that could see the entry.

    Example:
        >>> global_score(torch.tensor([2.0, 0.5]), torch.tensor([4, 1])).tolist()
        [0.5, 0.5]
    """
    return sums / counts.clamp_min(1)


def local_score(recent: Tensor, counts: Tensor) -> Tensor:
    """Mean attention over the newest queries that can see each entry.

    Args:
        recent: ``[..., R, S]`` attention rows of the newest queries, zero where a query cannot see the entry.
        counts: ``[..., S]`` number of all queries that could see the entry.

    Example:
        >>> local_score(torch.tensor([[0.5, 0.0], [0.3, 0.7]]), torch.tensor([2, 1])).tolist()
        [0.4..., 0.69...]
    """
    return recent.sum(-2) / counts.clamp(1, max(1, recent.shape[-2]))


def global_local_score(
    sums: Tensor, counts: Tensor, recent: Tensor, *, combine: Literal["max", "sum"] = "max", valid: Tensor | None = None
) -> Tensor:
    """Global and local importance on one scale.

    Args:
        sums: ``[..., S]`` attention received from all queries.
        counts: ``[..., S]`` number of queries that could see the entry.
        recent: ``[..., R, S]`` attention rows of the newest queries.
        combine: ``"max"`` or ``"sum"`` of the two.
        valid: Broadcasts to ``[..., S]``; False entries count nowhere and get 0. None: all count.

    Example:
        >>> a = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.2, 0.6]])
        >>> global_local_score(a.sum(0), torch.tensor([3, 2, 1]), a[-1:]).argmax().item()
        2
    """
    g, l = global_score(sums, counts), local_score(recent, counts)
    if valid is not None:
        g, l = g * valid, l * valid
    g = g * (l.sum(-1, keepdim=True) / g.sum(-1, keepdim=True).clamp_min(TINY))
    return torch.maximum(g, l) if combine == "max" else g + l


class GlobalLocal:
    """Scorer: global-local importance (EMS).

    Args:
        combine: ``"max"`` or ``"sum"``.
    """

    needs: Literal["all"] = "all"

    def __init__(self, combine: Literal["max", "sum"] = "max") -> None:
        if combine not in ("max", "sum"):
            raise ValueError(f"combine must be 'max' or 'sum', got {combine!r}")
        self.combine: Literal["max", "sum"] = combine

    def __call__(self, entries: Entries) -> Tensor:
        """Scores ``[B, H, S]``."""
        valid = entries.valid[:, None]
        return global_local_score(entries.sums, entries.counts, entries.recent, combine=self.combine, valid=valid)


class GlobalAttention:
    """Scorer: mean attention over all queries that can see the entry."""

    needs: Literal["all"] = "all"

    def __call__(self, entries: Entries) -> Tensor:
        """Scores ``[B, H, S]``."""
        return global_score(entries.sums, entries.counts)


class AttentionSum:
    """Scorer: attention summed over all queries (H2O)."""

    needs: Literal["all"] = "all"

    def __call__(self, entries: Entries) -> Tensor:
        """Scores ``[B, H, S]``."""
        return entries.sums


class LocalAttention:
    """Scorer: mean attention of the newest queries (SnapKV).

    Args:
        pool: Odd width of a mean over neighbouring entries, so that clusters stay together. 1: no pooling.
    """

    needs: Literal["recent"] = "recent"

    def __init__(self, pool: int = 1) -> None:
        if pool < 1 or pool % 2 == 0:
            raise ValueError(f"pool must be odd and positive, got {pool}")
        self.pool = pool

    def __call__(self, entries: Entries) -> Tensor:
        """Scores ``[B, H, S]``."""
        score = local_score(entries.recent, entries.counts)
        if self.pool == 1:
            return score
        return torch.nn.functional.avg_pool1d(score, self.pool, stride=1, padding=self.pool // 2)


class Recency:
    """Scorer: the newest entries, and the first ``sinks`` tokens of the text.

    Args:
        sinks: First tokens that always stay. 0: a plain sliding window; 4: StreamingLLM.
    """

    needs: Literal["nothing"] = "nothing"

    def __init__(self, sinks: int = 0) -> None:
        if sinks < 0:
            raise ValueError(f"sinks must be at least 0, got {sinks}")
        self.sinks = sinks

    def __call__(self, entries: Entries) -> Tensor:
        """Scores ``[B, H, S]``."""
        score = entries.positions.float()
        if self.sinks == 0:
            return score
        number = entries.valid.cumsum(-1)[:, None]  # 1 for the first real entry
        return torch.where(number <= self.sinks, torch.inf, score)
