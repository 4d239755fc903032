"""Measurements of multi-scale attention fusion."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

from tokenry.claims.registry import Context, Measurement, measures
from tokenry.claims.small_images import accuracy_chart, paired_difference, setting, time_over_sides, train_networks

SEEDS = 3
EPOCHS = 4
SIDES = (8, 16, 32, 48)
SKELETON: dict[str, Any] = {
    "depths": (2,), "dims": (64,), "num_classes": 10, "img_size": 32, "stem": (4, 4, 0), "act": "gelu",
}  # fmt: skip


def _ablations() -> dict[str, Any]:
    """The mixer and what is left of it without one part each; all take (B, H, W, C) maps."""
    import torch
    from torch import nn

    from tokenry.mixers.maf import MAFMixer

    class Ablation(MAFMixer):
        def __init__(self, dim: int, part: str, *, input_size: tuple[int, int], **kwargs: Any) -> None:
            super().__init__(dim, input_size=input_size, window_size=4, **kwargs)
            self.part = part
            if part == "pooled overview":
                self.gld.fc.weight.requires_grad_(False)
            for name in {"local alone": ("gld", "fusion"), "global alone": ("local",)}.get(part, ()):
                setattr(self, name, nn.Identity())
            if part == "sum":
                self.fusion = nn.Identity()  # type: ignore[assignment]
                self.spread = nn.Linear(self.gld.fc.out_features, self.gld.fc.in_features)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = x.flatten(1, 2)
            if self.part == "local alone":
                return self.local(x)
            if self.part == "global alone":
                return self.fusion(tokens, self.gld(tokens)).view(x.shape)
            local = self.local(x)
            if self.part == "sum":
                return local + self.spread(self.gld(tokens).transpose(1, 2)).transpose(1, 2).view(x.shape)
            return local + self.fusion(local.flatten(1, 2), self.gld(tokens)).view(x.shape)

    parts = ("fusion", "local alone", "global alone", "pooled overview", "sum")

    def make(part: str, dim: int, *, input_size: tuple[int, int], proj_drop: float = 0.0) -> nn.Module:
        return Ablation(dim, part, input_size=input_size, proj_drop=proj_drop)

    return {part: partial(make, part) for part in parts}


@measures("maformer", "fusion-helps")
def fusion_helps(context: Context) -> Measurement:
    """One small network with the mixer and with each of its parts taken away."""
    from tokenry.vision import metaformer

    networks = {name: partial(metaformer, mixer, **SKELETON) for name, mixer in _ablations().items()}
    networks["no mixer"] = partial(metaformer, "identity", **SKELETON)
    found = train_networks(context, networks, epochs=EPOCHS, seeds=SEEDS)
    means = {name: statistics.mean(values) for name, values in found.items()}
    gaps = {name: paired_difference(found["fusion"], values) for name, values in found.items() if name != "fusion"}
    return Measurement(
        shows=all(gap >= -error for gap, error in gaps.values()),
        value=round(means["fusion"], 2),
        baseline=round(max(means["local alone"], means["global alone"]), 2),
        spread=round(statistics.stdev(found["fusion"]), 2),
        sentence=f"{setting(context, EPOCHS, SEEDS)}: "
        + ", ".join(f"{name} {mean:.1f} %" for name, mean in means.items())
        + "; fusion over "
        + ", ".join(f"{name} {gap:+.1f} +- {error:.1f}" for name, (gap, error) in gaps.items())
        + " points (none may be below zero by more than its standard error)",
        details={"accuracies": found, "gaps": gaps},
        charts=(accuracy_chart(found, "no mixer"),),
    )


@measures("maformer", "cost")
def cost(context: Context) -> Measurement:
    """Parameters of the overview, and the mixer's time over the tokens beside window attention's."""
    from tokenry.measure import fit_exponent
    from tokenry.mixers import create_mixer
    from tokenry.mixers.maf import GLD

    seconds = time_over_sides(
        context,
        {
            "maf": lambda side: create_mixer("maf", 32, layout="NCHW", input_size=(side, side)),
            "window_attention": lambda side: create_mixer("window_attention", 32, layout="NCHW"),
        },
        SIDES,
        32,
    )
    params = GLD(64, (56, 56), device="meta").fc.weight.numel() / 1e6
    tokens = [side**2 for side in SIDES]
    exponents = {name: fit_exponent(tokens, found) for name, found in seconds.items()}
    return Measurement(
        shows=abs(params - 4.9) < 0.05 and exponents["maf"] > exponents["window_attention"] + 0.1,
        value=round(params, 2),
        baseline=4.9,
        sentence=f"the overview's matrix at 56x56 tokens has {params:.2f} M parameters (must be 4.9); time grows as "
        f"N^{exponents['maf']:.2f}, window attention's as N^{exponents['window_attention']:.2f} (must be less by over 0.1)",
        details={"tokens": tokens, "seconds": seconds},
    )
