"""UniFormer XXS and XS: deep in the network only half of the tokens take part in attention, chosen image by image.

Li et al., "UniFormer: Unifying Convolution and Self-attention for Visual Recognition", 2022, arXiv:2201.09450; the pruning
is that of Xu et al., "Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer", 2021, arXiv:2108.01390.

A class token c enters at stage 3. The guide g holds one number per position: how much c attends to it, as a running mean.

    block 1         x, c and g from attention over all N tokens;      g = a,  a = mean over heads of c's attention
    other blocks    K = the int(r N) positions of largest g,  r = 0.5
                    s = sum of g_i x_i / sum of g_i over the others    one token that stands for them
                    [c, x_K, s] through attention and MLP              (the slow update)
                    x_i += what attention and MLP added to s, i not in K    (the fast update)
                    g_K = (1 - t) g_K + t a_K,  t = 0.5

Every token stays in its place, so maps are whole at the end of every block. Between stages 3 and 4 g is averaged over 2 x 2
positions, its sum kept. Inference classifies the mean of the map; training returns the logits of both, of the map and of
the class token, because c is what learns where to look.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from timm.layers import ClassifierHead, LayerScale, calculate_drop_path_rates
from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.vision.backbone import Backbone, Stage, build_backbone
from tokenry.vision.registration import register_table
from tokenry.vision.state_dicts import check_shapes, without_head
from tokenry.vision.uniformer import config, rename
from tokenry.vision.uniformer_blocks import (
    GlobalBlock,
    LocalBlock,
    PatchEmbed,
    check_stages,
    init_weights,
    make_conv_stem,
    make_stages,
    to_map,
    to_tokens,
)

__all__ = ["Guided", "PrunedBlock", "UniFormerLight", "checkpoint_filter_fn"]

VARIANTS: dict[str, dict[str, Any]] = {
    "uniformer_xxs": {"depths": (2, 5, 8, 2), "dims": (56, 112, 224, 448), "head_dim": 28},
    "uniformer_xs": {"depths": (3, 5, 9, 3), "dims": (64, 128, 256, 512), "head_dim": 32},
}


class Guided(NamedTuple):
    """What goes from block to block.

    Attributes:
        map: (B, C, H, W), every token in its place; of clips (B, C, T, H, W).
        cls: (B, 1, C), the class token.
        guide: (B, N), its running attention to the N tokens of the map; None before the first block.
    """

    map: Tensor
    cls: Tensor
    guide: Tensor | None


class TwoLogits(NamedTuple):
    """What the model returns in training: logits (B, num_classes) of the map's mean, and of the class token."""

    logits: Tensor
    cls_logits: Tensor


class PrunedBlock(GlobalBlock):
    """A UniFormer block whose attention and MLP see the class token, the kept tokens and one token for all others.

    Args:
        dim: Channels C.
        head_dim: Channels of an attention head; must divide ``dim``.
        keep_ratio: Share r of the tokens that are kept, over 0 and at most 1. With 1 nothing is pruned.
        trade_off: Weight t of the new attention in the guide, 0 to 1.
        mlp_ratio: Hidden width of the MLP over C.
        attn_drop: Dropout rate of the attention weights.
        proj_drop: Dropout rate of attention's output and in the MLP.
        drop_path: Rate of stochastic depth of the slow update.
        layer_scale: First value of a learned scale per channel of both branches; on images the fast update has a third one.
            None: no scale.
        frames: Whether the maps are those of clips. The fast update then takes the scales of both branches (authors' code).
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int | None = None,
        keep_ratio: float = 0.5,
        trade_off: float = 0.5,
        mlp_ratio: float = 3.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        frames: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 0 < keep_ratio <= 1 or not 0 <= trade_off <= 1:
            raise ValueError(
                "keep_ratio is a share of the tokens over 0 and at most 1, trade_off a weight from 0 to 1; got "
                f"{keep_ratio} and {trade_off}; the authors' are both 0.5"
            )
        super().__init__(
            dim,
            head_dim,
            mlp_ratio=mlp_ratio,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            drop_path=drop_path,
            layer_scale=layer_scale,
            frames=frames,
            device=device,
            dtype=dtype,
        )
        self.keep_ratio, self.trade_off, self.frames = keep_ratio, trade_off, frames
        third = layer_scale is not None and keep_ratio < 1 and not frames
        self.ls3 = LayerScale(dim, layer_scale, device=device, dtype=dtype) if third else nn.Identity()

    def update(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Attention and MLP on (B, 1 + N, C), the class token first.

        Returns:
            The tokens; what both branches gave to the last one, without stochastic depth, (B, 1, C); the class token's
            attention (B, 1 + N).
        """
        attended, row = self.mixer.guided(self.norm1(x))
        x = x + self.drop_path(self.ls1(attended))
        transformed = self.mlp(self.norm2(x))
        x = x + self.drop_path(self.ls2(transformed))
        attended, transformed = attended[:, -1:], transformed[:, -1:]
        fast = self.ls1(attended) + self.ls2(transformed) if self.frames else self.ls3(attended + transformed)
        return x, fast, row

    def token_maps(self, x: Any) -> dict[str, Tensor]:
        """``kept``, of the map's size, whether a token goes through attention itself; nothing where nothing is pruned."""
        if self.keep_ratio == 1 or x.guide is None:
            return {}
        kept = x.guide.topk(int(x.guide.shape[1] * self.keep_ratio), dim=1).indices
        return {"kept": torch.zeros_like(x.guide, dtype=torch.bool).scatter(1, kept, True).view(-1, *x.map.shape[2:])}

    def forward(self, x: Any) -> Any:
        """``Guided`` -> ``Guided``."""
        cls, guide = x.cls, x.guide
        x, size = to_tokens(self.pos_embed(x.map))  # (B, N, C)
        if self.keep_ratio == 1 or guide is None:
            y, _, row = self.update(torch.cat([cls, x], 1))
            x, row = y[:, 1:], row[:, 1:]
            guide = row if guide is None else torch.lerp(guide, row.to(guide.dtype), self.trade_off)
        else:
            kept = guide.topk(int(x.shape[1] * self.keep_ratio), dim=1).indices  # (B, K)
            weight = guide.scatter(1, kept, 0.0)
            rest = (weight / weight.sum(1, keepdim=True)).unsqueeze(1) @ x  # (B, 1, C)
            places = kept.unsqueeze(-1).expand(-1, -1, x.shape[2])
            y, fast, row = self.update(torch.cat([cls, x.gather(1, places), rest], 1))  # (B, 1 + K + 1, C)
            x = x + fast
            x = x.scatter(1, places, y[:, 1:-1].to(x.dtype))
            new = torch.lerp(guide.gather(1, kept), row[:, 1:-1].to(guide.dtype), self.trade_off)
            guide = guide.scatter(1, kept, new)
        return Guided(to_map(x, size), y[:, :1], guide)


