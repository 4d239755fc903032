"""Attention inside windows that do not overlap: a cost linear in the number of tokens, a field as large as the window.

In DaViT (Ding et al., ECCV 2022, arXiv:2204.03645) without a bias; with a learned bias per offset of query and key in Swin
(Liu et al., 2021, arXiv:2103.14030) and GC ViT (Hatamizadeh et al., ICML 2023, arXiv:2206.09959).

    x        cut into windows of w x w tokens                    (B, H, W, C) -> (B * windows, w^2, C)
    q, k, v = x Wq, x Wk, x Wv                                   per head of width d
    y       = softmax(q k^T / sqrt(d) + bias) v Wo               put together again: (B, H, W, C)

The windows are not shifted. Sizes that the window does not divide get zeros below and on the right. DaViT lets these
take part in the softmax, as keys and values that are the linear map's bias; ``mask_padding`` leaves them out. Cost: 4 C^2
+ 4 C parameters, 4 N C^2 + 2 N w^2 C multiply-accumulates; a window larger than the map works, on padding for the most part.
"""

from __future__ import annotations

import torch
from timm.layers import RelPosBias
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.layers.head_count import head_count
from tokenry.layers.window_partition import window_key_mask, window_merge, window_partition, window_sides
from tokenry.mixers.registry import Layout, check_input

__all__ = ["WindowAttentionMixer"]


class WindowAttentionMixer(nn.Module):
    """Mix tokens by multi-head self-attention inside windows.

    Args:
        dim: Channels C.
        num_heads: Heads; must divide ``dim``. None: heads of 32 channels (the papers') where 32 divides ``dim``, else one.
        window_size: Side w of a window, or (wh, ww). Default 7 (the papers' at 224 pixels).
        qkv_bias: Whether queries, keys and values have a bias. Default True.
        rel_bias: Learn a bias per head and offset of query and key. Default False (DaViT).
        mask_padding: Keep padded positions out of the softmax. Default False (DaViT).
        proj_drop: Dropout of the output. Default 0.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``; a window below 1x1; an input that is not ``(B, H, W, C)``.

    Example:
        >>> mixer = WindowAttentionMixer(64)
        >>> mixer.num_heads, mixer(torch.randn(2, 9, 11, 64)).shape
        (2, torch.Size([2, 9, 11, 64]))
    """

    layout = Layout.NHWC
    fixed_tokens = None
    projections = 3  # queries, keys, values

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        window_size: int | tuple[int, int] = 7,
        qkv_bias: bool = True,
        rel_bias: bool = False,
        mask_padding: bool = False,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = head_count(dim, num_heads)
        self.window_size = window_sides(window_size)
        if min(self.window_size) < 1:
            raise ValueError(f"window_size must be at least 1x1, got {window_size}; the papers' is 7")
        self.mask_padding = mask_padding
        self.qkv = nn.Linear(dim, self.projections * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.rel_pos = RelPosBias(self.window_size, self.num_heads, device=device, dtype=dtype) if rel_bias else None
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        for linear in (self.qkv, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        check_input(self, x, self.dim)
        return self.attend(x)

    def attend(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        """Attention in the windows of ``x``.

        Args:
            x: ``(B, H, W, C)``.
            query: ``(B, heads, w^2, d)``, the same for all windows of an image. None: the windows' own queries.
        """
        size = (x.shape[1], x.shape[2])
        windows = window_partition(x, self.window_size)  # (B * windows, w^2, C)
        parts = self.qkv(windows).unflatten(-1, (self.projections, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if query is None:
            q, k, v = parts.unbind(0)  # (B * windows, heads, w^2, d)
        else:
            q, (k, v) = query.repeat_interleave(len(windows) // len(x), dim=0), parts.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self._logit_bias(size, len(x), q))
        y = self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))
        return window_merge(y, self.window_size, size)

    def _logit_bias(self, size: tuple[int, int], batch: int, like: Tensor) -> Tensor | None:
        """What is added to the logits: a learned bias (1, heads, w^2, w^2), minus infinity at padded keys, both, or nothing."""
        bias = self.rel_pos.get_bias().to(like.dtype) if self.rel_pos is not None else None
        real = window_key_mask(size, self.window_size, like.device) if self.mask_padding else None
        if real is None:
            return bias
        real = real.repeat(batch, 1)[:, None, None]  # (B * windows, 1, 1, w^2)
        return real if bias is None else bias.masked_fill(~real, float("-inf"))

    def extra_repr(self) -> str:
        """Settings shown by ``print``."""
        return f"dim={self.dim}, num_heads={self.num_heads}, window_size={self.window_size}"
