"""Measurements of self-guided attention and SG-Former."""

from __future__ import annotations

import math
import statistics
from functools import partial
from typing import TYPE_CHECKING, Any

from tokenry.claims.registry import Context, Measurement, measures
from tokenry.claims.small_images import count_against, paired_difference, setting, train_networks

if TYPE_CHECKING:
    from torch import nn

SEEDS = 3
EPOCHS = 3
COUNTS = {"sgformer_s": (22_545_981, 4.78), "sgformer_m": (38_689_316, 7.43), "sgformer_b": (77_950_293, 15.54)}
# 16 x 16 and 8 x 8 tokens, which these windows, cells and groups divide: 36 keys and 9.
SKELETON: dict[str, Any] = {
    "depths": (1, 1), "dims": (24, 48), "num_classes": 10, "img_size": 32, "stem": (2, 2, 0), "act": "gelu",
}  # fmt: skip
MIXER: dict[str, Any] = {"sr_ratio": 4, "window_size": 4, "group_sizes": (16, 8, 4)}
KINDS = ("significance", "random map", "pooled keys")

PHOTOGRAPHS = 60
STEP = 16  # every 16th photograph
SIDE = 64


@measures("sg-former", "size")
def size(context: Context) -> Measurement:
    """Parameters and multiply-accumulates of the three variants."""
    equal, text, found = count_against(context, COUNTS)
    return Measurement(
        shows=equal,
        value=round(found["sgformer_b"]["params"] / 1e6, 2),
        sentence=f"{text}; parameters must be equal, multiply-accumulates at 224x224 within 1 % of the authors' code",
        details=found,
    )


