"""Turn a run of the comparison of mixers into the table of docs/mixers.md.

tokenry compare mixers --seed 0 --set seeds=3 --out run
python scripts/mixer_table.py run/mixers/result.json > docs/mixers.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = [
    ("accuracy", "accuracy, %", 1),
    ("gain", "over no mixer", 1),
    ("params", "parameters, k", 0),
    ("macs", "multiply-accumulates, M", 1),
    ("rate", "images/s", 0),
    ("exponent", "growth, N^", 2),
    ("memory", "peak, MiB", 1),
]


def cell(row: dict[str, Any], key: str, digits: int) -> str:
    """A number with its spread over seeds where it has one."""
    value = row.get(key)
    if value is None:
        return ""
    spread = row.get(f"{key}_spread")
    shown = f"{value:.{digits}f}"
    return f"{shown} ± {spread:.{digits}f}" if spread is not None and key in ("accuracy", "gain") else shown


def main(source: Path) -> None:
    """Print the page."""
    run = json.loads(source.read_text("utf-8"))
    rows = sorted(run["outcome"]["rows"], key=lambda row: -row["accuracy"])
    settings = ", ".join(f"{key}={value}" for key, value in run["options"]["settings"].items())
    print("# Which mixer?\n")
    print(
        "Every registered token mixer in the same small MetaFormer, trained on the same photographs with the same steps, and its cost\n"
        "over the resolution. Nothing is tuned for any of them. The table is one run on one machine; yours, on your images and at\n"
        "your resolution, is one command:\n\n"
        "    tokenry compare mixers --data your_images/\n"
    )
    print("| mixer | " + " | ".join(title for _, title, _ in COLUMNS) + " |")
    print("|---|" + "---|" * len(COLUMNS))
    for row in rows:
        name = f"[`{row['method']}`](methods/{row['slug']}.md)" if row.get("slug") else f"`{row['method']}`"
        print(f"| {name} | " + " | ".join(cell(row, key, digits) for key, _, digits in COLUMNS) + " |")
    print(
        "\nGrowth is the exponent of one mixer's time over the number of tokens; peak is what one call holds at the largest size.\n"
    )
    for note in run["outcome"]["notes"]:
        print(f"- {note}")
    versions = run["versions"]
    print(
        f"\n*{run['machine']['processor']}, {run['machine']['cores']} cores, PyTorch {versions['torch']}; settings: "
        f"{settings or 'defaults'}.*"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
