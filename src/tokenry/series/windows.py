"""From a table of series to windows: splits by row, the scaler, time features, batches.

These few rules decide whether the published tables of long-horizon forecasting come out:

- A split is a range of rows. The validation and test ranges begin ``context`` rows early, so that their first
  *targets* start at the border.
- The scaler is fitted on training rows alone, with the population deviation; errors are taken on scaled values.
- Every window counts, one per row (stride 1): ``rows - context - horizon + 1``.
- Time features are the position in the day, week, month and year, each from -0.5 to 0.5.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pandas.tseries.frequencies import to_offset
from torch import Tensor

__all__ = [
    "Scaler",
    "Windows",
    "check_frame",
    "order_columns",
    "read_frame",
    "season_of",
    "split_rows",
    "step_of",
    "time_features",
    "window_count",
]

HOURS = 30 * 24  # of a month in the published splits of ETT
FIXED = {"etth1": 1, "etth2": 1, "ettm1": 4, "ettm2": 4}  # rows per hour; the end of these files is unused

FEATURES = {  # name: (reads a DatetimeIndex, largest value, smallest value)
    "minute": (lambda t: t.minute, 59, 0),
    "hour": (lambda t: t.hour, 23, 0),
    "weekday": (lambda t: t.day_of_week, 6, 0),
    "day": (lambda t: t.day, 31, 1),
    "dayofyear": (lambda t: t.day_of_year, 366, 1),
    "month": (lambda t: t.month, 12, 1),
}
FEATURE_SETS = {
    "h": ("hour", "weekday", "day", "dayofyear"),
    "min": ("minute", "hour", "weekday", "day", "dayofyear"),
    "D": ("weekday", "day", "dayofyear"),
    "ME": ("month",),
}


def split_rows(rows: int, protocol: str | Sequence[float], context: int) -> dict[str, range]:
    """Rows of the training, validation and test part.

    Args:
        rows: Rows of the table.
        protocol: A data set's name (``"ETTh1"``, ``"ETTh2"``, ``"ETTm1"``, ``"ETTm2"``: 12 / 4 / 4 months of 30
            days; any other: 70 / 10 / 20 %), or three fractions. Train and test are rounded down, the middle takes
            the rest, except for ``"solar"``, where the middle is rounded down too.
        context: Rows of history that validation and test take from before their border.

    Returns:
        ``train``, ``val`` and ``test``; empty where the fraction is 0.

    Raises:
        ValueError: Not three fractions, a sum over 1, or too few rows for a named split.

    Example:
        >>> split_rows(17420, "ETTh1", 96)
        {'train': range(0, 8640), 'val': range(8544, 11520), 'test': range(11424, 14400)}
    """
    if isinstance(protocol, str) and protocol.lower() in FIXED:
        month = HOURS * FIXED[protocol.lower()]
        if rows < 20 * month:
            raise ValueError(f"the split of {protocol} needs {20 * month} rows, the table has {rows}; give fractions")
        borders = (12 * month, 16 * month, 16 * month, 20 * month)
    else:
        fractions = (0.7, 0.1, 0.2) if isinstance(protocol, str) else tuple(float(part) for part in protocol)
        if len(fractions) != 3 or min(fractions) < 0 or fractions[0] == 0 or sum(fractions) > 1 + 1e-9:
            raise ValueError(
                f"a split is three fractions (train, val, test), train above 0, sum at most 1; got {protocol}"
            )
        train, test = int(rows * fractions[0]), int(rows * fractions[2])
        middle = train + int(rows * 0.1) if protocol == "solar" else rows - test
        borders = (train, train if fractions[1] == 0 else middle, rows - test, rows)
    train, val_end, test_start, test_end = borders
    return {
        "train": range(train),
        "val": range(max(train - context, 0), val_end) if val_end > train else range(0),
        "test": range(max(test_start - context, 0), test_end) if test_end > test_start else range(0),
    }


def window_count(rows: int, context: int, horizon: int) -> int:
    """Windows of ``context`` past and ``horizon`` future rows in ``rows`` rows."""
    return max(rows - context - horizon + 1, 0)


@dataclass(frozen=True)
class Scaler:
    """Zero mean and unit (population) deviation per column.

    Attributes:
        mean: ``(N,)``.
        scale: ``(N,)``; 1 for a constant column.

    Example:
        >>> Scaler.fit(np.array([[1.0], [3.0]])).transform(np.array([[5.0]]))
        array([[3.]])
    """

    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def fit(cls, values: np.ndarray) -> Scaler:
        """From training rows ``(T, N)``."""
        scale = values.std(axis=0)
        return cls(values.mean(axis=0), np.where(scale > 0, scale, 1.0))

    def transform(self, values: np.ndarray) -> np.ndarray:
        """To scaled values; ``(..., N)``."""
        return (values - self.mean) / self.scale

    def inverse(self, values: np.ndarray) -> np.ndarray:
        """Back to the user's unit; ``(..., N)``."""
        return values * self.scale + self.mean


