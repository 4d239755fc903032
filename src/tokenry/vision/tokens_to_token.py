"""Tokens-to-token: an image becomes tokens by overlapping splits with small transformers between them.

Yuan et al., "Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet", ICCV 2021, arXiv:2101.11986.

    t0 = split_7,4(x)                                  (B, HW/16, 147)         x: (B, 3, H, W)
    t1 = split_3,2( map( transformer_1(t0) ) )         (B, HW/64, 576)         transformer_1: 147 -> 64
    t2 = split_3,2( map( transformer_2(t1) ) )         (B, HW/256, 576)        transformer_2: 576 -> 64
    y  = t2 W + b                                      (B, HW/256, D)

``split_k,s`` takes windows of k x k every s pixels (padding (k - s + 1) // 2, columns channel by channel), so that
neighbouring tokens share k - s rows or columns. A transformer here has one head and changes the width; its first skip
connection is therefore the values v, which have the new width:

    k, q, v = norm(t) W           z = v + attention(q, k, v) Wo          z + mlp(norm(z))

``"transformer"`` is softmax attention with the scale (width of t)^-1/2, whose cost is quadratic in HW/16 tokens;
``"performer"`` is linear (``tokenry.mixers.PerformerMixer``). The authors' code takes square images alone; here any sides
that are multiples of the stride do, with the same result on squares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.mixers.performer import PerformerMixer

__all__ = ["T2TPerformer", "T2TTransformer", "TokensToToken", "soft_split"]

SPLITS = ((7, 4), (3, 2), (3, 2))


def soft_split(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Overlapping windows of a map as tokens.

    Args:
        x: (B, C, H, W) with sides that are multiples of ``stride``.
        kernel: Side of a window.
        stride: Distance of windows.

    Returns:
        (B, HW / stride^2, C kernel^2), row by row; in a token channel by channel.

    Example:
        >>> soft_split(torch.arange(4.0).view(1, 1, 2, 2), 3, 2).tolist()
        [[[0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 2.0, 3.0]]]
    """
    # A view of windows and one copy: on the CPU about half the time of F.unfold, whose columns would have to be turned.
    padding = (kernel - stride + 1) // 2
    windows = F.pad(x, (padding,) * 4).unfold(2, kernel, stride).unfold(3, kernel, stride)  # (B, C, h, w, k, k)
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


class T2TPerformer(nn.Module):
    """A transformer of the tokenizer with performer attention: (B, N, dim_in) -> (B, N, dim).

    Args:
        dim_in: Width of the tokens.
        dim: Width of the result, and of the MLP.
        drop: Dropout after the attention and at the end of the MLP. Default 0.1 (authors, always on in training).
        ratio: Random features per channel. Default 0.5 (authors).
        device: Torch device.
        dtype: Torch dtype.

    Example:
        >>> T2TPerformer(27, 16)(torch.randn(2, 12, 27)).shape
        torch.Size([2, 12, 16])
    """

    def __init__(
        self,
        dim_in: int,
        dim: int,
        drop: float = 0.1,
        ratio: float = 0.5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim_in, **dd)
        self.mixer = PerformerMixer(dim, ratio, 1, dim_in, released=True, proj_drop=drop, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, dim, drop=(0.0, drop), **dd)

    def token_maps(self, x: Tensor) -> dict[str, Tensor]:
        """``attention`` (B, N): what every token receives."""
        return self.mixer.token_maps(self.norm1(x))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim_in) -> (B, N, dim)."""
        y, v = self.mixer.attend(self.norm1(x))
        x = v + y
        return x + self.mlp(self.norm2(x))


class T2TTransformer(nn.Module):
    """A transformer of the tokenizer with softmax attention: (B, N, dim_in) -> (B, N, dim).

    Args:
        dim_in: Width of the tokens; the scale of the attention is its inverse root.
        dim: Width of the result, of the one head, and of the MLP.
        drop: Dropout after the attention and at the end of the MLP. Default 0 (authors).
        device: Torch device.
        dtype: Torch dtype.

    Example:
        >>> T2TTransformer(27, 16)(torch.randn(2, 12, 27)).shape
        torch.Size([2, 12, 16])
    """

    def __init__(
        self,
        dim_in: int,
        dim: int,
        drop: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.scale = dim_in**-0.5
        self.norm1 = nn.LayerNorm(dim_in, **dd)
        self.qkv = nn.Linear(dim_in, 3 * dim, bias=False, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(drop)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, dim, drop=(0.0, drop), **dd)

    def token_maps(self, x: Tensor) -> dict[str, Tensor]:
        """``attention`` (B, N): what every token receives, averaged over queries."""
        q, k, _ = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        return {"attention": (q @ k.transpose(-2, -1) * self.scale).softmax(-1).mean(1)}

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim_in) -> (B, N, dim)."""
        q, k, v = self.qkv(self.norm1(x)).unsqueeze(1).chunk(3, dim=-1)  # (B, 1, N, dim): one head
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        x = (v + self.proj_drop(self.proj(y))).squeeze(1)
        return x + self.mlp(self.norm2(x))


