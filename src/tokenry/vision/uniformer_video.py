"""UniFormer for video: 3-D convolutions where maps are large, attention over space and time where they are small.

Li et al., "UniFormer: Unified Transformer for Efficient Spatiotemporal Representation Learning", ICLR 2022, arXiv:2201.04676.

The image network of ``tokenry.vision.uniformer`` with time as a third dimension, x: (B, C, T, H, W)

    x = x + dwconv3x3x3(x)                      position encoding
    x = x + MHRA(norm1(x))                      stages 1, 2: local, batch norm;  3, 4: global, layer norm
    x = x + MLP(norm2(x))                       C -> 4C -> C, GELU
    logits = head( mean over T, H, W of batchnorm(x) )

The stem halves the frames and takes patches of 4 x 4 pixels; the other three stages begin by joining 2 x 2 tokens of a frame,
with ``std=True`` of three frames. With ``split=True`` the global blocks attend over time and space in turn.

A clip model starts from an image model's weights: every kernel is repeated along time and divided by its length.

timm holds image models, whose configurations and tools know no frames, so these are not in its list: ``uniformer_video_s`` and
``uniformer_video_b`` make them, with timm's features all the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn

from tokenry.mixers.mhra_3d import DividedMHRA3d
from tokenry.vision.backbone import Backbone, Stage, build_backbone, check_shapes, classification_config
from tokenry.vision.uniformer import check_stages, init_weights, rename
from tokenry.vision.uniformer_video_blocks import ClipHead, GlobalBlock3d, LocalBlock3d, PatchEmbed3d

__all__ = [
    "GlobalBlock3d",
    "LocalBlock3d",
    "UniFormerVideo",
    "checkpoint_filter_fn",
    "inflate",
    "inflate_checkpoint",
    "uniformer_video_b",
    "uniformer_video_s",
]

VARIANTS: dict[str, dict[str, Any]] = {
    "uniformer_video_s": {"depths": (3, 4, 8, 3), "dims": (64, 128, 320, 512)},
    "uniformer_video_b": {"depths": (5, 8, 20, 7), "dims": (64, 128, 320, 512)},
}


class UniFormerVideo(Backbone):
    """UniFormer video classifier and feature extractor: clips (B, in_chans, T, H, W) to logits.

    Args:
        num_frames: Frames of the clips that the model is meant for, noted for those who sample them. No weight depends on it:
            a clip may have any number of frames from 1. Default 16 (paper: 8, 16 or 32).
        depths: Blocks per stage.
        dims: Channels per stage.
        blocks: One letter per stage, ``"L"`` local or ``"G"`` global. Default ``"LLGG"`` (paper).
        head_dim: Channels of an attention head; must divide the channels of the global stages. Default 64.
        mlp_ratio: Hidden width of the MLPs over the channels.
        split: Attention over time and space in turn in the global blocks, instead of over all tokens together.
        std: Let the three later downsamplings see three frames, at an unchanged number of frames.
        num_classes: Classes; 0 leaves the classifier out. Default 400 (Kinetics-400).
        in_chans: Channels of the frames.
        global_pool: ``"avg"``, or ``""`` for maps without classifier.
        drop_rate: Dropout before the classifier.
        pos_drop_rate: Dropout after the stem.
        proj_drop_rate: Dropout after the aggregators and in the MLPs.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth of the last block, growing linearly. Default 0; the authors train with 0.1
            (Kinetics) and up to 0.6 (Something-Something).
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: Arguments that do not fit each other; input that is no batch of clips, or whose sides are no multiples
            of 32 (patches at the border would be lost).

    Example:
        >>> net = UniFormerVideo(depths=(1, 1, 2, 1), dims=(16, 32, 64, 128), num_classes=10).eval()
        >>> net(torch.zeros(1, 3, 8, 64, 96)).shape
        torch.Size([1, 10])
        >>> maps = net.forward_intermediates(torch.zeros(1, 3, 8, 64, 96), intermediates_only=True)
        >>> [tuple(x.shape[1:]) for x in maps]
        [(16, 4, 16, 24), (32, 4, 8, 12), (64, 4, 4, 6), (128, 4, 2, 3)]
    """

    size_multiple = 32

    def __init__(
        self,
        num_frames: int = 16,
        depths: Sequence[int] = VARIANTS["uniformer_video_s"]["depths"],
        dims: Sequence[int] = VARIANTS["uniformer_video_s"]["dims"],
        blocks: str = "LLGG",
        head_dim: int = 64,
        mlp_ratio: float = 4.0,
        split: bool = False,
        std: bool = False,
        num_classes: int = 400,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_classes, in_chans)
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}; the paper's are 8, 16 and 32")
        if len(blocks) != 4 or set(blocks) - set("LG"):
            raise ValueError(f"blocks is one letter per stage, L (local) or G (global), as in 'LLGG'; got {blocks!r}")
        check_stages(depths, dims)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.num_frames, self.split = num_frames, split
        self.stem = PatchEmbed3d(in_chans, dims[0], 4, frames=3, frame_stride=2, **dd)
        self.pos_drop = nn.Dropout(pos_drop_rate)

        def block(stage: int, index: int) -> nn.Module:
            kind = partial(LocalBlock3d, dims[stage])
            if blocks[stage] == "G":
                kind = partial(GlobalBlock3d, dims[stage], head_dim, split, attn_drop=attn_drop_rate)
            return kind(mlp_ratio=mlp_ratio, proj_drop=proj_drop_rate, drop_path=rates[stage][index], **dd)

        embed = partial(PatchEmbed3d, patch_size=2, frames=3 if std else 1)
        self.stages = nn.Sequential(
            *(
                Stage(
                    nn.Identity() if i == 0 else embed(dims[i - 1], dim, **dd), [block(i, j) for j in range(depths[i])]
                )
                for i, dim in enumerate(dims)
            )
        )
        self.describe_stages(dims, (4, 8, 16, 32))
        self.norm = nn.BatchNorm3d(dims[-1], **dd)
        self.head = ClipHead(dims[-1], num_classes, global_pool, drop_rate, **dd)
        self.apply(init_weights)
        for module in self.modules():
            if isinstance(module, DividedMHRA3d):
                module.silence_time()

    def check_images(self, x: Tensor) -> None:
        """Refuse what is no batch of clips of a size that the network takes.

        Raises:
            ValueError: It says what was given, what is allowed, and what to do.
        """
        wanted = f"clips (B, {self.in_chans}, T, H, W)"
        if x.ndim != 5:
            raise ValueError(
                f"expected {wanted}, got {x.ndim} dimensions {tuple(x.shape)}; x.unsqueeze(0) makes a batch of one clip "
                "(C, T, H, W), x.unsqueeze(2) clips of one frame of images (B, C, H, W)"
            )
        if x.shape[1] != self.in_chans:
            hint = "make the model with in_chans=... for other channel counts"
            if x.shape[2] == self.in_chans:
                hint = "the channels seem to be behind the frames: give x.transpose(1, 2)"
            elif x.shape[4] == self.in_chans:
                hint = "the channels seem to be last: give x.permute(0, 4, 1, 2, 3)"
            raise ValueError(f"expected {wanted}, got {tuple(x.shape)}; {hint}")
        if x.shape[2] < 1:
            raise ValueError(f"a clip needs at least one frame, got {tuple(x.shape)}")
        super().check_images(x[:, :, 0])

    def forward_stem(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Check the clips, embed them, and drop positions in training.

        Args:
            x: (B, in_chans, T, H, W), or a list with that one tensor, as PySlowFast hands it on.
        """
        if not isinstance(x, Tensor):
            if len(x) != 1:
                raise ValueError(
                    f"expected one tensor of clips, or a list of one, got a list of {len(x)}: this model has one pathway"
                )
            x = x[0]
        self.check_images(x)
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last_3d)
        return self.pos_drop(self.stem(x))

    def from_image_checkpoint(self, state_dict: dict[str, Any], mode: str = "mean") -> UniFormerVideo:
        """Take over the weights of an image UniFormer of the same depths and widths, and return the model.

        Temporal attention (``split``) keeps its first weights, and so does the classifier where the classes differ in number.

        Args:
            state_dict: Checkpoint of the authors' image models, or state dict of ``tokenry.vision.UniFormer``.
            mode: How kernels get a time dimension; see ``inflate``.

        Raises:
            ValueError: The checkpoint is of another network; the message lists the tensors that do not fit.
        """
        self.load_state_dict(inflate_checkpoint(state_dict, self, mode))
        return self


