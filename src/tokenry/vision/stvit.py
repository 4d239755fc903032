"""STViT: a backbone whose early stages attend among super tokens instead of pixels.

Huang et al., "Vision Transformer with Super Token Sampling", CVPR 2023, arXiv:2211.11167. (STViT-R, "semantic tokens", is
another method.)

    x = x + dwconv(x)                                     3x3, the position     x: (B, C, H, W)
    x = x + drop_path( g1 * STA( LN(x) ) )                the mixer: ``tokenry.mixers.SuperTokenAttention``
    x = x + drop_path( g2 * FFN( BN(x) ) )                conv 1x1 to 4C, GELU, h + dwconv(h), conv 1x1
    net   four conv 3x3 (s2, s1, s2, s1), each with GELU and BN | four stages, conv 3x3 s2 and BN between them
          | conv 1x1 to 1024, BN, SiLU | mean | linear

Cells of 8, 4, 1 and 1 pixels a side: at 224 pixels the first two stages have 49 super tokens, the last two attend among all
their tokens. g1 and g2 are layer scales where a stage has them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, DropPath, LayerNorm2d, LayerScale2d, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from tokenry.layers.conv_norm import ConvNorm
from tokenry.layers.conv_pos_enc import ConvPosEnc
from tokenry.layers.pointwise import Pointwise
from tokenry.mixers.super_token import SuperTokenAttention
from tokenry.vision.backbone import Backbone, Stage, build_backbone, classification_config
from tokenry.vision.registration import register_table
from tokenry.vision.state_dicts import check_shapes, unwrap, without_head

__all__ = ["STViT", "checkpoint_filter_fn"]

# The authors train with stochastic depth 0.1 (their script: 0.3), 0.4 and 0.6.
VARIANTS: dict[str, dict[str, Any]] = {
    "stvit_small": {"depths": (3, 5, 9, 3), "dims": (64, 128, 320, 512), "num_heads": (1, 2, 5, 8)},
    "stvit_base": {
        "depths": (4, 6, 14, 6),
        "dims": (96, 192, 384, 512),
        "num_heads": (2, 3, 6, 8),
        "layer_scale": (None, None, 1e-6, 1e-6),
    },
    "stvit_large": {
        "depths": (4, 7, 19, 8),
        "dims": (96, 192, 448, 640),
        "num_heads": (2, 3, 7, 10),
        "layer_scale": (None, None, 1e-6, 1e-6),
    },
}


class ConvFFN(nn.Module):
    """``fc2(dw(gelu(fc1(x))))`` with a depthwise 3x3 and its skip between: (B, C, H, W) -> (B, C, H, W).

    Args:
        dim: Channels C.
        hidden: Channels between.
        drop: Dropout after the GELU and at the end.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        drop: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = Pointwise(dim, hidden, **dd)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.dw = ConvPosEnc(hidden, **dd)
        self.fc2 = Pointwise(hidden, dim, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.drop2(self.fc2(self.dw(self.drop1(self.act(self.fc1(x))))))


class Block(nn.Module):
    """Position, super token attention and FFN, each added to its input.

    Args:
        dim: Channels C.
        num_heads: Heads of the attention.
        stoken_size: Side of a cell, or (h, w); 1 is plain self-attention.
        n_iter: Rounds of association.
        mlp_ratio: Hidden width of the FFN over C.
        qkv_bias: Whether queries, keys and values have a bias.
        layer_scale: First value of the layer scales. None: none.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout of the super tokens and in the FFN.
        drop_path: Stochastic depth of the mixer and the FFN.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        stoken_size: int | tuple[int, int],
        n_iter: int = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        def scale() -> nn.Module:
            return nn.Identity() if layer_scale is None else LayerScale2d(dim, layer_scale, **dd)

        self.pos_embed = ConvPosEnc(dim, **dd)
        self.norm1 = LayerNorm2d(dim, eps=1e-6, **dd)
        self.token_mixer: nn.Module = SuperTokenAttention(
            dim, num_heads, stoken_size, n_iter, qkv_bias, attn_drop, proj_drop=proj_drop, **dd
        )
        self.ls1 = scale()
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.mlp = ConvFFN(dim, int(mlp_ratio * dim), proj_drop, **dd)
        self.ls2 = scale()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.pos_embed(x)
        x = x + self.drop_path(self.ls1(self.token_mixer(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class STViT(Backbone):
    """STViT image classifier and feature extractor.

    Args:
        depths: Blocks per stage.
        dims: Channels per stage.
        num_heads: Heads per stage; each must divide the stage's channels.
        stoken_size: Side of a cell, or (h, w), per stage; 1 is plain self-attention. Default 8, 4, 1, 1.
        n_iter: Rounds of association. Default 1.
        mlp_ratio: Hidden width of the FFNs over the channels. Default 4.
        qkv_bias: Whether queries, keys and values have a bias. Default True.
        layer_scale: First value of the layer scales per stage; None: the stage has none.
        head_width: Channels before the classifier. Default 1024.
        num_classes: Classes; 0 leaves the classifier out.
        in_chans: Channels of the images.
        global_pool: Pooling before the classifier, as in timm.
        drop_rate: Dropout before the classifier.
        attn_drop_rate: Dropout of the attention weights.
        proj_drop_rate: Dropout of the super tokens and in the FFNs.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0. Default 0.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: Arguments outside these ranges; images of another shape.

    Warns:
        UserWarning: Images so small that a map is one cell (with the default cells: at most 32 pixels a side).

    Example:
        >>> net = STViT((1, 1, 1, 1), (8, 16, 16, 16), (1, 2, 2, 2), num_classes=10).eval()
        >>> net(torch.zeros(1, 3, 64, 96)).shape
        torch.Size([1, 10])
        >>> [tuple(f.shape[1:]) for f in net.forward_intermediates(torch.zeros(1, 3, 64, 96))[1]][-2:]
        [(16, 4, 6), (16, 2, 3)]
    """

    channels_last = True

    def __init__(
        self,
        depths: Sequence[int] = VARIANTS["stvit_small"]["depths"],
        dims: Sequence[int] = VARIANTS["stvit_small"]["dims"],
        num_heads: Sequence[int] = VARIANTS["stvit_small"]["num_heads"],
        stoken_size: Sequence[int | tuple[int, int]] = (8, 4, 1, 1),
        n_iter: int = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scale: Sequence[float | None] = (None, None, None, None),
        head_width: int = 1024,
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
        per_stage = {
            "depths": depths,
            "dims": dims,
            "num_heads": num_heads,
            "stoken_size": stoken_size,
            "layer_scale": layer_scale,
        }
        if not depths or {len(values) for values in per_stage.values()} != {len(depths)}:
            given = ", ".join(f"{name}={tuple(values)}" for name, values in per_stage.items())
            raise ValueError(
                f"depths, dims, num_heads, stoken_size and layer_scale take one entry per stage, got {given}"
            )
        if min(depths) < 1 or dims[0] < 2 or min(dims) < 1 or head_width < 1 or mlp_ratio <= 0:
            raise ValueError(
                "depths, dims, head_width and mlp_ratio must be positive and the first stage have 2 channels or more (the "
                f"stem halves them), got {tuple(depths)}, {tuple(dims)}, {head_width} and {mlp_ratio}"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        stem: list[nn.Module] = []
        width = in_chans
        for out_width, stride in ((dims[0] // 2, 2), (dims[0] // 2, 1), (dims[0], 2), (dims[0], 1)):
            stem += [nn.Conv2d(width, out_width, 3, stride, 1, **dd), nn.GELU(), nn.BatchNorm2d(out_width, **dd)]
            width = out_width
        self.stem = nn.Sequential(*stem)
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            downsample = nn.Identity() if i == 0 else ConvNorm(dims[i - 1], dim, 3, stride=2, **dd)
            settings = (num_heads[i], stoken_size[i], n_iter, mlp_ratio, qkv_bias, layer_scale[i])
            blocks = [Block(dim, *settings, attn_drop_rate, proj_drop_rate, rate, **dd) for rate in rates[i]]
            stages.append(Stage(downsample, blocks))
        self.stages = nn.Sequential(*stages)
        self.describe_stages(dims, [4 * 2**i for i in range(len(dims))])
        self.final_conv: nn.Module = nn.Sequential(
            Pointwise(dims[-1], head_width, **dd), nn.BatchNorm2d(head_width, **dd), nn.SiLU()
        )
        self.num_features = self.head_hidden_size = head_width
        self.head = ClassifierHead(head_width, num_classes, global_pool, drop_rate, **dd)
        if isinstance(self.head.fc, nn.Linear):
            trunc_normal_(self.head.fc.weight, std=0.02)
            nn.init.zeros_(self.head.fc.bias)

    def forward_close(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, num_features, h, w)."""
        return self.final_conv(x)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the wanted maps do not need, the closing convolution included, as in timm."""
        stages = len(self.stages)
        wanted = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_norm or len(self.stages) < stages:
            self.final_conv = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[len(self.stages) - 1]["num_chs"]
        return wanted


# Parts of the authors' names, and ours. Their stages end with the downsampling, ours begin with it.
RENAMES = {
    r"^patch_embed\.proj\.": "stem.",
    r"^proj\.": "final_conv.0.",
    r"^norm\.": "final_conv.1.",
    r"^head\.(?=weight|bias)": "head.fc.",
    r"^layers\.(\d+)\.downsample\.proj\.0\.": lambda m: f"stages.{int(m[1]) + 1}.downsample.conv.",
    r"^layers\.(\d+)\.downsample\.proj\.1\.": lambda m: f"stages.{int(m[1]) + 1}.downsample.norm.",
    r"^layers\.": "stages.",
    r"\.pos_embed\.conv\.": ".pos_embed.proj.",
    r"\.norm1\.norm\.": ".norm1.",
    r"\.attn\.stoken_refine\.": ".token_mixer.",
    r"\.mlp2\.conv\.conv\.": ".mlp.dw.proj.",
    r"\.mlp2\.": ".mlp.",
    r"\.gamma_([12])$": r".ls\1.gamma",
}
ONE_HOT = (".attn.unfold.weights", ".attn.fold.weights")  # constants of the authors' neighbourhoods


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Turn a checkpoint of the authors (or a plain state dict of ours) into a state dict of ``model``.

    A file that holds averaged weights beside the last ones gives the averaged ones, as in timm.

    Raises:
        ValueError: It is another variant's.
    """
    out: dict[str, Tensor] = {}
    for name, value in unwrap(state_dict).items():
        if name.endswith(ONE_HOT):
            continue
        for theirs, ours in RENAMES.items():
            name = re.sub(theirs, ours, name)
        if ".token_mixer." in name and value.ndim == 4:  # 1x1 convolutions, linear maps here
            value = value.flatten(1)
        out[name] = value.flatten() if name.endswith(".gamma") else value
    out = without_head(out, model)
    check_shapes(out, model, VARIANTS)
    return out


default_cfgs = generate_default_cfgs(
    {
        f"{name}{size}.untrained": classification_config(
            input_size=(3, side, side),
            pool_size=(side // 32, side // 32),
            crop_pct=crop,
            first_conv="stem.0",
            license="mit",
            paper_ids="arXiv:2211.11167",
            origin_url="https://github.com/hhb072/STViT",
        )
        for name in VARIANTS
        for size, side, crop in (("", 224, 0.875), ("_384", 384, 1.0))
    }
)


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> STViT:
    arguments = {**VARIANTS[name.removesuffix("_384")], **kwargs}
    return build_backbone(STViT, name, pretrained, checkpoint_filter_fn, stages=len(arguments["depths"]), **arguments)


register_table(__name__, [f"{name}{size}" for name in VARIANTS for size in ("", "_384")], _create)
