"""``tokenry mixture``: what was this tokenizer trained on?"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tokenry.cli.terminal import AsJson, aside, console, print_json

__all__ = ["mixture"]


def parse_data(given: list[str]) -> dict[str, Path]:
    """``name=file`` arguments, or folders of ``*.txt``, as category to file.

    Raises:
        ValueError: Neither, a file that is not there, or a name twice.
    """
    found: dict[str, Path] = {}
    for item in given:
        name, sign, path = item.partition("=")
        if not sign and Path(item).is_dir():
            files = {file.stem: file for file in sorted(Path(item).glob("*.txt"))}
            if not files:
                raise ValueError(f"--data {item}: the folder has no *.txt files")
        elif not sign or not name or not path:
            raise ValueError(
                f"--data {item!r}: write name=file, for example rus=rus.txt, or name a folder of *.txt files"
            )
        else:
            files = {name: Path(path)}
        for key, file in files.items():
            if key in found:
                raise ValueError(f"--data: category {key!r} is given twice")
            if not file.is_file():
                raise ValueError(f"--data: category {key!r}: there is no file {file}")
            found[key] = file
    return found


def mixture(
    tokenizer: Annotated[str, typer.Argument(help="tokenizer.json, its folder, or a .tiktoken file.")],
    data: Annotated[
        list[str], typer.Option(help="name=file for each category (several may follow), or a folder of *.txt files.")
    ],
    more: Annotated[
        list[str] | None, typer.Argument(help="Further name=file after --data.", show_default=False)
    ] = None,
    merges: Annotated[int, typer.Option(help="Use the first so many merges; fewer if the list is shorter.")] = 3000,
    denominator: Annotated[str, typer.Option(help="pairs, bytes or chars.")] = "pairs",
    out: Annotated[Path | None, typer.Option(help="Write the result to this file too, as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """What was this BPE tokenizer trained on? Shares of the categories that --data gives samples of."""
    from tokenry.tokenization import MixtureInference, read_merge_list

    files = parse_data([*data, *(more or [])])
    if merges < 1:
        raise ValueError(f"--merges must be at least 1, got {merges}")
    listed = read_merge_list(tokenizer, limit=merges)
    used = min(merges, len(listed.merges))
    inference = MixtureInference.from_tokenizer(listed, max_merges=used, denominator=denominator)  # type: ignore
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = inference.fit(files)
        except RuntimeError as error:  # the solver gave up, and says what to change
            raise ValueError(str(error)) from error
    messages = [str(warning.message) for warning in said if issubclass(warning.category, UserWarning)]
    for message in messages:
        aside(message, word="warning", style="yellow")
    result = {
        "tokenizer": tokenizer,
        "merges": used,
        "denominator": denominator,
        "proportions": found.proportions_,
        "pair_proportions": found.pair_proportions_,
        "objective": found.objective_,
        "constraints": found.n_constraints_,
        "missing_merges": len(found.missing_merges_),
        "redundant_merges_dropped": listed.redundant,
        "warnings": messages,
    }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
    if as_json:
        print_json(result)
        return
    table = Table("category", "share of training bytes", "share of pairs", title=f"{tokenizer}: first {used:,} merges")
    for name, share in sorted(found.proportions_.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{100 * share:.1f} %", f"{100 * found.pair_proportions_[name]:.1f} %")
    console.print(table)
