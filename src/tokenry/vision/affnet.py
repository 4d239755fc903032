"""AFFNet: a light backbone of inverted residuals and adaptive frequency filters.

Huang et al., "Adaptive Frequency Filters As Efficient Global Token Mixers", ICCV 2023, arXiv:2307.14008.

    block       x + AFF(norm2(MBConv(norm1(x))))               MBConv first (local), then the filter (global)
    AFF stage   fuse([x, proj(norm(block(... block(x))))])     1x1 convolutions; x: (B, C, H, W)
    net         conv 3x3 s2 | MBConv | MBConv s2 x3 | 3 x (MBConv s2, AFF stage) | conv 1x1 | mean | linear

The filter is ``tokenry.mixers.AFFMixer`` (an FFT, a mask computed per frequency, an inverse FFT). The authors did not
publish the settings of the released weights: ``norm_layer`` and ``act_layer`` therefore offer both of their choices, and
the defaults, ``"layer_norm_2d"`` and SiLU, are ours.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates, get_act_layer, make_divisible
from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.kernels.adaptive_filter import Fourier
from tokenry.layers.conv_norm import conv_then_norm
from tokenry.mixers.aff import AFFMixer
from tokenry.vision.backbone import Backbone, Stage, build_backbone, classification_config
from tokenry.vision.registration import register_table
from tokenry.vision.state_dicts import check_shapes, unwrap, without_head

__all__ = ["AFFNet", "checkpoint_filter_fn"]

# Widths of the five stages, number of blocks in each (MBConv in 1 and 2, AFF blocks in 3 to 5), expansion of the
# MBConvs outside the AFF blocks, and whether layers 3, 4, 5 fuse with their input. No results were published for
# the last two.
VARIANTS: dict[str, dict[str, Any]] = {
    "affnet_et": {"widths": (32, 48, 64, 104, 144), "depths": (1, 3, 2, 4, 3), "expand_ratio": 2.0},
    "affnet_t": {"widths": (32, 48, 96, 160, 192), "depths": (1, 3, 2, 4, 3)},
    "affnet": {"widths": (32, 64, 128, 256, 320), "depths": (1, 3, 2, 4, 3)},
    "affnet_base": {"widths": (64, 128, 256, 512, 640), "depths": (1, 3, 2, 4, 3), "fuse": (True, False, False)},
    "affnet_large": {"widths": (64, 128, 256, 512, 768), "depths": (2, 6, 4, 18, 6), "fuse": (True, False, False)},
}
STEM_WIDTH = 16
MAX_HEAD_WIDTH = 960


class ChannelNorm(nn.Module):
    """Norm over the channels of each pixel: ``(x - mean) / (std + eps)``, with eps beside the deviation, not inside.

    Args:
        dim: Channels.
        eps: Added to the standard deviation. Default 1e-5 (authors' code).
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        std, mean = torch.std_mean(x, dim=1, keepdim=True, correction=0)
        return (x - mean) / (std + self.eps) * self.weight[:, None, None] + self.bias[:, None, None]


NORMS = {"layer_norm_2d": partial(nn.GroupNorm, 1), "layer_norm": ChannelNorm}


class ConvNormAct(nn.Module):
    """Convolution without bias, batch norm, activation; the reference's names of the parts."""

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel_size: int = 1,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        act_layer: type[nn.Module] | None = None,
        **dd: Any,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel_size // 2)
        conv = nn.Conv2d(
            in_chans, out_chans, kernel_size, stride, padding, dilation=dilation, groups=groups, bias=False, **dd
        )
        parts: OrderedDict[str, nn.Module] = OrderedDict(conv=conv, norm=nn.BatchNorm2d(out_chans, **dd))
        self.block: Any = nn.Sequential(parts)
        self.act = act_layer() if act_layer is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C', H / stride, W / stride)
        x = conv_then_norm(x, self.block.conv, self.block.norm)
        if type(self.act) is nn.SiLU and not torch.is_grad_enabled():
            return F.silu(x, inplace=True)
        return self.act(x)


class MBConv(nn.Module):
    """Inverted residual: expand 1x1, depthwise 3x3, reduce 1x1; a skip where the shape stays."""

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        stride: int = 1,
        dilation: int = 1,
        expand_ratio: float = 2.0,
        act_layer: type[nn.Module] = nn.SiLU,
        **dd: Any,
    ) -> None:
        super().__init__()
        hidden = make_divisible(round(in_chans * expand_ratio), 8)
        depthwise = ConvNormAct(hidden, hidden, 3, stride, dilation, groups=hidden, act_layer=act_layer, **dd)
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            exp_1x1=ConvNormAct(in_chans, hidden, act_layer=act_layer, **dd),
            conv_3x3=depthwise,
            red_1x1=ConvNormAct(hidden, out_chans, **dd),
        )
        self.block = nn.Sequential(parts)
        self.has_skip = stride == 1 and in_chans == out_chans

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C', H / stride, W / stride)
        return x + self.block(x) if self.has_skip else self.block(x)


