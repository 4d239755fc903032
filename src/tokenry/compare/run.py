"""Run a comparison: check, measure in resumable steps, write ``result.json``."""

from __future__ import annotations

import importlib
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from tokenry.compare.kind import Column, Comparison, Options, Outcome, Plot
from tokenry.measure.machine import Machine, describe_machine, package_versions
from tokenry.measure.session import Session

__all__ = ["KINDS", "Result", "compare", "comparison"]

KINDS = {
    "decoding": "tokenry.compare.kinds.decoding:Decoding",
    "kvcache": "tokenry.compare.kinds.kvcache:KVCache",
    "mixers": "tokenry.compare.kinds.mixers:Mixers",
    "backbones": "tokenry.compare.kinds.backbones:Backbones",
    "losses": "tokenry.compare.kinds.losses:Losses",
    "forecasters": "tokenry.compare.kinds.forecasters:Forecasters",
    "tokenizers": "tokenry.compare.kinds.tokenizers:Tokenizers",
    "detectors": "tokenry.compare.kinds.detectors:Detectors",
}


class Result(BaseModel):
    """A finished comparison as it is written to ``result.json`` and read by the report."""

    kind: str
    title: str
    question: str
    baseline: str
    columns: list[Column]
    plots: list[Plot]
    options: Options
    outcome: Outcome
    machine: Machine
    versions: dict[str, str]
    seconds: float
    date: datetime = Field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))


def comparison(kind: str) -> Comparison:
    """The comparison of that kind.

    Raises:
        ValueError: There is none; the message lists all.
    """
    if kind not in KINDS:
        raise ValueError(f"no comparison is called {kind!r}; kinds: {', '.join(KINDS)}")
    module, name = KINDS[kind].split(":")
    return getattr(importlib.import_module(module), name)()


def compare(kind: str, *, out: Path | str | None = None, quiet: bool = False, **options: Any) -> Result:
    """Compare methods of one kind and return the result.

    Args:
        kind: One of ``KINDS``.
        out: Folder for the run: steps as they finish, then ``result.json``. The same call on the same folder
            goes on where a killed run stopped. None keeps nothing.
        quiet: No progress bar.
        **options: Fields of ``Options``.

    Raises:
        ValueError: A bad option, before anything heavy runs.
    """
    found = comparison(kind)
    parsed = Options(**options)
    found.check(parsed)
    began = time.perf_counter()
    with Session(out, {"kind": kind, **parsed.model_dump()}, quiet=quiet) as session:
        outcome = found.run(parsed, session)
    result = Result(
        kind=kind,
        title=found.title,
        question=found.question,
        baseline=found.baseline,
        columns=found.columns,
        plots=found.plots,
        options=parsed,
        outcome=outcome,
        machine=describe_machine(parsed.device),
        versions=package_versions(),
        seconds=round(time.perf_counter() - began, 1),
    )
    if out is not None:
        (Path(out) / "result.json").write_text(result.model_dump_json(indent=1) + "\n", "utf-8")
    return result
