"""Forecasters side by side: the same windows, the same scaler, the same recipe."""

from __future__ import annotations

import inspect
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tokenry.compare.kind import Column, Comparison, Options, Outcome, Plot, Sweep
from tokenry.measure.session import Session
from tokenry.measure.timing import fit_exponent, interleave

if TYPE_CHECKING:
    import pandas as pd

    from tokenry.series import Forecaster

__all__ = ["Forecasters"]

# What can be compared, and whose card it belongs to.
METHODS: dict[str, str | None] = {
    "seasonal-naive": None,
    "repeat-last": None,
    "rlinear": None,
    "nlinear": None,
    "dlinear": None,
    "itransformer": "itransformer",
    "iflowformer": "itransformer",
    "patchtst": None,
    "tsm2": "mambamixer",
    "time-tokens": None,
}
WIDE = ("itransformer", "iflowformer", "time-tokens")  # the setting `width` is theirs
SWEPT = ("rlinear", "itransformer", "iflowformer", "patchtst")
OWN = "your model"
BATCH = 32


class Forecasters(Comparison):
    """Train forecasting models on one table and compare their errors on its last rows."""

    kind = "forecasters"
    title = "Forecasters"
    question = "Which model forecasts these series best, and at what cost?"
    baseline = "seasonal-naive"
    columns: ClassVar[list[Column]] = [
        Column(key="mse", title="MSE", unit="scaled", better="lower"),
        Column(key="mae", title="MAE", unit="scaled", better="lower"),
        Column(key="ratio", title="MSE / seasonal naive", unit="x", better="lower"),
        Column(key="ratio_first", title="First quarter of the horizon", unit="x", better="lower"),
        Column(key="ratio_last", title="Last quarter", unit="x", better="lower"),
        Column(key="epoch_seconds", title="Training, per epoch", unit="s", better="lower"),
        Column(key="predict_ms", title=f"{BATCH} forecasts", unit="ms", better="lower"),
        Column(key="parameters", title="Parameters", better="lower"),
        Column(key="epochs", title="Epochs run", digits=2),
    ]
    plots: ClassVar[list[Plot]] = [
        Plot(
            title="Error against training time", x="epoch_seconds", y="mse", log_x=True, caption="Lower left is better."
        ),
        Plot(title="Error beside seasonal naive", y="ratio", caption="Below 1 beats repeating the last season."),
    ]
    settings: ClassVar[dict[str, Any]] = {
        "context_length": 96,
        "prediction_length": 96,
        "epochs": 10,
        "stride": 1,
        "width": 256,
        "season": 0,
        "split": "",
        "variates": [8, 32, 128, 512],
    }
    demo: ClassVar[dict[str, Any]] = {"epochs": 1, "stride": 4, "width": 64, "variates": [8, 32, 128]}

    def methods(self) -> list[str]:
        """All models that `tokenry.series` can make by name."""
        return list(METHODS)

    def default_methods(self, options: Options) -> list[str]:
        """All but the transformer over time steps, which trains far more slowly than the others."""
        return [name for name in METHODS if name != "time-tokens"]

    def check(self, options: Options) -> None:
        """Refuse bad options, an unusable table, and a saved forecaster of other lengths."""
        super().check(options)
        if options.dtype == "float16":
            raise ValueError("forecasters: models train in float32 or bfloat16 (autocast), not float16")
        for name, least in {"epochs": 1, "stride": 1, "width": 1, "season": 0}.items():
            if self.setting(options, name) < least:
                raise ValueError(
                    f"forecasters: setting {name} must be at least {least}, got {self.setting(options, name)}"
                )
        if min(self.setting(options, "variates"), default=0) < 1:
            raise ValueError("forecasters: setting variates must be numbers of series from 1 up, for example 8,32,128")
        for name in self.chosen(options):  # a wrong length or width shows here
            self._forecaster(name, options, season=1)
        frame = self._frame(options)
        context, horizon = (self.setting(options, name) for name in ("context_length", "prediction_length"))
        from tokenry.series.windows import check_frame, split_rows, window_count

        dates, _ = check_frame(frame)
        for part, rows in split_rows(len(frame), self._split(options), context).items():
            if window_count(len(rows), context, horizon) < 1:
                raise ValueError(
                    f"the table has {len(frame)} rows, of which {len(rows)} for {part}; one window takes {context} + {horizon}. "
                    "Give more rows, or shorter --set context_length=... prediction_length=..."
                )
        self._season(options, dates)
        if options.model is not None:
            self._own(options)

    # ------------------------------------------------------------------ what is compared

    def _frame(self, options: Options) -> pd.DataFrame:
        from tokenry.assets import etth1
        from tokenry.series import read_frame

        return etth1() if options.data is None else read_frame(options.data)

    def _split(self, options: Options) -> str | tuple[float, ...]:
        given = self.setting(options, "split")
        if "," in given:
            return tuple(float(part) for part in given.split(","))
        return given or ("ETTh1" if options.data is None else (0.7, 0.1, 0.2))

    def _season(self, options: Options, dates: Any) -> int:
        from tokenry.series import season_of

        season = self.setting(options, "season") or season_of(dates)
        context = self.setting(options, "context_length")
        if season > context:
            raise ValueError(
                f"one season of this table is {season} rows, more than context_length={context}; give "
                f"--set context_length={season} or --set season=..."
            )
        return season

    def _forecaster(self, name: str, options: Options, season: int) -> Forecaster:
        from tokenry.series import Forecaster

        demo = options.effort == "demo"
        settings: dict[str, Any] = {}
        if name in WIDE:
            settings["d_model"] = self.setting(options, "width")
            settings["num_attention_heads"] = 8
        if name == "seasonal-naive":
            settings["season_length"] = season
        if demo and name in WIDE:
            settings["learning_rate"] = 1e-3
        if demo and name == "tsm2":
            settings |= {"d_model": 16, "d_state": 4}
        return Forecaster(
            name,
            context_length=self.setting(options, "context_length"),
            prediction_length=self.setting(options, "prediction_length"),
            split=self._split(options),
            epochs=self.setting(options, "epochs"),
            stride=self.setting(options, "stride"),
            seed=2023 + options.seed,
            device=options.device,
            dtype="bfloat16" if options.dtype == "bfloat16" else "float32",
            batch_size=BATCH,
            **settings,
        )

    def _own(self, options: Options) -> Forecaster:
        from tokenry.series import Forecaster

        own = Forecaster.load(str(options.model), device=options.device)
        for name in ("context_length", "prediction_length"):
            if getattr(own, name) != self.setting(options, name):
                raise ValueError(
                    f"the forecaster in {options.model} has {name}={getattr(own, name)}, this comparison "
                    f"{self.setting(options, name)}; give --set {name}={getattr(own, name)}"
                )
        own.split = self._split(options)
        return own

    # ------------------------------------------------------------------ measuring

    def run(self, options: Options, session: Session) -> Outcome:
        """Train each model epoch by epoch, test all on the same windows, time all in turn."""
        from tokenry.series.windows import check_frame

        frame = self._frame(options)
        dates, table = check_frame(frame)
        season = self._season(options, dates)
        names = self.chosen(options)
        results: dict[str, dict[str, Any]] = {}
        with ExitStack() as stack:
            if session.path is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            else:
                folder = session.path.parent / "training"
            for name in names:
                results[name] = self._errors(name, options, session, frame, season, folder)
        if options.model is not None:
            results[OWN] = session.step(f"{OWN}/test", lambda: self._test(self._own(options), frame, options))
        train_rows = len(self._forecaster("rlinear", options, season).training_windows(len(table)))
        steps = max(train_rows // self.setting(options, "stride") // BATCH, 1)
        timed = session.step("speed", lambda: self._speed(names, options, season, table.shape[1]))
        rows = [self._row(name, results[name], results[self.baseline], timed.get(name), steps) for name in results]
        sweeps = [self._along_the_horizon(results), *self._growth(names, options, session, season)]
        examples = (
            {"What iTransformer looked at": results["itransformer"]["links"]} if "itransformer" in results else {}
        )
        return Outcome(rows=rows, sweeps=sweeps, notes=self._notes(options, rows, season, results), examples=examples)

    def _errors(
        self, name: str, options: Options, session: Session, frame: pd.DataFrame, season: int, folder: Path
    ) -> dict[str, Any]:
        forecaster = self._forecaster(name, options, season)

        def until(epoch: int) -> bool:
            return forecaster.fit(frame, folder=folder, until=epoch, quiet=True).stopped

        for epoch in range(1, forecaster.epochs + 1):
            if session.step(f"{name}/epoch{epoch}", lambda epoch=epoch: until(epoch)):
                break

        def test() -> dict[str, Any]:
            forecaster.fit(frame, folder=folder, quiet=True)  # reads the finished state
            found = self._test(forecaster, frame, options)
            if name == "itransformer":
                found["links"] = _strongest(forecaster.explain())
            return found

        return session.step(f"{name}/test", test)

    def _test(self, forecaster: Forecaster, frame: pd.DataFrame, options: Options) -> dict[str, Any]:
        errors = forecaster.evaluate(frame, stride=self.setting(options, "stride"))
        return {**errors, "parameters": forecaster.num_parameters, "epochs": len(forecaster.history)}

    def _speed(self, names: list[str], options: Options, season: int, series: int) -> dict[str, dict[str, list[float]]]:
        """Seconds of one training step and of one batch of forecasts: median, spread."""
        trains, predicts = {}, {}
        for name in names:
            train, predict, trained = self._calls(name, options, season, series, BATCH)
            predicts[name] = predict
            if trained:
                trains[name] = train
        quick = {"repeats": options.repeats, "device": options.device, "min_seconds": 0.02}
        predicted = interleave(predicts, **quick)
        stepped = interleave(trains, **quick) if trains else {}
        found: dict[str, dict[str, list[float]]] = {name: {} for name in names}
        for part, timings in (("predict", predicted), ("train", stepped)):
            for name, timing in timings.items():
                found[name][part] = [timing.median, timing.spread]
        return found

    def _calls(self, name: str, options: Options, season: int, series: int, batch: int) -> tuple[Any, Any, bool]:
        """A training step and a batch of forecasts on random values, as calls; whether there is something to train."""
        import torch

        torch.manual_seed(options.seed)
        forecaster = self._forecaster(name, options, season)
        model = forecaster.build_model(series).to(options.device)
        context, horizon = forecaster.context_length, forecaster.prediction_length
        inputs = {"past_values": torch.randn(batch, context, series, device=options.device)}
        if "past_time_features" in inspect.signature(model.forward).parameters:
            inputs["past_time_features"] = torch.rand(batch, context, 4, device=options.device) - 0.5
        target = torch.randn(batch, horizon, series, device=options.device)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=1e-4) if parameters else None

        def train() -> None:
            if optimizer is None:
                return
            model.train()
            optimizer.zero_grad(set_to_none=True)
            model(**inputs, future_values=target).loss.backward()
            optimizer.step()

        def predict() -> None:
            model.eval()
            with torch.no_grad():
                model(**inputs)

        return train, predict, bool(parameters)

    def _growth(self, names: list[str], options: Options, session: Session, season: int) -> list[Sweep]:
        """Seconds of a training step (4 windows) against the number of series."""
        swept = [name for name in SWEPT if name in names]
        sizes = sorted(set(self.setting(options, "variates")))
        if not swept or len(sizes) < 2:
            return []
        points: dict[str, list[tuple[float, float]]] = {name: [] for name in swept}
        for size in sizes:

            def measure(size: int = size) -> dict[str, float]:
                calls = {name: self._calls(name, options, season, size, 4)[0] for name in swept}
                timings = interleave(calls, repeats=min(options.repeats, 3), device=options.device)
                return {name: timing.median for name, timing in timings.items()}

            for name, seconds in session.step(f"series{size}", measure).items():
                points[name].append((float(size), seconds))
        return [
            Sweep(
                title="Training step against the number of series",
                x="series",
                y="seconds",
                points=points,
                exponents={name: fit_exponent(*zip(*found, strict=True)) for name, found in points.items()},
                caption="4 windows per step, random values. Full attention has a part that grows with the square of the "
                "number of series; it shows once there are more series than the model is wide.",
            )
        ]

    def _along_the_horizon(self, results: dict[str, dict[str, Any]]) -> Sweep:
        naive = results[self.baseline]["mse_by_step"]
        chosen = sorted({round(i * (len(naive) - 1) / 11) for i in range(12)})
        points = {
            name: [(float(step + 1), result["mse_by_step"][step] / max(naive[step], 1e-12)) for step in chosen]
            for name, result in results.items()
        }
        return Sweep(
            title="Error along the horizon",
            x="steps ahead",
            y="MSE / seasonal naive",
            points=points,
            log_x=False,
            log_y=False,
            caption="Below 1 beats repeating the last season at that distance.",
        )

    def _row(
        self, name: str, result: dict[str, Any], naive: dict[str, Any], timed: dict[str, list[float]] | None, steps: int
    ) -> dict[str, Any]:
        slug = METHODS.get(name)
        quarter = max(len(naive["mse_by_step"]) // 4, 1)

        def ratio(part: slice) -> float:
            return sum(result["mse_by_step"][part]) / max(sum(naive["mse_by_step"][part]), 1e-12)

        row = {
            "method": name,
            "slug": slug,
            "mse": result["mse"],
            "mae": result["mae"],
            "ratio": ratio(slice(None)),
            "ratio_first": ratio(slice(quarter)),
            "ratio_last": ratio(slice(-quarter, None)),
            "parameters": result["parameters"],
            "epochs": result["epochs"],
            "epoch_seconds": None,
            "predict_ms": None,
        }
        if timed and "train" in timed:
            median, spread = timed["train"]
            row |= {"epoch_seconds": median * steps, "epoch_seconds_spread": spread * steps}
        if timed and "predict" in timed:
            median, spread = timed["predict"]
            row |= {"predict_ms": median * 1000, "predict_ms_spread": spread * 1000}
        return row

    def _notes(
        self, options: Options, rows: list[dict[str, Any]], season: int, results: dict[str, dict[str, Any]]
    ) -> list[str]:
        context, horizon = self.setting(options, "context_length"), self.setting(options, "prediction_length")
        windows, stride = results[self.baseline]["windows"], self.setting(options, "stride")
        data = (
            "ETTh1 (embedded), its standard split"
            if options.data is None
            else f"{options.data}, split {self._split(options)}"
        )
        notes = [
            f"{data}: {context} rows to the next {horizon}, season {season}; {windows} test windows. Errors are on values "
            "scaled by the training rows, on the same windows for all.",
            "Training time per epoch is the median step, measured turn by turn, times the steps of an epoch.",
        ]
        if stride > 1:
            notes.append(f"Only one window of {stride} is trained on and tested; published tables take every one.")
        if options.effort == "demo":
            notes.append(
                f"Demonstration: {self.setting(options, 'epochs')} epoch(s), small models. Published tables need the full run."
            )
        by_name = {row["method"]: row for row in rows}
        worse = [row["method"] for row in rows if row["ratio"] > 1]
        if worse:
            notes.append(f"Worse than seasonal naive here: {', '.join(worse)}.")
        inverted, linear = by_name.get("itransformer"), by_name.get("rlinear")
        if inverted and linear and linear["mse"] <= inverted["mse"]:
            notes.append(
                f"RLinear (MSE {linear['mse']:.3f}) is as good as iTransformer ({inverted['mse']:.3f}) or better here, at "
                f"{linear['parameters']:,} against {inverted['parameters']:,} parameters."
            )
        if OWN in results and options.model is not None:
            notes.append(f"{OWN}: the forecaster in {options.model}, as it was saved, not trained here.")
        return notes


def _strongest(attention: pd.DataFrame) -> str:
    """The five strongest links between different series."""
    names = [name for name in attention.index if not name.startswith("time:")]
    links = [(float(attention.loc[a, b]), a, b) for a in names for b in names if a != b]
    lines = [f"{a} looked at {b}: {weight:.1%}" for weight, a, b in sorted(links, reverse=True)[:5]]
    return "\n".join(lines) or "one series: there is no other to look at"