def pool_guide(guide: Tensor, size: Sequence[int]) -> Tensor:
    """Means over 2 x 2 positions of a frame, scaled so that the sum stays: (B, N) -> (B, N / 4).

    Args:
        guide: One number for each position of the map.
        size: (H, W) or (T, H, W).
    """
    pooled = F.avg_pool2d(guide.unflatten(1, (-1, *size[-2:])), 2).flatten(1)
    return pooled * (guide.sum(1, keepdim=True) / pooled.sum(1, keepdim=True))


class GuidedStage(Stage):
    """A stage with a class token: its own where it takes a map, else that of the stage before, made wider."""

    def __init__(
        self, downsample: nn.Module, blocks: Sequence[nn.Module], dim: int, before: int | None, **dd: Any
    ) -> None:
        super().__init__(downsample, blocks)
        if before is None:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim, **dd))
        else:
            self.cls_upsample = nn.Linear(before, dim, **dd)

    def forward(self, x: Any) -> Any:
        """(B, C, H, W) or ``Guided`` -> ``Guided`` of (B, C', H / 2, W / 2)."""
        if isinstance(x, Tensor):
            # a copy: an expanded view of a parameter asks for gradients even where none are kept, and FLOP counters trip
            return self.run_blocks(Guided(self.downsample(x), self.cls_token.repeat(len(x), 1, 1), None))
        guide = pool_guide(x.guide, x.map.shape[2:])
        return self.run_blocks(Guided(self.downsample(x.map), self.cls_upsample(x.cls), guide))


