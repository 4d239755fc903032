"""Norms of channels-last maps, with and without a bias.

GroupNorm1   mean and variance over (H, W, C) of a sample, a weight (and bias) per channel; group norm of one group
LayerNorm    torch's own, over C: ``nn.LayerNorm(dim, eps=..., bias=...)``
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GroupNorm1"]


class GroupNorm1(nn.Module):
    """Group norm with one group on (B, H, W, C): statistics of the whole sample, affine per channel.

    Args:
        dim: Channels C.
        eps: Added to the variance. Default 1e-5 (PoolFormer); the MetaFormer baselines take 1e-6.
        bias: Whether a bias is learned. The baselines have none.
        device: Torch device.
        dtype: Torch dtype.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 5, 7, 8)
        >>> same = torch.nn.GroupNorm(1, 8)(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        >>> torch.allclose(GroupNorm1(8)(x), same, atol=1e-5)
        True
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        y = F.group_norm(x.permute(0, 3, 1, 2), 1, self.weight, self.bias, self.eps)
        return y.permute(0, 2, 3, 1)
