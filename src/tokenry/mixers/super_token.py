"""STA: attention among super tokens, small areas of the map that follow its content.

Huang et al., "Vision Transformer with Super Token Sampling", CVPR 2023, arXiv:2211.11167.

    P    pixels of x, grouped by the h x w cell they lie in           (B, m, hw, C), m = ceil(H/h) ceil(W/w)
    S0   mean of each cell                                            (B, C, ceil(H/h), ceil(W/w))
    Q    softmax_9( P gather(S)^T / sqrt(C) )                         (B, m, hw, 9): a pixel's shares in the 3 x 3
                                                                      super tokens around its cell
    S    fold(P^T Q) / fold(sum of Q over the pixels of a cell)       n_iter times; the next Q from this S
    S'   self-attention among the m super tokens                      heads of C / heads channels, biases, Wo
    y    Q gather(S')                                                 (B, C, H, W)

``gather`` reads the 3 x 3 neighbours of every super token (zeros outside the grid), ``fold`` is its adjoint: it adds what
belongs to a super token where that stands. Neighbours outside the grid are not masked: their logit is 0, so at the border
some of a pixel's shares goes to nowhere. Q gets no gradient: it is computed without one, and y depends on x through P^T Q
alone. Cells of 1 x 1 are plain self-attention. Sizes that the cell does not divide get zeros below and on the right; these
belong to no content, but they count in S0 and in the sum of Q, as in the authors' code.

Cost: with N = HW, 27 N C multiply-accumulates for Q, S and y (18 N C more per further iteration), 4 m C^2 + 2 m^2 C for the
attention; memory O(N C), for no map of N x m numbers is made.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.layers.head_count import head_count
from tokenry.mixers.registry import Layout, check_input

__all__ = ["SuperTokenAttention", "fold_neighbours", "gather_neighbours", "super_token_map"]

CELL = 8


def gather_neighbours(s: Tensor) -> Tensor:
    """The 3 x 3 super tokens around each, zeros outside the grid.

    Args:
        s: ``(B, C, rows, columns)``.

    Returns:
        ``(B, rows * columns, 9, C)``: neighbour k = 3 dy + dx of cell (i, j) is cell (i + dy - 1, j + dx - 1).

    Example:
        >>> gather_neighbours(torch.arange(1.0, 5).view(1, 1, 2, 2))[0, 0, :, 0]
        tensor([0., 0., 0., 0., 1., 2., 0., 3., 4.])
    """
    padded = F.pad(s, (1, 1, 1, 1)).permute(0, 2, 3, 1)  # (B, rows + 2, columns + 2, C)
    windows = padded.unfold(1, 3, 1).unfold(2, 3, 1)  # (B, rows, columns, C, 3, 3)
    return windows.permute(0, 1, 2, 4, 5, 3).flatten(3, 4).flatten(1, 2)


def fold_neighbours(g: Tensor, grid: tuple[int, int]) -> Tensor:
    """Add up, per super token, what its neighbours hold for it: the adjoint of ``gather_neighbours``.

    Args:
        g: ``(B, rows * columns, 9, C)``; what is meant for cells outside the grid is dropped.
        grid: (rows, columns).

    Returns:
        ``(B, C, rows, columns)``.

    Example:
        >>> s, g = torch.randn(1, 3, 2, 5), torch.randn(1, 10, 9, 3)
        >>> torch.allclose((gather_neighbours(s) * g).sum(), (s * fold_neighbours(g, (2, 5))).sum(), atol=1e-5)
        True
    """
    return F.fold(g.permute(0, 3, 2, 1).flatten(1, 2), grid, kernel_size=3, padding=1)


def super_token_map(q: Tensor, size: tuple[int, int], cell: tuple[int, int]) -> Tensor:
    """To which super token each pixel belongs most.

    Args:
        q: Shares ``(B, m, hw, 9)``, as ``SuperTokenAttention.associate`` gives them.
        size: (H, W) of the map.
        cell: (h, w) of a cell, ``SuperTokenAttention.cell_size(H, W)``.

    Returns:
        ``(B, H, W)`` int64: index of the super token in the grid of cells, row by row. Neighbours outside the grid do not
        take part.
    """
    rows, columns = _grid(size, cell)
    numbers = torch.arange(1, rows * columns + 1, dtype=q.dtype, device=q.device).view(1, 1, rows, columns)
    numbers = gather_neighbours(numbers)[..., 0].long().transpose(0, 1) - 1  # (m, 1, 9), -1 outside
    nearest = q.masked_fill(numbers < 0, -1).argmax(-1)  # (B, m, hw)
    found = numbers[:, 0].expand(len(q), -1, -1).gather(2, nearest)
    return _join_cells(found[..., None], size, cell)[:, 0]


def _grid(size: tuple[int, int], cell: tuple[int, int]) -> tuple[int, int]:
    return -(-size[0] // cell[0]), -(-size[1] // cell[1])


def _split_cells(x: Tensor, cell: tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> (B, m, hw, C), with zeros below and on the right where the cell does not divide the map."""
    (height, width), (h, w) = x.shape[-2:], cell
    if height % h or width % w:
        x = F.pad(x, (0, -width % w, 0, -height % h))
    x = x.unflatten(3, (-1, w)).unflatten(2, (-1, h))  # (B, C, rows, h, columns, w)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def _join_cells(p: Tensor, size: tuple[int, int], cell: tuple[int, int]) -> Tensor:
    """(B, m, hw, C) -> (B, C, H, W), channels last in memory, without the padding."""
    p = p.unflatten(2, cell).unflatten(1, _grid(size, cell))  # (B, rows, columns, h, w, C)
    p = p.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return p[:, : size[0], : size[1]].permute(0, 3, 1, 2)


