"""Dynamic depthwise convolution: a depthwise convolution whose kernel is another one at every position.

Han et al., "On the Connection between Local Attention and Dynamic Depth-wise Convolution", ICLR 2022, arXiv:2106.04263.

    out[b, c, y, x] = sum over i, j of  weight[b, g(c), i, j, y, x] * input[b, c, s y + d i - p, s x + d j - p]

with stride s, dilation d, zero padding p, and g(c) the group of channel c: consecutive channels share a kernel.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from tokenry.kernels.sliding_window import window_sum

__all__ = ["dynamic_dwconv"]


def dynamic_dwconv(
    x: Tensor,
    weight: Tensor,
    padding: int | tuple[int, int] = 0,
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """Convolve every position of ``x`` with its own kernel.

    Args:
        x: ``(B, C, H, W)``.
        weight: ``(B, G, kh, kw, H', W')``: a kernel per image, group of C / G channels and output position.
        padding: Zeros around the map; one number, or one for each axis.
        stride: Step between output positions.
        dilation: Step between the taps of a kernel.

    Returns:
        ``(B, C, H', W')``.

    Raises:
        ValueError: Shapes that do not fit each other; a weight whose size is not that of the output.

    Example:
        >>> import torch
        >>> x, kernel = torch.randn(2, 6, 8, 9), torch.randn(3, 5, 3)
        >>> everywhere = kernel[None, :, :, :, None, None].expand(2, 3, 5, 3, 8, 9)
        >>> same = torch.nn.functional.conv2d(x, kernel.repeat_interleave(2, 0)[:, None], padding=(2, 1), groups=6)
        >>> torch.allclose(dynamic_dwconv(x, everywhere, padding=(2, 1)), same, atol=1e-5)
        True
    """
    if x.ndim != 4 or weight.ndim != 6:
        raise ValueError(
            f"dynamic_dwconv takes x (B, C, H, W) and weight (B, G, kh, kw, H', W'), got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    groups, kernel = weight.shape[1], (weight.shape[2], weight.shape[3])
    if groups == 0 or x.shape[1] % groups:
        raise ValueError(
            f"the number of groups must divide the channels, got {groups} groups of kernels for {x.shape[1]} channels"
        )
    rows, columns = (padding, padding) if isinstance(padding, int) else padding
    # With the zeros laid around the map once, every tap covers the whole output: long runs of memory instead of cut rows.
    padded = F.pad(x.contiguous(), (columns, columns, rows, rows))
    values = padded.unflatten(1, (groups, -1))  # (B, G, C/G, H + 2p, W + 2p)
    kernels = weight.flatten(2, 3).contiguous()  # (B, G, kh kw, H', W')
    return window_sum(kernels, values, kernel, stride=stride, dilation=dilation, padding=0).flatten(1, 2)
