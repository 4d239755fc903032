"""Positions for tokens that keep their place on a map: a depthwise convolution with a skip.

    y = x + dwconv_k(x)          x, y: (B, C, H, W); zeros outside the map

The padding tells a token how far the border is, the kernel who its neighbours are, at any size of map: nothing has to be
resized for another resolution. Chu et al., "Conditional Positional Encodings for Vision Transformers", 2021,
arXiv:2102.10882; with a skip in UniFormer (Li et al., 2022, arXiv:2201.09450) and DaViT (Ding et al., 2022,
arXiv:2204.03645).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ConvPosEnc"]


class ConvPosEnc(nn.Module):
    """``x + dwconv(x)`` on (B, C, H, W), with a bias; with ``frames`` on (B, C, T, H, W).

    Args:
        dim: Channels C.
        kernel_size: Side of the kernel, odd. Default 3 (both papers).
        frames: Whether time is a third dimension of the map, and of the kernel. Default False.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: ``kernel_size`` is even or below 1.

    Example:
        >>> import torch
        >>> position = ConvPosEnc(16)
        >>> sum(p.numel() for p in position.parameters()), position(torch.zeros(2, 16, 5, 7)).shape
        (160, torch.Size([2, 16, 5, 7]))
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        frames: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}; use {max(kernel_size, 0) | 1}")
        conv = nn.Conv3d if frames else nn.Conv2d
        self.proj = conv(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The shape stays."""
        y = self.proj(x)
        # in place, a map less to write, except where autocast has made y of a shorter type
        return y.add_(x) if y.dtype == x.dtype else x + y
