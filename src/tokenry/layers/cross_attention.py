"""Multi-head attention of one sequence over another.

softmax( (x W_q) (context W_k)^T / sqrt(d) ) (context W_v) W_o          per head of width d
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.layers.head_count import head_count

__all__ = ["CrossAttention"]


class CrossAttention(nn.Module):
    """Attention of one sequence over another of the same width, with a linear map each for queries, keys, values, output.

    Args:
        dim: Channels C.
        num_heads: Heads; must divide ``dim``. None: heads of 32 channels where 32 divides ``dim``, else one.
        attn_drop: Dropout rate of the attention weights in training. Default 0.
        proj_drop: Dropout rate of the output. Default 0.
        device: Torch device.
        dtype: Torch dtype.

    Example:
        >>> CrossAttention(8, 2)(torch.randn(2, 24, 8), torch.randn(2, 12, 8)).shape
        torch.Size([2, 24, 8])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.attn_drop = head_count(dim, num_heads), attn_drop
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim, device=device, dtype=dtype) for _ in range(4))
        self.proj_drop = nn.Dropout(proj_drop)
        for linear in (self.q, self.k, self.v, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, n, d)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, N, C), (B, G, C) -> (B, N, C)."""
        q, k, v = self._heads(self.q(x)), self._heads(self.k(context)), self._heads(self.v(context))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))
