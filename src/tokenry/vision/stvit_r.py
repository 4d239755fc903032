"""STViT-R: a Swin network whose long third stage runs mostly on semantic tokens.

Chang et al., "Making Vision Transformers Efficient from a Token Sparsification View", CVPR 2023, arXiv:2303.08685. (STViT of
*super* tokens is another method; the form for plain transformers is ``tokenry.vision.stvit_deit``.)

    net      two conv 3x3 s2, each with BN and Hardswish | four stages, patch merging between | LN | mean | linear
    1, 2, 4  Swin blocks: windows of 7 tokens, every other one moved by 3, a bias per offset
    3        units of six blocks, ``tokenry.mixers.SemanticTokenMixer``: 196 tokens become 36, are worked on, and come back
    dense    the form for detection: no head, a layer norm on every stage's map, and in stage 3 the units of
             ``tokenry.mixers.DenseSemanticTokenMixer``, whose windows look at their surroundings and not at everything

Images of any size: maps that windows do not divide get padding that no token sees, and the third stage makes semantic tokens
of maps of any size (at 224 pixels 14 x 14, where this is the authors' code).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import ClassifierHead, LayerNorm2d, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from tokenry.layers.conv_norm import ConvNorm
from tokenry.layers.swin_block import SwinBlock
from tokenry.mixers.dense_semantic_token import DenseSemanticTokenMixer
from tokenry.mixers.semantic_token import SemanticTokenMixer
from tokenry.vision.backbone import Backbone, Stage, build_backbone, classification_config
from tokenry.vision.registration import register_table
from tokenry.vision.state_dicts import check_shapes, unwrap, without_head

__all__ = ["STViTR", "checkpoint_filter_fn"]

# The authors train with stochastic depth 0.3 and 0.4.
VARIANTS: dict[str, dict[str, Any]] = {
    "stvit_r_swin_small": {"depths": (2, 2, 18, 2), "embed_dim": 96, "num_heads": (3, 6, 12, 24)},
    "stvit_r_swin_base": {"depths": (2, 2, 18, 2), "embed_dim": 128, "num_heads": (4, 8, 16, 32)},
}
# Sides of what windows see in the authors' detection network, which they train with stochastic depth 0.2 (small).
DENSE: dict[str, Any] = {"surroundings": (14, 21, 27), "feature_norms": True, "num_classes": 0}
VARIANTS |= {f"{name}_dense": {**arguments, **DENSE} for name, arguments in VARIANTS.items()}
SEMANTIC = 2  # the stage on semantic tokens
UNIT = 6  # blocks of one of its units


class SwinStage(Stage):
    """Patch merging and Swin blocks, which work on (B, H, W, C): (B, C, H, W) -> (B, C', H', W')."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return self.run_blocks(self.downsample(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class SemanticStage(Stage):
    """Patch merging, which works on (B, H, W, C), and units of semantic tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return self.run_blocks(self.downsample(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class STViTR(Backbone):
    """STViT-R image classifier and feature extractor.

    Args:
        depths: Blocks of the four stages; the third's must be a multiple of 6.
        embed_dim: Channels of the first stage; each further one has twice as many.
        num_heads: Heads of the stages; each must divide the stage's channels.
        window: Side of a window. Default 7.
        samples: Semantic tokens per window along each axis. Default 3.
        margin: How many tokens around its window a semantic token sees. Default 3.
        surroundings: Makes the third stage that of the dense form: sides of what a window sees, see
            ``DenseSemanticTokenMixer``. It has no ``margin`` or ``conv_pos`` and always a shortcut. None (default): the
            classifier's stage.
        feature_norms: A layer norm per stage for ``features_only``, and no closing norm: the dense form has them.
        conv_pos: Add a depthwise 3x3 to the pooled samples. Default False (released models).
        shortcut: Keep the pooled samples as a skip. Default False (released models).
        mlp_ratio: Hidden width of the MLPs over the channels. Default 4.
        layer_scale: First value of the layer scales in the third stage. Default 1e-5.
        num_classes: Classes; 0 leaves the classifier out.
        in_chans: Channels of the images.
        global_pool: Pooling before the classifier, as in timm.
        drop_rate: Dropout before the classifier.
        attn_drop_rate: Dropout of the attention weights.
        proj_drop_rate: Dropout after the attentions and in the MLPs.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0. Default 0.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: Arguments outside these ranges; images of another shape.

    Example:
        >>> net = STViTR((1, 1, 6, 1), 8, (1, 2, 2, 4), num_classes=10).eval()
        >>> net(torch.zeros(1, 3, 64, 96)).shape
        torch.Size([1, 10])
    """

    channels_last = True

    def __init__(
        self,
        depths: Sequence[int] = VARIANTS["stvit_r_swin_small"]["depths"],
        embed_dim: int = VARIANTS["stvit_r_swin_small"]["embed_dim"],
        num_heads: Sequence[int] = VARIANTS["stvit_r_swin_small"]["num_heads"],
        window: int = 7,
        samples: int = 3,
        margin: int = 3,
        surroundings: Sequence[int] | None = None,
        feature_norms: bool = False,
        conv_pos: bool = False,
        shortcut: bool = False,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 1e-5,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_classes, in_chans)
        if len(depths) != 4 or len(num_heads) != 4 or min(depths) < 1:
            raise ValueError(
                f"STViT-R has four stages: depths and num_heads take four positive entries, got {tuple(depths)} and "
                f"{tuple(num_heads)}"
            )
        if depths[SEMANTIC] % UNIT:
            raise ValueError(
                f"the third stage is made of units of {UNIT} blocks: its depth must be a multiple of {UNIT}, got "
                f"{depths[SEMANTIC]}; take {max(UNIT, round(depths[SEMANTIC] / UNIT) * UNIT)}"
            )
        if embed_dim < 2 or embed_dim % 2:
            raise ValueError(f"embed_dim must be even (the stem halves it), got {embed_dim}")
        if surroundings is not None and (margin != 3 or conv_pos or shortcut):
            raise ValueError(
                "margin, conv_pos and shortcut are settings of the classifier's third stage: leave them out with surroundings"
            )
        if feature_norms and num_classes:
            raise ValueError(
                "feature_norms=True is for feature maps, which have no classifier: give num_classes=0 with it, or "
                "feature_norms=False to classify"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.stem = nn.Sequential(
            ConvNorm(in_chans, embed_dim // 2, 3, stride=2, bias=False, **dd),
            nn.Hardswish(),
            ConvNorm(embed_dim // 2, embed_dim, 3, stride=2, bias=False, **dd),
            nn.Hardswish(),
        )
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        drops: dict[str, Any] = {"mlp_ratio": mlp_ratio, "attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate}
        dims = [embed_dim * 2**i for i in range(4)]
        stages: list[Stage] = []
        for i, (dim, heads) in enumerate(zip(dims, num_heads, strict=True)):
            downsample = PatchMerging(dim // 2, dim, **dd) if i else nn.Identity()
            if i == SEMANTIC:
                unit: Any = partial(SemanticTokenMixer, margin=margin, conv_pos=conv_pos, shortcut=shortcut)
                if surroundings is not None:
                    unit = partial(DenseSemanticTokenMixer, surroundings=surroundings)
                units = [
                    unit(
                        dim, heads, window=window, samples=samples, layer_scale=layer_scale,
                        drop_path=rates[i][first : first + UNIT], **drops, **dd,
                    )
                    for first in range(0, depths[i], UNIT)
                ]  # fmt: skip
                stages.append(SemanticStage(downsample, units))
            else:
                blocks = [
                    SwinBlock(dim, heads, window=window, shift=(j % 2) * (window // 2), drop_path=rate, **drops, **dd)
                    for j, rate in enumerate(rates[i])
                ]
                stages.append(SwinStage(downsample, blocks))
        self.stages = nn.Sequential(*stages)
        self.describe_stages(dims, [4 * 2**i for i in range(4)])
        self.norm = nn.Identity() if feature_norms else LayerNorm2d(dims[-1], eps=1e-5, **dd)
        self.feature_norms = nn.ModuleList(LayerNorm2d(dim, eps=1e-5, **dd) for dim in dims) if feature_norms else None
        self.head = ClassifierHead(dims[-1], num_classes, global_pool, drop_rate, **dd)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The biases per offset, as in Swin."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def feature_norm(self, x: Tensor, stage: int) -> Tensor:
        """The norms of ``feature_norms=True``, or the closing norm on the last map."""
        return super().feature_norm(x, stage) if self.feature_norms is None else self.feature_norms[stage](x)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages, norms and head that the wanted maps do not need, as in timm."""
        wanted = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if self.feature_norms is not None:
            self.feature_norms = None if prune_norm else self.feature_norms[: len(self.stages)]
        return wanted


# Parts of the authors' names, and ours. Their stages end with the patch merging, ours begin with it.
PARTS = ("swin", "generate", "gather", "within", "among", "recover")
RENAMES: dict[str, Any] = {
    r"^patch_embed\.proj\.(\d)\.c\.": r"stem.\1.conv.",
    r"^patch_embed\.proj\.(\d)\.bn\.": r"stem.\1.norm.",
    r"^head\.(?=weight|bias)": "head.fc.",
    r"^norm(\d)\.": r"feature_norms.\1.",
    r"^layers\.(\d)\.downsample\.": lambda m: f"stages.{int(m[1]) + 1}.downsample.",
    r"^layers\.2\.blocks\.(\d+)\.": lambda m: f"stages.2.blocks.{int(m[1]) // UNIT}.{PARTS[int(m[1]) % UNIT]}.",
    r"^layers\.": "stages.",
    r"\.layer_scale_([12])$": r".ls\1.gamma",
    r"\.conv_pos\.proj\.0\.": ".conv_pos.proj.",
}
CONSTANTS = (".relative_position_index", ".attn_mask")


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Turn a checkpoint of the authors (or a plain state dict of ours) into a state dict of ``model``.

    Of a detector's checkpoint the backbone is taken. A model with ``feature_norms`` takes a classifier's checkpoint too, and
    keeps its own, new stage norms.

    Raises:
        ValueError: It is another variant's, or holds learned global tokens, which the released models do not have.
    """
    given = unwrap(state_dict)
    if any(name.startswith("backbone.") for name in given):
        given = {name.removeprefix("backbone."): v for name, v in given.items() if name.startswith("backbone.")}
    out: dict[str, Tensor] = {}
    for name, value in given.items():
        if name.endswith(CONSTANTS):
            continue
        for theirs, ours in RENAMES.items():
            name = re.sub(theirs, ours, name)
        if ".attn.kv." in name:
            out[name.replace(".kv.", ".k.")], out[name.replace(".kv.", ".v.")] = value.chunk(2)
        else:
            out[name] = value
    out = without_head(out, model)
    new = {name: value for name, value in model.state_dict().items() if name.startswith("feature_norms.")}
    if new:
        out = new | {name: value for name, value in out.items() if not name.startswith("norm.")}
    check_shapes(out, model, VARIANTS)
    return out


default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": classification_config(
            first_conv="stem.0.conv",
            license="mit",
            paper_ids="arXiv:2303.08685",
            origin_url="https://github.com/changsn/STViT-R",
            num_classes=arguments.get("num_classes", 1000),
        )
        for name, arguments in VARIANTS.items()
    }
)


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> STViTR:
    arguments = {**VARIANTS[name], **kwargs}
    normed = arguments.get("feature_norms", False)
    return build_backbone(STViTR, name, pretrained, checkpoint_filter_fn, normed_features=normed, **arguments)


register_table(__name__, VARIANTS, _create)
