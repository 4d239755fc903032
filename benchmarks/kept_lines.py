"""What an earlier, perhaps killed, run of a benchmark has written: one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def kept_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a half one is ended, so that the next does not run into it."""
    if not path.exists():
        return []
    text = path.read_text("utf-8")
    if text and not text.endswith("\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
    entries = []
    for line in text.splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries
