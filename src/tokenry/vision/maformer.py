"""MAFormer: local window attention fused, by attention, with a learned overview of all tokens.

Sun et al., "MAFormer: A Transformer Network with Multi-scale Attention Fusion for Visual Recognition", Neurocomputing
2024, arXiv:2209.01620. Four stages; blocks of the first two, on Y (B, H, W, C):

    Y_L = Y + W-MSA( LN(Y) );   Y_L = Y_L + MLP( LN(Y_L) )             local: windows of 7 x 7
    Y_G = W Y + b + pos                                               global: ``GLD``, half as many tokens
    Z   = Y_L + attention( queries Y_L; keys, values Y_G );   Z + MLP( LN(Z) )

and of the last two: ordinary attention over all tokens, then an MLP. Every branch has stochastic depth.

The authors have published neither code nor weights, and their sizes are not in the text at hand. The equations above are
the paper's; the following are choices of this library: MAF blocks in stages 1 and 2, an MLP in the local stream and one after
the fusion, no shifted windows, overlapping 3x3 convolutions between stages, and all widths and depths, which were
set so that the variants have about 23, 53 and 105 million parameters, as the paper's S, B and L are cited with. The
checkpoint filter therefore has nothing to convert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, DropPath, LayerNorm2d, to_2tuple, trunc_normal_
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from tokenry.layers.cross_attention import CrossAttention
from tokenry.layers.head_count import head_count
from tokenry.layers.mlp import ChannelMLP
from tokenry.mixers.attention import AttentionMixer
from tokenry.mixers.maf import GLD, check_map
from tokenry.mixers.window_attention import WindowAttentionMixer
from tokenry.vision.backbone import Backbone, build_backbone, classification_config
from tokenry.vision.metaformer_blocks import ChannelsLastStage, MetaFormerBlock
from tokenry.vision.registration import register_table
from tokenry.vision.state_dicts import check_shapes, unwrap, without_head

__all__ = ["MAFBlock", "MAFormer", "checkpoint_filter_fn"]

VARIANTS: dict[str, dict[str, Any]] = {
    "maformer_small": {"depths": (1, 2, 7, 2), "dims": (64, 128, 320, 512)},
    "maformer_base": {"depths": (1, 3, 11, 3), "dims": (96, 192, 448, 640)},
    "maformer_large": {"depths": (1, 3, 18, 4), "dims": (128, 256, 512, 768)},
}
STRIDES = (4, 8, 16, 32)
MAF_STAGES = 2


class MAFBlock(nn.Module):
    """The paper's block: a local stream, an overview, their fusion, an MLP.

    Args:
        dim: Channels C.
        input_size: (H, W) of the maps.
        num_heads: Heads of both attentions. None: heads of 32 channels where that divides, else one.
        window_size: Side of a window. Default 7.
        ratio: Tokens of the overview over tokens of the map. Default 0.5.
        mlp_ratio: Hidden width of both MLPs over C. Default 4.
        proj_drop: Dropout rate in the attentions' outputs and the MLPs.
        drop_path: Rate of stochastic depth of each branch.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        dim: int,
        input_size: tuple[int, int],
        num_heads: int | None = None,
        window_size: int = 7,
        ratio: float = 0.5,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = int(mlp_ratio * dim)
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.local = WindowAttentionMixer(
            dim, num_heads, window_size=window_size, rel_bias=True, mask_padding=True, proj_drop=proj_drop, **dd
        )
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.local_mlp = ChannelMLP(dim, hidden, drop=proj_drop, **dd)
        self.gld = GLD(dim, input_size, ratio, **dd)
        self.fusion = CrossAttention(dim, num_heads, proj_drop=proj_drop, **dd)
        self.norm3 = nn.LayerNorm(dim, **dd)
        self.mlp = ChannelMLP(dim, hidden, drop=proj_drop, **dd)
        for linear in (self.local_mlp.fc1, self.local_mlp.fc2, self.mlp.fc1, self.mlp.fc2):
            trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def set_input_size(self, input_size: tuple[int, int]) -> None:
        """Resample the overview to maps of another size."""
        self.gld.set_input_size(input_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        check_map(x, self.gld.input_size)
        local = x + self.drop_path(self.local(self.norm1(x)))
        local = local + self.drop_path(self.local_mlp(self.norm2(local)))
        fused = self.fusion(local.flatten(1, 2), self.gld(x.flatten(1, 2))).view(x.shape)
        y = local + self.drop_path(fused)
        return y + self.drop_path(self.mlp(self.norm3(y)))


class MAFormer(Backbone):
    """MAFormer image classifier and feature extractor.

    Args:
        depths: Blocks per stage; MAF blocks in the first two.
        dims: Channels per stage.
        img_size: Side of the images, or (H, W), multiples of 32: the overview has a row per token.
        num_classes: Classes; 0 leaves the classifier out.
        in_chans: Channels of the images.
        head_dim: Width of a head. Default 32.
        window_size: Side of a window. Default 7.
        ratio: Tokens of the overview over tokens of the map. Default 0.5 (paper).
        mlp_ratio: Hidden width of the MLPs over C. Default 4.
        global_pool: Pooling before the classifier, as in timm.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout in the attentions' outputs and the MLPs.
        drop_path_rate: Stochastic depth of the last block, growing linearly.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: An image size that is no multiple of 32; images of another size.

    Example:
        >>> net = MAFormer((1, 1, 1, 1), (8, 8, 16, 16), img_size=64, num_classes=10).eval()
        >>> net.set_input_size((96, 64))
        >>> net(torch.zeros(1, 3, 96, 64)).shape
        torch.Size([1, 10])
    """

    def __init__(
        self,
        depths: Sequence[int] = VARIANTS["maformer_small"]["depths"],
        dims: Sequence[int] = VARIANTS["maformer_small"]["dims"],
        img_size: int | tuple[int, int] = 224,
        num_classes: int = 1000,
        in_chans: int = 3,
        head_dim: int = 32,
        window_size: int = 7,
        ratio: float = 0.5,
        mlp_ratio: float = 4.0,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sides: tuple[int, int] = to_2tuple(img_size)  # type: ignore[assignment]
        if len(depths) != 4 or len(dims) != 4:
            raise ValueError(f"MAFormer has four stages, got {len(depths)} depths and {len(dims)} dims")
        if min(sides) < 32 or any(side % 32 for side in sides):
            raise ValueError(f"img_size must be a multiple of 32 in both directions, got {sides[0]}x{sides[1]}")
        super().__init__(num_classes, in_chans, sides)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        half = dims[0] // 2
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, half, 3, 2, 1, bias=False, **dd), nn.BatchNorm2d(half, **dd), nn.GELU(),
            nn.Conv2d(half, dims[0], 3, 2, 1, bias=False, **dd), LayerNorm2d(dims[0], **dd),
        )  # fmt: skip
        rates = torch.linspace(0, drop_path_rate, sum(depths)).tolist()
        stages = []
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            heads = head_count(dim, None, head_dim=head_dim)
            size = sides[0] // STRIDES[i], sides[1] // STRIDES[i]
            downsample: nn.Module = nn.Identity()
            if i > 0:
                downsample = nn.Sequential(nn.Conv2d(dims[i - 1], dim, 3, 2, 1, **dd), LayerNorm2d(dim, **dd))
            blocks: list[nn.Module] = []
            for rate in rates[sum(depths[:i]) :][:depth]:
                if i < MAF_STAGES:
                    blocks.append(MAFBlock(dim, size, heads, window_size, ratio, mlp_ratio, proj_drop_rate, rate, **dd))
                    continue
                attention = AttentionMixer(
                    dim, dim // heads, heads, qkv_bias=True, proj_bias=True, proj_drop=proj_drop_rate, **dd
                )
                blocks.append(
                    MetaFormerBlock(
                        dim, attention, lambda dim: nn.LayerNorm(dim, **dd), mlp_ratio=mlp_ratio, drop=proj_drop_rate,
                        drop_path=rate, **dd,
                    )
                )  # fmt: skip
            stages.append(ChannelsLastStage(downsample, blocks, None))
        self.stages = nn.Sequential(*stages)
        self.describe_stages(dims, STRIDES)
        self.norm = LayerNorm2d(dims[-1], **dd)
        self.head = ClassifierHead(dims[-1], num_classes, global_pool, drop_rate, **dd)
        if num_classes:
            trunc_normal_(self.head.fc.weight, std=0.02)
            nn.init.zeros_(self.head.fc.bias)  # type: ignore[arg-type]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The overview's positions and the windows' biases."""
        return {name for name, _ in self.named_parameters() if name.endswith((".pos", "relative_position_bias_table"))}

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Take images of another size from now on: the overviews are resampled.

        Args:
            img_size: Side, or (H, W), multiples of 32.

        Raises:
            ValueError: No multiple of 32.
        """
        sides: tuple[int, int] = to_2tuple(img_size)  # type: ignore[assignment]
        if min(sides) < 32 or any(side % 32 for side in sides):
            raise ValueError(f"img_size must be a multiple of 32 in both directions, got {sides[0]}x{sides[1]}")
        for stride, stage in zip(STRIDES, self.stages, strict=False):
            for block in stage.modules():
                if isinstance(block, MAFBlock):
                    block.set_input_size((sides[0] // stride, sides[1] // stride))
        self.img_size = sides


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A checkpoint of this library, unwrapped and checked; the authors have published none.

    Raises:
        ValueError: The checkpoint is another variant's, or was made for another image size.
    """
    out = without_head(unwrap(state_dict), model)
    check_shapes(out, model, VARIANTS)
    return out


default_cfgs = generate_default_cfgs(
    {
        name: classification_config(first_conv="stem.0", fixed_input_size=True, paper_ids="arXiv:2209.01620")
        for name in VARIANTS
    }
)


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> MAFormer:
    return build_backbone(MAFormer, name, pretrained, checkpoint_filter_fn, **{**VARIANTS[name], **kwargs})


register_table(__name__, VARIANTS, _create)
