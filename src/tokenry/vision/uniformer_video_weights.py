"""Weights of UniFormers for video: the authors' files, and image weights that are given a time dimension.

A kernel (O, I, H, W) of an image model becomes one of (O, I, T, H, W): repeated T times and divided by T (the authors' way), or
in the middle of zeros. Everything else of a clip model has the shape that it has in the image model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tokenry.vision.state_dicts import check_shapes, without_head
from tokenry.vision.uniformer import BASE, SMALL, rename
from tokenry.vision.uniformer_light import VARIANTS as LIGHT

if TYPE_CHECKING:
    from tokenry.vision.uniformer_video_blocks import ClipBackbone

__all__ = ["VARIANTS", "checkpoint_filter_fn", "inflate", "inflate_checkpoint", "rename_clip"]

# Depths and widths are those of the image models whose weights they start from.
VARIANTS: dict[str, dict[str, Any]] = {
    "uniformer_video_xxs": LIGHT["uniformer_xxs"],
    "uniformer_video_xs": LIGHT["uniformer_xs"],
    "uniformer_video_s": SMALL,
    "uniformer_video_b": BASE,
}


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
        >>> import torch
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


def rename_clip(state_dict: dict[str, Any], split: bool = False) -> dict[str, Tensor]:
    """Names of the authors' video or image code, or of our image models, to those of a clip model."""
    given = rename(state_dict)
    if not split and not any(".t_attn." in name for name in given):
        return given
    out = {}
    for name, value in given.items():
        block = "".join(re.findall(r"^stages\.\d\.blocks\.\d+\.", name))
        part = name.removeprefix(block)
        if f"{block}mixer.qkv.weight" in given:  # a block with attention
            part = re.sub(r"^mixer\.", "mixer.spatial.", part)
            part = re.sub(r"^norm1\.", "mixer.spatial_norm.", part)
            part = re.sub(r"^t_attn\.", "mixer.temporal.", part)
            part = re.sub(r"^t_norm\.", "mixer.temporal_norm.", part)
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
        "split=True": any(".temporal." in name for name in state_dict),
        "std=True": kernel is not None and kernel.ndim == 5 and kernel.shape[2] == 3,
        "layer_scale=0.1": any(".ls1." in name for name in state_dict),
    }
    name = next((n for n, a in VARIANTS.items() if (a["depths"], a["dims"]) == (depths, dims)), "")
    given = ", ".join([*(option for option, on in options.items() if on), "num_classes=..."])
    return f"It has depths {depths} and dims {dims}" + (f", as {name}({given})" if name else "")


def _check(state_dict: dict[str, Tensor], model: nn.Module) -> None:
    try:
        check_shapes(state_dict, model)
    except ValueError as error:
        raise ValueError(f"{error} {_describe(state_dict)}.") from None


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Turn a checkpoint of the authors' video code into a state dict of ours.

    Args:
        state_dict: Checkpoint, with or without what a training script saved around it.
        model: Model that is to take it.

    Raises:
        ValueError: It is of another network; the message says what it looks like.
    """
    out = without_head(rename_clip(state_dict), model)
    _check(out, model)
    return out


def inflate_checkpoint(state_dict: dict[str, Any], model: ClipBackbone, mode: str = "mean") -> dict[str, Tensor]:
    """Turn a checkpoint of an image UniFormer into a whole state dict of a clip model.

    Weights that have a time dimension stay as they are, so a clip model of other classes is a start as well.

    Args:
        state_dict: Checkpoint of the authors' image models, or state dict of ``tokenry.vision.UniFormer`` or
            ``UniFormerLight``.
        model: Model that is to take it. What images do not have (temporal attention; layer scale where the checkpoint has
            none; classifiers where the number of classes differs) is copied from it.
        mode: See ``inflate``.

    Raises:
        ValueError: The checkpoint is of another network; the message lists the tensors that do not fit.
    """
    own, out = model.state_dict(), {}
    for name, value in rename_clip(state_dict, model.split).items():
        ours = own.get(name)
        if ours is not None and ours.ndim == 5 and value.ndim == 4:
            value = inflate(value, ours.shape[2], mode)
        if not name.startswith("head") or (ours is not None and ours.shape == value.shape):
            out[name] = value
    scaled = any(name.endswith(".gamma") for name in out)
    for name, value in own.items():
        if ".temporal" in name or name.startswith("head") or (name.endswith(".gamma") and not scaled):
            out.setdefault(name, value)
    _check(out, model)
    return out
