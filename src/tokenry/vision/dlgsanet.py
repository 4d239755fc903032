"""DLGSANet: single-image super-resolution by dynamic local and sparse global attention.

Li et al., "DLGSANet: Lightweight Dynamic Local and Global Self-Attention Networks for Image Super-Resolution",
ICCV 2023, arXiv:2301.02031.

    x -> x - mean -> conv3x3 = f                                 images (B, 3, h, w) in [0, 1]; f: (B, D, h, w)
    f + conv3x3( group_G( ... group_1(f) ) )                     group: conv3x3( blocks ) + its input
    -> conv3x3 to 3 s^2 channels -> pixel shuffle -> + mean      (B, 3, s h, s w)

    blocks      local, global, local, global ...; each       x <- x + mixer(LN(x));  x <- x + FFN(LN(x))
    mixers      ``DynamicLocalAttention`` (7x7 kernels, 6 channels share one) and ``SparseChannelAttention`` (6 heads)
    FFN         W_out( gelu(a) * b ),  a, b = DW3x3(W_in x)   D -> 4D, two halves of 2D; no biases

There is no bicubic skip. In evaluation mode the channel attention works in windows (``tlc``), in training mode on the whole
map: ``model.eval()`` and ``model.train()`` give different pictures of the same weights on images larger than a window.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.mixers.dynamic_local import DynamicLocalAttention
from tokenry.mixers.sparse_channel import SparseChannelAttention
from tokenry.vision.state_dicts import check_shapes, unwrap

__all__ = ["DLGSANet", "GatedFFN", "checkpoint_filter_fn", "load_dlgsanet"]

# Width D, number of groups, pairs of a local and a global block in each. The authors call the last one "Large" too.
VARIANTS: dict[str, dict[str, int]] = {
    "tiny": {"dim": 48, "groups": 3, "blocks": 3},
    "light": {"dim": 48, "groups": 4, "blocks": 3},
    "base": {"dim": 90, "groups": 6, "blocks": 4},
}
# Side of the windows in evaluation mode, in pixels of the input, by scale.
TLC_KERNELS = {2: 96, 3: 72, 4: 48}
MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K's training images
KERNEL_SIZE, CHANNELS_PER_GROUP, NUM_HEADS, EPS = 7, 6, 6, 1e-5
ABSURD = 8.0  # no image in [0, 1] has such a value, not even with noise


class GatedFFN(nn.Module):
    """Gated depthwise feed-forward of Restormer (GDFN): ``W_out(gelu(a) * b)`` with ``a, b = DW3x3(W_in x)``.

    Args:
        dim: Channels D.
        expansion: Width of each half over D. Default 2.
        device: Torch device.
        dtype: Torch dtype.
    """

    def __init__(
        self,
        dim: int,
        expansion: int = 2,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width, dd = 2 * expansion * dim, {"device": device, "dtype": dtype}
        self.project_in = nn.Conv2d(dim, width, 1, bias=False, **dd)
        self.dwconv = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False, **dd)
        self.project_out = nn.Conv2d(width // 2, dim, 1, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, D, H, W)."""
        a, b = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        return self.project_out(F.gelu(a) * b)


