"""What every forecaster keeps: shapes, gradients, batches, bf16, compile, fit, resume, save, and plain errors."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch

from tokenry.series import Forecaster
from tokenry.series.models import MODELS

# name -> (card, settings that make it tiny)
FORECASTERS = {
    "itransformer": ("itransformer", {"d_model": 16, "num_attention_heads": 4}),
    "iflowformer": ("itransformer", {"d_model": 16, "num_attention_heads": 4}),
    "time-tokens": (None, {"d_model": 16, "num_attention_heads": 4}),
    "rlinear": (None, {}),
    "nlinear": (None, {}),
    "dlinear": (None, {"kernel_size": 5}),
    "patchtst": (None, {"patch_length": 4, "patch_stride": 4, "d_model": 8, "num_attention_heads": 2, "ffn_dim": 8}),
    "tsm2": ("mambamixer", {"patch_length": 4, "patch_stride": 4, "d_model": 8, "d_state": 4}),
    "seasonal-naive": (None, {"season_length": 4}),
    "repeat-last": (None, {}),
}
SETS = [
    pytest.param(name, marks=[] if card is None else pytest.mark.method(card))
    for name, (card, _) in FORECASTERS.items()
]
TRAINED = [p for p in SETS if p.values[0] not in ("seasonal-naive", "repeat-last")]
FREE = [p for p in SETS if p.values[0] not in ("time-tokens", "patchtst")]  # of the number of series
UNORDERED = [p for p in FREE if p.values[0] != "tsm2"]  # it reads the series one after the other
L, S = 16, 6
each = pytest.mark.parametrize("name", SETS)
each_trained = pytest.mark.parametrize("name", TRAINED)


def table(rows: int = 160, series: int = 3, seed: int = 0) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    steps = np.arange(rows)[:, None]
    values = np.sin(steps / 24 * 2 * np.pi + np.arange(series)) * 5 + random.normal(size=(rows, series)) + 20
    frame = pd.DataFrame(values, columns=[f"s{i}" for i in range(series)])
    frame.insert(0, "date", pd.date_range("2021-01-01", periods=rows, freq="h"))
    return frame


def forecaster(name: str, **options) -> Forecaster:
    options = {"context_length": L, "prediction_length": S, "epochs": 1} | options
    return Forecaster(name, **options, **FORECASTERS[name][1])


def model(name: str, series: int = 3) -> torch.nn.Module:
    torch.manual_seed(0)
    return forecaster(name).build_model(series).eval()


def call(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(past_values=x).prediction_outputs


def past(batch: int = 3, series: int = 3) -> torch.Tensor:
    return torch.randn(batch, L, series, generator=torch.Generator().manual_seed(batch * 10 + series)) * 2 + 1


def test_every_model_is_here():
    assert set(FORECASTERS) == set(MODELS)


@each
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("series", [1, 5])
def test_shape(name, batch, series):
    y = call(model(name, series), past(batch, series))
    assert y.shape == (batch, S, series)
    assert y.isfinite().all()


@each
def test_rows_of_a_batch_are_independent(name):
    module, x = model(name), past(4)
    with torch.no_grad():
        torch.testing.assert_close(call(module, x)[2:3], call(module, x[2:3]), rtol=1e-4, atol=1e-5)


@each
def test_deterministic(name):
    module, x = model(name), past()
    assert torch.equal(call(module, x), call(module, x))


@each_trained
def test_every_parameter_has_a_gradient(name):
    module = model(name).train()
    marks = {"past_time_features": torch.rand(3, L, 4)} if name == "time-tokens" else {}
    loss = module(past_values=past(), future_values=torch.randn(3, S, 3), **marks).loss
    loss.backward()
    trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    silent = [n for n, p in trained if p.grad is None or not p.grad.isfinite().all()]
    assert not silent


@each
def test_loss_is_the_mean_squared_error(name):
    module, x, y = model(name), past(), torch.randn(3, S, 3)
    with torch.no_grad():
        output = module(past_values=x, future_values=y)
    torch.testing.assert_close(output.loss, (output.prediction_outputs - y).square().mean())


@each
def test_finite_in_bfloat16(name):
    module, x = model(name), past()
    with torch.no_grad():
        exact = call(module, x)
        short = call(copy.deepcopy(module).bfloat16(), x.bfloat16())
    assert short.dtype == torch.bfloat16
    torch.testing.assert_close(short.float(), exact, rtol=0.1, atol=0.15)


@each
def test_compiles_without_a_break(name):
    if name == "patchtst":
        pytest.skip("transformers' PatchTST checks its input on the host; it is compiled with breaks")
    module, x = model(name), past()
    with torch.no_grad():
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        torch.testing.assert_close(call(compiled, x), call(module, x))


@pytest.mark.parametrize("name", UNORDERED)
@pytest.mark.parametrize("series", [1, 2, 7])
def test_permuting_series_permutes_the_forecast(name, series):
    module, x = model(name), past(2, series)
    order = torch.randperm(series, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(call(module, x)[..., order], call(module, x[..., order]), rtol=1e-4, atol=1e-5)


@each
def test_a_constant_series_stays_finite(name):
    x = past()
    x[..., 1] = 5.0
    assert call(model(name), x).isfinite().all()


@each
def test_fit_predict_save_load(name, tmp_path):
    frame = table()
    fitted = forecaster(name).fit(frame, quiet=True)
    forecast = fitted.predict()
    assert list(forecast) == list(frame)
    assert len(forecast) == S
    assert forecast["date"].iloc[0] == frame["date"].iloc[-1] + pd.Timedelta(hours=1)
    assert np.isfinite(forecast.drop(columns="date").to_numpy()).all()
    fitted.save(tmp_path)
    again = Forecaster.load(tmp_path)
    pd.testing.assert_frame_equal(again.predict(), forecast)
    assert len(again.predict(2)) == 2
    pd.testing.assert_frame_equal(again.predict(2 * S + 1)[:S], forecast)  # a longer one begins alike
    errors = fitted.evaluate(frame, "val")
    assert errors["windows"] == 48 - L - S + 1
    assert errors["mse"] == pytest.approx(np.mean(errors["mse_by_step"]))


@each_trained
def test_training_lowers_the_error(name):
    frame = table(200)
    fitted = forecaster(name, epochs=3, learning_rate=3e-3, batch_size=16).fit(frame, quiet=True)
    assert fitted.history[-1]["train"] < fitted.history[0]["train"]
    assert [set(row) for row in fitted.history] == [{"epoch", "train", "val", "seconds"}] * len(fitted.history)


@each_trained
def test_a_killed_run_goes_on_to_the_same_result(name, tmp_path):
    frame = table()
    whole = forecaster(name, epochs=3).fit(frame, quiet=True)
    part = forecaster(name, epochs=3).fit(frame, folder=tmp_path, until=1, quiet=True)
    assert len(part.history) == 1
    assert not part.stopped
    rest = forecaster(name, epochs=3).fit(frame, folder=tmp_path, quiet=True)
    assert [row["val"] for row in rest.history] == [row["val"] for row in whole.history]
    pd.testing.assert_frame_equal(rest.predict(), whole.predict())
    other = forecaster(name, epochs=3, seed=5).fit(frame, folder=tmp_path, until=1, quiet=True)
    assert other.history[0]["val"] != whole.history[0]["val"]  # another run does not take this one's state


@each
def test_leaves_the_callers_random_numbers_alone(name):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    forecaster(name).fit(table(), quiet=True)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("name", FREE)
def test_takes_other_series_than_it_was_fitted_to(name):
    fitted = forecaster(name).fit(table(series=2), quiet=True)
    forecast = fitted.predict(frame=table(series=5, seed=1))
    assert forecast.shape == (S, 6)
    assert fitted.evaluate(table(series=5), "val", columns=["s4"])["mse"] >= 0


@pytest.mark.parametrize("name", ["time-tokens", "patchtst"])
def test_refuses_other_series_than_it_was_fitted_to(name):
    fitted = forecaster(name).fit(table(series=2), quiet=True)
    with pytest.raises(ValueError, match="takes exactly these"):
        fitted.predict(frame=table(series=3))


@pytest.mark.method("itransformer")
def test_explain():
    frame = table()
    fitted = forecaster("itransformer").fit(frame, quiet=True)
    names = ["s0", "s1", "s2", "time:hour", "time:weekday", "time:day", "time:dayofyear"]
    for options in ({}, {"layer": 1}, {"frame": frame, "windows": 4}):
        found = fitted.explain(**options)
        assert list(found) == list(found.index) == names
        np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    with pytest.raises(ValueError, match="layer must be"):
        fitted.explain(layer=2)


@pytest.mark.parametrize("name", ["iflowformer", "time-tokens", "rlinear", "patchtst", "repeat-last"])
def test_explain_says_when_there_is_no_map(name):
    with pytest.raises(ValueError, match="no map between series"):
        forecaster(name).fit(table(), quiet=True).explain()


def test_a_module_of_your_own(tmp_path):
    from tokenry.series import LinearForecastConfig, LinearForPrediction

    def make(series: int) -> LinearForPrediction:
        return LinearForPrediction(LinearForecastConfig(context_length=L, prediction_length=S))

    own = Forecaster(make, context_length=L, prediction_length=S, epochs=1).fit(table(), quiet=True)
    own.save(tmp_path)
    pd.testing.assert_frame_equal(Forecaster.load(tmp_path, model=make).predict(), own.predict())
    with pytest.raises(ValueError, match="give one of the same shape"):
        Forecaster.load(tmp_path)


def test_bfloat16_autocast_and_index_of_dates():
    frame = table().set_index("date")
    fitted = forecaster("itransformer", dtype="bfloat16").fit(frame, quiet=True)
    assert fitted.predict()["date"].iloc[0] == frame.index[-1] + pd.Timedelta(hours=1)


@pytest.mark.parametrize(("freq", "season"), [("h", 24), ("15min", 96), ("D", 7), ("B", 5), ("W", 52), ("MS", 12)])
def test_calendar(freq, season):
    frame = table(120)
    frame["date"] = pd.date_range("2015-01-01", periods=120, freq=freq)
    expected = pd.date_range("2015-01-01", periods=120 + S, freq=freq)[120:]
    fitted = forecaster("rlinear").fit(frame, quiet=True)
    assert fitted._season == season
    assert list(fitted.predict()["date"]) == list(expected)


def broken(change) -> pd.DataFrame:
    frame = table()
    return change(frame) if callable(change) else frame


def with_nan(frame):
    frame.loc[7, "s1"] = np.nan
    return frame


def with_words(frame):
    frame["name"] = "x"
    return frame


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_nan, "first in column 's1', row 7"),
        (with_words, "columns name are not numeric"),
        (lambda f: f.drop(index=50), "not evenly spaced: most steps are 0 days 01:00:00, row 50"),
        (lambda f: f[::-1], "not evenly spaced"),
        (lambda f: pd.concat([f, f[-1:]]), "not evenly spaced"),
        (lambda f: f[:26], "too few rows: the table has 26"),
        (lambda f: f[["date"]], "nothing to forecast"),
        (lambda f: f.drop(columns="date"), "no column 'date'"),
        (lambda f: f.to_numpy(), "expected a pandas DataFrame"),
    ],
)
def test_rejects_table(change, message):
    with pytest.raises(ValueError, match=message):
        forecaster("rlinear").fit(broken(change), quiet=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "itransfomer"}, "known: itransformer"),
        ({"context_length": 0}, "context_length must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"features": "hour"}, "features must be one of"),
        ({"d_modle": 3}, "no setting d_modle"),
        ({"dtype": "float16"}, "'float32' or 'bfloat16'"),
        ({"model": torch.nn.Identity(), "d_model": 3}, "takes no settings"),
    ],
)
def test_rejects_options(options, message):
    with pytest.raises(ValueError, match=message):
        Forecaster(**options)


def test_rejects_use_before_fit_and_short_history(tmp_path):
    with pytest.raises(ValueError, match="call fit"):
        forecaster("rlinear").predict()
    fitted = forecaster("rlinear").fit(table(), quiet=True)
    with pytest.raises(ValueError, match="context_length=16"):
        fitted.predict(frame=table(10))
    with pytest.raises(ValueError, match="horizon must be"):
        fitted.predict(0)
    with pytest.raises(ValueError, match="no window"):
        fitted.evaluate(table(), "test")
    with pytest.raises(ValueError, match=r"no forecaster\.json"):
        Forecaster.load(tmp_path)
    with pytest.raises(ValueError, match="fractions"):
        forecaster("rlinear", split=(0.5, 0.7, 0.1)).fit(table(), quiet=True)


def test_rejects_csv(tmp_path):
    from tokenry.series import read_frame

    with pytest.raises(ValueError, match="no file"):
        read_frame(tmp_path / "absent.csv")
    (tmp_path / "numbers.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column of dates"):
        read_frame(tmp_path / "numbers.csv")
    (tmp_path / "words.csv").write_text("date,b\nyesterday,2\n")
    with pytest.raises(ValueError, match="does not hold dates"):
        read_frame(tmp_path / "words.csv")
    table(5).to_csv(tmp_path / "good.csv", index=False)
    assert len(read_frame(tmp_path / "good.csv")) == 5
