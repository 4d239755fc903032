"""A comparison as a table on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokenry.compare.kind import Column
from tokenry.compare.run import Result
from tokenry.report.numbers import exponent, readable

__all__ = ["best", "cell", "is_number", "print_result"]


def is_number(value: object) -> bool:
    """Whether a row's value can be compared and drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def cell(row: dict, column: Column) -> str:
    """A row's value with its spread behind it."""
    spread = row.get(f"{column.key}_spread")
    return readable(row.get(column.key), column.digits) + (f" ± {readable(spread, 2)}" if is_number(spread) else "")


def best(result: Result, column: Column) -> object:
    """The best value of a column, or None where no direction is better."""
    values = [row[column.key] for row in result.outcome.rows if is_number(row.get(column.key))]
    if column.better is None or len(set(values)) < 2:
        return None
    return max(values) if column.better == "higher" else min(values)


def _heading(column: Column) -> str:
    """Title, unit, and an arrow where one direction is better."""
    return column.heading + {"higher": " ↑", "lower": " ↓", None: ""}[column.better]


def _narrowest(result: Result, column: Column) -> int:
    """Characters that a column needs: its widest value, or the widest word of its heading, which may wrap."""
    cells = (cell(row, column) for row in result.outcome.rows)
    return max(map(len, [*_heading(column).split(), *cells]))


def _that_fit(result: Result, width: int) -> list[Column]:
    """The first columns whose values fit beside each other; headings may wrap."""
    rows = result.outcome.rows
    names = [len(row["method"]) + (11 if row["method"] == result.baseline else 0) for row in rows]
    left = width - max(names, default=0) - 4
    fitting = []
    for column in result.columns:
        left -= 3 + _narrowest(result, column)
        if left < 0 and fitting:
            break
        fitting.append(column)
    return fitting


def print_result(result: Result, console: Console) -> None:
    """Print the table, the exponents and the notes; the best of each column in bold, the baseline marked."""
    table = Table(title=f"{result.title}: {result.question}", title_justify="left")
    table.add_column("method", no_wrap=True)
    shown = _that_fit(result, console.width)
    for column in shown:
        table.add_column(_heading(column), justify="right", min_width=_narrowest(result, column))
    winners = {column.key: best(result, column) for column in shown}
    for row in result.outcome.rows:
        name = escape(row["method"]) + (" [dim](baseline)[/]" if row["method"] == result.baseline else "")
        cells = []
        for column in shown:
            text = cell(row, column)
            won = winners[column.key] is not None and row.get(column.key) == winners[column.key]
            cells.append(f"[bold green]{text}[/]" if won else text)
        table.add_row(name, *cells)
    console.print(table)
    if len(shown) < len(result.columns):
        left_out = ", ".join(column.title for column in result.columns[len(shown) :])
        console.print(f"[dim]Not shown for want of width: {left_out} (all stand in the report and in --json).[/]")
    for sweep in result.outcome.sweeps:
        if sweep.exponents:
            grown = ", ".join(
                f"{name} {exponent(value)}" for name, value in sorted(sweep.exponents.items(), key=lambda e: e[1])
            )
            console.print(f"[bold]{escape(sweep.title)}[/], exponent: {escape(grown)}", highlight=False)
    for note in result.outcome.notes:
        console.print(f"• {note}", highlight=False, markup=False)
    console.print(
        f"[dim]{result.machine.processor}, {result.machine.cores} cores, {result.machine.device}; {result.seconds:.0f} s[/]\n",
        highlight=False,
    )