class Block(nn.Module):
    """``x + mixer(norm1(x))``, then ``x + ffn(norm2(x))``."""

    def __init__(self, dim: int, mixer: nn.Module, **dd: Any) -> None:
        super().__init__()
        self.norm1 = LayerNorm2d(dim, eps=EPS, **dd)
        self.mixer = mixer
        self.norm2 = LayerNorm2d(dim, eps=EPS, **dd)
        self.ffn = GatedFFN(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:  # (B, D, H, W) -> (B, D, H, W)
        x = x + self.mixer(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class Group(nn.Module):
    """Local and global blocks in turn and a convolution, around them a skip (RHDTG)."""

    def __init__(self, dim: int, blocks: int, tlc_kernel: int | None, **dd: Any) -> None:
        super().__init__()
        made: list[nn.Module] = []
        for _ in range(blocks):
            made.append(Block(dim, DynamicLocalAttention(dim, KERNEL_SIZE, CHANNELS_PER_GROUP, **dd), **dd))
            made.append(Block(dim, SparseChannelAttention(dim, NUM_HEADS, tlc_kernel, **dd), **dd))
        self.blocks = nn.Sequential(*made)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, **dd)

    def forward(self, x: Tensor) -> Tensor:  # (B, D, H, W) -> (B, D, H, W)
        return x + self.conv(self.blocks(x))


class DLGSANet(nn.Module):
    """Enlarge images two, three or four times.

    Args:
        upscale: 2, 3 or 4.
        variant: ``"tiny"`` (0.6 million parameters), ``"light"`` (0.8) or ``"base"`` (4.8).
        tlc: In evaluation mode, compute the channel attention in windows of 96, 72 or 48 pixels for scale 2, 3 or 4, about
            what training saw. False: on the whole image, as in training mode. Default True (authors' code).
        dim: Width D, a multiple of 6. None (default): the variant's.
        groups: Number of groups. None (default): the variant's.
        blocks: Pairs of blocks in a group. None (default): the variant's.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: Arguments outside these ranges; an input that is no batch of RGB images in [0, 1].

    Example:
        >>> model = DLGSANet(2, dim=24, groups=2, blocks=1).eval()
        >>> sum(p.numel() for p in model.parameters()), model(torch.rand(1, 3, 16, 9)).shape
        (48404, torch.Size([1, 3, 32, 18]))
    """

    def __init__(
        self,
        upscale: int,
        variant: str = "tiny",
        tlc: bool = True,
        *,
        dim: int | None = None,
        groups: int | None = None,
        blocks: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if upscale not in TLC_KERNELS:
            raise ValueError(f"upscale must be 2, 3 or 4, got {upscale!r}; for other factors resize the result")
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        sizes = VARIANTS[variant]
        dim = sizes["dim"] if dim is None else dim
        groups = sizes["groups"] if groups is None else groups
        blocks = sizes["blocks"] if blocks is None else blocks
        if dim < 1 or dim % NUM_HEADS:
            raise ValueError(f"dim must be a positive multiple of {NUM_HEADS}, got {dim}; the paper's are 48 and 90")
        if groups < 1 or blocks < 1:
            raise ValueError(f"groups and blocks must be at least 1, got {groups} and {blocks}")
        self.upscale = upscale
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        tlc_kernel = TLC_KERNELS[upscale] if tlc else None
        self.stem = nn.Conv2d(3, dim, 3, padding=1, bias=False, **dd)
        self.groups = nn.Sequential(*(Group(dim, blocks, tlc_kernel, **dd) for _ in range(groups)))
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.upsample = nn.Sequential(nn.Conv2d(dim, 3 * upscale**2, 3, padding=1, **dd), nn.PixelShuffle(upscale))

    @property
    def settings(self) -> dict[str, Any]:
        """``upscale``, ``dim``, ``groups`` and ``blocks`` of this network."""
        return _settings(self.state_dict())

    def check_images(self, x: Tensor) -> None:
        """Refuse what is no batch of RGB images in [0, 1]; warn of images smaller than the kernels.

        Raises:
            ValueError: It says what was given, what is allowed, and what to do.
        """
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(
                f"expected RGB images (B, 3, H, W), got {tuple(x.shape)}; repeat a gray channel three times, take alpha away, "
                "or hand PIL images to tokenry.vision.upscale_image, which does both"
            )
        if not x.is_floating_point():
            raise ValueError(f"expected floating-point images in [0, 1], got {x.dtype}; use x.float() / 255")
        if torch.compiler.is_compiling():
            return
        if min(x.shape[-2:]) < KERNEL_SIZE:
            warnings.warn(
                f"an image of {x.shape[-2]}x{x.shape[-1]} pixels is smaller than the {KERNEL_SIZE}x{KERNEL_SIZE} kernels, "
                "which then see mostly the zeros around it",
                stacklevel=3,
            )
        # Training on a GPU does not wait for the check.
        checked = x.device.type == "cpu" or not (self.training or x.is_meta)
        if checked and x.numel() and x.detach().amax() > ABSURD:
            raise ValueError(f"expected images in [0, 1], got values up to {x.max().item():.4g}; divide by 255")

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3, s H, s W), not clipped to [0, 1]."""
        self.check_images(x)
        mean = x.new_tensor(MEAN).view(1, 3, 1, 1)
        shallow = self.stem(x - mean)
        deep = self.conv(self.groups(shallow))
        return self.upsample(shallow + deep) + mean


def _settings(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of the network that a state dict, under our names, was saved from."""
    try:
        indices = [re.match(r"groups\.(\d+)\.blocks\.(\d+)\.", name) for name in state_dict]
        groups, blocks = zip(*((int(found[1]), int(found[2])) for found in indices if found), strict=True)
        pixels = state_dict["upsample.0.weight"].shape[0] // 3
        return {
            "upscale": round(pixels**0.5),
            "dim": state_dict["stem.weight"].shape[0],
            "groups": max(groups) + 1,
            "blocks": (max(blocks) + 1) // 2,
        }
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"the checkpoint is not DLGSANet's ({error}); give one with overlap_embed, deep_feature_extraction and upsample"
        ) from None


