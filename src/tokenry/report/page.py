"""Build the page: one HTML file with its style, script and pictures inside."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import tokenry
from tokenry.catalog.entries import Card, cards
from tokenry.compare.run import Result
from tokenry.evidence.records import CHECKS, Record, all_records
from tokenry.report import charts
from tokenry.report.numbers import exponent, readable
from tokenry.report.table import best, cell, is_number

__all__ = ["build_report"]

TEMPLATES = Path(__file__).parent / "templates"
# What of the reader's own goes into each kind of comparison.
YOURS = {
    "decoding": "--model YOUR_MODEL --data prompts.txt",
    "kvcache": "--model YOUR_MODEL --data texts.txt",
    "mixers": "--data FOLDER_OF_LABELLED_IMAGES",
    "backbones": "--data FOLDER_OF_LABELLED_IMAGES",
    "losses": "--set vocab=128000 --set tokens=2048",
    "forecasters": "--data your.csv",
    "tokenizers": "--model tokenizer.json --data FOLDER_OF_TEXTS",
    "detectors": "--model SCORER --data texts.jsonl",
}


def build_report(out: Path | str, results: Iterable[Result] = (), records: Iterable[Record] | None = None) -> Path:
    """Write ``out/index.html`` and return its path.

    Args:
        out: Folder of the page; made if missing.
        results: Finished comparisons to show.
        records: Evidence to show. None: the project's records and the user's own.
    """
    known = list(cards().values())
    evidence = list(all_records() if records is None else records)
    shown = list(results)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["readable"] = readable
    html = environment.get_template("page.html.j2").render(
        version=tokenry.__version__,
        built=datetime.now(UTC).strftime("%d %B %Y"),
        style=Markup((TEMPLATES / "page.css").read_text("utf-8")),
        script=Markup((TEMPLATES / "page.js").read_text("utf-8")),
        index=Markup(json.dumps(_search_index(known)).replace("</", "<\\/")),
        methods=[_method(card, evidence, shown) for card in known],
        families=sorted({card.family for card in known}),
        comparisons=[_comparison(result) for result in shown],
        checks_run=len(evidence),
        checks_passed=sum(record.passed for record in evidence),
    )
    path = Path(out) / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, "utf-8")
    return path


def _search_index(known: list[Card]) -> list[dict[str, str]]:
    return [
        {
            "slug": card.slug,
            "title": card.title,
            "does": card.does,
            "text": " ".join(
                [card.slug, card.title, card.title, card.does, card.use_when, card.family, card.paper, *card.tags, *card.tags,
                 *card.models, *card.mixers, *card.authors]
            ).lower(),
        }
        for card in known
    ]  # fmt: skip


def _badges(mine: list[Record]) -> list[dict[str, Any]]:
    found = []
    for check in CHECKS:
        runs = [r for r in mine if r.check == check]
        if runs:
            found.append(
                {
                    "check": check,
                    "passed": sum(r.passed for r in runs),
                    "run": len(runs),
                    "good": all(r.passed for r in runs),
                }
            )
    return found


def _method(card: Card, evidence: list[Record], results: list[Result]) -> dict[str, Any]:
    mine = [record for record in evidence if record.slug == card.slug]
    by_claim = {record.id: record for record in mine if record.check in ("claim", "behaviour")}
    claims = []
    for claim in card.claims:
        record = by_claim.get(claim.id)
        claims.append(
            {
                "statement": claim.statement,
                "kind": claim.kind,
                "source": claim.source,
                "paper": f"{readable(claim.paper)} {claim.unit}".strip() if claim.paper is not None else "",
                "record": record,
                "here": ""
                if record is None or record.value is None
                else f"{readable(record.value)} {record.unit}".strip(),
                "why_not": claim.why_not or "not run yet: tokenry verify " + card.slug,
                "charts": _charts(record),
            }
        )
    golden = [record for record in mine if record.check == "golden"]
    return {
        "card": card,
        "snippet": card.snippet.strip(),
        "badges": _badges(mine),
        "claims": claims,
        "golden": golden,
        "golden_worst": max((r.value for r in golden if r.value is not None), default=None),
        "speed": [record for record in mine if record.check == "speed"],
        "properties": [record for record in mine if record.check == "properties"],
        "compare": [result.kind for result in results if result.kind in card.compare],
    }


def _charts(record: Record | None) -> list[dict[str, Any]]:
    """Pictures that a claim's record brings along in ``details["charts"]``."""
    drawn = []
    for chart in record.details.get("charts", []) if record else []:
        arguments = {k: v for k, v in chart.items() if k not in ("type", "title", "caption")}
        if chart["type"] == "lines":
            svg = charts.lines(**arguments)
        elif chart["type"] == "stacked":
            svg = charts.stacked(arguments["groups"], chart["title"])
        else:
            svg = charts.bars(**arguments, title=chart["title"])
        drawn.append({"title": chart["title"], "caption": chart.get("caption", ""), "svg": Markup(svg)})
    return drawn


