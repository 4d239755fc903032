"""Super-resolution with any network that enlarges: images in tiles, small images to try it on, and how good the result is.

    PSNR = 10 log10( 255^2 / mean (a - b)^2 )           on luma: Y = 16 + 65.481 R + 128.553 G + 24.966 B, RGB in [0, 1]
    SSIM = mean of  (2 m_a m_b + c1)(2 s_ab + c2) / ((m_a^2 + m_b^2 + c1)(s_a^2 + s_b^2 + c2)),  Gaussian windows 11x11

These are the conventions of the field's tables: 8-bit images, BT.601 luma in 16 ... 235, as many border pixels cut off as the
scale. Small images are made by antialiased bicubic interpolation. MATLAB's, which the benchmarks' files come from, differs from
torch's at the border alone; ``evaluate(small=...)`` takes such files where you have them.

A network here is any module with an attribute ``upscale`` that takes (B, 3, h, w) in [0, 1] to (B, 3, s h, s w).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.vision.labelled_images import IMAGE_ENDINGS

__all__ = [
    "Evaluation",
    "ImageScore",
    "bicubic_downscale",
    "bicubic_upscale",
    "evaluate",
    "luma",
    "psnr",
    "quantize",
    "read_image",
    "ssim",
    "upscale_image",
    "upscale_tensor",
]

WHOLE, TILE = 512 * 512, 384  # pixels of the input up to which no tiles are needed; side of the tiles above
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5


def bicubic_downscale(images: Tensor, scale: int) -> Tensor:
    """Antialiased bicubic interpolation to 1/scale: (B, C, s h, s w) -> (B, C, h, w), as 8-bit files would hold it."""
    height, width = images.shape[-2:]
    if height % scale or width % scale:
        raise ValueError(f"sides must be multiples of {scale}, got {height}x{width}; crop the images first")
    size = (height // scale, width // scale)
    return quantize(F.interpolate(images, size, mode="bicubic", antialias=True))


def bicubic_upscale(images: Tensor, scale: int) -> Tensor:
    """The usual baseline: bicubic interpolation (a = -1/2), (B, C, h, w) -> (B, C, s h, s w)."""
    size = (images.shape[-2] * scale, images.shape[-1] * scale)
    return F.interpolate(images, size, mode="bicubic", antialias=True)


def quantize(images: Tensor) -> Tensor:
    """What an 8-bit file keeps of images in [0, 1]."""
    return images.clamp(0, 1).mul(255).round().div(255)


def luma(images: Tensor) -> Tensor:
    """Luma of BT.601 in 16 ... 235: (B, 3, H, W) in [0, 1] -> (B, 1, H, W), float64."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"expected RGB images (B, 3, H, W) in [0, 1], got {tuple(images.shape)} of {images.dtype}")
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64, device=images.device)
    return (images.double() * weights.view(3, 1, 1)).sum(1, keepdim=True) + 16


def _both(images: Tensor, reference: Tensor, border: int) -> tuple[Tensor, Tensor]:
    if images.shape != reference.shape:
        raise ValueError(
            f"images and reference must share a shape, got {tuple(images.shape)}, {tuple(reference.shape)}"
        )
    height, width = images.shape[-2:]
    if border < 0 or min(height, width) <= 2 * border:
        raise ValueError(f"a border of {border} pixels leaves nothing of images of {height}x{width}")
    inner = (..., slice(border, height - border), slice(border, width - border))
    return luma(images)[inner], luma(reference)[inner]


def psnr(images: Tensor, reference: Tensor, border: int = 0) -> Tensor:
    """Peak signal-to-noise ratio of the luma in dB, one per image; infinite for equal images.

    Args:
        images: (B, 3, H, W) in [0, 1]; ``quantize`` them first for the figures of tables.
        reference: Of the same shape.
        border: Pixels left out at every edge; tables use the scale.

    Raises:
        ValueError: Shapes differ, no RGB images, nothing left inside the border.
    """
    a, b = _both(images, reference, border)
    return 10 * torch.log10(255**2 / (a - b).square().mean((1, 2, 3)))


