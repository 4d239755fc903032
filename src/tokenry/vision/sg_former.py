"""SG-Former: a backbone whose large maps attend to few keys, finely where the network itself finds much to see.

Ren et al., "SG-Former: Self-guided Transformer with Evolving Token Reallocation", ICCV 2023, arXiv:2308.12216.

    x = x + drop_path( mixer( LN(x) ) )                                                 x: (B, H, W, C)
    x = x + drop_path( W2 GELU( u + dwconv3x3(u) ) )      u = W1 LN(x)
    net   three conv 3x3 (s2, s1, s2) with group norm, LN, + positions | four stages, each closed by a LN, between them
          conv 1x1, dwconv 3x3 s2, conv 1x1 with group norm | mean | linear

In the first three stages blocks come in pairs: ``tokenry.mixers.HybridScaleAttention`` makes a map of significance, the next
block's ``SelfGuidedAttention`` uses it. The map goes from block to block beside the tokens; nothing is kept between calls. The
last stage attends to all its tokens. Positions are a table for 56 x 56 tokens, first the sines and cosines of MAE, resized
for other images.

Sorting by significance makes a float32 outcome depend on rounding: neighbouring values of a map of 56 x 56 differ by less
than float32 tells apart, and tokens that change places change the keys. Compare models in float64.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerNorm2d,
    build_sincos2d_pos_embed,
    calculate_drop_path_rates,
    resample_abs_pos_embed_nhwc,
)
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from tokenry.layers.conv_pos_enc import ConvPosEnc
from tokenry.layers.fan_out_init import fan_out_init
from tokenry.mixers.self_guided import HybridScaleAttention, LocalTermAttention, SelfGuidedAttention
from tokenry.vision.backbone import Backbone, Stage, build_backbone, classification_config
from tokenry.vision.registration import register_table
from tokenry.vision.state_dicts import check_shapes, unwrap, without_head

__all__ = ["SGFormer", "checkpoint_filter_fn"]

# The authors train with stochastic depth 0.1, 0.2 and 0.4.
VARIANTS: dict[str, dict[str, Any]] = {
    "sgformer_s": {"depths": (2, 4, 16, 1), "dims": (64, 128, 256, 512), "num_heads": (2, 4, 8, 16)},
    "sgformer_m": {"depths": (2, 6, 28, 2), "dims": (64, 128, 256, 512), "num_heads": (2, 4, 8, 16)},
    "sgformer_b": {"depths": (4, 6, 24, 2), "dims": (96, 192, 384, 768), "num_heads": (4, 6, 12, 24)},
}
State = tuple[Tensor, Tensor | None]  # tokens (B, H, W, C), and their significance (B, H, W) where a block has found it


class ConvGroupNorm(nn.Module):
    """``norm(conv(x))``: (B, C, H, W) -> (B, C', H / stride, W / stride), a group norm of one group, no bias before it."""

    def __init__(self, in_chans: int, dim: int, kernel_size: int, stride: int, groups: int, dd: dict[str, Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, kernel_size, stride, kernel_size // 2, groups=groups, bias=False, **dd)
        self.norm = nn.GroupNorm(1, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        return self.norm(self.conv(x))


def _downsample(in_chans: int, dim: int, dd: dict[str, Any]) -> nn.Sequential:
    """(B, C, H, W) -> (B, C', H / 2, W / 2)."""
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=ConvGroupNorm(in_chans, dim, 1, 1, 1, dd),
        act1=nn.GELU(),
        conv2=ConvGroupNorm(dim, dim, 3, 2, dim, dd),
        act2=nn.GELU(),
        conv3=ConvGroupNorm(dim, dim, 1, 1, 1, dd),
    )
    return nn.Sequential(parts)


class Stem(nn.Module):
    """Three convolutions, a norm and positions: (B, C, H, W) -> (B, dim, H / 4, W / 4)."""

    def __init__(self, in_chans: int, dim: int, pos_size: int, dd: dict[str, Any]) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            ConvGroupNorm(in_chans, dim, 3, 2, 1, dd),
            nn.GELU(),
            ConvGroupNorm(dim, dim, 3, 1, 1, dd),
            nn.GELU(),
            ConvGroupNorm(dim, dim, 3, 2, 1, dd),
        )
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        table = build_sincos2d_pos_embed([pos_size, pos_size], dim, interleave_sin_cos=True)
        table = table.unflatten(0, (pos_size, pos_size)).transpose(0, 1)  # MAE has the column's waves before the row's
        self.pos_embed = nn.Parameter(table[None].contiguous().to(**dd))  # (1, side, side, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, dim, H / 4, W / 4)."""
        x = self.norm(self.convs(x).permute(0, 2, 3, 1))
        x = x + resample_abs_pos_embed_nhwc(self.pos_embed, list(x.shape[1:3]))
        return x.permute(0, 3, 1, 2)


class ConvMLP(nn.Module):
    """``fc2(gelu(u + dwconv(u)))`` with ``u = fc1(x)``: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, hidden: int, drop: float, dd: dict[str, Any]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.pos = ConvPosEnc(hidden, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        u = self.pos(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.drop(self.fc2(self.drop(self.act(u))))


class Block(nn.Module):
    """Mixer and MLP, each added to its input, with a mixer that neither makes nor needs a significance.

    Args:
        dim: Channels C.
        token_mixer: On (B, H, W, C).
        mlp_ratio: Hidden width of the MLP over C.
        proj_drop: Dropout in the MLP.
        drop_path: Stochastic depth of both.
        dd: Device and dtype.
    """

    def __init__(
        self, dim: int, token_mixer: nn.Module, mlp_ratio: float, proj_drop: float, drop_path: float, dd: dict[str, Any]
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.token_mixer = token_mixer
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = ConvMLP(dim, int(mlp_ratio * dim), proj_drop, dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def mix(self, x: Tensor, significance: Tensor | None) -> State:
        """Normed tokens and the significance so far -> the mixer's outcome and the significance from now on."""
        return self.token_mixer(x), significance

    def forward(self, state: State) -> State:
        """Tokens (B, H, W, C) and significance (B, H, W) or None, in and out."""
        x, significance = state
        y, significance = self.mix(self.norm1(x), significance)
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x))), significance


