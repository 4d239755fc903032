"""Pooling: a token mixer without parameters.

Yu et al., "MetaFormer Is Actually What You Need for Vision", CVPR 2022, arXiv:2111.11418.

    y = AvgPool_k(x) - x                    x, y: (B, C, H, W)

The block adds ``x`` back, so the mixer subtracts it. At the border only existing positions are averaged. Cost: k^2
additions per number and no multiplication worth counting.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.mixers.registry import Layout, check_input

__all__ = ["PoolingMixer", "pooling"]


def pooling(x: Tensor, pool_size: int = 3) -> Tensor:
    """Mean of the window around each position, minus the position itself.

    Args:
        x: (B, C, H, W).
        pool_size: Side of the window, odd.
    """
    pooled = F.avg_pool2d(x, pool_size, stride=1, padding=pool_size // 2, count_include_pad=False)
    return pooled.sub_(x)


class PoolingMixer(nn.Module):
    """Mix tokens by average pooling (PoolFormer).

    Args:
        dim: Channels C; not needed, as there are no parameters.
        pool_size: Side of the window in tokens, odd. Default 3 (paper, all sizes).
        proj_drop: Accepted as every mixer does; there is no projection to drop.
        device: Accepted as every mixer does.
        dtype: Accepted as every mixer does.

    Raises:
        ValueError: ``pool_size`` is even or below 1; an input that is not ``(B, C, H, W)``.

    Example:
        >>> import torch
        >>> PoolingMixer()(torch.ones(1, 2, 4, 4)).abs().max().item()
        0.0
    """

    layout = Layout.NCHW
    fixed_tokens = None

    def __init__(
        self,
        dim: int | None = None,
        pool_size: int = 3,
        *,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if pool_size < 1 or pool_size % 2 == 0:
            raise ValueError(
                f"pool_size must be odd and positive, got {pool_size}: an even window has no middle; "
                f"use {max(pool_size, 0) | 1}"
            )
        self.pool_size = pool_size

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        check_input(self, x)
        return pooling(x, self.pool_size)

    def extra_repr(self) -> str:
        """Settings shown by ``repr``."""
        return f"pool_size={self.pool_size}"
