"""Window attention whose queries come from the whole map: every window asks the same, global, questions.

Hatamizadeh et al., "Global Context Vision Transformers", ICML 2023, arXiv:2206.09959.

    g       = pool(f(... pool(f(x))))                  f(x) = x + conv1x1(SE(GELU(dwconv3x3(x)))); g: (B, w, w, C)
    k, v    = x Wk, x Wv                               per window of w x w tokens and head of width d
    y       = softmax(g k^T / sqrt(d) + bias) v Wo     the same g in all windows of an image; bias per head and offset

A position asks with what stands at its place in the pooled map, so it takes part in all of the image although its keys
and values are its window's. Blocks of it alternate with ``LocalWindowAttention``, whose queries are the window's own. g has
no norm and no projection. Cost: 3 C^2 + 3 C + (2w - 1)^2 heads parameters, and 9 C + 1.5 C^2 for each f.

Windows are never padded in the paper. Here other sizes work too: padded positions are left out of the softmax, and a
map that n halvings do not bring to w x w goes through adaptive max pooling. Both are extensions.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import SqueezeExcite
from timm.models.gcvit import MbConvBlock
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.layers.window_partition import window_sides
from tokenry.mixers.registry import check_input
from tokenry.mixers.window_attention import WindowAttentionMixer

__all__ = ["GlobalQueryAttention", "GlobalQueryGenerator", "LocalWindowAttention", "fused_mbconv"]


def fused_mbconv(
    dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> MbConvBlock:
    """``x + conv1x1(SE(GELU(dwconv3x3(x))))`` on (B, C, H, W), without biases; SE squeezes to exactly C / 4 channels."""
    # timm's own default rounds C / 4 to a multiple of 8, which is the same from 32 channels on.
    squeeze: Any = partial(SqueezeExcite, rd_ratio=0.25, rd_divisor=1, bias=False)
    return MbConvBlock(dim, attn_layer=squeeze, device=device, dtype=dtype)


class LocalWindowAttention(WindowAttentionMixer):
    """GC ViT's attention inside windows: with a learned bias per offset, and padding (where any is needed) masked.

    Args:
        dim: Channels C.
        num_heads: Heads; must divide ``dim``. None: heads of 32 channels where 32 divides ``dim``, else one.
        window_size: Side w of a window, or (wh, ww). Default 7.
        qkv_bias: Whether queries, keys and values have a bias. Default True.
        rel_bias: Learn the bias per head and offset. Default True.
        proj_drop: Dropout of the output. Default 0.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: As ``WindowAttentionMixer``.

    Example:
        >>> LocalWindowAttention(16, 2, window_size=3)(torch.randn(1, 6, 6, 16)).shape
        torch.Size([1, 6, 6, 16])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        window_size: int | tuple[int, int] = 7,
        qkv_bias: bool = True,
        rel_bias: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            window_size=window_size,
            qkv_bias=qkv_bias,
            rel_bias=rel_bias,
            mask_padding=True,
            proj_drop=proj_drop,
            device=device,
            dtype=dtype,
        )


class GlobalQueryGenerator(nn.Module):
    """The queries of a level: (B, H, W, C) -> (B, wh, ww, C).

    Args:
        dim: Channels C.
        window_size: Side w of a window, or (wh, ww). Default 7.
        num_halvings: How often the map is halved (3x3 max pooling with stride 2), each time after one ``fused_mbconv``; 0: one
            of them and no halving. The paper's is log2(H / w): 3, 2, 0, 0 in its four levels. Default 1.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: ``num_halvings`` is negative.

    Example:
        >>> GlobalQueryGenerator(16, 7, num_halvings=3)(torch.randn(2, 56, 56, 16)).shape
        torch.Size([2, 7, 7, 16])
    """

    def __init__(
        self,
        dim: int,
        window_size: int | tuple[int, int] = 7,
        *,
        num_halvings: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_halvings < 0:
            raise ValueError(f"num_halvings must be at least 0, got {num_halvings}; log2(H / window) is the paper's")
        self.window_size = window_sides(window_size)
        self.num_halvings = num_halvings
        self.blocks = nn.ModuleList(fused_mbconv(dim, device=device, dtype=dtype) for _ in range(max(1, num_halvings)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, wh, ww, C)."""
        x = x.permute(0, 3, 1, 2)
        for block in self.blocks:
            x = block(x)
            if self.num_halvings:
                x = F.max_pool2d(x, 3, stride=2, padding=1)
        if tuple(x.shape[2:]) != self.window_size:
            x = F.adaptive_max_pool2d(x, self.window_size)
        return x.permute(0, 2, 3, 1)


class GlobalQueryAttention(WindowAttentionMixer):
    """Mix tokens by attention inside windows with one global query per image.

    Args:
        dim: Channels C.
        num_heads: Heads; must divide ``dim``. None: heads of 32 channels where 32 divides ``dim``, else one.
        window_size: Side w of a window, or (wh, ww). Default 7.
        num_halvings: Of its own ``GlobalQueryGenerator``: log2(H / w) for the maps it will see. Default 1.
        own_query: Whether it makes its query itself, as a mixer that is used alone must. False: the blocks of a level share
            one, given as ``forward(x, query)``, as in the paper. Default True.
        qkv_bias: Whether keys and values have a bias. Default True.
        rel_bias: Learn a bias per head and offset. Default True.
        proj_drop: Dropout of the output. Default 0.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``; an input that is not ``(B, H, W, C)``; no query, or one of another
            window's shape or of other images.

    Example:
        >>> mixer = GlobalQueryAttention(64, window_size=4)
        >>> mixer(torch.randn(2, 8, 8, 64)).shape
        torch.Size([2, 8, 8, 64])
        >>> x, query = torch.randn(2, 8, 8, 64), torch.randn(2, 4, 4, 64)
        >>> GlobalQueryAttention(64, window_size=4, own_query=False)(x, query).shape
        torch.Size([2, 8, 8, 64])
    """

    projections = 2  # keys, values

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        window_size: int | tuple[int, int] = 7,
        num_halvings: int = 1,
        own_query: bool = True,
        qkv_bias: bool = True,
        rel_bias: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            window_size=window_size,
            qkv_bias=qkv_bias,
            rel_bias=rel_bias,
            mask_padding=True,
            proj_drop=proj_drop,
            device=device,
            dtype=dtype,
        )
        self.query = (
            GlobalQueryGenerator(dim, self.window_size, num_halvings=num_halvings, device=device, dtype=dtype)
            if own_query
            else None
        )

    def forward(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C); ``query`` (B, wh, ww, C) instead of the mixer's own."""
        check_input(self, x, self.dim)
        if query is None:
            if self.query is None:
                raise ValueError(
                    "this mixer has no query of its own: call it with query=, or make it with own_query=True"
                )
            query = self.query(x)
        wanted = (len(x), *self.window_size, self.dim)
        if tuple(query.shape) != wanted:
            raise ValueError(
                f"the query must be (B, wh, ww, C) = {wanted} for these images and windows, got {tuple(query.shape)}; make it "
                f"with GlobalQueryGenerator({self.dim}, {self.window_size})"
            )
        heads = query.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, w^2, d)
        return self.attend(x, heads)
