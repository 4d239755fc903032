"""Convolutional GLU: a channel mixer gated by what is around each position.

Shi, "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", CVPR 2024, arXiv:2311.17132.

    a, v = split(x W1)                       r = int(2 hidden / 3) channels each
    y    = (GELU(dwconv3x3(a)) * v) W2       x, y: (B, C, H, W)

A gated linear unit whose gate sees its eight neighbours. r is two thirds of the hidden width of an MLP, so that both have
about as many parameters: 3 r C instead of 2 hidden C, and 10 r for the convolution.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["ConvGLU"]


class ConvGLU(nn.Module):
    """``fc2(act(dwconv(a)) * v)`` with ``a, v = fc1(x)`` on maps (B, C, H, W).

    Args:
        dim: Channels C.
        hidden: Width of the MLP that it stands for; the two branches have int(2 hidden / 3). Default 4 C.
        act: Makes the activation of the gate. Default GELU.
        drop: Dropout after the product and after the output. Default 0.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: ``hidden`` below 2, which leaves the branches no channel.

    Example:
        >>> layer = ConvGLU(24, 96)
        >>> layer.dwconv.out_channels, layer(torch.randn(2, 24, 7, 5)).shape
        (64, torch.Size([2, 24, 7, 5]))
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        act: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        width = int(2 * hidden / 3)
        if width < 1:
            raise ValueError(f"hidden must be at least 2, got {hidden}; an MLP's usual 4 * dim is {4 * dim}")
        self.fc1 = nn.Linear(dim, 2 * width, device=device, dtype=dtype)
        self.dwconv = nn.Conv2d(width, width, 3, padding=1, groups=width, device=device, dtype=dtype)
        self.act = act()
        self.fc2 = nn.Linear(width, dim, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        gate, value = self.fc1(x.permute(0, 2, 3, 1)).chunk(2, -1)  # (B, H, W, r) each
        gate = self.act(self.dwconv(gate.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        return self.drop(self.fc2(self.drop(gate * value))).permute(0, 3, 1, 2)
