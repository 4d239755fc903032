"""GC ViT: local and global window attention in turn, and a downsampling with a fused inverted residual.

Hatamizadeh et al., "Global Context Vision Transformers", ICML 2023, arXiv:2206.09959.

    level       q = generator(x)                                one global query map (w x w) per image and level
    block       x = x + attn(norm(x));  x = x + mlp(norm(x))    attn: local in even blocks, global (with q) in odd ones
    down        norm -> x + conv1x1(SE(GELU(dwconv3x3(x)))) -> conv3x3 stride 2 -> norm
    net         conv3x3 s2, down | level | down, level | down, level | down, level | norm | mean | linear

The network is timm's (``gcvit_xxtiny`` ... ``gcvit_base``). This file adds the variants that timm lacks, the conversion of
NVIDIA's names, messages for sizes that do not fit, and the downsampling on its own. The query mixer is
``tokenry.mixers.GlobalQueryAttention``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import timm
import torch
from packaging.version import Version
from timm.layers import LayerNorm2d
from timm.models import generate_default_cfgs
from timm.models.gcvit import GlobalContextVit
from torch import Tensor, nn

from tokenry.layers.window_partition import window_sides
from tokenry.mixers.global_query import fused_mbconv
from tokenry.vision.backbone import build_backbone, classification_config
from tokenry.vision.registration import register_table
from tokenry.vision.state_dicts import check_shapes, unwrap, without_head

__all__ = ["FusedMBDown", "GCViT", "check_timm", "check_windows", "checkpoint_filter_fn", "convert_gcvit"]

TIMM_NEEDED = "1.0.31"
_WIDE = {"num_heads": (3, 6, 12, 24), "embed_dim": 96, "layer_scale": 1e-5}
# What timm has no entry for. Levels are as in ``gcvit_small`` where nothing is said: depths (3, 4, 19, 5).
VARIANTS: dict[str, dict[str, Any]] = {
    "gcvit_tiny2": {"depths": (3, 4, 29, 5)},
    "gcvit_small2": {"depths": (3, 4, 23, 5), "mlp_ratio": 3.0, **_WIDE},
    "gcvit_large": {"num_heads": (6, 12, 24, 48), "embed_dim": 192, "mlp_ratio": 2.0, "layer_scale": 1e-5},
}
# timm's own, so that a checkpoint of theirs is recognised.
TIMM_VARIANTS: dict[str, dict[str, Any]] = {
    "gcvit_xxtiny": {"depths": (2, 2, 6, 2)},
    "gcvit_xtiny": {"depths": (3, 4, 6, 5)},
    "gcvit_tiny": {"depths": (3, 4, 19, 5)},
    "gcvit_small": {"mlp_ratio": 2.0, **_WIDE},
    "gcvit_base": {"num_heads": (4, 8, 16, 32), "embed_dim": 128, "mlp_ratio": 2.0, "layer_scale": 1e-5},
}


def check_timm(version: str = timm.__version__) -> None:
    """Refuse a timm whose GC ViT mixes the images of a batch.

    Up to 1.0.29 at least it gives the windows of an image the global queries of others as soon as a batch has two images.

    Raises:
        ValueError: ``version`` is below 1.0.31.
    """
    if Version(version) < Version(TIMM_NEEDED):
        raise ValueError(
            f"GC ViT needs timm>={TIMM_NEEDED}, got {version}: older ones mix the images of a batch in the global attention. "
            f"Install it with pip install -U 'timm>={TIMM_NEEDED}'"
        )


def check_windows(
    img_size: int | tuple[int, int],
    window_ratio: int | Sequence[int] = (32, 32, 16, 32),
    window_size: int | Sequence[int | tuple[int, int]] | None = None,
    levels: int = 4,
) -> list[tuple[int, int]]:
    """The windows (wh, ww) of each level, checked against its map.

    Args:
        img_size: Side of the images, or (H, W).
        window_ratio: Image side over window side, per level.
        window_size: The windows themselves instead.
        levels: Number of levels; their maps are 4, 8, 16, 32 ... times smaller than the image.

    Raises:
        ValueError: A map is not 2^n windows high and as many wide; level, sizes and a way out are named.

    Example:
        >>> check_windows(224)
        [(7, 7), (7, 7), (14, 14), (7, 7)]
    """
    height, width = window_sides(img_size)
    if window_size is None:
        ratios = [window_ratio] * levels if isinstance(window_ratio, int) else window_ratio
        windows = [(height // ratio, width // ratio) for ratio in ratios]
    else:
        windows = [window_sides(w) for w in ([window_size] * levels if isinstance(window_size, int) else window_size)]
    if len(windows) != levels:
        raise ValueError(f"give one window (or ratio) for each of the {levels} levels, got {len(windows)}")
    for level, (window_height, window_width) in enumerate(windows):
        stride = 4 * 2**level
        rows, height_left = divmod(height, max(stride * window_height, 1))
        columns, width_left = divmod(width, max(stride * window_width, 1))
        whole = min(window_height, window_width) > 0 and not (height_left or width_left)
        if whole and rows == columns and rows.bit_count() == 1:  # the query map is reached by halving
            continue
        raise ValueError(
            f"level {level + 1} of {levels} has a map of {height / stride:g}x{width / stride:g} for images of {height}x{width}, "
            f"and windows of {window_height}x{window_width}: there must be the same number, 1, 2, 4, 8 ..., of whole windows "
            "along both sides. Take an img_size that is a multiple of 32 and leave window_size out, or other windows"
        )
    return windows


class GCViT(GlobalContextVit):
    """timm's GC ViT, which says what does not fit before anything runs.

    Args:
        img_size: Side of the images, or (H, W); no other size is taken.
        window_ratio: Image side over window side, per level. Default (32, 32, 16, 32): windows 7, 7, 14, 7 at 224.
        window_size: The windows themselves, one number (or pair) per level. None: from the ratio.
        depths: Blocks per level.
        **kwargs: As timm's: ``num_heads``, ``embed_dim``, ``mlp_ratio``, ``layer_scale``, ``drop_path_rate``, ``num_classes`` ...

    Raises:
        ValueError: Windows that do not fill a level's map; images of another size; an older timm.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        window_ratio: int | Sequence[int] = (32, 32, 16, 32),
        window_size: int | Sequence[int | tuple[int, int]] | None = None,
        depths: Sequence[int] = (3, 4, 19, 5),
        **kwargs: Any,
    ) -> None:
        check_timm()
        windows: Any = tuple(check_windows(img_size, window_ratio, window_size, len(depths)))
        super().__init__(img_size=img_size, window_size=windows, depths=tuple(depths), **kwargs)
        self.img_size = window_sides(img_size)

    def check_images(self, x: Tensor) -> None:
        """Refuse what is no batch of images of the size that the model was made for, with a ``ValueError``."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"expected images (B, {self.in_chans}, H, W), got {tuple(x.shape)}; for other channel counts make the model "
                "with in_chans=..."
            )
        if tuple(x.shape[2:]) != self.img_size:
            raise ValueError(
                f"the model was made for images of {self.img_size[0]}x{self.img_size[1]} pixels, got "
                f"{x.shape[2]}x{x.shape[3]}; resize them, or make it with img_size of your images (its windows are part of it)"
            )

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, H / 32, W / 32)."""
        self.check_images(x)
        return super().forward_features(x)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The maps of chosen levels, as in timm."""
        self.check_images(x)
        return super().forward_intermediates(x, *args, **kwargs)


class FusedMBDown(nn.Module):
    """GC ViT's downsampling: (B, C, H, W) -> (B, C', ceil(H / 2), ceil(W / 2)).

    norm -> ``x + conv1x1(SE(GELU(dwconv3x3(x))))`` -> conv3x3 with stride 2 -> norm; convolutions without bias.

    Args:
        dim: Channels C.
        out_dim: Channels C'. None: 2 C.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: ``dim`` or ``out_dim`` below 4, of which a squeeze to a quarter leaves nothing.

    Example:
        >>> FusedMBDown(16)(torch.randn(1, 16, 9, 8)).shape
        torch.Size([1, 32, 5, 4])
    """

    def __init__(
        self,
        dim: int,
        out_dim: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_dim = 2 * dim if out_dim is None else out_dim
        if dim < 4 or out_dim < 1:
            raise ValueError(
                f"dim must be at least 4 and out_dim at least 1, got {dim} and {out_dim}; 2 * dim is the paper's"
            )
        norm = partial(LayerNorm2d, eps=1e-5, device=device, dtype=dtype)
        self.norm1 = norm(dim)
        self.conv_block = fused_mbconv(dim, device=device, dtype=dtype)
        self.reduction = nn.Conv2d(dim, out_dim, 3, 2, 1, bias=False, device=device, dtype=dtype)
        self.norm2 = norm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / 2), ceil(W / 2))."""
        return self.norm2(self.reduction(self.conv_block(self.norm1(x))))