RENAMED = (
    (r"^overlap_embed\.0\.proj\.", "stem."),
    (r"^deep_feature_extraction\.(\d+)\.body\.(\d+)\.(weight|bias)$", r"groups.\1.conv.\3"),
    (r"^deep_feature_extraction\.(\d+)\.body\.", r"groups.\1.blocks."),
    (r"^deep_feature_extraction\.\d+\.(weight|bias)$", r"conv.\1"),
    (r"\.norm([12])\.body\.", r".norm\1."),
    (r"\.norm3\.body\.", ".norm1."),
    (r"\.norm4\.body\.", ".norm2."),
    (r"\.IDynamicDWConv\.conv\.conv1\.0\.", ".mixer.reduce."),
    (r"\.IDynamicDWConv\.conv\.conv1\.1\.", ".mixer.dwconv."),
    (r"\.IDynamicDWConv\.conv\.conv2\.0\.", ".mixer.expand."),
    (r"\.IDynamicDWConv\.conv0\.", ".mixer.proj_in."),
    (r"\.IDynamicDWConv\.conv1\.", ".mixer.proj_out."),
    (r"\.restormer_attn\.project_out\.", ".mixer.proj_out."),
    (r"\.restormer_attn\.", ".mixer."),
    (r"\.(IDynamic|restormer)_ffn\.", ".ffn."),
)


def _our_names(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in unwrap(state_dict).items():
        name = name.removeprefix("dlgsanet.")
        for pattern, ours in RENAMED:
            name = re.sub(pattern, ours, name)
        renamed[name] = value
    return renamed


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: DLGSANet) -> dict[str, Tensor]:
    """The authors' state dict under this network's names.

    Args:
        state_dict: The authors' (moving averages ``params_ema`` are taken before ``params``) or this network's own.
        model: The network that it is for.

    Raises:
        ValueError: It is another network's, or of another size or scale; the message says which.
    """
    renamed = _our_names(state_dict)
    theirs, ours = _settings(renamed), model.settings
    if theirs != ours:
        said = ", ".join(f"{key}={value}" for key, value in theirs.items())
        raise ValueError(
            f"the checkpoint is of DLGSANet({said}), the model has {', '.join(f'{k}={v}' for k, v in ours.items())}; make it "
            "with the checkpoint's settings, or use load_dlgsanet, which reads them from the file"
        )
    check_shapes(renamed, model)
    return renamed


def _read(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        path /= "model.safetensors"
    if not path.is_file():
        raise ValueError(
            f"there is no checkpoint at {path}; give a .pth or .safetensors file, or a folder of save_pretrained"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise whatever the bytes lead to
        raise ValueError(f"cannot read {path} as a checkpoint: {error}") from error


def load_dlgsanet(source: str | Path | Mapping[str, Any], *, tlc: bool | None = None) -> DLGSANet:
    """Make the network that a checkpoint was saved from, with its weights, in evaluation mode.

    Args:
        source: A ``.pth`` or ``.safetensors`` file of the authors' code or of ``model.state_dict()``; a folder in which
            ``DLGSANetForImageSuperResolution.save_pretrained`` has written; or a state dict.
        tlc: As in ``DLGSANet``. None (default): as the folder's configuration says, else True.

    Raises:
        ValueError: No such file; a file that cannot be read; another network's weights.
    """
    renamed = _our_names(source if isinstance(source, Mapping) else _read(Path(source)))
    if tlc is None:
        config = None if isinstance(source, Mapping) else Path(source) / "config.json"
        tlc = config is None or not config.is_file() or json.loads(config.read_text("utf-8")).get("tlc", True)
    model = DLGSANet(**_settings(renamed), tlc=tlc)
    check_shapes(renamed, model)
    model.load_state_dict(renamed)
    return model.eval()
