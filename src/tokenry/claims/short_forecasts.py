"""Forecasts at a small budget: TSM2 beside its peers on any of the published data sets, at any horizon.

One rule for every model and data set: every k-th training window, k so that an epoch has at most 2,200 of them, and five
epochs, of which the best on the validation part is kept. Tests take every window. The settings were chosen on the validation
part of ETTh1 at 96 steps, once, and are used everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenry.claims.itransformer import series, train
from tokenry.claims.registry import Context

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["EPOCHS", "MODELS", "PAPER", "SEED", "WINDOWS", "frame_of", "short_forecast"]

EPOCHS = 5
WINDOWS = 2200  # of an epoch
SEED = 2023
PAST: dict[str, Any] = {"context_length": 512, "features": None, "batch_size": 16}
MODELS: dict[str, dict[str, Any]] = {
    "tsm2": {
        **PAST, "num_hidden_layers": 1, "d_model": 16, "patch_length": 32, "patch_stride": 32, "d_state": 4, "expand": 1.0,
        "learning_rate": 1e-3,
    },
    "itransformer": {"context_length": 96, "d_model": 128, "learning_rate": 1e-3},
    "dlinear": PAST,
    "rlinear": {**PAST, "learning_rate": 2e-3},
    "seasonal-naive": PAST,
    "repeat-last": PAST,
}  # fmt: skip
# MSE of TSM2 at 96, 192, 336 and 720 steps in the first version of the paper.
PAPER = {
    "ETTh1": (0.375, 0.398, 0.419, 0.422),
    "ETTh2": (0.253, 0.334, 0.347, 0.401),
    "ETTm1": (0.322, 0.349, 0.366, 0.407),
    "ETTm2": (0.173, 0.230, 0.279, 0.388),
    "exchange_rate": (0.163, 0.229, 0.383, 0.999),
    "weather": (0.161, 0.208, 0.252, 0.337),
}


def frame_of(context: Context, data: str) -> pd.DataFrame:
    """A data set by name: the embedded ETTh1, or one of the folder ``forecasting``."""
    from tokenry.assets import etth1

    return etth1() if data == "ETTh1" else series(context, data)


def short_forecast(
    context: Context,
    key: str,
    frame: pd.DataFrame,
    model: str,
    *,
    data: str,
    horizon: int = 96,
    seed: int = SEED,
    **own: Any,
) -> dict[str, Any]:
    """Train one model by the rule above and test it on every window: what ``claims.itransformer.train`` returns.

    Args:
        context: Of the claim or script.
        key: Begins the names of the steps.
        frame: The data set.
        model: A name of ``MODELS``.
        data: The data set's name, which says how it is split.
        horizon: Steps forecast.
        seed: Of starting weights, order and dropout; the context's is added.
        **own: Settings that differ from those in ``MODELS``.
    """
    from tokenry.series import split_rows, window_count

    options: dict[str, Any] = {"epochs": EPOCHS, "patience": EPOCHS, **MODELS[model], **own}
    past = options["context_length"]
    windows = window_count(len(split_rows(len(frame), data, past)["train"]), past, horizon)
    options = {"stride": -(-windows // WINDOWS), **options}
    seed += context.seed
    return train(context, key, frame, model, split=data, prediction_length=horizon, seed=seed, **options)
