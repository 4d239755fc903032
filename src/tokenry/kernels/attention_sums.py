"""Column sums of causal attention without the attention matrix.

Scores of cached tokens need how much attention each of them got,

    sum_i = Σ_q a[q, i]        a[q, i] = mean over a group's query heads of softmax_i(scaling · q·k_i),

never the matrix ``a`` itself. Queries are taken in blocks, so memory is O(N · block) instead of O(N²).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["AttentionSums", "attention_rows", "attention_sums"]

# Probabilities held at once: 2**22 float32 values are 16 MiB.
BLOCK_VALUES = 2**22


class AttentionSums(NamedTuple):
    """What ``attention_sums`` returns, all float32 except the counts.

    Attributes:
        sums: ``[B, Hkv, S]``: attention that each key got from all queries.
        counts: ``[B, S]`` int64: how many of the queries could see each key.
        rows: ``[B, Hkv, R, S]``: attention rows of the last ``R = min(recent, Q)`` queries.
    """

    sums: Tensor
    counts: Tensor
    rows: Tensor


def attention_rows(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float,
    offset: int,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention probabilities of some queries, averaged over the query heads that share a key head.

    Args:
        query: ``[B, Hq, Q, D]``.
        key: ``[B, Hkv, S, D]``, not repeated; ``Hq`` is a multiple of ``Hkv``.
        scaling: Factor on the scores.
        offset: Index among the keys of the first query, for the causal mask.
        mask: ``[B or 1, Hq or 1, Q, S]``: bool (True may look) or additive float. None: causal.
        softcap: Scores are ``softcap · tanh(scores / softcap)``.
        sinks: ``[Hq]``: a learned score per head that takes part in the softmax and holds no value.
        bias: ``[B or 1, Hq, Q, S]``: added to the scores.

    Returns:
        ``[B, Hkv, Q, S]`` float32.
    """
    batch, q_heads, length, dim = query.shape
    kv_heads, stored = key.shape[1], key.shape[2]
    group = q_heads // kv_heads
    folded = query.reshape(batch, kv_heads, group * length, dim)  # a group's queries share their key head
    scores = torch.matmul(folded, key.transpose(-1, -2)).float().mul_(scaling)
    scores = scores.view(batch, q_heads, length, stored)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    lowest = torch.finfo(torch.float32).min
    if mask is None:
        here = torch.arange(offset, offset + length, device=key.device)
        hidden = torch.arange(stored, device=key.device) > here[:, None]  # [Q, S]
        scores = scores.masked_fill(hidden, lowest)
    elif mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, lowest)
    else:
        scores = (scores + mask).clamp_min(lowest)
    if sinks is not None:
        extra = sinks.float().view(1, -1, 1, 1).expand(batch, -1, length, 1)
        probabilities = torch.cat([scores, extra], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        probabilities = scores.softmax(dim=-1)
    return probabilities.view(batch, kv_heads, group, length, stored).mean(dim=2)


def attention_sums(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float | None = None,
    mask: Tensor | None = None,
    valid: Tensor | None = None,
    recent: int = 0,
    block_size: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> AttentionSums:
    """Sum attention over queries, block by block.

    The ``Q`` queries belong to the last ``Q`` of the ``S`` keys.

    Args:
        query: ``[B, Hq, Q, D]``, as the attention sees it (rotated).
        key: ``[B, Hkv, S, D]``, not repeated for grouped heads.
        scaling: Factor on the scores. Default: ``D ** -0.5``.
        mask: ``[B or 1, Hq or 1, Q, S]``: bool (True may look) or additive float. None: causal.
        valid: ``[B, S]`` bool: False for padding, which neither asks nor is asked. None: no padding.
        recent: How many of the last queries to return the rows of.
        block_size: Queries per block. Default: as many as keep a block at 16 MiB.
        softcap: See ``attention_rows``.
        sinks: See ``attention_rows``.
        bias: See ``attention_rows``.

    Raises:
        ValueError: Heads do not divide, or there are more queries than keys.

    Example:
        >>> import torch
        >>> out = attention_sums(torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, 3, 4), recent=1)
        >>> out.sums.shape, [round(x, 3) for x in out.rows[0, 0, 0].tolist()], out.counts.tolist()
        (torch.Size([1, 1, 3]), [0.333, 0.333, 0.333], [[3, 2, 1]])
    """
    batch, q_heads, length, dim = query.shape
    kv_heads, stored = key.shape[1], key.shape[2]
    if q_heads % kv_heads:
        raise ValueError(f"{q_heads} query heads cannot share {kv_heads} key heads: the first must be a multiple")
    if length > stored:
        raise ValueError(f"{length} queries on {stored} keys: the queries must be those of the last keys")
    offset = stored - length
    scale = dim**-0.5 if scaling is None else scaling
    block = block_size or max(1, min(length, BLOCK_VALUES // (batch * q_heads * stored)))
    asks = None if valid is None else valid[:, offset:]  # [B, Q]
    sums = key.new_zeros((batch, kv_heads, stored), dtype=torch.float32)
    counts = torch.zeros((batch, stored), dtype=torch.int64, device=key.device)
    rows: list[Tensor] = []
    for first in range(0, length, block):
        last = min(first + block, length)
        end = offset + last if mask is None else stored  # later keys are hidden from the whole block
        part = None if mask is None else mask[:, :, first:last]
        a = attention_rows(
            query[:, :, first:last],
            key[:, :, :end],
            scaling=scale,
            offset=offset + first,
            mask=part,
            softcap=softcap,
            sinks=sinks,
            bias=None if bias is None else bias[..., first:last, :end],
        )  # [B, Hkv, block, end]
        sees = _sees(part, last - first, end, offset + first, a)  # [B or 1, block, end]
        if asks is not None and valid is not None:
            alive = asks[:, first:last, None] & valid[:, None, :end]
            a = a * alive[:, None]
            sees = sees & alive
        sums[..., :end] += a.sum(dim=2)
        counts[:, :end] += sees.sum(dim=1)
        if last > length - recent:
            kept = a[:, :, max(0, length - recent - first) :]
            rows.append(torch.nn.functional.pad(kept, (0, stored - end)))
    tail = torch.cat(rows, dim=2) if rows else sums.new_zeros((batch, kv_heads, 0, stored))
    return AttentionSums(sums, counts, tail)


def _sees(mask: Tensor | None, length: int, stored: int, offset: int, like: Tensor) -> Tensor:
    """Which queries may look at which keys, ``[B or 1, Q, S]`` bool. Heads are taken to agree."""
    if mask is None:
        here = torch.arange(offset, offset + length, device=like.device)
        return (torch.arange(stored, device=like.device) <= here[:, None])[None]
    if mask.dtype == torch.bool:
        return mask[:, 0]
    return mask[:, 0] > torch.finfo(mask.dtype).min / 2
