"""UniFormer XXS and XS for video: token pruning over space and time.

Li et al., "UniFormer: Unifying Convolution and Self-attention for Visual Recognition", 2022, arXiv:2201.09450; released with
the authors' video code.

The image network of ``tokenry.vision.uniformer_light`` with time as a third dimension of its convolutions and of its map: the
class token looks at all T H W tokens of a clip, and the half that it looks at most goes through attention and MLP, whatever
frames they lie in. The stem halves the frames, the other stages join 2 x 2 tokens of a frame; the guide is averaged over the
same 2 x 2 tokens.

Three of the authors' eight configurations (XXS with 4 frames, and with 8 frames of 128 pixels) have layer scale, from 0.1 on;
the rest has none. It, and training in float32, are the authors' means against losses that became NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenry.vision.uniformer_light import UniFormerLight
from tokenry.vision.uniformer_video import create_clip_model
from tokenry.vision.uniformer_video_blocks import ClipBackbone, ClipHead
from tokenry.vision.uniformer_video_weights import VARIANTS

__all__ = ["UniFormerVideoLight", "uniformer_video_xs", "uniformer_video_xxs"]


class UniFormerVideoLight(ClipBackbone, UniFormerLight):
    """UniFormer video classifier with token pruning: clips (B, in_chans, T, H, W) to logits.

    In training mode the model returns two logits, ``TwoLogits``, as ``UniFormerLight`` does.

    Args:
        num_frames: Frames of the clips that the model is meant for, noted for those who sample them. No weight depends on it:
            a clip may have any number of frames from 1. Default 16 (authors: 4, 8, 16 or 32).
        depths: Blocks per stage; stages 1 and 2 are local, 3 and 4 global.
        dims: Channels per stage.
        head_dim: Channels of an attention head; must divide the channels of stages 3 and 4.
        keep_ratio: Share of a clip's tokens kept in all global blocks but the first. Default 0.5; 1 prunes nothing.
        layer_scale: First value of a learned scale per channel of both branches of all blocks. None (default): no scale.
        num_classes: Classes; 0 leaves both classifiers out. Default 400 (Kinetics-400).
        **kwargs: Further arguments of ``UniFormerLight``.

    Raises:
        ValueError: Arguments that do not fit each other; input that is no batch of clips, or whose sides are no multiples
            of 32.

    Example:
        >>> import torch
        >>> net = UniFormerVideoLight(depths=(1, 1, 2, 1), dims=(16, 32, 64, 128), head_dim=32, num_classes=10)
        >>> [tuple(y.shape) for y in net(torch.zeros(2, 3, 5, 64, 64))]
        [(2, 10), (2, 10)]
        >>> net.eval()(torch.zeros(2, 3, 8, 64, 96)).shape
        torch.Size([2, 10])
    """

    frames = True
    classifier = ClipHead

    def __init__(
        self,
        num_frames: int = 16,
        depths: Sequence[int] = VARIANTS["uniformer_video_xxs"]["depths"],
        dims: Sequence[int] = VARIANTS["uniformer_video_xxs"]["dims"],
        head_dim: int = 28,
        keep_ratio: float = 0.5,
        layer_scale: float | None = None,
        num_classes: int = 400,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_frames,
            depths,
            dims,
            head_dim,
            keep_ratio=keep_ratio,
            layer_scale=layer_scale,
            num_classes=num_classes,
            **kwargs,
        )


def uniformer_video_xxs(
    num_frames: int = 16, num_classes: int = 400, features_only: bool = False, **kwargs: Any
) -> Any:
    """The smallest model: 9.8 million parameters, 4.2 G multiply-accumulates for 16 frames of 128 x 128.

    Args:
        num_frames: As in ``UniFormerVideoLight``.
        num_classes: As in ``UniFormerVideoLight``.
        features_only: Return the maps (B, C, T', H', W') of the stages, chosen by ``out_indices``, as timm does.
        **kwargs: Further arguments of ``UniFormerVideoLight`` (``layer_scale=0.1`` for the authors' weights of 4 frames, and of
            8 frames of 128 pixels).
    """
    return create_clip_model(
        UniFormerVideoLight,
        "uniformer_video_xxs",
        features_only,
        side=128,
        first_conv="stem.0.conv",
        num_frames=num_frames,
        num_classes=num_classes,
        **kwargs,
    )


def uniformer_video_xs(num_frames: int = 32, num_classes: int = 400, features_only: bool = False, **kwargs: Any) -> Any:
    """The second smallest model: 16.1 million parameters, 34.2 G multiply-accumulates for 32 frames of 192 x 192.

    Args:
        num_frames: As in ``UniFormerVideoLight``; the authors trained this one with 32.
        num_classes: As in ``UniFormerVideoLight``.
        features_only: As in ``uniformer_video_xxs``.
        **kwargs: Further arguments of ``UniFormerVideoLight``.
    """
    return create_clip_model(
        UniFormerVideoLight,
        "uniformer_video_xs",
        features_only,
        side=192,
        first_conv="stem.0.conv",
        num_frames=num_frames,
        num_classes=num_classes,
        **kwargs,
    )
