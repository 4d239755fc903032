"""Relation aggregators over space and time: a 3-D convolution near the pixels, attention over all tokens of a clip deep inside.

Li et al., "UniFormer: Unified Transformer for Efficient Spatiotemporal Representation Learning", ICLR 2022, arXiv:2201.04676.

The aggregators of ``tokenry.mixers.mhra`` with time as a third dimension, x: (B, C, T, H, W), V and U linear:

    local     y = U dwconv_kxkxk( V x )
    global    y = softmax(Q K^T / sqrt(d)) V U       over all T H W tokens of a clip together
    divided   a = x + temporal(norm(x))              each of the H W places on its own, over its T tokens
              y = spatial(norm(a))                   each of the T frames on its own, over its H W tokens

A block adds y to x, not to a: time reaches the output of the divided form through what space makes of it alone, as in the
authors' code. Temporal attention starts as zero (queries, keys and values are 0), with an output map of ones that lets it
learn, so a divided aggregator starts as attention inside frames.

Cost at C channels: local 2C^2 + (k^3 + 3)C parameters; global 4C^2 + 4C and, on N = T H W tokens, 4NC^2 + 2N^2 C
multiply-accumulates; divided twice the linear part and 2NC(T + H W) for 2N^2 C.

These modules take clips: they stand beside the mixers for images, not among them, and run in no image backbone.
"""

from __future__ import annotations

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from tokenry.layers.pointwise import Pointwise3d
from tokenry.mixers.mhra import GlobalMHRA, LocalMHRA
from tokenry.mixers.registry import Layout

__all__ = ["DividedMHRA3d", "GlobalMHRA3d", "LocalMHRA3d"]


def _check_clip(x: Tensor, dim: int) -> None:
    if x.ndim != 5 or x.shape[1] != dim:
        raise ValueError(
            f"expected a map of clips (B, C, T, H, W) with C={dim}, got {tuple(x.shape)}; for images take LocalMHRA or "
            "GlobalMHRA"
        )


class LocalMHRA3d(LocalMHRA):
    """Mix tokens that are near in space and time: a pointwise map, a depthwise 3-D convolution and a pointwise map.

    Args:
        dim: Channels C.
        kernel_size: Side k of the window in tokens and in frames, odd. Default 5 (authors' code).
        proj_drop: Dropout rate of the output. Default 0.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: ``kernel_size`` is even or below 1; the input is no map of clips.

    Example:
        >>> mixer = LocalMHRA3d(16)
        >>> sum(p.numel() for p in mixer.parameters()), mixer(torch.randn(2, 16, 4, 6, 9)).shape
        (2560, torch.Size([2, 16, 4, 6, 9]))
    """

    pointwise = Pointwise3d
    depthwise = nn.Conv3d

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C, T, H, W)."""
        _check_clip(x, self.dim)
        return self.aggregate(x)


class GlobalMHRA3d(GlobalMHRA):
    """Mix all tokens of a clip by self-attention over space and time together.

    Args:
        dim: Channels C.
        head_dim: Channels d of a head; must divide ``dim``. None (default): the greatest common divisor of ``dim`` and 64.
        qkv_bias: Whether queries, keys and values have a bias. Default True (authors' code).
        attn_drop: Dropout rate of the attention weights. Default 0.
        proj_drop: Dropout rate of the output. Default 0.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: ``head_dim`` does not divide ``dim``; the input is no map of clips.

    Example:
        >>> mixer = GlobalMHRA3d(32, head_dim=16)
        >>> mixer(torch.randn(2, 32, 4, 3, 5)).shape
        torch.Size([2, 32, 4, 3, 5])
    """

    layout = Layout.NCHW  # with time before H

    def token_maps(self, x: Tensor) -> dict[str, Tensor]:
        """``attention`` (B, T, H, W): what every token receives, averaged over heads and queries."""
        _check_clip(x, self.dim)
        return {"attention": self.received(x.flatten(2).mT).unflatten(1, x.shape[2:])}

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C, T, H, W)."""
        _check_clip(x, self.dim)
        return self.attend(x.flatten(2).mT).mT.unflatten(2, x.shape[2:])


class DividedMHRA3d(nn.Module):
    """Mix the tokens of each place over time, then those of each frame over space, both by self-attention.

    It holds its own two layer norms, so the block around it hands it the map as it is.

    Args:
        dim: Channels C.
        head_dim: As in ``GlobalMHRA3d``.
        qkv_bias: As in ``GlobalMHRA3d``.
        attn_drop: As in ``GlobalMHRA3d``.
        drop_path: Rate of stochastic depth: of temporal attention per place, of spatial attention per frame (authors' code).
        proj_drop: As in ``GlobalMHRA3d``.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: ``head_dim`` does not divide ``dim``; the input is no map of clips.

    Example:
        >>> mixer = DividedMHRA3d(32, head_dim=16)
        >>> mixer(torch.randn(2, 32, 4, 3, 5)).shape
        torch.Size([2, 32, 4, 3, 5])
    """

    def __init__(
        self,
        dim: int,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        *,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim

        def attention() -> GlobalMHRA:
            return GlobalMHRA(dim, head_dim, qkv_bias, attn_drop, proj_drop=proj_drop, device=device, dtype=dtype)

        self.temporal_norm = nn.LayerNorm(dim, eps=1e-6, device=device, dtype=dtype)
        self.temporal = attention()
        self.spatial_norm = nn.LayerNorm(dim, eps=1e-6, device=device, dtype=dtype)
        self.spatial = attention()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.silence_time()

    def silence_time(self) -> None:
        """Temporal attention's first weights: it adds nothing yet, and has gradients to learn from."""
        qkv, proj = self.temporal.qkv, self.temporal.proj
        for parameter in (qkv.weight, qkv.bias, proj.bias):
            if parameter is not None:
                nn.init.zeros_(parameter)
        nn.init.ones_(proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C, T, H, W)."""
        _check_clip(x, self.dim)
        batch, _, frames, height, width = x.shape
        tokens = x.permute(0, 2, 3, 4, 1).flatten(2, 3)  # (B, T, HW, C)
        places = self.temporal_norm(tokens).transpose(1, 2).flatten(0, 1)  # (B HW, T, C)
        moved = self.drop_path(self.temporal(places)).unflatten(0, (batch, height * width))
        tokens = (tokens + moved.transpose(1, 2)).flatten(0, 1)  # (B T, HW, C)
        y = self.drop_path(self.spatial(self.spatial_norm(tokens)))
        return y.unflatten(0, (batch, frames)).unflatten(2, (height, width)).permute(0, 4, 1, 2, 3)