class Block(nn.Module):
    """``x + AFF(norm2(MBConv(norm1(x))))``; ``mixer=None`` leaves the filter out."""

    def __init__(
        self,
        dim: int,
        mixer: partial[AFFMixer] | None,
        norm_layer: Any = NORMS["layer_norm_2d"],
        act_layer: type[nn.Module] = nn.SiLU,
        drop_path: float = 0.0,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim, **dd)
        self.mlp = MBConv(dim, dim, expand_ratio=2.0, act_layer=act_layer, **dd)
        self.norm2 = norm_layer(dim, **dd)
        self.filter = mixer(dim, act_layer=act_layer, **dd) if mixer is not None else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        return x + self.drop_path(self.filter(self.norm2(self.mlp(self.norm1(x)))))


class AFFStage(nn.Module):
    """Blocks, a norm and a projection, then fused with the input by a 1x1 convolution over both."""

    def __init__(
        self,
        dim: int,
        mixer: partial[AFFMixer] | None,
        drop_path: Sequence[float] = (0.0, 0.0),
        fuse: bool = True,
        norm_layer: Any = NORMS["layer_norm_2d"],
        act_layer: type[nn.Module] = nn.SiLU,
        **dd: Any,
    ) -> None:
        super().__init__()
        blocks = [Block(dim, mixer, norm_layer, act_layer, rate, **dd) for rate in drop_path]
        self.global_rep = nn.Sequential(*blocks, norm_layer(dim, **dd))
        self.conv_proj = ConvNormAct(dim, dim, **dd)
        self.fusion = ConvNormAct(2 * dim, dim, act_layer=act_layer, **dd) if fuse else None

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        y = self.conv_proj(self.global_rep(x))
        return self.fusion(torch.cat([x, y], dim=1)) if self.fusion is not None else y


