"""Attention over parts of the keys, and the exact way to put the parts together.

    part p:   s_p = scale · q k_pᵀ       lse_p = log Σ_j exp(s_pj)       o_p = softmax(s_p) v_p
    whole:    m = max_p lse_p            o = Σ_p o_p · exp(lse_p - m) / Σ_p exp(lse_p - m)

Requests that share a prefix look at one copy of its keys together, and at their own keys apart; merged, it is the
attention over both. The log-sum-exp of each part is all that is needed for that.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["merge_partial_attention", "partial_attention"]

_FUSED = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, bias: Tensor | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of queries over some of their keys, with the log-sum-exp of the scores.

    Args:
        q: ``(B, H, Q, D)``.
        k: ``(B, H, S, D)``.
        v: ``(B, H, S, Dv)``.
        scale: Factor on the scores.
        bias: ``(B or 1, H or 1, Q, S)``, in the dtype of ``q``: added to the scores; minus infinity where a query may
            not look. A query that may look at nothing gets zeros and a log-sum-exp of minus infinity.
        softcap: Scores are ``softcap · tanh(scores / softcap)`` before the bias.

    Returns:
        Output ``(B, H, Q, Dv)`` and log-sum-exp ``(B, H, Q)`` in float32.

    Example:
        >>> q, k = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 3, 2)
        >>> o, lse = partial_attention(q, k, torch.ones(1, 1, 3, 2), scale=1.0)
        >>> o.flatten().tolist(), round(lse.exp().item(), 4)
        ([1.0, 1.0], 3.0)
    """
    if _FUSED is not None and q.device.type == "cpu" and softcap is None and k.shape[-1] == v.shape[-1]:
        out, lse = _FUSED(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
        if bias is not None:  # the fused kernel answers 0 for a query that may look at nothing
            lse = lse.masked_fill(bias.amax(-1) == float("-inf"), float("-inf"))
        return out, lse
    scores = (q @ k.transpose(-1, -2)).float() * scale  # (B, H, Q, S)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1)
    weights = (scores - lse.clamp_min(torch.finfo(lse.dtype).min)[..., None]).exp()
    return weights.to(v.dtype) @ v, lse


def merge_partial_attention(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention over all keys from its parts: exact, whatever the split.

    Args:
        parts: Output ``(..., D)`` and log-sum-exp ``(...)`` of each part, as ``partial_attention`` returns them. Every
            query looks at something in at least one part.

    Returns:
        ``(..., D)``.

    Example:
        >>> two = [(torch.tensor([1.0]), torch.tensor(0.0)), (torch.tensor([4.0]), torch.tensor(2.0).log())]
        >>> merge_partial_attention(two).item()
        3.0
    """
    weights = torch.stack([lse for _, lse in parts]).softmax(0)  # (P, ...)
    whole = torch.stack([o for o, _ in parts]) * weights[..., None]  # (P, ..., D) float32
    return whole.sum(0).to(parts[0][0].dtype)
