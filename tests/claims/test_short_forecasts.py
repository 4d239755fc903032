"""The budget of short forecasts: the same number of windows and epochs, whatever the model and the data set."""

import pandas as pd
import pytest

from tokenry.claims import Context, short_forecasts
from tokenry.measure import Session
from tokenry.series import split_rows, window_count


@pytest.mark.parametrize(
    ("data", "rows"), [("ETTh1", 17_420), ("ETTm2", 69_680), ("exchange_rate", 7_588), ("weather", 52_696)]
)
@pytest.mark.parametrize("model", short_forecasts.MODELS)
@pytest.mark.parametrize("horizon", [96, 720])
def test_an_epoch_has_as_many_windows_as_allowed(monkeypatch, data, rows, model, horizon):
    asked = {}
    monkeypatch.setattr(short_forecasts, "train", lambda context, key, frame, model, **options: asked.update(options))
    context = Context("cpu", 1, Session(None, {}, quiet=True))
    short_forecasts.short_forecast(context, "row", pd.DataFrame(index=range(rows)), model, data=data, horizon=horizon)
    past = asked["context_length"]
    windows = window_count(len(split_rows(rows, data, past)["train"]), past, horizon)
    assert windows / asked["stride"] <= short_forecasts.WINDOWS
    assert asked["stride"] == 1 or windows / (asked["stride"] - 1) > short_forecasts.WINDOWS
    assert asked["epochs"] == asked["patience"] == short_forecasts.EPOCHS
    assert (asked["split"], asked["prediction_length"], asked["seed"]) == (data, horizon, short_forecasts.SEED + 1)


def test_settings_of_a_claim_come_before_the_rule(monkeypatch):
    asked = {}
    monkeypatch.setattr(short_forecasts, "train", lambda context, key, frame, model, **options: asked.update(options))
    context, frame = Context("cpu", 0, Session(None, {}, quiet=True)), pd.DataFrame(index=range(17_420))
    short_forecasts.short_forecast(context, "row", frame, "tsm2", data="ETTh1", stride=1, channel_mixer="mlp")
    assert (asked["stride"], asked["channel_mixer"]) == (1, "mlp")
