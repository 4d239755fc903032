"""UniFormer: convolution-like blocks where maps are large, attention where they are small.

Li et al., "UniFormer: Unifying Convolution and Self-attention for Visual Recognition", 2022, arXiv:2201.09450.

Every block knows positions, mixes tokens and transforms each of them, with residual connections; x: (B, C, H, W)

    x = x + dwconv3x3(x)                        position encoding
    x = x + MHRA(norm1(x))                      stages 1, 2: local, batch norm;  3, 4: global, layer norm
    x = x + MLP(norm2(x))                       C -> 4C -> C, GELU

Stages work at strides 4, 8, 16 and 32, each begun by a convolution with stride and a norm. Three forms of the network:

    classifier          head( mean over positions of batchnorm(x) )
    token labelling     a second linear map gives logits at every position; inference adds half their maximum
    detection           a layer norm on every stage's output; windows of 14 x 14 tokens in most blocks of stage 3

``uniformer_light`` has the small models that let only half of the tokens take part in attention.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from timm.data.mixup import rand_bbox
from timm.layers import ClassifierHead, LayerNorm2d, calculate_drop_path_rates
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from tokenry.layers.conv_norm import ConvNorm
from tokenry.vision.backbone import Backbone, build_backbone, classification_config
from tokenry.vision.registration import register_table
from tokenry.vision.state_dicts import check_shapes, unwrap, without_head
from tokenry.vision.token_labeling import TokenLabelingHead, TokenLabels, swap_box
from tokenry.vision.uniformer_blocks import (
    GlobalBlock,
    LocalBlock,
    PatchEmbed,
    check_stages,
    init_weights,
    make_conv_stem,
    make_stages,
)

__all__ = ["UniFormer", "checkpoint_filter_fn"]

SMALL: dict[str, Any] = {"depths": (3, 4, 8, 3), "dims": (64, 128, 320, 512)}
SMALL_PLUS: dict[str, Any] = {"depths": (3, 5, 9, 3), "dims": (64, 128, 320, 512), "conv_stem": True}
BASE: dict[str, Any] = {"depths": (5, 8, 20, 7), "dims": (64, 128, 320, 512)}
LARGE: dict[str, Any] = {"depths": (5, 10, 24, 7), "dims": (128, 192, 448, 640)}
VARIANTS: dict[str, dict[str, Any]] = {
    "uniformer_small": SMALL,
    "uniformer_small_plus": {**SMALL_PLUS, "head_dim": 32},
    "uniformer_small_plus_dim64": SMALL_PLUS,
    "uniformer_base": BASE,
    "uniformer_base_ls": {**BASE, "layer_scale": 1e-6},
    "uniformer_small_tl": {**SMALL, "head_dim": 32, "token_labeling": True},
    "uniformer_small_tl_dim64": {**SMALL, "token_labeling": True},
    "uniformer_small_plus_tl": {**SMALL_PLUS, "head_dim": 32, "token_labeling": True},
    "uniformer_small_plus_tl_dim64": {**SMALL_PLUS, "token_labeling": True},
    "uniformer_base_tl": {**BASE, "head_dim": 32, "token_labeling": True},
    "uniformer_base_tl_dim64": {**BASE, "token_labeling": True},
    "uniformer_large_ls_tl": {**LARGE, "token_labeling": True, "layer_scale": 1e-6},
    "uniformer_small_h14": {**SMALL, "hybrid_window": 14, "feature_norms": True, "num_classes": 0},
    "uniformer_base_h14": {**BASE, "hybrid_window": 14, "feature_norms": True, "num_classes": 0},
}


class UniFormer(Backbone):
    """UniFormer image classifier and feature extractor.

    Args:
        depths: Blocks per stage.
        dims: Channels per stage.
        blocks: One letter per stage, ``"L"`` local or ``"G"`` global. Default ``"LLGG"`` (paper).
        head_dim: Channels of an attention head; must divide the channels of the global stages. Default 64. Weights do not
            show it: take the variant that a checkpoint was trained as.
        mlp_ratio: Hidden width of the MLPs over the channels.
        conv_stem: Overlapping convolutions with batch norm in place of patches with layer norm.
        layer_scale: First value of a learned scale per channel of both branches, in the global blocks, and with
            ``token_labeling`` in the local ones too, as in the authors' two files. None: no scale.
        token_labeling: A second classifier at every position. In evaluation half its maximum is added to the logits. In
            training the model mixes tokens of the batch (MixToken) and returns ``TokenLabels``.
        hybrid_window: Side of the attention windows in stage 3, where every fourth block stays global. None: all global.
        window: Side of the attention windows in all blocks of stage 3. None: all global.
        feature_norms: A layer norm per stage for ``features_only`` (detection form), and no closing norm.
        num_classes: Classes; 0 leaves the classifier out.
        in_chans: Channels of the images.
        global_pool: Pooling before the classifier, as in timm.
        drop_rate: Dropout before the classifier.
        pos_drop_rate: Dropout after the stem.
        proj_drop_rate: Dropout after the aggregators and in the MLPs.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth of the last block, growing linearly. Default 0; the authors train with 0.1 (small),
            0.3 (base) and 0.4 (large).
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: Arguments that do not fit each other; images whose sides are no multiples of 32 (patches at the border
            would be lost).

    Example:
        >>> net = UniFormer((1, 1, 2, 1), (16, 32, 64, 128), num_classes=10).eval()
        >>> net(torch.zeros(1, 3, 64, 96)).shape
        torch.Size([1, 10])
        >>> [tuple(x.shape[1:]) for x in net.forward_intermediates(torch.zeros(1, 3, 64, 96), intermediates_only=True)]
        [(16, 16, 24), (32, 8, 12), (64, 4, 6), (128, 2, 3)]
    """

    size_multiple = 32
    channels_last = True

    def __init__(
        self,
        depths: Sequence[int] = SMALL["depths"],
        dims: Sequence[int] = SMALL["dims"],
        blocks: str = "LLGG",
        head_dim: int = 64,
        mlp_ratio: float = 4.0,
        conv_stem: bool = False,
        layer_scale: float | None = None,
        token_labeling: bool = False,
        hybrid_window: int | None = None,
        window: int | None = None,
        feature_norms: bool = False,
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
        check_stages(depths, dims, blocks)
        if hybrid_window is not None and window is not None:
            raise ValueError(
                f"hybrid_window={hybrid_window} leaves every fourth block of stage 3 global and window={window} none: give one"
            )
        if feature_norms and (num_classes or token_labeling):
            raise ValueError(
                "feature_norms=True makes the detection form, which has no classifier: give num_classes=0 with it"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.stem = make_conv_stem(in_chans, dims[0], **dd) if conv_stem else PatchEmbed(in_chans, dims[0], 4, **dd)
        self.pos_drop = nn.Dropout(pos_drop_rate)

        def block(stage: int, index: int) -> nn.Module:
            shared: dict[str, Any] = {
                "mlp_ratio": mlp_ratio,
                "proj_drop": proj_drop_rate,
                "drop_path": rates[stage][index],
                **dd,
            }
            if blocks[stage] == "L":
                return LocalBlock(dims[stage], layer_scale=layer_scale if token_labeling else None, **shared)
            inside = None
            if stage == 2:
                inside = window if hybrid_window is None or index % 4 == 3 else hybrid_window
            return GlobalBlock(
                dims[stage], head_dim, inside, attn_drop=attn_drop_rate, layer_scale=layer_scale, **shared
            )

        embed = partial(ConvNorm, kernel_size=3, stride=2) if conv_stem else partial(PatchEmbed, patch_size=2)
        self.stages = make_stages(depths, dims, partial(embed, **dd), block)
        self.describe_stages(dims, (4, 8, 16, 32))
        self.feature_norms = nn.ModuleList(LayerNorm2d(dim, eps=1e-6, **dd) for dim in dims) if feature_norms else None
        self.norm = nn.Identity() if feature_norms else nn.BatchNorm2d(dims[-1], **dd)
        head = TokenLabelingHead if token_labeling else ClassifierHead
        self.head = head(dims[-1], num_classes, global_pool, drop_rate, **dd)
        self.apply(init_weights)

    def forward_stem(self, x: Tensor) -> Tensor:
        """Check the images, embed them, and drop positions in training."""
        return self.pos_drop(super().forward_stem(x))

    def feature_norm(self, x: Tensor, stage: int) -> Tensor:
        """The norms of ``feature_norms=True``, else the closing norm on the last map."""
        return super().feature_norm(x, stage) if self.feature_norms is None else self.feature_norms[stage](x)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages, norms and head that the wanted maps do not need, as in timm."""
        wanted = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if self.feature_norms is not None:
            self.feature_norms = None if prune_norm else self.feature_norms[: len(self.stages)]
        return wanted

    def forward(self, x: Tensor) -> Any:
        """(B, in_chans, H, W) -> (B, num_classes); in training with ``token_labeling`` a ``TokenLabels``."""
        head = self.head
        if not self.training or not isinstance(head, TokenLabelingHead) or not self.num_classes:
            return super().forward(x)
        x = self.forward_stem(x)
        top, bottom, left, right = (int(i) for i in rand_bbox(x.shape, np.random.beta(1.0, 1.0)))
        x = swap_box(x, (top, left, bottom, right))
        for stage in self.stages:
            x = stage(x)
        x = self.forward_close(x)
        box = (top // 8, left // 8, bottom // 8, right // 8)  # from stride 4 to stride 32
        logits, dense = ClassifierHead.forward(head, x), head.dense(x)  # (B, K), (B, N, K)
        dense = swap_box(dense.transpose(1, 2).unflatten(2, x.shape[2:]), box).flatten(2).transpose(1, 2)
        return TokenLabels(logits, dense, box)


# The authors' name of a part, its stage counted from 0, and ours; in this order.
RENAMED = (
    (r"^patch_embed0\.proj\.([01])\.", lambda m: f"stem.0.{('conv', 'norm')[int(m[1])]}."),
    (r"^patch_embed0\.proj\.([34])\.", lambda m: f"stem.2.{('conv', 'norm')[int(m[1]) - 3]}."),
    (r"^patch_embed0\.", "stem."),
    (r"^patch_embed(\d)\.proj\.0\.", r"stages.\1.downsample.conv."),
    (r"^patch_embed(\d)\.proj\.1\.", r"stages.\1.downsample.norm."),
    (r"^patch_embed(\d)\.", r"stages.\1.downsample."),
    (r"^blocks(\d)\.", r"stages.\1.blocks."),
    (r"\.pos_embed\.", ".pos_embed.proj."),
    (r"\.conv1\.", ".mixer.value."),
    (r"\.attn\.(weight|bias)$", r".mixer.affinity.\1"),
    (r"\.conv2\.", ".mixer.proj."),
    (r"\.attn\.", ".mixer."),
    (r"\.gamma_(\d)$", r".ls\1.gamma"),
    (r"^norm(\d)\.", r"feature_norms.\1."),
    (r"^head\.", "head.fc."),
    (r"^aux_head\.", "head.aux."),
    (r"^cls_token$", "stages.2.cls_token"),
    (r"^cls_upsample\.", "stages.3.cls_upsample."),
)


def rename(state_dict: dict[str, Any]) -> dict[str, Tensor]:
    """The authors' names to ours, their wrappings taken off; a state dict under our names stays as it is."""
    given = unwrap(state_dict)
    if any(name.startswith("stages.") for name in given):
        return given
    out = {}
    for name, value in given.items():
        name = re.sub(r"^(patch_embed|blocks|norm)(\d)", lambda m: f"{m[1]}{int(m[2]) - 1}", name)
        for theirs, ours in RENAMED:
            name = re.sub(theirs, ours, name)
        out[name] = value.flatten() if name.endswith(".gamma") else value  # local blocks have theirs as (1, C, 1, 1)
    return out


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Turn a checkpoint of the authors' code (classification, token labelling or detection) into a state dict of ours.

    Args:
        state_dict: Checkpoint, with or without what a training script saved around it.
        model: Model that is to take it.

    Raises:
        ValueError: It is another variant's; the message names a variant of its shapes. Head width is not among them:
            ``uniformer_small_plus`` and ``uniformer_small_plus_dim64`` have equal shapes. Or it was trained with token
            labelling and the model is a plain classifier.
    """
    out = rename(state_dict)
    classifies = isinstance(model, UniFormer) and model.num_classes
    if "head.aux.weight" in out and classifies and not isinstance(model.head, TokenLabelingHead):
        raise ValueError(
            "the checkpoint was trained with token labelling and has a second classifier, aux_head, that the model lacks: "
            "make the model with token_labeling=True, or take the variant whose name has _tl"
        )
    out = without_head(out, model)
    check_shapes(out, model, VARIANTS)
    return out


def config(**changes: Any) -> dict[str, Any]:
    """Timm's data configuration of a variant."""
    return classification_config(
        license="apache-2.0",
        paper_ids="arXiv:2201.09450",
        origin_url="https://github.com/Sense-X/UniFormer",
        **changes,
    )


default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": config(
            first_conv="stem.0.conv" if arguments.get("conv_stem") else "stem.proj",
            classifier=("head.fc", "head.aux") if arguments.get("token_labeling") else "head.fc",
            num_classes=arguments.get("num_classes", 1000),
        )
        for name, arguments in VARIANTS.items()
    }
)


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> UniFormer:
    arguments = {**VARIANTS[name], **kwargs}
    normed = arguments.get("feature_norms", False)
    return build_backbone(UniFormer, name, pretrained, checkpoint_filter_fn, normed_features=normed, **arguments)


register_table(__name__, VARIANTS, _create)
