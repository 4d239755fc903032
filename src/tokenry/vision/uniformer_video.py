"""UniFormer for video: 3-D convolutions where maps are large, attention over space and time where they are small.

Li et al., "UniFormer: Unified Transformer for Efficient Spatiotemporal Representation Learning", ICLR 2022, arXiv:2201.04676.

The image network of ``tokenry.vision.uniformer`` with time as a third dimension, x: (B, C, T, H, W)

    x = x + dwconv3x3x3(x)                      position encoding
    x = x + MHRA(norm1(x))                      stages 1, 2: local, batch norm;  3, 4: global, layer norm
    x = x + MLP(norm2(x))                       C -> 4C -> C, GELU
    logits = head( mean over T, H, W of batchnorm(x) )

The stem halves the frames and takes patches of 4 x 4 pixels; the other three stages begin by joining 2 x 2 tokens of a frame,
with ``std=True`` of three frames. With ``split=True`` the global blocks attend over time and space in turn.

A clip model starts from an image model's weights: every kernel is repeated along time and divided by its length.

timm holds image models, whose configurations and tools know no frames, so these are not in its list: ``uniformer_video_s`` and
``uniformer_video_b`` make them, with timm's features all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates
from torch import nn

from tokenry.mixers.mhra_3d import DividedMHRA3d
from tokenry.vision.backbone import build_backbone, classification_config
from tokenry.vision.uniformer_blocks import (
    GlobalBlock,
    LocalBlock,
    PatchEmbed,
    check_stages,
    init_weights,
    make_stages,
)
from tokenry.vision.uniformer_video_blocks import ClipBackbone, ClipHead, DividedBlock
from tokenry.vision.uniformer_video_weights import VARIANTS, checkpoint_filter_fn, inflate, inflate_checkpoint

__all__ = [
    "UniFormerVideo",
    "checkpoint_filter_fn",
    "create_clip_model",
    "inflate",
    "inflate_checkpoint",
    "uniformer_video_b",
    "uniformer_video_s",
]


class UniFormerVideo(ClipBackbone):
    """UniFormer video classifier and feature extractor: clips (B, in_chans, T, H, W) to logits.

    Args:
        num_frames: Frames of the clips that the model is meant for, noted for those who sample them. No weight depends on it:
            a clip may have any number of frames from 1. Default 16 (paper: 8, 16 or 32).
        depths: Blocks per stage.
        dims: Channels per stage.
        blocks: One letter per stage, ``"L"`` local or ``"G"`` global. Default ``"LLGG"`` (paper).
        head_dim: Channels of an attention head; must divide the channels of the global stages. Default 64.
        mlp_ratio: Hidden width of the MLPs over the channels.
        split: Attention over time and space in turn in the global blocks, instead of over all tokens together.
        std: Let the three later downsamplings see three frames, at an unchanged number of frames.
        num_classes: Classes; 0 leaves the classifier out. Default 400 (Kinetics-400).
        in_chans: Channels of the frames.
        global_pool: ``"avg"``, or ``""`` for maps without classifier.
        drop_rate: Dropout before the classifier.
        pos_drop_rate: Dropout after the stem.
        proj_drop_rate: Dropout after the aggregators and in the MLPs.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth of the last block, growing linearly. Default 0; the authors train with 0.1
            (Kinetics) and up to 0.6 (Something-Something).
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: Arguments that do not fit each other; input that is no batch of clips, or whose sides are no multiples
            of 32 (patches at the border would be lost).

    Example:
        >>> net = UniFormerVideo(depths=(1, 1, 2, 1), dims=(16, 32, 64, 128), num_classes=10).eval()
        >>> net(torch.zeros(1, 3, 8, 64, 96)).shape
        torch.Size([1, 10])
        >>> maps = net.forward_intermediates(torch.zeros(1, 3, 8, 64, 96), intermediates_only=True)
        >>> [tuple(x.shape[1:]) for x in maps]
        [(16, 4, 16, 24), (32, 4, 8, 12), (64, 4, 4, 6), (128, 4, 2, 3)]
    """

    def __init__(
        self,
        num_frames: int = 16,
        depths: Sequence[int] = VARIANTS["uniformer_video_s"]["depths"],
        dims: Sequence[int] = VARIANTS["uniformer_video_s"]["dims"],
        blocks: str = "LLGG",
        head_dim: int = 64,
        mlp_ratio: float = 4.0,
        split: bool = False,
        std: bool = False,
        num_classes: int = 400,
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
        super().__init__(num_frames, num_classes, in_chans)
        check_stages(depths, dims, blocks)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.split = split
        self.stem = PatchEmbed(in_chans, dims[0], 4, frames=3, frame_stride=2, **dd)
        self.pos_drop = nn.Dropout(pos_drop_rate)

        def block(stage: int, index: int) -> nn.Module:
            kind = partial(LocalBlock, frames=True)
            if blocks[stage] == "G":
                attention = DividedBlock if split else partial(GlobalBlock, frames=True)
                kind = partial(attention, head_dim=head_dim, attn_drop=attn_drop_rate)
            rate = rates[stage][index]
            return kind(dims[stage], mlp_ratio=mlp_ratio, proj_drop=proj_drop_rate, drop_path=rate, **dd)

        embed = partial(PatchEmbed, patch_size=2, frames=3 if std else 1, **dd)
        self.stages = make_stages(depths, dims, embed, block)
        self.describe_stages(dims, (4, 8, 16, 32))
        self.norm = nn.BatchNorm3d(dims[-1], **dd)
        self.head = ClipHead(dims[-1], num_classes, global_pool, drop_rate, **dd)
        self.apply(init_weights)
        for module in self.modules():
            if isinstance(module, DividedMHRA3d):
                module.silence_time()


def create_clip_model(
    make: type[ClipBackbone],
    name: str,
    features_only: bool,
    *,
    side: int = 224,
    first_conv: str = "stem.proj",
    **kwargs: Any,
) -> Any:
    """Make one of ``VARIANTS`` through timm's builder, with the data configuration of the authors' Kinetics models.

    Args:
        make: The network's class.
        name: The variant.
        features_only: As in timm.
        side: Side of the frames that it is meant for.
        first_conv: Name of the first convolution.
        **kwargs: Arguments of the class.
    """
    config = classification_config(
        architecture=name,
        num_classes=400,
        input_size=(3, side, side),
        first_conv=first_conv,
        mean=(0.45, 0.45, 0.45),
        std=(0.225, 0.225, 0.225),
        license="apache-2.0",
        paper_ids="arXiv:2201.04676",
        origin_url="https://github.com/Sense-X/UniFormer",
    )
    return build_backbone(
        make,
        name,
        False,
        checkpoint_filter_fn,
        pretrained_cfg=config,
        features_only=features_only,
        **{**VARIANTS[name], **kwargs},
    )


def uniformer_video_s(
    num_frames: int = 16,
    num_classes: int = 400,
    split: bool = False,
    std: bool = False,
    features_only: bool = False,
    **kwargs: Any,
) -> Any:
    """The small model: 21.4 million parameters, 41.7 G multiply-accumulates for 16 frames of 224 x 224.

    Args:
        num_frames: As in ``UniFormerVideo``.
        num_classes: As in ``UniFormerVideo``.
        split: As in ``UniFormerVideo``.
        std: As in ``UniFormerVideo``.
        features_only: Return the maps (B, C, T', H', W') of the stages, chosen by ``out_indices``, as timm does.
        **kwargs: Further arguments of ``UniFormerVideo``.
    """
    return create_clip_model(
        UniFormerVideo,
        "uniformer_video_s",
        features_only,
        num_frames=num_frames,
        num_classes=num_classes,
        split=split,
        std=std,
        **kwargs,
    )


def uniformer_video_b(
    num_frames: int = 16,
    num_classes: int = 400,
    split: bool = False,
    std: bool = False,
    features_only: bool = False,
    **kwargs: Any,
) -> Any:
    """The base model: 49.8 million parameters, 96.6 G multiply-accumulates for 16 frames of 224 x 224.

    Args:
        num_frames: As in ``UniFormerVideo``.
        num_classes: As in ``UniFormerVideo``.
        split: As in ``UniFormerVideo``.
        std: As in ``UniFormerVideo``.
        features_only: As in ``uniformer_video_s``.
        **kwargs: Further arguments of ``UniFormerVideo``.
    """
    return create_clip_model(
        UniFormerVideo,
        "uniformer_video_b",
        features_only,
        num_frames=num_frames,
        num_classes=num_classes,
        split=split,
        std=std,
        **kwargs,
    )
