"""ViM2: a vision network of selective scans over tokens and over channels, with learned sums in place of residuals.

Behrouz et al., "MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection", 2024,
arXiv:2403.19888.

    T_l(v) = SelectiveTokenMixer( LN(v) )           four scans over the map; v: (B, C, H, W)
    C_l(v) = SelectiveChannelMixer( LN(v) )         after every second token mixer; nothing in between
    stage  = DenseAverage(T_1, C_1, ..., T_n, C_n)  learned sums of all earlier outputs of the stage
    net    conv 4x4 s4, norm | stage | conv 2x2 s2, norm | stage | ... | norm, mean, linear

There is no public code, and the paper leaves open how its channel mixer, as wide as there are tokens, handles 56 x 56 of them.
Here stages of more than ``channel_width`` tokens first map them linearly to so many (by default to 196: the stages at 14 x 14
and 7 x 7 are as in the equations). The first convolution, the downsampling and where the norms stand are this file's choices
too, so the models have other numbers of parameters than the paper's: 22.7, 39.3 and 63.4 million beside 20, 43 and 74.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import ClassifierHead, DropPath, LayerNorm2d
from timm.models import generate_default_cfgs
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from tokenry.layers.dense_average import DenseAverage
from tokenry.layers.mlp import ChannelMLP
from tokenry.mixers.selective_channel import SelectiveChannelMixer
from tokenry.mixers.selective_token import SelectiveTokenMixer
from tokenry.vision.backbone import Backbone, Stage, build_backbone, classification_config
from tokenry.vision.registration import register_table
from tokenry.vision.state_dicts import check_shapes, unwrap, without_head

__all__ = ["ViM2", "ViM2Block", "checkpoint_filter_fn"]

EPS = 1e-6
CHANNEL_MIXERS = ("selective", "mlp", "none")
VARIANTS: dict[str, dict[str, Any]] = {
    "vim2_tiny": {"depths": (2, 2, 6, 2), "dims": (96, 192, 384, 768)},
    "vim2_small": {"depths": (2, 2, 18, 2), "dims": (96, 192, 384, 768)},
    "vim2_base": {"depths": (2, 2, 18, 2), "dims": (128, 256, 512, 1024)},
}


class ViM2Block(nn.Module):
    """A token mixer and, in some blocks, a channel mixer, each behind a norm.

    Args:
        dim: Channels C.
        channel_mixer: On tokens (B, L, C). None: the block has none.
        d_state: States of the token mixer.
        drop_path: Rate of stochastic depth.
        averaged: Whether the outputs go into learned sums. Stochastic depth then leaves the channel mixer alone, as a stage
            hands on the output of its last one and nothing else.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        dim: int,
        channel_mixer: nn.Module | None = None,
        d_state: int = 16,
        drop_path: float = 0.0,
        averaged: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm2d(dim, eps=EPS, **dd)
        self.token_mixer = SelectiveTokenMixer(dim, d_state, **dd)
        self.norm2 = None if channel_mixer is None else LayerNorm2d(dim, eps=EPS, **dd)
        self.channel_mixer = channel_mixer
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 and not averaged else nn.Identity()

    def mix_tokens(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.drop_path1(self.token_mixer(self.norm1(x)))

    def mix_channels(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W): the input itself where there is no channel mixer."""
        if self.channel_mixer is None or self.norm2 is None:
            return x
        tokens = self.norm2(x).flatten(2).mT  # (B, L, C)
        return self.drop_path2(self.channel_mixer(tokens).mT.unflatten(2, x.shape[2:]))

    def forward(self, x: Tensor) -> Tensor:
        """Both with residual connections: (B, C, H, W) -> (B, C, H, W)."""
        x = x + self.mix_tokens(x)
        return x if self.channel_mixer is None else x + self.mix_channels(x)


class ViM2Stage(Stage):
    """A downsampling and blocks joined by learned sums, or by residual connections where ``average`` is None."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[ViM2Block], average: DenseAverage | None) -> None:
        super().__init__(downsample, blocks)
        self.average = average

    def run_blocks(self, x: Any) -> Any:
        """All blocks, recomputed in the backward pass where checkpointing is on."""
        if self.average is None:
            return super().run_blocks(x)
        blocks: Any = list(self.blocks)
        tokens, channels = [block.mix_tokens for block in blocks], [block.mix_channels for block in blocks]
        if self.grad_checkpointing and torch.is_grad_enabled():
            tokens = [partial(checkpoint, mix) for mix in tokens]
            channels = [partial(checkpoint, mix) for mix in channels]
        return self.average(x, tokens, channels)


class ViM2(Backbone):
    """ViM2 image classifier and feature extractor, for images of one size.

    Args:
        depths: Token mixers per stage; after every second one there is a channel mixer.
        dims: Channels per stage.
        num_classes: Classes; 0 leaves the classifier out.
        in_chans: Channels of the images.
        img_size: Side or (H, W) of the images. Default 224.
        patch_size: Kernel and stride of the first convolution. Default 4 (paper).
        d_state: States per channel of the scans. Default 16 (paper).
        channel_mixer: ``"selective"`` (paper); ``"mlp"`` or ``"none"``, for comparison.
        channel_width: Most tokens that a channel mixer takes as they are; more are first mapped to so many. Default 196.
            0: no such map, as the equations have it; at 224 pixels the channel mixer of the first stage then has more than
            80 million parameters.
        mlp_ratio: Hidden width over C where the channel mixer is an MLP. Default 4.
        average: Learned sums of all earlier outputs of a stage (paper). False: residual connections.
        global_pool: Pooling before the classifier, as in timm.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, growing linearly.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: Lists that do not fit each other; an image size that the strides do not divide; images of another size.

    Example:
        >>> net = ViM2((1, 2), (8, 16), num_classes=10, img_size=32).eval()
        >>> net(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    min_size = 1

    def __init__(
        self,
        depths: Sequence[int] = VARIANTS["vim2_tiny"]["depths"],
        dims: Sequence[int] = VARIANTS["vim2_tiny"]["dims"],
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        d_state: int = 16,
        channel_mixer: str = "selective",
        channel_width: int = 196,
        mlp_ratio: float = 4.0,
        average: bool = True,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_classes, in_chans, img_size)
        if len(depths) != len(dims) or not depths or min(depths) < 1:
            raise ValueError(
                f"depths and dims need one positive entry per stage, got {tuple(depths)} and {tuple(dims)}"
            )
        if channel_width < 0:
            raise ValueError(f"channel_width must be 0 (no map) or more, got {channel_width}")
        if channel_mixer not in CHANNEL_MIXERS:
            raise ValueError(f"channel_mixer must be one of {', '.join(CHANNEL_MIXERS)}, got {channel_mixer!r}")
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        stride = patch_size * 2 ** (len(dims) - 1)
        if height % stride or width % stride or min(height, width) < stride:
            raise ValueError(
                f"img_size must be a multiple of {stride} (patch_size times 2 for every further stage), got {height}x{width}"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        def channel_mixer_of(dim: int, tokens: int) -> nn.Module | None:
            if channel_mixer == "none":
                return None
            if channel_mixer == "mlp":
                return ChannelMLP(dim, int(mlp_ratio * dim), **dd)
            projected = channel_width if 0 < channel_width < tokens else None
            return SelectiveChannelMixer(dim, tokens, projected, d_state, **dd)

        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, dims[0], patch_size, patch_size, **dd), LayerNorm2d(dims[0], eps=EPS, **dd)
        )
        rates = torch.linspace(0, drop_path_rate, sum(depths)).tolist()
        stages, reductions = [], [patch_size * 2**i for i in range(len(dims))]
        for i, (depth, dim, reduction) in enumerate(zip(depths, dims, reductions, strict=True)):
            downsample: nn.Module = nn.Identity()
            if i > 0:
                downsample = nn.Sequential(nn.Conv2d(dims[i - 1], dim, 2, 2, **dd), LayerNorm2d(dim, eps=EPS, **dd))
            tokens = (height // reduction) * (width // reduction)
            blocks = [
                ViM2Block(dim, channel_mixer_of(dim, tokens) if j % 2 else None, d_state, rates.pop(0), average, **dd)
                for j in range(depth)
            ]
            sums = DenseAverage(depth, [b.channel_mixer is not None for b in blocks], **dd) if average else None
            stages.append(ViM2Stage(downsample, blocks, sums))
        self.stages = nn.Sequential(*stages)
        self.norm = LayerNorm2d(dims[-1], eps=EPS, **dd)
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.describe_stages(dims, reductions)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names that weight decay should leave alone: the scans' rates, and the weights of the sums."""
        return {name for name, _ in self.named_parameters() if name.endswith(".A_log") or ".average." in name}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A checkpoint of this library, unwrapped and checked.

    The authors have released no weights and no code, so there are no names of theirs to translate.

    Raises:
        ValueError: The checkpoint is another variant's.
    """
    out = without_head(unwrap(state_dict), model)
    check_shapes(out, model, VARIANTS)
    return out


default_cfgs = generate_default_cfgs(
    {
        name: classification_config(first_conv="stem.0", fixed_input_size=True, paper_ids="arXiv:2403.19888")
        for name in VARIANTS
    }
)


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> ViM2:
    return build_backbone(ViM2, name, pretrained, checkpoint_filter_fn, **{**VARIANTS[name], **kwargs})


register_table(__name__, VARIANTS, _create)
