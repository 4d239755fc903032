"""Four depthwise convolutions of growing kernels, each on a quarter of the channels.

    y = GELU( shuffle( [DW3(x_1), DW5(x_2), DW7(x_3), DW9(x_4)] ) )          x, y: (B, C, H, W)

The shuffle deals the quarters out in turn, so that the next layer that splits its channels sees every kernel in every
part. Zhang et al., "HRVMamba: High-Resolution Visual State Space Model for Dense Prediction", 2024, arXiv:2410.03174.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["MultiScaleDWConv"]

KERNELS = (3, 5, 7, 9)


class MultiScaleDWConv(nn.Module):
    """Depthwise convolutions of 3, 5, 7 and 9 positions a side, channel shuffle, GELU.

    Args:
        dim: Channels C, a multiple of 4.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: ``dim`` is no multiple of 4.

    Example:
        >>> layer = MultiScaleDWConv(8)
        >>> sum(p.numel() for p in layer.parameters()), layer(torch.zeros(1, 8, 5, 7)).shape
        (336, torch.Size([1, 8, 5, 7]))
    """

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        parts = len(KERNELS)
        if dim < parts or dim % parts:
            raise ValueError(f"dim must be a multiple of {parts} (four kernels share the channels), got {dim}")
        part = dim // parts
        self.convs = nn.ModuleList(
            nn.Conv2d(part, part, k, padding=k // 2, groups=part, device=device, dtype=dtype) for k in KERNELS
        )
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        parts = [conv(part) for conv, part in zip(self.convs, x.chunk(len(KERNELS), dim=1), strict=True)]
        return self.act(torch.stack(parts, dim=2).flatten(1, 2))  # channel c of part i becomes channel 4 c + i
