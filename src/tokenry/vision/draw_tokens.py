"""Draw what a vision model does with its tokens, over the image.

A mixer that has something to show offers

    token_maps(x) -> {name: map}        x: its own input; each map (B, h, w), or (B, N) in row-major order

and the map's type says what it is:

    floating    weight of every position (attention, significance): drawn as heat
    integer     which token a position belongs to (super tokens): drawn as borders around areas of one colour
    bool        whether a position is kept: what is dropped is darkened

Every model, with or without such mixers, has one picture more: ``"influence"``, the size of the gradient of one position of
a stage's map with respect to the pixels, which is the effective receptive field of Luo et al., "Understanding the
Effective Receptive Field in Deep Convolutional Neural Networks", NeurIPS 2016, arXiv:1701.04128, for one image.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["draw_tokens", "token_maps"]

SIDE = 224
# Black, violet, orange, yellow: light means much, readable without colours too.
HEAT = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], dtype=np.float64)


def _open(image: Image | str | Path) -> Image:
    from PIL import Image as Pillow

    if isinstance(image, (str, Path)):
        if not Path(image).is_file():
            raise ValueError(f"there is no image at {image}")
        image = Pillow.open(image)
    if not isinstance(image, Pillow.Image):
        raise ValueError(f"image must be a PIL image or a path, got {type(image).__name__}")
    return image.convert("RGB")


def _prepare(model: nn.Module, image: Image, size: int | tuple[int, int] | None) -> tuple[Image, Tensor]:
    """The image at the model's size (height, width), and as its normalised input (1, 3, H, W)."""
    from PIL import Image as Pillow

    config = cast("dict[str, Any]", getattr(model, "pretrained_cfg", None) or {})
    height, width = (size, size) if isinstance(size, int) else size or config.get("input_size", (3, SIDE, SIDE))[1:]
    shown = image.resize((width, height), Pillow.Resampling.BICUBIC)
    mean, std = (torch.tensor(config.get(k, d)).view(3, 1, 1) for k, d in (("mean", (0.5,) * 3), ("std", (0.5,) * 3)))
    like = next(model.parameters())
    x = (torch.from_numpy(np.asarray(shown).copy()).permute(2, 0, 1).float() / 255 - mean) / std
    return shown, x[None].to(like.device, like.dtype)


