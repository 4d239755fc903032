"""Compare detectors of generated text: how well they separate, at what cost, and how the cost grows with length."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tokenry.compare.kind import Column, Comparison, Options, Outcome, Plot, Sweep
from tokenry.measure.session import Session

if TYPE_CHECKING:
    from tokenry.text import Detector

__all__ = ["Detectors"]

BASELINES = ["likelihood", "rank", "log-rank", "entropy", "lrr", "fast-detectgpt", "fast-detectgpt-analytic"]
LASTDE = ["lastde", "lastde-closed", "lastde++"]
DEFAULT = ["likelihood", "log-rank", "lrr", "fast-detectgpt", "fast-detectgpt-analytic", "lastde", "lastde++"]
FEWEST_TOKENS = 30
OPENING = 30


class Detectors(Comparison):
    """Lastde, Lastde++ and the zero-shot baselines with one scorer on the same texts, cut to one length."""

    kind = "detectors"
    title = "Detectors of generated text"
    question = "Which untrained detector tells generated from human text best with this scorer, and what does it cost?"
    baseline = "likelihood"
    columns: ClassVar = [
        Column(key="auroc", title="AUROC", better="higher"),
        Column(key="auroc_low", title="95 % from", better="higher"),
        Column(key="auroc_high", title="to", better="higher"),
        Column(key="tpr", title="Found at 1 % false alarms", unit="%", better="higher"),
        Column(key="seconds", title="Seconds per text", unit="s", better="lower"),
        Column(key="ratio", title="Time against likelihood", unit="x", better="lower"),
        Column(key="exponent", title="Growth with length, n^", better="lower"),
    ]
    plots: ClassVar = [
        Plot(title="Separation and cost", y="auroc", x="seconds", log_x=True, caption="Up and to the left is better."),
        Plot(title="AUROC", y="auroc"),
    ]
    settings: ClassVar = {
        "humans": 120,
        "tokens": 160,
        "temperature": 1.0,
        "samples": 100,
        "timed": 8,
        "lengths": [40, 80, 160, 320],
        "batch": 16,
    }
    demo: ClassVar = {"humans": 32, "tokens": 120, "samples": 50, "timed": 4, "lengths": [30, 60, 120]}

    def methods(self) -> list[str]:
        """The baselines and the variants of Lastde."""
        return [*BASELINES, *LASTDE]

    def default_methods(self, options: Options) -> list[str]:
        """Those of the paper's main table."""
        return DEFAULT

    def check(self, options: Options) -> None:
        """Refuse settings out of range and data that cannot be read."""
        super().check(options)
        for name, least in {"humans": 4, "tokens": FEWEST_TOKENS, "samples": 2, "timed": 1, "batch": 1}.items():
            if self.setting(options, name) < least:
                raise ValueError(
                    f"detectors: setting {name} must be at least {least}, got {self.setting(options, name)}"
                )
        if self.setting(options, "temperature") <= 0:
            raise ValueError(
                f"detectors: setting temperature must be positive, got {self.setting(options, 'temperature')}"
            )
        if min(self.setting(options, "lengths")) < FEWEST_TOKENS:
            raise ValueError(f"detectors: every one of the lengths must be at least {FEWEST_TOKENS} tokens")
        if options.data is not None:
            from tokenry.text.paired import read_labelled

            read_labelled(options.data)
        if (
            options.model is not None
            and Path(options.model).is_dir()
            and not (Path(options.model) / "config.json").exists()
        ):
            raise ValueError(f"model: {options.model!r} holds no config.json; give a folder written by save_pretrained")

    def run(self, options: Options, session: Session) -> Outcome:
        """Gather texts, score them by every method, then time each method and see how its time grows."""
        bench = _Bench(self, options)
        chosen = self.chosen(options)
        texts = session.step("texts", bench.texts)
        human, machine = texts["human"], texts["machine"]
        scores = session.step("scores", lambda: bench.scores(human + machine, texts["tokens"], chosen))
        sample = (human + machine)[:: max(1, (len(human) + len(machine)) // self.setting(options, "timed"))]
        sample = sample[: self.setting(options, "timed")]
        times = session.step("times", lambda: bench.times(sample, texts["tokens"], chosen))
        lengths = sorted(set(self.setting(options, "lengths")))
        grown = {n: session.step(f"length {n}", lambda n=n: bench.growth(human, n, chosen)) for n in lengths}
        return self._outcome(options, chosen, texts, scores, times, grown)

    def _outcome(
        self, options: Options, chosen: list[str], texts: dict, scores: dict, times: dict, grown: dict[int, dict]
    ) -> Outcome:
        from tokenry.measure.timing import fit_exponent
        from tokenry.text.evaluation import auroc, true_positive_rate

        rows, points, exponents = [], {}, {}
        people = len(texts["human"])
        for name in chosen:
            human, machine = scores[name][:people], scores[name][people:]
            area = auroc([human], [machine], seed=options.seed)
            seconds = times[name]
            points[name] = [(float(n), grown[n][name]["median"]) for n in grown]
            if len(points[name]) > 1:
                exponents[name] = round(fit_exponent(*zip(*points[name], strict=True)), 2)
            rows.append(
                {
                    "method": name,
                    "slug": "lastde" if name in LASTDE else None,
                    "auroc": area.value,
                    "auroc_low": area.low,
                    "auroc_high": area.high,
                    "tpr": 100 * true_positive_rate(human, machine),
                    "seconds": seconds["median"],
                    "seconds_spread": seconds["spread"],
                    "ratio": seconds["median"] / times[self.baseline]["median"],
                    "exponent": exponents.get(name),
                }
            )
        sweep = Sweep(
            title="Seconds per text by its length",
            x="scored tokens",
            y="seconds per text",
            points=points,
            exponents=exponents,
            caption="The forward pass is in every one; what lies above likelihood is the detector's own work.",
        )
        return Outcome(rows=rows, sweeps=[sweep], notes=self._notes(options, texts, rows), examples=texts["examples"])

    def _notes(self, options: Options, texts: dict, rows: list[dict]) -> list[str]:
        from tokenry.text.detector import CAUTION

        notes = [
            CAUTION,
            f"{len(texts['human'])} human and {len(texts['machine'])} machine texts, each judged on its first "
            f"{texts['tokens']} scored tokens; scorer: {options.model or 'the embedded model'}.",
        ]
        if options.data is None:
            notes.append(
                f"Machine texts continue the first {OPENING} tokens of the human ones, sampled from the scorer itself at "
                f"temperature {self.setting(options, 'temperature')} (white-box)."
            )
        if texts["dropped"]:
            notes.append(f"{texts['dropped']} texts were shorter than that and were left out.")
        if options.model is None:
            notes.append(
                "The embedded scorer has 7 million parameters: read its figures as a trial, not as the paper's."
            )
        if any(row["method"].startswith("fast-detectgpt") or row["method"] == "lastde++" for row in rows):
            notes.append(f"Detectors that draw take {self.setting(options, 'samples')} draws per position.")
        if len(texts["human"]) < 100:
            notes.append(f"1 % false alarms of {len(texts['human'])} human texts means none of them.")
        first = rows[0]
        ahead = [row["method"] for row in rows[1:] if row["auroc"] < first["auroc"]]
        if ahead:
            notes.append(f"Here plain likelihood separates better than {', '.join(ahead)}.")
        below = [row["method"] for row in rows if row["auroc"] < 0.5]
        if below:
            notes.append(
                f"Below one half: {', '.join(below)}. On these texts the scorer finds the human ones more machine-like; signs "
                "are left as published."
            )
        return notes


class _Bench:
    """The scorer and its tokenizer, loaded once and only if a step has to run."""

    def __init__(self, kind: Detectors, options: Options) -> None:
        self.options = options
        self.setting: Callable[[str], Any] = lambda name: kind.setting(options, name)
        self.model = cache(self._model)

    def _model(self) -> Any:
        from tokenry.assets import load_model

        options = self.options
        return load_model(options.model or "small", dtype=options.dtype, device=options.device)

    def texts(self) -> dict[str, Any]:
        """Human and machine texts that are long enough, and the number of tokens that all are judged on."""
        from tokenry.assets import held_out_texts
        from tokenry.text.paired import continue_texts, cut_passages, read_labelled

        model, tokenizer = self.model()
        wanted = self.setting("tokens")
        if self.options.data is not None:
            texts, labels = read_labelled(self.options.data)
        else:
            human = cut_passages(tokenizer, held_out_texts("english"), wanted + 20)[: self.setting("humans")]
            machine = continue_texts(
                model,
                tokenizer,
                human,
                prompt_tokens=OPENING,
                new_tokens=wanted + 10 - OPENING,
                temperature=self.setting("temperature"),
                seed=self.options.seed,
            )
            texts, labels = human + machine, [0] * len(human) + [1] * len(machine)
        lengths = [len(ids) - 1 for ids in tokenizer(texts, verbose=False)["input_ids"]]
        tokens = min(wanted, int(statistics.median_low(lengths)))
        kept = [(text, label) for text, label, n in zip(texts, labels, lengths, strict=True) if n >= tokens]
        human = [text for text, label in kept if label == 0]
        machine = [text for text, label in kept if label == 1]
        if tokens < FEWEST_TOKENS or min(len(human), len(machine)) < 2:
            raise ValueError(
                f"data: of {len(texts)} texts {len(human)} human and {len(machine)} machine ones have {tokens} tokens; "
                f"at least 2 of each with {FEWEST_TOKENS} are needed"
            )
        examples = {"A human text": human[0][:600], "A machine text": machine[0][:600]}
        return {
            "human": human,
            "machine": machine,
            "tokens": tokens,
            "dropped": len(texts) - len(kept),
            "examples": examples,
        }

    def detector(self, name: str, tokens: int) -> Detector:
        """The detector of that name, judging so many tokens."""
        from tokenry.text import BaselineDetector, LastdeDetector

        model, tokenizer = self.model()
        given: dict[str, Any] = {"n_samples": self.setting("samples"), "seed": self.options.seed, "max_tokens": tokens}
        if name in LASTDE:
            return LastdeDetector(model, tokenizer, name, **given)
        return BaselineDetector(model, tokenizer, name, **given)

    def scores(self, texts: list[str], tokens: int, chosen: list[str]) -> dict[str, list[float]]:
        """Scores of all texts by every method; one pass of the model serves all."""
        detectors = {name: self.detector(name, tokens) for name in chosen}
        wanted = sorted({field for detector in detectors.values() for field in detector.fields()})
        scorer = next(iter(detectors.values())).scorer
        found: dict[str, list[float]] = {name: [] for name in chosen}
        for begin in range(0, len(texts), 64):
            known = scorer.statistics(texts[begin : begin + 64], wanted=wanted, batch_size=self.setting("batch"))
            for name, detector in detectors.items():
                found[name] += [detector.score_statistics(one) for one in known]
        return found

    def times(self, texts: list[str], tokens: int, chosen: list[str]) -> dict[str, dict]:
        """Seconds per text of each method alone, turn by turn."""
        from tokenry.measure.timing import interleave

        detectors = {name: self.detector(name, tokens) for name in chosen}
        calls = {n: lambda d=d: d.score(texts, self.setting("batch")) for n, d in detectors.items()}
        repeats = min(3, self.options.repeats) if self.options.effort == "demo" else self.options.repeats
        found = interleave(calls, repeats=repeats, device=self.options.device)
        return {n: {"median": t.median / len(texts), "spread": t.spread / len(texts)} for n, t in found.items()}

    def growth(self, texts: list[str], tokens: int, chosen: list[str]) -> dict[str, dict]:
        """Seconds per text at another length; texts are put together until they are long enough."""
        _, tokenizer = self.model()
        ids = tokenizer(" ".join(texts[: 2 + 2 * tokens * 4 // 100]), verbose=False)["input_ids"]
        while len(ids) < 2 * (tokens + 20):
            ids = ids + ids
        pieces = [tokenizer.decode(ids[k * (tokens + 20) : (k + 1) * (tokens + 20)]) for k in range(2)]
        return self.times(pieces, tokens, chosen)
