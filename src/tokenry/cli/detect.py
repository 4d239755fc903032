"""``tokenry detect``: score files with a zero-shot detector of generated text."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from tokenry.cli.terminal import AsJson, Device, check_device, console, print_json

__all__ = ["detect", "judge"]

ENOUGH = 20  # human texts that a threshold needs at least


def judge(
    texts: dict[str, str],
    human: list[str],
    *,
    scorer: str = "small",
    variant: str = "lastde++",
    false_positive_rate: float = 0.05,
    max_tokens: int = 400,
    samples: int = 100,
    seed: int = 0,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Score texts, each against a threshold from human texts cut to the same number of tokens.

    Args:
        texts: Name to text.
        human: Texts known to be written by people, as like those in question as can be had.
        scorer: Language model, as ``tokenry.assets.load_model`` takes it.
        variant: A variant of Lastde or a baseline.
        false_positive_rate: Share of the human texts that may lie above the threshold.
        max_tokens: Tokens of a text that are judged, at most; fewer where the human texts are shorter.
        samples: Draws per position, for the variants that draw.
        seed: Seed of the draws.
        device: Torch device.

    Returns:
        One row per text: ``file``, ``score``, ``threshold``, ``verdict``, ``tokens`` (judged), ``of`` (all), ``note``.

    Raises:
        ValueError: An unknown variant, an empty text, or fewer than twenty human texts.
    """
    from tokenry.assets import load_model
    from tokenry.text import CRITERIA, BaselineDetector, Detector, LastdeDetector, TokenScorer, choose_threshold
    from tokenry.text.lastde import VARIANTS

    if variant not in VARIANTS and variant not in CRITERIA:
        raise ValueError(f"--variant must be one of {', '.join([*VARIANTS, *CRITERIA])}, got {variant!r}")
    for name, text in texts.items():
        if not text.strip():
            raise ValueError(f"{name} is empty: there is nothing to score")
    if len(human) < ENOUGH:
        raise ValueError(f"a threshold needs at least {ENOUGH} human texts, got {len(human)}")
    choose_threshold([0.0] * len(human), [0] * len(human), false_positive_rate)
    model, tokenizer = load_model(scorer, device=device)
    detector: Detector
    if variant in VARIANTS:
        detector = LastdeDetector(model, tokenizer, variant, n_samples=samples, seed=seed)
    else:
        detector = BaselineDetector(model, tokenizer, variant, n_samples=samples, seed=seed)
    lengths = {
        name: len(ids) - 1 for name, ids in zip(texts, detector.scorer.encode(list(texts.values())), strict=True)
    }
    bounded = TokenScorer(model, tokenizer, n_samples=samples, seed=seed, max_tokens=max_tokens)
    known = bounded.statistics(human, wanted=detector.fields())
    reach = sorted(map(len, known), reverse=True)[ENOUGH - 1]  # so many tokens at least twenty human texts have
    thresholds: dict[int, float] = {}
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # short and constant texts are named in the notes
        for name, text in texts.items():
            row: dict[str, Any] = {"file": name, "score": None, "threshold": None, "verdict": "not judged"}
            judged = min(lengths[name], max_tokens, reach)
            row |= {"tokens": judged, "of": lengths[name], "note": ""}
            rows.append(row)
            try:
                statistics = bounded.statistics([text], wanted=detector.fields())[0].first(judged)
                row["score"] = detector.score_statistics(statistics)
            except ValueError as error:
                row["note"] = str(error)
                continue
            if judged not in thresholds:
                scores = [detector.score_statistics(s.first(judged)) for s in known if len(s) >= judged]
                thresholds[judged] = choose_threshold(scores, [0] * len(scores), false_positive_rate)
            row["threshold"] = thresholds[judged]
            row["verdict"] = "machine-like" if row["score"] > row["threshold"] else "not flagged"
            if judged < 50:
                row["note"] = "under 50 tokens a score is unreliable"
            elif judged < lengths[name]:
                row["note"] = f"judged on its first {judged} tokens"
    return rows


def detect(
    files: Annotated[list[Path], typer.Argument(help="Text files, UTF-8.", exists=True, dir_okay=False)],
    scorer: Annotated[
        str, typer.Option(help="Scoring model: folder or hub id of a causal language model; 'small' is embedded.")
    ] = "small",
    variant: Annotated[
        str, typer.Option(help="lastde++, lastde, lastde-closed, likelihood, log-rank, lrr, fast-detectgpt, ...")
    ] = "lastde++",
    human: Annotated[
        Path | None,
        typer.Option(
            help="Human texts for the threshold: a folder of .txt files or a JSONL with text. Default: embedded."
        ),
    ] = None,
    false_positive_rate: Annotated[
        float, typer.Option("--fpr", help="Share of the human texts that may be flagged.", min=0.0, max=0.99)
    ] = 0.05,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each text that are judged, at most.", min=30)] = 400,
    samples: Annotated[int, typer.Option(help="Draws per position.", min=2)] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Score texts as human or machine-made, untrained: tokenry detect essay.txt --scorer MODEL. Evidence, not proof."""
    from tokenry.assets import held_out_texts, read_text_file
    from tokenry.text.detector import CAUTION
    from tokenry.text.paired import read_texts

    check_device(device)
    texts = {str(path): read_text_file(path) for path in files}
    known = held_out_texts("english") if human is None else read_texts(human)
    rows = judge(
        texts,
        known,
        scorer=scorer,
        variant=variant,
        false_positive_rate=false_positive_rate,
        max_tokens=max_tokens,
        samples=samples,
        seed=seed,
        device=device,
    )
    origin = "embedded public-domain prose" if human is None else str(human)
    notes = [
        CAUTION,
        f"Threshold: at most {100 * false_positive_rate:g} % of {len(known)} human texts ({origin}) lie above it.",
    ]
    if scorer == "small":
        notes.append("The embedded scorer is tiny and only for trying this out: name a real model with --scorer.")
    if human is None:
        notes.append("Human texts like yours make a better threshold: --human FOLDER.")
    if as_json:
        print_json({"variant": variant, "scorer": scorer, "texts": rows, "notes": notes})
        return
    table = Table("file", "score", "threshold", "verdict", "tokens", title=f"{variant}, scored by {scorer}")
    for row in rows:
        score, threshold = (("" if row[key] is None else f"{row[key]:.3f}") for key in ("score", "threshold"))
        tokens = str(row["of"]) if row["tokens"] == row["of"] else f"{row['tokens']} of {row['of']}"
        table.add_row(escape(row["file"]), score, threshold, row["verdict"], tokens)
    console.print(table)
    for row in rows:
        if row["note"]:
            console.print(f"[yellow]{escape(row['file'])}:[/] {escape(row['note'])}", highlight=False)
    for note in notes:
        console.print(f"[dim]{escape(note)}[/]")
