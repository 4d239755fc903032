"""Scores of cached entries: from the attention they got, from their keys, or from the queries to come.

For entry i, with ``a[q, i]`` the attention of query q averaged over the heads of a group:

    plain sum        Σ_q a[q, i]                                     (favours early tokens: more queries saw them)
    global           g_i = 1 / (number of queries that can see i) · Σ_q a[q, i]
    local            l_i = mean of a[q, i] over the last w queries that can see i
    global-local     max(ĝ_i, l_i)  or  ĝ_i + l_i,     ĝ = g · Σl / Σg   (equal mass)
    last             a[newest query, i], averaged over all heads
    key norm         -||k_i||
    key difference   -cos(k_i, mean_j k_j / ||k_j||)
    expected         softmax_i(s μ·k_i + s²/2 k_i·Σ k_i) · ||v_i||,   N(μ, Σ) the queries to come, s the scaling

Functions work on tensors ``[..., S]``; the small classes are the scorers that caches take.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenry.kvcache.entries import Entries
from tokenry.kvcache.future_queries import SINKS

__all__ = [
    "AttentionSum",
    "ExpectedAttention",
    "GlobalAttention",
    "GlobalLocal",
    "KeyDifference",
    "KeyNorm",
    "LastAttention",
    "LocalAttention",
    "Recency",
    "expected_attention_score",
    "global_local_score",
    "global_score",
    "key_difference_score",
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


def key_difference_score(keys: Tensor, valid: Tensor) -> Tensor:
    """How unlike each key is to the mean direction of all: minus their cosine.

    Args:
        keys: ``[..., S, D]``.
        valid: Broadcasts to ``[..., S]``; False entries take no part in the mean.

    Example:
        >>> keys = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]])
        >>> key_difference_score(keys, torch.ones(3, dtype=torch.bool)).argmax().item()
        2
    """
    directions = torch.nn.functional.normalize(keys.float(), dim=-1)
    mean = (directions * valid[..., None]).sum(-2, keepdim=True)  # its length does not matter
    return -(directions * torch.nn.functional.normalize(mean, dim=-1)).sum(-1)


def expected_attention_score(
    keys: Tensor, values: Tensor, mean: Tensor, covariance: Tensor, *, scaling: float, counted: Tensor
) -> Tensor:
    """Attention that each entry can expect from normally distributed queries, times the length of its value.

    With ``q ~ N(μ, Σ)`` the expectation of ``exp(s q·k)`` is ``exp(s μ·k + s²/2 k·Σ k)``.

    Args:
        keys: ``[B, H, S, D]``.
        values: ``[B, H, S, Dv]``.
        mean: ``[B, Hq, D]``; ``Hq`` is a multiple of ``H``.
        covariance: ``[B, Hq, D, D]``.
        scaling: Factor ``s`` on the scores.
        counted: ``[B or 1, S]``: False entries get 0 and take no part in the softmax.

    Returns:
        ``[B, H, S]`` float32, averaged over the query heads of a group.
    """
    batch, heads, _, dim = keys.shape
    k = keys.float()[:, :, None]  # [B, H, 1, S, D]
    mu = mean.view(batch, heads, -1, dim, 1)
    sigma = covariance.view(batch, heads, -1, dim, dim)
    expected = scaling * (k @ mu)[..., 0] + scaling**2 / 2 * ((k @ sigma) * k).sum(-1)  # [B, H, group, S]
    expected = expected.masked_fill(~counted[:, None, None], torch.finfo(torch.float32).min)
    return expected.softmax(-1).mean(2) * values.float().norm(dim=-1) * counted[:, None]


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


class LastAttention:
    """Scorer: attention of the newest query, averaged over all heads of the layer, which so keep the same tokens (TOVA)."""

    needs: Literal["recent"] = "recent"

    def __call__(self, entries: Entries) -> Tensor:
        """Scores ``[B, H, S]``."""
        return entries.recent[:, :, -1].mean(1, keepdim=True).expand(entries.keys.shape[:3])


class KeyNorm:
    """Scorer: short keys, which attention likes (Knorm)."""

    needs: Literal["nothing"] = "nothing"

    def __call__(self, entries: Entries) -> Tensor:
        """Scores ``[B, H, S]``."""
        return -entries.keys.float().norm(dim=-1)


class KeyDifference:
    """Scorer: keys that are unlike the others (KeyDiff)."""

    needs: Literal["nothing"] = "nothing"

    def __call__(self, entries: Entries) -> Tensor:
        """Scores ``[B, H, S]``."""
        return key_difference_score(entries.keys, entries.valid[:, None])


class ExpectedAttention:
    """Scorer: attention expected from the queries to come; the first four tokens always stay.

    Args:
        future: How many coming positions to average over.
    """

    needs: Literal["queries"] = "queries"

    def __init__(self, future: int = 512) -> None:
        if future < 1:
            raise ValueError(f"future must be at least 1 position, got {future}")
        self.future = future

    def __call__(self, entries: Entries) -> Tensor:
        """Scores ``[B, H, S]``."""
        if entries.queries is None:
            raise ValueError('entries carry no forecast of queries; a scorer gets it when it needs "queries"')
        mean, covariance = entries.queries.ahead(self.future)
        number = entries.valid.cumsum(-1)  # 1 for the first real entry
        scaling, counted = entries.queries.scaling, entries.valid & (number > SINKS)
        score = expected_attention_score(
            entries.keys, entries.values, mean, covariance, scaling=scaling, counted=counted
        )
        return score.masked_fill((number <= SINKS)[:, None], torch.inf)


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
