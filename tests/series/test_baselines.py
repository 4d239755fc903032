"""The baselines against their equations, and the rules of the protocol."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenry.series import (
    LinearForecastConfig,
    LinearForPrediction,
    Scaler,
    SeasonalNaive,
    TimeTokenTransformer,
    TimeTokenTransformerConfig,
    Windows,
    order_columns,
    split_rows,
    time_features,
    window_count,
)


def slow_linear(model: LinearForPrediction, series: list[float]) -> torch.Tensor:
    """One series ``(L,)``."""
    x, variant = torch.tensor(series, dtype=torch.float64), model.config.variant
    if variant == "nlinear":
        return model.linear(x - x[-1]) + x[-1]
    if variant == "rlinear":
        sd = (((x - x.mean()) ** 2).mean() + 1e-5).sqrt()
        return model.linear((x - x.mean()) / sd) * sd + x.mean()
    half = model.config.kernel_size // 2
    padded = torch.cat([x[:1].expand(half), x, x[-1:].expand(half)])
    trend = torch.stack([padded[i : i + 2 * half + 1].mean() for i in range(len(x))])
    return model.trend(trend) + model.linear(x - trend)


@pytest.mark.parametrize("variant", ["rlinear", "nlinear", "dlinear"])
@given(length=st.integers(1, 12), horizon=st.integers(1, 5), kernel=st.sampled_from([1, 3, 7]))
def test_linear_matches_the_equations(variant, length, horizon, kernel):
    torch.manual_seed(length)
    config = LinearForecastConfig(variant=variant, context_length=length, prediction_length=horizon, kernel_size=kernel)
    model = LinearForPrediction(config).double()
    x = torch.randn(2, length, 3, dtype=torch.float64)
    with torch.no_grad():
        y = model(x).prediction_outputs
        for b in range(2):
            for n in range(3):
                torch.testing.assert_close(y[b, :, n], slow_linear(model, x[b, :, n].tolist()))


@given(length=st.integers(1, 10), season=st.integers(1, 10), horizon=st.integers(1, 25))
def test_seasonal_naive_repeats(length, season, horizon):
    x = torch.randn(2, length, 3)
    model = SeasonalNaive(horizon, season)
    if season > length:
        with pytest.raises(ValueError, match="fewer than one season"):
            model(x)
        return
    y = model(x).prediction_outputs
    for t in range(horizon):
        assert torch.equal(y[:, t], x[:, length - season + t % season])


def test_time_tokens_know_the_order_of_time_and_of_marks():
    torch.manual_seed(0)
    config = {"context_length": 8, "prediction_length": 3, "d_model": 12, "num_attention_heads": 2}
    for norm in (False, True):
        model = TimeTokenTransformer(
            TimeTokenTransformerConfig(**config, num_input_channels=2, instance_norm=norm)
        ).eval()
        x, marks = torch.randn(2, 8, 2), torch.rand(2, 8, 4)
        with torch.no_grad():
            plain = model(x).prediction_outputs
            assert not torch.allclose(plain, model(x.flip(1)).prediction_outputs)
            assert not torch.allclose(plain, model(x, marks).prediction_outputs)
    with pytest.raises(ValueError, match=r"must be \(batch, 8, 2\)"):
        model(torch.zeros(1, 8, 3))


@given(rows=st.integers(30, 3000), context=st.integers(1, 20))
def test_splits_cover_every_target_once(rows, context):
    parts = split_rows(rows, (0.7, 0.1, 0.2), context)
    targets = [row for name in ("val", "test") for row in list(parts[name])[context:]]
    assert targets == list(range(parts["train"].stop, rows))
    assert len(parts["train"]) == int(rows * 0.7)


def test_split_of_solar_leaves_rows_out():
    parts = split_rows(1009, "solar", 10)
    assert (parts["train"].stop, parts["val"].stop, parts["test"].start) == (706, 806, 1009 - 201 - 10)


@given(rows=st.integers(0, 40), context=st.integers(1, 9), horizon=st.integers(1, 9))
def test_windows_are_consecutive_rows(rows, context, horizon):
    values = torch.arange(rows * 2.0).reshape(rows, 2)
    windows = Windows(values, values + 0.5, context, horizon)
    assert len(windows) == window_count(rows, context, horizon) == max(rows - context - horizon + 1, 0)
    if not len(windows):
        with pytest.raises(ValueError, match="no window"):
            windows.batch([0])
        return
    i = len(windows) - 1
    batch = windows.batch([0, i])
    assert torch.equal(batch["past_values"][1], values[i : i + context])
    assert torch.equal(batch["future_values"][1], values[i + context : i + context + horizon])
    assert torch.equal(batch["past_time_features"][1], values[i : i + context] + 0.5)


def test_scaler_round_trip_and_constant_column():
    values = np.random.default_rng(0).normal(size=(50, 3)) * 4 + 2
    values[:, 1] = 7
    scaler = Scaler.fit(values)
    scaled = scaler.transform(values)
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(scaled.std(0), [1, 0, 1])
    np.testing.assert_allclose(scaler.inverse(scaled), values)


@pytest.mark.parametrize(("freq", "count"), [("h", 4), ("min", 5), ("D", 3), ("ME", 1)])
def test_time_features_stay_in_their_range(freq, count):
    found = time_features(pd.date_range("2019-12-25", periods=3000, freq="7h13min"), freq)
    assert found.shape == (3000, count)
    assert found.min() >= -0.5
    assert found.max() <= 0.5


def test_target_is_moved_last():
    assert list(order_columns(pd.DataFrame(columns=["date", "OT", "a"]))) == ["date", "a", "OT"]
    assert list(order_columns(pd.DataFrame(columns=["date", "b", "a"]))) == ["date", "b", "a"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearForecastConfig(variant="linear"), "'rlinear', 'nlinear' or 'dlinear'"),
        (lambda: LinearForecastConfig(kernel_size=4), "use 5"),
        (lambda: LinearForecastConfig(context_length=0), "at least 1"),
        (lambda: SeasonalNaive(0), "at least 1"),
        (lambda: split_rows(100, "ETTh1", 96), "needs 14400 rows"),
        (lambda: split_rows(100, (0.5, 0.5), 1), "three fractions"),
        (lambda: time_features(pd.DatetimeIndex([]), "s"), "freq must be one of"),
        (lambda: LinearForPrediction(LinearForecastConfig())(torch.zeros(1, 95, 2)), "context_length=96"),
    ],
)
def test_rejects(make, message):
    with pytest.raises(ValueError, match=message):
        make()
