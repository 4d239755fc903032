"""timm's Swin block for maps of any size.

Liu et al., "Swin Transformer", ICCV 2021, arXiv:2103.14030.

    x = x + drop_path( WA( LN(x) ) )        windows of w x w tokens, moved by the shift; a bias per offset    x: (B, H, W, C)
    x = x + drop_path( MLP( LN(x) ) )

timm's block is made for one size of map. This one decides at every call: along an axis that one window covers nothing is
shifted (as timm does), the window stays w x w (so weights fit all sizes), and tokens never see padding (timm lets them). On
maps that the window divides, both compute the same.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor

from tokenry.layers.head_count import head_count
from tokenry.layers.window_partition import window_merge, window_partition

__all__ = ["SwinBlock"]

APART = -100.0  # added to the logits of tokens of different areas, Swin's value


def area_mask(
    size: tuple[int, int], window: int, shift: tuple[int, int], device: torch.device | str | None = None
) -> Tensor | None:
    """What is added to the logits so that tokens of a shifted or padded map meet only those they belong with.

    Returns:
        ``(windows, w^2, w^2)``: 0, or -100 between what the shift has brought side by side, and between tokens and padding.
        None where nothing is shifted or padded.
    """
    if not any(shift) and not any(side % window for side in size):
        return None
    areas = []
    for side, by in zip(size, shift, strict=True):
        # the last ``by`` rows after the shift came from the other border; 1 and 2, as padding will be 0
        areas.append(torch.where(torch.arange(side, device=device) < side - by, 1, 2))
    labels = areas[0][:, None] * 3 + areas[1]  # (H, W), at least 4
    labels = window_partition(labels[None, ..., None], window)[..., 0]  # (windows, w^2)
    return torch.zeros(1, device=device).where(labels[:, None] == labels[:, :, None], APART)


class SwinBlock(SwinTransformerBlock):
    """Attention in (shifted) windows and an MLP, each with its norm and skip: (B, H, W, C) -> (B, H, W, C).

    Args:
        dim: Channels C.
        num_heads: Heads; must divide ``dim``. None: heads of 32 channels where 32 divides ``dim``, else one.
        window: Side w of a window. Default 7.
        shift: By how many tokens windows are moved. Default 0.
        mlp_ratio: Hidden width of the MLP over C. Default 4.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout after the attention and in the MLP.
        drop_path: Rate of stochastic depth.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: A window below 1, or a shift that is no position inside it.

    Example:
        >>> SwinBlock(16, window=4, shift=2)(torch.randn(2, 5, 9, 16)).shape
        torch.Size([2, 5, 9, 16])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        window: int = 7,
        shift: int = 0,
        mlp_ratio: float = 4.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if window < 1 or not 0 <= shift < window:
            raise ValueError(
                f"window must be at least 1 and shift from 0 to window - 1, got {window} and {shift}; Swin takes 7 and 0 or 3"
            )
        super().__init__(
            dim,
            (window, window),
            head_count(dim, num_heads),
            window_size=window,
            shift_size=shift,
            always_partition=True,
            dynamic_mask=True,
            mlp_ratio=mlp_ratio,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            drop_path=drop_path,
            device=device,
            dtype=dtype,
        )
        self.window, self.shift = window, shift
        attention: Any = self.attn  # whose attribute is final
        attention.fused_attn = True

    def _attn(self, x: Tensor) -> Tensor:
        size = (x.shape[1], x.shape[2])
        down, right = (self.shift if side > self.window else 0 for side in size)
        mask = area_mask(size, self.window, (down, right), x.device)
        if down or right:
            x = x.roll((-down, -right), (1, 2))
        windows = self.attn(window_partition(x, self.window), None if mask is None else mask.to(x.dtype))
        x = window_merge(windows, self.window, size)
        return x.roll((down, right), (1, 2)) if down or right else x
