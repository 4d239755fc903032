"""Semantic tokens: a few tokens per window stand for the map, do the expensive layers, and give the result back.

Chang et al., "Making Vision Transformers Efficient from a Token Sparsification View", CVPR 2023, arXiv:2303.08685 (STViT-R;
STViT of *super* tokens is another method). One unit on a map x of 14 x 14 tokens, windows of 7, 3 x 3 samples each:

    x = Swin(x)                                          attention in windows, not shifted                  196 tokens
    c = adaptive max pool of every window to 3 x 3       rows and columns [0:3], [2:5], [4:7]
    s = g1 * Attn( LN(c) ; LN([c, w+]) )                 w+: the window and 3 tokens around it              36 tokens
    s = s + g2 * MLP( LN(s) )                            no skip around the attention: c enters as query and key
    s = s + g1 * Attn( LN(s) ; LN([s, x]) ), MLP         all semantic tokens look at everything
    s = s + g1 * Attn( LN(s) ; LN(s) ), MLP              inside each window's 3 x 3, then among all
    x = x + g1 * Attn( LN(x) ; LN(s) ), MLP              the map is recovered

Each block has weights of its own and one norm for queries and keys. g1, g2 are layer scales that start at 1e-5, so a new
unit is nearly its Swin block alone.

Any size of map: it is divided into ceil(H / 7) x ceil(W / 7) windows as equal as may be, and w+ ends at the border. On
14 x 14 this is the authors' code. Keys and values of a token are computed once and not once per window whose w+ it is in,
which changes no value: at 14 x 14 the authors' code computes 436 of them, this one 232.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.layers.conv_pos_enc import ConvPosEnc
from tokenry.layers.cross_attention import CrossAttention
from tokenry.layers.mlp import ChannelMLP
from tokenry.layers.swin_block import SwinBlock
from tokenry.layers.window_partition import window_merge, window_partition
from tokenry.mixers.registry import Layout

__all__ = ["RecoverBlock", "SemanticTokenMixer", "SemanticTokens"]

LAYER_SCALE = 1e-5


def window_bounds(size: int, window: int) -> list[tuple[int, int]]:
    """First and past-the-last position of the windows along an axis: ceil(size / window) of them, as equal as may be.

    Example:
        >>> window_bounds(14, 7), window_bounds(9, 7)
        ([(0, 7), (7, 14)], [(0, 4), (4, 9)])
    """
    count = -(-size // window)
    return [(i * size // count, (i + 1) * size // count) for i in range(count)]


def cell_positions(size: int, window: int, samples: int) -> list[list[int]]:
    """Positions along an axis that each sample is the maximum of, all lists of one length (a last one repeated).

    Example:
        >>> cell_positions(7, 7, 3)
        [[0, 1, 2], [2, 3, 4], [4, 5, 6]]
    """
    cells = []
    for start, stop in window_bounds(size, window):
        for i in range(samples):
            first, last = i * (stop - start) // samples, -(-(i + 1) * (stop - start) // samples) - 1
            cells.append((start + first, start + last))
    length = max(last - first for first, last in cells) + 1
    return [[min(first + i, last) for i in range(length)] for first, last in cells]


def key_positions(size: int, window: int, margin: int) -> tuple[list[list[int]], list[list[bool]]]:
    """Positions along an axis that each window and its margin hold, lists of one length, and which of them do belong.

    Example:
        >>> [found[:2] + found[-1:] for found in key_positions(14, 7, 3)[0]]
        [[0, 1, 9], [4, 5, 13]]
    """
    spans = [(max(start - margin, 0), min(stop + margin, size)) for start, stop in window_bounds(size, window)]
    length = max(stop - start for start, stop in spans)
    firsts = [min(start, size - length) for start, _ in spans]
    positions = [[first + i for i in range(length)] for first in firsts]
    belongs = [[start <= place < stop for place in row] for row, (start, stop) in zip(positions, spans, strict=True)]
    return positions, belongs


class TokenLayer(nn.Module):
    """The parts of all blocks on semantic tokens: one norm before the attention, an MLP, layer scales, stochastic depth."""

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = LAYER_SCALE,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        def scale() -> nn.Module:
            return nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)

        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = CrossAttention(dim, num_heads, attn_drop, proj_drop, **dd)
        self.ls1 = scale()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = ChannelMLP(dim, int(mlp_ratio * dim), drop=proj_drop, **dd)
        self.ls2 = scale()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        for linear in (self.mlp.fc1, self.mlp.fc2):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def feed_forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class RecoverBlock(TokenLayer):
    """Tokens attend to other tokens: image tokens to semantic ones to be recovered, or semantic ones to any.

    Args:
        dim: Channels C.
        num_heads: Heads; must divide ``dim``. None: heads of 32 channels where 32 divides ``dim``, else one.
        mlp_ratio: Hidden width of the MLP over C. Default 4.
        layer_scale: First value of the layer scales; None: none. Default 1e-5.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout after the attention and in the MLP.
        drop_path: Rate of stochastic depth.
        device: Torch device.
        dtype: Torch dtype.

    Example:
        >>> RecoverBlock(32)(torch.randn(2, 196, 32), torch.randn(2, 36, 32)).shape
        torch.Size([2, 196, 32])
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, N, C), (B, M, C) -> (B, N, C). Without context the tokens attend to themselves."""
        queries = self.norm1(x)
        keys = queries if context is None else self.norm1(context)
        return self.feed_forward(x + self.drop_path(self.ls1(self.attn(queries, keys))))


class SemanticTokens(TokenLayer):
    """Make semantic tokens of a map: (B, C, H, W) -> (B, M, C) with M = samples^2 * windows, row by row.

    Args:
        dim: Channels C.
        num_heads: Heads; must divide ``dim``. None: heads of 32 channels where 32 divides ``dim``, else one.
        window: Side of a window. Default 7. As large as the map: one window.
        samples: Semantic tokens per window along each axis. Default 3.
        margin: How many tokens around its window a semantic token sees. Default 3.
        conv_pos: Add a depthwise 3x3 of the window's samples to them. Default False (released models).
        shortcut: Keep the pooled samples as a skip around the attention. Default False (released models).
        mlp_ratio: Hidden width of the MLP over C. Default 4.
        layer_scale: First value of the layer scales; None: none. Default 1e-5.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout after the attention and in the MLP.
        drop_path: Rate of stochastic depth.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: More samples than a window is wide; a negative margin; an input that is not ``(B, C, H, W)``.

    Example:
        >>> SemanticTokens(32)(torch.randn(2, 32, 14, 14)).shape
        torch.Size([2, 36, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        window: int = 7,
        samples: int = 3,
        margin: int = 3,
        conv_pos: bool = False,
        shortcut: bool = False,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = LAYER_SCALE,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 1 <= samples <= window:
            raise ValueError(
                f"samples must be from 1 to the window's side of {window}, got {samples}; the paper's models take 3 of 7"
            )
        if margin < 0:
            raise ValueError(f"margin must be 0 or more tokens, got {margin}; the paper's models take 3")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            dim, num_heads, mlp_ratio=mlp_ratio, layer_scale=layer_scale, attn_drop=attn_drop, proj_drop=proj_drop,
            drop_path=drop_path, **dd,
        )  # fmt: skip
        self.dim, self.window, self.samples, self.margin, self.shortcut = dim, window, samples, margin, shortcut
        self.conv_pos = ConvPosEnc(dim, **dd) if conv_pos else None

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of semantic tokens of a map of (H, W)."""
        height, width = (self.samples * -(-side // self.window) for side in size)
        return height, width

    def pool(self, x: Tensor) -> Tensor:
        """The first centres: (B, H, W, C) -> (B * windows, samples^2, C), maxima of each window's cells."""
        for axis in (1, 2):
            cells = cell_positions(x.shape[axis], self.window, self.samples)
            index = torch.tensor(cells, device=x.device)
            x = x.index_select(axis, index.flatten()).unflatten(axis, tuple(index.shape)).amax(axis + 1)
        c = window_partition(x, self.samples)
        if self.conv_pos is None:
            return c
        side = self.samples
        return self.conv_pos(c.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)

    def _surroundings(self, size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Per window, numbers in row-major order (windows, K) of the tokens of w+, and which of them count; None: all."""
        (rows, real_rows), (columns, real_columns) = (key_positions(side, self.window, self.margin) for side in size)
        down, right = torch.tensor(rows, device=device), torch.tensor(columns, device=device)
        index = down[:, None, :, None] * size[1] + right[None, :, None, :]  # (rows of windows, columns, kh, kw)
        if all(map(all, real_rows)) and all(map(all, real_columns)):
            return index.flatten(2).flatten(0, 1), None
        real = [torch.tensor(found, device=device) for found in (real_rows, real_columns)]
        mask = real[0][:, None, :, None] & real[1][None, :, None, :]
        return index.flatten(2).flatten(0, 1), mask.flatten(2).flatten(0, 1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.attn.num_heads, -1)).transpose(1, 2)  # (..., heads, n, d)

    def _logit_parts(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys, values (B * windows, heads, n, d), token numbers, and the mask of keys (B * windows, 1, 1, K + n)."""
        index, real = self._surroundings((x.shape[1], x.shape[2]), x.device)
        centres, tokens = self.norm1(c), self.norm1(x.flatten(1, 2))

        def both(linear: nn.Linear) -> Tensor:
            around = linear(tokens).index_select(1, index.flatten()).unflatten(1, tuple(index.shape))
            return self._heads(torch.cat([linear(centres), around.flatten(0, 1)], dim=1))

        mask = None
        if real is not None:
            mask = F.pad(real, (c.shape[1], 0), value=True).repeat(len(x), 1)[:, None, None]
        return self._heads(self.attn.q(centres)), both(self.attn.k), both(self.attn.v), index, mask

    def check(self, x: Tensor) -> None:
        """Refuse what is no map of ``dim`` channels."""
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise ValueError(
                f"semantic tokens are made of maps (B, C, H, W) with C={self.dim}, got {tuple(x.shape)}; lay tokens (B, N, C) "
                "out with x.transpose(1, 2).unflatten(2, (H, W))"
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, M, C)."""
        self.check(x)
        x = x.permute(0, 2, 3, 1)
        c = self.pool(x)
        q, k, v, _, mask = self._logit_parts(x, c)
        dropout = self.attn.attn_drop if self.training else 0.0
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        s = self.ls1(self.attn.proj_drop(self.attn.proj(a.transpose(1, 2).flatten(2))))
        if self.shortcut:
            s = c + self.drop_path(s)
        s = window_merge(s, self.samples, self.grid((x.shape[1], x.shape[2])))
        return self.feed_forward(s.flatten(1, 2))

    @torch.no_grad()
    def token_maps(self, x: Tensor) -> dict[str, Tensor]:
        """``semantic`` (B, H, W): how much the semantic tokens look at every position.

        Summed over the windows that see it, averaged over heads and a window's tokens. What goes to the pooled centres is
        left out.
        """
        self.check(x)
        size = (x.shape[2], x.shape[3])
        x = x.permute(0, 2, 3, 1)
        c = self.pool(x)
        q, k, _, index, mask = self._logit_parts(x, c)
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf"))
        weights = logits.float().softmax(-1).mean((1, 2))[:, c.shape[1] :]  # (B * windows, K)
        found = weights.new_zeros(len(x), size[0] * size[1])
        found.index_add_(1, index.flatten(), weights.unflatten(0, (len(x), -1)).flatten(1))
        return {"semantic": found.unflatten(1, size)}

    def extra_repr(self) -> str:
        """Settings shown by ``print``."""
        return f"dim={self.dim}, window={self.window}, samples={self.samples}, margin={self.margin}, shortcut={self.shortcut}"


class SemanticTokenMixer(nn.Module):
    """The unit of six blocks, skips included: (B, C, H, W) -> (B, C, H, W).

    Args:
        dim: Channels C.
        num_heads: Heads; must divide ``dim``. None: heads of 32 channels where 32 divides ``dim``, else one.
        window: Side of a window. Default 7.
        samples: Semantic tokens per window along each axis. Default 3.
        margin: How many tokens around its window a semantic token sees. Default 3.
        conv_pos: Add a depthwise 3x3 of the window's samples to them. Default False (released models).
        shortcut: Keep the pooled samples as a skip. Default False (released models).
        mlp_ratio: Hidden width of the MLPs over C. Default 4.
        layer_scale: First value of the layer scales; None: none. Default 1e-5.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout after the attentions and in the MLPs.
        drop_path: Rate of stochastic depth, of all blocks or one for each of the six.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: See ``SemanticTokens``; a number of rates other than six.

    Example:
        >>> SemanticTokenMixer(64)(torch.randn(2, 64, 14, 20)).shape
        torch.Size([2, 64, 14, 20])
    """

    layout = Layout.NCHW
    fixed_tokens = None

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        window: int = 7,
        samples: int = 3,
        margin: int = 3,
        conv_pos: bool = False,
        shortcut: bool = False,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = LAYER_SCALE,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float | Sequence[float] = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rates = [float(drop_path)] * 6 if isinstance(drop_path, (int, float)) else list(drop_path)
        if len(rates) != 6:
            raise ValueError(f"drop_path takes one rate, or one for each of the six blocks, got {len(rates)}")
        drops: dict[str, Any] = {"mlp_ratio": mlp_ratio, "attn_drop": attn_drop, "proj_drop": proj_drop}
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.samples = samples

        def block(rate: float) -> RecoverBlock:
            return RecoverBlock(dim, num_heads, layer_scale=layer_scale, drop_path=rate, **drops, **dd)

        self.swin = SwinBlock(dim, num_heads, window=window, drop_path=rates[0], **drops, **dd)
        self.generate = SemanticTokens(
            dim, num_heads, window=window, samples=samples, margin=margin, conv_pos=conv_pos, shortcut=shortcut,
            layer_scale=layer_scale, drop_path=rates[1], **drops, **dd,
        )  # fmt: skip
        self.gather, self.within, self.among, self.recover = (block(rate) for rate in rates[2:])
        linears: tuple[Any, ...] = (self.swin.attn.qkv, self.swin.attn.proj, self.swin.mlp.fc1, self.swin.mlp.fc2)
        for linear in linears:
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def semantic_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map (B, H, W, C) after the Swin block, and the finished semantic tokens (B, M, C)."""
        self.generate.check(x)
        grid = self.generate.grid((x.shape[2], x.shape[3]))
        x = self.swin(x.permute(0, 2, 3, 1))
        s = self.generate(x.permute(0, 3, 1, 2))
        s = self.gather(s, torch.cat([s, x.flatten(1, 2)], dim=1))
        s = self.within(window_partition(s.unflatten(1, grid), self.samples))
        return x, self.among(window_merge(s, self.samples, grid).flatten(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x, s = self.semantic_tokens(x)
        return self.recover(x.flatten(1, 2), s).unflatten(1, x.shape[1:3]).permute(0, 3, 1, 2)