def time_features(dates: pd.Series | pd.DatetimeIndex, freq: str = "h") -> np.ndarray:
    """Where each date stands in its day, week, month and year, from -0.5 to 0.5.

    Args:
        dates: T dates.
        freq: Which features: ``"h"`` hour, weekday, day of month, day of year (the paper uses these four for
            10- and 15-minute data too); ``"min"`` the minute before them; ``"D"`` without the hour; ``"ME"`` the month.

    Returns:
        ``(T, M)`` float32.

    Example:
        >>> time_features(pd.DatetimeIndex(["2016-07-01 00:00"])).shape
        (1, 4)
    """
    if freq not in FEATURE_SETS:
        raise ValueError(f"freq must be one of {', '.join(FEATURE_SETS)}, got {freq!r}")
    index = pd.DatetimeIndex(dates)
    columns = []
    for name in FEATURE_SETS[freq]:
        read, largest, smallest = FEATURES[name]
        columns.append((np.asarray(read(index)) - smallest) / (largest - smallest) - 0.5)
    return np.stack(columns, axis=-1).astype(np.float32)


def order_columns(frame: pd.DataFrame, target: str = "OT") -> pd.DataFrame:
    """The table with its target column moved last, as the published protocol reads it; unchanged without one."""
    if target not in frame:
        return frame
    return frame[[name for name in frame if name != target] + [target]]


