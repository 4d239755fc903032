"""Mix-shift: groups of channels are shifted by different distances and convolved with kernels of different sizes.

Zheng et al., "Mixing and Shifting: Exploiting Global and Local Dependencies in Vision MLPs", 2022, arXiv:2202.06510.

    x_1 ... x_G = split(x)                                          G groups of channels, see below
    y = cat_g( dw_g( shift_W(x_g, s_g) ) ) + cat_g( dw'_g( shift_H(x_g, s_g) ) )          x, y: (B, C, H, W)

dw_g and dw'_g are depthwise k_g x k_g convolutions with bias; a shift is circular: what leaves the map on one side comes
in on the other. Kernels go with shifts by their place in the list, so that with the published lists the group shifted by
-2 has the smallest kernel and the one shifted by +2 the largest. Groups have ceil(C / G) channels and the last one fewer, as
in the authors' code; where that gives fewer than G groups (16 channels and five shifts, where the authors' code fails) they
differ by one channel at most.

Cost with group widths c_g: sum of 2 c_g (k_g^2 + 1) parameters, N times the sum of 2 c_g k_g^2 multiply-accumulates.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.mixers.registry import Layout, check_input

__all__ = ["MixShift", "shift_map"]


def shift_map(x: Tensor, distance: int, dim: int, wrap: bool = True) -> Tensor:
    """Move a map's content along one axis.

    Args:
        x: (B, C, H, W).
        distance: By how many positions, towards larger indices. More than the axis is long wraps around more than once.
        dim: 2 (down) or 3 (right).
        wrap: Whether what leaves comes in on the other side; else zeros come in.

    Example:
        >>> shift_map(torch.tensor([[[[1, 2, 3]]]]), 1, 3).tolist()
        [[[[3, 1, 2]]]]
    """
    if distance == 0:
        return x
    if wrap:
        return x.roll(distance, dim)
    size = x.shape[dim]
    kept = max(0, size - abs(distance))
    moved = x.narrow(dim, 0 if distance > 0 else size - kept, kept)
    before, after = (size - kept, 0) if distance > 0 else (0, size - kept)
    return F.pad(moved, (before, after) if dim == 3 else (0, 0, before, after))


def _split(dim: int, groups: int) -> list[int]:
    """Channels per group."""
    if dim < groups:
        raise ValueError(
            f"every shift needs channels: got dim={dim} for {groups} shifts; use a dim of at least {groups}"
        )
    each = -(-dim // groups)
    if -(-dim // each) == groups:
        return [min(each, dim - start) for start in range(0, dim, each)]
    return [dim // groups + (g < dim % groups) for g in range(groups)]


class MixShift(nn.Module):
    """Mix tokens by shifted groups of channels and depthwise convolutions along both axes.

    Args:
        dim: Channels C; at least as many as there are shifts.
        shifts: Distance of each group, in tokens. Default (-2, -1, 0, 1, 2) (paper).
        kernel_sizes: Side of each group's kernel, odd. Default (1, 3, 3, 5, 7), the paper's second stage.
        wrap: Whether shifts are circular (paper); else zeros come in.
        proj_drop: Accepted as every mixer does; there is no projection to drop.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: Lists of different lengths, an even kernel, or fewer channels than shifts; an input that is not
            ``(B, C, H, W)``.

    Example:
        >>> MixShift(14)(torch.randn(2, 14, 6, 9)).shape
        torch.Size([2, 14, 6, 9])
    """

    layout = Layout.NCHW
    fixed_tokens = None

    def __init__(
        self,
        dim: int,
        shifts: Sequence[int] = (-2, -1, 0, 1, 2),
        kernel_sizes: Sequence[int] = (1, 3, 3, 5, 7),
        wrap: bool = True,
        *,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(shifts) != len(kernel_sizes) or not shifts:
            raise ValueError(f"every shift needs a kernel size, got {list(shifts)} and {list(kernel_sizes)}")
        if any(k < 1 or k % 2 == 0 for k in kernel_sizes):
            raise ValueError(f"kernel_sizes must be odd and positive, got {list(kernel_sizes)}")
        self.widths = _split(dim, len(shifts))
        self.shifts, self.kernel_sizes, self.wrap = tuple(shifts), tuple(kernel_sizes), wrap

        def convolutions() -> nn.ModuleList:
            return nn.ModuleList(
                nn.Conv2d(c, c, k, padding=k // 2, groups=c, device=device, dtype=dtype)
                for c, k in zip(self.widths, kernel_sizes, strict=True)
            )

        self.dwconv_lr, self.dwconv_td = convolutions(), convolutions()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        check_input(self, x, sum(self.widths))
        parts = x.split(self.widths, dim=1)
        outputs = []
        # Neighbouring groups with kernels of one size are one convolution, for both directions: few large ones are
        # faster than many small ones.
        for size, found in groupby(range(len(parts)), key=lambda g: self.kernel_sizes[g]):
            run = list(found)
            moved = [shift_map(parts[g], self.shifts[g], dim, self.wrap) for dim in (3, 2) for g in run]
            convolutions = [side[g] for side in (self.dwconv_lr, self.dwconv_td) for g in run]
            weight = torch.cat([c.weight for c in convolutions])  # type: ignore[misc]  # (2c, 1, k, k)
            bias = torch.cat([c.bias for c in convolutions])  # type: ignore[misc]
            y = torch.cat(moved, dim=1)  # (B, 2c, H, W)
            if size == 1:
                y = torch.addcmul(bias[:, None, None], y, weight[:, 0])
            else:
                y = F.conv2d(y, weight, bias, padding=size // 2, groups=len(weight))
            along_width, along_height = y.chunk(2, dim=1)
            outputs.append(along_width + along_height)
        return torch.cat(outputs, dim=1)

    def extra_repr(self) -> str:
        """Settings shown by ``repr``."""
        return f"shifts={self.shifts}, kernel_sizes={self.kernel_sizes}, wrap={self.wrap}"
