"""Separable convolution: the inverted bottleneck of MobileNetV2 as a token mixer.

Yu et al., "MetaFormer Baselines for Vision", TPAMI 2024, arXiv:2210.13452 (ConvFormer, CAFormer).

    y = W2 dwconv_k( act( W1 x ) )          W1: C -> 2C, depthwise k x k on 2C, W2: 2C -> C, no biases

Cost at C channels with k = 7: 4C^2 + 98C + 2 parameters, as many multiply-accumulates per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tokenry.layers.star_relu import StarReLU
from tokenry.mixers.registry import Layout, check_input

__all__ = ["SepConvMixer"]


class SepConvMixer(nn.Module):
    """Mix tokens by a depthwise convolution between two pointwise maps.

    Args:
        dim: Channels C.
        expansion_ratio: Width of the depthwise convolution over C. Default 2 (paper).
        kernel_size: Its window in tokens, odd. Default 7 (paper).
        act: Makes the activation after the first map. Default ``StarReLU`` (paper).
        bias: Whether the three maps have one. Default False (paper).
        proj_drop: Dropout rate of the output. Default 0.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: ``kernel_size`` is even or below 1; an input that is not ``(B, H, W, C)``.

    Example:
        >>> import torch
        >>> mixer = SepConvMixer(12)
        >>> sum(p.numel() for p in mixer.parameters()), mixer(torch.randn(2, 6, 9, 12)).shape
        (1754, torch.Size([2, 6, 9, 12]))
    """

    layout = Layout.NHWC
    fixed_tokens = None

    def __init__(
        self,
        dim: int,
        expansion_ratio: float = 2.0,
        kernel_size: int = 7,
        act: Callable[[], nn.Module] | None = None,
        bias: bool = False,
        *,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}; use {max(kernel_size, 0) | 1}")
        self.dim, width = dim, int(expansion_ratio * dim)
        self.pwconv1 = nn.Linear(dim, width, bias=bias, device=device, dtype=dtype)
        self.act1 = StarReLU(device=device, dtype=dtype) if act is None else act()
        self.dwconv = nn.Conv2d(
            width, width, kernel_size, padding=kernel_size // 2, groups=width, bias=bias, device=device, dtype=dtype
        )
        self.pwconv2 = nn.Linear(width, dim, bias=bias, device=device, dtype=dtype)
        self.drop = nn.Dropout(proj_drop)
        for layer in (self.pwconv1, self.dwconv, self.pwconv2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        check_input(self, x, self.dim)
        x = self.act1(self.pwconv1(x))  # (B, H, W, 2C)
        x = self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.drop(self.pwconv2(x))