def inflate(weight: Tensor, frames: int, mode: str = "mean") -> Tensor:
    """Give a kernel a time dimension: (O, I, H, W) -> (O, I, frames, H, W).

    Args:
        weight: Kernel of a 2-D convolution.
        frames: Length in time.
        mode: ``"mean"``: the kernel over ``frames`` at every time (authors' default), so that a clip of equal frames gives
            what the image gives, away from its ends; ``"center"``: the kernel in the middle and zeros around, which sees one frame.

    Raises:
        ValueError: Another mode, or no kernel of four dimensions.

    Example:
        >>> inflate(torch.ones(1, 1, 1, 1), 4).flatten(), inflate(torch.ones(1, 1, 1, 1), 3, "center").flatten()
        (tensor([0.2500, 0.2500, 0.2500, 0.2500]), tensor([0., 1., 0.]))
    """
    if mode not in ("mean", "center"):
        raise ValueError(f"mode must be 'mean' or 'center', got {mode!r}")
    if weight.ndim != 4 or frames < 1:
        raise ValueError(
            f"expected a kernel (O, I, H, W) and at least 1 frame, got shape {tuple(weight.shape)} and {frames}"
        )
    if mode == "mean":
        return weight.unsqueeze(2).repeat(1, 1, frames, 1, 1) / frames
    out = weight.new_zeros(*weight.shape[:2], frames, *weight.shape[2:])
    out[:, :, frames // 2] = weight
    return out


def _ours(state_dict: dict[str, Any], split: bool = False) -> dict[str, Tensor]:
    """Names of the authors' video or image code, or of our image models, to those of a clip model."""
    given = rename(state_dict.get("model_state", state_dict))
    split = split or any(".t_attn." in name for name in given)
    out = {}
    for name, value in given.items():
        block = "".join(re.findall(r"^stages\.\d\.blocks\.\d+\.", name))
        part = name.removeprefix(block)
        if f"{block}mixer.qkv.weight" in given:  # a block with attention
            part = re.sub(r"^mixer\.", "mixer.spatial." if split else "mixer.attention.", part)
            part = re.sub(r"^t_attn\.", "mixer.temporal.", part)
            part = re.sub(r"^t_norm\.", "mixer.temporal_norm.", part)
            if split:
                part = re.sub(r"^norm1\.", "mixer.spatial_norm.", part)
        out[block + part] = value
    return out


def _describe(state_dict: Mapping[str, Tensor]) -> str:
    """What network a state dict under our names is of, as far as its shapes show."""
    blocks = {
        tuple(map(int, m.groups())) for m in (re.match(r"stages\.(\d)\.blocks\.(\d+)\.", k) for k in state_dict) if m
    }
    depths = tuple(sum(stage == i for stage, _ in blocks) for i in range(4))
    norms = [state_dict.get(f"stages.{i}.blocks.0.norm2.weight") for i in range(4)]
    dims = tuple(0 if norm is None else len(norm) for norm in norms)
    kernel = state_dict.get("stages.1.downsample.proj.weight")
    options = {
        "split": any(".temporal." in name for name in state_dict),
        "std": kernel is not None and kernel.ndim == 5 and kernel.shape[2] == 3,
    }
    name = next((n for n, a in VARIANTS.items() if (a["depths"], a["dims"]) == (depths, dims)), "")
    given = ", ".join([*(f"{key}=True" for key, on in options.items() if on), "num_classes=..."])
    return f"It has depths {depths} and dims {dims}" + (f", as {name}({given})" if name else "")


def _check(state_dict: dict[str, Tensor], model: nn.Module) -> None:
    try:
        check_shapes(state_dict, model)
    except ValueError as error:
        raise ValueError(f"{error} {_describe(state_dict)}.") from None


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Turn a checkpoint of the authors' video code into a state dict of ours.

    Args:
        state_dict: Checkpoint, wrapped under ``"model"``, ``"model_state"`` or ``"state_dict"`` or not.
        model: Model that is to take it.

    Raises:
        ValueError: It is of another network; the message says what it looks like.
    """
    out = _ours(state_dict)
    _check(out, model)
    return out


def inflate_checkpoint(state_dict: dict[str, Any], model: UniFormerVideo, mode: str = "mean") -> dict[str, Tensor]:
    """Turn a checkpoint of an image UniFormer into a whole state dict of a clip model.

    Weights that have a time dimension stay as they are, so a clip model of other classes is a start as well.

    Args:
        state_dict: Checkpoint of the authors' image models, or state dict of ``tokenry.vision.UniFormer``.
        model: Model that is to take it. What images do not have (temporal attention; the classifier where the number of
            classes differs) is copied from it.
        mode: See ``inflate``.

    Raises:
        ValueError: The checkpoint is of another network; the message lists the tensors that do not fit.
    """
    own, out = model.state_dict(), {}
    for name, value in _ours(state_dict, model.split).items():
        ours = own.get(name)
        if ours is not None and ours.ndim == 5 and value.ndim == 4:
            value = inflate(value, ours.shape[2], mode)
        if not name.startswith("head.") or (ours is not None and ours.shape == value.shape):
            out[name] = value
    for name, value in own.items():
        if ".temporal" in name or name.startswith("head."):
            out.setdefault(name, value)
    _check(out, model)
    return out


def _create(name: str, features_only: bool, **kwargs: Any) -> Any:
    config = classification_config(
        architecture=name,
        num_classes=400,
        first_conv="stem.proj",
        mean=(0.45, 0.45, 0.45),
        std=(0.225, 0.225, 0.225),
        license="apache-2.0",
        paper_ids="arXiv:2201.04676",
        origin_url="https://github.com/Sense-X/UniFormer",
    )
    return build_backbone(
        UniFormerVideo,
        name,
        False,
        checkpoint_filter_fn,
        pretrained_cfg=config,
        features_only=features_only,
        **{**VARIANTS[name], **kwargs},
    )


def uniformer_video_s(
    num_frames: int = 16,
    num_classes: int = 400,
    split: bool = False,
    std: bool = False,
    features_only: bool = False,
    **kwargs: Any,
) -> Any:
    """The small model: 21.4 million parameters, 41.7 G multiply-accumulates for 16 frames of 224 x 224.

    Args:
        num_frames: As in ``UniFormerVideo``.
        num_classes: As in ``UniFormerVideo``.
        split: As in ``UniFormerVideo``.
        std: As in ``UniFormerVideo``.
        features_only: Return the maps (B, C, T', H', W') of the stages, chosen by ``out_indices``, as timm does.
        **kwargs: Further arguments of ``UniFormerVideo``.
    """
    return _create(
        "uniformer_video_s",
        features_only,
        num_frames=num_frames,
        num_classes=num_classes,
        split=split,
        std=std,
        **kwargs,
    )


def uniformer_video_b(
    num_frames: int = 16,
    num_classes: int = 400,
    split: bool = False,
    std: bool = False,
    features_only: bool = False,
    **kwargs: Any,
) -> Any:
    """The base model: 49.8 million parameters, 96.6 G multiply-accumulates for 16 frames of 224 x 224.

    Args:
        num_frames: As in ``UniFormerVideo``.
        num_classes: As in ``UniFormerVideo``.
        split: As in ``UniFormerVideo``.
        std: As in ``UniFormerVideo``.
        features_only: As in ``uniformer_video_s``.
        **kwargs: Further arguments of ``UniFormerVideo``.
    """
    return _create(
        "uniformer_video_b",
        features_only,
        num_frames=num_frames,
        num_classes=num_classes,
        split=split,
        std=std,
        **kwargs,
    )
