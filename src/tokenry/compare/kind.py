"""What a kind of comparison is: a question, its columns, and a way to measure every method alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field

from tokenry.measure.session import Session

__all__ = ["Column", "Comparison", "Options", "Outcome", "Plot", "Sweep"]


class Column(BaseModel):
    """A column of the table.

    Attributes:
        key: Key in the rows.
        title: Heading.
        unit: Shown after the heading.
        better: Which direction is better; None where neither is.
        digits: Significant digits shown.
    """

    key: str
    title: str
    unit: str = ""
    better: Literal["higher", "lower"] | None = None
    digits: int = 3

    @property
    def heading(self) -> str:
        """The title with its unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


class Plot(BaseModel):
    """A picture of the rows: one point or bar per method. ``x`` None draws bars of ``y``."""

    title: str
    y: str
    x: str | None = None
    log_x: bool = False
    log_y: bool = False
    caption: str = ""


class Sweep(BaseModel):
    """How a cost grows: for every method the points (size, cost) and the fitted exponent of the growth."""

    title: str
    x: str
    y: str
    points: dict[str, list[tuple[float, float]]]
    exponents: dict[str, float] = {}
    log_x: bool = True
    log_y: bool = True
    caption: str = ""


class Outcome(BaseModel):
    """What a comparison measured.

    Attributes:
        rows: One per method: ``method`` (name shown), optionally ``slug`` (its card), and a value per column.
            A value may be None (not measured); ``<key>_spread`` is shown behind it, as ``value ± spread``.
        sweeps: Growth of cost.
        notes: What a reader must know to read the table rightly: shortened runs, refusals, losses.
        examples: Small things worth seeing, for example generated text: title to text.
    """

    rows: list[dict[str, Any]]
    sweeps: list[Sweep] = []
    notes: list[str] = []
    examples: dict[str, str] = {}


class Options(BaseModel, extra="forbid"):
    """What a user can say about a comparison; the same for every kind.

    Attributes:
        model: Local folder or hub id. None: the embedded model.
        data: The user's own data: prompts, a folder of images, a CSV, texts. None: the embedded data.
        methods: Names to compare, the baseline is always added. None: the kind's default list.
        device: Torch device.
        dtype: Torch dtype of the model.
        seed: First seed.
        repeats: Timed turns of each method.
        effort: ``demo`` finishes in about half a minute on two cores, ``full`` is the real measurement.
        settings: Settings that only this kind has (``Comparison.settings`` lists them with their defaults).
    """

    model: str | None = None
    data: str | None = None
    methods: list[str] | None = None
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 0
    repeats: int = Field(5, ge=1)
    effort: Literal["demo", "full"] = "full"
    settings: dict[str, Any] = {}


class Comparison(ABC):
    """One kind of comparison. Fair by construction: same inputs, same process, turns taken in turn.

    A kind is a subclass in ``tokenry.compare.kinds``. ``check`` refuses bad options before anything heavy runs;
    ``run`` measures in named steps of the session, so that a killed run goes on where it was.
    """

    kind: ClassVar[str]
    title: ClassVar[str]
    question: ClassVar[str]
    baseline: ClassVar[str]
    columns: ClassVar[list[Column]]
    plots: ClassVar[list[Plot]] = []
    settings: ClassVar[dict[str, Any]] = {}
    demo: ClassVar[dict[str, Any]] = {}  # what a demonstration changes of the settings, unless the user says otherwise

    @abstractmethod
    def methods(self) -> list[str]:
        """Names of everything this kind can compare, the baseline first."""

    def chosen(self, options: Options) -> list[str]:
        """The methods of this run, the baseline first."""
        names = options.methods or self.default_methods(options)
        unknown = [name for name in names if name not in self.methods()]
        if unknown:
            raise ValueError(
                f"{self.kind}: no method is called {', '.join(map(repr, unknown))}; known: {'; '.join(self.methods())}"
            )
        return [self.baseline, *(name for name in names if name != self.baseline)]

    def named(self, text: str) -> list[str]:
        """The names in a text with commas between them; a known name that holds commas itself stays whole."""
        parts = [part.strip() for part in text.split(",")]
        known = set(self.methods())
        found = []
        while parts:
            size = next((n for n in range(len(parts), 1, -1) if ", ".join(parts[:n]) in known), 1)
            found.append(", ".join(parts[:size]))
            parts = parts[size:]
        return [name for name in found if name]

    def default_methods(self, options: Options) -> list[str]:
        """What is compared when the user names nothing."""
        return self.methods()

    def setting(self, options: Options, name: str) -> Any:
        """A kind's own setting: the user's value in the type of its default, else the demonstration's, else the default."""
        if options.effort == "demo" and name in self.demo and name not in options.settings:
            return self.demo[name]
        default = self.settings[name]
        value = options.settings.get(name, default)
        if default is None or value is None or isinstance(value, type(default)):
            return value
        if isinstance(default, list):
            return [type(default[0])(x) for x in str(value).split(",")]
        return type(default)(value)

    def check(self, options: Options) -> None:
        """Refuse bad options with a ``ValueError``; quick. Subclasses extend it."""
        self.chosen(options)
        unknown = [name for name in options.settings if name not in self.settings]
        if unknown:
            known = ", ".join(f"{k}={v!r}" for k, v in self.settings.items()) or "none"
            raise ValueError(f"{self.kind} has no setting {', '.join(map(repr, unknown))}; settings: {known}")
        for name in options.settings:
            try:
                self.setting(options, name)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{self.kind}: setting {name}={options.settings[name]!r}: {error}") from error

    @abstractmethod
    def run(self, options: Options, session: Session) -> Outcome:
        """Measure. Every heavy piece is a ``session.step``."""


def skipped_images(skipped: list[str]) -> str:
    """The note on images that could not be read: how many, and the first few with the reason."""
    more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    return f"{len(skipped)} image(s) cannot be read and were left out: {'; '.join(skipped[:3])}{more}."
