"""What timm asks of an image model, for networks made of a stem, stages and a head.

    logits = head( norm( stage_S( ... stage_1( stem(x) ) ) ) )          maps (B, C, H, W) between them

A network of this shape says what its stem, stages, norm and head are; everything that timm's users expect is here:
features of chosen stages, another classifier, gradient checkpointing, pruning, layer groups for learning rates, and one
clear message for images that do not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

__all__ = ["Backbone", "Stage", "build_backbone", "classification_config"]


class Stage(nn.Module):
    """A downsampling and blocks: (B, C, H, W) -> (B, C', H', W').

    Args:
        downsample: Before the blocks; an identity in a first stage whose stem has done it.
        blocks: Each keeps the shape (B, C', H', W').
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def run_blocks(self, x: Any) -> Any:
        """All blocks in turn, each recomputed in the backward pass where checkpointing is on."""
        if self.grad_checkpointing and torch.is_grad_enabled() and len(self.blocks):
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return self.run_blocks(self.downsample(x))


class Backbone(nn.Module):
    """A timm-style image model of a stem, stages and a head.

    A network's constructor calls this one's and then sets ``stem`` (images to a map), ``stages`` (an ``nn.Sequential`` of
    ``Stage``), ``head`` (timm's ``ClassifierHead``, ``NormMlpClassifierHead``, or a module with the same ``reset`` and
    ``forward(x, pre_logits)``), where it has one ``norm`` (a norm of the last map), and calls ``describe_stages``.

    Class attributes:
        size_multiple: Both sides of an image must be multiples of it. Default 1: any size.
        min_size: Smallest side. Default 32.
        channels_last: Whether maps run with channels last in memory on the CPU, which depthwise convolutions like.

    Args:
        num_classes: Classes; 0 leaves the classifier out.
        in_chans: Channels of the images.
        img_size: Side or (H, W), for a network that takes no other. None (default): no fixed size.
    """

    size_multiple: ClassVar[int] = 1
    min_size: int = 32
    channels_last: ClassVar[bool] = False

    stem: nn.Module
    stages: nn.Sequential
    head: nn.Module

    def __init__(
        self, num_classes: int = 1000, in_chans: int = 3, img_size: int | tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 (no classifier) or more, got {num_classes}")
        if in_chans < 1:
            raise ValueError(f"in_chans must be at least 1, got {in_chans}")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.norm: nn.Module = nn.Identity()
        self.feature_info: list[dict[str, Any]] = []
        self.grad_checkpointing = False

    def describe_stages(self, dims: Sequence[int], reductions: Sequence[int]) -> None:
        """Note channels and stride of every stage's map, and the width before the classifier."""
        self.feature_info = [
            {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            for i, (dim, reduction) in enumerate(zip(dims, reductions, strict=True))
        ]
        self.num_features = self.head_hidden_size = dims[-1]

    def check_images(self, x: Tensor) -> None:
        """Refuse what is no batch of images of a size that the network takes.

        Raises:
            ValueError: It says what was given, what is allowed, and what to do.
        """
        if x.ndim == 5:
            raise ValueError(
                f"expected images (B, {self.in_chans}, H, W), got a tensor of five dimensions {tuple(x.shape)}: for video "
                "take a video model, or fold the frames into the batch with .flatten(0, 1)"
            )
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"expected images (B, {self.in_chans}, H, W), got {tuple(x.shape)}; for other channel counts make the model "
                "with in_chans=..."
            )
        height, width = x.shape[-2:]
        if self.img_size is not None and (height, width) != self.img_size:
            raise ValueError(
                f"the model was made for images of {self.img_size[0]}x{self.img_size[1]} pixels, got {height}x{width}; "
                "resize them, or make it with img_size of your images"
            )
        multiple = self.size_multiple
        if height % multiple or width % multiple:
            near = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
            raise ValueError(
                f"both sides of the images must be multiples of {multiple}, got {height}x{width}; resize or pad them, for "
                f"example to {near[0]}x{near[1]}"
            )
        if min(height, width) < self.min_size:
            raise ValueError(
                f"images must have at least {self.min_size} pixels a side, got {height}x{width}; resize them"
            )

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning rates, as timm asks for them."""
        return {
            "stem": r"^stem",
            "blocks": [(r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages", (0,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable
        for stage in self.stages:
            if isinstance(stage, Stage):
                stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier; an identity where there is none."""
        return self.head.fc  # type: ignore[return-value]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier of ``num_classes`` (0: none), optionally with another pooling (``"avg"``, ``""`` ...)."""
        self.head.reset(num_classes, global_pool)  # type: ignore[operator]
        self.num_classes = num_classes

    def forward_stem(self, x: Tensor) -> Tensor:
        """Check the images and make the first map of them."""
        self.check_images(x)
        if self.channels_last and x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)
        return self.stem(x)

    def forward_close(self, x: Tensor) -> Tensor:
        """Last stage's map to what the head takes: the closing norm. A network with a closing convolution overrides it."""
        return self.norm(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, H', W'): the last stage's map, closed."""
        x = self.forward_stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.forward_close(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H', W') -> (B, num_classes), or the pooled features with ``pre_logits``."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def stage_map(self, x: Any) -> Tensor:
        """The map (B, C, H, W) in what a stage returns. A network whose stages hand on more than the map overrides it."""
        return x

    def feature_norm(self, x: Tensor, stage: int) -> Tensor:
        """What ``norm=True`` does to the map of a stage: the closing norm on the last one. Detection forms override it."""
        return self.norm(x) if stage == len(self.feature_info) - 1 else x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps of chosen stages, as in timm.

        Args:
            x: (B, in_chans, H, W).
            indices: Stages: the last n if an int, all if None.
            norm: Apply ``feature_norm``.
            stop_early: Leave out stages after the last wanted one.
            output_fmt: ``"NCHW"`` alone.
            intermediates_only: Return the list alone, else ``(last map, list)``.

        Raises:
            ValueError: Another ``output_fmt``.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}; use .permute(0, 2, 3, 1) on the maps")
        wanted, last = feature_take_indices(len(self.stages), indices)
        x, found = self.forward_stem(x), []
        for i, stage in enumerate(self.stages):
            if stop_early and i > last:
                break
            x = stage(x)
            if i in wanted:
                found.append(self.feature_norm(self.stage_map(x), i) if norm else self.stage_map(x))
        return found if intermediates_only else (self.forward_close(x), found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages and the head that the wanted maps do not need, as in timm."""
        wanted, last = feature_take_indices(len(self.stages), indices)
        cut = last < len(self.stages) - 1
        self.stages = nn.Sequential(*list(self.stages)[: last + 1])
        if prune_norm or cut:
            self.norm = nn.Identity()
        if prune_head or cut:
            self.reset_classifier(0, "")
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        return wanted


def classification_config(**changes: Any) -> dict[str, Any]:
    """Timm's data configuration of an ImageNet classifier: 224 pixels, bicubic, crop 0.9, ImageNet's mean and deviation.

    Args:
        **changes: What differs: ``input_size``, ``crop_pct``, ``first_conv`` (name of the first convolution, which
            ``in_chans`` changes), ``classifier``, ``license``, ``origin_url`` ...
    """
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        **changes,
    }


def build_backbone(
    make: type[nn.Module],
    variant: str,
    pretrained: bool,
    checkpoint_filter: Callable[[dict[str, Any], nn.Module], dict[str, Any]],
    *,
    stages: int = 4,
    normed_features: bool = False,
    **kwargs: Any,
) -> Any:
    """Make a model through timm's builder, which adds data configuration, ``features_only`` and weights from a file.

    Args:
        make: The network's class.
        variant: The registered name.
        pretrained: Whether to load weights, as in timm.
        checkpoint_filter: Turns the authors' state dict into this class's.
        stages: How many maps ``features_only`` gives.
        normed_features: Whether they go through ``Backbone.feature_norm``.
        **kwargs: Arguments of the class, and timm's own (``features_only``, ``out_indices``, ``pretrained_cfg_overlay`` ...).
    """
    return build_model_with_cfg(
        make,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter,
        feature_cfg={"out_indices": tuple(range(stages)), "feature_cls": "getter", "norm": normed_features},
        **kwargs,
    )
