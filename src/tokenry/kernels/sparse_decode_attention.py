"""Attention of one new token that reads only chosen keys.

One query per row. Query head h shares key head g = h // group with its neighbours and reads the k positions ``P_h``:

    o_h = Σ_{i in P_h} a_i V_{g,i},        a = softmax_{i in P_h}(scaling · q_h·K_{g,i} + mask_i)

``masked_attention`` is that definition: full attention in which all other positions are hidden. It reads all N keys of
the H key heads. ``gathered_attention`` copies the k rows of every query head, G·H·k of them for groups of G, and never
repeats keys for the heads that share them. ``sparse_decode_attention`` takes whichever reads less.

Positions usually come from ``full_attention_and_top``: full attention that also says where each head looked most.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

__all__ = [
    "decode_scores",
    "full_attention_and_top",
    "gathered_attention",
    "masked_attention",
    "sparse_decode_attention",
    "top_positions",
]

LOWEST = torch.finfo(torch.float32).min
# A row copied from its place costs about as much as two rows read in order (CPU, 8 key heads of 128, groups of 4).
GATHER_COST = 2
# Rows copied at once on a CPU, in bytes: a block that stays in the cache is read again for free, and small blocks
# come from the allocator's own store instead of fresh pages.
BLOCK_BYTES = 2**20


def decode_scores(query: Tensor, key: Tensor, *, scaling: float, mask: Tensor | None = None) -> Tensor:
    """Scores of one query per row before the softmax.

    Args:
        query: ``[B, Hq, 1, D]``, with positions applied.
        key: ``[B, H, N, D]``, not repeated; ``Hq`` is a multiple of ``H``.
        scaling: Factor on the scores.
        mask: ``[B or 1, Hq or 1, 1, N]``: bool (True may look) or additive float. None: all may be looked at.

    Returns:
        ``[B, Hq, N]`` in at least float32; float32's lowest number where the mask hides.
    """
    scores = torch.matmul(_fold(query, key), key.transpose(-1, -2))  # [B, H, G, N]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).view(*query.shape[:2], key.shape[2]) * scaling
    if mask is None:
        return scores
    shown = mask[:, :, -1, : key.shape[2]]
    if mask.dtype == torch.bool:
        return scores.masked_fill_(~shown, LOWEST)
    return (scores + shown).clamp_min_(LOWEST)


def top_positions(scores: Tensor, budget: int, *, always_keep_last: bool = False) -> Tensor:
    """The ``budget`` positions with the highest scores, per row and head, in no particular order.

    Args:
        scores: ``[B, Hq, N]`` float32, the lowest number where hidden.
        budget: At most ``N``. Hidden positions are taken only where fewer are visible.
        always_keep_last: The newest visible position, which is the current token, takes one of the places.

    Returns:
        ``[B, Hq, budget]`` int64.

    Example:
        >>> top_positions(torch.tensor([[[3.0, 1.0, 2.0, 0.0]]]), 2).sort().values.tolist()
        [[[0, 2]]]
        >>> top_positions(torch.tensor([[[3.0, 1.0, 2.0, 0.0]]]), 2, always_keep_last=True).sort().values.tolist()
        [[[0, 3]]]
    """
    if always_keep_last:
        visible = scores[:, :1] > LOWEST / 2
        newest = scores.shape[-1] - 1 - visible.flip(-1).to(torch.uint8).argmax(-1, keepdim=True)  # [B, 1, 1]
        scores = scores.scatter(-1, newest.expand(-1, scores.shape[1], -1), torch.inf)
    return scores.topk(budget, dim=-1, sorted=False).indices


def full_attention_and_top(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    budget: int,
    *,
    scaling: float,
    mask: Tensor | None = None,
    always_keep_last: bool = False,
) -> tuple[Tensor, Tensor]:
    """Full attention of one query per row, and the positions that each head looks at most.

    The scores are computed once for both, so the keys are read once.

    Args:
        query: ``[B, Hq, 1, D]``.
        key: ``[B, H, N, D]``.
        value: ``[B, H, N, Dv]``.
        budget: Positions to name, at most ``N``.
        scaling: See ``decode_scores``.
        mask: See ``decode_scores``.
        always_keep_last: See ``top_positions``.

    Returns:
        Output ``[B, Hq, 1, Dv]`` and positions ``[B, Hq, budget]``.
    """
    scores = decode_scores(query, key, scaling=scaling, mask=mask)
    positions = top_positions(scores.detach(), budget, always_keep_last=always_keep_last)
    weights = scores.softmax(dim=-1).to(value.dtype).view(*key.shape[:2], -1, key.shape[2])  # [B, H, G, N]
    return torch.matmul(weights, value).view(*query.shape[:3], -1), positions


def sparse_decode_attention(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, *, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """Attention of one query per row to the given positions alone.

    Args:
        query: ``[B, Hq, 1, D]``, with positions applied.
        key: ``[B, H, N, D]``, not repeated; ``Hq`` is a multiple of ``H``.
        value: ``[B, H, N, Dv]``.
        positions: ``[B, Hq, k]`` int64 in ``0..N-1``, distinct within a head, in any order.
        scaling: Factor on the scores.
        mask: ``[B or 1, Hq or 1, 1, N]``: bool (True may look) or additive float. A chosen position that it hides
            stays hidden.

    Returns:
        ``[B, Hq, 1, Dv]``.

    Raises:
        ValueError: Shapes do not fit.

    Example:
        >>> query, key = torch.zeros(1, 2, 1, 4), torch.zeros(1, 1, 5, 4)
        >>> value = torch.arange(5.0).view(1, 1, 5, 1)
        >>> sparse_decode_attention(query, key, value, torch.tensor([[[0, 1], [1, 4]]]), scaling=1.0).flatten().tolist()
        [0.5, 2.5]
    """
    if query.ndim != 4 or query.shape[2] != 1:
        raise ValueError(f"query must hold one token per row, [B, Hq, 1, D], got {tuple(query.shape)}")
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"{query.shape[1]} query heads cannot share {key.shape[1]} key heads: the first must be a multiple"
        )
    if positions.ndim != 3 or positions.shape[:2] != query.shape[:2] or positions.shape[2] == 0:
        raise ValueError(
            f"positions must be [B, Hq, k] with k >= 1 for queries {tuple(query.shape)}, got {tuple(positions.shape)}"
        )
    group = query.shape[1] // key.shape[1]
    gather = GATHER_COST * group * positions.shape[-1] <= key.shape[2]
    attention = gathered_attention if gather else masked_attention
    return attention(query, key, value, positions, scaling=scaling, mask=mask)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, *, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """The definition: full attention with all but the positions hidden. See ``sparse_decode_attention``."""
    shape = (*query.shape[:2], key.shape[2])
    chosen = torch.zeros(shape, dtype=torch.bool, device=key.device).scatter_(-1, positions, True)  # [B, Hq, N]
    if mask is None:
        bias = _hide(chosen, query.dtype)
    else:
        shown = mask[:, :, -1, : key.shape[2]]
        if mask.dtype == torch.bool:
            bias = _hide(chosen & shown, query.dtype)
        else:
            bias = shown.to(query.dtype).masked_fill(~chosen, torch.finfo(query.dtype).min)
    folded = _fold(query, key)
    out = sdpa(folded, key, value, attn_mask=bias.view(*folded.shape[:3], -1), scale=scaling)  # [B, H, G, Dv]
    return out.reshape(*query.shape[:3], -1)


def gathered_attention(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, *, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """Copy the chosen rows of keys and values, then attend to them. See ``sparse_decode_attention``."""
    batch, q_heads, budget = positions.shape
    kv_heads, stored = key.shape[1:3]
    rows = batch * q_heads
    shared = (torch.arange(rows, device=key.device) // (q_heads // kv_heads))[:, None]  # each query head's key head
    places = positions.reshape(rows, budget)
    numbers = shared * stored + places  # of the rows of all heads, one after the other
    bias = None
    if mask is not None:
        bias = mask[:, :, -1, :stored].expand(batch, q_heads, -1).gather(-1, positions).view(rows, 1, 1, budget)
        bias = _hide(bias, query.dtype) if mask.dtype == torch.bool else bias.to(query.dtype)

    def take(x: Tensor, block: slice) -> Tensor:  # [B, H, N, D] -> [heads of the block, 1, k, D]
        if x.is_contiguous():  # whole rows by number: several times faster on a CPU
            taken = x.view(-1, x.shape[-1]).index_select(0, numbers[block].flatten())
        else:
            taken = x[shared[block] // kv_heads, shared[block] % kv_heads, places[block]]
        return taken.view(-1, 1, budget, x.shape[-1])

    query = query.reshape(rows, 1, 1, -1)
    step = max(1, BLOCK_BYTES // (budget * key.shape[-1] * key.element_size())) if key.device.type == "cpu" else rows
    blocks = [slice(first, first + step) for first in range(0, rows, step)]
    out = [
        sdpa(query[i], take(key, i), take(value, i), attn_mask=None if bias is None else bias[i], scale=scaling)
        for i in blocks
    ]
    return torch.cat(out).view(batch, q_heads, 1, -1)


def _fold(query: Tensor, key: Tensor) -> Tensor:
    """``[B, Hq, 1, D] -> [B, H, G, D]``: a group's queries as rows of the key head that they share."""
    return query.reshape(query.shape[0], key.shape[1], -1, query.shape[-1])


def _hide(shown: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where shown, the dtype's lowest number elsewhere."""
    return torch.zeros(shown.shape, dtype=dtype, device=shown.device).masked_fill_(~shown, torch.finfo(dtype).min)