class AFFNet(Backbone):
    """AFFNet image classifier and feature extractor.

    Args:
        widths: Channels of layer_1 ... layer_5; the last three must be multiples of ``num_blocks``.
        depths: MBConvs in layer_1 and layer_2, AFF blocks in layer_3 to layer_5.
        expand_ratio: Expansion of the MBConvs outside the AFF blocks (inside it is 2). Default 4.
        fuse: Whether layers 3, 4, 5 fuse their output with their input.
        num_classes: Classes; 0 leaves the linear layer out.
        in_chans: Channels of the image.
        global_pool: Pooling before the classifier, as in timm.
        output_stride: 32 (default), 16 or 8: dilation replaces the stride in layer 5, or in 4 and 5, for
            dense prediction.
        norm_layer: ``"layer_norm_2d"`` (default: group norm with one group) or ``"layer_norm"`` (per pixel).
        act_layer: Activation by timm's name or class. Default ``"silu"``; the authors' code defaults to ``"relu"``.
        num_blocks: Groups of the filter's complex MLP. Default 8.
        sparsity_threshold: The filter's softshrink. Default 0.01.
        hidden_factor: Width of the filter's MLP. Default 1, the only one that fits the authors' checkpoints.
        use_filter: False leaves the filters out, for comparison.
        fourier: ``"fft"``, or ``"matmul"`` for a network without complex tensors (export).
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout on the filters' output.
        drop_path_rate: Stochastic depth of the last AFF block, growing linearly. Default 0 (authors).
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: Arguments outside these ranges; an image batch of another shape.

    Example:
        >>> net = AFFNet(widths=(8, 8, 16, 16, 16), depths=(1, 1, 1, 1, 1), num_classes=10).eval()
        >>> net(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 10])
        >>> [tuple(f.shape[1:]) for f in net.forward_intermediates(torch.zeros(1, 3, 64, 64))[1]][-2:]
        [(16, 4, 4), (16, 2, 2)]
    """

    min_size = 1
    channels_last = True

    def __init__(
        self,
        widths: Sequence[int] = VARIANTS["affnet"]["widths"],
        depths: Sequence[int] = VARIANTS["affnet"]["depths"],
        expand_ratio: float = 4.0,
        fuse: Sequence[bool] = (True, True, True),
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        output_stride: int = 32,
        norm_layer: str = "layer_norm_2d",
        act_layer: str | type[nn.Module] = "silu",
        num_blocks: int = 8,
        sparsity_threshold: float = 0.01,
        hidden_factor: int = 1,
        use_filter: bool = True,
        fourier: Fourier = "fft",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_classes, in_chans)
        if len(widths) != 5 or len(depths) != 5 or len(fuse) != 3:
            raise ValueError(
                f"AFFNet has 5 widths, 5 depths and 3 fuse flags, got {len(widths)}, {len(depths)} and {len(fuse)}"
            )
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride}")
        if norm_layer not in NORMS:
            raise ValueError(f"norm_layer must be one of {', '.join(NORMS)}, got {norm_layer!r}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        act = get_act_layer(act_layer)
        norm = NORMS[norm_layer]
        mixer = partial(
            AFFMixer,
            num_blocks=num_blocks,
            sparsity_threshold=sparsity_threshold,
            hidden_factor=hidden_factor,
            proj_drop=proj_drop_rate,
            fourier=fourier,
        )
        self.stem = ConvNormAct(in_chans, STEM_WIDTH, 3, stride=2, act_layer=act, **dd)
        width, reduction, dilation = STEM_WIDTH, 2, 1
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths[2:]), stagewise=True)
        stages, reductions = [], []
        for index, (out_width, depth) in enumerate(zip(widths, depths, strict=True)):
            stride = 1 if index == 0 else 2
            before = dilation  # the strided convolution itself is dilated by what came before it
            if reduction * stride > output_stride:
                dilation, stride = dilation * stride, 1
            reduction *= stride
            first = MBConv(width, out_width, stride, before, expand_ratio, act, **dd)
            if index < 2:
                blocks = [MBConv(out_width, out_width, 1, 1, expand_ratio, act, **dd) for _ in range(depth - 1)]
            else:
                filters = mixer if use_filter else None
                blocks = [AFFStage(out_width, filters, rates[index - 2], fuse[index - 2], norm, act, **dd)]
            stages.append(Stage(first, blocks))
            reductions.append(reduction)
            width = out_width
        self.stages = nn.Sequential(*stages)
        self.describe_stages(widths, reductions)

        self.num_features = self.head_hidden_size = min(4 * width, MAX_HEAD_WIDTH)
        self.conv_1x1_exp: nn.Module = ConvNormAct(width, self.num_features, act_layer=act, **dd)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, **dd)
        self.apply(_init_weights)

    def forward_close(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, num_features, h, w)."""
        return self.conv_1x1_exp(x)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the wanted maps do not need, the closing convolution included, as in timm."""
        stages = len(self.stages)
        wanted = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_norm or len(self.stages) < stages:
            self.conv_1x1_exp = nn.Identity()
        return wanted


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Turn a checkpoint of the authors' training code into a state dict of ours.

    ``conv_1`` is our ``stem``; ``layer_i.0`` our ``stages.(i-1).downsample`` and what follows it there the stage's blocks;
    ``classifier.fc`` our ``head.fc``.

    Args:
        state_dict: Checkpoint.
        model: Model that is to take it.

    Raises:
        ValueError: The filters' widths differ, as with another ``hidden_factor`` or ``num_blocks``; or it is another
            variant's.
    """
    out: dict[str, Any] = {}
    for name, value in unwrap(state_dict).items():
        if found := re.match(r"layer_(\d)\.(\d+)\.(.*)", name):
            stage, part = int(found[1]) - 1, int(found[2])
            name = f"stages.{stage}.{'downsample' if part == 0 else f'blocks.{part - 1}'}.{found[3]}"
        name = re.sub(r"^conv_1\.", "stem.", name)
        out[re.sub(r"^classifier\.", "head.", name)] = value
    for name, mixer in model.named_modules():
        given = out.get(f"{name}.w1")
        if isinstance(mixer, AFFMixer) and given is not None and given.shape != mixer.w1.shape:
            raise ValueError(
                f"{name}.w1 is {tuple(given.shape)} in the checkpoint and {tuple(mixer.w1.shape)} in the model: make the "
                "model with the checkpoint's variant, num_blocks and hidden_factor (8 and 1 in the authors' code)"
            )
    out = without_head(out, model)
    check_shapes(out, model, VARIANTS)
    return out


default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": classification_config(
            input_size=(3, 256, 256),
            pool_size=(8, 8),
            crop_pct=0.875,
            interpolation="bilinear",
            first_conv="stem.block.conv",
            license="mit",
            paper_ids="arXiv:2307.14008",
            origin_url="https://github.com/microsoft/TokenMixers",
        )
        for name in VARIANTS
    }
)


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> AFFNet:
    return build_backbone(AFFNet, name, pretrained, checkpoint_filter_fn, stages=5, **{**VARIANTS[name], **kwargs})


register_table(__name__, VARIANTS, _create)
