"""Measurements of dual tokens and DualToken-ViT."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

from tokenry.claims.registry import Context, Measurement, measures
from tokenry.claims.small_images import accuracy_chart, paired_difference, setting, time_over_sides, train_networks

SEEDS = 3
EPOCHS = 4
SIDES = (16, 32, 64, 96)
# Variant: the paper's billions of multiply-accumulates at 224 pixels.
PAPER = {"dualtoken_vit_tiny": 0.5, "dualtoken_vit_small": 1.0}
SKELETON: dict[str, Any] = {
    "depths": (2,), "dims": (48,), "num_classes": 10, "img_size": 32, "stem": (4, 4, 0), "act": "gelu",
}  # fmt: skip


@measures("dualtoken-vit", "size")
def size(context: Context) -> Measurement:
    """Multiply-accumulates of this library's variants against the paper's budgets."""
    import timm
    import torch

    import tokenry.vision  # noqa: F401  registers the models
    from tokenry.measure import count_macs

    found: dict[str, dict[str, float]] = {}
    for name in PAPER:
        model = timm.create_model(name).eval()
        macs = count_macs(model, torch.zeros(1, 3, 224, 224)) / 1e9
        found[name] = {"params_m": sum(p.numel() for p in model.parameters()) / 1e6, "macs_g": macs}
    text = ", ".join(
        f"{name} {f['params_m']:.1f} M parameters and {f['macs_g']:.2f} G (paper {PAPER[name]} G)"
        for name, f in found.items()
    )
    return Measurement(
        shows=all(abs(found[name]["macs_g"] / budget - 1) <= 0.1 for name, budget in PAPER.items()),
        value=round(found["dualtoken_vit_small"]["macs_g"], 3),
        sentence=f"{text}; must be within 10 % of the paper's budgets (depths are this library's choice)",
        details=found,
    )


def _mixers() -> dict[str, Any]:
    """The mixer and what is left of it without one stream; maps (B, C, H, W)."""
    from tokenry.mixers.dual_token import ConvEncoder, DualTokenMixer
    from tokenry.mixers.window_attention import WindowAttentionMixer

    def dual(dim: int, **kwargs: Any) -> DualTokenMixer:
        return DualTokenMixer(dim, grid=4, down_steps=1, **kwargs)

    def local(dim: int, **kwargs: Any) -> ConvEncoder:
        return ConvEncoder(dim)

    class WindowsAndTokens(DualTokenMixer):
        """Window attention in the place of the convolution."""

        def __init__(self, dim: int, **kwargs: Any) -> None:
            super().__init__(dim, grid=4, down_steps=1, **kwargs)
            from tokenry.mixers import InLayout

            self.local = InLayout(WindowAttentionMixer(dim, window_size=4), "NCHW")  # type: ignore[assignment]

    return {"dual tokens": dual, "convolution alone": local, "windows and tokens": WindowsAndTokens}


@measures("dualtoken-vit", "both-streams")
def both_streams(context: Context) -> Measurement:
    """One small network with dual tokens, the convolution alone, window attention with global tokens, and no mixer."""
    from tokenry.vision import metaformer

    networks = {name: partial(metaformer, mixer, **SKELETON) for name, mixer in _mixers().items()}
    networks["no mixer"] = partial(metaformer, "identity", **SKELETON)
    found = train_networks(context, networks, epochs=EPOCHS, seeds=SEEDS)
    means = {name: statistics.mean(values) for name, values in found.items()}
    gaps = {name: paired_difference(found["dual tokens"], v) for name, v in found.items() if name != "dual tokens"}
    return Measurement(
        shows=all(gap >= -error for gap, error in gaps.values()),
        value=round(means["dual tokens"], 2),
        baseline=round(means["convolution alone"], 2),
        spread=round(statistics.stdev(found["dual tokens"]), 2),
        sentence=f"{setting(context, EPOCHS, SEEDS)}: "
        + ", ".join(f"{name} {mean:.1f} %" for name, mean in means.items())
        + "; dual tokens over "
        + ", ".join(f"{name} {gap:+.1f} +- {error:.1f}" for name, (gap, error) in gaps.items())
        + " points (none may be below zero by more than its standard error)",
        details={"accuracies": found, "gaps": gaps},
        charts=(accuracy_chart(found, "no mixer"),),
    )


@measures("dualtoken-vit", "linear")
def linear(context: Context) -> Measurement:
    """Time of the mixer over the number of tokens, beside self-attention."""
    from tokenry.measure import fit_exponent
    from tokenry.mixers import create_mixer

    mixers = {
        name: lambda side, name=name: create_mixer(name, 64, layout="NCHW") for name in ("dual_token", "attention")
    }
    seconds = time_over_sides(context, mixers, SIDES, 64)
    tokens = [side**2 for side in SIDES]
    exponents = {name: fit_exponent(tokens, found) for name, found in seconds.items()}
    return Measurement(
        shows=exponents["dual_token"] < 1.25 and exponents["attention"] > exponents["dual_token"] + 0.4,
        value=round(exponents["dual_token"], 2),
        baseline=round(exponents["attention"], 2),
        sentence=f"time grows as N^{exponents['dual_token']:.2f} for dual tokens and N^{exponents['attention']:.2f} for "
        "self-attention at 64 channels (must be below 1.25, and 0.4 below attention's)",
        details={"tokens": tokens, "seconds": seconds},
    )
