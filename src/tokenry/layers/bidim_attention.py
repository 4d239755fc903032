"""Bi-dimensional attention: gates over channels and over positions on the output of a feed-forward network.

Huang et al., "LightViT: Towards Light-Weight Convolution-Free Vision Transformers", 2022, arXiv:2207.05557. On tokens
f (B, N, C), with f' = LayerNorm(f) and r = int(C / 4) reduced channels:

    a = GELU( W_g mean_N f' )   (B, 1, r)           l = GELU( W_l f' )   (B, N, r)
    y = f * sigmoid( W_c a ) * sigmoid( W_s [l, a] )                    one gate per channel, one per position
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.layers.mlp import ChannelMLP

__all__ = ["BiDimAttention", "BiDimMLP"]


class BiDimAttention(nn.Module):
    """Gate channels and positions of tokens: (..., N, C) -> (..., N, C).

    Args:
        dim: Channels C.
        ratio: Reduced channels over C. Default 0.25.
        device: Torch device.
        dtype: Torch dtype.

    Example:
        >>> BiDimAttention(8)(torch.randn(2, 6, 8)).shape
        torch.Size([2, 6, 8])
    """

    def __init__(
        self,
        dim: int,
        ratio: float = 0.25,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        reduced = max(1, int(dim * ratio))
        self.norm = nn.LayerNorm(dim, **dd)
        self.global_reduce = nn.Linear(dim, reduced, **dd)
        self.local_reduce = nn.Linear(dim, reduced, **dd)
        self.channel_select = nn.Linear(reduced, dim, **dd)
        self.spatial_select = nn.Linear(2 * reduced, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        normed = self.norm(x)
        overall = F.gelu(self.global_reduce(normed.mean(1, keepdim=True)))  # (B, 1, r)
        own = F.gelu(self.local_reduce(normed))  # (B, N, r)
        channels = self.channel_select(overall).sigmoid()  # (B, 1, C)
        positions = self.spatial_select(torch.cat([own, overall.expand_as(own)], -1)).sigmoid()  # (B, N, 1)
        return x * channels * positions


class BiDimMLP(ChannelMLP):
    """``BiDimAttention`` of a channel MLP's output: (B, N, C) -> (B, N, C).

    Args:
        dim: Channels C.
        hidden: Width between. Default 4 C.
        ratio: Reduced channels of the gates over C. Default 0.25.
        drop: Dropout rate in the MLP.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        ratio: float = 0.25,
        drop: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, hidden, drop=drop, device=device, dtype=dtype)
        self.attn = BiDimAttention(dim, ratio, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.attn(super().forward(x))
