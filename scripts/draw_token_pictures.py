"""Make the pictures of docs/drawing.md and of the methods' pages: photographs, and what networks do with their tokens below them.

    TOKENRY_DATA=data python scripts/draw_token_pictures.py docs/images [NAME ...]

Super tokens and influence are drawn with untrained networks, over a photograph that scikit-learn ships. The other maps mean
nothing before a network has learned something. They are drawn with small networks trained as those of the claims are, on CIFAR-10
(without TOKENRY_DATA on the shipped sample of it), over photographs of its test part. The weights are kept in
build/token-pictures, so that only the first run trains.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from safetensors.torch import load_model, save_model
from sklearn.datasets import load_sample_image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.assets import cifar10_sample, external
from tokenry.claims.small_images import passes
from tokenry.vision import TokensToToken, UniFormerLight, draw_tokens, metaformer
from tokenry.vision.image_training import Images, Training, train_classifier
from tokenry.vision.labelled_images import read_labelled_images
from tokenry.vision.uniformer_blocks import PatchEmbed

WEIGHTS = Path("build/token-pictures")
EPOCHS = 6  # over the shipped sample, half of them over the larger set, as in the claims
PHOTOGRAPHS = (20, 54, 87, 13, 84)  # of the shipped test part
GAP = 4
QUERY = (0.45, 0.45)
Row = list[Image.Image]


def sheet(rows: list[Row], side: int) -> Image.Image:
    """Pictures in rows, each of ``side`` pixels."""
    step = side + GAP
    whole = Image.new("RGB", (max(map(len, rows)) * step - GAP, len(rows) * step - GAP), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            whole.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (j * step, i * step))
    return whole


def flower() -> Image.Image:
    return Image.fromarray(load_sample_image("flower.jpg")).crop((120, 0, 547, 427))


def over_flower(name: str, what: str, layer: int, size: int, strength: float) -> Image.Image:
    """One map of an untrained network of timm's list."""
    torch.manual_seed(0)
    own = {"zero_init_last": False} if name.startswith("resnet") else {}  # else its branches begin as nothing
    model = timm.create_model(name, num_classes=2, **own).eval()
    return draw_tokens(model, flower(), what=what, layer=layer, size=size, query=QUERY, strength=strength)


def super_tokens() -> Image.Image:
    layers = [over_flower("stvit_small", "super_tokens", layer, 448, 0.55) for layer in (0, 2, 7)]
    return sheet([[flower(), *layers]], 164)


def influence() -> Image.Image:
    models = (("resnet18", 3), ("transnext_micro", 2), ("davit_tiny", 2))
    return sheet([[flower(), *(over_flower(name, "influence", layer, 224, 0.8) for name, layer in models)]], 164)


