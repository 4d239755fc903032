"""A run that is written as it goes and goes on where it was killed.

A long job is cut into named steps. Each finished step is one line of a JSONL file; when the job is started
again with the same settings, finished steps are read instead of run.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

__all__ = ["Session"]


class Session:
    """Run named steps once each, keeping their results on disk, with a progress bar.

    Args:
        folder: Where ``steps-<fingerprint>.jsonl`` is kept; made if missing. None keeps results in memory only.
        settings: Everything the results depend on, as plain JSON. Other settings, other file: a changed run
            never reuses old steps.
        total: Number of steps expected, for the progress bar (it grows if there are more).
        quiet: No progress bar (for ``--json`` and tests).

    Example:
        >>> with Session(None, {"seed": 0}, quiet=True) as session:
        ...     session.step("double/4", lambda: {"value": 8})
        {'value': 8}
    """

    def __init__(
        self, folder: Path | str | None, settings: Mapping[str, Any], *, total: int | None = None, quiet: bool = False
    ) -> None:
        text = json.dumps(dict(settings), sort_keys=True, default=str)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:12]
        self._results: dict[str, Any] = {}
        self.path: Path | None = None
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.path = Path(folder) / f"steps-{self.fingerprint}.jsonl"
            self._results = self._read()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=quiet,
        )
        self._task = self._progress.add_task("starting", total=total)
        self._steps = 0

    def _read(self) -> dict[str, Any]:
        results: dict[str, Any] = {}
        if self.path is not None and self.path.exists():
            text = self.path.read_text(encoding="utf-8")
            if text and not text.endswith("\n"):
                with self.path.open("a", encoding="utf-8") as file:
                    file.write("\n")  # end the half line of a killed run, or the next step would be lost with it
            for line in text.splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the last line of a run that was killed while writing
                results[entry["key"]] = entry["result"]
        return results

    def __enter__(self) -> Session:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def done(self, key: str) -> bool:
        """Whether the step ``key`` has a stored result."""
        return key in self._results

    def step(self, key: str, run: Callable[[], Any]) -> Any:
        """Result of the step ``key``: the stored one, or that of ``run()``, which must be plain JSON."""
        self._steps += 1
        total = self._progress.tasks[0].total
        if total is not None and self._steps > total:
            self._progress.update(self._task, total=self._steps)
        self._progress.update(self._task, description=key)
        if key not in self._results:
            began = time.perf_counter()
            result = json.loads(json.dumps(run()))
            if self.path is not None:
                entry = {"key": key, "seconds": round(time.perf_counter() - began, 3), "result": result}
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
            self._results[key] = result
        self._progress.advance(self._task)
        return self._results[key]

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self._progress.console.print(text)
