"""The body of high-resolution networks: branches of several resolutions side by side that exchange their maps.

Wang et al., "Deep High-Resolution Representation Learning for Visual Recognition", 2019, arXiv:1908.07919 (HRNet), with the
light exchange of Yuan et al., "HRFormer", NeurIPS 2021, arXiv:2110.09408. After its blocks, branch i receives all:

    y_i = ReLU( sum_j fuse_ij(x_j) )        up: 1x1 convolution, bilinear; down: depthwise 3x3 of stride 2 and 1x1, repeated

x_i: (B, C_i, H / 2^i, W / 2^i). What runs inside a branch is the network's own block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.models.resnet import Bottleneck
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.layers import ConvNorm

__all__ = ["Neck", "ParallelBlock", "Transition", "bottleneck", "conv_act"]


def conv_act(in_chans: int, out_chans: int, kernel_size: int, stride: int, **dd: Any) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(ConvNorm(in_chans, out_chans, kernel_size, stride, bias=False, **dd), nn.ReLU())


class Transition(nn.Module):
    """Give every branch its width and add branches at half the lowest resolution: maps -> more maps."""

    def __init__(self, before: Sequence[int], after: Sequence[int], **dd: Any) -> None:
        super().__init__()
        kept = zip(before, after, strict=False)
        convs: list[nn.Module] = [nn.Identity() if a == b else conv_act(a, b, 3, 1, **dd) for a, b in kept]
        convs += [conv_act(before[-1], width, 3, 2, **dd) for width in after[len(before) :]]
        self.convs = nn.ModuleList(convs)

    def forward(self, maps: Tensor | list[Tensor]) -> list[Tensor]:
        """One map, or those of the branches so far, to those of all branches."""
        maps = [maps] if isinstance(maps, Tensor) else maps
        return [conv(maps[min(i, len(maps) - 1)]) for i, conv in enumerate(self.convs)]


class Down(nn.Sequential):
    """Halve a map: depthwise 3x3 convolution of stride 2, 1x1 convolution, perhaps ReLU."""

    def __init__(self, in_chans: int, out_chans: int, act: bool, **dd: Any) -> None:
        super().__init__(
            ConvNorm(in_chans, in_chans, 3, 2, groups=in_chans, bias=False, **dd),
            ConvNorm(in_chans, out_chans, bias=False, **dd),
            nn.ReLU() if act else nn.Identity(),
        )


class ParallelBlock(nn.Module):
    """Blocks in every branch, then each branch receives all: maps -> maps of the same shapes.

    Args:
        widths: Channels of the branches.
        drop_paths: Stochastic depth of each branch's blocks, one entry per block.
        make: Makes a block from its width and stochastic depth.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        widths: Sequence[int],
        drop_paths: Sequence[float],
        make: Callable[[int, float], nn.Module],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.branches = nn.ModuleList(nn.Sequential(*(make(width, p) for p in drop_paths)) for width in widths)

        def fuse(i: int, j: int) -> nn.Module:
            if i == j:
                return nn.Identity()
            if i < j:
                return ConvNorm(widths[j], widths[i], bias=False, **dd)
            last = i - j - 1
            return nn.Sequential(
                *(Down(widths[j], widths[i] if k == last else widths[j], k < last, **dd) for k in range(i - j))
            )

        count = range(len(widths))
        self.fuse = nn.ModuleList(nn.ModuleList(fuse(i, j) for j in count) for i in count)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """A list of (B, C_i, H_i, W_i) to the same shapes."""
        maps = [branch(x) for branch, x in zip(self.branches, maps, strict=True)]
        fused = []
        for i, row in enumerate(self.fuse.children()):
            size, total = maps[i].shape[-2:], maps[i]
            for j, resize in enumerate(row.children()):
                if j != i:
                    y = resize(maps[j])
                    total = total + (F.interpolate(y, size, mode="bilinear", align_corners=False) if j > i else y)
            fused.append(torch.relu(total))
        return fused


class Neck(nn.Module):
    """Four maps to one of stride 32 for a classifier.

    Args:
        widths: Channels of the four maps.
        planes: Inner width of the first bottleneck; the others' double each time. The result has 64 times as many channels.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(self, widths: Sequence[int], planes: int, **dd: Any) -> None:
        super().__init__()
        inner = [planes << i for i in range(len(widths))]
        self.increase = nn.ModuleList(bottleneck(w, p, **dd) for w, p in zip(widths, inner, strict=True))
        self.down = nn.ModuleList(conv_act(4 * a, 4 * b, 3, 2, **dd) for a, b in pairwise(inner))
        self.final = conv_act(4 * inner[-1], 8 * inner[-1], 1, 1, **dd)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps (B, C_i, H / 2^i, W / 2^i) -> (B, 64 planes, H / 8, W / 8)."""
        x = self.increase[0](maps[0])
        for down, increase, extra in zip(self.down, self.increase[1:], maps[1:], strict=True):
            x = down(x) + increase(extra)
        return self.final(x)


def bottleneck(in_chans: int, planes: int, **dd: Any) -> Bottleneck:
    """ResNet's block to 4 ``planes`` channels, with a convolution in the skip where the widths differ."""
    out = 4 * planes
    skip = None if in_chans == out else ConvNorm(in_chans, out, bias=False, **dd)
    return Bottleneck(in_chans, planes, downsample=skip, **dd)