def _as_map(found: Tensor, shape: tuple[int, int]) -> Tensor:
    """(1, h, w) or (1, N) -> (h, w), the N tokens laid out in the image's proportions."""
    found = found[0].detach().cpu()
    if found.ndim == 2:
        return found
    tokens, (height, width) = len(found), shape
    rows = round((tokens * height / width) ** 0.5)
    if rows == 0 or tokens % rows:
        raise ValueError(f"{tokens} tokens do not lie on a grid of an image of {height}x{width}")
    return found.reshape(rows, tokens // rows)


def token_maps(model: nn.Module, x: Tensor) -> list[tuple[str, dict[str, Tensor]]]:
    """What the mixers of a model have to show for a batch of images.

    Args:
        model: Any model; modules with a method ``token_maps`` are asked.
        x: Images (B, C, H, W), normalised as the model wants them.

    Returns:
        In the order of running: name of the module, and its maps by name.
    """
    found: list[tuple[str, dict[str, Tensor]]] = []

    def ask(name: str) -> Any:
        def hook(module: Any, arguments: tuple[Any, ...], _: Any) -> None:
            found.append((name, module.token_maps(*arguments)))

        return hook

    hooks = [m.register_forward_hook(ask(name)) for name, m in model.named_modules() if hasattr(m, "token_maps")]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(x)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return found


def _influence(model: nn.Module, x: Tensor, layer: int, query: tuple[float, float]) -> Tensor:
    """(H, W): root of the size of the gradient of one position of a stage's map with respect to the pixels.

    The root, because sizes fall off so fast that only the middle would be seen.
    """
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(
            f"{type(model).__name__} shows no maps: it has no mixer with token_maps and no forward_intermediates as timm's "
            "models have"
        )
    x = x.detach().clone().requires_grad_()
    training = model.training
    try:
        with torch.enable_grad():
            maps = model.eval().forward_intermediates(x, intermediates_only=True)  # type: ignore[operator]
            if not -len(maps) <= layer < len(maps):
                raise ValueError(f"layer must be within the {len(maps)} stages, got {layer}")
            y = maps[layer]
            row, column = (min(int(share * side), side - 1) for share, side in zip(query, y.shape[-2:], strict=True))
            (gradient,) = torch.autograd.grad(y[0, :, row, column].square().sum(), x)
    finally:
        model.train(training)
    return gradient[0].norm(dim=0).sqrt().cpu()


def _heat(pixels: np.ndarray, values: Tensor, strength: float) -> np.ndarray:
    spread = values.max() - values.min()
    share = ((values - values.min()) / spread if spread > 0 else torch.zeros_like(values)).numpy()
    place = share * (len(HEAT) - 1)
    low = np.minimum(place.astype(int), len(HEAT) - 2)
    colour = HEAT[low] + (place - low)[..., None] * (HEAT[low + 1] - HEAT[low])
    return (1 - strength) * pixels + strength * colour


def _segments(pixels: np.ndarray, labels: np.ndarray, strength: float) -> np.ndarray:
    """Each area in its mean colour, white lines between areas."""
    _, index = np.unique(labels, return_inverse=True)
    index = index.reshape(-1)
    counts = np.bincount(index)
    flat = pixels.reshape(-1, 3)
    means = np.stack([np.bincount(index, flat[:, c]) / counts for c in range(3)], -1)
    drawn = (1 - strength) * flat + strength * means[index]
    drawn = drawn.reshape(pixels.shape)
    border = np.zeros(labels.shape, bool)
    border[1:] |= labels[1:] != labels[:-1]
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    drawn[border] = 255
    return drawn


def draw_tokens(
    model: nn.Module,
    image: Image | str | Path,
    *,
    layer: int = -1,
    what: str | None = None,
    query: tuple[float, float] = (0.5, 0.5),
    size: int | tuple[int, int] | None = None,
    strength: float = 0.6,
) -> Image:
    """Draw one layer's tokens over an image: attention, significance, super tokens, kept tokens, or influence.

    Args:
        model: A model of this library or of timm, on any device.
        image: PIL image or path.
        layer: Which of the layers that have the map asked for, in the order of running; for ``"influence"`` which stage.
            Default: the last one.
        what: Name of the map, such as ``"attention"``, ``"super_tokens"``, ``"significance"``, ``"kept"``, ``"influence"``.
            None (default): the first that the layer offers, or ``"influence"`` where no layer offers any.
        query: For ``"influence"``: the position looked at, as shares (down, right) of the image. Default: the middle.
        size: Side or (height, width) at which the model runs. None: its own input size.
        strength: How strongly the drawing covers the image, 0 to 1. Default 0.6.

    Returns:
        The picture, as large as the model's input.

    Raises:
        ValueError: No such image, map or layer; shares outside 0 to 1.

    Example:
        >>> from PIL import Image
        >>> import tokenry.vision
        >>> net = tokenry.vision.metaformer("attention", (1, 1), (8, 16), 3, 64).eval()
        >>> draw_tokens(net, Image.new("RGB", (90, 60), "red"), what="attention", size=64).size
        (64, 64)
    """
    from PIL import Image as Pillow

    if not (0 <= strength <= 1 and all(0 <= share <= 1 for share in query)):
        raise ValueError(f"strength and query are shares from 0 to 1, got {strength} and {query}")
    shown, x = _prepare(model, _open(image), size)
    height, width = x.shape[-2:]
    found = [] if what == "influence" else token_maps(model, x)
    named = [(name, maps) for name, maps in found if (maps if what is None else what in maps)]
    if not named and what not in (None, "influence"):
        known = sorted({key for _, maps in found for key in maps} | {"influence"})
        raise ValueError(f"no layer of {type(model).__name__} shows {what!r}; it shows {', '.join(known)}")
    if named:
        if not -len(named) <= layer < len(named):
            raise ValueError(f"layer must be within the {len(named)} layers that show it, got {layer}")
        maps = named[layer][1]
        values = _as_map(maps[what] if what else next(iter(maps.values())), (height, width))
    else:
        values = _influence(model, x, layer, query)
    pixels = np.asarray(shown, dtype=np.float64)
    if values.is_floating_point():
        smooth = F.interpolate(values.float()[None, None], (height, width), mode="bilinear")[0, 0]
        drawn = _heat(pixels, smooth, strength)
    else:
        large = F.interpolate(values.double()[None, None], (height, width), mode="nearest")[0, 0].numpy()
        drawn = (
            _segments(pixels, large, strength)
            if values.dtype != torch.bool
            else pixels * (1 - strength * (large == 0)[..., None])
        )
    return Pillow.fromarray(drawn.round().clip(0, 255).astype(np.uint8))
