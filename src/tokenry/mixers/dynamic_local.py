"""Dynamic local attention (MHDLSA): each position is convolved with a kernel that was computed for it.

Li et al., "DLGSANet: Lightweight Dynamic Local and Global Self-Attention Networks for Image Super-Resolution",
ICCV 2023, arXiv:2301.02031.

    u = W_in x                                                 x: (B, C, H, W)
    k = W_expand( DW( W_reduce u ) )                           C -> C/4 -> C/4 -> G K^2: no norm, no activation
    o[c, y, x] = sum over i, j of  k[g(c), i, j, y, x] * u[c, y + i - K//2, x + j - K//2]
    out = W_out o

G = C / channels_per_group kernels of K x K per position, each for ``channels_per_group`` consecutive channels. The authors'
option "heads" is this number of channels, not the number of kernels. There is no softmax: the kernels are free numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenry.kernels.dynamic_dwconv import dynamic_dwconv
from tokenry.layers.head_count import head_count
from tokenry.mixers.registry import Layout, check_input

__all__ = ["DynamicLocalAttention"]

REDUCTION = 4


class DynamicLocalAttention(nn.Module):
    """Mix tokens by a depthwise convolution whose kernels depend on the position's surroundings.

    Args:
        dim: Channels C, at least 4. The kernels are made through C // 4 channels.
        kernel_size: Side K of the kernels, odd. Default 7 (paper).
        channels_per_group: Channels that share a kernel; must divide ``dim``. None (default): 6 as in the paper, or the
            next smaller number that divides.
        proj_drop: Dropout rate of the output.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: Arguments outside these ranges; an input that is not ``(B, C, H, W)``.

    Example:
        >>> mixer = DynamicLocalAttention(24)
        >>> sum(p.numel() for p in mixer.parameters()), mixer(torch.randn(2, 24, 7, 5)).shape
        (2974, torch.Size([2, 24, 7, 5]))
    """

    layout = Layout.NCHW
    fixed_tokens = None

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        channels_per_group: int | None = None,
        *,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < REDUCTION:
            raise ValueError(
                f"dim must be at least {REDUCTION} (kernels are made through dim // {REDUCTION} channels), got {dim}"
            )
        if channels_per_group is None:
            channels_per_group = max(size for size in range(1, 7) if dim % size == 0)
        head_count(dim, channels_per_group, name="channels_per_group")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}; use {max(kernel_size, 0) | 1}")
        self.dim, self.kernel_size, self.channels_per_group = dim, kernel_size, channels_per_group
        self.groups = dim // channels_per_group
        hidden, dd = dim // REDUCTION, {"device": device, "dtype": dtype}
        self.proj_in = nn.Conv2d(dim, dim, 1, bias=False, **dd)
        self.reduce = nn.Conv2d(dim, hidden, 1, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, kernel_size, padding=kernel_size // 2, groups=hidden, **dd)
        self.expand = nn.Conv2d(hidden, self.groups * kernel_size**2, 1, **dd)
        self.proj_out = nn.Conv2d(dim, dim, 1, bias=False, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def kernels(self, u: Tensor) -> Tensor:
        """The kernels (B, G, K, K, H, W) for a projected map (B, C, H, W)."""
        side = self.kernel_size
        return self.expand(self.dwconv(self.reduce(u))).unflatten(1, (self.groups, side, side))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        check_input(self, x, self.dim)
        u = self.proj_in(x.contiguous())  # the kernels' sums run along rows
        y = dynamic_dwconv(u, self.kernels(u), padding=self.kernel_size // 2)
        return self.proj_drop(self.proj_out(y))

    def extra_repr(self) -> str:
        """Settings shown by ``print``."""
        return f"dim={self.dim}, kernel_size={self.kernel_size}, channels_per_group={self.channels_per_group}"
