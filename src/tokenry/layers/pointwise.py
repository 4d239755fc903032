"""1x1 convolutions that are linear maps over channels where the memory order makes that free.

    y[b, :, i, j] = W x[b, :, i, j] + bias           x: (B, C, H, W)

A map with channels last in memory is already the matrix (B H W, C) that a linear map takes. Torch's convolution on one CPU
thread copies it to the other order and back instead.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.layers.in_place_gelu import InPlaceGELU

__all__ = ["Pointwise", "Pointwise3d", "PointwiseMLP"]


class Pointwise(nn.Conv2d):
    """``nn.Conv2d(in_chans, out_chans, 1)``, with the same parameters: (B, C, H, W) -> (B, C', H, W).

    Args:
        in_chans: Channels C.
        out_chans: Channels C'.
        bias: Whether there is one.
        device: Torch device.
        dtype: Torch dtype.

    Example:
        >>> layer, x = Pointwise(3, 8), torch.randn(2, 3, 5, 7).contiguous(memory_format=torch.channels_last)
        >>> torch.allclose(layer(x), torch.nn.functional.conv2d(x, layer.weight, layer.bias), atol=1e-6)
        True
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_chans, out_chans, 1, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W), in the memory order of ``input``."""
        if input.device.type == "cpu" and input.is_contiguous(memory_format=torch.channels_last):
            return F.linear(input.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        return super().forward(input)


class Pointwise3d(nn.Conv3d):
    """``nn.Conv3d(in_chans, out_chans, 1)``, with the same parameters: (B, C, T, H, W) -> (B, C', T, H, W).

    Args:
        in_chans: Channels C.
        out_chans: Channels C'.
        bias: Whether there is one.
        device: Torch device.
        dtype: Torch dtype.

    Example:
        >>> layer, x = Pointwise3d(3, 8), torch.randn(2, 3, 4, 5, 7).contiguous(memory_format=torch.channels_last_3d)
        >>> torch.allclose(layer(x), torch.nn.functional.conv3d(x, layer.weight, layer.bias), atol=1e-6)
        True
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_chans, out_chans, 1, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T, H, W), in the memory order of ``input``."""
        if input.device.type == "cpu" and input.is_contiguous(memory_format=torch.channels_last_3d):
            return F.linear(input.permute(0, 2, 3, 4, 1), self.weight.flatten(1), self.bias).permute(0, 4, 1, 2, 3)
        return super().forward(input)


class PointwiseMLP(nn.Module):
    """``fc2(gelu(fc1(x)))`` over the channels of (B, C, H, W): every position on its own.

    Args:
        dim: Channels C.
        hidden: Width between.
        drop: Dropout rate after the activation and the output.
        layer: Makes the two maps. ``Pointwise3d`` takes clips (B, C, T, H, W).
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        drop: float = 0.0,
        layer: type[Pointwise | Pointwise3d] = Pointwise,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = layer(dim, hidden, device=device, dtype=dtype)
        self.act = InPlaceGELU()
        self.fc2 = layer(hidden, dim, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
