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

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates, get_act_layer, make_divisible
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.kernels.adaptive_filter import Fourier
from tokenry.mixers.aff import AFFMixer

__all__ = ["AFFNet", "checkpoint_filter_fn"]

# Widths of layer_1 ... layer_5, number of blocks in each (MBConv in 1 and 2, AFF blocks in 3 to 5), expansion of the
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
        self.block = nn.Sequential(parts)
        self.act = act_layer() if act_layer is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C', H / stride, W / stride)
        conv, norm = self.block.conv, self.block.norm
        plain = type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d
        if plain and not norm.training and conv.weight.dtype in (torch.float32, torch.float64):
            x = _conv_with_statistics(x, conv, norm)
        else:
            x = self.block(x)
        if type(self.act) is nn.SiLU and not torch.is_grad_enabled():
            return F.silu(x, inplace=True)
        return self.act(x)


def _conv_with_statistics(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """Convolution and batch norm with fixed statistics as one convolution: a pass over the map less."""
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    weight, bias = conv.weight * scale[:, None, None, None], norm.bias - mean * scale
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


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


class AFFNet(nn.Module):
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
        super().__init__()
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
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.feature_info: list[dict[str, Any]] = []

        self.conv_1 = ConvNormAct(in_chans, STEM_WIDTH, 3, stride=2, act_layer=act, **dd)
        width, reduction, dilation = STEM_WIDTH, 2, 1
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths[2:]), stagewise=True)
        for index, (out_width, depth) in enumerate(zip(widths, depths, strict=True)):
            stride = 1 if index == 0 else 2
            before = dilation  # the strided convolution itself is dilated by what came before it
            if reduction * stride > output_stride:
                dilation, stride = dilation * stride, 1
            reduction *= stride
            layers: list[nn.Module] = [MBConv(width, out_width, stride, before, expand_ratio, act, **dd)]
            if index < 2:
                layers += [MBConv(out_width, out_width, 1, 1, expand_ratio, act, **dd) for _ in range(depth - 1)]
            else:
                filters = mixer if use_filter else None
                layers.append(AFFStage(out_width, filters, rates[index - 2], fuse[index - 2], norm, act, **dd))
            name = f"layer_{index + 1}"
            self.add_module(name, nn.Sequential(*layers))
            self.feature_info.append({"num_chs": out_width, "reduction": reduction, "module": name})
            width = out_width

        self.num_features = self.head_hidden_size = min(4 * width, MAX_HEAD_WIDTH)
        self.conv_1x1_exp: nn.Module = ConvNormAct(width, self.num_features, act_layer=act, **dd)
        self.classifier = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, **dd)
        self.apply(_init_weights)

    @property
    def stages(self) -> list[nn.Module]:
        """layer_1 ... layer_5, or as many as were kept."""
        return [self.get_submodule(info["module"]) for info in self.feature_info if hasattr(self, info["module"])]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise learning rates, as in timm."""
        pattern = r"^layer_(\d+)" if coarse else r"^layer_(\d+)\.(\d+)(?:\.global_rep\.(\d+))?"
        return {"stem": r"^conv_1\.", "blocks": [(pattern, None), (r"^conv_1x1_exp", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each layer's activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The linear layer."""
        return self.classifier.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put in a new linear layer for ``num_classes`` classes; 0 takes it out."""
        self.num_classes = num_classes
        self.classifier.reset(num_classes, global_pool)

    def _stem(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"the model takes images (B, {self.in_chans}, H, W), got {tuple(x.shape)}; for other channel counts "
                "make it with in_chans=..."
            )
        if x.device.type == "cpu":  # depthwise convolutions on the CPU are several times faster with channels last
            x = x.contiguous(memory_format=torch.channels_last)
        return self.conv_1(x)

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(stage, x) if self.grad_checkpointing and torch.is_grad_enabled() else stage(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_features, H / 32, W / 32)."""
        x = self._stem(x)
        for stage in self.stages:
            x = self._run(stage, x)
        return self.conv_1x1_exp(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Outputs of chosen layers, and of the whole trunk.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Which of the five layers: the last so many (int), a list, or all (None).
            norm: No layer has a closing norm of its own; accepted as in timm.
            stop_early: Do not run layers after the last one asked for.
            output_fmt: ``"NCHW"``.
            intermediates_only: Return the list alone.

        Returns:
            ``(final features, list of maps)``, or the list.

        Raises:
            ValueError: Another ``output_fmt``.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}; use .permute(0, 2, 3, 1) on the maps")
        stages = self.stages
        take, last = feature_take_indices(len(stages), indices)
        maps = []
        x = self._stem(x)
        for index, stage in enumerate(stages[: last + 1] if stop_early else stages):
            x = self._run(stage, x)
            if index in take:
                maps.append(x)
        return maps if intermediates_only else (self.conv_1x1_exp(x), maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the chosen layers do not need, as in timm."""
        take, last = feature_take_indices(len(self.stages), indices)
        for info in self.feature_info[last + 1 :]:
            if hasattr(self, info["module"]):
                delattr(self, info["module"])
        if prune_norm or last + 1 < len(self.feature_info):
            self.conv_1x1_exp = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, num_features, h, w) -> (B, num_classes), or the pooled features."""
        return self.classifier(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Turn a checkpoint of the authors' training code into a state dict of ours.

    The names are the same; a training checkpoint holds the weights under ``"model_state_dict"``, and one from several
    GPUs prefixes them with ``"module."``.

    Args:
        state_dict: Checkpoint.
        model: Model that is to take it.

    Raises:
        ValueError: The filters' widths differ, as with another ``hidden_factor`` or ``num_blocks``.
    """
    state_dict = state_dict.get("model_state_dict", state_dict)
    out = {name.removeprefix("module."): value for name, value in state_dict.items()}
    for name, mixer in model.named_modules():
        given = out.get(f"{name}.w1")
        if isinstance(mixer, AFFMixer) and given is not None and given.shape != mixer.w1.shape:
            raise ValueError(
                f"{name}.w1 is {tuple(given.shape)} in the checkpoint and {tuple(mixer.w1.shape)} in the model: make the "
                "model with the checkpoint's variant, num_blocks and hidden_factor (8 and 1 in the authors' code)"
            )
    return out


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 256, 256),
        "pool_size": (8, 8),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv_1.block.conv",
        "classifier": "classifier.fc",
        "license": "mit",
        "paper_ids": "arXiv:2307.14008",
        "origin_url": "https://github.com/microsoft/TokenMixers",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({f"{name}.untrained": _cfg() for name in VARIANTS})


def _entry(variant: str) -> Any:
    def create(pretrained: bool = False, **kwargs: Any) -> AFFNet:
        return build_model_with_cfg(
            AFFNet,
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": (0, 1, 2, 3, 4), "feature_cls": "getter"},
            **{**VARIANTS[variant], **kwargs},
        )

    create.__name__ = create.__qualname__ = variant
    create.__doc__ = f"{variant}, see ``AFFNet`` for the keywords."
    return create


for _variant in VARIANTS:
    globals()[_variant] = register_model(_entry(_variant))
