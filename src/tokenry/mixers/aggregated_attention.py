"""Aggregated attention: every query sees its neighbours sharply and the whole map coarsely, in one softmax.

Shi, "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", CVPR 2024, arXiv:2311.17132.

Per head of width d; K = w² neighbours in a window, p = (H / sr)(W / sr) pooled positions, at most K + p keys:

    q      = l2norm(x Wq)                                            (H W, d)
    q'_n   = (q_n + e) softplus(τ) ln(k_n + p)                       k_n: neighbours of n inside the map
    k, v   = l2norm(x Wk), x Wv                                      (H W, d)
    k~, v~ = l2norm(x~ Wk), x~ Wv    x~ = LN(pool(GELU(x Wsr)))      (p, d), the same Wk, Wv
    a_n    = softmax([q'_n k_{n+Δ} + r_Δ | q'_n k~ + b_n])           K + p; -inf outside the map
    y_n    = Σ_Δ (a_nΔ + q_n T_Δ + t_Δ) v_{n+Δ} + Σ_j a_nj v~_j

e, τ, r, T, t are learned per head. T and t are a second, positional attention over the neighbours that is added after the
softmax. ``b`` is a continuous position bias: an MLP of the log-spaced offset between a query and the middle of a pooled
cell, so that it can be asked for sizes never trained on. ``CosineAttention`` is the form without pooling (sr = 1): all
H W positions are keys, a = softmax((q + e) softplus(τ) ln(H W) kᵀ + b).

The logarithm of the number of keys keeps the entropy of the softmax alike at other sizes. Cost: O(N (K + p) d) per head;
``pool_size`` fixes p and makes it linear in the number of tokens N. The neighbours go through
``tokenry.kernels.window_scores`` and ``window_sum``, which never copy them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.kernels.sliding_window import window_scores, window_sum
from tokenry.layers.head_count import head_count
from tokenry.mixers.registry import Layout, check_input

__all__ = ["AggregatedAttention", "ContinuousPositionBias", "CosineAttention"]

HEAD_DIM = 24  # the paper's models all have heads of 24 channels
TEMPERATURE = math.log(math.expm1(1 / 0.24))  # softplus of it is 1 / 0.24
SPAN = 8.0  # offsets are scaled to it before the logarithm
Size = tuple[int, int]


class ContinuousPositionBias(nn.Module):
    """Bias of every pair of a query and a pooled key, from an MLP of their offset.

    The offset of a position i and a cell whose middle is c, along one axis, is 8 (i - c) / (P - 1) with P the map's
    side in pretraining, then sign(Δ) log2(|Δ| + 1) / 3. Equal offsets go through the MLP once.

    Args:
        num_heads: Heads h.
        hidden: Width of the MLP. Default 512 (the paper's).
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        num_heads: int,
        hidden: int = 512,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, num_heads, device=device, dtype=dtype)

    def forward(self, queries: Size, keys: Size, pretrain: Size | None = None) -> Tensor:
        """Bias of ``queries`` = (H, W) positions and ``keys`` = (h, w) cells of the same map.

        Args:
            queries: Rows and columns of the map.
            keys: Rows and columns of cells.
            pretrain: Rows and columns of the map in pretraining. None: those of ``queries``.

        Returns:
            ``(heads, H W, h w)``.
        """
        weight, trained = self.fc1.weight, pretrain or queries
        wide = torch.promote_types(weight.dtype, torch.float32)
        rows, row_of = _axis_offsets(queries[0], keys[0], weight.device)  # (U,), (H, h)
        columns, column_of = _axis_offsets(queries[1], keys[1], weight.device)  # (V,), (W, w)
        axes = _log_spaced(rows.to(wide), trained[0]), _log_spaced(columns.to(wide), trained[1])
        offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)  # (U, V, 2)
        table = self.fc2(F.relu(self.fc1(offsets.to(weight.dtype)))).permute(2, 0, 1)  # (heads, U, V)
        bias = table[:, row_of[:, None, :, None], column_of[None, :, None, :]]  # (heads, H, W, h, w)
        return bias.flatten(3).flatten(1, 2)