# NVIDIA's names to timm's, in this order.
_NAMES = [
    (r"^patch_embed\.proj\.", "stem.conv1."),
    (r"^patch_embed\.conv_down\.", "stem.down."),
    (r"^levels\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^levels\.(\d+)\.q_global_gen\.to_q_global\.(\d+)\.", lambda m: f"stages.{m[1]}.global_block.blocks.conv{int(m[2]) + 1}."),
    (r"^levels\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"\.relative_position_bias_table$", ".rel_pos.relative_position_bias_table"),
    (r"\.gamma([12])$", r".ls\1.gamma"),
    (r"^head\.", "head.fc."),
]  # fmt: skip
# The same inside a fused inverted residual, whichever name it goes by.
_FUSED = [
    (r"(^|\.)conv\.0\.weight$", "conv_dw.weight"),
    (r"(^|\.)conv\.2\.fc\.0\.weight$", "se.fc1.weight"),
    (r"(^|\.)conv\.2\.fc\.2\.weight$", "se.fc2.weight"),
    (r"(^|\.)conv\.3\.weight$", "conv_pw.weight"),
]


def convert_gcvit(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """NVIDIA's state dict under timm's names; index tables are dropped.

    It loads into timm's ``gcvit_*`` and into those of this package, made with the resolution of the checkpoint
    (``img_size=384`` ...). NVIDIA's weights are under a non-commercial licence.

    Args:
        state_dict: As released, or what a training script saved around it.

    Returns:
        Name to tensor.

    Raises:
        ValueError: These are no names of NVIDIA's GC ViT; or timm is too old for the result to be right.
    """
    check_timm()
    weights = unwrap(state_dict)
    if "patch_embed.conv_down.reduction.weight" not in weights:
        raise ValueError(
            "this is no state dict of NVIDIA's GC ViT: it has no patch_embed.conv_down.reduction.weight; it starts with "
            f"{', '.join(list(weights)[:3])}. One under timm's names loads as it is"
        )
    last = max(int(name.split(".")[1]) for name in weights if name.startswith("levels."))
    names = [*_NAMES, (r"^norm\.", f"stages.{last}.norm.")]
    converted: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name.endswith("relative_position_index"):
            continue
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        # In a generator the residual is the module itself; in a downsampling it is a part called conv_block.
        part = r"\1" if ".global_block." in name else r"\1conv_block."
        for pattern, replacement in _FUSED:
            name = re.sub(pattern, part + replacement, name)
        converted[name] = value[:, :, None, None] if re.search(r"\.se\.fc[12]\.weight$", name) else value
    return converted


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of NVIDIA's or timm's for ``model``.

    Raises:
        ValueError: It is another model's; the message names the likely one.
    """
    weights = unwrap(state_dict)
    if "stem.conv1.weight" not in weights:
        weights = convert_gcvit(weights)
    weights = without_head(weights, model)
    check_shapes(weights, model, TIMM_VARIANTS | VARIANTS)
    return weights


default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": classification_config(
            first_conv="stem.conv1",
            crop_pct=0.875,
            fixed_input_size=True,
            origin_url="https://arxiv.org/abs/2206.09959",
        )
        for name in VARIANTS
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> GCViT:
    return build_backbone(GCViT, variant, pretrained, checkpoint_filter_fn, **{**VARIANTS[variant], **kwargs})


register_table(__name__, VARIANTS, _create)
