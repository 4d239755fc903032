"""The parts of a MetaFormer: block, embedding, stage and head.

Maps are kept channels-last in memory, so that the linear maps, the norms and the pooling run on adjacent numbers; a mixer
of any layout gets a view in its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from tokenry.layers.mlp import ChannelMLP, MLPHead
from tokenry.mixers.registry import Layout, layout_of
from tokenry.vision.backbone import Stage

__all__ = ["ChannelsLastStage", "Embedding", "Head", "MetaFormerBlock", "residual"]


def residual(x: Tensor, branch: Tensor, shortcut_scale: Tensor | None, branch_scale: Tensor | None) -> Tensor:
    """``shortcut_scale * x + branch_scale * branch`` on (B, H, W, C), an absent scale being 1."""
    if branch_scale is None:
        return x + branch if shortcut_scale is None else torch.addcmul(branch, x, shortcut_scale)
    return torch.addcmul(x if shortcut_scale is None else x * shortcut_scale, branch, branch_scale)


class MetaFormerBlock(nn.Module):
    """One block on (B, H, W, C) with a token mixer of any layout.

    Args:
        dim: Channels C.
        mixer: The token mixer, made.
        norm: Makes a norm of C channels on (B, H, W, C).
        act: Makes the activation of the channel MLP.
        mlp_bias: Whether its linear maps have one.
        drop: Its dropout rate.
        drop_path: Rate of stochastic depth.
        layer_scale: First value of the scale of both branches. None: absent.
        res_scale: First value of the scale of both shortcuts. None: absent.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        act: Callable[[], nn.Module] = nn.GELU,
        mlp_bias: bool = True,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        res_scale: float | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = {"device": device, "dtype": dtype}

        def scale(value: float | None) -> nn.Parameter | None:
            return None if value is None else nn.Parameter(torch.full((dim,), float(value), **where))

        self.norm1 = norm(dim)
        self.token_mixer = mixer
        self.mixer_layout = layout_of(mixer)
        self.norm2 = norm(dim)
        self.mlp = ChannelMLP(dim, int(mlp_ratio * dim), act, mlp_bias, drop, **where)
        for linear in (self.mlp.fc1, self.mlp.fc2):
            trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.layer_scale1, self.layer_scale2 = scale(layer_scale), scale(layer_scale)
        self.res_scale1, self.res_scale2 = scale(res_scale), scale(res_scale)

    def mix(self, x: Tensor) -> Tensor:
        """Call the mixer in its own layout: (B, H, W, C) -> (B, H, W, C)."""
        if self.mixer_layout == Layout.NCHW:
            return self.token_mixer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self.mixer_layout == Layout.NLC:
            return self.token_mixer(x.flatten(1, 2)).unflatten(1, x.shape[1:3])
        return self.token_mixer(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = residual(x, self.drop_path(self.mix(self.norm1(x))), self.res_scale1, self.layer_scale1)
        return residual(x, self.drop_path(self.mlp(self.norm2(x))), self.res_scale2, self.layer_scale2)


class Embedding(nn.Module):
    """Convolution that makes a map of tokens smaller, with a norm before or after it: (B, C, H, W) in and out."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        shape: tuple[int, int, int],
        before: nn.Module | None = None,
        after: nn.Module | None = None,
        init: bool = True,
        **where: Any,
    ) -> None:
        super().__init__()
        kernel_size, stride, padding = self.shape = shape
        self.pre_norm, self.post_norm = before, after
        self.conv = nn.Conv2d(in_chans, dim, kernel_size, stride, padding, **where)
        if init:
            trunc_normal_(self.conv.weight, std=0.02)
            if self.conv.bias is not None:
                nn.init.zeros_(self.conv.bias)

    def size(self, side: int) -> int:
        """Side of the map made from one of side ``side``."""
        kernel_size, stride, padding = self.shape
        return (side + 2 * padding - kernel_size) // stride + 1

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        if self.pre_norm is not None:
            x = self.pre_norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.conv(x.contiguous(memory_format=torch.channels_last))
        return x if self.post_norm is None else self.post_norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ChannelsLastStage(Stage):
    """A downsampling, an optional position map and blocks on (B, H, W, C): (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], pos_embed: nn.Parameter | None) -> None:
        super().__init__(downsample, blocks)
        self.pos_embed = pos_embed  # (1, C, H, W)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        x = self.downsample(x)
        if self.pos_embed is not None:
            if x.shape[-2:] != self.pos_embed.shape[-2:]:
                raise ValueError(
                    f"the position map is {tuple(self.pos_embed.shape[-2:])} tokens and the input gives "
                    f"{tuple(x.shape[-2:])}; make the model with img_size of your images"
                )
            x = x + self.pos_embed
        x = x.permute(0, 2, 3, 1).contiguous()  # (B, H, W, C); no copy where the memory is channels-last
        return self.run_blocks(x).permute(0, 3, 1, 2)


class Head(nn.Module):
    """Pooling, norm and classifier, in either order of the first two.

    Args:
        norm: Norm of C channels.
        norm_first: Whether it comes before the pooling.
        dim: Channels C.
        num_classes: Classes; 0 leaves the classifier out.
        kind: ``"linear"`` or ``"mlp"``.
        drop: Dropout rate before the last map.
        global_pool: ``"avg"``, or ``""`` for a map, without a classifier.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        norm: nn.Module,
        norm_first: bool,
        dim: int,
        num_classes: int,
        kind: str = "linear",
        drop: float = 0.0,
        global_pool: str = "avg",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm, self.norm_first = norm, norm_first
        self.dim, self.kind, self.drop_rate, self.global_pool = dim, kind, drop, global_pool
        self.drop = nn.Dropout(drop)
        self.fc: nn.Module = nn.Identity()
        self._make(num_classes, global_pool, device, dtype)

    def _make(self, num_classes: int, global_pool: str, device: Any, dtype: Any) -> None:
        if global_pool not in ("avg", "") or (not global_pool and num_classes):
            raise ValueError(
                f"global_pool must be 'avg', or '' together with num_classes=0; got {global_pool!r} with {num_classes}"
            )
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 (no classifier) or more, got {num_classes}")
        self.global_pool, self.fc = global_pool, nn.Identity()
        if num_classes and self.kind == "mlp":
            self.fc = MLPHead(self.dim, num_classes, drop=self.drop_rate, device=device, dtype=dtype)
        elif num_classes:
            self.fc = nn.Linear(self.dim, num_classes, device=device, dtype=dtype)
        for linear in self.fc.modules():
            if isinstance(linear, nn.Linear):
                trunc_normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)

    def reset(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier of ``num_classes`` (0: none), optionally with another pooling."""
        like = next(self.norm.parameters(), None)
        like = next(self.fc.parameters(), None) if like is None else like
        device, dtype = (like.device, like.dtype) if like is not None else (None, None)
        self._make(num_classes, self.global_pool if global_pool is None else global_pool, device, dtype)
        self.fc.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H, W) -> (B, num_classes), or the features before the classifier."""
        x = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        if self.global_pool == "avg":
            x = self.norm(x).mean((1, 2)) if self.norm_first else self.norm(x.mean((1, 2)))  # (B, C)
        else:
            x = self.norm(x).permute(0, 3, 1, 2)
        x = self.drop(x)
        return x if pre_logits else self.fc(x)
