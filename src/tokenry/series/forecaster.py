"""Fit any forecasting model of the family to a table, and forecast, explain, test, save and load it.

How it is trained says ``training.py``; how a table becomes windows, ``windows.py``.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenry.series.models import MODELS
from tokenry.series.training import Recipe, Training, WindowModel, seeded
from tokenry.series.windows import (
    FEATURE_SETS,
    Scaler,
    Windows,
    check_frame,
    season_of,
    split_rows,
    step_of,
    time_features,
    window_count,
)

__all__ = ["Forecaster"]


class Forecaster:
    """A forecasting model with ``fit`` and ``predict`` for tables.

    A table is a ``DataFrame`` with evenly spaced dates (a column, or the index) and one numeric column per series.

    Args:
        model: A name of ``MODELS``; or a module, or a function that makes one from the number of series, which is
            called like ``ITransformerForPrediction``.
        context_length: Rows that a forecast is made from, L. Default 96 (the paper's tables).
        prediction_length: Rows forecast at once, S. Default 96.
        split: Rows for training, validation and test: three fractions or a data set's name (see ``split_rows``).
            Default: the last fifth validates and nothing is held out for a test.
        features: Time features given to models that take them: ``"h"``, ``"min"``, ``"D"``, ``"ME"`` or None.
            Default ``"h"`` (paper, for all intervals).
        epochs: Most epochs. Default 10 (paper).
        patience: Epochs without a better validation error before it stops. Default 3 (paper).
        learning_rate: Adam's first step size. None: the model's (1e-4 for iTransformer: paper).
        batch_size: Default 32 (paper).
        stride: Train and validate on every ``stride``-th window only, for short runs. Default 1.
        seed: Of starting weights, order and dropout.
        device: Torch device.
        dtype: ``"float32"``, or ``"bfloat16"`` for autocast.
        compile: Run the model through ``torch.compile``.
        date_column: Name of the column of dates.
        **settings: Settings of the model, for example ``d_model=128``.

    Raises:
        ValueError: An unknown model, or a value out of range.

    Example:
        >>> from tokenry.assets import etth1
        >>> forecaster = Forecaster("rlinear", context_length=48, prediction_length=24, epochs=1, stride=8)
        >>> forecaster.fit(etth1()[:2000], quiet=True).predict().shape
        (24, 8)
    """

    def __init__(
        self,
        model: str | nn.Module | Callable[[int], nn.Module] = "itransformer",
        *,
        context_length: int = 96,
        prediction_length: int = 96,
        split: str | Sequence[float] = (0.8, 0.2, 0.0),
        features: str | None = "h",
        epochs: int = 10,
        patience: int = 3,
        learning_rate: float | None = None,
        batch_size: int = 32,
        stride: int = 1,
        seed: int = 2023,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16"] = "float32",
        compile: bool = False,
        date_column: str = "date",
        **settings: Any,
    ) -> None:
        if isinstance(model, str) and model not in MODELS:
            raise ValueError(f"no forecasting model is called {model!r}; known: {', '.join(MODELS)}; or give a module")
        if settings and not isinstance(model, str):
            raise ValueError(f"{', '.join(settings)}: a model that you made yourself takes no settings here")
        counts = {"context_length": context_length, "prediction_length": prediction_length, "epochs": epochs}
        for name, value in {**counts, "patience": patience, "batch_size": batch_size, "stride": stride}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if learning_rate is not None and not learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {learning_rate}")
        if features is not None and features not in FEATURE_SETS:
            raise ValueError(f"features must be one of {', '.join(FEATURE_SETS)} or None, got {features!r}")
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
        self.kind = model if isinstance(model, str) else None
        self._given = None if isinstance(model, str) else model
        self.context_length, self.prediction_length = context_length, prediction_length
        self.split = split if isinstance(split, str) else tuple(split)
        self.features, self.epochs, self.patience = features, epochs, patience
        default = MODELS[self.kind].learning_rate if self.kind else 1e-4
        self.learning_rate = default if learning_rate is None else learning_rate
        self.batch_size, self.stride, self.seed = batch_size, stride, seed
        self.device, self.dtype, self.compile, self.date_column = device, dtype, compile, date_column
        self.settings = settings
        self.model: nn.Module | None = None
        self.scaler = Scaler(np.zeros(0), np.ones(0))
        self.columns: list[str] = []
        self.history: list[dict[str, float]] = []
        self.stopped = False
        self._tail = pd.DataFrame()
        self._season = 1
        if self.kind:  # a wrong setting shows now, before any data is read
            with seeded(seed, device), torch.device("meta"):
                self.build_model(variates=1)

    # ------------------------------------------------------------------ fitting

    def fit(
        self, frame: pd.DataFrame, *, folder: Path | str | None = None, until: int | None = None, quiet: bool = False
    ) -> Forecaster:
        """Train on a table.

        Args:
            frame: The table.
            folder: Where the state is written after each epoch. The same call with the same folder goes on
                where a killed one stopped; another table or setting starts anew.
            until: Stop (for now) after this epoch; with a folder, a later call goes on.
            quiet: No progress bar.

        Returns:
            Itself, holding the weights of the best epoch so far.

        Raises:
            ValueError: A table that cannot be used (see ``check_frame``), too few rows, or errors that are no longer
                finite.
        """
        dates, table = check_frame(frame, self.date_column)
        rows = split_rows(len(table), self.split, self.context_length)
        self._enough(rows, len(table))
        values = table.to_numpy()
        self.columns = [str(name) for name in table]
        self.scaler = Scaler.fit(values[rows["train"].start : rows["train"].stop])
        self._season = season_of(dates) if len(dates) > 2 else 1
        tail = table[-self.context_length :].copy()
        tail.insert(0, self.date_column, dates[-self.context_length :])
        self._tail = tail.reset_index(drop=True)
        self.history, self.stopped = [], False
        with seeded(self.seed, self.device):
            self.model = self.build_model(variates=table.shape[1]).to(self.device)
        if not any(p.requires_grad for p in self.model.parameters()):
            self.stopped = True
            return self
        model = WindowModel(self.model, self.device, self.dtype, self.compile)
        recipe = Recipe(self.epochs, self.patience, self.learning_rate, self.batch_size, self.stride, self.seed)
        path = None if folder is None else Path(folder) / f"training-{self._fingerprint(table)}.pt"
        training = Training(model, recipe, path)
        self.history = training.history
        train, valid = (self._windows(values, dates, rows[name], self.scaler) for name in ("train", "val"))
        training.run(train, valid, self.epochs if until is None else min(until, self.epochs), quiet=quiet)
        self.stopped = training.stopped
        return self

    # ------------------------------------------------------------------ using

    def predict(self, horizon: int | None = None, frame: pd.DataFrame | None = None) -> pd.DataFrame:
        """Forecast the rows after a table.

        Args:
            horizon: Rows. Default ``prediction_length``. More than that is forecast piece by piece, each
                from the one before, and gets worse accordingly.
            frame: The table to go on from, at least ``context_length`` rows. Default: the one it was fitted to. For
                models that allow it (iTransformer, the linear ones) it may have other series, in any number.

        Returns:
            A table like the one given: dates, then one column per series in its own unit.

        Raises:
            ValueError: Not fitted, a table that cannot be used, or other series than the model can take.
        """
        horizon = self.prediction_length if horizon is None else horizon
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1 row, got {horizon}")
        model = self._window_model()
        dates, table = check_frame(self._tail if frame is None else frame, self.date_column)
        self._known(table, len(table))
        scaler = self._scaler_of(table, table.to_numpy())
        values = scaler.transform(table.to_numpy())[-self.context_length :]
        times = dates[-self.context_length :]
        future = pd.date_range(dates[-1], periods=horizon + 1, freq=step_of(dates))[1:]
        forecast = np.zeros((0, values.shape[1]))
        while len(forecast) < horizon:
            batch = self._batch(values[-self.context_length :], times[-self.context_length :])
            with torch.no_grad():
                piece = model.forecast(batch)[0].cpu().numpy()
            known = len(forecast) + len(piece)
            forecast = np.concatenate([forecast, piece])
            values = np.concatenate([values, piece])
            times = pd.DatetimeIndex(times.append(future[known - len(piece) : known]))
        found = pd.DataFrame(scaler.inverse(forecast[:horizon]), columns=table.columns)
        found.insert(0, self.date_column, future)
        return found

    def explain(self, frame: pd.DataFrame | None = None, *, layer: int | None = None, windows: int = 1) -> pd.DataFrame:
        """Which series was looked at for which: the attention between variates, mean over heads.

        Args:
            frame: The table, of which the last windows are used. Default: the one it was fitted to (its last window).
            layer: One layer, counted from 0. Default: the mean over layers.
            windows: How many of the last windows to average.

        Returns:
            A square table: row = the series forecast, column = the series (or time feature) looked at; rows sum to 1.

        Raises:
            ValueError: The model forms no such map.
        """
        model = self._fitted().eval()
        parameters = inspect.signature(model.forward).parameters
        over_variates = getattr(model, "any_variates", False) and "output_attentions" in parameters
        if not over_variates or getattr(getattr(model, "config", None), "attention", "full") != "full":
            raise ValueError(f"{self.kind or type(model).__name__} has no map between series; fit model='itransformer'")
        dates, table = check_frame(self._tail if frame is None else frame, self.date_column)
        self._known(table, len(table))
        windows = max(1, min(windows, len(table) - self.context_length + 1))
        values = self._scaler_of(table, table.to_numpy()).transform(table.to_numpy())
        pieces = [slice(len(table) - self.context_length - i, len(table) - i) for i in range(windows)]
        batches = [self._batch(values[piece], dates[piece]) for piece in pieces]
        batch = {name: torch.cat([one[name] for one in batches]) for name in batches[0]}
        with torch.no_grad(), self._window_model().autocast():
            maps = torch.stack(model(**batch, output_attentions=True).attentions)  # (layers, B, H, T, T)
        if layer is not None:
            if not 0 <= layer < len(maps):
                raise ValueError(f"layer must be from 0 to {len(maps) - 1}, got {layer}")
            maps = maps[layer : layer + 1]
        names = [str(name) for name in table] + [f"time:{name}" for name in self._feature_names()]
        return pd.DataFrame(maps.float().mean((0, 1, 2)).cpu().numpy(), index=names, columns=names)

    def evaluate(
        self, frame: pd.DataFrame, split: str | None = "test", *, columns: Sequence[str] | None = None, stride: int = 1
    ) -> dict[str, Any]:
        """Errors on scaled values over every window of one part of a table.

        Args:
            frame: The whole table (its training rows fix the split, and the scale of series unknown so far).
            split: ``"train"``, ``"val"``, ``"test"``, or None for every row.
            columns: Average over these series only; all are given to the model.
            stride: Use every ``stride``-th window, for short runs. Default 1: every window counts.

        Returns:
            ``mse``, ``mae``, ``windows``, ``mse_by_step`` (S numbers).

        Raises:
            ValueError: No window in that part.
        """
        self._fitted()
        dates, table = check_frame(frame, self.date_column)
        self._known(table, len(table))
        rows = split_rows(len(table), self.split, self.context_length)
        if split is not None and split not in rows:
            raise ValueError(f"split must be one of {', '.join(rows)} or None, got {split!r}")
        block = range(len(table)) if split is None else rows[split]
        values = table.to_numpy()
        scaler = self._scaler_of(table, values[rows["train"].start : rows["train"].stop])
        windows = self._windows(values, dates, block, scaler)
        if len(windows) == 0:
            raise ValueError(
                f"no window of {self.context_length} + {self.prediction_length} rows in the part {split!r} of "
                f"{len(block)} rows (split {self.split}); give a longer table or another split"
            )
        names = [str(name) for name in table]
        if columns is not None and not set(columns) <= set(names):
            raise ValueError(f"no series {', '.join(set(columns) - set(names))}; there are {', '.join(names)}")
        chosen = None if columns is None else [names.index(name) for name in columns]
        return self._window_model().errors(windows, chosen, stride)

    @property
    def num_parameters(self) -> int:
        """Trained numbers of the fitted model."""
        return sum(p.numel() for p in self._fitted().parameters())

    # ------------------------------------------------------------------ keeping

    def save(self, folder: Path | str) -> None:
        """Write ``forecaster.json`` and ``model.safetensors`` (and ``config.json`` for ``from_pretrained``)."""
        model, folder = self._fitted(), Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(folder)
        else:
            save_file(
                {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors"
            )
        tail = self._tail.astype({self.date_column: str})
        state = {
            "options": self._options(),
            "settings": self.settings,
            "columns": self.columns,
            "mean": self.scaler.mean.tolist(),
            "scale": self.scaler.scale.tolist(),
            "season": self._season,
            "history": self.history,
            "tail": tail.to_dict("list"),
        }
        (folder / "forecaster.json").write_text(json.dumps(state, indent=1) + "\n", "utf-8")

    @classmethod
    def load(
        cls, folder: Path | str, *, model: nn.Module | Callable[[int], nn.Module] | None = None, device: str = "cpu"
    ) -> Forecaster:
        """Read what ``save`` wrote.

        Args:
            folder: The folder.
            model: Needed when the forecaster was made from a module of your own: one of the same shape.
            device: Torch device.

        Raises:
            ValueError: No forecaster in the folder, or ``model`` missing.
        """
        path = Path(folder) / "forecaster.json"
        if not path.is_file():
            raise ValueError(f"{folder} holds no forecaster.json; give a folder that Forecaster.save wrote")
        state = json.loads(path.read_text("utf-8"))
        options: dict[str, Any] = {**state["options"], "device": device}
        chosen = options.pop("model") or model
        if chosen is None:
            raise ValueError("this forecaster holds a model of your own: give one of the same shape as model=")
        found = cls(chosen, **options, **state["settings"])
        found.columns, found.history, found._season = state["columns"], state["history"], state["season"]
        found.scaler = Scaler(np.asarray(state["mean"]), np.asarray(state["scale"]))
        tail = pd.DataFrame(state["tail"])
        tail[found.date_column] = pd.to_datetime(tail[found.date_column])
        found._tail, found.stopped = tail, True
        found.model = found.build_model(variates=len(found.columns)).to(device)
        found.model.load_state_dict(load_file(Path(folder) / "model.safetensors", device=device))
        found.model.eval()
        return found

    def _options(self) -> dict[str, Any]:
        names = (
            "context_length", "prediction_length", "split", "features", "epochs", "patience", "learning_rate",
            "batch_size", "stride", "seed", "dtype", "compile", "date_column",
        )  # fmt: skip
        return {"model": self.kind, **{name: getattr(self, name) for name in names}}

    def _fingerprint(self, table: pd.DataFrame) -> str:
        own = getattr(self._given, "__qualname__", type(self._given).__name__)
        text = json.dumps([self._options(), self.settings, list(map(str, table)), own], default=str)
        return hashlib.sha256(text.encode() + table.to_numpy().tobytes()).hexdigest()[:12]

    # ------------------------------------------------------------------ pieces

    def build_model(self, variates: int) -> nn.Module:
        """A new, untrained model for that many series."""
        if isinstance(self._given, nn.Module):
            return self._given
        if self._given is not None:
            return self._given(variates)
        given = {
            "context_length": self.context_length,
            "prediction_length": self.prediction_length,
            "num_input_channels": variates,
            "num_time_features": max(len(self._feature_names()), 1),
            "season_length": min(self._season, self.context_length),
        }
        return MODELS[str(self.kind)].build(given, self.settings)

    def training_windows(self, rows: int) -> range:
        """Numbers of the windows that a table of that many rows is trained on (before ``stride``)."""
        block = split_rows(rows, self.split, self.context_length)["train"]
        return range(window_count(len(block), self.context_length, self.prediction_length))

    def _fitted(self) -> nn.Module:
        if self.model is None:
            raise ValueError("this forecaster is not fitted yet: call fit(frame) first, or Forecaster.load(folder)")
        return self.model

    def _window_model(self) -> WindowModel:
        """The fitted model, ready to forecast."""
        return WindowModel(self._fitted().eval(), self.device, self.dtype)

    def _feature_names(self) -> tuple[str, ...]:
        return () if self.features is None else FEATURE_SETS[self.features]

    def _windows(self, values: np.ndarray, dates: pd.DatetimeIndex, rows: range, scaler: Scaler) -> Windows:
        block = slice(rows.start, rows.stop)
        scaled = torch.as_tensor(scaler.transform(values[block]), dtype=torch.float32, device=self.device)
        marks = None
        if self.features is not None:
            marks = torch.as_tensor(time_features(dates[block], self.features), device=self.device)
        return Windows(scaled, marks, self.context_length, self.prediction_length)

    def _batch(self, values: np.ndarray, dates: pd.DatetimeIndex) -> dict[str, Tensor]:
        """One window ``(L, N)`` of scaled values as keywords of the model."""
        batch = {"past_values": torch.as_tensor(values, dtype=torch.float32, device=self.device)[None]}
        if self.features is not None:
            batch["past_time_features"] = torch.as_tensor(time_features(dates, self.features), device=self.device)[None]
        return batch

    def _scaler_of(self, table: pd.DataFrame, known: np.ndarray) -> Scaler:
        """The fitted scale of fitted series; that of the rows ``known`` for series never seen."""
        names = [str(name) for name in table]
        if names == self.columns:
            return self.scaler
        own = Scaler.fit(known)
        places = {name: i for i, name in enumerate(self.columns)}
        mean = [self.scaler.mean[places[n]] if n in places else own.mean[i] for i, n in enumerate(names)]
        scale = [self.scaler.scale[places[n]] if n in places else own.scale[i] for i, n in enumerate(names)]
        return Scaler(np.asarray(mean), np.asarray(scale))

    def _known(self, table: pd.DataFrame, rows: int) -> None:
        if rows < self.context_length:
            raise ValueError(f"the table has {rows} rows, a forecast is made from context_length={self.context_length}")
        names = [str(name) for name in table]
        if names != self.columns and not getattr(self._fitted(), "any_variates", False):
            raise ValueError(
                f"{self.kind or type(self.model).__name__} was fitted to {', '.join(self.columns)} and takes exactly these, "
                f"got {', '.join(names)}; iTransformer and the linear models take other series"
            )

    def _enough(self, rows: Mapping[str, range], total: int) -> None:
        need = self.context_length + self.prediction_length
        for name in ("train", "val"):
            if (rows[name] and len(rows[name]) < need) or (name == "train" and len(rows[name]) < need):
                raise ValueError(
                    f"too few rows: the table has {total}, of which {len(rows[name])} are for {name} (split {self.split}), "
                    f"and one window takes {need} (context_length + prediction_length); give more rows, shorter "
                    "lengths or another split"
                )