def _axis_offsets(length: int, cells: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Offsets along an axis from positions to the middles of their adaptive-pooling cells.

    Returns:
        ``(U,)`` offsets, and which of them every position and cell have, ``(length, cells)``.
    """
    number = torch.arange(cells, device=device)
    start = number * length // cells
    end = ((number + 1) * length + cells - 1) // cells
    doubled = 2 * torch.arange(length, device=device)[:, None] - (start + end - 1)  # middles are halves of integers
    step = 2 if length % cells == 0 else 1
    first = (cells - 1) * length // cells + length - 1  # twice the middle of the last cell
    last = 2 * (length - 1) - (length + cells - 1) // cells + 1
    return torch.arange(-first, last + 1, step, device=device) / 2, (doubled + first) // step


def _log_spaced(offsets: Tensor, trained: int) -> Tensor:
    scaled = offsets / max(trained - 1, 1) * SPAN
    return scaled.sign() * torch.log2(scaled.abs() + 1.0) / math.log2(SPAN)


def _neighbours(length: int, reach: int, device: torch.device) -> Tensor:
    """How many positions of a window are inside an axis, per position: (length,)."""
    at = torch.arange(length, device=device)
    return at.clamp(max=reach) + (length - 1 - at).clamp(max=reach) + 1


class _LengthScaledAttention(nn.Module):
    """What both attentions share: normalised queries, their embedding, temperature and length scale."""

    layout = Layout.NCHW
    fixed_tokens = None

    def __init__(
        self,
        dim: int,
        num_heads: int | None,
        pretrain_size: int | Size | None,
        attn_drop: float,
        proj_drop: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = head_count(dim, num_heads, head_dim=HEAD_DIM)
        self.pretrain_size = (pretrain_size, pretrain_size) if isinstance(pretrain_size, int) else pretrain_size
        if self.pretrain_size is not None and min(self.pretrain_size) < 1:
            raise ValueError(
                f"pretrain_size must be the side of the map in pretraining, at least 1, got {pretrain_size}; None takes "
                "the side of the map at hand"
            )
        self.attn_drop = nn.Dropout(attn_drop)
        self.temperature = nn.Parameter(torch.full((self.num_heads, 1, 1), TEMPERATURE, device=device, dtype=dtype))
        self.query_embedding = nn.Parameter(
            torch.empty(self.num_heads, 1, dim // self.num_heads, device=device, dtype=dtype)
        )
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.cpb = ContinuousPositionBias(self.num_heads, device=device, dtype=dtype)
        nn.init.trunc_normal_(self.query_embedding, std=0.02)

    def scaled(self, q: Tensor, keys: Tensor | float) -> Tensor:
        """Queries (B, heads, N, d), normalised, times temperature and the logarithm of the number of keys."""
        wide = torch.promote_types(q.dtype, torch.float32)
        length = torch.as_tensor(keys, dtype=wide, device=q.device).log().to(q.dtype)
        scale = F.softplus(self.temperature) * length  # (heads, N or 1, 1)
        return torch.addcmul(self.query_embedding * scale, q, scale)

    def project(self, y: Tensor, size: Size) -> Tensor:
        """(B, heads, N, d) -> (B, C, H, W)."""
        y = self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))  # (B, N, C)
        return y.unflatten(1, size).permute(0, 3, 1, 2)


class AggregatedAttention(_LengthScaledAttention):
    """Mix tokens by attention over their neighbours and over a pooled map.

    Args:
        dim: Channels C.
        num_heads: Heads; must divide ``dim``. None: heads of 24 channels (the paper's) where 24 divides ``dim``, else one.
        window_size: Side w of the window of neighbours, odd. Default 3 (the paper's).
        sr_ratio: The map is pooled to H / sr_ratio by W / sr_ratio positions, at least one. Default 4.
        pool_size: Pool to this many rows and columns instead, at any size of the map. Default None.
        pretrain_size: Side of the map in pretraining, or (H, W), for the position bias. None (default): as the map is.
        qkv_bias: Whether queries, keys and values have a bias. Default True.
        attn_drop: Dropout of the attention weights, not of the positional ones. Default 0.
        proj_drop: Dropout of the output. Default 0.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``; an even window; sizes below 1; an input that is not
            ``(B, C, H, W)`` or not larger than ``pool_size``.

    Example:
        >>> mixer = AggregatedAttention(48, sr_ratio=2)
        >>> mixer.num_heads, mixer(torch.randn(2, 48, 6, 9)).shape
        (2, torch.Size([2, 48, 6, 9]))
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        window_size: int = 3,
        sr_ratio: int = 4,
        pool_size: int | None = None,
        pretrain_size: int | Size | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, pretrain_size, attn_drop, proj_drop, device, dtype)
        if window_size < 1 or window_size % 2 == 0:
            raise ValueError(
                f"window_size must be odd, so that a position stands in its middle, got {window_size}; the paper's is 3"
            )
        for name, value in (("sr_ratio", sr_ratio), ("pool_size", pool_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.window_size, self.sr_ratio, self.pool_size = window_size, sr_ratio, pool_size
        heads, head_dim, offsets = self.num_heads, dim // self.num_heads, window_size**2

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.q = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.sr = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.relative_pos_bias_local = parameter(heads, offsets)
        self.learnable_tokens = parameter(heads, head_dim, offsets)
        self.learnable_bias = parameter(heads, 1, offsets)
        nn.init.trunc_normal_(self.relative_pos_bias_local, std=0.0004)
        nn.init.trunc_normal_(self.learnable_tokens, std=0.02)
        nn.init.zeros_(self.learnable_bias)

    def pool_grid(self, size: Size) -> Size:
        """Rows and columns of the pooled map of a map of ``size``."""
        if self.pool_size is not None:
            return self.pool_size, self.pool_size
        return max(size[0] // self.sr_ratio, 1), max(size[1] // self.sr_ratio, 1)

    def check(self, x: Tensor) -> None:
        """Refuse an input that the mixer cannot take, with a ``ValueError``."""
        check_input(self, x, self.dim)
        if self.pool_size is not None and self.pool_size >= min(x.shape[2:]):
            raise ValueError(
                f"pool_size={self.pool_size} must be smaller than the shorter side of the map, got a map of "
                f"{x.shape[2]}x{x.shape[3]}; take a smaller pool_size, or sr_ratio"
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        self.check(x)
        size = (x.shape[2], x.shape[3])
        grid = self.pool_grid(size)
        tokens = x.permute(0, 2, 3, 1)  # (B, H, W, C)

        q = F.normalize(self._heads(self.q(tokens)), dim=-1).flatten(2, 3)  # (B, heads, N, d)
        k, v = (self._heads(part) for part in self.kv(tokens).chunk(2, -1))  # (B, heads, H, W, d) each
        inside = _neighbours(size[0], self.window_size // 2, x.device)[:, None] * _neighbours(
            size[1], self.window_size // 2, x.device
        )
        scaled = self.scaled(q, inside.view(-1, 1) + grid[0] * grid[1])
        local = window_scores(
            _channels_first(scaled.unflatten(2, size)),
            _channels_first(F.normalize(k, dim=-1)),
            self.window_size,
            self.relative_pos_bias_local,
        )  # (B, heads, K, H, W)

        pooled = F.adaptive_avg_pool2d(F.gelu(self.sr(tokens)).permute(0, 3, 1, 2), grid).flatten(2).mT  # (B, p, C)
        pooled_k, pooled_v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.kv(self.norm(pooled)).chunk(2, -1)
        )  # (B, heads, p, d) each
        far = scaled @ F.normalize(pooled_k, dim=-1).mT + self.cpb(size, grid, self.pretrain_size)  # (B, heads, N, p)

        attention = torch.cat([local.flatten(3).mT, far], -1).softmax(-1)  # (B, heads, N, K + p)
        near, far = self.attn_drop(attention).split([self.window_size**2, grid[0] * grid[1]], -1)
        near = near + q @ self.learnable_tokens + self.learnable_bias
        y = window_sum(_channels_first(near.unflatten(2, size)), _channels_first(v), self.window_size)
        return self.project(y.flatten(3).mT + far @ pooled_v, size)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, heads, H, W, d), a view."""
        return x.unflatten(-1, (self.num_heads, -1)).permute(0, 3, 1, 2, 4)

    def extra_repr(self) -> str:
        """Settings shown by ``print``."""
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, window_size={self.window_size}, sr_ratio={self.sr_ratio}, "
            f"pool_size={self.pool_size}, pretrain_size={self.pretrain_size}"
        )


def _channels_first(x: Tensor) -> Tensor:
    """(B, heads, H, W, d) -> (B, heads, d, H, W), a view."""
    return x.permute(0, 1, 4, 2, 3)


class CosineAttention(_LengthScaledAttention):
    """Mix tokens by attention of normalised queries and keys over the whole map.

    Args:
        dim: Channels C.
        num_heads: Heads; must divide ``dim``. None: heads of 24 channels (the paper's) where 24 divides ``dim``, else one.
        pretrain_size: Side of the map in pretraining, or (H, W), for the position bias. None (default): as the map is.
        qkv_bias: Whether queries, keys and values have a bias. Default True.
        attn_drop: Dropout of the attention weights. Default 0.
        proj_drop: Dropout of the output. Default 0.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``; an input that is not ``(B, C, H, W)``.

    Example:
        >>> mixer = CosineAttention(48)
        >>> mixer.num_heads, mixer(torch.randn(2, 48, 6, 9)).shape
        (2, torch.Size([2, 48, 6, 9]))
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        pretrain_size: int | Size | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, pretrain_size, attn_drop, proj_drop, device, dtype)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        check_input(self, x, self.dim)
        size = (x.shape[2], x.shape[3])
        tokens = x.flatten(2).transpose(1, 2)  # (B, N, C)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, d)
        q = self.scaled(F.normalize(q, dim=-1), float(size[0] * size[1]))
        bias = self.cpb(size, size, self.pretrain_size)  # (heads, N, N)
        drop = self.attn_drop.p if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q.to(v.dtype), F.normalize(k, dim=-1).to(v.dtype), v, bias.to(v.dtype), dropout_p=drop, scale=1.0
        )
        return self.project(y, size)

    def extra_repr(self) -> str:
        """Settings shown by ``print``."""
        return f"dim={self.dim}, num_heads={self.num_heads}, pretrain_size={self.pretrain_size}"
