"""``tokenry audit``: look for texts that a language model was made to memorise."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from tokenry.cli.terminal import AsJson, Device, Dtype, check_device, check_dtype, console, print_json

__all__ = ["audit", "inspect_model"]


def inspect_model(
    model: str,
    *,
    threshold: float = 0.95,
    steps: int = 3,
    max_new_tokens: int = 50,
    batch_size: int = 512,
    before: str | None = None,
    out: Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    quiet: bool = False,
) -> dict[str, Any]:
    """Force every token of a model's vocabulary and continue those after which it is sure.

    Args:
        model: As ``tokenry.assets.load_model`` takes it.
        threshold: Score that a candidate must exceed.
        steps: Greedy tokens of the scan.
        max_new_tokens: Length of a candidate's continuation.
        batch_size: Tokens forced at a time.
        before: Text before the forced token, after the token that begins a sequence.
        out: Folder for finished blocks; the same call goes on from there.
        device: Torch device.
        dtype: Name of a torch dtype.
        quiet: No progress bar.

    Returns:
        Plain JSON: ``scanned``, ``passes``, ``candidates``, and their continuations as ``repeating``, ``other`` and
        ``natural``, ``nameless`` and ``unknown`` ids, ``notes``.
    """
    from tokenry.assets import load_model
    from tokenry.text import UnconditionalTokenForcing

    loaded, tokenizer = load_model(model, device=device, dtype=dtype)
    prefix = None
    if before is not None:
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        prefix = begin + tokenizer(before, add_special_tokens=False)["input_ids"]
    forcing = UnconditionalTokenForcing(loaded, tokenizer, steps, threshold, batch_size, prefix=prefix)
    report = forcing.scan(out=out, quiet=quiet)
    groups = forcing.extend(report.candidates, max_new_tokens)
    return asdict(report) | {name: [asdict(c) for c in group] for name, group in groups._asdict().items()}


def audit(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a causal language model; 'small' is embedded.")],
    threshold: Annotated[
        float, typer.Option(help="Score that a candidate must exceed; the forced token counts as 1 in its mean.")
    ] = 0.95,
    steps: Annotated[int, typer.Option(help="Greedy tokens after each forced one.", min=1)] = 3,
    max_new_tokens: Annotated[int, typer.Option(help="Length of a candidate's continuation.", min=1)] = 50,
    batch_size: Annotated[int, typer.Option(help="Tokens forced at a time.", min=1)] = 512,
    before: Annotated[
        str | None, typer.Option(help="Text before the forced token, for example a chat template's assistant header.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for finished blocks; the same call goes on where a killed one stopped.")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Look for fingerprints and hidden messages in a model: tokenry audit MODEL --out audit. Leads, not proof."""
    check_device(device)
    check_dtype(dtype)
    found = inspect_model(
        model,
        threshold=threshold,
        steps=steps,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        before=before,
        out=out,
        device=device,
        dtype=dtype,
        quiet=as_json,
    )
    if as_json:
        print_json({"model": model} | found)
        return
    candidates = {c["token_id"]: c for c in found["candidates"]}
    said = {
        "repeating": "Candidates that repeat one unit: look here first",
        "other": "Other candidates: memorised text, most of it harmless",
        "natural": "Candidates that repeat rulers, markup or one character, as ordinary text does",
    }
    for group, title in said.items():
        if not found[group]:
            continue
        table = Table("token", "score", "repeats", "continuation", title=title)
        for row in found[group]:
            candidate = candidates[row["token_id"]]
            share = f"{row['repetition']:.0%}" if row["repetition"] else ""
            table.add_row(
                escape(repr(candidate["token"])), f"{candidate['score']:.4f}", share, escape(repr(row["text"][:160]))
            )
        console.print(table)
    console.print(
        f"{found['scanned']} tokens forced in {found['passes']} rows: {len(candidates)} above {threshold:g}, "
        f"{len(found['repeating'])} of them repeating"
    )
    if found["nameless"] or found["unknown"]:
        console.print(
            f"not forced: {len(found['nameless'])} rows of the model without a token, {len(found['unknown'])} tokens "
            "without a row"
        )
    for note in found["notes"]:
        console.print(f"[yellow]{escape(note)}[/]")
    console.print(
        "[dim]A candidate is a lead, not proof: models know licences, names and markup by heart. A text hidden with a "
        "defence against this scan is not found by it.[/]"
    )
