"""Records of checks that ran.

The project's own records are lines of ``project/<slug>.jsonl`` beside this file, committed with the code. A
user's are rows of a SQLite file in the user's data folder (``TOKENRY_EVIDENCE`` names another one).
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import platformdirs
from pydantic import BaseModel, Field, ValidationError

from tokenry.measure.machine import Machine, describe_machine, package_versions
from tokenry.measure.whole_file import whole_file

__all__ = ["CHECKS", "Record", "all_records", "latest", "project_records", "save_project", "save_user", "user_records"]

Check = Literal["golden", "properties", "behaviour", "claim", "speed"]
CHECKS: tuple[str, ...] = get_args(Check)
PROJECT = Path(__file__).parent / "project"


class Record(BaseModel):
    """One run of one check of one method.

    Attributes:
        slug: The method.
        check: Kind of check. ``speed`` is a side-by-side timing against the authors' code.
        id: Which check: a golden case's name, ``properties``, a claim's id, or what was timed.
        passed: Whether it held. For a claim: whether the effect shows.
        value: The figure measured here, if the check has one.
        unit: Its unit.
        paper: The paper's figure for the same thing.
        baseline: The baseline's figure in the same run.
        spread: Spread of ``value`` over repeats or seeds (``value`` +- ``spread``).
        sentence: The result in one sentence, losses as plainly as wins.
        details: Further figures, plain JSON.
        seconds: How long the check took.
        date: When it ran, UTC.
    """

    slug: str
    check: Check
    id: str
    passed: bool
    value: float | None = None
    unit: str = ""
    paper: float | None = None
    baseline: float | None = None
    spread: float | None = None
    sentence: str = ""
    details: dict[str, Any] = Field(default_factory=dict)
    seconds: float = 0.0
    seed: int | None = None
    date: datetime = Field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))
    machine: Machine = Field(default_factory=describe_machine)
    versions: dict[str, str] = Field(default_factory=package_versions)

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Records with one key replace each other, the latest wins; each device has its own."""
        return self.slug, self.check, self.id, self.machine.device


def latest(records: Iterable[Record]) -> list[Record]:
    """The newest record of every key, in a stable order."""
    newest: dict[tuple[str, str, str, str], Record] = {}
    for record in records:
        if record.key not in newest or newest[record.key].date <= record.date:
            newest[record.key] = record
    return [newest[key] for key in sorted(newest)]


def project_records() -> list[Record]:
    """The project's committed records."""
    lines = (line for path in sorted(PROJECT.glob("*.jsonl")) for line in path.read_text("utf-8").splitlines())
    return [Record.model_validate_json(line) for line in lines if line.strip()]


def save_project(records: Iterable[Record]) -> None:
    """Put records into the project's files, each replacing the older one of its key. For maintainers."""
    by_slug: dict[str, list[Record]] = {}
    for record in records:
        by_slug.setdefault(record.slug, []).append(record)
    PROJECT.mkdir(exist_ok=True)
    for slug, new in by_slug.items():
        path = PROJECT / f"{slug}.jsonl"
        old = [Record.model_validate_json(x) for x in path.read_text("utf-8").splitlines()] if path.exists() else []
        with whole_file(path) as unfinished:
            unfinished.write_text("".join(r.model_dump_json() + "\n" for r in latest([*old, *new])), "utf-8")


def _database() -> Path:
    named = os.environ.get("TOKENRY_EVIDENCE")
    return Path(named) if named else Path(platformdirs.user_data_dir("tokenry")) / "evidence.sqlite"


def save_user(records: Iterable[Record]) -> Path:
    """Append records to the user's SQLite file and return its path."""
    path = _database()
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE IF NOT EXISTS record (slug TEXT, 'check' TEXT, id TEXT, date TEXT, body TEXT)")
        connection.executemany(
            "INSERT INTO record VALUES (?, ?, ?, ?, ?)",
            [(r.slug, r.check, r.id, r.date.isoformat(), r.model_dump_json()) for r in records],
        )
    return path


def user_records() -> list[Record]:
    """The user's own records; empty when none were made.

    Raises:
        ValueError: The file is no database of records.
    """
    path = _database()
    if not path.exists():
        return []
    try:
        with closing(sqlite3.connect(path)) as connection:
            return [Record.model_validate_json(body) for (body,) in connection.execute("SELECT body FROM record")]
    except (sqlite3.Error, ValidationError) as error:
        raise ValueError(
            f"{path} holds no records that can be read ({error}); move it away, or name another file in TOKENRY_EVIDENCE"
        ) from error


def all_records() -> list[Record]:
    """The newest record of every key, the user's and the project's together."""
    return latest([*project_records(), *user_records()])