class SuperTokenAttention(nn.Module):
    """Mix tokens through super tokens: associate, attend, hand back.

    Args:
        dim: Channels C.
        num_heads: Heads; must divide ``dim``. None: heads of 64 channels where 64 divides ``dim``, else one. The authors'
            models have 32 to 64 channels a head.
        stoken_size: Side of a cell, or (h, w); 1 is plain self-attention. None (default): 8, the authors' of their first
            stage, and on sides below 16 half of the side, so that there are two cells at least.
        n_iter: Rounds of association, at least 1. Default 1, as in all of the authors' models.
        qkv_bias: Whether queries, keys and values have a bias. Default True.
        attn_drop: Dropout rate of the attention weights in training. Default 0.
        proj_drop: Dropout of the refined super tokens (with cells of 1 x 1: of the output). Default 0.
        device: Torch device.
        dtype: Torch dtype. Q and S are computed in float32 at least (float64 for float64 input), autocast or not.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``; ``stoken_size`` or ``n_iter`` below 1; an input that is not a
            floating-point ``(B, C, H, W)``.

    Warns:
        UserWarning: The map is one cell: all other neighbours lie outside, and most of the shares is lost with them.

    Example:
        >>> mixer, x = SuperTokenAttention(16, stoken_size=(4, 2)), torch.randn(2, 16, 7, 5)
        >>> q, s = mixer.associate(x)
        >>> mixer(x).shape, q.shape, s.shape
        (torch.Size([2, 16, 7, 5]), torch.Size([2, 6, 8, 9]), torch.Size([2, 16, 2, 3]))
        >>> mixer.token_maps(x)["super_tokens"].shape
        torch.Size([2, 7, 5])
    """

    layout = Layout.NCHW
    fixed_tokens = None

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        stoken_size: int | tuple[int, int] | None = None,
        n_iter: int = 1,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        *,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = head_count(dim, num_heads, head_dim=64)
        self.stoken_size: tuple[int, int] | None = None
        if stoken_size is not None:
            cell: Any = to_2tuple(stoken_size)
            if len(cell) != 2 or min(cell) < 1:
                raise ValueError(
                    f"stoken_size is the side of a cell or (h, w), at least 1, got {stoken_size}; the authors' are 8, 4 and 1"
                )
            self.stoken_size = cell
        if n_iter < 1:
            raise ValueError(
                f"n_iter must be at least 1, got {n_iter}; the authors' is 1, and 1x1 cells associate nothing"
            )
        self.n_iter = n_iter
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def cell_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the cells that a map of this size is cut into."""
        if self.stoken_size is not None:
            return self.stoken_size
        return min(CELL, -(-height // 2)), min(CELL, -(-width // 2))

    def check(self, x: Tensor) -> tuple[int, int]:
        """Refuse an input that the mixer cannot take, with a ``ValueError``; else the (h, w) of its cells."""
        check_input(self, x, self.dim)
        height, width = x.shape[-2:]
        h, w = self.cell_size(height, width)
        if h * w > 1 and h >= height and w >= width and not torch.compiler.is_compiling():
            warnings.warn(
                f"a map of {height}x{width} is a single cell of stoken_size={(h, w)}: its 8 neighbours lie outside and take "
                "most of the shares, so the output is faint. Use smaller cells (None adapts them) or larger maps",
                stacklevel=3,
            )
        return h, w

    def associate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of the pixels in super tokens, and the super tokens, before they attend to each other.

        With ``h, w = self.cell_size(H, W)``, rows = ceil(H / h), columns = ceil(W / w), m = rows * columns:

        Args:
            x: ``(B, C, H, W)``.

        Returns:
            Q and S, float32 (float64 for float64 input):

            - Q ``(B, m, h * w, 9)``: pixel p of cell c, both counted row by row, belongs with share ``Q[b, c, p, 3 * dy +
              dx]`` to the super token of cell (i + dy - 1, j + dx - 1) where c = i * columns + j. No gradient.
              ``super_token_map(Q, (H, W), (h, w))`` turns it into a map of indices.
            - S ``(B, C, rows, columns)``, with a gradient through the pixels.

        Raises:
            ValueError: ``x`` does not fit; or the cells are 1 x 1, where the tokens are their own super tokens.
        """
        cell = self.check(x)
        if cell == (1, 1):
            raise ValueError(
                "cells of 1x1 are plain self-attention: the tokens are their own super tokens and nothing is associated; "
                "make the mixer with a larger stoken_size to see an association"
            )
        q, s = self._associate(x, cell)
        return q.transpose(-1, -2), s

    def _associate(self, x: Tensor, cell: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Q^T (B, m, 9, hw), over whose last axis a softmax of 9 runs several times faster, and S (B, C, rows, columns)."""
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._associate(x, cell)
        grid = _grid((x.shape[2], x.shape[3]), cell)
        half = x.dtype in (torch.bfloat16, torch.float16)  # there 1e-12 is zero
        p = _split_cells(x.float() if half else x, cell)
        with torch.no_grad():
            q, mass = self._shares(p, p.mean(2).transpose(1, 2).unflatten(2, grid))
            for _ in range(self.n_iter - 1):
                q, mass = self._shares(p, fold_neighbours(q @ p, grid) / mass)
        return q, fold_neighbours(q @ p, grid) / mass

    def _shares(self, p: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Q^T (B, m, 9, hw) of the pixels in the super tokens, and what these get in all, (B, 1, rows, columns)."""
        q = (gather_neighbours(s * self.dim**-0.5) @ p.transpose(-1, -2)).softmax(2)
        return q, fold_neighbours(q.sum(-1, keepdim=True), (s.shape[2], s.shape[3])) + 1e-12

    def _heads(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) -> q, k, v (B, heads, N, d). The channels of q, k and v stand together head by head."""
        q, k, v = self.qkv(tokens).unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
        return q, k, v

    def _attend(self, s: Tensor) -> Tensor:
        """Self-attention over the positions of (B, C, H, W)."""
        q, k, v = self._heads(s.flatten(2).transpose(1, 2))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        y = self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))
        return y.unflatten(1, s.shape[-2:]).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        cell = self.check(x)
        if cell == (1, 1):
            return self._attend(x)
        q, s = self._associate(x, cell)
        s = self._attend(s.to(x.dtype))
        y = q.transpose(-1, -2).to(s.dtype) @ gather_neighbours(s)  # (B, m, hw, C)
        return _join_cells(y, (x.shape[2], x.shape[3]), cell)

    @torch.no_grad()
    def token_maps(self, x: Tensor) -> dict[str, Tensor]:
        """``super_tokens`` (B, H, W) int64, to which one each position belongs most.

        With cells of 1 x 1 ``attention`` (B, H, W) instead: what every position receives, averaged over heads and queries.
        """
        cell, size = self.check(x), (x.shape[2], x.shape[3])
        if cell == (1, 1):
            q, k, _ = self._heads(x.flatten(2).transpose(1, 2))
            weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)  # (B, heads, N, N)
            return {"attention": weights.mean((1, 2)).unflatten(1, size)}
        return {"super_tokens": super_token_map(self.associate(x)[0], size, cell)}

    def extra_repr(self) -> str:
        """Settings shown by ``print``."""
        return f"dim={self.dim}, num_heads={self.num_heads}, stoken_size={self.stoken_size}, n_iter={self.n_iter}"