class HybridBlock(Block):
    """A block that finds the significance."""

    def mix(self, x: Tensor, significance: Tensor | None) -> State:
        """The significance so far is of no use any more."""
        return self.token_mixer(x)

    def token_maps(self, state: State) -> dict[str, Tensor]:
        """``significance`` (B, H, W)."""
        return {"significance": self.token_mixer(self.norm1(state[0]))[1]}


class GuidedBlock(Block):
    """A block that uses the significance that the block before it has found."""

    def mix(self, x: Tensor, significance: Tensor | None) -> State:
        """The significance has done its work."""
        return self.token_mixer(x, significance), None

    def token_maps(self, state: State) -> dict[str, Tensor]:
        """``ranks`` (B, H, W) int64: the part that a token falls in, 0 the least significant."""
        return {"ranks": self.token_mixer.ranks(state[1])}  # type: ignore[operator]


class SignificanceStage(Stage):
    """Blocks on (B, H, W, C) that hand on a significance, and a closing norm: (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], norm: nn.Module) -> None:
        super().__init__(downsample, blocks)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        x = self.downsample(x).permute(0, 2, 3, 1).contiguous()  # no copy where the memory is channels-last
        x, _ = self.run_blocks((x, None))
        return self.norm(x).permute(0, 3, 1, 2)


class SGFormer(Backbone):
    """SG-Former image classifier and feature extractor. Images of any size from 32 pixels on.

    Args:
        depths: Blocks per stage; even where blocks come in pairs.
        dims: Channels per stage; the first a multiple of 4 (its table of positions).
        num_heads: Heads per stage; even where blocks come in pairs, and they must divide the stage's channels.
        sr_ratios: Side of a cell of the smaller map per stage; 1 is attention to all tokens. Default (8, 4, 2, 1).
        group_sizes: Ranks per group of the self-guided attention, per stage. None (default): the paper's of the stage's ratio.
        window_size: Side of a window. Default 7.
        mlp_ratio: Hidden width of the MLPs over the channels. Default 4.
        pos_size: Side of the table of positions. Default 56, for images of 224 pixels.
        num_classes: Classes; 0 leaves the classifier out.
        in_chans: Channels of the images.
        global_pool: Pooling before the classifier, as in timm.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout of the mixers' outputs and in the MLPs.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0. Default 0.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: Lists that do not fit the stages, an odd depth or number of heads where blocks come in pairs; images of
            another shape.

    Example:
        >>> net = SGFormer((2, 2, 2, 1), (8, 16, 16, 16), (2, 2, 2, 2), num_classes=10).eval()
        >>> net(torch.zeros(1, 3, 64, 96)).shape
        torch.Size([1, 10])
    """

    channels_last = True

    def __init__(
        self,
        depths: Sequence[int] = VARIANTS["sgformer_s"]["depths"],
        dims: Sequence[int] = VARIANTS["sgformer_s"]["dims"],
        num_heads: Sequence[int] = VARIANTS["sgformer_s"]["num_heads"],
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        group_sizes: Sequence[Sequence[int] | None] | None = None,
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        pos_size: int = 56,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_classes, in_chans)
        groups = (None,) * len(depths) if group_sizes is None else tuple(group_sizes)
        if not depths or not len(depths) == len(dims) == len(num_heads) == len(sr_ratios) == len(groups):
            raise ValueError(
                "depths, dims, num_heads, sr_ratios and group_sizes take one entry per stage, got "
                f"{tuple(depths)}, {tuple(dims)}, {tuple(num_heads)}, {tuple(sr_ratios)} and {group_sizes}"
            )
        if min(depths) < 1 or min(dims) < 1 or dims[0] % 4 or pos_size < 1:
            raise ValueError(
                "depths, dims and pos_size must be positive and the first of dims a multiple of 4 (its table of positions), "
                f"got {tuple(depths)}, {tuple(dims)} and {pos_size}"
            )
        for i, (depth, ratio) in enumerate(zip(depths, sr_ratios, strict=True)):
            if ratio != 1 and depth % 2:
                raise ValueError(
                    f"blocks come in pairs, one finds the significance and one uses it: the depth of stage {i} must be even, "
                    f"got {depth}; use {depth + 1}, or sr_ratio 1 for attention to all tokens"
                )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        rest: dict[str, Any] = {"proj_drop": proj_drop_rate, **dd}
        self.stem = Stem(in_chans, dims[0], pos_size, dd)
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, (dim, heads, ratio) in enumerate(zip(dims, num_heads, sr_ratios, strict=True)):
            blocks = []
            for j, rate in enumerate(rates[i]):
                if ratio == 1:
                    kind, mixer = Block, LocalTermAttention(dim, heads, **rest)
                elif j % 2 == 0:
                    kind, mixer = HybridBlock, HybridScaleAttention(dim, heads, ratio, window_size, **rest)
                else:
                    kind, mixer = GuidedBlock, SelfGuidedAttention(dim, heads, ratio, groups[i], **rest)
                blocks.append(kind(dim, mixer, mlp_ratio, proj_drop_rate, rate, dd))
            downsample = nn.Identity() if i == 0 else _downsample(dims[i - 1], dim, dd)
            last = i == len(dims) - 1
            norm = nn.Identity() if last else nn.LayerNorm(dim, eps=1e-6, **dd)
            stages.append(SignificanceStage(downsample, blocks, norm))
        self.stages = nn.Sequential(*stages)
        self.describe_stages(dims, [4 * 2**i for i in range(len(dims))])
        self.norm = LayerNorm2d(dims[-1], eps=1e-6, **dd)
        self.head = ClassifierHead(dims[-1], num_classes, global_pool, drop_rate, **dd)
        fan_out_init(self)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Positions, as in timm's models."""
        return {"stem.pos_embed"}


