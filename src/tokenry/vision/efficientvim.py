"""EfficientViM: a fast backbone of state space layers that mix channels in their hidden states.

Lee et al., "EfficientViM: Efficient Vision Mamba with Hidden State Mixer based State Space Duality", CVPR 2025,
arXiv:2411.15241.

    blend(x, f) = (1 - a) x + a f(x)          a = sigmoid(alpha), per channel, about 1/2 at the start: not a small layer scale
    x = blend(x, BN dwconv3x3)                                             x: (B, C, H, W)
    x = blend(x, HSMSSD LN),  hidden states h: (B, C, N)                   ``tokenry.mixers.HSMSSD``
    x = blend(x, BN dwconv3x3)
    x = blend(x, BN W2 ReLU BN W1)                                         hidden width 4C
    net     four conv 3x3 s2 with BN | three stages, inverted residuals with squeeze-excite and stride 2 between them
    logits  sum_i w_i head_i( mean_N LN(h_i) ) + w_4 head_4( mean_HW LN(x) ),  w = softmax(weights)

h_i are the hidden states of the last block of stage i: the head fuses all stages. With ``distillation`` there is a second
set of weights and heads on the same features, which learns from a teacher. timm has models ``efficientvim_*`` of its own,
which compute the same; the names here leave those alone, and ``checkpoint_filter_fn`` takes their weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.layers import LayerNorm2d, SqueezeExcite
from timm.models import generate_default_cfgs
from timm.models._manipulate import checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.layers.conv_norm import ConvNorm, norm_affine
from tokenry.mixers.hsm_ssd import HSMSSD
from tokenry.vision.backbone import Backbone, Stage, build_backbone, classification_config
from tokenry.vision.efficientvim_head import EPS, Features, FusionHead
from tokenry.vision.registration import register_table
from tokenry.vision.state_dicts import check_shapes, unwrap, without_head

__all__ = ["EfficientViM", "Features", "checkpoint_filter_fn"]

VARIANTS: dict[str, dict[str, Any]] = {
    "tokenry_efficientvim_m1": {"dims": (128, 192, 320), "depths": (2, 2, 2), "state_dims": (49, 25, 9)},
    "tokenry_efficientvim_m2": {"dims": (128, 256, 512), "depths": (2, 2, 2), "state_dims": (49, 25, 9)},
    "tokenry_efficientvim_m3": {"dims": (224, 320, 512), "depths": (2, 2, 2), "state_dims": (49, 25, 9)},
    "tokenry_efficientvim_m4": {"dims": (224, 320, 512), "depths": (3, 4, 2), "state_dims": (64, 32, 16)},
}


class Stem(nn.Sequential):
    """3x3 convolutions of stride 2 with batch norm, ReLU between them: (B, in, H, W) -> (B, dim, H / stride, W / stride)."""

    def __init__(self, in_chans: int, dim: int, stride: int = 16, **dd: Any) -> None:
        steps = stride.bit_length() - 1
        dims = [in_chans, *(dim >> i for i in reversed(range(steps)))]
        super().__init__(*(ConvNorm(a, b, 3, 2, bias=False, **dd) for a, b in pairwise(dims)))

    def forward(self, input: Tensor) -> Tensor:
        x = input
        for i, layer in enumerate(self):
            x = layer(F.relu(x) if i else x)
        return x


def blend(x: Tensor, y: Tensor, gain: Tensor) -> Tensor:
    """``(1 - gain) x + gain y`` for maps (B, C, H, W) and one gain per channel (C,)."""
    gain = gain[:, None, None]
    return (1 - gain) * x + gain * y


class ResidualDepthwise(ConvNorm):
    """A 3x3 depthwise convolution with batch norm, and its input: in inference one convolution does all of it."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__(dim, dim, 3, groups=dim, bias=False, **dd)

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        """``x + norm(conv(x))``, or ``blend(x, norm(conv(x)), gain)``: (B, C, H, W) -> (B, C, H, W)."""
        conv, norm = self.conv, self.norm
        if type(norm) is not nn.BatchNorm2d or norm.training:
            y = super().forward(x)
            return x + y if gain is None else blend(x, y, gain)
        scale, shift = norm_affine(norm)
        keep: Tensor | float = 1.0
        if gain is not None:
            scale, shift, keep = gain * scale, gain * shift, 1 - gain
        weight = conv.weight * scale[:, None, None, None]
        weight[:, 0, 1, 1] += keep  # the input itself is a kernel of one in the centre
        return F.conv2d(x, weight, shift, padding=1, groups=len(shift))


