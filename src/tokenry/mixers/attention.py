"""Self-attention over all tokens.

Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762; as the mixer of CAFormer (Yu et al.,
"MetaFormer Baselines for Vision", TPAMI 2024, arXiv:2210.13452) and of the hybrids of arXiv:2111.11418.

    q, k, v = x Wq, x Wk, x Wv              per head of width d = 32; A = d * heads, heads = max(1, C // d)
    y       = softmax(q k^T / sqrt(d)) v Wo          x, y: (B, N, C); Wo: A -> C

Where C is no multiple of d the attention is narrower than C. Cost: 4 C A parameters, N * 4 C A + 2 N^2 A
multiply-accumulates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.mixers.registry import Layout, check_input

__all__ = ["AttentionMixer"]


class AttentionMixer(nn.Module):
    """Mix tokens by multi-head self-attention, fused where torch has a kernel for it.

    Args:
        dim: Channels C.
        head_dim: Width d of a head. Default 32 (both papers).
        num_heads: Number of heads. None: ``max(1, dim // head_dim)``.
        qkv_bias: Whether queries, keys and values have a bias. Default False.
        proj_bias: Whether the output map has one. Default False (CAFormer); the earlier hybrids have one.
        attn_drop: Dropout rate of the attention weights in training. Default 0.
        proj_drop: Dropout rate of the output. Default 0.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: ``head_dim`` or ``num_heads`` is below 1; an input that is not ``(B, N, C)``.

    Example:
        >>> import torch
        >>> mixer = AttentionMixer(48)                 # one head of 32: narrower than 48
        >>> mixer.num_heads, mixer(torch.randn(2, 15, 48)).shape
        (1, torch.Size([2, 15, 48]))
    """

    layout = Layout.NLC
    fixed_tokens = None

    def __init__(
        self,
        dim: int,
        head_dim: int = 32,
        num_heads: int | None = None,
        qkv_bias: bool = False,
        proj_bias: bool = False,
        attn_drop: float = 0.0,
        *,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if head_dim < 1 or (num_heads is not None and num_heads < 1):
            raise ValueError(f"head_dim and num_heads must be at least 1, got {head_dim} and {num_heads}")
        self.dim, self.head_dim = dim, head_dim
        self.num_heads = num_heads or max(1, dim // head_dim)
        self.attn_drop = attn_drop
        width = self.num_heads * head_dim
        self.qkv = nn.Linear(dim, 3 * width, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(width, dim, bias=proj_bias, device=device, dtype=dtype)
        self.drop = nn.Dropout(proj_drop)
        for linear in (self.qkv, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, C) -> queries, keys and values (3, B, heads, N, d)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))  # (B, N, 3, heads, d)
        return qkv.permute(2, 0, 3, 1, 4)

    def received(self, x: Tensor) -> Tensor:
        """What every token of (B, N, C) receives, averaged over heads and queries: (B, N)."""
        q, k, _ = self._heads(x)
        weights = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1)  # (B, heads, N, N)
        return weights.mean((1, 2))

    def token_maps(self, x: Tensor) -> dict[str, Tensor]:
        """``attention`` (B, N): what every token receives, averaged over heads and queries."""
        return {"attention": self.received(x)}

    def attend(self, x: Tensor) -> Tensor:
        """Attention among the tokens of each sequence: (B, N, C) -> (B, N, C)."""
        q, k, v = self._heads(x)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        return self.drop(self.proj(y.transpose(1, 2).flatten(2)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        check_input(self, x, self.dim)
        return self.attend(x)
