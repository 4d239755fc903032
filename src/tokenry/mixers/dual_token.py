"""Dual tokens: image tokens convolved locally, and global tokens that each belong to a cell of the image.

Chu et al., "DualToken-ViT: Position-aware Efficient Vision Transformer with Dual Token Fusion", SDM 2024,
arXiv:2309.12424. On a map X (B, C, H, W) and global tokens G (B, g * g, C), g = 7:

    X_local  = X + W2 GELU( W1 LayerNorm( dwconv7x7(X) ) )                   a ConvNeXt block
    X_ds     = M times {conv encoder, halve}, down to g x g                  step by step, not at once
    G_new    = s(lambda) MSA(X_ds) + (1 - s(lambda)) MLP(G)                  weighted sum: token i and cell i are one place
    X_new    = X_local + MSA( queries X_local; keys, values G_new )          N x g^2 attention

The sum is what makes the global tokens position-aware; it needs one parameter. s is the sigmoid; lambda starts at 0, an even
blend. Cost is linear in N.

The authors' code is not public and the equations of the text are pictures, so some things are choices of this library: the
encoders while halving are the same block with 3x3 kernels and half the width, halving is average pooling, attentions see layer-normed inputs,
and the sum of the last line goes through the attention's own output map. ``mlp="mix"`` is the paper's variant whose MLP on G
mixes the tokens first.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.layers.cross_attention import CrossAttention
from tokenry.layers.head_count import head_count
from tokenry.layers.mlp import ChannelMLP
from tokenry.mixers.attention import AttentionMixer
from tokenry.mixers.registry import Layout, check_input

__all__ = ["ConvEncoder", "DualTokenMixer", "PositionAwareTokens"]


class ConvEncoder(nn.Module):
    """``x + W2 GELU(W1 LayerNorm(dwconv(x)))`` on (B, C, H, W), the ConvNeXt block.

    Args:
        dim: Channels C.
        kernel_size: Odd side of the depthwise kernel. Default 7.
        ratio: Hidden width over C. Default 4.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        ratio: float = 4.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dwconv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **dd)
        self.norm = nn.LayerNorm(dim, **dd)
        self.mlp = ChannelMLP(dim, int(ratio * dim), **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + self.mlp(self.norm(self.dwconv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class TokenMLP(nn.Module):
    """Residual MLP on global tokens (B, T, C); with ``mix`` one along the tokens comes first."""

    def __init__(self, dim: int, tokens: int, mix: bool, ratio: float, **dd: Any) -> None:
        super().__init__()
        self.token_norm = nn.LayerNorm(dim, **dd) if mix else None
        self.token_mlp = ChannelMLP(tokens, 2 * tokens, **dd) if mix else None
        self.norm = nn.LayerNorm(dim, **dd)
        self.mlp = ChannelMLP(dim, int(ratio * dim), **dd)

    def forward(self, g: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        if self.token_mlp is not None and self.token_norm is not None:
            g = g + self.token_mlp(self.token_norm(g).transpose(1, 2)).transpose(1, 2)
        return g + self.mlp(self.norm(g))


class PositionAwareTokens(nn.Module):
    """What the global tokens do: gather from the map, keep what they knew, give to every position.

    Args:
        dim: Channels C.
        num_heads: Heads of both attentions; must divide ``dim``. None: heads of 32 channels where that divides, else one.
        grid: Side g of the grid of global tokens. Default 7 (paper).
        steps: M, how often the map is encoded and halved before the rest is pooled to the grid. With H = W = g * 2^M nothing
            is left to pool. Default 1.
        mlp: ``"plain"``, or ``"mix"`` for the variant that mixes tokens too.
        mlp_ratio: Hidden width over C of the tokens' channel MLP and of the encoders. Default 2.
        proj_drop: Dropout rate of what the positions receive.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: Heads that do not divide ``dim``, a grid below 1, negative steps, another ``mlp``.

    Example:
        >>> part = PositionAwareTokens(16, grid=4)
        >>> x, g = part(torch.randn(2, 16, 8, 8), torch.randn(2, 16, 16))
        >>> x.shape, g.shape
        (torch.Size([2, 16, 8, 8]), torch.Size([2, 16, 16]))
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        grid: int = 7,
        steps: int = 1,
        mlp: Literal["plain", "mix"] = "plain",
        mlp_ratio: float = 2.0,
        *,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if grid < 1 or steps < 0 or mlp not in ("plain", "mix"):
            raise ValueError(
                f"grid must be at least 1, steps at least 0 and mlp 'plain' or 'mix', got {grid}, {steps} and {mlp!r}"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        heads = head_count(dim, num_heads)
        self.dim, self.grid = dim, grid
        self.encoders = nn.ModuleList(ConvEncoder(dim, 3, mlp_ratio, **dd) for _ in range(steps))
        self.norm = nn.LayerNorm(dim, **dd)
        self.gather = AttentionMixer(dim, dim // heads, heads, qkv_bias=True, proj_bias=True, **dd)
        self.token_mlp = TokenMLP(dim, grid * grid, mlp == "mix", mlp_ratio, **dd)
        self.blend = nn.Parameter(torch.zeros((), **dd))  # lambda before the sigmoid
        self.query_norm, self.key_norm = nn.LayerNorm(dim, **dd), nn.LayerNorm(dim, **dd)
        self.broadcast = CrossAttention(dim, heads, proj_drop=proj_drop, **dd)

    def downsample(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, g * g, C): step by step, and what the steps leave by adaptive pooling."""
        for encoder in self.encoders:
            x = F.avg_pool2d(encoder(x), 2, ceil_mode=True, count_include_pad=False)
        if x.shape[-2:] != (self.grid, self.grid):
            x = F.adaptive_avg_pool2d(x, self.grid)
        return x.flatten(2).transpose(1, 2)

    def forward(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W), (B, g * g, C) -> what every position receives (B, C, H, W), and the new tokens (B, g * g, C)."""
        if g.ndim != 3 or len(g) != len(x) or g.shape[1:] != (self.grid**2, self.dim):
            raise ValueError(
                f"global tokens must be (B, {self.grid**2}, {self.dim}) with the B={len(x)} of the map, got {tuple(g.shape)}"
            )
        share = self.blend.sigmoid()
        gathered = self.gather(self.norm(self.downsample(x)))  # (B, g * g, C)
        g = share * gathered + (1 - share) * self.token_mlp(g)
        tokens = x.flatten(2).transpose(1, 2)  # (B, N, C)
        received = self.broadcast(self.query_norm(tokens), self.key_norm(g))
        return received.transpose(1, 2).view(x.shape), g


class DualTokenMixer(nn.Module):
    """Mix tokens by a local convolution and by position-aware global tokens.

    Args:
        dim: Channels C.
        num_heads: Heads of the attentions; must divide ``dim``. None: heads of 32 channels where that divides, else one.
        grid: Side of the grid of global tokens. Default 7 (paper).
        down_steps: How often the map is halved before it is pooled to the grid. Default 1.
        mlp: Of the global tokens: ``"plain"`` or ``"mix"``.
        mlp_ratio: Hidden width over C of that MLP and of the encoders before the grid. Default 2.
        own_tokens: Learn global tokens of its own, so that it runs alone. False in a network that hands them on.
        proj_drop: Dropout rate of what the positions receive.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: See ``PositionAwareTokens``; no global tokens given to a mixer without its own.

    Example:
        >>> mixer = DualTokenMixer(16, grid=4)
        >>> mixer(torch.randn(2, 16, 9, 5)).shape
        torch.Size([2, 16, 9, 5])
    """

    layout = Layout.NCHW
    fixed_tokens = None

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        grid: int = 7,
        down_steps: int = 1,
        mlp: Literal["plain", "mix"] = "plain",
        mlp_ratio: float = 2.0,
        own_tokens: bool = True,
        *,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.local = ConvEncoder(dim, **dd)
        self.global_part = PositionAwareTokens(
            dim, num_heads, grid, down_steps, mlp, mlp_ratio, proj_drop=proj_drop, **dd
        )
        self.tokens = nn.Parameter(torch.zeros(1, grid * grid, dim, **dd)) if own_tokens else None
        if self.tokens is not None:
            nn.init.trunc_normal_(self.tokens, std=0.02)

    def _tokens(self, x: Tensor, g: Tensor | None) -> Tensor:
        """Given global tokens, or the mixer's own."""
        check_input(self, x, self.global_part.dim)
        if g is not None:
            return g
        if self.tokens is None:
            raise ValueError("the mixer was made with own_tokens=False: give it global tokens, mixer(x, g)")
        return self.tokens.expand(len(x), -1, -1)

    def forward(self, x: Tensor, g: Tensor | None = None) -> Any:
        """Mix with the mixer's own global tokens, or with those of the network around it.

        Args:
            x: (B, C, H, W).
            g: (B, grid * grid, C). None: its own.

        Returns:
            The map (B, C, H, W); where ``g`` is given, the pair of it and the new global tokens (B, grid * grid, C).
        """
        tokens = self._tokens(x, g)
        local = self.local(x)
        received, new = self.global_part(local, tokens)
        return local + received if g is None else (local + received, new)

    def token_maps(self, x: Tensor, g: Tensor | None = None) -> dict[str, Tensor]:
        """``attention`` (B, grid, grid): how much of what all positions receive comes from each cell's global token."""
        part, local = self.global_part, self.local(x)
        _, new = part(local, self._tokens(x, g))
        fusion = part.broadcast
        tokens = part.query_norm(local.flatten(2).transpose(1, 2))
        q, k = (
            t.unflatten(-1, (fusion.num_heads, -1)).transpose(1, 2)
            for t in (fusion.q(tokens), fusion.k(part.key_norm(new)))
        )
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1).mean((1, 2))  # (B, g * g)
        return {"attention": weights.unflatten(1, (part.grid, part.grid))}
