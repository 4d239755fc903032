"""Heads for backbones that give several maps of different resolution at once: heatmaps and segmentation.

Wang et al., "Deep High-Resolution Representation Learning for Visual Recognition", 2019, arXiv:1908.07919 (HRNet).

    heatmaps = conv1x1(x_1)                                                 the map of highest resolution alone
    logits = conv1x1( ReLU( BN( conv1x1( [x_1, up(x_2), up(x_3), ...] ) ) ) )     all maps, resized to the first

Both work at the resolution of the first map, a quarter of the image's for HRVMamba and timm's HRNets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.layers import ConvNorm

__all__ = ["HeatmapHead", "SegmentationHead"]


class HeatmapHead(nn.Module):
    """A heatmap per keypoint from the first map.

    Args:
        widths: Channels of the maps, as ``feature_info.channels()`` gives them.
        num_keypoints: Heatmaps.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: No widths, or fewer than one keypoint.

    Example:
        >>> HeatmapHead([8, 16], 17)([torch.zeros(1, 8, 16, 12), torch.zeros(1, 16, 8, 6)]).shape
        torch.Size([1, 17, 16, 12])
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_keypoints: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(widths, num_keypoints, "num_keypoints")
        self.widths = tuple(widths)
        self.conv = nn.Conv2d(widths[0], num_keypoints, 1, device=device, dtype=dtype)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C_i, H_i, W_i) -> (B, num_keypoints, H_1, W_1)."""
        _check_maps(maps, self.widths)
        return self.conv(maps[0])


class SegmentationHead(nn.Module):
    """Class scores per position from all maps.

    Args:
        widths: Channels of the maps, as ``feature_info.channels()`` gives them.
        num_classes: Classes.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: No widths, or fewer than one class.

    Example:
        >>> SegmentationHead([8, 16], 21).eval()([torch.zeros(1, 8, 16, 12), torch.zeros(1, 16, 8, 6)]).shape
        torch.Size([1, 21, 16, 12])
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(widths, num_classes, "num_classes")
        self.widths = tuple(widths)
        total = sum(widths)
        self.mix = ConvNorm(total, total, device=device, dtype=dtype)
        self.act = nn.ReLU()
        self.conv = nn.Conv2d(total, num_classes, 1, device=device, dtype=dtype)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C_i, H_i, W_i) -> (B, num_classes, H_1, W_1)."""
        _check_maps(maps, self.widths)
        size = maps[0].shape[-2:]
        rest = [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in maps[1:]]
        return self.conv(self.act(self.mix(torch.cat([maps[0], *rest], dim=1))))


def _check(widths: Sequence[int], outputs: int, name: str) -> None:
    if not widths or min(widths) < 1 or outputs < 1:
        raise ValueError(f"widths takes a positive entry per map and {name} is at least 1, got {widths} and {outputs}")


def _check_maps(maps: Sequence[Tensor], widths: tuple[int, ...]) -> None:
    found = tuple(x.shape[1] for x in maps)
    if found != widths:
        raise ValueError(
            f"the head was made for maps with {widths} channels, got {found}; make it with the backbone's "
            "feature_info.channels()"
        )
