"""Semantic tokens for large maps: every window looks at its surroundings, where the classifier's unit looks at everything.

Chang et al., "Making Vision Transformers Efficient from a Token Sparsification View", CVPR 2023, arXiv:2303.08685: the unit of
six blocks as the authors' detection network has it. Windows are 7 x 7 tokens from the top left corner on, s has 3 x 3 of each:

    x = Swin(x)                                     attention in windows, not shifted
    c = maxima of 3 x 3 cells of every window
    s = c + g1 * Attn( LN(c) ; LN(x) )     , MLP    keys: 14 x 14 tokens, 3 before and 4 after the window
    s = s + g1 * Attn( LN(s) ; LN(x) )     , MLP    keys: 21 x 21 tokens, no semantic ones among them
    s = s + g1 * Attn( LN(s) ; LN(s) )     , MLP    inside each window's 3 x 3, then among all
    x = x + g1 * Attn( LN(x) ; LN(s) )     , MLP    keys: 27 x 27 semantic tokens, 4 windows to each side

Weights have the names and shapes of ``SemanticTokenMixer``, so a classifier's fit. What is computed differs: a skip around the
first attention, and other keys in the first two.

Maps of any size. The last windows may be cut off by the border: a cell is the maximum of the positions that it has, and a cell
without any makes no token. Padding is seen by no token. The authors' code pads with zeros, takes maxima over them, and masks
as keys only the corner where the padding below meets that on the right (or, where nothing is padded, not even the margin
around the map); in the last attention it counts padded positions in semantic tokens. So it differs near the border.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.layers.window_partition import window_merge, window_partition
from tokenry.layers.window_surroundings import even_lists, pool_cells, widen, window_keys
from tokenry.mixers.registry import Layout, check_input
from tokenry.mixers.semantic_token import (
    LAYER_SCALE,
    RecoverBlock,
    TokenLayer,
    check_samples,
    six_rates,
    unit_swin_block,
)

__all__ = ["DenseSemanticTokenMixer", "SurroundingsBlock"]


def fixed_windows(size: int, window: int) -> list[tuple[int, int]]:
    """First and past-the-last position of windows of one side along an axis; the border may cut the last one off.

    Example:
        >>> fixed_windows(9, 7)
        [(0, 7), (7, 9)]
    """
    return [(start, min(start + window, size)) for start in range(0, size, window)]


def fixed_cells(size: int, window: int, samples: int) -> list[list[int]]:
    """Positions along an axis that each sample is the maximum of, as ``even_lists``; samples without any are left out.

    Example:
        >>> fixed_cells(9, 7, 3)
        [[0, 1, 2], [2, 3, 4], [4, 5, 6], [7, 8, 8]]
    """
    cells = []
    for start in range(0, size, window):
        for i in range(samples):
            first, last = start + i * window // samples, start - (-(i + 1) * window // samples) - 1
            if first < size:
                cells.append((first, min(last, size - 1)))
    return even_lists(cells)


class SurroundingsBlock(TokenLayer):
    """The tokens of each window of one map attend to a larger window of another map (or of the same).

    Args:
        dim: Channels C.
        num_heads: Heads; must divide ``dim``. None: heads of 32 channels where 32 divides ``dim``, else one.
        window: Side of the windows of the map that asks.
        key_window: Side of the windows of the map that is asked; there are as many of them.
        surroundings: Side of what is seen around each of these, at least ``key_window``. One more token after it than before
            it if they cannot be equal.
        mlp_ratio: Hidden width of the MLP over C. Default 4.
        layer_scale: First value of the layer scales; None: none. Default 1e-5.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout after the attention and in the MLP.
        drop_path: Rate of stochastic depth.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: Surroundings smaller than the window that they surround.

    Example:
        >>> s, x = torch.randn(1, 6, 9, 32), torch.randn(1, 14, 21, 32)
        >>> SurroundingsBlock(32, window=3, key_window=7, surroundings=14)(s, x).shape
        torch.Size([1, 6, 9, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        window: int,
        key_window: int,
        surroundings: int,
        **settings: Any,
    ) -> None:
        if surroundings < key_window:
            raise ValueError(
                f"surroundings of {surroundings} do not hold the window of {key_window} that they surround; the paper's models "
                "take 14 and 21 tokens around 7, and 27 semantic tokens around 3"
            )
        super().__init__(dim, num_heads, **settings)
        self.window, self.key_window, self.surroundings = window, key_window, surroundings

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.attn.num_heads, -1)).transpose(1, 2)  # (B * windows, heads, n, d)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, H, W, C), (B, H', W', C) -> (B, H, W, C). Without context the map is asked itself."""
        attn, queries = self.attn, self.norm1(x)
        keys = queries if context is None else self.norm1(context)
        before = (self.surroundings - self.key_window) // 2
        after = self.surroundings - self.key_window - before
        rows, columns = (widen(fixed_windows(side, self.key_window), before, after) for side in keys.shape[1:3])
        index, real = window_keys(rows, columns, x.device)
        keys = keys.flatten(1, 2)

        def around(linear: nn.Linear) -> Tensor:
            found = linear(keys).index_select(1, index.flatten()).unflatten(1, tuple(index.shape))
            return self._heads(found.flatten(0, 1))

        y = F.scaled_dot_product_attention(
            self._heads(window_partition(attn.q(queries), self.window)),
            around(attn.k),
            around(attn.v),
            attn_mask=None if real is None else real.repeat(len(x), 1)[:, None, None],
            dropout_p=attn.attn_drop if self.training else 0.0,
        )
        y = window_merge(y.transpose(1, 2).flatten(2), self.window, (x.shape[1], x.shape[2]))
        return self.feed_forward(x + self.drop_path(self.ls1(attn.proj_drop(attn.proj(y)))))

    def extra_repr(self) -> str:
        """Settings shown by ``print``."""
        return f"window={self.window}, key_window={self.key_window}, surroundings={self.surroundings}"


