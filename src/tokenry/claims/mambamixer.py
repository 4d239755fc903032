"""Measurements of MambaMixer: TSM2 on ETTh1, small ViM2 networks on small photographs."""

from __future__ import annotations

import math
import statistics
from functools import partial
from typing import Any

from tokenry.claims.itransformer import HORIZONS, rounded, train
from tokenry.claims.registry import Context, Measurement, measures
from tokenry.claims.short_forecasts import MODELS, PAPER, SEED, frame_of, short_forecast
from tokenry.claims.small_images import accuracy_chart, paired_difference, setting, train_networks

SEEDS = 3
PAPER_PARAMS = {"vim2_tiny": 20, "vim2_small": 43, "vim2_base": 74}
LONG = ("ETTh1", "ETTm1", "weather")
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
    frame = frame_of(context, "ETTh1")

    def forecast(key: str, model: str, **own: Any) -> dict[str, Any]:
        return short_forecast(context, key, frame, model, data="ETTh1", **own)

    results = {name: forecast(name, name) for name in ("repeat-last", "seasonal-naive", "dlinear", "rlinear")}
    results["rlinear, all windows"] = forecast("rlinear-all", "rlinear", stride=1)
    errors: dict[str, list[float]] = {"selective": [], "mlp": [], "none": []}
    for seed in range(SEED, SEED + SEEDS):
        for name, found in errors.items():
            key = f"tsm2/{name}/seed{seed}"
            results[key] = forecast(key, "tsm2", channel_mixer=name, seed=seed)
            found.append(results[key]["mse"][0])
    others = {name: result["mse"][0] for name, result in results.items() if not name.startswith("tsm2/")}
    results["residual connections"] = residual = forecast("residual", "tsm2", average=False)
    results["no last sum"] = bare = forecast("bare", "tsm2", last_sum=False)
    mean = {name: statistics.mean(values) for name, values in errors.items()}
    bars = {f"TSM2, {name}": value for name, value in mean.items()} | others
    return Measurement(
        shows=mean["selective"] <= 0.40 and mean["selective"] < min(mean["mlp"], mean["none"]),
        value=round(mean["selective"], 4),
        baseline=round(mean["none"], 4),
        spread=round(statistics.stdev(errors["selective"]), 4),
        sentence=f"ETTh1 512 to 96, every 4th window, 5 epochs, one layer of width 16, {SEEDS} seeds: MSE "
        + ", ".join(f"{value:.3f} with channel mixer {name}" for name, value in mean.items())
        + " (selective must be at most 0.40 and below both others); one seed with residual connections in place of learned "
        f"sums {residual['mse'][0]:.3f}, with the last channel mixer's output alone at the end {bare['mse'][0]:.3f}; "
        + ", ".join(f"{name} {value:.3f}" for name, value in others.items()),
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


@measures("mambamixer", "ett-rows")
def ett_rows(context: Context) -> Measurement:
    """ETTh1 and ETTh2, the next 96 hours: TSM2 beside iTransformer, linear models and naive forecasts."""
    frames = {data: frame_of(context, data) for data in ("ETTh1", "ETTh2")}
    results = {
        data: {name: short_forecast(context, f"{data}/{name}", frame, name, data=data) for name in MODELS}
        for data, frame in frames.items()
    }
    error = results["ETTh1"]["tsm2"]["mse"][0]
    rows = "; ".join(
        f"{data} "
        + ", ".join(f"{name} {found['mse'][0]:.3f}" for name, found in row.items())
        + f" (paper's TSM2 {PAPER[data][0]})"
        for data, row in results.items()
    )
    return Measurement(
        shows=error <= 0.42,
        value=round(error, 4),
        baseline=round(results["ETTh1"]["rlinear"]["mse"][0], 4),
        sentence=f"96 hours ahead, at most 2,200 windows an epoch, 5 epochs, one seed, all test windows, MSE: {rows}; TSM2 on "
        "ETTh1 must be at most 0.42",
        details={data: rounded(row) for data, row in results.items()},
        charts=tuple(
            {
                "type": "bars",
                "title": f"Test MSE on {data}, 96 hours ahead (shorter is better)",
                "values": {name: round(found["mse"][0], 4) for name, found in row.items()},
                "baseline": "rlinear",
            }
            for data, row in results.items()
        ),
    )


@measures("mambamixer", "tables")
def tables(context: Context) -> Measurement:
    """Three data sets, four horizons, three seeds."""
    found: dict[str, list[float]] = {}
    for name in LONG:
        frame = frame_of(context, name)
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
    gaps = [a / b - 1 for name in LONG for a, b in zip(found[name], PAPER[name], strict=True)]
    return Measurement(
        shows=statistics.mean(gaps) <= 0.05,
        value=round(100 * statistics.mean(gaps), 2),
        sentence=f"12 cells, {SEEDS} seeds: MSE {100 * statistics.mean(gaps):+.1f} % beside the paper's on average (must be at "
        f"most +5 %), {100 * max(gaps):+.1f} % in the worst cell",
        details=found,
    )


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
        charts=(accuracy_chart(found, "mlp"),),
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
        charts=(accuracy_chart(found, "residual connections"),),
    )
