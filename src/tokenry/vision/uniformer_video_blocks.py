"""The parts of a UniFormer for video: blocks, patch embedding and head, on maps (B, C, T, H, W); see ``uniformer_video``."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import ClassifierHead, DropPath, Mlp
from torch import Tensor, nn

from tokenry.layers.conv_pos_enc import ConvPosEnc
from tokenry.layers.in_place_gelu import InPlaceGELU
from tokenry.layers.pointwise import Pointwise3d, PointwiseMLP
from tokenry.mixers.mhra_3d import DividedMHRA3d, GlobalMHRA3d, LocalMHRA3d

__all__ = ["ClipHead", "GlobalBlock3d", "LocalBlock3d", "PatchEmbed3d"]


class LocalBlock3d(nn.Module):
    """Position encoding, local aggregator and MLP on (B, C, T, H, W), with batch norms.

    Args:
        dim: Channels C.
        mlp_ratio: Hidden width of the MLP over C.
        proj_drop: Dropout rate of the aggregator's output and in the MLP.
        drop_path: Rate of stochastic depth.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pos_embed = ConvPosEnc(dim, frames=True, **dd)
        self.norm1 = nn.BatchNorm3d(dim, **dd)
        self.mixer = LocalMHRA3d(dim, proj_drop=proj_drop, **dd)
        self.norm2 = nn.BatchNorm3d(dim, **dd)
        self.mlp = PointwiseMLP(dim, int(mlp_ratio * dim), proj_drop, Pointwise3d, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C, T, H, W)."""
        x = self.pos_embed(x)
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class GlobalBlock3d(nn.Module):
    """Position encoding, attention over space and time and MLP on (B, C, T, H, W), with layer norms.

    Args:
        dim: Channels C.
        head_dim: Channels of an attention head; must divide ``dim``.
        split: Attend over time and space in turn (``DividedMHRA3d``, which brings its norms and stochastic depth).
        mlp_ratio: Hidden width of the MLP over C.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate of attention's output and in the MLP.
        drop_path: Rate of stochastic depth.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int | None = None,
        split: bool = False,
        mlp_ratio: float = 4.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        attention: dict[str, Any] = {"head_dim": head_dim, "attn_drop": attn_drop, "proj_drop": proj_drop, **dd}
        self.pos_embed = ConvPosEnc(dim, frames=True, **dd)
        self.norm1 = nn.Identity() if split else nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mixer = DividedMHRA3d(dim, drop_path=drop_path, **attention) if split else GlobalMHRA3d(dim, **attention)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), act_layer=InPlaceGELU, drop=proj_drop, **dd)
        drop = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.drop_path1 = nn.Identity() if split else drop
        self.drop_path2 = drop

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C, T, H, W)."""
        x = self.pos_embed(x).permute(0, 2, 3, 4, 1)  # (B, T, H, W, C); no copy where memory is channels-last
        mixed = self.mixer(self.norm1(x).permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
        x = x + self.drop_path1(mixed)
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x.permute(0, 4, 1, 2, 3)


class PatchEmbed3d(nn.Module):
    """Patches of pixels or tokens, over one frame or three, become tokens: a convolution and a layer norm."""

    def __init__(
        self, in_chans: int, dim: int, patch_size: int, frames: int = 1, frame_stride: int = 1, **dd: Any
    ) -> None:
        super().__init__()
        kernel, stride = (frames, patch_size, patch_size), (frame_stride, patch_size, patch_size)
        self.proj = nn.Conv3d(in_chans, dim, kernel, stride, padding=(frames // 2, 0, 0), **dd)
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T', H / patch_size, W / patch_size)."""
        return self.norm(self.proj(x).permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class ClipHead(ClassifierHead):
    """``fc(mean of x over T, H, W)`` for x: (B, C, T, H, W)."""

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, T, H, W) -> (B, num_classes), or the pooled features; the map itself with neither pooling nor classes."""
        y = super().forward(x.flatten(3), pre_logits)
        return y.unflatten(3, x.shape[3:]) if y.ndim == 4 else y
