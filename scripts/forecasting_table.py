"""Measure the rows of docs/forecasting.md and print the page.

    TOKENRY_DATA=data python scripts/forecasting_table.py --out run > docs/forecasting.md
    TOKENRY_DATA=data python scripts/forecasting_table.py --out run --data ETTh1 --horizons 96

Six data sets, the shortest horizon of all of them first. A killed run goes on after its last epoch when called again with the
same --out, and --minutes ends it between two models. Rows not measured with every model so far are named below the table. The
independent implementation's figures are read from ``tsm2-replication/results.csv`` in the same folder of data, where it is.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import torch

from tokenry.assets import external
from tokenry.claims import Context
from tokenry.claims.itransformer import HORIZONS
from tokenry.claims.short_forecasts import EPOCHS, MODELS, PAPER, SEED, WINDOWS, frame_of, short_forecast
from tokenry.measure import Session, describe_machine, package_versions

TITLES = {
    "tsm2": "[TSM2](methods/mambamixer.md)",
    "itransformer": "[iTransformer](methods/itransformer.md), past of 96",
    "dlinear": "DLinear",
    "rlinear": "RLinear",
    "seasonal-naive": "last season",
    "repeat-last": "last value",
}
INTRODUCTION = f"""# Forecasts of TSM2 and its peers

Test MSE / MAE on six public data sets, on values scaled by the mean and deviation of the training rows: the published splits, every
test window, the same ones for all models. Lower is better; the lowest MSE among the models measured here is bold.

The training is short, by one rule for all models: every k-th training window, with the smallest k that leaves at most {WINDOWS:,}
an epoch, {EPOCHS} epochs, the one kept that is best on every k-th validation window, one seed. The settings of every model were
chosen on the validation part of ETTh1 at 96 steps and never changed. TSM2 has one layer of width 16 and patches of 32; TSM2 and the linear
models read 512 steps, iTransformer 96 as in its paper, with width 128 and two layers everywhere. So a row says what a model reaches in
minutes on one core, not what it can reach: the last two columns are the MSE of TSM2 in its paper (first version,
full training) and in an independent implementation.
"""


def measure(session: Session, context: Context, rows: list[tuple[str, int]], minutes: float) -> None:
    """Train and test what is not measured yet, row by row."""
    began, frames = time.monotonic(), {}
    for data, horizon in rows:
        for model in MODELS:
            key = f"{data}/{horizon}/{model}"
            if session.done(f"{key}/test"):
                continue
            if time.monotonic() - began > 60 * minutes:
                return
            if data not in frames:
                frames[data] = frame_of(context, data)
            short_forecast(context, key, frames[data], model, data=data, horizon=horizon)


def found(session: Session, data: str, horizon: int) -> dict[str, dict[str, Any]]:
    """What is measured of a row, by model."""
    keys = {model: f"{data}/{horizon}/{model}/test" for model in MODELS}
    return {model: session.step(key, dict) for model, key in keys.items() if session.done(key)}


def replication() -> dict[tuple[str, int], float]:
    """MSE of the independent implementation by data set and horizon."""
    folder = external("tsm2-replication")
    if folder is None:
        return {}
    with (folder / "results.csv").open(encoding="utf-8") as file:
        return {(row["Dataset"], int(row["Horizon"])): float(row["MSE_Ours"]) for row in csv.DictReader(file)}


def page(session: Session) -> str:
    """The page in Markdown."""
    lines = [
        INTRODUCTION,
        "| data | steps ahead | " + " | ".join(TITLES.values()) + " | TSM2, paper | TSM2, independent |",
    ]
    lines.append("|---" * (len(TITLES) + 4) + "|")
    others, missing, wins, rows = replication(), [], 0, 0
    for data, paper in PAPER.items():
        for horizon, figure in zip(HORIZONS, paper, strict=True):
            row = found(session, data, horizon)
            if len(row) < len(MODELS):
                missing.append(f"{data} at {horizon}")
                continue
            mse = {model: round(row[model]["mse"][0], 3) for model in TITLES}
            least = min(mse.values())
            rows, wins = rows + 1, wins + (mse["tsm2"] == least)
            cells = []
            for model, error in mse.items():
                shown = f"**{error:.3f}**" if error == least else f"{error:.3f}"
                cells.append(f"{shown} / {row[model]['mae'][0]:.3f}")
            other = others.get((data, horizon))
            cells += [f"{figure:.3f}", "" if other is None else f"{other:.3f}"]
            lines.append(f"| {data} | {horizon} | " + " | ".join(cells) + " |")
    lines += ["", f"TSM2 has the lowest MSE, or shares it, in {wins} of {rows} rows."]
    if missing:
        lines.append(f"Not measured: {', '.join(missing)}.")
    machine, versions = describe_machine("cpu"), package_versions()
    lines.append(
        f"\n*Made by `scripts/forecasting_table.py`, seed {SEED}, on one core of {machine.processor}, PyTorch {versions['torch']}.*"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--data", nargs="+", choices=PAPER, default=list(PAPER))
    parser.add_argument("--horizons", nargs="+", type=int, choices=HORIZONS, default=list(HORIZONS))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further model after so many")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [(data, horizon) for horizon in options.horizons for data in options.data]
    with Session(options.out, {"epochs": EPOCHS, "windows": WINDOWS, "seed": SEED, "models": MODELS}) as session:
        measure(session, Context("cpu", 0, session), rows, options.minutes)
        text = page(session)
    print(text)


if __name__ == "__main__":
    main()
