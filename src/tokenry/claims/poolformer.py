"""Measurements of PoolFormer."""

from __future__ import annotations

import statistics
from functools import partial
from typing import TYPE_CHECKING, Any

from tokenry.claims.registry import Context, Measurement, measures
from tokenry.claims.small_images import setting, train_networks

if TYPE_CHECKING:
    from torch import Tensor, nn

SEEDS = 3
EPOCHS = 12
SKELETON: dict[str, Any] = {
    "depths": (2, 4), "dims": (32, 64), "num_classes": 10, "img_size": 32, "stem": (4, 4, 0), "norm": "group1",
}  # fmt: skip

# 16x16 and 8x8 tokens. With patches of 4 pixels (8x8 and 4x4 tokens, LayerNorm, 5 epochs) pooling lost to no mixer in the one
# comparison that was run, 38.2 % against 42.7 %: maps that are hardly larger than the window leave it little to average.
FINE: dict[str, Any] = {**SKELETON, "stem": (2, 2, 0)}


@measures("poolformer", "smaller-than-deit")
def smaller_than_deit(context: Context) -> Measurement:
    """Parameters and multiply-accumulates of both models."""
    import timm
    import torch

    import tokenry.vision  # noqa: F401  registers the models
    from tokenry.measure import count_macs

    def count(name: str) -> dict[str, float]:
        model = timm.create_model(name).eval()
        macs = count_macs(model, torch.zeros(1, 3, 224, 224))
        return {"params": sum(p.numel() for p in model.parameters()) / 1e6, "macs": macs / 1e9}

    ours = context.session.step("poolformer", lambda: count("poolformer_m36_exact"))
    theirs = context.session.step("deit", lambda: count("deit_base_patch16_224"))
    fewer = {key: 100 * (1 - ours[key] / theirs[key]) for key in ours}
    return Measurement(
        shows=abs(fewer["macs"] - 50) <= 1 and abs(fewer["params"] - 35) <= 1,
        value=round(fewer["macs"], 2),
        sentence=f"PoolFormer-M36 has {ours['params']:.1f} M parameters and {ours['macs']:.2f} G multiply-accumulates, DeiT-B "
        f"{theirs['params']:.1f} M and {theirs['macs']:.2f} G: {fewer['params']:.1f} % and {fewer['macs']:.1f} % fewer (must be "
        "within one point of 35 and 50)",
        details={"poolformer_m36": ours, "deit_base": theirs},
    )


@measures("poolformer", "pooling-beats-nothing")
def pooling_beats_nothing(context: Context) -> Measurement:
    """One small network with pooling and with the identity, several seeds of each."""
    from tokenry.vision import metaformer

    networks = {name: partial(metaformer, name, **FINE) for name in ("identity", "pool")}
    accuracies = train_networks(context, networks, epochs=EPOCHS, seeds=SEEDS, batch=128)
    ours, theirs = (statistics.mean(accuracies[name]) for name in ("pool", "identity"))
    spread = max(statistics.stdev(found) for found in accuracies.values())
    return Measurement(
        shows=ours - theirs > spread,
        value=round(ours - theirs, 2),
        baseline=0.0,
        spread=round(spread, 2),
        sentence=f"{setting(context, EPOCHS, SEEDS)}: pooling {ours:.1f} %, no mixer "
        f"{theirs:.1f} %, {ours - theirs:+.1f} points (must exceed the larger of the two spreads over seeds, {spread:.1f})",
        details=dict(accuracies),
        charts=(
            {
                "type": "bars",
                "title": "Test accuracy on CIFAR-10 (%)",
                "values": {"no mixer": round(theirs, 2), "pooling": round(ours, 2)},
                "spread": {
                    "no mixer": statistics.stdev(accuracies["identity"]),
                    "pooling": statistics.stdev(accuracies["pool"]),
                },
                "baseline": "no mixer",
            },
        ),
    )


def _without_residual(net: Any) -> nn.Module:
    """The blocks' branches alone, in a row."""

    def forward(block: Any, x: Tensor) -> Tensor:
        return block.mlp(block.norm2(block.mix(block.norm1(x))))

    for stage in net.stages:
        for block in stage.blocks:
            block.forward = forward.__get__(block)
    return net


def _without_mlp(net: Any) -> nn.Module:
    """The mixer's branch alone."""
    from tokenry.vision.metaformer_blocks import residual

    def forward(block: Any, x: Tensor) -> Tensor:
        return residual(x, block.mix(block.norm1(x)), block.res_scale1, block.layer_scale1)

    for stage in net.stages:
        for block in stage.blocks:
            block.norm2, block.mlp, block.res_scale2 = None, None, None
            block.forward = forward.__get__(block)
    return net


@measures("poolformer", "skeleton-matters")
def skeleton_matters(context: Context) -> Measurement:
    """Twelve blocks: whole, without the residual connections, without the channel MLP."""
    from tokenry.vision import metaformer

    deep: dict[str, Any] = {**SKELETON, "depths": (4, 8)}
    makers = {
        "whole": lambda: metaformer("pool", **deep),
        "without residual": lambda: _without_residual(metaformer("pool", **deep)),
        "without MLP": lambda: _without_mlp(metaformer("pool", **deep)),
    }
    trained = train_networks(context, makers, epochs=EPOCHS, seeds=1, batch=128)
    found = {name: accuracies[0] for name, accuracies in trained.items()}
    lost = {name: found["whole"] - accuracy for name, accuracy in found.items()}
    return Measurement(
        shows=lost["without residual"] >= 10 and found["without residual"] <= 20 and lost["without MLP"] >= 10,
        value=round(lost["without residual"], 2),
        sentence=f"{setting(context, EPOCHS, 1)}, twelve pooling blocks: whole {found['whole']:.1f} %, without "
        f"the residual {found['without residual']:.1f} %, without the channel MLP {found['without MLP']:.1f} % (both must lose at "
        "least 10 points, and the first end near chance, at most 20 %)",
        details=found,
    )


@measures("poolformer", "linear-cost")
def linear_cost(context: Context) -> Measurement:
    """Forward time of one pooling mixer and one attention over the number of tokens."""
    import torch

    from tokenry.measure import fit_exponent, interleave
    from tokenry.mixers import create_mixer

    sides = (16, 24, 32, 48, 64)

    def times(side: int) -> dict[str, float]:
        mixers = {
            name: create_mixer(name, 64, layout="NHWC").to(context.device).eval() for name in ("pool", "attention")
        }
        x = torch.randn(4, side, side, 64, device=context.device)
        with torch.inference_mode():
            found = interleave(
                {name: lambda mixer=mixer: mixer(x) for name, mixer in mixers.items()},
                repeats=5,
                device=context.device,
                min_seconds=0.02,
            )
        return {name: timing.median for name, timing in found.items()}

    rows = [context.session.step(f"side{side}", lambda side=side: times(side)) for side in sides]
    tokens = [side**2 for side in sides]
    pool, attention = (fit_exponent(tokens, [row[name] for row in rows]) for name in ("pool", "attention"))
    return Measurement(
        shows=pool <= 1.2 and attention >= 1.6,
        value=round(pool, 3),
        baseline=round(attention, 3),
        sentence=f"time grows as tokens^{pool:.2f} with pooling and tokens^{attention:.2f} with attention (must be at most 1.2 and "
        f"at least 1.6); at {tokens[-1]} tokens pooling is {rows[-1]['attention'] / rows[-1]['pool']:.0f} times as fast",
        details={str(n): row for n, row in zip(tokens, rows, strict=True)},
    )
