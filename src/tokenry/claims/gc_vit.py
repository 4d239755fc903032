"""Measurements of GC ViT's global query and downsampling."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

from tokenry.claims.registry import Context, Measurement, measures
from tokenry.claims.small_images import paired_difference, setting, train_networks

SEEDS = 3
EPOCHS = 4
WINDOW = 4
# Variant: parameters in millions and multiply-accumulates in billions at 224 x 224, as reported with the weights.
REPORTED = {
    "gcvit_xxtiny": (12, 2.1), "gcvit_xtiny": (20, 2.6), "gcvit_tiny": (28, 4.7), "gcvit_tiny2": (34, 5.5),
    "gcvit_small": (51, 8.5), "gcvit_small2": (68, 10.7), "gcvit_base": (90, 14.8), "gcvit_large": (201, 32.6),
}  # fmt: skip
TOO_LOW = ("gcvit_xtiny", "gcvit_tiny2", "gcvit_small2")  # their reported multiply-accumulates do not add up


@measures("gc-vit", "size")
def size(context: Context) -> Measurement:
    """Parameters and multiply-accumulates of all eight variants."""
    import timm
    import torch

    import tokenry.vision  # noqa: F401  registers those that timm lacks
    from tokenry.measure import count_macs

    found: dict[str, tuple[float, float]] = {}
    for name in REPORTED:
        model = timm.create_model(name, device="meta").eval()
        macs = count_macs(model, torch.zeros(1, 3, 224, 224, device="meta"))
        found[name] = sum(p.numel() for p in model.parameters()) / 1e6, macs / 1e9
    near = all(abs(found[name][0] / params - 1) <= 0.02 for name, (params, _) in REPORTED.items())
    near &= all(abs(found[n][1] / macs - 1) <= 0.03 for n, (_, macs) in REPORTED.items() if n not in TOO_LOW)
    text = ", ".join(
        f"{name} {found[name][0]:.1f} M and {found[name][1]:.2f} G ({params} M, {macs} G)"
        for name, (params, macs) in REPORTED.items()
    )
    return Measurement(
        shows=near,
        value=round(found["gcvit_base"][0], 2),
        sentence=f"{text}; parameters must be within 2 %, multiply-accumulates at 224x224 within 3 % of what is reported, but "
        f"for {', '.join(TOO_LOW)}, whose reported multiply-accumulates are too low for their layers",
        details={name: {"params_m": p, "macs_g": m} for name, (p, m) in found.items()},
    )


def _blocks(dim: int, halvings: int, global_query: bool) -> Any:
    """Two blocks on (B, H, W, C): local and global, or both local."""
    from torch import nn

    from tokenry.mixers import GlobalQueryAttention, LocalWindowAttention
    from tokenry.vision import MetaFormerBlock

    mixers: list[nn.Module] = [LocalWindowAttention(dim, window_size=WINDOW)]
    if global_query:
        mixers.append(GlobalQueryAttention(dim, window_size=WINDOW, num_halvings=halvings))
    else:
        mixers.append(LocalWindowAttention(dim, window_size=WINDOW))
    return nn.Sequential(*(MetaFormerBlock(dim, mixer, mlp_ratio=2) for mixer in mixers))


@measures("gc-vit", "whole-map")
def whole_map(context: Context) -> Measurement:
    """Share of a 16 x 16 map that one output position depends on after two blocks, by gradients."""
    import torch

    def seen(global_query: bool, seed: int) -> float:
        torch.manual_seed(seed)
        blocks = _blocks(32, 2, global_query).to(context.device)
        x = torch.randn(1, 16, 16, 32, device=context.device, requires_grad=True)
        (gradient,) = torch.autograd.grad(blocks(x)[0, 5, 5].square().sum(), x)
        return (gradient.abs().amax(-1) > 0).float().mean().item()

    seeds = [context.seed + i for i in range(SEEDS)]
    both, local = ([100 * seen(use, seed) for seed in seeds] for use in (True, False))
    window = 100 * WINDOW**2 / 16**2
    return Measurement(
        shows=min(both) == 100 and max(local) == window,
        value=min(both),
        baseline=max(local),
        sentence=f"after a local and a global block one position of a 16x16 map depends on {min(both):.0f} % of it, after two "
        f"local ones on {max(local):.2f} % (must be all, and the window alone: {window:.2f} %)",
        details={"local_global": both, "local_local": local},
    )


def _network(global_query: bool, fused_down: bool) -> Any:
    """Two blocks at 16 x 16, a downsampling, two at 8 x 8, on images of 32 x 32."""
    from torch import Tensor, nn

    from tokenry.vision import FusedMBDown

    class OnMap(nn.Module):
        def __init__(self, dim: int, halvings: int) -> None:
            super().__init__()
            self.blocks = _blocks(dim, halvings, global_query)

        def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
            return self.blocks(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    if fused_down:
        down: nn.Module = FusedMBDown(32, 64)
    else:
        down = nn.Sequential(nn.Conv2d(32, 64, 3, 2, 1, bias=False), nn.GroupNorm(1, 64))
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1),
        OnMap(32, 2),
        down,
        OnMap(64, 1),
        nn.GroupNorm(1, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def _compare(context: Context, networks: dict[str, tuple[bool, bool]]) -> dict[str, list[float]]:
    """Accuracies over the seeds for each network: (global query, fused downsampling)."""
    makers = {name: partial(_network, *parts) for name, parts in networks.items()}
    return train_networks(context, makers, epochs=EPOCHS, seeds=SEEDS)


def _report(context: Context, accuracies: dict[str, list[float]], rule: str) -> Measurement:
    """The first network against the second; it must not be below it."""
    (name, ours), (other, theirs) = accuracies.items()
    mean, error = paired_difference(ours, theirs)
    return Measurement(
        shows=mean >= 0,
        value=round(statistics.mean(ours), 2),
        baseline=round(statistics.mean(theirs), 2),
        spread=round(statistics.stdev(ours), 2),
        sentence=f"{setting(context, EPOCHS, SEEDS)}: {name} {statistics.mean(ours):.1f} %, {other} "
        f"{statistics.mean(theirs):.1f} %, difference {mean:+.1f} +- {error:.1f} points ({rule})",
        details=dict(accuracies),
    )


@measures("gc-vit", "local-and-global")
def local_and_global(context: Context) -> Measurement:
    """Local and global blocks in turn against local ones alone, the same number of blocks."""
    networks = {"local and global in turn": (True, True), "local alone": (False, True)}
    return _report(context, _compare(context, networks), "must not be worse; the generators add parameters")


@measures("gc-vit", "downsampling")
def downsampling(context: Context) -> Measurement:
    """The fused downsampling against a plain strided convolution, equal epochs."""
    networks = {"fused downsampling": (True, True), "strided convolution": (True, False)}
    return _report(context, _compare(context, networks), "must not be worse; the fused one has more parameters")
