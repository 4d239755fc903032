"""TransNeXt: a pyramid whose every token sees its neighbours sharply and the whole image coarsely.

Shi, "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", CVPR 2024, arXiv:2311.17132.

    x = x + drop_path( attention( LN(x) ) )       aggregated attention; cosine attention where sr = 1    x: (B, C, H, W)
    x = x + drop_path( ConvGLU( LN(x) ) )
    stage  conv, LN | blocks | LN                 conv 7x7 stride 4 in the first stage, 3x3 stride 2 in the others
    net    four stages | mean, linear

The mixers are ``tokenry.mixers.AggregatedAttention`` and ``CosineAttention``, the channel mixer is
``tokenry.layers.ConvGLU``. Position biases and length scales are computed from the actual map, so images may have any
size; ``pretrain_size``, the side that the weights were trained at first, sets the scale of the offsets and stays what it
was when the network is used at another size. Sides that are no multiples of 32 are rounded up by the convolutions and
down by the pooling (our choice; the authors' code takes multiples of 32 alone).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, DropPath, LayerNorm2d, calculate_drop_path_rates
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from tokenry.layers.conv_glu import ConvGLU
from tokenry.layers.fan_out_init import fan_out_init
from tokenry.mixers.aggregated_attention import AggregatedAttention, CosineAttention
from tokenry.vision.backbone import Backbone, Stage, build_backbone, classification_config
from tokenry.vision.registration import register_table
from tokenry.vision.state_dicts import check_shapes, unwrap, without_head

__all__ = ["TransNeXt", "checkpoint_filter_fn"]

# The authors trained with drop_path_rate 0.15 (micro), 0.25 (tiny), 0.45 (small) and 0.6 (base).
_MICRO = {"dims": (48, 96, 192, 384), "num_heads": (2, 4, 8, 16), "depths": (2, 2, 15, 2)}
_TINY = {"dims": (72, 144, 288, 576), "num_heads": (3, 6, 12, 24), "depths": (2, 2, 15, 2)}
_SMALL = {**_TINY, "depths": (5, 5, 22, 5)}
_BASE = {"dims": (96, 192, 384, 768), "num_heads": (4, 8, 16, 32), "depths": (5, 5, 23, 5)}
VARIANTS: dict[str, dict[str, Any]] = {
    "transnext_micro": _MICRO,
    "transnext_tiny": _TINY,
    "transnext_small": _SMALL,
    "transnext_base": _BASE,
    "transnext_small_384": _SMALL,
    "transnext_base_384": _BASE,
    "transnext_micro_aaaa": {**_MICRO, "sr_ratios": (16, 8, 4, 2), "pretrain_size": 256},
}
INPUT_SIZE = {"transnext_small_384": 384, "transnext_base_384": 384, "transnext_micro_aaaa": 256}
FINAL_STRIDE = 32
UNDECAYED = ("query_embedding", "relative_pos_bias_local", "cpb", "temperature")


class PatchEmbed(nn.Module):
    """Overlapping convolution and layer norm: (B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, kernel_size, stride, kernel_size // 2, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return self.norm(self.conv(x))


class Block(nn.Module):
    """The mixer and the channel mixer, each of a norm of the map and added to it.

    Args:
        dim: Channels C.
        mixer: Made with ``dim``; keeps the shape (B, C, H, W).
        mlp_ratio: Hidden width of the MLP that the ConvGLU stands for, over C.
        proj_drop: Dropout inside the ConvGLU.
        drop_path: Stochastic depth of both.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm2d(dim, **dd)
        self.attn = mixer
        self.norm2 = LayerNorm2d(dim, **dd)
        self.mlp = ConvGLU(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class NormedStage(Stage):
    """A stage whose map is normed before it goes on."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module) -> None:
        super().__init__(downsample, blocks)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return self.norm(super().forward(x))


class TransNeXt(Backbone):
    """TransNeXt image classifier and feature extractor.

    Args:
        dims: Channels of the four stages.
        depths: Blocks in each.
        num_heads: Heads in each.
        sr_ratios: In each, how many times smaller than the map the pooled keys' map is; 1: cosine attention over all
            positions. Default (8, 4, 2, 1).
        window_size: Side of the window of neighbours. Default 3.
        mlp_ratios: Widths of the MLPs that the ConvGLUs stand for, over the channels. Default (8, 8, 4, 4).
        qkv_bias: Whether queries, keys and values have a bias. Default True.
        img_size: Side of the images, or (H, W), where the network is to refuse all others; multiples of 32. None
            (default): any size.
        pretrain_size: Side of the images in pretraining, or (H, W). Default 224; 256 for ``transnext_micro_aaaa``.
        fixed_pool_size: Pool to this many rows and columns in all stages, whatever the size of the images; the cost then
            grows linearly with the number of pixels. Default None: as ``sr_ratios`` say.
        num_classes: Classes; 0 leaves the linear layer out.
        in_chans: Channels of the images.
        global_pool: Pooling before the classifier, as in timm.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout of the mixers' outputs and in the ConvGLUs.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: Arguments outside these ranges; an image batch of another shape, or too small for ``fixed_pool_size``.

    Example:
        >>> net = TransNeXt(dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), num_classes=10).eval()
        >>> net(torch.zeros(1, 3, 64, 96)).shape
        torch.Size([1, 10])
    """

    channels_last = True

    def __init__(
        self,
        dims: Sequence[int] = _TINY["dims"],
        depths: Sequence[int] = _TINY["depths"],
        num_heads: Sequence[int] = _TINY["num_heads"],
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        window_size: int = 3,
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        qkv_bias: bool = True,
        img_size: int | tuple[int, int] | None = None,
        pretrain_size: int | tuple[int, int] = 224,
        fixed_pool_size: int | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_classes, in_chans, img_size)
        given = {
            "dims": dims,
            "depths": depths,
            "num_heads": num_heads,
            "sr_ratios": sr_ratios,
            "mlp_ratios": mlp_ratios,
        }
        for name, values in given.items():
            if len(values) != 4 or min(values) <= 0:
                raise ValueError(f"{name} needs one positive entry for each of the four stages, got {tuple(values)}")
        if self.img_size is not None and (self.img_size[0] % FINAL_STRIDE or self.img_size[1] % FINAL_STRIDE):
            raise ValueError(
                f"img_size must be made of multiples of {FINAL_STRIDE}, got {self.img_size[0]}x{self.img_size[1]}; take "
                "such a size, or leave img_size out for a model that takes any"
            )
        trained = (pretrain_size, pretrain_size) if isinstance(pretrain_size, int) else pretrain_size
        if min(trained) < FINAL_STRIDE:
            raise ValueError(
                f"pretrain_size is the side of the images in pretraining, at least {FINAL_STRIDE}, got {pretrain_size}; "
                "the paper's is 224"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fixed_pool_size = fixed_pool_size
        # stride of the deepest map that is pooled
        self.pooled_stride = max((4 << i for i, ratio in enumerate(sr_ratios) if ratio > 1), default=4)
        if fixed_pool_size is not None and self.img_size is not None:
            self.check_pool_size(*self.img_size)

        def mixer(stage: int) -> nn.Module:
            common: dict[str, Any] = {
                "num_heads": num_heads[stage],
                "pretrain_size": (trained[0] // (4 << stage), trained[1] // (4 << stage)),
                "qkv_bias": qkv_bias,
                "attn_drop": attn_drop_rate,
                "proj_drop": proj_drop_rate,
                **dd,
            }
            if sr_ratios[stage] == 1:
                return CosineAttention(dims[stage], **common)
            return AggregatedAttention(
                dims[stage],
                window_size=window_size,
                sr_ratio=sr_ratios[stage],
                pool_size=fixed_pool_size,
                **common,
            )

        self.stem = PatchEmbed(in_chans, dims[0], 7, 4, **dd)
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            blocks = [Block(dim, mixer(i), mlp_ratios[i], proj_drop_rate, rate, **dd) for rate in rates[i]]
            downsample = PatchEmbed(dims[i - 1], dim, 3, 2, **dd) if i else nn.Identity()
            stages.append(NormedStage(downsample, blocks, LayerNorm2d(dim, **dd) if i < 3 else nn.Identity()))
        self.stages = nn.Sequential(*stages)
        self.norm = LayerNorm2d(dims[-1], **dd)
        self.head = ClassifierHead(dims[-1], num_classes, global_pool, drop_rate, **dd)
        self.describe_stages(dims, (4, 8, 16, 32))
        fan_out_init(self)
        for module in self.modules():
            if isinstance(module, AggregatedAttention):  # the authors' map before pooling is a convolution of 1x1
                nn.init.normal_(module.sr.weight, std=math.sqrt(2.0 / module.dim))

    def check_pool_size(self, height: int, width: int) -> None:
        """Refuse images whose pooled maps are not larger than ``fixed_pool_size``, with a ``ValueError``."""
        side = -(-min(height, width) // self.pooled_stride)
        if self.fixed_pool_size is not None and self.fixed_pool_size >= side:
            raise ValueError(
                f"fixed_pool_size={self.fixed_pool_size} must be smaller than the shorter side of every pooled map, which is "
                f"{side} for images of {height}x{width}; take images of more than "
                f"{self.fixed_pool_size * self.pooled_stride} pixels a side, or a smaller fixed_pool_size"
            )

    def check_images(self, x: Tensor) -> None:
        """Refuse what is no batch of images of a size that the network takes, with a ``ValueError``."""
        super().check_images(x)
        self.check_pool_size(x.shape[-2], x.shape[-1])

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Temperatures, query embeddings and position biases."""
        return {name for name, _ in self.named_parameters() if any(part in name for part in UNDECAYED)}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Turn a checkpoint of the authors' code into a state dict of ours.

    ``patch_embed1`` is our ``stem``, ``patch_embed{i}`` our ``stages.{i-1}.downsample``, ``block{i}`` that stage's
    ``blocks`` and ``norm{i}`` its ``norm`` (the last one the model's); the 1x1 convolution ``sr`` is our linear map. Index
    tables, scales and masks of one image size are left out.

    Args:
        state_dict: Checkpoint.
        model: Model that is to take it.

    Raises:
        ValueError: It is another variant's; the message names the likely one.
    """
    out: dict[str, Any] = {}
    for name, value in unwrap(state_dict).items():
        if re.search(r"relative_pos_index|relative_coords_table|seq_length_scale|padding_mask", name):
            continue
        name = re.sub(r"^patch_embed1\.", "stem.", name)
        name = re.sub(r"^patch_embed(\d)\.", lambda found: f"stages.{int(found[1]) - 1}.downsample.", name)
        name = re.sub(r"^(stem|stages\.\d\.downsample)\.proj\.", r"\1.conv.", name)
        name = re.sub(r"^block(\d)\.", lambda found: f"stages.{int(found[1]) - 1}.blocks.", name)
        name = re.sub(r"^norm4\.", "norm.", name)
        name = re.sub(r"^norm(\d)\.", lambda found: f"stages.{int(found[1]) - 1}.norm.", name)
        name = re.sub(r"^head\.(?=weight$|bias$)", "head.fc.", name)
        if name.endswith(".sr.weight"):
            value = value.flatten(1)
        out[name.replace(".cpb_fc", ".cpb.fc").replace(".dwconv.dwconv.", ".dwconv.")] = value
    out = without_head(out, model)
    check_shapes(out, model, VARIANTS)
    return out


default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": classification_config(
            input_size=(3, side := INPUT_SIZE.get(name, 224), side),
            pool_size=(side // FINAL_STRIDE, side // FINAL_STRIDE),
            crop_pct=1.0 if side == 384 else 0.875,
            license="apache-2.0",
            paper_ids="arXiv:2311.17132",
            origin_url="https://github.com/DaiShiResearch/TransNeXt",
        )
        for name in VARIANTS
    }
)


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    return build_backbone(
        TransNeXt, name, pretrained, checkpoint_filter_fn, normed_features=True, **{**VARIANTS[name], **kwargs}
    )


register_table(__name__, VARIANTS, _create)
