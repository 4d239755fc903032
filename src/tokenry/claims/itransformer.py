"""Measurements of iTransformer's claims: published tables, unseen series, series against time steps as tokens."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from tokenry.claims.registry import Context, Measurement, NotRunnable, measures

if TYPE_CHECKING:
    import pandas as pd

HORIZONS = (96, 192, 336, 720)
# Hyperparameters of the paper's scripts, and its MSE at the four horizons.
PAPER: dict[str, tuple[dict[str, Any], tuple[float, float, float, float]]] = {
    "ETTh1": ({"d_model": 256}, (0.386, 0.441, 0.487, 0.503)),
    "ETTh2": ({"d_model": 128}, (0.297, 0.380, 0.428, 0.427)),
    "ETTm1": ({"d_model": 128}, (0.334, 0.377, 0.426, 0.491)),
    "ETTm2": ({"d_model": 128}, (0.180, 0.250, 0.311, 0.412)),
    "exchange_rate": ({"d_model": 128}, (0.086, 0.177, 0.331, 0.847)),
    "weather": ({"d_model": 512, "num_hidden_layers": 3}, (0.174, 0.221, 0.278, 0.358)),
}


def train(
    context: Context,
    key: str,
    frame: pd.DataFrame,
    model: str,
    *,
    test: pd.DataFrame | None = None,
    columns: tuple[list[str], ...] = (),
    test_stride: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Train in one step per epoch and test in one more: errors on all series, then on each group of ``columns``.

    The test uses every ``test_stride``-th window.
    """
    from tokenry.series import Forecaster

    session = context.session
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if session.path is None else session.path.parent / "training"
        options = {"device": context.device, "seed": 2023 + context.seed, **options}
        forecaster = Forecaster(model, **options)

        def until(epoch: int) -> dict[str, Any]:
            forecaster.fit(frame, folder=folder, until=epoch, quiet=True)
            return {"history": forecaster.history, "stopped": forecaster.stopped}

        for epoch in range(1, forecaster.epochs + 1):
            if session.step(f"{key}/epoch{epoch}", lambda epoch=epoch: until(epoch))["stopped"]:
                break

        def errors() -> dict[str, Any]:
            forecaster.fit(frame, folder=folder, quiet=True)
            table = frame if test is None else test
            parts = [forecaster.evaluate(table, columns=part, stride=test_stride) for part in (None, *columns)]
            return {
                "mse": [part["mse"] for part in parts],
                "mae": [part["mae"] for part in parts],
                "windows": parts[0]["windows"],
                "parameters": forecaster.num_parameters,
                "epochs": len(forecaster.history),
                "seconds_per_epoch": mean([row["seconds"] for row in forecaster.history] or [0.0]),
            }

        return session.step(f"{key}/test", errors)


