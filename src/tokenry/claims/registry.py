"""Register a claim's measurement beside its card, and run claims.

A card says what is claimed (``[[claims]]``); the module ``tokenry.claims.<slug>`` (dashes as underscores) says how
it is measured here:

    @measures("token-recycling", "lossless")
    def lossless(context: Context) -> Measurement: ...
"""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tokenry.assets.embedded import external
from tokenry.catalog.entries import Card, CardClaim, card
from tokenry.evidence.records import Record
from tokenry.measure.machine import describe_machine
from tokenry.measure.session import Session

__all__ = ["Context", "Measurement", "NotRunnable", "Outcome", "measures", "verify"]


@dataclass(frozen=True)
class Context:
    """What a measurement is given.

    Attributes:
        device: Torch device to run on.
        seed: Seed of the run; several seeds are ``seed``, ``seed + 1``, ...
        session: Cuts the measurement into resumable steps: ``context.session.step("seed0", run)``.
    """

    device: str
    seed: int
    session: Session

    def data(self, name: str) -> Path:
        """Folder of a data set that does not ship with Tokenry.

        Raises:
            NotRunnable: It is not there; the claim is then reported as not run, with what to do.
        """
        folder = external(name)
        if folder is None:
            raise NotRunnable(f"needs the data set {name!r}: set TOKENRY_DATA to the folder that holds it")
        return folder


class NotRunnable(Exception):
    """A claim cannot be measured here; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class Measurement:
    """What came out.

    Attributes:
        shows: Whether the claimed effect shows, by the rule that ``sentence`` states.
        value: The figure that stands beside the paper's.
        baseline: The baseline's figure in the same run.
        spread: Spread of ``value`` over seeds or repeats.
        sentence: The result and the rule, readable alone: "text identical for 40 of 40 prompts (must be all)".
        details: Everything else worth keeping, plain JSON.
        charts: Pictures for the method's page, each the keywords of a function of ``tokenry.report.charts`` with its
            name as ``type`` ("bars", "lines", "stacked"), a ``title`` and, if wanted, a ``caption``.
    """

    shows: bool
    sentence: str
    value: float | None = None
    baseline: float | None = None
    spread: float | None = None
    details: dict[str, Any] = field(default_factory=dict)
    charts: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """One claim of one card after ``verify``: measured, failed with an error, or not run and why."""

    slug: str
    claim: CardClaim
    record: Record | None = None
    not_run: str = ""
    error: str = ""

    @property
    def state(self) -> Literal["shows", "does not show", "error", "not run"]:
        """What became of it."""
        if self.record is not None:
            return "shows" if self.record.passed else "does not show"
        return "error" if self.error else "not run"

    @property
    def failed(self) -> bool:
        """Whether it ran and did not come out well."""
        return self.state in ("does not show", "error")

    @property
    def sentence(self) -> str:
        """The result, the error, or why it was not run."""
        return self.record.sentence if self.record is not None else self.error or self.not_run


Measure = Callable[[Context], Measurement]
_MEASURES: dict[tuple[str, str], Measure] = {}


def measures(slug: str, claim: str) -> Callable[[Measure], Measure]:
    """Register a function as the measurement of one claim of a card."""

    def register(function: Measure) -> Measure:
        _MEASURES[slug, claim] = function
        return function

    return register


def measurement_of(found: Card, claim: CardClaim) -> Measure | None:
    """The registered measurement, after importing the method's claims module."""
    name = f"tokenry.claims.{found.slug.replace('-', '_')}"
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
    return _MEASURES.get((found.slug, claim.id))


def verify(
    slugs: Iterable[str],
    *,
    claims: Iterable[str] | None = None,
    device: str = "cpu",
    seed: int = 0,
    folder: Path | None = None,
    quiet: bool = False,
) -> Iterator[Outcome]:
    """Measure the claims of methods, one after the other.

    Args:
        slugs: Methods.
        claims: Only these claim ids. None: all.
        device: Torch device.
        seed: Seed.
        folder: Where unfinished measurements keep their steps, so that they go on after a kill. None keeps none.
        quiet: No progress bars.

    Yields:
        One ``Outcome`` per claim, as soon as it is known. A failing measurement is an outcome, not an exception.

    Raises:
        ValueError: An unknown method or claim, before anything runs.
    """
    chosen = [card(slug) for slug in slugs]
    wanted = None if claims is None else set(claims)
    if wanted is not None:
        known = {claim.id for found in chosen for claim in found.claims}
        if wanted - known:
            raise ValueError(f"no such claim: {', '.join(sorted(wanted - known))}; known: {', '.join(sorted(known))}")
    for found in chosen:
        for claim in found.claims:
            if wanted is None or claim.id in wanted:
                yield _run(found, claim, device, seed, folder, quiet)


def _run(found: Card, claim: CardClaim, device: str, seed: int, folder: Path | None, quiet: bool) -> Outcome:
    if claim.runs == "none":
        return Outcome(found.slug, claim, not_run=claim.why_not)
    if claim.runs == "gpu" and not device.startswith("cuda"):
        return Outcome(found.slug, claim, not_run=f"needs --device cuda: {claim.why_not}")
    measure = measurement_of(found, claim)
    if measure is None:
        return Outcome(found.slug, claim, error=f"no measurement is registered for {found.slug}/{claim.id}")
    began = time.perf_counter()
    settings = {"slug": found.slug, "claim": claim.id, "device": device, "seed": seed}
    with Session(folder and folder / found.slug / claim.id, settings, quiet=quiet) as session:
        try:
            result = measure(Context(device, seed, session))
        except NotRunnable as missing:
            return Outcome(found.slug, claim, not_run=str(missing))
        except Exception:
            return Outcome(found.slug, claim, error=traceback.format_exc(limit=6))
    record = Record(
        slug=found.slug,
        check=claim.kind,
        id=claim.id,
        passed=result.shows,
        value=result.value,
        unit=claim.unit,
        paper=claim.paper,
        baseline=result.baseline,
        spread=result.spread,
        sentence=result.sentence,
        details=result.details | ({"charts": list(result.charts)} if result.charts else {}),
        seconds=round(time.perf_counter() - began, 2),
        seed=seed,
        machine=describe_machine(device),
    )
    return Outcome(found.slug, claim, record=record)