class DenseSemanticTokenMixer(nn.Module):
    """The unit of six blocks for large maps, skips included: (B, C, H, W) -> (B, C, H, W).

    Args:
        dim: Channels C.
        num_heads: Heads; must divide ``dim``. None: heads of 32 channels where 32 divides ``dim``, else one.
        window: Side of a window. Default 7.
        samples: Semantic tokens per window along each axis. Default 3.
        surroundings: Sides of what a window sees: tokens as its semantic tokens are made, tokens as they are worked on,
            semantic tokens as it is recovered. Default (14, 21, 27), the authors'.
        mlp_ratio: Hidden width of the MLPs over C. Default 4.
        layer_scale: First value of the layer scales; None: none. Default 1e-5.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout after the attentions and in the MLPs.
        drop_path: Rate of stochastic depth, of all blocks or one for each of the six.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: More samples than a window is wide; surroundings that are not three, or smaller than what they surround;
            a number of rates other than six; an input that is not ``(B, C, H, W)``.

    Example:
        >>> DenseSemanticTokenMixer(64)(torch.randn(2, 64, 16, 20)).shape
        torch.Size([2, 64, 16, 20])
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
        surroundings: Sequence[int] = (14, 21, 27),
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
        check_samples(samples, window)
        if len(surroundings) != 3:
            raise ValueError(
                f"surroundings are the sides of three windows, got {tuple(surroundings)}; the authors' are (14, 21, 27)"
            )
        drops: dict[str, Any] = {"mlp_ratio": mlp_ratio, "attn_drop": attn_drop, "proj_drop": proj_drop}
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.window, self.samples = dim, window, samples

        def block(of: int, around: int, seen: int, rate: float) -> SurroundingsBlock:
            return SurroundingsBlock(
                dim, num_heads, window=of, key_window=around, surroundings=seen, layer_scale=layer_scale, drop_path=rate,
                **drops, **dd,
            )  # fmt: skip

        self.swin = unit_swin_block(dim, num_heads, window=window, drop_path=rates[0], **drops, **dd)
        self.generate = block(samples, window, surroundings[0], rates[1])
        self.gather = block(samples, window, surroundings[1], rates[2])
        self.within = block(samples, samples, samples, rates[3])
        self.among = RecoverBlock(dim, num_heads, layer_scale=layer_scale, drop_path=rates[4], **drops, **dd)
        self.recover = block(window, samples, surroundings[2], rates[5])

    def semantic_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map (B, H, W, C) after the Swin block, and the finished semantic tokens as a map (B, H', W', C)."""
        check_input(self, x, self.dim)
        x = self.swin(x.permute(0, 2, 3, 1))
        rows, columns = (fixed_cells(side, self.window, self.samples) for side in x.shape[1:3])
        s = self.gather(self.generate(pool_cells(x, rows, columns), x), x)
        s = self.within(s)
        return x, self.among(s.flatten(1, 2)).unflatten(1, s.shape[1:3])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.recover(*self.semantic_tokens(x)).permute(0, 3, 1, 2)