def read_frame(path: str | Path) -> pd.DataFrame:
    """Read a CSV (gzipped or not) whose first column, or one called ``date``, holds the dates.

    Raises:
        ValueError: No such file, or no column of dates.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file {path}; give a CSV with a column `date` and one numeric column per series")
    try:
        frame = pd.read_csv(path)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV: {error}") from error
    found = next((name for name in frame if str(name).lower() in ("date", "ds", "time", "timestamp")), frame.columns[0])
    if pd.api.types.is_numeric_dtype(frame[found]):
        raise ValueError(
            f"{path} has no column of dates: its columns are {', '.join(map(str, frame))}; name one `date`"
        )
    try:
        dates = pd.to_datetime(frame[found])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: column {found!r} does not hold dates ({error})") from error
    return frame.assign(**{str(found): dates}).rename(columns={found: "date"})


def check_frame(frame: pd.DataFrame, date_column: str = "date") -> tuple[pd.DatetimeIndex, pd.DataFrame]:
    """Dates and numeric columns of a table that a forecaster can use.

    Args:
        frame: With a column of dates, or dates as its index.
        date_column: Its name.

    Returns:
        The dates and the other columns as float64.

    Raises:
        ValueError: No dates, dates that are not evenly spaced and rising, columns that are not numeric, NaN or
            infinity (with column and row), or no column at all.
    """
    if not isinstance(frame, pd.DataFrame):
        raise ValueError(f"expected a pandas DataFrame with a column {date_column!r}, got {type(frame).__name__}")
    if date_column in frame:
        try:
            dates, columns = pd.DatetimeIndex(pd.to_datetime(frame[date_column])), frame.drop(columns=date_column)
        except (ValueError, TypeError) as error:
            raise ValueError(f"column {date_column!r} does not hold dates: {error}") from error
    elif isinstance(frame.index, pd.DatetimeIndex):
        dates, columns = frame.index, frame
    else:
        raise ValueError(f"no column {date_column!r} and no dates in the index; columns: {', '.join(map(str, frame))}")
    if columns.shape[1] == 0:
        raise ValueError(f"the table has no column besides {date_column!r}: there is nothing to forecast")
    wrong = [str(name) for name, kind in columns.dtypes.items() if not pd.api.types.is_numeric_dtype(kind)]
    if wrong:
        raise ValueError(f"columns {', '.join(wrong)} are not numeric; convert or drop them")
    columns = columns.astype(float)
    bad = ~np.isfinite(columns.to_numpy())
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ValueError(
            f"{bad.sum()} values are NaN or infinite, the first in column {columns.columns[column]!r}, row {row} "
            f"({dates[row]}); fill them (frame.interpolate()) or drop the column"
        )
    _check_spacing(dates)
    return dates, columns


def _check_spacing(dates: pd.DatetimeIndex) -> None:
    if dates.hasnans:
        raise ValueError(f"row {int(np.argmax(dates.isna()))} has no date")
    if len(dates) < 3:
        return
    steps = np.diff(dates.to_numpy())
    if (steps == steps[0]).all() and steps[0] > np.timedelta64(0):
        return
    if dates.is_monotonic_increasing and dates.is_unique and _inferred(dates) is not None:
        return  # months, quarters, business days
    values, counts = np.unique(steps, return_counts=True)
    usual = pd.Timedelta(values[counts.argmax()])
    row = int(np.argmax(steps != usual.to_timedelta64())) + 1
    raise ValueError(
        f"dates are not evenly spaced: most steps are {usual}, row {row} ({dates[row]}) follows {dates[row - 1]}; "
        "sort, drop repeated dates, and resample (frame.set_index('date').asfreq(...).interpolate())"
    )


def step_of(dates: pd.DatetimeIndex) -> pd.DateOffset:
    """The interval between rows (months and business days too), as something that can be added to a date."""
    steps = np.diff(dates[-200:].to_numpy())
    if (steps != steps[0]).any():
        inferred = _inferred(dates)
        if inferred is not None:
            return to_offset(inferred)
    interval: Any = pd.Timedelta(steps[-1])
    return to_offset(interval)


def _inferred(dates: pd.DatetimeIndex) -> Any:
    with warnings.catch_warnings():  # pandas 3 announces another type of result; both are taken here
        warnings.simplefilter("ignore")
        return pd.infer_freq(dates)


def season_of(dates: pd.DatetimeIndex) -> int:
    """Rows in one season: a day for intervals under a day, a week of days, a year of weeks, months or quarters.

    Example:
        >>> season_of(pd.date_range("2020-01-01", periods=9, freq="15min"))
        96
    """
    if step_of(dates).rule_code == "B":
        return 5
    interval = pd.Timedelta(np.median(np.diff(dates.to_numpy())))
    for unit in (pd.Timedelta(days=1), pd.Timedelta(days=7), pd.Timedelta(days=364)):
        if interval <= unit / 2:
            return round(unit / interval)
    return 1


class Windows:
    """All windows of a block of rows, without copying it.

    Args:
        values: Scaled values ``(T, N)``.
        marks: Time features ``(T, M)``, or None.
        context: L.
        horizon: S.

    Example:
        >>> block = Windows(torch.arange(10.0)[:, None], None, context=3, horizon=2)
        >>> len(block), block.batch([0])["future_values"].flatten().tolist()
        (6, [3.0, 4.0])
    """

    def __init__(self, values: Tensor, marks: Tensor | None, context: int, horizon: int) -> None:
        self.context, self.horizon = context, horizon
        self.count = window_count(len(values), context, horizon)
        self._values = values.unfold(0, context + horizon, 1) if self.count else None  # (W, N, L + S), a view
        self._marks = marks.unfold(0, context + horizon, 1) if self.count and marks is not None else None

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Sequence[int] | Tensor) -> dict[str, Tensor]:
        """Windows by index, as keywords of a forecasting model: time on axis 1."""
        if self._values is None:
            raise ValueError("there is no window in these rows")
        rows = torch.as_tensor(indices, device=self._values.device)
        chosen = self._values[rows].transpose(1, 2)  # (B, L + S, N)
        found = {"past_values": chosen[:, : self.context], "future_values": chosen[:, self.context :]}
        if self._marks is not None:
            found["past_time_features"] = self._marks[rows].transpose(1, 2)[:, : self.context]
        return found