KINDS: dict[str, type[nn.Module]] = {"performer": T2TPerformer, "transformer": T2TTransformer}


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class TokensToToken(nn.Module):
    """Images to tokens, in the place of a patch embedding: (B, C, H, W) -> (B, N, D).

    Takes what timm gives its ``embed_layer`` and has the attributes that timm reads: ``img_size``, ``grid_size``,
    ``num_patches``, ``patch_size``.

    Args:
        img_size: Side or (H, W) of the images. None (default): any size that is a multiple of the stride.
        patch_size: Accepted as timm gives it; it must be the product of the strides. None: that product.
        in_chans: Channels of the images.
        embed_dim: Width D of the tokens.
        kind: Attention of the small transformers: ``"performer"`` (default, linear) or ``"transformer"``.
        token_dim: Width between the splits. Default 64 (authors).
        splits: (kernel, stride) of each split, with a transformer after each but the last. Default (7, 4), (3, 2), (3, 2).
        drop: Dropout in the transformers in training. None: the authors', 0.1 for performers and 0 for transformers.
        bias: Whether the last map has a bias.
        output_fmt: None or ``"NLC"`` for tokens, ``"NHWC"`` for a map (B, h, w, D), which timm asks for.
        strict_img_size: Whether images of another size than ``img_size`` are refused.
        dynamic_img_pad: Accepted as timm gives it; images are not padded, so it must be False.
        device: Torch device.
        dtype: Torch dtype.

    Raises:
        ValueError: Arguments outside these; images whose sides are no multiples of the stride, or not ``img_size``.

    Example:
        >>> tokens = TokensToToken(embed_dim=24, token_dim=8)
        >>> tokens(torch.zeros(1, 3, 32, 48)).shape
        torch.Size([1, 6, 24])
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        embed_dim: int = 768,
        kind: str = "performer",
        token_dim: int = 64,
        splits: Sequence[tuple[int, int]] = SPLITS,
        drop: float | None = None,
        bias: bool = True,
        output_fmt: str | None = None,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if kind not in KINDS:
            raise ValueError(f"kind must be 'performer' or 'transformer', got {kind!r}")
        if len(splits) < 2 or any(kernel < stride or stride < 1 for kernel, stride in splits):
            raise ValueError(
                f"splits takes two or more (kernel, stride) with kernel >= stride >= 1, got {tuple(splits)}; the authors' "
                f"are {SPLITS}"
            )
        if in_chans < 1 or embed_dim < 1 or token_dim < 2:
            raise ValueError(
                f"in_chans and embed_dim must be at least 1 and token_dim at least 2, got {in_chans}, {embed_dim} and "
                f"{token_dim}"
            )
        if output_fmt not in (None, "NLC", "NHWC") or dynamic_img_pad:
            raise ValueError(
                f"output_fmt must be None, 'NLC' or 'NHWC' and dynamic_img_pad False, got {output_fmt!r} and "
                f"{dynamic_img_pad}; pad the images before the model"
            )
        self.stride = math.prod(stride for _, stride in splits)
        self.patch_size = (self.stride, self.stride)
        self.in_chans, self.splits = in_chans, tuple((kernel, stride) for kernel, stride in splits)
        self.output_fmt, self.strict_img_size = output_fmt, strict_img_size
        self.set_input_size(img_size, patch_size)
        options = {} if drop is None else {"drop": drop}
        widths = [(token_dim if i else in_chans) * kernel**2 for i, (kernel, _) in enumerate(splits)]
        self.transformers = nn.ModuleList(KINDS[kind](width, token_dim, **options, **dd) for width in widths[:-1])
        self.proj = nn.Linear(widths[-1], embed_dim, bias=bias, **dd)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Another size of the images, as timm sets it."""
        if patch_size is not None and _pair(patch_size) != self.patch_size:
            raise ValueError(
                f"patch_size is the product of the strides, {self.stride}, got {patch_size}; change splits"
            )
        self.img_size: tuple[int, int] | None = None
        self.grid_size: tuple[int, int] | None = None
        self.num_patches: int | None = None
        if img_size is not None:
            height, width = _pair(img_size)
            self._check_sides(height, width)
            self.img_size, self.grid_size = (height, width), (height // self.stride, width // self.stride)
            self.num_patches = self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels per token along each side."""
        return self.stride if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens of an image of (H, W)."""
        return img_size[0] // self.stride, img_size[1] // self.stride

    def _check_sides(self, height: int, width: int) -> None:
        if height % self.stride or width % self.stride or min(height, width) < 1:
            near = [max(1, round(side / self.stride)) * self.stride for side in (height, width)]
            raise ValueError(
                f"both sides of the images must be multiples of {self.stride} (they need not be equal), got "
                f"{height}x{width}; resize or pad them, for example to {near[0]}x{near[1]}"
            )

    def check_images(self, x: Tensor) -> None:
        """Refuse what is no batch of images that the tokenizer takes."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"expected images (B, {self.in_chans}, H, W), got {tuple(x.shape)}; for other channel counts make the model "
                "with in_chans=..."
            )
        height, width = x.shape[-2:]
        if self.strict_img_size and self.img_size is not None and (height, width) != self.img_size:
            raise ValueError(
                f"the model was made for images of {self.img_size[0]}x{self.img_size[1]} pixels, got {height}x{width}; "
                f"resize them, or make it with img_size of your images (multiples of {self.stride})"
            )
        self._check_sides(height, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D), or (B, h, w, D) with ``output_fmt="NHWC"``."""
        self.check_images(x)
        height, width = x.shape[-2:]
        for (kernel, stride), transformer in zip(self.splits[:-1], self.transformers, strict=True):
            height, width = height // stride, width // stride
            x = transformer(soft_split(x, kernel, stride)).transpose(1, 2).unflatten(2, (height, width))
        kernel, stride = self.splits[-1]
        x = self.proj(soft_split(x, kernel, stride))
        return x.unflatten(1, (height // stride, width // stride)) if self.output_fmt == "NHWC" else x