def ssim(images: Tensor, reference: Tensor, border: int = 0) -> Tensor:
    """Structural similarity of the luma, one per image, over all windows inside.

    Args:
        images: (B, 3, H, W) in [0, 1].
        reference: Of the same shape.
        border: Pixels left out at every edge.

    Raises:
        ValueError: As for ``psnr``; fewer than 11 pixels a side left.
    """
    a, b = _both(images, reference, border)
    if min(a.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs {SSIM_WINDOW} pixels a side inside the border, got {a.shape[-2]}x{a.shape[-1]}")
    offsets = torch.arange(SSIM_WINDOW, dtype=a.dtype, device=a.device) - SSIM_WINDOW // 2
    line = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    line = (line / line.sum()).view(1, 1, -1, 1)

    def blurred(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, line), line.mT)

    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
    covariance = blurred(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    alike = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (alike / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean((1, 2, 3))


def _spans(size: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Starts and ends of equal tiles that cover an axis and share at least ``overlap`` positions with the next one."""
    tile = min(tile, size)
    count = 1 if tile == size else -(-(size - overlap) // (tile - overlap))
    starts = [i * (size - tile) // max(count - 1, 1) for i in range(count)]
    return [(start, start + tile) for start in starts]


def _weights(span: tuple[int, int], size: int, overlap: int) -> Tensor:
    """Weight of each position of a tile: 0 in the outer third of an overlap, rising through the middle one, then 1."""
    start, stop = span
    distance = torch.full((stop - start,), float("inf"))
    inward = torch.arange(stop - start) + 0.5
    if start > 0:
        distance = torch.minimum(distance, inward)
    if stop < size:
        distance = torch.minimum(distance, inward.flip(0))
    return (3 * distance / overlap - 1).clamp(0, 1) if overlap else torch.ones(stop - start)


def _tiles(size: tuple[int, int], tile: int, overlap: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    for rows in _spans(size[0], tile, overlap):
        for columns in _spans(size[1], tile, overlap):
            yield rows, columns


@torch.inference_mode()
def upscale_tensor(
    model: nn.Module,
    images: Tensor,
    *,
    tile: int | None = None,
    overlap: int = 32,
    on_tile: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Enlarge images, tile by tile where they are large.

    Neighbouring tiles share at least ``overlap`` pixels. The outer third of what they share, where a tile knows little of
    its surroundings, is thrown away; across the middle third one fades into the other: no seam. The memory needed is that of
    one tile, and the result's.

    Args:
        model: The network, in evaluation mode.
        images: (B, 3, h, w) in [0, 1].
        tile: Side of the tiles in pixels of the input; 0: the image as a whole. None (default): 384 for images of more than
            512x512 pixels, else the whole.
        overlap: Pixels that neighbouring tiles share.
        on_tile: Called with the number of tiles done and of all.

    Returns:
        (B, 3, s h, s w), clipped to [0, 1].

    Raises:
        ValueError: No such tiles, or the network refuses the images.
    """
    scale = int(model.upscale)  # type: ignore[arg-type]
    height, width = images.shape[-2:]
    if tile is None:
        tile = TILE if height * width > WHOLE else 0
    if overlap < 0 or tile < 0 or (0 < tile < 2 * overlap):
        raise ValueError(
            f"tiles must be 0 (the whole image) or at least twice as wide as the overlap, got tile={tile}, overlap={overlap}"
        )
    spans = list(_tiles((height, width), tile or max(height, width), overlap))
    if len(spans) == 1:
        result = model(images).clamp(0, 1)
        if on_tile is not None:
            on_tile(1, 1)
        return result
    total = images.new_zeros(*images.shape[:-2], scale * height, scale * width, dtype=torch.float32)
    weight = total.new_zeros(total.shape[-2:])
    for number, (rows, columns) in enumerate(spans, 1):
        part = model(images[..., slice(*rows), slice(*columns)]).float()
        large = [(scale * start, scale * stop) for start, stop in (rows, columns)]
        down, right = (
            _weights(span, scale * side, scale * overlap).to(total)
            for span, side in zip(large, (height, width), strict=True)
        )
        faded = down[:, None] * right
        where = (..., slice(*large[0]), slice(*large[1]))
        total[where] += part * faded
        weight[where] += faded
        if on_tile is not None:
            on_tile(number, len(spans))
    return (total / weight).clamp(0, 1).to(images.dtype)


def _as_tensor(image: Image.Image) -> Tensor:
    """(1, C, H, W) in [0, 1]."""
    pixels = torch.from_numpy(np.array(image))
    return (pixels[None, None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)[None]).float() / 255


def _as_image(x: Tensor) -> Image.Image:
    pixels = x[0].clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def upscale_image(
    model: nn.Module,
    image: Image.Image,
    *,
    tile: int | None = None,
    overlap: int = 32,
    on_tile: Callable[[int, int], None] | None = None,
) -> Image.Image:
    """Enlarge a picture: gray stays gray, transparency is interpolated, palettes become RGB.

    Args:
        model: The network, in evaluation mode.
        image: Any picture of 8 bits a channel.
        tile: As for ``upscale_tensor``.
        overlap: As for ``upscale_tensor``.
        on_tile: As for ``upscale_tensor``.

    Returns:
        ``L``, ``LA``, ``RGB`` or ``RGBA``, ``model.upscale`` times as wide and high.

    Raises:
        ValueError: More than 8 bits a channel; tiles that do not fit.

    Example:
        >>> from tokenry.vision import DLGSANet
        >>> model = DLGSANet(2, dim=24, groups=1, blocks=1).eval()
        >>> larger = upscale_image(model, Image.new("LA", (12, 9)))
        >>> larger.mode, larger.size
        ('LA', (24, 18))
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"pictures must have 8 bits a channel, got mode {image.mode!r}; scale it to 8 bits first")
    parameter = next(model.parameters())
    gray, see_through = image.mode in ("1", "L", "LA", "La"), image.has_transparency_data
    small = _as_tensor(image.convert("RGB")).to(parameter)
    larger = _as_image(upscale_tensor(model, small, tile=tile, overlap=overlap, on_tile=on_tile).float())
    if gray:
        larger = larger.convert("L")
    if see_through:
        alpha = _as_tensor(image.convert("RGBA").getchannel("A"))
        larger.putalpha(_as_image(bicubic_upscale(alpha, int(model.upscale))))  # type: ignore[arg-type]
    return larger


def read_image(path: str | Path) -> Image.Image:
    """A picture from a file, turned as its camera says.

    Raises:
        ValueError: It cannot be read; the message says why.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


@dataclass(frozen=True)
class ImageScore:
    """One picture: dB and similarity of the network's result, and of bicubic interpolation beside it."""

    name: str
    psnr: float
    ssim: float
    bicubic_psnr: float
    bicubic_ssim: float


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` found.

    Attributes:
        images: Scores, in the order of the names.
        skipped: ``"name: reason"`` for what could not be used.
    """

    images: list[ImageScore]
    skipped: list[str]

    def mean(self, what: str) -> float:
        """Mean of ``"psnr"``, ``"ssim"``, ``"bicubic_psnr"`` or ``"bicubic_ssim"`` over the images."""
        return statistics.fmean(getattr(score, what) for score in self.images)


def evaluate(
    model: nn.Module,
    folder: str | Path,
    *,
    small: str | Path | None = None,
    tile: int | None = None,
    overlap: int = 32,
    on_image: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """PSNR and SSIM on the pictures of a folder (Set5, Set14, your own), as the field's tables take them.

    Args:
        model: The network, in evaluation mode.
        folder: Pictures in full size; cut to multiples of the scale.
        small: Folder of their small versions, ``name.png`` or ``namex4.png`` for scale 4. None (default): made here by
            antialiased bicubic interpolation.
        tile: As for ``upscale_tensor``.
        overlap: As for ``upscale_tensor``.
        on_image: Called with the number of pictures done and of all.

    Raises:
        ValueError: No folder, or no picture in it that can be used.
    """
    folder, scale = Path(folder), int(model.upscale)  # type: ignore[arg-type]
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give one with pictures in full size")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_ENDINGS)
    low = None if small is None else Path(small)
    scores: list[ImageScore] = []
    skipped: list[str] = []
    for number, path in enumerate(paths, 1):
        try:
            scores.append(_score(model, path, low, scale, tile=tile, overlap=overlap))
        except ValueError as error:
            skipped.append(f"{path.name}: {error}")
        if on_image is not None:
            on_image(number, len(paths))
    if not scores:
        raise ValueError(f"no picture of {folder} can be used: {'; '.join(skipped[:3]) or 'there is none'}")
    return Evaluation(scores, skipped)


def _score(model: nn.Module, path: Path, small: Path | None, scale: int, **tiles: Any) -> ImageScore:
    full = _as_tensor(read_image(path).convert("RGB"))
    height, width = (side - side % scale for side in full.shape[-2:])
    if min(height, width) < SSIM_WINDOW + 2 * scale:
        raise ValueError(f"{full.shape[-2]}x{full.shape[-1]} pixels are too few: give {SSIM_WINDOW + 2 * scale} a side")
    full = full[..., :height, :width]
    if small is None:
        low = bicubic_downscale(full, scale)
    else:
        found = [p for name in (path.stem, f"{path.stem}x{scale}") for p in small.glob(f"{name}.*")]
        if not found:
            raise ValueError(f"there is no {path.stem}.* or {path.stem}x{scale}.* in {small}")
        low = _as_tensor(read_image(found[0]).convert("RGB"))
        if tuple(scale * side for side in low.shape[-2:]) != (height, width):
            raise ValueError(
                f"{found[0].name} has {low.shape[-2]}x{low.shape[-1]} pixels, not a {scale}th of {height}x{width}"
            )
    ours = quantize(upscale_tensor(model, low.to(next(model.parameters())), **tiles).float().cpu())
    bicubic = quantize(bicubic_upscale(low, scale))
    values = [measure(x, full, scale).item() for x in (ours, bicubic) for measure in (psnr, ssim)]
    return ImageScore(path.name, *values)
