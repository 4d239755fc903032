"""Sparse global attention (SparseGSA): attention between channels instead of positions, with ReLU instead of softmax.

Li et al., "DLGSANet: Lightweight Dynamic Local and Global Self-Attention Networks for Image Super-Resolution",
ICCV 2023, arXiv:2301.02031; the channel attention is Restormer's (arXiv:2111.09881), the windows are those of "Test-time
Local Converter" (arXiv:2112.04491).

    q, k, v = DW3x3(W_qkv x)                                 x: (B, C, H, W); per head (c, HW) with c = C / heads
    A = relu( tau q~ k~^T )                                  (c, c); q~, k~ have length 1 over the positions
    out = W_out (A v)                                        A is not normalised: most of it may be zero

The cost is linear in the number of positions. **Evaluation mode differs from training mode** where ``tlc_kernel`` is given:
A is then computed in overlapping windows of about the size of the training patches, each from its own positions alone, and
results are averaged where windows overlap. A map no larger than the window gives the same in both modes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.layers.head_count import head_count
from tokenry.mixers.registry import Layout, check_input

__all__ = ["SparseChannelAttention", "window_starts"]


def window_starts(size: int, kernel: int) -> list[int]:
    """First positions of the overlapping windows that cover an axis.

    ceil(size / kernel) windows at equal steps; the last is moved back so that it ends at the border.

    Args:
        size: Length of the axis.
        kernel: Length of a window; a shorter axis is one window.

    Example:
        >>> window_starts(15, 6), window_starts(10, 6), window_starts(5, 6)
        ([0, 5, 9], [0, 4], [0])
    """
    kernel = min(kernel, size)
    count = -(-size // kernel)
    step = -(-(size - kernel) // max(count - 1, 1))
    starts = [0]
    while starts[-1] + kernel < size:
        starts.append(min(starts[-1] + step, size - kernel))
    return starts


class SparseChannelAttention(nn.Module):
    """Mix channels by attention over all positions, sparse by a ReLU.

    Args:
        dim: Channels C.
        num_heads: Heads; must divide ``dim``. None (default): 6 as in the paper, or the next smaller number that divides.
        tlc_kernel: Side of the windows in evaluation mode. None (default): the whole map in both modes.
        proj_drop: Dropout rate of the output.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: Arguments outside these ranges; an input that is not ``(B, C, H, W)``.

    Example:
        >>> mixer = SparseChannelAttention(24, tlc_kernel=48)
        >>> sum(p.numel() for p in mixer.parameters()), mixer(torch.randn(2, 24, 7, 5)).shape
        (2958, torch.Size([2, 24, 7, 5]))
        >>> mixer.extra_repr()
        'dim=24, num_heads=6, train: whole map, eval: windows of 48x48'
    """

    layout = Layout.NCHW
    fixed_tokens = None

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        tlc_kernel: int | None = None,
        *,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads is None:
            num_heads = max(heads for heads in range(1, 7) if dim % heads == 0)
        head_count(dim, num_heads)
        if tlc_kernel is not None and tlc_kernel < 1:
            raise ValueError(
                f"tlc_kernel must be at least 1, or None for the whole map, got {tlc_kernel}; the paper's are 96, 72 and 48 "
                "for scales 2, 3 and 4"
            )
        self.dim, self.num_heads, self.tlc_kernel = dim, num_heads, tlc_kernel
        dd = {"device": device, "dtype": dtype}
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1, **dd))
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=False, **dd)
        self.qkv_dwconv = nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim, bias=False, **dd)
        self.act: nn.Module = nn.ReLU()
        self.proj_out = nn.Conv2d(dim, dim, 1, bias=False, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """A (B, heads, c, c) from q and k (B, heads, c, N)."""
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return self.act(q @ k.transpose(-2, -1) * self.temperature)

    def attend(self, qkv: Tensor) -> Tensor:
        """(B, 3C, H, W) -> (B, C, H, W): attention over all positions of a map."""
        q, k, v = qkv.flatten(2).unflatten(1, (3, self.num_heads, -1)).unbind(1)  # (B, heads, c, HW) each
        return (self.scores(q, k) @ v).flatten(1, 2).unflatten(-1, qkv.shape[-2:])

    def attend_in_windows(self, qkv: Tensor, kernel: int) -> Tensor:
        """(B, 3C, H, W) -> (B, C, H, W): attention in overlapping windows, averaged where they overlap."""
        batch, channels, height, width = qkv.shape
        rows, columns = window_starts(height, kernel), window_starts(width, kernel)
        if len(rows) == len(columns) == 1:
            return self.attend(qkv)
        high, wide = min(kernel, height), min(kernel, width)
        corners = [(i, j) for i in rows for j in columns]
        windows = torch.cat([qkv[:, :, i : i + high, j : j + wide] for i, j in corners])  # (windows B, 3C, high, wide)
        parts = self.attend(windows).split(batch)
        total = qkv.new_zeros(batch, channels // 3, height, width)
        count = qkv.new_zeros(height, width)
        for (i, j), part in zip(corners, parts, strict=True):
            total[:, :, i : i + high, j : j + wide] += part
            count[i : i + high, j : j + wide] += 1
        return total / count

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        check_input(self, x, self.dim)
        qkv = self.qkv_dwconv(self.qkv(x))
        kernel = None if self.training else self.tlc_kernel
        y = self.attend(qkv) if kernel is None else self.attend_in_windows(qkv, kernel)
        return self.proj_drop(self.proj_out(y))

    def extra_repr(self) -> str:
        """Settings, and what differs between the modes, shown by ``print``."""
        size = self.tlc_kernel
        evaluation = "whole map" if size is None else f"windows of {size}x{size}"
        return f"dim={self.dim}, num_heads={self.num_heads}, train: whole map, eval: {evaluation}"
