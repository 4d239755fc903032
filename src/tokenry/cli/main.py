"""The command line. Each command loads only what it needs, so that ``tokenry list`` answers at once."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table

import tokenry
from tokenry.cli.audit import audit
from tokenry.cli.batch import batch
from tokenry.cli.detect import detect
from tokenry.cli.mixture import mixture
from tokenry.cli.terminal import AsJson, Device, Dtype, aside, check_device, check_dtype, console, print_json
from tokenry.cli.upscale import upscale

if TYPE_CHECKING:
    from tokenry.compare import Result

__all__ = ["app", "run"]

app = typer.Typer(
    name="tokenry",
    help="Published methods for tokens: find one, use it, compare it on your own model and data, verify it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def run() -> None:
    """Run the command line; a ``ValueError`` is shown as one sentence, without a traceback."""
    try:
        app()
    except ValueError as error:
        aside(str(error), word="error", style="red")
        raise SystemExit(2) from None


def _version(value: bool) -> None:
    if value:
        typer.echo(f"tokenry {tokenry.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("list")
def list_methods(
    family: Annotated[str | None, typer.Option(help="Only this family, for example decoding.")] = None,
    as_json: AsJson = False,
) -> None:
    """List all methods."""
    from tokenry.catalog import cards

    found = [card for card in cards().values() if family in (None, card.family)]
    if not found:
        families = sorted({card.family for card in cards().values()})
        raise ValueError(f"no method in family {family!r}; families: {', '.join(families)}")
    if as_json:
        print_json([card.model_dump() for card in found])
        return
    table = Table("method", "family", "what it does", title=f"{len(found)} methods")
    for card in found:
        table.add_row(f"[bold]{card.slug}[/]", card.family, escape(card.does))
    console.print(table)


@app.command()
def search(
    query: Annotated[list[str], typer.Argument(help="The problem, in your words.")],
    limit: Annotated[int, typer.Option(help="How many at most.", min=1)] = 5,
    as_json: AsJson = False,
) -> None:
    """Find a method: tokenry search "shrink the kv cache"."""
    from tokenry.catalog import search as find

    hits = find(" ".join(query), limit)
    if as_json:
        print_json([asdict(hit) for hit in hits])
        return
    if not hits:
        console.print("Nothing fits. [bold]tokenry list[/] shows all methods.")
        raise typer.Exit(1)
    table = Table("method", "what it does", "score")
    for hit in hits:
        table.add_row(f"[bold]{hit.slug}[/]", escape(hit.does), f"{hit.score:.1f}")
    console.print(table)


@app.command()
def show(
    slug: Annotated[str, typer.Argument(help="The method, as `tokenry list` names it.")], as_json: AsJson = False
) -> None:
    """Show one method: what it does, when to use it, code that runs, its claims and what was measured."""
    from tokenry.catalog import card
    from tokenry.evidence import all_records

    found = card(slug)
    records = [record for record in all_records() if record.slug == slug]
    if as_json:
        print_json({"card": found.model_dump(), "evidence": [record.model_dump(mode="json") for record in records]})
        return
    console.print(Panel(escape(found.does), title=f"[bold]{escape(found.title)}[/]", subtitle=found.entry_point))
    console.print(f"[bold]Use it when[/] {escape(found.use_when)}\n[bold]Not when[/] {escape(found.not_when)}\n")
    code = Syntax("", "python", background_color="default").highlight(found.snippet.strip())
    console.print(code, soft_wrap=True)  # lines stay whole, so that they can be copied
    table = Table("claim", "paper", "here", "shows", title="Claims")
    measured = {record.id: record for record in records if record.check in ("claim", "behaviour")}
    for claim in found.claims:
        if record := measured.get(claim.id):
            here, shows = _figure(record.value, record.unit), "[green]yes[/]" if record.passed else "[red]no[/]"
        else:
            here, shows = f"not measured: {claim.why_not or 'tokenry verify ' + slug}", ""
        table.add_row(escape(claim.statement), escape(_figure(claim.paper, claim.unit)), escape(here), shows)
    console.print(table)
    authors = ", ".join(found.authors[:4]) + (" et al." if len(found.authors) > 4 else "")
    console.print(f"{authors} ({found.year}): {found.paper}. {found.link}", markup=False)


def _figure(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:.4g} {unit}".strip()


def _setting(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"--set takes name=value, got {text!r}")
    return name, value


@app.command()
def compare(
    kind: Annotated[
        str, typer.Argument(help="decoding, kvcache, mixers, backbones, losses, forecasters, tokenizers, detectors")
    ],
    model: Annotated[
        str | None, typer.Option(help="Your model: a local folder or a hub id. Default: the embedded one.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Your data: prompts, a folder of images, a CSV, texts.")] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Names, separated by commas; a wrong one lists all. The baseline is always added."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for the runs and their page; the same call goes on where a killed one stopped.")
    ] = Path("comparison"),
    repeats: Annotated[int, typer.Option(help="Timed turns of each method.", min=1)] = 5,
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
    dtype: Dtype = "float32",
    quick: Annotated[
        bool, typer.Option("--quick", help="About half a minute instead of the full measurement.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of this kind: name=value; a wrong name lists all with their defaults."),
    ] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Compare methods side by side on your own model and data."""
    from tokenry.compare import KINDS, comparison
    from tokenry.compare import compare as run_comparison

    check_device(device)
    check_dtype(dtype)
    result = run_comparison(
        kind,
        out=out / kind,
        quiet=as_json,
        model=model,
        data=data,
        methods=comparison(kind).named(methods) if methods else None,
        device=device,
        dtype=dtype,
        seed=seed,
        repeats=repeats,
        effort="demo" if quick else "full",
        settings=dict(_setting(text) for text in settings or []),
    )
    if as_json:
        typer.echo(result.model_dump_json(indent=1))
        return
    from tokenry.report import build_report, print_result

    print_result(result, console)
    _say_where(build_report(out, _results([file for other in KINDS if (file := out / other / "result.json").exists()])))