def rounded(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """One line per model for the details."""
    keys = ("windows", "parameters", "epochs")
    return {
        name: {"mse": round(r["mse"][0], 4), "mae": round(r["mae"][0], 4), **{key: r[key] for key in keys}}
        for name, r in results.items()
    }


def errors_chart(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Bars of the test error, for the method's page."""
    values = {name: round(r["mse"][0], 4) for name, r in results.items()}
    return {"type": "bars", "title": "Test MSE (shorter is better)", "values": values, "baseline": "itransformer"}


def series(context: Context, name: str) -> pd.DataFrame:
    """A table of the larger data sets, its target last, its rows one step apart as the published protocol counts them."""
    import pandas as pd

    from tokenry.series import order_columns, read_frame

    path = context.data("forecasting") / f"{name}.csv.gz"
    if not path.exists():
        raise NotRunnable(f"needs {path.name} in the data set 'forecasting'")
    frame = order_columns(read_frame(path))
    if name == "weather":  # repeats one date and leaves out nine
        steps = pd.to_datetime(frame["date"])
        frame["date"] = pd.date_range(steps.iloc[0], periods=len(frame), freq=steps.iloc[1] - steps.iloc[0])
    return frame


@measures("itransformer", "etth1")
def etth1_table(context: Context) -> Measurement:
    """The full protocol on ETTh1 beside seasonal naive, two linear models and PatchTST."""
    from tokenry.assets import etth1

    frame, results = etth1(), {}
    runs: dict[str, dict[str, Any]] = {
        "seasonal-naive": {"season_length": 24},
        "repeat-last": {},
        "rlinear": {},
        "dlinear": {},
        "itransformer": {"d_model": 256},
        "patchtst": {"epochs": 2},
    }
    for model, options in runs.items():
        results[model] = train(context, model, frame, model, split="ETTh1", **options)
    ours, naive = results["itransformer"], results["seasonal-naive"]
    mse, mae = ours["mse"][0], ours["mae"][0]
    return Measurement(
        shows=mse <= 0.392 and mae <= 0.410,
        value=mse,
        baseline=naive["mse"][0],
        sentence=(
            f"ETTh1 96 to 96, all {ours['windows']} test windows: MSE {mse:.4f}, MAE {mae:.4f} (must be at most 0.392 and "
            f"0.410; the paper has 0.386 and 0.405); seasonal naive {naive['mse'][0]:.3f}, RLinear "
            f"{results['rlinear']['mse'][0]:.3f}, PatchTST after two epochs {results['patchtst']['mse'][0]:.3f}"
        ),
        details=rounded(results),
        charts=(errors_chart(results),),
    )


@measures("itransformer", "unseen-variates")
def unseen_variates(context: Context) -> Measurement:
    """Train on three series of ETTh1, test on all seven."""
    from tokenry.assets import etth1

    frame = etth1()
    names = list(frame.columns[1:])
    parts = (names[:3], names[3:])
    options: dict[str, Any] = {"split": "ETTh1", "d_model": 128, "learning_rate": 3e-4, "epochs": 5, "patience": 5}
    some = train(context, "three", frame[["date", *names[:3]]], "itransformer", test=frame, columns=parts, **options)
    full = train(context, "seven", frame, "itransformer", columns=parts, **options)
    ratio = some["mse"][2] / full["mse"][2]
    return Measurement(
        shows=ratio <= 1.15,
        value=ratio,
        baseline=1.0,
        sentence=(
            f"trained on 3 of 7 series of ETTh1, the MSE on the 4 unseen ones is {some['mse'][2]:.3f}, against "
            f"{full['mse'][2]:.3f} when trained on all: {ratio:.3f}x (must be at most 1.15x); on the 3 seen ones "
            f"{some['mse'][1]:.3f} against {full['mse'][1]:.3f}"
        ),
        details={"trained_on_three": some, "trained_on_seven": full},
    )


@measures("itransformer", "series-as-tokens")
def series_as_tokens(context: Context) -> Measurement:
    """Same blocks, same width, same windows; tokens are series in one and time steps in the other."""
    from tokenry.assets import etth1

    frame = etth1()
    options: dict[str, Any] = {"split": "ETTh1", "epochs": 3, "learning_rate": 1e-3, "stride": 4, "test_stride": 4}
    net: dict[str, Any] = {"d_model": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "dropout": 0.0}
    results = {
        "repeat-last": train(context, "repeat-last", frame, "repeat-last", split="ETTh1", test_stride=4),
        "time-tokens": train(context, "time-tokens", frame, "time-tokens", **options, **net),
        "itransformer": train(context, "itransformer", frame, "itransformer", **options, **net),
        "iflowformer": train(context, "iflowformer", frame, "iflowformer", **options, **net),
        "time-tokens, scaled windows": train(
            context, "time-tokens-norm", frame, "time-tokens", instance_norm=True, **options, **net
        ),
    }
    error = {name: result["mse"][0] for name, result in results.items()}
    ours, usual, last = error["itransformer"], error["time-tokens"], error["repeat-last"]
    return Measurement(
        shows=ours < usual and ours < 0.5 * last,
        value=ours,
        baseline=usual,
        sentence=(
            f"ETTh1 96 to 96, width 64, 2 layers, three epochs, every fourth window: MSE {ours:.3f} with series as "
            f"tokens, {usual:.3f} with time steps as tokens (must be lower), {last:.3f} by repeating the last value (must "
            f"be under half); with time steps as tokens and windows scaled alike "
            f"{error['time-tokens, scaled windows']:.3f}; with flow attention {error['iflowformer']:.3f}"
        ),
        details=rounded(results),
        charts=(errors_chart(results),),
    )


@measures("itransformer", "exchange")
def exchange(context: Context) -> Measurement:
    """Exchange rates, where simpler is better."""
    frame, results = series(context, "exchange_rate"), {}
    runs: dict[str, dict[str, Any]] = {"repeat-last": {}, "rlinear": {}, "itransformer": {"d_model": 128}}
    for model, options in runs.items():
        results[model] = train(context, model, frame, model, split="exchange_rate", **options)
    mse, mae = results["itransformer"]["mse"][0], results["itransformer"]["mae"][0]
    return Measurement(
        shows=abs(mse - 0.086) <= 0.01 and abs(mae - 0.206) <= 0.01,
        value=mse,
        baseline=results["repeat-last"]["mse"][0],
        sentence=(
            f"Exchange 96 to 96: MSE {mse:.4f}, MAE {mae:.4f} (must be within 0.01 of the paper's 0.086 and 0.206); "
            f"repeating the last value has {results['repeat-last']['mse'][0]:.4f} and RLinear "
            f"{results['rlinear']['mse'][0]:.4f}: here the simpler ones are level or better"
        ),
        details=rounded(results),
        charts=(errors_chart(results),),
    )


@measures("itransformer", "weather-inverted")
def weather_inverted(context: Context) -> Measurement:
    """The sharpest row of the paper's Table 2."""
    frame = series(context, "weather")
    net = PAPER["weather"][0]
    error: dict[str, list[float]] = {}
    for model in ("time-tokens", "itransformer"):
        error[model] = [
            train(context, f"{model}/{h}", frame, model, split="weather", prediction_length=h, **net)["mse"][0]
            for h in HORIZONS
        ]
    ours, usual = mean(error["itransformer"]), mean(error["time-tokens"])
    return Measurement(
        shows=ours < usual and abs(ours - 0.258) <= 0.01,
        value=ours,
        baseline=usual,
        sentence=(
            f"Weather, mean of four horizons: MSE {ours:.3f} with series as tokens (must be within 0.01 of the paper's "
            f"0.258), {usual:.3f} with time steps as tokens (must be higher; the paper has 0.657)"
        ),
        details=error,
    )


@measures("itransformer", "tables")
def tables(context: Context) -> Measurement:
    """Six data sets, four horizons."""
    from tokenry.assets import etth1

    found: dict[str, list[float]] = {}
    for name, (net, _) in PAPER.items():
        frame = etth1() if name == "ETTh1" else series(context, name)
        found[name] = []
        for horizon in HORIZONS:
            wide = {"d_model": 512} if name == "ETTh1" and horizon >= 336 else {}
            short = {"epochs": 1} if name == "exchange_rate" and horizon == 336 else {}
            options: dict[str, Any] = {"split": name, "prediction_length": horizon, **net, **wide, **short}
            found[name].append(train(context, f"{name}/{horizon}", frame, "itransformer", **options)["mse"][0])
    gaps = [abs(a - b) for name, (_, paper) in PAPER.items() for a, b in zip(found[name], paper, strict=True)]
    return Measurement(
        shows=mean(gaps) < 0.01,
        value=mean(gaps),
        sentence=f"24 cells: mean distance to the paper's MSE {mean(gaps):.4f} (must be under 0.01), largest {max(gaps):.4f}",
        details=found,
    )


@measures("itransformer", "lookback")
def lookback(context: Context) -> Measurement:
    """A longer past on Weather."""
    frame, error = series(context, "weather"), {}
    for length in (48, 96, 192, 336, 720):
        options: dict[str, Any] = {"split": "weather", "context_length": length, **PAPER["weather"][0]}
        error[length] = train(context, f"lookback{length}", frame, "itransformer", **options)["mse"][0]
    steps = ", ".join(f"{length}: {mse:.3f}" for length, mse in error.items())
    return Measurement(
        shows=error[720] < error[96] < error[48],
        value=error[720],
        baseline=error[48],
        sentence=f"Weather, 96 steps ahead, MSE by steps of the past: {steps} (720 must be below 96, and 96 below 48)",
        details={str(length): mse for length, mse in error.items()},
    )
