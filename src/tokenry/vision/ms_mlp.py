"""MS-MLP: a network of mix-shift blocks, local and global without attention.

Zheng et al., "Mixing and Shifting: Exploiting Global and Local Dependencies in Vision MLPs", 2022, arXiv:2202.06510.

    block   x + drop_path( gamma * W2 GELU( W1 LayerNorm( MixShift(x) ) ) )              one residual; x: (B, C, H, W)
    net     conv 4x4 s4, norm | blocks | conv 2x2 s2, norm | blocks | ... | mean, norm, linear

It is a ConvNeXt whose depthwise convolution is ``tokenry.mixers.MixShift``: mixing and channel MLP share one residual. The
kernel sizes are those of the released configurations, stage by stage; the region that a group sees grows with depth.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, NormMlpClassifierHead, trunc_normal_
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from tokenry.layers.mlp import ChannelMLP
from tokenry.mixers.mix_shift import MixShift
from tokenry.vision.backbone import Backbone, Stage, build_backbone, classification_config
from tokenry.vision.registration import register_table
from tokenry.vision.state_dicts import check_shapes, unwrap, without_head

__all__ = ["MSMLP", "MixShiftBlock", "checkpoint_filter_fn"]

KERNEL_SIZES = ((1, 1, 3, 5, 7), (1, 3, 3, 5, 7), (1, 5, 5, 5, 7), (1, 7, 7, 7, 7))
VARIANTS: dict[str, dict[str, Any]] = {
    "ms_mlp_tiny": {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)},
    "ms_mlp_small": {"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768)},
    "ms_mlp_base": {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)},
}


class MixShiftBlock(nn.Module):
    """Mix-shift, norm and channel MLP under one residual.

    Args:
        dim: Channels C.
        shifts: Of the mixer.
        kernel_sizes: Of the mixer.
        mlp_ratio: Hidden width over C. Default 4 (paper).
        layer_scale: First value of gamma. Default 1e-6 (authors' code). None: no gamma.
        drop_path: Rate of stochastic depth.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        dim: int,
        shifts: Sequence[int] = (-2, -1, 0, 1, 2),
        kernel_sizes: Sequence[int] = KERNEL_SIZES[1],
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 1e-6,
        drop_path: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.token_mixer = MixShift(dim, shifts, kernel_sizes, **dd)
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = ChannelMLP(dim, int(mlp_ratio * dim), **dd)
        for linear in (self.mlp.fc1, self.mlp.fc2):
            trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale, **dd))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        y = self.mlp(self.norm(self.token_mixer(x).permute(0, 2, 3, 1)))  # (B, H, W, C)
        if self.gamma is not None:
            y = y * self.gamma
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class MSMLP(Backbone):
    """MS-MLP image classifier and feature extractor.

    Args:
        depths: Blocks per stage.
        dims: Channels per stage.
        num_classes: Classes; 0 leaves the classifier out.
        in_chans: Channels of the images.
        shifts: Of all blocks. Default (-2, -1, 0, 1, 2).
        kernel_sizes: A list per stage. Default: the released models'. (The defaults of the authors' class are others.)
        mlp_ratio: Hidden width over C. Default 4.
        layer_scale: First value of each block's gamma. Default 1e-6.
        global_pool: Pooling before the classifier, as in timm.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, growing linearly. The paper trains tiny, small and base with
            0.1, 0.4 and 0.5.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: Lists that do not fit the stages; images whose sides are no multiples of 32.

    Example:
        >>> net = MSMLP((1, 1, 1, 1), (20, 20, 40, 40), num_classes=10).eval()
        >>> net(torch.zeros(1, 3, 64, 96)).shape
        torch.Size([1, 10])
    """

    size_multiple = 32

    def __init__(
        self,
        depths: Sequence[int] = VARIANTS["ms_mlp_tiny"]["depths"],
        dims: Sequence[int] = VARIANTS["ms_mlp_tiny"]["dims"],
        num_classes: int = 1000,
        in_chans: int = 3,
        shifts: Sequence[int] = (-2, -1, 0, 1, 2),
        kernel_sizes: Sequence[Sequence[int]] = KERNEL_SIZES,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 1e-6,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_classes, in_chans)
        if not len(depths) == len(dims) == len(kernel_sizes) == 4:
            raise ValueError(
                f"MS-MLP has four stages: got {len(depths)} depths, {len(dims)} dims and {len(kernel_sizes)} lists of "
                "kernel sizes"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], 4, 4, **dd), LayerNorm2d(dims[0], eps=1e-6, **dd))
        rates = torch.linspace(0, drop_path_rate, sum(depths)).tolist()
        stages = []
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            downsample: nn.Module = nn.Identity()
            if i > 0:
                downsample = nn.Sequential(nn.Conv2d(dims[i - 1], dim, 2, 2, **dd), LayerNorm2d(dim, eps=1e-6, **dd))
            blocks = [
                MixShiftBlock(dim, shifts, kernel_sizes[i], mlp_ratio, layer_scale, rates.pop(0), **dd)
                for _ in range(depth)
            ]
            stages.append(Stage(downsample, blocks))
        self.stages = nn.Sequential(*stages)
        self.describe_stages(dims, (4, 8, 16, 32))
        self.head = NormMlpClassifierHead(
            dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, norm_layer=LayerNorm2d, **dd
        )
        if num_classes:
            trunc_normal_(self.head.fc.weight, std=0.02)
            nn.init.zeros_(self.head.fc.bias)  # type: ignore[arg-type]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Turn a checkpoint of the authors into a state dict of ours.

    Their downsampling stands at the end of a stage, ours at the beginning of the next one.

    Raises:
        ValueError: The checkpoint is another variant's.
    """
    names = (
        (r"^patch_embed\.proj\.", "stem.0."),
        (r"^patch_embed\.norm\.", "stem.1."),
        (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
        (r"(blocks\.\d+)\.(dwconv_(?:lr|td))\.", r"\1.token_mixer.\2."),
        (r"\.pwconv([12])\.", r".mlp.fc\1."),
        (r"^norm\.", "head.norm."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    )
    out: dict[str, Any] = {}
    for name, value in unwrap(state_dict).items():
        for pattern, new in names:
            name = re.sub(pattern, new, name)
        if found := re.match(r"layers\.(\d+)\.downsample\.(proj|norm)\.(.*)", name):
            name = f"stages.{int(found[1]) + 1}.downsample.{('proj', 'norm').index(found[2])}.{found[3]}"
        out[name] = value
    out = without_head(out, model)
    check_shapes(out, model, VARIANTS)
    return out


default_cfgs = generate_default_cfgs(
    {
        name: classification_config(
            first_conv="stem.0",
            license="mit",
            paper_ids="arXiv:2202.06510",
            origin_url="https://github.com/JegZheng/MS-MLP",
        )
        for name in VARIANTS
    }
)


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> MSMLP:
    return build_backbone(MSMLP, name, pretrained, checkpoint_filter_fn, **{**VARIANTS[name], **kwargs})


register_table(__name__, VARIANTS, _create)