class UniFormerLight(Backbone):
    """UniFormer with a convolutional stem, narrow MLPs and token pruning.

    In training mode the model returns two logits, ``TwoLogits``; the authors' loss is half the cross entropy of each.

    Class attributes:
        frames: Whether its images are clips. A subclass for them sets it, with a ``classifier`` of clips.
        classifier: Makes the head.

    Args:
        depths: Blocks per stage; stages 1 and 2 are local, 3 and 4 global.
        dims: Channels per stage.
        head_dim: Channels of an attention head; must divide the channels of stages 3 and 4.
        mlp_ratio: Hidden width of the MLPs over the channels. Default 3.
        keep_ratio: Share of tokens kept in all global blocks but the first. Default 0.5; 1 prunes nothing.
        trade_off: Weight of the newest attention in the guide. Default 0.5.
        layer_scale: First value of a learned scale per channel of all branches. None (default): no scale.
        num_classes: Classes; 0 leaves both classifiers out.
        in_chans: Channels of the images.
        global_pool: Pooling before the classifier, as in timm.
        drop_rate: Dropout before the classifier of the map.
        pos_drop_rate: Dropout after the stem.
        proj_drop_rate: Dropout after the aggregators and in the MLPs.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth of the last block, growing linearly.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: Arguments that do not fit each other; images whose sides are no multiples of 32.

    Example:
        >>> net = UniFormerLight((1, 1, 2, 1), (16, 32, 64, 128), 32, num_classes=10)
        >>> [tuple(y.shape) for y in net(torch.zeros(2, 3, 64, 64))]
        [(2, 10), (2, 10)]
        >>> net.eval()(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

    size_multiple = 32
    channels_last = True
    frames: ClassVar[bool] = False
    classifier: ClassVar[type[ClassifierHead]] = ClassifierHead

    def __init__(
        self,
        depths: Sequence[int] = VARIANTS["uniformer_xxs"]["depths"],
        dims: Sequence[int] = VARIANTS["uniformer_xxs"]["dims"],
        head_dim: int = 28,
        mlp_ratio: float = 3.0,
        keep_ratio: float = 0.5,
        trade_off: float = 0.5,
        layer_scale: float | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_classes, in_chans)
        check_stages(depths, dims)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.stem = make_conv_stem(in_chans, dims[0], self.frames, **dd)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        shared: dict[str, Any] = {
            "mlp_ratio": mlp_ratio,
            "proj_drop": proj_drop_rate,
            "layer_scale": layer_scale,
            "frames": self.frames,
            **dd,
        }

        def block(stage: int, index: int) -> nn.Module:
            dim, rate = dims[stage], rates[stage][index]
            if stage < 2:
                return LocalBlock(dim, drop_path=rate, **shared)
            ratio = 1.0 if (stage, index) == (2, 0) else keep_ratio
            return PrunedBlock(dim, head_dim, ratio, trade_off, attn_drop=attn_drop_rate, drop_path=rate, **shared)

        def stage(index: int, downsample: nn.Module, blocks: list[nn.Module]) -> Stage:
            if index < 2:
                return Stage(downsample, blocks)
            return GuidedStage(downsample, blocks, dims[index], None if index == 2 else dims[index - 1], **dd)

        embed = partial(PatchEmbed, patch_size=2, frames=1 if self.frames else None, **dd)
        self.stages = make_stages(depths, dims, embed, block, stage)
        self.describe_stages(dims, (4, 8, 16, 32))
        self.norm = (nn.BatchNorm3d if self.frames else nn.BatchNorm2d)(dims[-1], **dd)
        self.head = self.classifier(dims[-1], num_classes, global_pool, drop_rate, **dd)
        self.norm_cls: nn.Module = nn.LayerNorm(dims[-1], **dd)
        self.head_cls = nn.Linear(dims[-1], num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.apply(init_weights)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The class token."""
        return {"stages.2.cls_token"}

    def forward_stem(self, x: Tensor) -> Tensor:
        """Check the images, embed them, and drop positions in training."""
        return self.pos_drop(super().forward_stem(x))

    def stage_map(self, x: Any) -> Tensor:
        """The map in what a stage returns."""
        return x.map if isinstance(x, Guided) else x

    def forward_close(self, x: Any) -> Tensor:
        """The closing norm of the last stage's map."""
        return self.norm(self.stage_map(x))

    def forward(self, x: Tensor) -> Any:
        """(B, in_chans, H, W) -> (B, num_classes); in training ``TwoLogits``."""
        if not self.training or not self.num_classes:
            return super().forward(x)
        state: Any = self.forward_stem(x)
        for stage in self.stages:
            state = stage(state)
        return TwoLogits(self.forward_head(self.forward_close(state)), self.head_cls(self.norm_cls(state.cls[:, 0])))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New classifiers of the map and of the class token; 0 takes both out."""
        super().reset_classifier(num_classes, global_pool)
        if num_classes == 0:
            self.head_cls = nn.Identity()
            return
        like = next(self.norm_cls.parameters())
        self.head_cls = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages, the norm and the heads that the wanted maps do not need, as in timm."""
        wanted = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if self.num_classes == 0:
            self.norm_cls = nn.Identity()
        return wanted


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Turn a checkpoint of the authors' code into a state dict of ours.

    Args:
        state_dict: Checkpoint, with or without what a training script saved around it.
        model: Model that is to take it.

    Raises:
        ValueError: It is another variant's; the message names the one that fits.
    """
    out = without_head(rename(state_dict), model)
    check_shapes(out, model, VARIANTS)
    return out


default_cfgs = generate_default_cfgs({f"{name}.untrained": config(first_conv="stem.0.conv") for name in VARIANTS})


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> UniFormerLight:
    return build_backbone(UniFormerLight, name, pretrained, checkpoint_filter_fn, **{**VARIANTS[name], **kwargs})


register_table(__name__, VARIANTS, _create)
