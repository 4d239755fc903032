"""Self-guided attention: the network decides itself which tokens keep their detail and which are summed up together.

Ren et al., "SG-Former: Self-guided Transformer with Evolving Token Reallocation", ICCV 2023, arXiv:2308.12216. x: (B, H, W, C),
N = H W tokens, heads of width d. Two attentions take turns; the first measures how significant each token is, the second
spends its keys accordingly. Both add a local term before the output map:

    y = ( attention + dwconv3x3(x Wl) ) Wo

Hybrid-scale attention (x -> y, significance). Half of the heads look at a map that a convolution of side and stride r has made
smaller, the other half inside windows of w x w tokens:

    global  keys and values from z = GELU(LN(conv_r(x))), N / r^2 of them
    local   keys and values from the window of the query
    s       = mean over heads and queries of softmax(q k^T / sqrt(d)), global (repeated r x r) + local     s: (B, H, W)

s carries no gradient; where r and w divide the map it sums to r^2 + N / w^2.

Self-guided attention (x, significance -> y). Tokens are sorted by s, ascending. The least significant quarter is summed in long
groups of ranks, the middle half in shorter ones, the most significant quarter in the shortest:

    key_j = sum_r f_r x[rank g j + r] + c          one f (g weights) and one c per part, for all channels

and every token attends to these keys: 60 in place of 3,136 at 56 x 56. Groups are neighbours in rank, not in space.

Two things are built differently from the authors' code, with the same outcome. It sorts the map twice, once listed by rows and
once by columns, for one half of the heads each; as sorting discards that order the two agree except for the order of equal
values, so one sequence serves all heads here. Sizes that windows, cells or groups do not divide are padded: with tokens that
windows mask, with zeros that the convolution and the sums do not see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.layers.fan_out_init import fan_out_init
from tokenry.layers.head_count import head_count
from tokenry.layers.window_partition import window_key_mask, window_merge, window_partition
from tokenry.mixers.registry import Layout, check_input

__all__ = ["HybridScaleAttention", "LocalTermAttention", "SelfGuidedAttention", "SelfGuidedMixer"]

# Ranks per group by reduction ratio, from the least significant tokens to the most, and what share of the tokens each part has.
GROUP_SIZES: dict[int, tuple[int, ...]] = {8: (196, 56, 28), 4: (49, 14, 7), 2: (2, 1)}
SHARES: dict[int, tuple[int, ...]] = {1: (1,), 2: (1, 1), 3: (1, 2, 1)}
# Attention weights of one head and image that are kept at once: 16 MiB of float32.
BLOCK_VALUES = 2**22


def _weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention weights (..., N, M), at least in float32: (..., N, d), (..., M, d), mask of keys that are there."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of all queries to all keys, and what each key receives in the mean over heads and queries.

    Args:
        q: (B, h, N, d).
        k: (B, h, M, d).
        v: (B, h, M, d).

    Returns:
        (B, h, N, d), and (B, M) without a gradient.
    """
    if q.shape[2] * k.shape[2] <= BLOCK_VALUES:
        weights = _weights(q, k)
        return weights.to(v.dtype) @ v, weights.detach().mean((1, 2))
    y = F.scaled_dot_product_attention(q, k, v)
    with torch.no_grad():  # the weights a second time, some queries after others, so that N x M of them never exist
        blocks = q.split(max(1, BLOCK_VALUES // k.shape[2]), dim=2)
        received = torch.stack([_weights(block, k).sum((1, 2)) for block in blocks]).sum(0)
    return y, received / (q.shape[1] * q.shape[2])


class _WithLocalTerm(nn.Module):
    """What the attentions share: the local term and the output map."""

    layout = Layout.NHWC
    fixed_tokens = None

    def __init__(self, dim: int, num_heads: int, proj_drop: float, dd: dict[str, Any]) -> None:
        super().__init__()
        self.dim, self.num_heads = dim, num_heads
        self.lepe_linear = nn.Linear(dim, dim, **dd)
        self.lepe_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def _close(self, y: Tensor, x: Tensor) -> Tensor:
        """Attention's outcome and its input, both (B, H, W, C) -> (B, H, W, C)."""
        local = self.lepe_conv(self.lepe_linear(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj_drop(self.proj(y + local))

    def extra_repr(self) -> str:
        """Settings shown by ``print``."""
        return f"dim={self.dim}, num_heads={self.num_heads}"


def _even_heads(dim: int, wanted: int | None) -> int:
    """Heads that two halves of the channels share evenly."""
    if dim % 2:
        raise ValueError(f"half of the channels look far and half near: dim must be even, got {dim}; use {dim + 1}")
    if wanted is None:
        return 2 * head_count(dim // 2, None)
    if wanted < 1 or wanted % 2 or dim % wanted:
        near = 2 * next(heads for heads in range(max(1, (wanted + 1) // 2), 0, -1) if (dim // 2) % heads == 0)
        raise ValueError(
            "half of the heads look far and half near: num_heads must be even and divide "
            f"dim={dim}, got num_heads={wanted}; use num_heads={near}"
        )
    return wanted


class HybridScaleAttention(_WithLocalTerm):
    """Attention of half the heads to a smaller map and of half inside windows, and the significance of every token.

    Args:
        dim: Channels C, even.
        num_heads: Heads, even; must divide ``dim``. None: heads of about 32 channels (the paper's).
        sr_ratio: Side r of a cell of the smaller map. Default 4 (the paper's second stage; its first three have 8, 4, 2).
        window_size: Side w of a window. Default 7 (paper).
        proj_drop: Dropout of the output. Default 0.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: ``dim`` or ``num_heads`` is odd, heads do not divide ``dim``, a side is below 1; an input of another shape.

    Example:
        >>> y, significance = HybridScaleAttention(16)(torch.randn(2, 28, 28, 16))
        >>> y.shape, significance.shape, significance.sum((1, 2)).round().tolist()
        (torch.Size([2, 28, 28, 16]), torch.Size([2, 28, 28]), [32.0, 32.0])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        sr_ratio: int = 4,
        window_size: int = 7,
        *,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, _even_heads(dim, num_heads), proj_drop, dd)
        if sr_ratio < 1 or window_size < 1:
            raise ValueError(
                f"sr_ratio and window_size must be at least 1, got {sr_ratio} and {window_size}; the paper's are 8, 4 or 2 and 7"
            )
        self.sr_ratio, self.window_size = sr_ratio, window_size
        self.reduce = nn.Conv2d(dim, dim, sr_ratio, sr_ratio, **dd)
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.q_global = nn.Linear(dim, dim // 2, **dd)
        self.kv_global = nn.Linear(dim, dim, **dd)
        self.qkv_local = nn.Linear(dim, 3 * dim // 2, **dd)
        fan_out_init(self)

    def _heads(self, x: Tensor, parts: int) -> Tensor:
        """(B, N, parts * C / 2) -> (parts, B, heads / 2, N, d)."""
        return x.unflatten(-1, (parts, self.num_heads // 2, -1)).permute(2, 0, 3, 1, 4)

    def _look_far(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, C) -> outcome (B, H, W, C / 2), significance (B, H, W)."""
        height, width = x.shape[1:3]
        r = self.sr_ratio
        cells = F.pad(x, (0, 0, 0, -width % r, 0, -height % r)) if height % r or width % r else x
        z = self.reduce(cells.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B, h, w, C)
        z = F.gelu(self.norm(z))
        q = self._heads(self.q_global(x).flatten(1, 2), 1)[0]
        k, v = self._heads(self.kv_global(z).flatten(1, 2), 2)
        y, received = _attend(q, k, v)
        received = received.unflatten(1, z.shape[1:3]).repeat_interleave(r, 1).repeat_interleave(r, 2)
        return y.transpose(1, 2).reshape(*x.shape[:3], -1), received[:, :height, :width]

    def _look_near(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, C) -> outcome (B, H, W, C / 2), significance (B, H, W)."""
        size, w = (x.shape[1], x.shape[2]), self.window_size
        q, k, v = self._heads(window_partition(self.qkv_local(x), w), 3)  # (B * windows, heads / 2, w^2, d)
        real = window_key_mask(size, w, x.device)  # (windows, w^2)
        if real is None:
            weights = _weights(q, k)
            received = weights.detach().mean((1, 2))  # (B * windows, w^2)
        else:
            real = real.repeat(len(x), 1)
            weights = _weights(q, k, real[:, None, None])
            asked = weights.detach().mean(1) * real[..., None]  # padding asks nothing
            received = asked.sum(1) / real.sum(1, keepdim=True)
        y = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)
        return window_merge(y, w, size), window_merge(received[..., None], w, size)[..., 0]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, C) -> (B, H, W, C), and significance (B, H, W), at least float32, without a gradient."""
        check_input(self, x, self.dim)
        far, far_significance = self._look_far(x)
        near, near_significance = self._look_near(x)
        return self._close(torch.cat([far, near], -1), x), far_significance + near_significance

    def extra_repr(self) -> str:
        """Settings shown by ``print``."""
        return f"{super().extra_repr()}, sr_ratio={self.sr_ratio}, window_size={self.window_size}"


class LocalTermAttention(_WithLocalTerm):
    """Attention to all tokens, with the local term of this paper: the mixer of its last stage.

    Args:
        dim: Channels C.
        num_heads: Heads; must divide ``dim``. None: heads of 32 channels where 32 divides ``dim``, else one.
        proj_drop: Dropout of the output. Default 0.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``; an input of another shape.

    Example:
        >>> LocalTermAttention(16)(torch.randn(2, 5, 7, 16)).shape
        torch.Size([2, 5, 7, 16])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, head_count(dim, num_heads), proj_drop, dd)
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        fan_out_init(self)

    def attend(self, x: Tensor, sources: Tensor) -> Tensor:
        """(B, H, W, C), what keys and values are made of (B, M, C) -> (B, H, W, C)."""
        q = self.q(x).flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N, d)
        k, v = self.kv(sources).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self._close(y.transpose(1, 2).reshape(x.shape), x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        check_input(self, x, self.dim)
        return self.attend(x, x.flatten(1, 2))


class SelfGuidedAttention(LocalTermAttention):
    """Attention to keys that sum up many insignificant tokens or few significant ones.

    Args:
        dim: Channels C.
        num_heads: Heads; must divide ``dim``. None: as in ``HybridScaleAttention``.
        sr_ratio: Chooses the paper's ``group_sizes``: 8, 4 (default) or 2.
        group_sizes: Ranks per group: one size for all tokens; two for the less and the more significant half; or three for
            the least significant quarter, the middle half and the most significant quarter. None: the paper's of ``sr_ratio``,
            (196, 56, 28), (49, 14, 7) or (2, 1).
        proj_drop: Dropout of the output. Default 0.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: A ratio without group sizes; sizes below 1 or more than three; a significance that does not fit the map.

    Example:
        >>> mixer, x = SelfGuidedAttention(16, sr_ratio=8), torch.randn(1, 56, 56, 16)
        >>> significance = torch.rand(1, 56, 56)
        >>> mixer(x, significance).shape, mixer.aggregate(x, significance).shape
        (torch.Size([1, 56, 56, 16]), torch.Size([1, 60, 16]))
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        sr_ratio: int = 4,
        group_sizes: Sequence[int] | None = None,
        *,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if group_sizes is None and sr_ratio not in GROUP_SIZES:
            raise ValueError(
                f"the paper has group sizes for sr_ratio 8, 4 and 2, got {sr_ratio}; give group_sizes=(least, middle, most)"
            )
        sizes = GROUP_SIZES[sr_ratio] if group_sizes is None else tuple(group_sizes)
        if len(sizes) not in SHARES or min(sizes) < 1:
            raise ValueError(
                f"group_sizes takes one to three sizes of at least 1, for the least to the most significant, got {sizes}"
            )
        if num_heads is None and dim % 2 == 0:
            num_heads = _even_heads(dim, None)
        super().__init__(dim, num_heads, proj_drop=proj_drop, device=device, dtype=dtype)
        self.group_sizes = sizes
        self.f = nn.ModuleList(nn.Linear(size, 1, device=device, dtype=dtype) for size in sizes)
        fan_out_init(self.f)

    def part_sizes(self, tokens: int) -> list[int]:
        """How many of ``tokens`` ranks each part has, the least significant first; what does not divide goes to the second."""
        shares = SHARES[len(self.group_sizes)]
        sizes = [tokens * share // sum(shares) for share in shares]
        sizes[min(1, len(sizes) - 1)] += tokens - sum(sizes)
        return sizes

    def aggregate(self, x: Tensor, significance: Tensor) -> Tensor:
        """What keys and values are made of: (B, H, W, C), (B, H, W) -> (B, M, C), groups in the order of rising significance."""
        order = significance.flatten(1).argsort(dim=1, stable=True)  # equal values keep their order by rows
        ranked = x.flatten(1, 2).gather(1, order[..., None].expand(-1, -1, self.dim))  # (B, N, C)
        parts = ranked.split(self.part_sizes(ranked.shape[1]), 1)
        found = []
        for part, size, f in zip(parts, self.group_sizes, cast("Sequence[nn.Linear]", self.f), strict=True):
            if short := -part.shape[1] % size:
                part = F.pad(part, (0, 0, 0, short))
            groups = part.unflatten(1, (part.shape[1] // size, size))  # (B, groups, size, C)
            found.append((f.weight @ groups).squeeze(2) + f.bias)
        return torch.cat(found, 1)

    def ranks(self, significance: Tensor) -> Tensor:
        """(B, H, W) int64: the part that each token falls in, 0 the least significant."""
        order = significance.flatten(1).argsort(dim=1, stable=True)
        sizes = torch.tensor(self.part_sizes(order.shape[1]), device=order.device)
        parts = torch.arange(len(sizes), device=order.device).repeat_interleave(sizes)  # (N,), by rank
        return torch.zeros_like(order).scatter_(1, order, parts.expand_as(order)).unflatten(1, significance.shape[1:])

    def forward(self, x: Tensor, significance: Tensor) -> Tensor:  # type: ignore[override]
        """(B, H, W, C), (B, H, W) -> (B, H, W, C).

        Raises:
            ValueError: There is no significance, or not of every token.
        """
        check_input(self, x, self.dim)
        if significance is None or significance.shape != x.shape[:3]:
            given = None if significance is None else tuple(significance.shape)
            raise ValueError(
                f"self-guided attention needs the significance of every token, {tuple(x.shape[:3])}, got {given}; take it from "
                "the HybridScaleAttention before it, or use SelfGuidedMixer, which holds both"
            )
        return self.attend(x, self.aggregate(x, significance))

    def extra_repr(self) -> str:
        """Settings shown by ``print``."""
        return f"{super().extra_repr()}, group_sizes={self.group_sizes}"


class SelfGuidedMixer(nn.Module):
    """Both attentions as one token mixer, which measures the significance that it uses.

        h, s = HybridScaleAttention(x)          y = h + SelfGuidedAttention(x + h, s)

    In the paper the two are neighbouring blocks and the map goes from one to the next; here they are one step of a block of any
    MetaFormer, without the norm and the channel MLP that lie between them there, so a mixer costs about as much as two.

    Args:
        dim: Channels C, even.
        num_heads: Heads, even; must divide ``dim``. None: heads of about 32 channels (the paper's).
        sr_ratio: Side of a cell of the smaller map. Default 4.
        window_size: Side of a window. Default 7.
        group_sizes: As in ``SelfGuidedAttention``; needed if ``sr_ratio`` is none of 8, 4 and 2.
        proj_drop: Dropout of both outputs. Default 0.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: As the two attentions do.

    Example:
        >>> SelfGuidedMixer(16)(torch.randn(2, 9, 11, 16)).shape
        torch.Size([2, 9, 11, 16])
    """

    layout = Layout.NHWC
    fixed_tokens = None

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        sr_ratio: int = 4,
        window_size: int = 7,
        group_sizes: Sequence[int] | None = None,
        *,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rest: dict[str, Any] = {"proj_drop": proj_drop, "device": device, "dtype": dtype}
        self.hybrid = HybridScaleAttention(dim, num_heads, sr_ratio, window_size, **rest)
        self.guided = SelfGuidedAttention(dim, num_heads, sr_ratio, group_sizes, **rest)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        y, significance = self.hybrid(x)
        return y + self.guided(x + y, significance)

    @torch.no_grad()
    def token_maps(self, x: Tensor) -> dict[str, Tensor]:
        """``significance`` (B, H, W), and ``ranks`` (B, H, W) int64: the part that a token falls in, 0 the least significant."""
        significance = self.hybrid(x)[1]
        return {"significance": significance, "ranks": self.guided.ranks(significance)}
