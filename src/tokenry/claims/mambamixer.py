"""Measurements of MambaMixer: TSM2 on ETTh1, small ViM2 networks on small photographs."""

from __future__ import annotations

import math
import statistics
from functools import partial
from typing import Any

from tokenry.claims.itransformer import rounded, series, train
from tokenry.claims.registry import Context, Measurement, measures
from tokenry.claims.small_images import paired_difference, setting, train_networks

SEEDS = 3
PAPER_PARAMS = {"vim2_tiny": 20, "vim2_small": 43, "vim2_base": 74}
SMALL_TSM2: dict[str, Any] = {
    "d_model": 16, "patch_length": 32, "patch_stride": 32, "d_state": 4, "expand": 1.0, "learning_rate": 2e-3,
}  # fmt: skip
SHORT: dict[str, Any] = {
    "split": "ETTh1", "context_length": 512, "features": None, "epochs": 4, "patience": 4, "stride": 8, "batch_size": 16,
    "test_stride": 4,
}  # fmt: skip
HORIZONS = (96, 192, 336, 720)
PAPER_MSE = {
    "ETTh1": (0.375, 0.398, 0.419, 0.422),
    "ETTm1": (0.322, 0.349, 0.366, 0.407),
    "weather": (0.161, 0.208, 0.252, 0.337),
}
SMALL_VIM2: dict[str, Any] = {"num_classes": 10, "img_size": 32, "patch_size": 8}
EPOCHS = 3


@measures("mambamixer", "size")
def size(context: Context) -> Measurement:
    """Parameters of the three variants, as they are made here and with channel mixers as wide as there are tokens."""
    import timm

    import tokenry.vision  # noqa: F401  registers the models

    def millions(name: str, **options: Any) -> float:
        return sum(p.numel() for p in timm.create_model(name, device="meta", **options).parameters()) / 1e6

    found = {name: {"here": millions(name), "as_written": millions(name, channel_width=0)} for name in PAPER_PARAMS}
    near = all(abs(found[name]["here"] / paper - 1) <= 0.1 for name, paper in PAPER_PARAMS.items())
    text = ", ".join(
        f"{name} {found[name]['here']:.1f} M ({paper} M; {found[name]['as_written']:.0f} M with channel mixers as wide as there "
        "are tokens)"
        for name, paper in PAPER_PARAMS.items()
    )
    return Measurement(
        shows=near,
        value=round(found["vim2_tiny"]["here"], 2),
        sentence=f"{text}; must be within 10 % of the paper's numbers",
        details=found,
    )


@measures("mambamixer", "etth1")
def etth1_row(context: Context) -> Measurement:
    """A small TSM2 with each channel mixer beside repeating, seasonal naive and linear models, on the same windows."""
    from tokenry.assets import etth1

    frame = etth1()
    every: dict[str, Any] = {**SHORT, "stride": 1, "batch_size": 32}
    results = {
        "repeat-last": train(context, "repeat-last", frame, "repeat-last", **SHORT),
        "seasonal-naive": train(context, "seasonal-naive", frame, "seasonal-naive", **SHORT, season_length=24),
        "dlinear": train(context, "dlinear", frame, "dlinear", **SHORT),
        "rlinear": train(context, "rlinear", frame, "rlinear", **SHORT),
        "rlinear, all windows": train(context, "rlinear-all", frame, "rlinear", **every),
    }
    forms: dict[str, dict[str, Any]] = {
        "selective": {}, "mlp": {"channel_mixer": "mlp"}, "none": {"channel_mixer": "none"},
    }  # fmt: skip
    errors: dict[str, list[float]] = {name: [] for name in forms}
    for seed in range(2023 + context.seed, 2023 + context.seed + SEEDS):
        for name, own in forms.items():
            key = f"tsm2/{name}/seed{seed}"
            results[key] = train(context, key, frame, "tsm2", **SHORT, **SMALL_TSM2, **own, seed=seed)
            errors[name].append(results[key]["mse"][0])
    residual = train(context, "residual", frame, "tsm2", **SHORT, **SMALL_TSM2, average=False)
    results["tsm2/selective, residual connections"] = residual
    mean = {name: statistics.mean(values) for name, values in errors.items()}
    others = {name: result["mse"][0] for name, result in results.items() if not name.startswith("tsm2/")}
    bars = {f"TSM2, {name}": value for name, value in mean.items()} | others
    return Measurement(
        shows=mean["selective"] <= 0.40 and mean["selective"] < min(mean["mlp"], mean["none"]),
        value=round(mean["selective"], 4),
        baseline=round(mean["none"], 4),
        spread=round(statistics.stdev(errors["selective"]), 4),
        sentence=f"ETTh1 512 to 96, every 8th window, {SHORT['epochs']} epochs, width 16, {SEEDS} seeds: MSE "
        + ", ".join(f"{value:.3f} with channel mixer {name}" for name, value in mean.items())
        + " (selective must be at most 0.40 and below both others); one seed with residual connections in place of learned "
        f"sums {residual['mse'][0]:.3f}; " + ", ".join(f"{name} {value:.3f}" for name, value in others.items()),
        details=rounded(results),
        charts=(
            {
                "type": "bars",
                "title": "Test MSE on ETTh1, 512 hours to the next 96 (shorter is better)",
                "values": {name: round(value, 4) for name, value in bars.items()},
                "baseline": "TSM2, none",
            },
        ),
    )