def _comparison(result: Result) -> dict[str, Any]:
    columns = result.columns
    winners = {column.key: best(result, column) for column in columns}
    rows = []
    for row in result.outcome.rows:
        cells = []
        for column in columns:
            value = row.get(column.key)
            cells.append(
                {
                    "text": cell(row, column),
                    "best": winners[column.key] is not None and value == winners[column.key],
                    "sort": value if is_number(value) else "",
                    "label": column.title,
                }
            )
        rows.append(
            {
                "method": row["method"],
                "slug": row.get("slug", ""),
                "base": row["method"] == result.baseline,
                "cells": cells,
            }
        )
    return {
        "result": result,
        "columns": columns,
        "rows": rows,
        "headline": _headline(result),
        "plots": _plots(result),
        "sweeps": [
            {
                "sweep": sweep,
                "svg": Markup(
                    charts.lines(
                        sweep.points, sweep.x, sweep.y, log_x=sweep.log_x, log_y=sweep.log_y, baseline=result.baseline,
                        remarks={name: f"grows with power {exponent(value)}" for name, value in sweep.exponents.items()},
                    )
                ),
            }
            for sweep in result.outcome.sweeps
        ],
        "command": f"tokenry compare {result.kind} {YOURS.get(result.kind, '')}".strip(),
        "versions": ", ".join(f"{name} {version}" for name, version in result.versions.items()),
    }  # fmt: skip


def _headline(result: Result) -> str:
    """The first figure with a direction, in one sentence: the best method beside the baseline, and the baseline."""
    rows = {row["method"]: row for row in result.outcome.rows}
    by_key = {column.key: column for column in result.columns}
    drawn = [by_key[plot.y] for plot in result.plots]  # what is drawn first matters most
    for column in [*drawn, *result.columns]:
        values = {name: row[column.key] for name, row in rows.items() if is_number(row.get(column.key))}
        others = {name: value for name, value in values.items() if name != result.baseline}
        if column.better is None or len(set(values.values())) < 2 or not others:
            continue
        name = (max if column.better == "higher" else min)(others, key=others.__getitem__)
        sentence = f"{column.heading}, {column.better} is better: {name} {readable(others[name], column.digits)}"
        if result.baseline in values:
            sentence += f", {result.baseline} {readable(values[result.baseline], column.digits)}"
        return sentence + "."
    return ""


def _plots(result: Result) -> list[dict[str, Any]]:
    titles = {column.key: column.heading for column in result.columns}
    drawn = []
    for plot in result.plots:
        numbers = {
            row["method"]: row
            for row in result.outcome.rows
            if all(is_number(row.get(key)) for key in (plot.y, plot.x) if key is not None)
        }
        if len(numbers) < 2:
            continue
        y_title = titles.get(plot.y, plot.y)
        if plot.x is None:
            svg = charts.bars(
                {name: row[plot.y] for name, row in numbers.items()},
                y_title,
                baseline=result.baseline,
                spread={
                    name: row[f"{plot.y}_spread"]
                    for name, row in numbers.items()
                    if is_number(row.get(f"{plot.y}_spread"))
                },
            )
        else:
            points = {name: (row[plot.x], row[plot.y]) for name, row in numbers.items()}
            svg = charts.scatter(
                points,
                titles.get(plot.x, plot.x),
                y_title,
                baseline=result.baseline,
                log_x=plot.log_x,
                log_y=plot.log_y,
            )
        drawn.append({"title": plot.title, "caption": plot.caption, "svg": Markup(svg)})
    return drawn
