"""Measurements of AFF and AFFNet."""

from __future__ import annotations

import math
import statistics
from typing import Any

from tokenry.claims.registry import Context, Measurement, measures
from tokenry.claims.small_images import paired_difference, setting, time_over_sides, train_networks

SEEDS = 3
EPOCHS = 6
SIDES = (8, 16, 32, 64, 128)
# Variant: the paper's millions of parameters and billions of multiply-accumulates at 256 x 256.
PAPER_COST = {"affnet_et": (1.4, 0.4), "affnet_t": (2.6, 0.8), "affnet": (5.5, 1.5)}


@measures("affnet", "size")
def size(context: Context) -> Measurement:
    """Parameters and multiply-accumulates of the three published variants."""
    import timm
    import torch

    import tokenry.vision  # noqa: F401  registers the models
    from tokenry.measure import count_macs

    found: dict[str, tuple[float, float]] = {}
    for name in PAPER_COST:
        model = timm.create_model(name).eval()
        params = sum(p.numel() for p in model.parameters()) / 1e6
        found[name] = params, count_macs(model, torch.zeros(1, 3, 256, 256)) / 1e9
    near = all(abs(found[name][0] / params - 1) <= 0.05 for name, (params, _) in PAPER_COST.items())
    near &= all(abs(found[name][1] - macs) <= 0.05 for name, (_, macs) in PAPER_COST.items())
    text = ", ".join(
        f"{name} {found[name][0]:.2f} M and {found[name][1]:.2f} G (paper {params} M, {macs} G)"
        for name, (params, macs) in PAPER_COST.items()
    )
    return Measurement(
        shows=near,
        value=round(found["affnet"][0], 3),
        sentence=f"{text}; parameters must be within 5 %, multiply-accumulates at 256x256 within 0.05 G of the paper",
        details={name: {"params_m": p, "macs_g": m} for name, (p, m) in found.items()},
    )


@measures("affnet", "circular-convolution")
def circular_convolution(context: Context) -> Measurement:
    """The mixer against the direct sum of the convolution that it equals, on maps of photographs."""
    import torch

    from tokenry.assets import cifar10_sample
    from tokenry.mixers import AFFMixer, aff_kernel

    images, _ = cifar10_sample("test")
    torch.manual_seed(context.seed)
    errors: dict[str, float] = {}
    photographs = torch.from_numpy(images[:2]).permute(0, 3, 1, 2).float().div(255).sub(0.5)
    for height, width in ((32, 32), (16, 16), (15, 9), (7, 7), (1, 5)):
        channels = torch.nn.functional.interpolate(photographs, (height, width), mode="bilinear")
        x = (torch.randn(16, 3) @ channels.flatten(2)).unflatten(2, (height, width)).to(context.device)  # (2, 16, H, W)
        mixer = AFFMixer(16).to(context.device)
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.normal_(std=0.5)
            kernel, y = aff_kernel(mixer, x), mixer(x)
            direct = torch.zeros_like(x)
            for i in range(height):
                for j in range(width):
                    direct += kernel[:, :, i, j, None, None] * x.roll((i, j), (2, 3))
        errors[f"{height}x{width}"] = ((y - x - direct).abs().max() / direct.abs().max()).item()
    worst = max(errors.values())
    return Measurement(
        shows=worst <= 1e-4,
        value=worst,
        baseline=1e-4,
        sentence=f"largest relative difference between the mixer and the direct circular convolution over all positions "
        f"{worst:.1e}, on five sizes from 1x5 to 32x32 (must be at most 1e-4)",
        details=errors,
    )


