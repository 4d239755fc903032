"""Cut a map into windows and put it together again, for sizes that the window does not divide too.

    (B, H, W, C)  --pad right and bottom with zeros-->  (B, H', W', C)  -->  (B * windows, wh * ww, C)

Windows of one image stand together, row by row: what belongs to an image and must meet all its windows is repeated with
``repeat_interleave(windows, dim=0)``, not with ``repeat``. The cutting itself is timm's.
"""

from __future__ import annotations

import torch
from timm.models.swin_transformer import window_partition as _cut
from timm.models.swin_transformer import window_reverse as _join
from torch import Tensor
from torch.nn import functional as F

__all__ = ["window_key_mask", "window_merge", "window_partition", "window_sides"]


def window_sides(window_size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a window that is given by its side or by both."""
    return (window_size, window_size) if isinstance(window_size, int) else window_size


def _padding(size: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    """Rows below and columns on the right that make both sides multiples of the window's."""
    return -size[0] % window[0], -size[1] % window[1]


def window_partition(x: Tensor, window_size: int | tuple[int, int]) -> Tensor:
    """Cut a map into windows of tokens.

    Args:
        x: ``(B, H, W, C)``, of any strides. Zeros are added right and bottom where the window does not divide it.
        window_size: Side of the window, or (wh, ww).

    Returns:
        ``(B * windows, wh * ww, C)`` with windows = ceil(H / wh) * ceil(W / ww), the windows of an image together.

    Raises:
        ValueError: No map, or a window without tokens.

    Example:
        >>> window_partition(torch.zeros(2, 5, 8, 3), 4).shape
        torch.Size([8, 16, 3])
    """
    height, width = window_sides(window_size)
    if x.ndim != 4 or height < 1 or width < 1:
        raise ValueError(
            f"expected a map (B, H, W, C) and a window of at least 1x1, got {tuple(x.shape)} and {height}x{width}; lay "
            "tokens (B, N, C) out with x.unflatten(1, (H, W))"
        )
    below, right = _padding((x.shape[1], x.shape[2]), (height, width))
    if below or right:
        x = F.pad(x, (0, 0, 0, right, 0, below))
    return _cut(x, (height, width)).flatten(1, 2)


def window_merge(windows: Tensor, window_size: int | tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Put windows back together and cut the padding off: the inverse of ``window_partition``.

    Args:
        windows: ``(B * windows, wh * ww, C)``; C may have changed in between.
        window_size: As it was for ``window_partition``.
        size: (H, W) of the map before it was cut.

    Returns:
        ``(B, H, W, C)``.

    Example:
        >>> x = torch.randn(2, 5, 8, 3)
        >>> torch.equal(window_merge(window_partition(x, 4), 4, (5, 8)), x)
        True
    """
    window = window_sides(window_size)
    below, right = _padding(size, window)
    x = _join(windows.unflatten(1, window), window, size[0] + below, size[1] + right)
    return x[:, : size[0], : size[1]] if below or right else x


def window_key_mask(
    size: tuple[int, int], window_size: int | tuple[int, int], device: torch.device | str | None = None
) -> Tensor | None:
    """Which tokens of the windows of one image are no padding, for attention that must not see it.

    Every window has at least one such token, so a masked softmax is never empty.

    Args:
        size: (H, W) of the map.
        window_size: As for ``window_partition``.
        device: Torch device.

    Returns:
        ``(windows, wh * ww)`` bool, True where a key is real; None where nothing is padded. For a batch of B images and
        ``scaled_dot_product_attention``: ``attn_mask=mask.repeat(B, 1)[:, None, None]``.

    Example:
        >>> window_key_mask((4, 8), 4) is None
        True
        >>> window_key_mask((1, 3), 2).int()
        tensor([[1, 1, 0, 0],
                [1, 0, 0, 0]], dtype=torch.int32)
    """
    window = window_sides(window_size)
    if not any(_padding(size, window)):
        return None
    real = torch.ones(1, *size, 1, dtype=torch.bool, device=device)
    return window_partition(real, window)[..., 0]