@measures("mambamixer", "tables")
def tables(context: Context) -> Measurement:
    """Three data sets, four horizons, three seeds."""
    from tokenry.assets import etth1

    found: dict[str, list[float]] = {}
    for name in PAPER_MSE:
        frame = etth1() if name == "ETTh1" else series(context, name)
        found[name] = []
        for horizon in HORIZONS:
            options: dict[str, Any] = {
                "split": name,
                "context_length": 512,
                "prediction_length": horizon,
                "features": None,
            }
            runs = [
                train(context, f"{name}/{horizon}/{seed}", frame, "tsm2", **options, seed=seed)["mse"][0]
                for seed in range(2023, 2023 + SEEDS)
            ]
            found[name].append(statistics.mean(runs))
    gaps = [a / b - 1 for name, paper in PAPER_MSE.items() for a, b in zip(found[name], paper, strict=True)]
    return Measurement(
        shows=statistics.mean(gaps) <= 0.05,
        value=round(100 * statistics.mean(gaps), 2),
        sentence=f"12 cells, {SEEDS} seeds: MSE {100 * statistics.mean(gaps):+.1f} % beside the paper's on average (must be at "
        f"most +5 %), {100 * max(gaps):+.1f} % in the worst cell",
        details=found,
    )


def _accuracy_bars(found: dict[str, list[float]], baseline: str) -> dict[str, Any]:
    return {
        "type": "bars",
        "title": "Test accuracy (%)",
        "values": {name: round(statistics.mean(values), 2) for name, values in found.items()},
        "spread": {name: statistics.stdev(values) for name, values in found.items()},
        "baseline": baseline,
    }


@measures("mambamixer", "channel-mixer")
def channel_mixer(context: Context) -> Measurement:
    """One small ViM2 with selective channel mixers and with MLPs of as many parameters."""
    from tokenry.mixers import SelectiveChannelMixer
    from tokenry.vision import ViM2

    depths, dims, tokens, states = (2,), (32,), 16, 2
    numbers = sum(p.numel() for p in SelectiveChannelMixer(num_tokens=tokens, d_state=states).parameters())
    ratio = numbers / (2 * dims[0] ** 2)
    forms: dict[str, dict[str, Any]] = {"selective": {}, "mlp": {"channel_mixer": "mlp", "mlp_ratio": ratio}}
    networks = {name: partial(ViM2, depths, dims, d_state=states, **SMALL_VIM2, **own) for name, own in forms.items()}
    params = {name: sum(p.numel() for p in make().parameters()) for name, make in networks.items()}
    found = train_networks(context, networks, epochs=EPOCHS, seeds=SEEDS)
    gain, error = paired_difference(found["selective"], found["mlp"])
    means = {name: statistics.mean(values) for name, values in found.items()}
    return Measurement(
        shows=gain > 2 * error,
        value=round(means["selective"], 2),
        baseline=round(means["mlp"], 2),
        spread=round(statistics.stdev(found["selective"]), 2),
        sentence=f"{setting(context, EPOCHS, SEEDS)}: "
        + ", ".join(f"{name} {value:.1f} % ({params[name]:,} parameters)" for name, value in means.items())
        + f"; selective over MLP {gain:+.1f} +- {error:.1f} points (must exceed two standard errors)",
        details={"accuracy": found, "parameters": params},
        charts=(_accuracy_bars(found, "mlp"),),
    )


@measures("mambamixer", "averaging")
def averaging(context: Context) -> Measurement:
    """Twelve token mixers and six channel mixers in one stage, joined by learned sums and by residual connections."""
    from tokenry.vision import ViM2

    networks = {
        name: partial(ViM2, (12,), (16,), d_state=1, **SMALL_VIM2, average=average)
        for name, average in (("learned sums", True), ("residual connections", False))
    }
    found = train_networks(context, networks, epochs=EPOCHS, seeds=2)
    ours, theirs = found.values()
    gain, error = paired_difference(ours, theirs)
    stable = all(math.isfinite(value) and value >= 20.0 for value in ours)
    return Measurement(
        shows=stable and gain > -2 * error,
        value=round(statistics.mean(ours), 2),
        baseline=round(statistics.mean(theirs), 2),
        spread=round(statistics.stdev(ours), 2),
        sentence=f"{setting(context, EPOCHS, 2)}, 12 token mixers deep: {statistics.mean(ours):.1f} % with learned sums, "
        f"{min(ours):.1f} % in the worst run (must be at least 20 %, twice chance), {statistics.mean(theirs):.1f} % with residual "
        f"connections; difference {gain:+.1f} +- {error:.1f} points (must not be two standard errors below zero)",
        details=found,
        charts=(_accuracy_bars(found, "residual connections"),),
    )