@measures("affnet", "global-field")
def global_field(context: Context) -> Measurement:
    """How much of the map one output position sees after one mixer."""
    import torch

    from tokenry.mixers import create_mixer

    def seen(name: str, seed: int) -> float:
        torch.manual_seed(seed)
        mixer = create_mixer(name, 32).to(context.device)
        x = torch.randn(1, 32, 16, 16, device=context.device, requires_grad=True)
        (gradient,) = torch.autograd.grad(mixer(x)[0, :, 8, 8].sum(), x)
        return (gradient.abs().amax(1) > 0).float().mean().item()

    seeds = [context.seed + i for i in range(SEEDS)]
    ours = [seen("aff", s) for s in seeds]
    pooling = [seen("pool", s) for s in seeds]
    return Measurement(
        shows=min(ours) == 1.0 and max(pooling) < 0.1,
        value=100 * min(ours),
        baseline=100 * max(pooling),
        sentence=f"one output position of a new AFF mixer depends on {100 * min(ours):.0f} % of a 16x16 map, of pooling on "
        f"{100 * max(pooling):.1f} % (must be all, and less than 10 %)",
        details={"aff": ours, "pool": pooling},
    )


@measures("affnet", "scaling")
def scaling(context: Context) -> Measurement:
    """Forward time of the mixer and of self-attention over the number of tokens."""
    from tokenry.measure import crossing, fit_exponent
    from tokenry.mixers import create_mixer

    dim = 64
    mixers: dict[str, Any] = {
        "aff": lambda side: create_mixer("aff", dim),
        "attention": lambda side: create_mixer("attention", dim, layout="NCHW"),
    }
    seconds = time_over_sides(context, mixers, SIDES, dim)
    tokens = [side**2 for side in SIDES]
    ours, theirs = seconds["aff"], seconds["attention"]
    exponent, other = fit_exponent(tokens, ours), fit_exponent(tokens, theirs)
    loglinear = fit_exponent(tokens, [n * math.log(n) for n in tokens])
    cheaper = crossing(tokens, ours, theirs)
    where = "nowhere up to 16,384 tokens" if cheaper is None else f"from about {cheaper:.0f} tokens on"
    return Measurement(
        shows=abs(exponent - loglinear) < abs(exponent - 2) and abs(other - 2) < abs(other - loglinear),
        value=round(exponent, 2),
        baseline=round(other, 2),
        sentence=f"time grows as N^{exponent:.2f} for AFF and N^{other:.2f} for self-attention ({dim} channels); AFF must be "
        f"nearer to N log N ({loglinear:.2f} on these sizes) than to N^2, attention nearer to N^2. AFF is the faster one "
        f"{where}, {theirs[-1] / ours[-1]:.1f} times at 128x128 and {theirs[0] / ours[0]:.2f} times at 8x8",
        details={"tokens": tokens, "aff_seconds": ours, "attention_seconds": theirs, "crossing_tokens": cheaper},
    )


def _network(use_filter: bool) -> Any:
    """The paper's blocks on 32 x 32 images: two at 16 x 16, two at 8 x 8."""
    from functools import partial

    from torch import nn

    from tokenry.mixers import AFFMixer
    from tokenry.vision.affnet import AFFStage, ConvNormAct, MBConv

    mixer = partial(AFFMixer) if use_filter else None
    return nn.Sequential(
        ConvNormAct(3, 32, 3, stride=2, act_layer=nn.SiLU),
        AFFStage(32, mixer),
        MBConv(32, 64, stride=2),
        AFFStage(64, mixer),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


@measures("affnet", "filter-helps")
def filter_helps(context: Context) -> Measurement:
    """The paper's block with the filter against the same block without it, same data, same seeds."""
    networks = {"with": lambda: _network(True), "without": lambda: _network(False)}
    found = train_networks(context, networks, epochs=EPOCHS, seeds=SEEDS)
    difference, error = paired_difference(found["with"], found["without"])
    ours, theirs = statistics.mean(found["with"]), statistics.mean(found["without"])
    return Measurement(
        shows=difference > error,
        value=round(ours, 2),
        baseline=round(theirs, 2),
        spread=round(statistics.stdev(found["with"]), 2),
        sentence=f"{setting(context, EPOCHS, SEEDS)}: {ours:.1f} % with the filter, {theirs:.1f} % for the same "
        f"blocks without it, difference {difference:+.1f} +- {error:.1f} points (must exceed its standard error)",
        details=dict(found),
    )
