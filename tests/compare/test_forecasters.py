"""`compare forecasters`: tiny runs, the second call does no work, plain errors."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from tokenry.compare import compare
from tokenry.series import Forecaster

SMALL = {"context_length": 24, "prediction_length": 8, "epochs": 1, "stride": 8, "width": 16, "variates": [2, 4]}
METHODS = ["itransformer", "rlinear"]


@pytest.fixture
def csv(tmp_path):
    steps = np.arange(400)[:, None]
    values = np.sin(steps / 24 * 2 * np.pi + np.arange(3)) + np.random.default_rng(0).normal(size=(400, 3)) * 0.1
    frame = pd.DataFrame(values, columns=["a", "b", "c"])
    frame.insert(0, "date", pd.date_range("2021-01-01", periods=400, freq="h"))
    frame.to_csv(tmp_path / "own.csv", index=False)
    return tmp_path / "own.csv"


def run(csv, **options):
    settings = SMALL | options.pop("settings", {})
    return compare("forecasters", data=str(csv), settings=settings, quiet=True, repeats=2, **options)


@pytest.mark.method("itransformer")
def test_rows_sweeps_notes_and_resume(csv, tmp_path, monkeypatch):
    result = run(csv, methods=METHODS, out=tmp_path / "run")
    rows = result.outcome.rows
    assert [row["method"] for row in rows] == ["seasonal-naive", "itransformer", "rlinear"]
    assert rows[0]["ratio"] == 1
    assert rows[0]["epoch_seconds"] is None
    assert all(row["mse"] > 0 and row["predict_ms"] > 0 for row in rows)
    along, growth = result.outcome.sweeps
    assert set(along.points) == {"seasonal-naive", "itransformer", "rlinear"}
    assert set(growth.exponents) == {"itransformer", "rlinear"}
    assert any("published tables take every one" in note for note in result.outcome.notes)
    assert "looked at" in result.outcome.examples["What iTransformer looked at"]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["kind"] == "forecasters"

    def never(*_, **__):
        raise AssertionError("the second run trains again")

    monkeypatch.setattr(Forecaster, "fit", never)
    again = run(csv, methods=METHODS, out=tmp_path / "run")
    assert again.outcome == result.outcome


def test_every_method_runs(csv):
    from tokenry.compare.kinds.forecasters import METHODS as ALL
    from tokenry.series.models import MODELS

    assert set(ALL) == set(MODELS)
    result = run(csv, methods=list(ALL))
    assert len(result.outcome.rows) == len(ALL)


def test_own_forecaster(csv, tmp_path):
    from tokenry.series import read_frame

    own = Forecaster("rlinear", context_length=24, prediction_length=8, epochs=1, stride=8)
    own.fit(read_frame(csv), quiet=True).save(tmp_path / "own")
    result = run(csv, methods=["repeat-last"], model=str(tmp_path / "own"))
    assert result.outcome.rows[-1]["method"] == "your model"
    with pytest.raises(ValueError, match="context_length=24"):
        run(csv, methods=["repeat-last"], model=str(tmp_path / "own"), settings={"context_length": 30})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["arima"]}, "no method is called 'arima'"),
        ({"settings": {"horizon": 3}}, "no setting 'horizon'"),
        ({"settings": {"prediction_length": 300}}, "one window takes 24"),
        ({"settings": {"context_length": 12}}, "season of this table is 24"),
        ({"settings": {"width": 30}}, "use d_model=32"),
        ({"settings": {"split": "0.5,0.6,0.1"}}, "sum at most 1"),
        ({"settings": {"variates": [0]}}, "variates"),
        ({"settings": {"epochs": 0}}, "epochs must be at least 1, got 0"),
        ({"dtype": "float16"}, "not float16"),
        ({"model": "/nowhere"}, "holds no forecaster"),
    ],
)
def test_rejects(csv, options, message):
    with pytest.raises(ValueError, match=message):
        run(csv, **({"methods": METHODS} | options))


def test_rejects_table(csv, tmp_path):
    with pytest.raises(ValueError, match="no file"):
        run(tmp_path / "absent.csv")
    frame = pd.read_csv(csv)
    frame.loc[5, "b"] = None
    frame.to_csv(tmp_path / "gap.csv", index=False)
    with pytest.raises(ValueError, match="first in column 'b', row 5"):
        run(tmp_path / "gap.csv")
    frame.drop(index=9).assign(b=0.0).to_csv(tmp_path / "uneven.csv", index=False)
    with pytest.raises(ValueError, match="not evenly spaced"):
        run(tmp_path / "uneven.csv")
