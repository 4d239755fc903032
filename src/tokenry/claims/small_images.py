"""Small networks trained on small photographs inside a claim: the same images, order, steps and rates for all of them.

With ``TOKENRY_DATA`` the photographs are 10,000 of CIFAR-10 to train and 2,000 to test, else the shipped sample of them (1,600
and 400). The sample shows effects of several points; differences of one or two points drown in the noise of 400 test images.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from tokenry.claims.registry import Context
from tokenry.measure import standard_error

if TYPE_CHECKING:
    from torch import nn

    from tokenry.vision.image_training import Images

__all__ = [
    "accuracy_chart",
    "count_against",
    "paired_difference",
    "passes",
    "photographs",
    "setting",
    "time_over_sides",
    "train_networks",
]


@cache
def photographs(device: str) -> Images:
    """The photographs of the claims on ``device``: the larger set where it is at hand, else the shipped sample."""
    from tokenry.assets import cifar10_sample, external
    from tokenry.vision.image_training import Images
    from tokenry.vision.labelled_images import read_labelled_images

    larger = external("cifar10")
    train, test = (cifar10_sample("train"), cifar10_sample("test")) if larger is None else read_labelled_images(larger)
    return Images.of(train, test, device)


def passes(epochs: int) -> int:
    """Passes over the photographs at hand: ``epochs`` over the sample, half of them (rounded up) over the larger set."""
    from tokenry.assets import external

    return epochs if external("cifar10") is None else math.ceil(epochs / 2)


def setting(context: Context, epochs: int, seeds: int) -> str:
    """How ``train_networks`` trains with these arguments, for the sentence of a measurement."""
    images = photographs(context.device)
    return f"CIFAR-10, {len(images.train):,} training and {len(images.test):,} test images, {passes(epochs)} epochs, {seeds} seeds"


def train_networks(
    context: Context, networks: Mapping[str, Callable[[], nn.Module]], *, epochs: int, seeds: int, batch: int = 64
) -> dict[str, list[float]]:
    """Train every network with every seed on the photographs at hand, in resumable steps.

    Args:
        context: The claim's.
        networks: Name to what makes the network; called after the seed is set.
        epochs: Passes over the shipped sample; ``passes`` tells how many over the larger set.
        seeds: How many seeds, from the context's on.
        batch: Images per step.

    Returns:
        Name to the test accuracies in percent, one per seed.
    """
    from tokenry.vision.image_training import Training, train_classifier

    images, training = photographs(context.device), Training(epochs=passes(epochs), batch=batch)
    found: dict[str, list[float]] = {name: [] for name in networks}
    for seed in range(context.seed, context.seed + seeds):
        for name, make in networks.items():

            def run(make: Callable[[], nn.Module] = make, seed: int = seed) -> dict[str, float]:
                return train_classifier(make, images, training, seed).as_dict()

            step = f"{name}/{len(images.train)}images/{training.epochs}epochs/seed{seed}"
            found[name].append(context.session.step(step, run)["accuracy"])
    return found


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Mean difference over seeds and its standard error.

    Example:
        >>> paired_difference([3.0, 5.0], [1.0, 1.0])
        (3.0, 1.0)
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    return statistics.mean(differences), standard_error(differences)


def accuracy_chart(found: Mapping[str, Sequence[float]], baseline: str) -> dict[str, Any]:
    """Bars of the mean test accuracies of ``train_networks`` with their spread over seeds, for ``Measurement.charts``."""
    return {
        "type": "bars",
        "title": "Test accuracy (%)",
        "values": {name: round(statistics.mean(values), 2) for name, values in found.items()},
        "spread": {name: statistics.stdev(values) for name, values in found.items()},
        "baseline": baseline,
    }


def time_over_sides(
    context: Context,
    mixers: Mapping[str, Callable[[int], nn.Module]],
    sides: Sequence[int],
    dim: int,
    *,
    batch: int = 1,
    repeats: int = 5,
) -> dict[str, list[float]]:
    """Seconds of mixers on square maps of growing sides, turn by turn, a resumable step per side.

    Args:
        context: The claim's.
        mixers: Name to what makes the mixer for maps of a side; it takes (B, C, H, W).
        sides: Sides of the maps.
        dim: Channels C.
        batch: Maps B.
        repeats: Timed turns of each.

    Returns:
        Name to the seconds, one per side.
    """
    import torch

    from tokenry.measure import interleave

    def times(side: int) -> dict[str, float]:
        torch.manual_seed(context.seed)
        made = {name: make(side).to(context.device).eval() for name, make in mixers.items()}
        x = torch.randn(batch, dim, side, side, device=context.device)
        with torch.inference_mode():
            measured = interleave(
                {name: partial(mixer, x) for name, mixer in made.items()},
                repeats=repeats,
                device=context.device,
                min_seconds=0.02,
            )
        return {name: timing.median for name, timing in measured.items()}

    rows = [context.session.step(f"side{side}", lambda side=side: times(side)) for side in sides]
    return {name: [row[name] for row in rows] for name in mixers}


def count_against(
    context: Context, table: Mapping[str, tuple[int, float]], side: int = 224
) -> tuple[bool, str, dict[str, Any]]:
    """Parameters and multiply-accumulates of registered models against published ones.

    Args:
        context: The claim's.
        table: timm name to exact parameters and billions of multiply-accumulates at ``side``.
        side: Side of the images.

    Returns:
        Whether all parameters are equal and all multiply-accumulates within 1 %; a sentence part; the counts.
    """
    import timm
    import torch

    import tokenry.vision  # noqa: F401  registers the models
    from tokenry.measure import count_macs

    def count(name: str) -> dict[str, float]:
        model = timm.create_model(name).eval()
        return {
            "params": sum(p.numel() for p in model.parameters()),
            "macs": count_macs(model, torch.zeros(1, 3, side, side)) / 1e9,
        }

    found = {name: context.session.step(f"count/{name}", lambda name=name: count(name)) for name in table}
    equal = all(found[name]["params"] == params for name, (params, _) in table.items())
    near = all(abs(found[name]["macs"] / macs - 1) <= 0.01 for name, (_, macs) in table.items())
    text = ", ".join(
        f"{name} {found[name]['params']:,.0f} parameters ({params:,} published) and {found[name]['macs']:.2f} G ({macs:g})"
        for name, (params, macs) in table.items()
    )
    return equal and near, text, found
