"""Measurements of mix-shift and MS-MLP."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

from tokenry.claims.registry import Context, Measurement, measures
from tokenry.claims.small_images import (
    accuracy_chart,
    count_against,
    paired_difference,
    setting,
    time_over_sides,
    train_networks,
)

SEEDS = 3
EPOCHS = 6
SIDES = (16, 32, 64, 128)
COUNTS = {
    "ms_mlp_tiny": (28_656_232, 4.44),
    "ms_mlp_small": (50_303_752, 8.67),
    "ms_mlp_base": (88_696_792, 15.33),
}
SKELETON: dict[str, Any] = {
    "depths": (1, 2), "dims": (40, 80), "num_classes": 10, "img_size": 32, "stem": (2, 2, 0), "act": "gelu",
}  # fmt: skip
STILL = (0, 0, 0, 0, 0)
POINTS = (1, 1, 1, 1, 1)


@measures("ms-mlp", "size")
def size(context: Context) -> Measurement:
    """Parameters and multiply-accumulates of the three variants."""
    equal, text, found = count_against(context, COUNTS)
    return Measurement(
        shows=equal,
        value=found["ms_mlp_tiny"]["params"] / 1e6,
        sentence=f"{text}; parameters must be equal, multiply-accumulates within 1 % of the authors' code",
        details=found,
    )


@measures("ms-mlp", "shifts-and-kernels")
def shifts_and_kernels(context: Context) -> Measurement:
    """One small MetaFormer with mix-shift, its kernels without shifts, its shifts without kernels, and nothing."""
    from tokenry.vision import metaformer

    mixers = {
        "mix-shift": ("mix_shift", {}),
        "kernels alone": ("mix_shift", {"shifts": STILL}),
        "shifts alone": ("mix_shift", {"kernel_sizes": POINTS}),
        "no mixer": ("identity", {}),
    }
    networks = {
        name: partial(metaformer, mixer, mixer_kwargs=own or None, **SKELETON) for name, (mixer, own) in mixers.items()
    }
    found = train_networks(context, networks, epochs=EPOCHS, seeds=SEEDS)
    means = {name: statistics.mean(values) for name, values in found.items()}
    gain, error = paired_difference(found["mix-shift"], found["no mixer"])
    shift, shift_error = paired_difference(found["mix-shift"], found["kernels alone"])
    return Measurement(
        shows=gain > 2 * error,
        value=round(means["mix-shift"], 2),
        baseline=round(means["no mixer"], 2),
        spread=round(statistics.stdev(found["mix-shift"]), 2),
        sentence=f"{setting(context, EPOCHS, SEEDS)}: "
        + ", ".join(f"{name} {mean:.1f} %" for name, mean in means.items())
        + f"; mix-shift over no mixer {gain:+.1f} +- {error:.1f} points (must exceed two standard errors); the shifts add "
        f"{shift:+.1f} +- {shift_error:.1f} to the kernels (reported)",
        details=found,
        charts=(accuracy_chart(found, "no mixer"),),
    )


@measures("ms-mlp", "linear")
def linear(context: Context) -> Measurement:
    """Time of the mixer over the number of tokens, beside self-attention."""
    from tokenry.measure import fit_exponent
    from tokenry.mixers import create_mixer

    mixers = {
        name: lambda side, name=name: create_mixer(name, 64, layout="NCHW") for name in ("mix_shift", "attention")
    }
    seconds = time_over_sides(context, mixers, SIDES, 64)
    tokens = [side**2 for side in SIDES]
    exponents = {name: fit_exponent(tokens, found) for name, found in seconds.items()}
    return Measurement(
        shows=exponents["mix_shift"] < 1.25 < 1.75 < exponents["attention"],
        value=round(exponents["mix_shift"], 2),
        baseline=round(exponents["attention"], 2),
        sentence=f"time grows as N^{exponents['mix_shift']:.2f} for mix-shift and N^{exponents['attention']:.2f} for "
        "self-attention at 64 channels (must be below 1.25 and above 1.75)",
        details={"tokens": tokens, "seconds": seconds},
    )
