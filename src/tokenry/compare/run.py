"""Run a comparison: check, measure in resumable steps, write ``result.json``."""

from __future__ import annotations

import importlib
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from tokenry.compare.kind import Column, Comparison, Options, Outcome, Plot
from tokenry.measure.machine import Machine, describe_machine, package_versions
from tokenry.measure.session import Session
from tokenry.measure.whole_file import whole_file

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


def _options(kind: str, given: dict[str, Any]) -> Options:
    """The options, or one sentence on the first that is wrong."""
    try:
        return Options(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            known = ", ".join(Options.model_fields)
            raise ValueError(f"{kind}: there is no option {name!r}; options: {known}") from error
        raise ValueError(f"{kind}: {name}={first['input']!r}: {first['msg']}") from error


def _state(name: str | None) -> list[tuple[str, int, int]]:
    """Name, size and time of change of what a user's model or data is made of; empty for what is not on this disk."""
    path = Path(name) if name else None
    if path is None or not path.exists():
        return []
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def compare(kind: str, *, out: Path | str | None = None, quiet: bool = False, **options: Any) -> Result:
    """Compare methods of one kind and return the result.

    Args:
        kind: One of ``KINDS``.
        out: Folder for the run: steps as they finish, then ``result.json``. The same call on the same folder
            goes on where a killed run stopped, unless the files of model or data have changed since. None keeps nothing.
        quiet: No progress bar.
        **options: Fields of ``Options``.

    Raises:
        ValueError: A bad option, before anything heavy runs.
    """
    found = comparison(kind)
    parsed = _options(kind, options)
    found.check(parsed)
    began = time.perf_counter()
    settings = {"kind": kind, **parsed.model_dump(), "files": [_state(parsed.model), _state(parsed.data)]}
    with Session(out, settings, quiet=quiet) as session:
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
        with whole_file(Path(out) / "result.json") as unfinished:
            unfinished.write_text(result.model_dump_json(indent=1) + "\n", "utf-8")
    return result