def _results(files: list[Path]) -> list[Result]:
    """Finished comparisons.

    Raises:
        ValueError: A file holds something else.
    """
    from pydantic import ValidationError

    from tokenry.compare import Result

    found = []
    for file in files:
        try:
            found.append(Result.model_validate_json(file.read_bytes()))
        except ValidationError as error:
            raise ValueError(f"{file} is no result of `tokenry compare`: {error.errors()[0]['msg']}") from error
    return found


def _say_where(page: Path) -> None:
    """The path of a report, on one line so that it can be copied."""
    console.print(f"report: [bold]{escape(str(page))}[/]", highlight=False, soft_wrap=True)


@app.command()
def verify(
    slugs: Annotated[list[str] | None, typer.Argument(help="Methods; all where none is named.")] = None,
    claim: Annotated[list[str] | None, typer.Option(help="Only this claim; may be given several times.")] = None,
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for finished steps: the same call goes on there after a kill. Default: none."),
    ] = None,
    record: Annotated[
        str, typer.Option(help="Where results are kept: user (your own database), project (maintainers) or none.")
    ] = "user",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Run a method's claims: the paper's value, the value here, whether the effect shows."""
    from tokenry.catalog import cards
    from tokenry.claims import verify as run_claims
    from tokenry.evidence import save_project, save_user

    if record not in ("user", "project", "none"):
        raise ValueError(f"--record must be user, project or none, got {record!r}")
    check_device(device)
    outcomes, kept = [], None
    for outcome in run_claims(
        slugs or list(cards()), claims=claim, device=device, seed=seed, folder=out, quiet=as_json
    ):
        outcomes.append(outcome)
        if outcome.record is not None and record != "none":
            kept = (save_project if record == "project" else save_user)([outcome.record])
        if not as_json:
            colour = "red" if outcome.failed else "yellow" if outcome.not_run else "green"
            console.print(f"[bold]{outcome.slug}[/] {outcome.claim.id}: [{colour}]{outcome.state}[/]")
            console.print(
                f"  paper: {outcome.claim.statement}\n  here:  {outcome.sentence}", highlight=False, markup=False
            )
    if as_json:
        print_json(
            [
                {
                    "slug": o.slug, "claim": o.claim.id, "paper": o.claim.paper, "unit": o.claim.unit, "state": o.state,
                    "why": o.not_run or o.error, "record": o.record and o.record.model_dump(mode="json"),
                }
                for o in outcomes
            ]
        )  # fmt: skip
    else:
        count = Counter(outcome.state for outcome in outcomes)
        console.print(
            f"{count['shows']} of {count['shows'] + count['does not show']} claims that ran show; "
            f"{count['not run']} could not be run here, {count['error']} failed with an error"
        )
        if kept is not None:
            console.print(
                f"recorded in {kept}, which `tokenry status` and `tokenry show` read", markup=False, highlight=False
            )
    if any(outcome.failed for outcome in outcomes):
        raise typer.Exit(1)


@app.command()
def status(as_json: AsJson = False) -> None:
    """Show what is known about each method, computed from recorded runs, with their age."""
    from datetime import UTC, datetime

    from tokenry.catalog import cards
    from tokenry.evidence import CHECKS, all_records

    records = all_records()
    now = datetime.now(UTC)
    rows: list[dict[str, Any]] = []
    for card in cards().values():
        row: dict[str, Any] = {"slug": card.slug}
        for check in CHECKS:
            mine = [r for r in records if r.slug == card.slug and r.check == check]
            runnable = {c.id for c in card.claims if c.kind == check and c.runs == "cpu"}
            row[check] = {
                "passed": sum(r.passed for r in mine),
                "run": len(mine),
                "missing": len(runnable - {r.id for r in mine})
                if check in ("claim", "behaviour")
                else int(not mine and (check != "speed" or card.reference.may_be_run)),
                "unchecked": sum(c.kind == check and c.runs != "cpu" for c in card.claims),
                "age_days": min(((now - r.date).days for r in mine), default=None),
            }
        rows.append(row)
    if as_json:
        print_json(rows)
        return
    table = Table(
        title="passed / run; +n: claims that cannot be run on this kind of machine; age: of the check run longest ago",
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip  # narrow: 80 columns hold a method on one line
    for heading in ("method", *CHECKS, "age"):
        table.add_column(heading, no_wrap=True)
    for row in rows:
        ages = [row[check]["age_days"] for check in CHECKS if row[check]["run"]]
        cells = [_status_cell(row[check]) for check in CHECKS]
        table.add_row(f"[bold]{row['slug']}[/]", *cells, f"{max(ages)} d" if ages else "")
    console.print(table)


def _status_cell(cell: dict[str, Any]) -> str:
    extra = f" +{cell['unchecked']}" if cell["unchecked"] else ""
    if not cell["run"]:
        return f"[yellow]not run[/]{extra}" if cell["missing"] else f"[dim]none[/]{extra}"
    colour = "green" if cell["passed"] == cell["run"] and not cell["missing"] else "red"
    return f"[{colour}]{cell['passed']}/{cell['run']}[/]{extra}"


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="Folder of the page.")] = Path("report"),
    runs: Annotated[
        list[Path] | None, typer.Option("--run", help="Folder of a comparison (holds result.json).")
    ] = None,
) -> None:
    """Build the page from all cards, all evidence and the given comparisons."""
    from tokenry.report import build_report

    results: list[Result] = []
    for folder in runs or []:
        files = sorted(folder.rglob("result.json"))
        if not files:
            raise ValueError(f"{folder} holds no result.json: give the --out folder of a `tokenry compare` run")
        results += _results(files)
    _say_where(build_report(out, results))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the page and of the runs.")] = Path("report"),
    kinds: Annotated[str | None, typer.Option(help="Only these kinds, separated by commas.")] = None,
) -> None:
    """Compare real methods on real, embedded data and build the report: a few minutes on two cores."""
    from tokenry.compare import KINDS, comparison
    from tokenry.compare import compare as run_comparison
    from tokenry.report import build_report, print_result

    results = []
    chosen = [kind.strip() for kind in kinds.split(",")] if kinds else list(KINDS)
    for kind in chosen:
        comparison(kind)  # a wrong name is refused before the first one runs
    for kind in chosen:
        result = run_comparison(kind, out=out / "runs" / kind, effort="demo", repeats=3)
        results.append(result)
        print_result(result, console)
    console.print(f"\n[bold]{len(results)} comparisons[/] in {sum(r.seconds for r in results):.0f} s of computing")
    _say_where(build_report(out, results))


for command in (detect, batch, upscale, mixture, audit):  # after the others, as they shall stand in the help
    app.command()(command)
