"""Window attention, then attention between channels: local detail and global context, both at a linear cost.

Ding et al., "DaViT: Dual Attention Vision Transformers", ECCV 2022, arXiv:2204.03645.

    s = window(x)                          x, s: (B, H, W, C)
    y = s + channel(norm(x + s))           y: (B, H, W, C)

In DaViT each of the two is a block of its own, with convolutional positions and an MLP; timm has that network
(``davit_tiny`` ...). Here both are one token mixer. With the skip of the block around it, x + y, the two stand one after the
other as the paper has them, without the MLP between: x' = x + window(x), x'' = x' + channel(norm(x')). This form, and the
layer norm in the middle, are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenry.mixers.channel_attention import ChannelGroupAttention
from tokenry.mixers.registry import Layout, check_input
from tokenry.mixers.window_attention import WindowAttentionMixer

__all__ = ["DualAttention"]


class DualAttention(nn.Module):
    """Mix tokens by attention in windows and then by attention between channels.

    Args:
        dim: Channels C.
        num_heads: Heads of the windows and groups of channels, as in the paper's models; must divide ``dim``. None: 32
            channels each where 32 divides ``dim``, else one.
        window_size: Side of a window, or (wh, ww). Default 7.
        qkv_bias: Whether queries, keys and values have a bias. Default True.
        proj_drop: Dropout of both outputs. Default 0.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``; a window below 1x1; an input that is not ``(B, H, W, C)``.

    Example:
        >>> mixer = DualAttention(64, window_size=4)
        >>> mixer(torch.randn(2, 9, 11, 64)).shape
        torch.Size([2, 9, 11, 64])
    """

    layout = Layout.NHWC
    fixed_tokens = None

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        window_size: int | tuple[int, int] = 7,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.window = WindowAttentionMixer(
            dim,
            num_heads,
            window_size=window_size,
            qkv_bias=qkv_bias,
            proj_drop=proj_drop,
            device=device,
            dtype=dtype,
        )
        self.norm = nn.LayerNorm(dim, eps=1e-5, device=device, dtype=dtype)
        self.channel = ChannelGroupAttention(
            dim, num_heads, qkv_bias=qkv_bias, proj_drop=proj_drop, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        check_input(self, x, self.window.dim)
        local = self.window(x)
        seen = self.norm(x + local).flatten(1, 2)  # (B, N, C)
        return local + self.channel(seen).view(x.shape)