def _reallocate(network: nn.Module, kind: str) -> nn.Module:
    """Give the self-guided attentions of a network other keys, as many as their own."""
    import torch
    from torch import Tensor
    from torch.nn import functional as F

    from tokenry.mixers import SelfGuidedAttention

    def by_chance(own: Any, x: Tensor, significance: Tensor) -> Tensor:
        return own(x, torch.rand_like(significance))

    def pooled(x: Tensor, significance: Tensor, mixer: SelfGuidedAttention) -> Tensor:
        parts = zip(mixer.part_sizes(significance[0].numel()), mixer.group_sizes, strict=True)
        side = round(math.sqrt(sum(-(-tokens // group) for tokens, group in parts)))
        return F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), side).flatten(2).transpose(1, 2)

    for mixer in network.modules():
        if isinstance(mixer, SelfGuidedAttention) and kind != "significance":
            other = partial(by_chance, mixer.aggregate) if kind == "random map" else partial(pooled, mixer=mixer)
            mixer.aggregate = other  # type: ignore[method-assign]
    return network


def _network(kind: str) -> nn.Module:
    from tokenry.vision import metaformer

    return _reallocate(metaformer("self_guided", mixer_kwargs=MIXER, **SKELETON), kind)


def _judge(found: dict[str, list[float]], where: str) -> Measurement:
    """Significance must beat chance, and chance be no worse than pooling."""
    guided, guided_error = paired_difference(found["significance"], found["random map"])
    chance, chance_error = paired_difference(found["random map"], found["pooled keys"])
    means = {kind: statistics.mean(values) for kind, values in found.items()}
    return Measurement(
        shows=guided > 2 * guided_error and chance >= -chance_error,
        value=round(means["significance"], 2),
        baseline=round(means["random map"], 2),
        spread=round(statistics.stdev(found["significance"]), 2),
        sentence=f"{where}, keys by "
        + ", ".join(f"{kind} {mean:.1f} %" for kind, mean in means.items())
        + f"; significance over a random map {guided:+.1f} +- {guided_error:.1f} points (must exceed two standard errors), a "
        f"random map over pooled keys {chance:+.1f} +- {chance_error:.1f} (must not be below zero by more than its standard error)",
        details=found,
        charts=(
            {
                "type": "bars",
                "title": "Test accuracy (%) by what decides about the keys",
                "values": {kind: round(mean, 2) for kind, mean in means.items()},
                "spread": {kind: statistics.stdev(values) for kind, values in found.items()},
                "baseline": "random map",
            },
        ),
    )


@measures("sg-former", "reallocation")
def reallocation(context: Context) -> Measurement:
    """One small network whose keys are chosen by significance, by chance, and by pooling."""
    networks = {kind: partial(_network, kind) for kind in KINDS}
    found = train_networks(context, networks, epochs=EPOCHS, seeds=SEEDS)
    return _judge(found, f"{setting(context, EPOCHS, SEEDS)}, 36 and 9 keys for 256 and 64 tokens")


@measures("sg-former", "significant")
def significant(context: Context) -> Measurement:
    """Significance in a trained network, on the edges of photographs and elsewhere, in their middle and at the border."""
    from tokenry.assets import cifar10_sample

    photographs = _photographs(context)

    def run(epochs: int) -> dict[str, list[float]]:
        import numpy as np
        import torch
        from torch.nn import functional as F

        from tokenry.vision import token_maps
        from tokenry.vision.image_training import Images, Training, train_classifier

        nets: list[nn.Module] = []

        def make() -> nn.Module:
            nets.append(_network("significance"))
            return nets[0]

        images = Images.of(cifar10_sample("train"), cifar10_sample("test"), context.device)
        if epochs:
            train_classifier(make, images, Training(epochs=epochs, batch=64), context.seed)
        else:
            torch.manual_seed(context.seed)
            make().to(context.device)
        shown = Images.of(cifar10_sample("train"), (photographs, np.zeros(PHOTOGRAPHS)), context.device).test
        s = token_maps(nets[0], shown)[0][1]["significance"].flatten(1)  # (photographs, tokens)
        s = s / s.mean(1, keepdim=True)
        grey, side = shown.mean(1, keepdim=True), SIDE // 2
        slope = F.pad((grey[..., 1:] - grey[..., :-1]).abs(), (0, 1)) + F.pad(
            (grey[..., 1:, :] - grey[..., :-1, :]).abs(), (0, 0, 0, 1)
        )
        energy = F.adaptive_avg_pool2d(slope, side).flatten(1)
        edges = torch.zeros_like(s, dtype=torch.bool)
        edges.scatter_(1, energy.topk(s.shape[1] // 4, 1).indices, True)
        middle = torch.zeros(side, side, dtype=torch.bool, device=s.device)
        middle[side // 4 : -(side // 4), side // 4 : -(side // 4)] = True

        def excess(inside: torch.Tensor) -> list[float]:
            inside = inside.expand_as(s)
            within, without = ((s * part).sum(1) / part.sum(1) for part in (inside, ~inside))
            return (100 * (within / without - 1)).tolist()

        return {"edges": excess(edges), "middle": excess(middle.flatten())}

    found = {
        epochs: context.session.step(f"epochs{epochs}", lambda epochs=epochs: run(epochs)) for epochs in (0, EPOCHS)
    }
    none = [0.0] * PHOTOGRAPHS
    means = {
        (epochs, place): paired_difference(found[epochs][place], none)
        for epochs in (0, EPOCHS)
        for place in ("edges", "middle")
    }
    gain, error = means[EPOCHS, "edges"]
    text = {key: f"{value:+.2f} +- {spread:.2f} %" for key, (value, spread) in means.items()}
    return Measurement(
        shows=gain > 2 * error,
        value=round(gain, 2),
        baseline=round(means[0, "edges"][0], 2),
        spread=round(error, 2),
        sentence=f"{PHOTOGRAPHS} photographs at {SIDE}x{SIDE} pixels, a network trained for {EPOCHS} epochs on the CIFAR-10 "
        f"sample: the quarter of the tokens with the strongest edges is more significant than the others by "
        f"{text[EPOCHS, 'edges']} (must exceed two standard errors), before training by {text[0, 'edges']}; the middle of "
        f"the photograph than its border by {text[EPOCHS, 'middle']}, before training by {text[0, 'middle']} (reported)",
        details={str(epochs): rows for epochs, rows in found.items()},
    )


def _photographs(context: Context) -> Any:
    """(photographs, side, side, 3) uint8."""
    import io

    import numpy as np
    import pyarrow.parquet as parquet
    from PIL import Image

    column = parquet.read_table(context.data("imagenet-sample") / "images.parquet", columns=["image"])["image"]
    opened = [Image.open(io.BytesIO(column[i].as_py())).convert("RGB") for i in range(0, STEP * PHOTOGRAPHS, STEP)]
    return np.stack([np.asarray(one.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for one in opened])


@measures("sg-former", "cheap")
def cheap(context: Context) -> Measurement:
    """Self-guided attention at 56 x 56 tokens, with making the map and without, against attention to all tokens."""
    import torch

    from tokenry.measure import count_macs, interleave
    from tokenry.mixers import HybridScaleAttention, LocalTermAttention, SelfGuidedAttention

    def run() -> dict[str, Any]:
        torch.manual_seed(context.seed)
        hybrid, guided, full = HybridScaleAttention(64, 2, 8), SelfGuidedAttention(64, 2, 8), LocalTermAttention(64, 2)
        x = torch.randn(1, 56, 56, 64, device=context.device)
        for mixer in (hybrid, guided, full):
            mixer.to(context.device).eval()
        with torch.inference_mode():
            s = hybrid(x)[1]
            calls = {
                "self-guided": partial(guided, x, s),
                "hybrid-scale": partial(hybrid, x),
                "full": partial(full, x),
            }
            times = interleave(calls, repeats=7, device=context.device, min_seconds=0.02)
            keys = guided.aggregate(x, s).shape[1]
        macs = {
            "self-guided": count_macs(guided, x, s),
            "hybrid-scale": count_macs(hybrid, x),
            "full": count_macs(full, x),
        }
        return {"keys": keys, "macs": macs, "seconds": {name: timing.median for name, timing in times.items()}}

    found = context.session.step("costs", run)
    seconds, macs = found["seconds"], found["macs"]
    ratio = seconds["full"] / seconds["self-guided"]
    pair = 2 * seconds["full"] / (seconds["self-guided"] + seconds["hybrid-scale"])
    return Measurement(
        shows=found["keys"] == 60 and ratio > 1 and pair > 1,
        value=round(ratio, 2),
        baseline=1.0,
        sentence=f"56x56 tokens of 64 channels: {found['keys']} keys in place of 3,136 (must be 60), {macs['self-guided'] / 1e6:.0f} M "
        f"multiply-accumulates in place of {macs['full'] / 1e6:.0f} M, {ratio:.1f} times faster than attention to all tokens; a "
        f"pair of blocks' attentions, the map included, {pair:.1f} times faster than two of those (both must exceed 1)",
        details=found,
    )


@measures("sg-former", "reallocation-224")
def reallocation_224(context: Context) -> Measurement:
    """The same comparison at the released sizes of map: all of CIFAR-10, enlarged to 224 pixels."""
    from torch import nn

    from tokenry.vision.image_training import Images, Training, train_classifier
    from tokenry.vision.labelled_images import read_labelled_images
    from tokenry.vision.sg_former import SGFormer

    def make(kind: str) -> nn.Module:
        net = SGFormer((2, 2, 4, 1), (32, 64, 128, 256), (2, 4, 8, 16), num_classes=10)
        return nn.Sequential(nn.Upsample(scale_factor=7, mode="bilinear"), _reallocate(net, kind))

    images = Images.of(*read_labelled_images(context.data("cifar10")), context.device)
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for seed in range(context.seed, context.seed + SEEDS):
        for kind in KINDS:

            def run(kind: str = kind, seed: int = seed) -> dict[str, float]:
                training = Training(epochs=10, batch=256, dtype="bfloat16")
                return train_classifier(partial(make, kind), images, training, seed).as_dict()

            found[kind].append(context.session.step(f"{kind}/seed{seed}", run)["accuracy"])
    return _judge(
        found, f"{len(images.train):,} images of CIFAR-10 at 224 pixels, 10 epochs, {SEEDS} seeds, 60, 60 and 147 keys"
    )
