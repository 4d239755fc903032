"""Measurements of DaViT's two attentions."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

from tokenry.claims.registry import Context, Measurement, measures
from tokenry.claims.small_images import setting, train_networks
from tokenry.measure import standard_error

SEEDS = 3
EPOCHS = 6
SIDES = (8, 16, 32, 64)
# Variant: the paper's millions of parameters and billions of multiply-accumulates at 224 x 224.
PAPER_COST = {"davit_tiny": (28.3, 4.5), "davit_small": (49.7, 8.8), "davit_base": (87.9, 15.5)}
MIXERS = ("identity", "window", "channel", "dual")


@measures("davit", "size")
def size(context: Context) -> Measurement:
    """Parameters and multiply-accumulates of the three published variants, as timm has them."""
    import timm
    import torch

    from tokenry.measure import count_macs

    found: dict[str, tuple[float, float]] = {}
    for name in PAPER_COST:
        model = timm.create_model(name, device="meta").eval()
        macs = count_macs(model, torch.zeros(1, 3, 224, 224, device="meta"))
        found[name] = sum(p.numel() for p in model.parameters()) / 1e6, macs / 1e9
    near = all(
        abs(found[name][0] - params) <= 0.1 and abs(found[name][1] - macs) <= 0.05
        for name, (params, macs) in PAPER_COST.items()
    )
    text = ", ".join(
        f"{name} {found[name][0]:.2f} M and {found[name][1]:.2f} G (paper {params} M, {macs} G)"
        for name, (params, macs) in PAPER_COST.items()
    )
    return Measurement(
        shows=near,
        value=round(found["davit_tiny"][0], 3),
        sentence=f"{text}; parameters must be within 0.1 M, multiply-accumulates at 224x224 within 0.05 G of the paper",
        details={name: {"params_m": p, "macs_g": m} for name, (p, m) in found.items()},
    )


@measures("davit", "linear")
def linear(context: Context) -> Measurement:
    """Forward time of dual attention and of full self-attention over the number of tokens."""
    import torch

    from tokenry.measure import fit_exponent, interleave
    from tokenry.mixers import create_mixer

    dim = 64

    def times(side: int) -> dict[str, float]:
        torch.manual_seed(context.seed)
        mixers = {name: create_mixer(name, dim).to(context.device).eval() for name in ("dual_attention", "attention")}
        x = torch.randn(1, side, side, dim, device=context.device)
        tokens = x.flatten(1, 2)
        with torch.inference_mode():
            measured = interleave(
                {
                    "dual": lambda: mixers["dual_attention"](x),
                    "full": lambda: mixers["attention"](tokens),
                },
                repeats=7,
                device=context.device,
                min_seconds=0.02,
            )
        return {name: timing.median for name, timing in measured.items()}

    rows = [context.session.step(f"side{side}", lambda side=side: times(side)) for side in SIDES]
    tokens = [side**2 for side in SIDES]
    dual, full = ([row[name] for row in rows] for name in ("dual", "full"))
    ours, theirs = fit_exponent(tokens, dual), fit_exponent(tokens, full)
    return Measurement(
        shows=abs(ours - 1) < abs(ours - 2) and abs(theirs - 2) < abs(theirs - 1),
        value=round(ours, 2),
        baseline=round(theirs, 2),
        sentence=f"from {tokens[0]} to {tokens[-1]} tokens of {dim} channels time grows as N^{ours:.2f} for dual attention and "
        f"N^{theirs:.2f} for full self-attention (must be nearer to 1 than to 2, and nearer to 2 than to 1); at {tokens[-1]} "
        f"tokens dual attention takes {full[-1] / dual[-1]:.1f} times less time, at {tokens[0]} {full[0] / dual[0]:.2f} times",
        details={"tokens": tokens, "dual_seconds": dual, "full_seconds": full},
    )


def _network(mixer: str) -> Any:
    """Two blocks at 8 x 8, two at 4 x 4: windows of 4 see a quarter of the first map and all of the second."""
    from tokenry.mixers import ChannelGroupAttention, DualAttention, IdentityMixer, WindowAttentionMixer
    from tokenry.vision import metaformer

    makers: dict[str, Any] = {
        "identity": IdentityMixer,
        "window": partial(WindowAttentionMixer, window_size=4),
        "channel": ChannelGroupAttention,
        "dual": partial(DualAttention, window_size=4),
    }
    return metaformer(makers[mixer], (2, 2), (32, 64), 10, 32, stem=(4, 4, 0), res_scale=None)


@measures("davit", "complementary")
def complementary(context: Context) -> Measurement:
    """One small MetaFormer with windows alone, channels alone, both, and no mixer, on small photographs."""
    accuracies = train_networks(
        context, {mixer: partial(_network, mixer) for mixer in MIXERS}, epochs=EPOCHS, seeds=SEEDS
    )
    mean = {mixer: statistics.mean(found) for mixer, found in accuracies.items()}
    error = {mixer: standard_error(found) for mixer, found in accuracies.items()}
    alone = max(mean["window"], mean["channel"])
    text = ", ".join(f"{mixer} {mean[mixer]:.1f} +- {error[mixer]:.1f} %" for mixer in MIXERS)
    return Measurement(
        shows=mean["dual"] >= alone and min(mean["window"], mean["channel"]) > mean["identity"],
        value=round(mean["dual"], 2),
        baseline=round(alone, 2),
        spread=round(statistics.stdev(accuracies["dual"]), 2),
        sentence=f"{setting(context, EPOCHS, SEEDS)}: {text} (both must reach the better of the two alone, and "
        "each alone must exceed no mixer; the block with both has more parameters)",
        details=accuracies,
    )
