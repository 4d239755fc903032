"""The parts that all UniFormers are made of, on the maps of images (B, C, H, W) or of clips (B, C, T, H, W).

    x = x + dwconv3(x)                 position encoding
    x = x + MHRA(norm1(x))             local, batch norm, or global, layer norm
    x = x + MLP(norm2(x))              C -> r C -> C, GELU

Time is one dimension more of the convolutions and of the batch norms; attention and layer norms see tokens and know no
dimensions. Li et al., 2022, arXiv:2201.09450 (images) and arXiv:2201.04676 (clips).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerScale, Mlp, trunc_normal_
from torch import Tensor, nn

from tokenry.layers.conv_norm import ConvNorm
from tokenry.layers.conv_pos_enc import ConvPosEnc
from tokenry.layers.in_place_gelu import InPlaceGELU
from tokenry.layers.pointwise import Pointwise, Pointwise3d, PointwiseMLP
from tokenry.mixers.mhra import GlobalMHRA, LocalMHRA, WindowMHRA
from tokenry.mixers.mhra_3d import GlobalMHRA3d, LocalMHRA3d
from tokenry.mixers.registry import Layout, layout_of
from tokenry.vision.backbone import Stage

__all__ = [
    "GlobalBlock",
    "LocalBlock",
    "PatchEmbed",
    "check_stages",
    "init_weights",
    "make_conv_stem",
    "make_stages",
    "to_map",
    "to_tokens",
]


class MapScale(LayerScale):
    """A learned scale per channel of maps: (B, C, ...) -> (B, C, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        """The shape stays."""
        return x * self.gamma.view(-1, *[1] * (x.ndim - 2))


class LocalBlock(nn.Module):
    """Position encoding, local aggregator and MLP, with batch norms.

    Args:
        dim: Channels C.
        mlp_ratio: Hidden width of the MLP over C.
        proj_drop: Dropout rate of the aggregator's output and in the MLP.
        drop_path: Rate of stochastic depth.
        layer_scale: First value of a learned scale per channel of both branches. None: no scale.
        frames: Whether the maps are those of clips.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        frames: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        norm = nn.BatchNorm3d if frames else nn.BatchNorm2d
        self.pos_embed = ConvPosEnc(dim, frames=frames, **dd)
        self.norm1 = norm(dim, **dd)
        self.mixer = (LocalMHRA3d if frames else LocalMHRA)(dim, proj_drop=proj_drop, **dd)
        self.norm2 = norm(dim, **dd)
        self.mlp = PointwiseMLP(dim, int(mlp_ratio * dim), proj_drop, Pointwise3d if frames else Pointwise, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        scale = partial(MapScale, dim, layer_scale, **dd) if layer_scale is not None else nn.Identity
        self.ls1, self.ls2 = scale(), scale()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) or (B, C, T, H, W); the shape stays."""
        x = self.pos_embed(x)
        x = x + self.drop_path(self.ls1(self.mixer(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class GlobalBlock(nn.Module):
    """Position encoding, attention and MLP, with layer norms.

    Args:
        dim: Channels C.
        head_dim: Channels of an attention head; must divide ``dim``.
        window: Side of the windows that attention stays in, on images. None (default): attention over the whole map.
        mlp_ratio: Hidden width of the MLP over C.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate of attention's output and in the MLP.
        drop_path: Rate of stochastic depth.
        layer_scale: First value of a learned scale per channel of both branches. None: no scale.
        frames: Whether the maps are those of clips; attention is over space and time together.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int | None = None,
        window: int | None = None,
        mlp_ratio: float = 4.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        frames: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        attention = GlobalMHRA3d if frames else GlobalMHRA
        if window is not None:
            attention = partial(WindowMHRA, window=window)
        self.pos_embed = ConvPosEnc(dim, frames=frames, **dd)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mixer = attention(dim, head_dim=head_dim, attn_drop=attn_drop, proj_drop=proj_drop, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), act_layer=InPlaceGELU, drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        scale = partial(LayerScale, dim, layer_scale, **dd) if layer_scale is not None else nn.Identity
        self.ls1, self.ls2 = scale(), scale()

    def mix(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """The aggregator on tokens (B, N, C) that lie on a map of ``size``, in the layout that it takes."""
        layout = layout_of(self.mixer)
        if layout == Layout.NLC:
            return self.mixer(x)
        if layout == Layout.NHWC:
            return self.mixer(x.unflatten(1, size)).flatten(1, -2)
        return self.mixer(x.mT.unflatten(2, size)).flatten(2).mT

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) or (B, C, T, H, W); the shape stays."""
        x, size = to_tokens(self.pos_embed(x))
        x = x + self.drop_path(self.ls1(self.mix(self.norm1(x), size)))
        x = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        return to_map(x, size)


def to_tokens(x: Tensor) -> tuple[Tensor, torch.Size]:
    """(B, C, ...) -> (B, N, C) and the size of the map. No copy where memory is channels-last."""
    return x.movedim(1, -1).flatten(1, -2), x.shape[2:]


def to_map(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, N, C) -> (B, C, ...), channels-last in memory."""
    return x.unflatten(1, size).movedim(-1, 1)


class PatchEmbed(nn.Module):
    """Each patch becomes one token: a convolution whose stride is its kernel, and a layer norm.

    Args:
        in_chans: Channels C.
        dim: Channels C'.
        patch_size: Side P of a patch in pixels or tokens.
        frames: How many frames of a clip a patch sees, with zeros outside the clip. None (default): images.
        frame_stride: Every how many frames there is a patch.
        **dd: ``device`` and ``dtype``.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int,
        frames: int | None = None,
        frame_stride: int = 1,
        **dd: Any,
    ) -> None:
        super().__init__()
        if frames is None:
            self.proj: nn.Module = nn.Conv2d(in_chans, dim, patch_size, patch_size, **dd)
        else:
            kernel, stride = (frames, patch_size, patch_size), (frame_stride, patch_size, patch_size)
            self.proj = nn.Conv3d(in_chans, dim, kernel, stride, padding=(frames // 2, 0, 0), **dd)
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / P, W / P), or (B, C, T, H, W) -> (B, C', T / frame_stride, H / P, W / P)."""
        return self.norm(self.proj(x).movedim(1, -1)).movedim(-1, 1)


class ConvNorm3d(nn.Module):
    """``norm(conv(x))`` on clips, kernel 3: (B, C, T, H, W) -> (B, C', T / frame_stride, H / 2, W / 2)."""

    def __init__(self, in_chans: int, dim: int, frame_stride: int, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_chans, dim, 3, (frame_stride, 2, 2), padding=1, **dd)
        self.norm = nn.BatchNorm3d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def make_conv_stem(in_chans: int, dim: int, frames: bool = False, **dd: Any) -> nn.Sequential:
    """Two convolutions of kernel 3 and stride 2: (B, in_chans, H, W) -> (B, dim, H / 4, W / 4); of a clip the second halves T."""
    if frames:
        first, second = ConvNorm3d(in_chans, dim // 2, 1, **dd), ConvNorm3d(dim // 2, dim, 2, **dd)
    else:
        first, second = ConvNorm(in_chans, dim // 2, 3, 2, **dd), ConvNorm(dim // 2, dim, 3, 2, **dd)
    return nn.Sequential(first, nn.GELU(), second)


def check_stages(depths: Sequence[int], dims: Sequence[int], blocks: str = "LLGG") -> None:
    """Refuse depths, widths and kinds of blocks that make no four stages."""
    if len(blocks) != 4 or set(blocks) - set("LG"):
        raise ValueError(f"blocks is one letter per stage, L (local) or G (global), as in 'LLGG'; got {blocks!r}")
    if len(depths) != 4 or len(dims) != 4 or min(*depths, *dims) < 1:
        raise ValueError(f"depths and dims need four positive entries each, got {list(depths)} and {list(dims)}")


def make_stages(
    depths: Sequence[int],
    dims: Sequence[int],
    embed: Callable[[int, int], nn.Module],
    block: Callable[[int, int], nn.Module],
    stage: Callable[[int, nn.Module, list[nn.Module]], Stage] = lambda _, downsample, blocks: Stage(downsample, blocks),
) -> nn.Sequential:
    """The stages of a network whose stem has made the first one's map.

    Args:
        depths: Blocks per stage.
        dims: Channels per stage.
        embed: Makes the downsampling from channels to channels, of all stages but the first.
        block: Makes a block of a stage and an index in it.
        stage: Makes a stage of its number, its downsampling and its blocks.
    """
    return nn.Sequential(
        *(
            stage(i, nn.Identity() if i == 0 else embed(dims[i - 1], dim), [block(i, j) for j in range(depths[i])])
            for i, dim in enumerate(dims)
        )
    )


def init_weights(module: nn.Module) -> None:
    """Linear maps from a normal distribution of deviation 0.02 without offsets; convolutions stay as torch made them."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
