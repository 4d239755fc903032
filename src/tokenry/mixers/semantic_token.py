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
from tokenry.layers.window_surroundings import cell_positions, pool_cells, widen, window_bounds, window_keys
from tokenry.mixers.registry import Layout, check_input

__all__ = ["RecoverBlock", "SemanticTokenMixer", "SemanticTokens"]

LAYER_SCALE = 1e-5


def check_samples(samples: int, window: int) -> None:
    """Refuse more semantic tokens than a window is wide."""
    if not 1 <= samples <= window:
        raise ValueError(
            f"samples must be from 1 to the window's side of {window}, got {samples}; the paper's models take 3 of 7"
        )


def six_rates(drop_path: float | Sequence[float]) -> list[float]:
    """Rates of stochastic depth of a unit's blocks, from one or six."""
    rates = [float(drop_path)] * 6 if isinstance(drop_path, (int, float)) else list(drop_path)
    if len(rates) != 6:
        raise ValueError(f"drop_path takes one rate, or one for each of the six blocks, got {len(rates)}")
    return rates


def unit_swin_block(dim: int, num_heads: int | None, **settings: Any) -> SwinBlock:
    """A unit's first block: timm's, whose linear maps start as those of the other blocks."""
    block = SwinBlock(dim, num_heads, **settings)
    linears: tuple[Any, ...] = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    for linear in linears:
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    return block


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

    layout = Layout.NCHW  # of its input

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
        check_samples(samples, window)
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
        rows, columns = (cell_positions(side, self.window, self.samples) for side in x.shape[1:3])
        c = window_partition(pool_cells(x, rows, columns), self.samples)
        if self.conv_pos is None:
            return c
        side = self.samples
        return self.conv_pos(c.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.attn.num_heads, -1)).transpose(1, 2)  # (..., heads, n, d)

    def _logit_parts(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys, values (B * windows, heads, n, d), token numbers, and the mask of keys (B * windows, 1, 1, K + n)."""
        spans = [widen(window_bounds(side, self.window), self.margin, self.margin) for side in x.shape[1:3]]
        index, real = window_keys(spans[0], spans[1], x.device)
        centres, tokens = self.norm1(c), self.norm1(x.flatten(1, 2))

        def both(linear: nn.Linear) -> Tensor:
            around = linear(tokens).index_select(1, index.flatten()).unflatten(1, tuple(index.shape))
            return self._heads(torch.cat([linear(centres), around.flatten(0, 1)], dim=1))

        mask = None
        if real is not None:
            mask = F.pad(real, (c.shape[1], 0), value=True).repeat(len(x), 1)[:, None, None]
        return self._heads(self.attn.q(centres)), both(self.attn.k), both(self.attn.v), index, mask

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, M, C)."""
        check_input(self, x, self.dim)
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
        check_input(self, x, self.dim)
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
        rates = six_rates(drop_path)
        drops: dict[str, Any] = {"mlp_ratio": mlp_ratio, "attn_drop": attn_drop, "proj_drop": proj_drop}
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.samples = samples

        def block(rate: float) -> RecoverBlock:
            return RecoverBlock(dim, num_heads, layer_scale=layer_scale, drop_path=rate, **drops, **dd)

        self.swin = unit_swin_block(dim, num_heads, window=window, drop_path=rates[0], **drops, **dd)
        self.generate = SemanticTokens(
            dim, num_heads, window=window, samples=samples, margin=margin, conv_pos=conv_pos, shortcut=shortcut,
            layer_scale=layer_scale, drop_path=rates[1], **drops, **dd,
        )  # fmt: skip
        self.gather, self.within, self.among, self.recover = (block(rate) for rate in rates[2:])

    def semantic_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map (B, H, W, C) after the Swin block, and the finished semantic tokens (B, M, C)."""
        check_input(self, x, self.generate.dim)
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