class Shrunk(nn.Module):
    """A network that sees a picture at the 32 pixels it was trained with, so that it can be drawn on larger."""

    def __init__(self, network: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.network, self.pretrained_cfg = network, {"mean": mean, "std": std}

    def forward(self, x: Tensor) -> Tensor:
        return self.network(F.interpolate(x, (32, 32), mode="area"))


class OneLogit(nn.Module):
    """A light UniFormer for a training that knows one output: the mean of its two."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        y = self.network(x)
        return (y[0] + y[1]) / 2 if self.training else y


@cache
def photographs() -> Any:
    """Training and test photographs and labels."""
    larger = external("cifar10")
    return (cifar10_sample("train"), cifar10_sample("test")) if larger is None else read_labelled_images(larger)


def trained(name: str, make: Callable[[], nn.Module]) -> Shrunk:
    """The network with the weights of an earlier run, or trained now."""
    train, test = photographs()
    training = Training(epochs=passes(EPOCHS), batch=64)
    file = WEIGHTS / f"{name}-{len(train[0])}images-{training.epochs}epochs.safetensors"
    made: list[nn.Module] = []

    def keep() -> nn.Module:
        made.append(make())
        return made[0]

    if file.exists():
        load_model(keep(), file)
    else:
        found = train_classifier(keep, Images.of(train, test), training, seed=0)
        print(
            f"{name}: trained in {found.seconds:.0f} s, {found.accuracy:.1f} % of the test photographs right",
            flush=True,
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        save_model(made[0], file)
    pixels = train[0].reshape(-1, 3) / 255
    return Shrunk(made[0].eval(), pixels.mean(0).tolist(), pixels.std(0).tolist())


def over_photographs(name: str, make: Callable[[], nn.Module], *maps: tuple[str, int]) -> Image.Image:
    """Photographs, and below them a row for each map: its name and its layer."""
    network = trained(name, make)
    images = cifar10_sample("test")[0]
    shown = [Image.fromarray(images[i]).resize((256, 256), Image.Resampling.BICUBIC) for i in PHOTOGRAPHS]
    rows = [
        [draw_tokens(network, image, what=what, layer=layer, size=256, strength=0.65) for image in shown]
        for what, layer in maps
    ]
    return sheet([shown, *rows], 128)


SKELETON: dict[str, Any] = {"num_classes": 10, "img_size": 32, "stem": (2, 2, 0), "act": "gelu"}


def uniformer() -> nn.Module:
    return metaformer(["local_mhra", "global_mhra"], (1, 2), (32, 64), **SKELETON)


def light_uniformer() -> nn.Module:
    """Of the published shape, with 8 x 8 tokens where the pruning begins."""
    network: Any = UniFormerLight((1, 1, 3, 1), (16, 32, 64, 128), 16, num_classes=10)
    network.stem = PatchEmbed(3, 16, 1)
    return OneLogit(network)


def t2t_vit() -> nn.Module:
    tokens = partial(TokensToToken, kind="transformer", token_dim=16, splits=((3, 2), (3, 2)))
    return VisionTransformer(
        32, 4, embed_dim=64, depth=4, num_heads=4, mlp_ratio=2.0, num_classes=10, embed_layer=tokens
    )


def sg_former() -> nn.Module:
    groups = {"sr_ratio": 4, "window_size": 4, "group_sizes": (16, 8, 4)}
    return metaformer("self_guided", (1, 1), (24, 48), mixer_kwargs=groups, **SKELETON)


def stvit_r() -> nn.Module:
    windows = {"window": 8, "samples": 3, "layer_scale": None}
    return metaformer(["sep_conv", "semantic_token"], (1, 1), (32, 64), mixer_kwargs=[{}, windows], **SKELETON)


def dualtoken_vit() -> nn.Module:
    return metaformer("dual_token", (2,), (48,), mixer_kwargs={"grid": 8, "down_steps": 1}, **SKELETON)


PICTURES: dict[str, Callable[[], Image.Image]] = {
    "super-tokens": super_tokens,
    "influence": influence,
    "attention": partial(over_photographs, "uniformer", uniformer, ("attention", 0), ("attention", 1)),
    "tokenizer-attention": partial(over_photographs, "t2t_vit", t2t_vit, ("attention", 0)),
    "significance": partial(over_photographs, "sg_former", sg_former, ("significance", 0)),
    "semantic-tokens": partial(over_photographs, "stvit_r", stvit_r, ("semantic", 0)),
    "global-tokens": partial(over_photographs, "dualtoken_vit", dualtoken_vit, ("attention", 1)),
    "kept-tokens": partial(over_photographs, "light_uniformer", light_uniformer, ("kept", 1)),
}


def main(folder: Path, names: list[str]) -> None:
    """Write the named pictures, or all."""
    unknown = sorted(set(names) - set(PICTURES))
    if unknown:
        raise SystemExit(f"there are no pictures {', '.join(unknown)}; known: {', '.join(PICTURES)}")
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or PICTURES:
        file = folder / f"{name}.jpg"
        PICTURES[name]().save(file, quality=80)
        print(f"{file}: {file.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