# Parts of the authors' names, and ours. Their stages count from 1.
RENAMES: dict[str, Any] = {
    r"^pos_embed$": "stem.pos_embed",
    r"^patch_embed1\.conv\.": "stem.convs.",
    r"^patch_embed1\.": "stem.",
    r"^patch_embed(\d)\.": lambda m: f"stages.{int(m[1]) - 1}.downsample.",
    r"^block(\d)\.": lambda m: f"stages.{int(m[1]) - 1}.blocks.",
    r"^norm(\d)\.": lambda m: f"stages.{int(m[1]) - 1}.norm.",
    r"\.c\.weight$": ".conv.weight",
    r"\.bn\.": ".norm.",
    r"\.attn\.sr\.": ".token_mixer.reduce.",
    r"\.attn\.f(\d)\.": lambda m: f".token_mixer.f.{int(m[1]) - 1}.",
    r"\.attn\.": ".token_mixer.",
    r"\.mlp\.dwconv\.dwconv\.": ".mlp.pos.proj.",
    r"^head\.(?=weight|bias)": "head.fc.",
}


def _join(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The linear maps of one of their attentions as ours has them.

    Their hybrid-scale attention has q1 and kv1 for the smaller map, q2 and kv2 for the windows; their self-guided one q, and kv1
    and kv2 for one half of the heads each.
    """
    if set(parts) == {"q1", "kv1", "q2", "kv2"}:
        local = torch.cat([parts["q2"], parts["kv2"]])
        return {"q_global": parts["q1"], "kv_global": parts["kv1"], "qkv_local": local}
    if set(parts) == {"q", "kv1", "kv2"}:
        (k1, v1), (k2, v2) = parts["kv1"].chunk(2), parts["kv2"].chunk(2)
        return {"q": parts["q"], "kv": torch.cat([k1, k2, v1, v2])}
    return parts


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Turn a checkpoint of the authors (or a plain state dict of ours) into a state dict of ``model``.

    A file that holds averaged weights beside the last ones gives the averaged ones, as in timm. Positions are resized to the
    model's table.

    Raises:
        ValueError: It is another variant's.
    """
    own, last = model.state_dict(), f"stages.{len(cast('Backbone', model).stages) - 1}."
    out: dict[str, Tensor] = {}
    split: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, value in unwrap(state_dict).items():
        for theirs, ours in RENAMES.items():
            name = re.sub(theirs, ours, name)
        if name.startswith(f"{last}norm."):
            name = name.removeprefix(last)
        if name == "stem.pos_embed":
            side = math.isqrt(value.shape[1])
            if value.ndim == 3 and side**2 == value.shape[1]:
                value = value.unflatten(1, (side, side))
            if value.ndim == 4:
                value = resample_abs_pos_embed_nhwc(value, list(own[name].shape[1:3]))
        if linear := re.fullmatch(r"(.*\.token_mixer\.)(q|q[12]|kv[12])\.(weight|bias)", name):
            split.setdefault((linear[1], linear[3]), {})[linear[2]] = value
        else:
            out[name] = value
    for (prefix, kind), parts in split.items():
        out |= {f"{prefix}{name}.{kind}": value for name, value in _join(parts).items()}
    out = without_head(out, model)
    check_shapes(out, model, VARIANTS)
    return out


default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": classification_config(
            first_conv="stem.convs.0.conv",
            paper_ids="arXiv:2308.12216",
            origin_url="https://github.com/OliverRensu/SG-Former",
        )
        for name in VARIANTS
    }
)


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> SGFormer:
    arguments = {**VARIANTS[name], **kwargs}
    return build_backbone(
        SGFormer, name, pretrained, checkpoint_filter_fn, stages=len(arguments["depths"]), **arguments
    )


register_table(__name__, VARIANTS, _create)