class ConvMLP(nn.Module):
    """Two 1x1 convolutions with batch norm, ReLU between them."""

    def __init__(self, dim: int, hidden: int, **dd: Any) -> None:
        super().__init__()
        self.fc1 = ConvNorm(dim, hidden, bias=False, **dd)
        self.fc2 = ConvNorm(hidden, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.fc2(F.relu(self.fc1(x)))


class Block(nn.Module):
    """Depthwise convolution, token mixer, depthwise convolution and MLP, each blended with its input.

    Args:
        dim: Channels C.
        state_dim: Hidden states N of the mixer.
        mlp_ratio: Hidden width of the MLP over C.
        expand: Width of the mixer's gated states over C.
        token_mixer: Made as ``token_mixer(dim, state_dim, expand, device=..., dtype=...)``, with a method ``mix`` that gives
            the mixed map and hidden states.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        dim: int,
        state_dim: int,
        mlp_ratio: float = 4.0,
        expand: float = 1.0,
        token_mixer: Callable[..., Any] = HSMSSD,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.alpha = nn.Parameter(torch.full((4, dim), 1e-4, **dd))
        self.dwconv1 = ResidualDepthwise(dim, **dd)
        self.norm = LayerNorm2d(dim, eps=EPS, **dd)
        self.mixer = token_mixer(dim, state_dim, expand, **dd)
        self.dwconv2 = ResidualDepthwise(dim, **dd)
        self.ffn = ConvMLP(dim, int(mlp_ratio * dim), **dd)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> (B, C, H, W) and the mixer's hidden states (B, C, N)."""
        gain = self.alpha.sigmoid()  # (4, C)
        x = self.dwconv1(x, gain[0])
        y, h = self.mixer.mix(self.norm(x))
        x = self.dwconv2(blend(x, y, gain[1]), gain[2])
        return blend(x, self.ffn(x), gain[3]), h


class Downsample(nn.Module):
    """Depthwise residual, inverted residual of stride 2 with squeeze-excite, depthwise residual.

    Args:
        in_dim: Channels C.
        out_dim: Channels C'; four times as many inside.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(self, in_dim: int, out_dim: int, **dd: Any) -> None:
        super().__init__()
        hidden = 4 * out_dim
        self.dwconv1 = ResidualDepthwise(in_dim, **dd)
        self.conv_exp = ConvNorm(in_dim, hidden, bias=False, **dd)
        self.conv_dw = ConvNorm(hidden, hidden, 3, 2, groups=hidden, bias=False, **dd)
        self.se = SqueezeExcite(hidden, 0.25, **dd)
        self.conv_red = ConvNorm(hidden, out_dim, bias=False, **dd)
        self.dwconv2 = ResidualDepthwise(out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / 2), ceil(W / 2))."""
        x = F.relu(self.conv_exp(self.dwconv1(x)))
        x = self.se(F.relu(self.conv_dw(x)))
        return self.dwconv2(self.conv_red(x))


class EfficientViMStage(Stage):
    """A downsampling and blocks whose last one also hands out its hidden states."""

    def forward_hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> (B, C', H', W') and (B, C', N)."""
        x, saving = self.downsample(x), self.grad_checkpointing and torch.is_grad_enabled()
        h = x
        for block in self.blocks:
            x, h = checkpoint(block, x) if saving else block(x)
        return x, h

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return self.forward_hidden(x)[0]


class EfficientViM(Backbone):
    """EfficientViM image classifier and feature extractor.

    ``forward_features`` returns ``Features``, the last map with the hidden states of all stages, because the head needs both.

    Args:
        dims: Channels of the stages.
        depths: Blocks of the stages.
        state_dims: Hidden states N of the stages' mixers.
        num_classes: Classes; 0 leaves the classifiers out, and the mean of the last map is the result.
        in_chans: Channels of the images.
        global_pool: ``"avg"``, or ``""`` with ``num_classes=0``.
        mlp_ratio: Hidden width of the MLPs over the channels. Default 4.
        expand: Width of the mixers' gated states over the channels. Default 1.
        distillation: A second set of classifiers for learning from a teacher: in training the result is the pair of both
            logits, in evaluation their mean.
        stem_stride: 16 (default), or a smaller power of two for small images.
        token_mixer: Another mixer for comparison; see ``Block``.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: Arguments outside these ranges; an image batch of another shape; in training, a batch of one image whose
            last map is a single pixel.

    Example:
        >>> net = EfficientViM(dims=(16, 24, 32), depths=(1, 1, 1), state_dims=(9, 4, 2), num_classes=10).eval()
        >>> net(torch.zeros(1, 3, 64, 96)).shape
        torch.Size([1, 10])
        >>> [tuple(h.shape) for h in net.forward_features(torch.zeros(1, 3, 64, 96)).hidden]
        [(1, 16, 9), (1, 24, 4), (1, 32, 2)]
    """

    channels_last = True

    def __init__(
        self,
        dims: Sequence[int] = VARIANTS["tokenry_efficientvim_m1"]["dims"],
        depths: Sequence[int] = VARIANTS["tokenry_efficientvim_m1"]["depths"],
        state_dims: Sequence[int] = VARIANTS["tokenry_efficientvim_m1"]["state_dims"],
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        mlp_ratio: float = 4.0,
        expand: float = 1.0,
        distillation: bool = False,
        stem_stride: int = 16,
        token_mixer: Callable[..., Any] = HSMSSD,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_classes, in_chans)
        if not len(dims) == len(depths) == len(state_dims) >= 1 or min(depths) < 1:
            raise ValueError(
                "dims, depths and state_dims need one positive entry per stage, got "
                f"dims={tuple(dims)}, depths={tuple(depths)}, state_dims={tuple(state_dims)}"
            )
        if stem_stride < 2 or stem_stride & (stem_stride - 1) or dims[0] < stem_stride // 2:
            raise ValueError(
                f"stem_stride must be a power of two from 2 to twice the first width {dims[0]}, got {stem_stride}; it is 16 "
                "in the paper"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.min_size = stem_stride
        self.stem = Stem(in_chans, dims[0], stem_stride, **dd)
        stages = []
        for i, (dim, depth, state_dim) in enumerate(zip(dims, depths, state_dims, strict=True)):
            downsample = Downsample(dims[i - 1], dim, **dd) if i else nn.Identity()
            blocks = [Block(dim, state_dim, mlp_ratio, expand, token_mixer, **dd) for _ in range(depth)]
            stages.append(EfficientViMStage(downsample, blocks))
        self.stages = nn.Sequential(*stages)
        self.norm = LayerNorm2d(dims[-1], eps=EPS, **dd)
        self.head = FusionHead(dims, num_classes, global_pool, distillation, **dd)
        self.describe_stages(dims, [stem_stride * 2**i for i in range(len(dims))])

    def check_images(self, x: Tensor) -> None:
        """Refuse images of a wrong shape, and a single pixel per channel for batch norm to learn from."""
        super().check_images(x)
        stride = self.feature_info[len(self.stages) - 1]["reduction"]
        if self.training and x.shape[0] == 1 and max(x.shape[-2:]) <= stride:
            raise ValueError(
                f"in training, one image of {x.shape[-2]}x{x.shape[-1]} pixels leaves batch norm one value per channel in the "
                f"last stage; give more images, images of more than {stride} pixels, or call .eval()"
            )

    def forward_features(self, x: Tensor) -> Features:  # type: ignore[override]
        """(B, in_chans, H, W) -> the last map (B, C, H', W') after the norm, and the hidden states of all stages."""
        x, hidden = self.forward_stem(x), []
        stages: Any = self.stages
        for stage in stages:
            x, h = stage.forward_hidden(x)
            hidden.append(h)
        return Features(self.norm(x), tuple(hidden))

    def forward_head(self, x: Features | Tensor, pre_logits: bool = False) -> Any:
        """What ``forward_features`` gives -> (B, num_classes), or the pooled map (B, C) with ``pre_logits``."""
        return self.head(x, pre_logits=pre_logits)

    def distillation_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, in_chans, H, W) -> the logits for the labels and those for the teacher, each (B, num_classes).

        Raises:
            ValueError: The model has no second set of classifiers, or is in evaluation mode, where both are one result.
        """
        if not isinstance(self.head.fc_dist, nn.ModuleList):
            raise ValueError("the model has one set of classifiers; make it with distillation=True and num_classes > 0")
        if not self.training:
            raise ValueError(
                "in evaluation mode the two logits are averaged to one: call model(x), or model.train() for the pair"
            )
        return self(x)


# What the authors call it -> what it is called here, tried in this order.
RENAMED = {
    r"^patch_embed\.conv\.": "stem.",
    r"\.downsample\.conv\.0\.": ".downsample.conv_exp.",
    r"\.downsample\.conv\.1\.": ".downsample.conv_dw.",
    r"\.downsample\.conv\.2\.": ".downsample.se.",
    r"\.downsample\.conv\.3\.": ".downsample.conv_red.",
    r"\.se\.conv_reduce\.": ".se.fc1.",
    r"\.se\.conv_expand\.": ".se.fc2.",
    r"\.mixer\.BCdt_proj\.conv\.": ".mixer.in_proj.",
    r"\.mixer\.dw\.conv\.": ".mixer.dwconv.",
    r"\.mixer\.(hz|out)_proj\.conv\.": r".mixer.\1_proj.",
    r"^norm\.3\.": "norm.",
    r"^norm\.(\d)\.": r"head.norms.\1.",
    r"^(weights|weights_dist)$": r"head.\1",
    r"^heads\.": "head.fc.",
    r"^heads_dist\.": "head.fc_dist.",
}


def rename(name: str) -> str:
    """Our name of a tensor of the authors; names that are ours already stay.

    In the authors' code a downsampling belongs to the stage before it.

    Example:
        >>> rename("stages.0.downsample.conv.2.conv_reduce.weight")
        'stages.1.downsample.se.fc1.weight'
    """
    if re.search(r"\.downsample\.(conv\.|dwconv)", name):
        name = re.sub(r"^stages\.(\d+)", lambda found: f"stages.{int(found[1]) + 1}", name)
    for pattern, ours in RENAMED.items():
        name = re.sub(pattern, ours, name)
    return name


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Turn a checkpoint of the authors (or a plain state dict of ours) into a state dict of ``model``.

    A model without classes takes the checkpoint without its classifiers.

    Raises:
        ValueError: The checkpoint has classifiers for distillation and the model has none, or is another variant's.
    """
    found = unwrap(state_dict)
    theirs = "patch_embed.conv.0.conv.weight" in found
    state = {rename(name) if theirs else name: value for name, value in found.items()}
    own = model.state_dict()
    state = without_head({name: _reshaped(value, own.get(name)) for name, value in state.items()}, model)
    distilled = "head.weights_dist" in state
    if distilled and "head.weights_dist" not in own:
        extra = [name for name in found if re.search(r"(weights|heads|fc)_dist", name)]
        raise ValueError(
            f"the checkpoint has a second set of classifiers, for distillation, which the model has not: {', '.join(extra)}. "
            "Make the model with distillation=True, or leave these tensors out"
        )
    check_shapes(state, model, {name: {**values, "distillation": distilled} for name, values in VARIANTS.items()})
    return state


def _reshaped(value: Tensor, like: Tensor | None) -> Tensor:
    """The authors keep axes of length one where we do not, and the other way round."""
    same = like is not None and value.shape != like.shape and _sides(value) == _sides(like)
    return value.reshape(like.shape) if same else value


def _sides(x: Tensor) -> list[int]:
    return [side for side in x.shape if side != 1]


default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": classification_config(
            input_size=(3, 256, 256) if name == "tokenry_efficientvim_m4" else (3, 224, 224),
            pool_size=(4, 4),
            first_conv="stem.0.conv",
            classifier=tuple(f"head.{heads}.{i}" for heads in ("fc", "fc_dist") for i in range(4)),
            license="mit",
            paper_ids="arXiv:2411.15241",
            origin_url="https://github.com/mlvlab/EfficientViM",
        )
        for name in VARIANTS
    }
)


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> EfficientViM:
    return build_backbone(
        EfficientViM, name, pretrained, checkpoint_filter_fn, stages=3, **{**VARIANTS[name], **kwargs}
    )


register_table(__name__, VARIANTS, _create)
