"""Compare ways to tell what a BPE tokenizer was trained on, on tokenizers whose training text is known."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, ClassVar

from tokenry.compare.kind import Column, Comparison, Options, Outcome, Plot, Sweep
from tokenry.measure.session import Session
from tokenry.measure.timing import fit_exponent, interleave

__all__ = ["Tokenizers"]

MIXTURE, NNLS, TEE, TC = "mixture inference", "NNLS on ranks", "TEE", "TC"
SAMPLE_FILE = 2_000_000  # characters of a user's file that are read
TREAT_BYTES = 60_000  # text of each category on which bytes per token are measured


class Tokenizers(Comparison):
    """Mixture inference beside the simple guesses; and the user's own tokenizer and categories."""

    kind = "tokenizers"
    title = "What was a tokenizer trained on?"
    question = "What was this tokenizer trained on, and how does it treat my languages?"
    baseline = "uniform"
    columns: ClassVar[list[Column]] = [
        Column(key="error", title="Error of the shares", unit="log10 MSE", better="lower"),
        Column(key="points", title="Largest miss", unit="points", better="lower"),
        Column(key="gain", title="Closer than uniform", unit="x", better="higher"),
        Column(key="seconds", title="Time, counting included", unit="s", better="lower"),
    ]
    plots: ClassVar[list[Plot]] = [
        Plot(
            title="Error on known mixtures",
            y="error",
            caption="Mean over the same mixtures; lower is better, one unit is a factor of ten in squared error.",
        ),
        Plot(title="Error against time", x="seconds", y="error", log_x=True),
    ]
    settings: ClassVar[dict[str, Any]] = {
        "mixtures": 8,
        "categories": 5,
        "merges": 300,
        "training_kb": 200,
        "sample_kb": 150,
        "sweep": [50, 100, 200, 400, 800, 1600],
    }
    demo: ClassVar = {"mixtures": 3, "merges": 200, "training_kb": 100, "sample_kb": 40, "sweep": [50, 100, 200, 400]}

    def methods(self) -> list[str]:
        """The baseline, then the guesses, then the linear program."""
        return [self.baseline, "random", TC, TEE, NNLS, MIXTURE]

    def check(self, options: Options) -> None:
        """Refuse unreadable files, too few categories or mixtures."""
        super().check(options)
        for name, least in (("mixtures", 3), ("categories", 2), ("merges", 10), ("training_kb", 5), ("sample_kb", 1)):
            if self.setting(options, name) < least:
                raise ValueError(f"tokenizers: {name} must be at least {least}, got {self.setting(options, name)}")
        sweep = self.setting(options, "sweep")
        if len(sweep) < 2 or min(sweep) < 10:
            raise ValueError(f"tokenizers: sweep must be at least two numbers of merges from 10 on, got {sweep}")
        if options.data is not None:
            found = files(options.data)
            wanted = self.setting(options, "categories")
            if len(found) < wanted:
                raise ValueError(
                    f"tokenizers: {options.data} holds {len(found)} *.txt files, and each mixture takes {wanted} categories; "
                    "add files, one per language or domain, or set categories lower"
                )
            for path in found:
                if path.stat().st_size < 2_000:
                    raise ValueError(
                        f"tokenizers: {path.name} has less than 2 KB of text; give each category 20 KB or more"
                    )
        if options.model is not None:
            from tokenry.tokenization import read_merge_list

            read_merge_list(options.model, limit=1)

    def run(self, options: Options, session: Session) -> Outcome:
        """Mixtures, time, growth, then the tokenizer in question."""
        chosen = self.chosen(options)
        texts = categories(options.data)
        count = self.setting(options, "mixtures")
        runs = [
            session.step(f"mixture/{i}", lambda i=i: self._mixture(options, texts, i, chosen)) for i in range(count)
        ]
        if TEE in chosen:
            for i, run in enumerate(runs):
                run["shares"][TEE] = _efficiency(runs, i)
        times = session.step("time", lambda: self._time(options, texts, chosen))
        rows = [self._row(method, runs, times) for method in chosen]
        sweeps = []
        growing = [method for method in (NNLS, MIXTURE) if method in chosen]
        if growing:
            points = [
                session.step(f"merges/{m}", lambda m=m: self._grow(options, texts, m, growing))
                for m in self.setting(options, "sweep")
            ]
            sweeps = _sweeps(points, growing)
        examples, notes = {}, self._notes(options, rows, runs, texts)
        if options.model is not None or options.data is None:
            title, text, extra = session.step("tokenizer", lambda: self._own(options, texts))
            examples[title] = text
            notes += extra
        return Outcome(rows=rows, sweeps=sweeps, notes=notes, examples=examples)

    def _known(self, options: Options, texts: dict[str, list[str]], index: int, merges: int | None = None) -> Any:
        import numpy as np

        from tokenry.tokenization import draw_shares, train_known_mixture

        n = self.setting(options, "categories")
        rng = np.random.default_rng([options.seed, index])
        names = rng.permutation(sorted(texts))[:n].tolist()
        return train_known_mixture(
            {name: texts[name] for name in names},
            draw_shares(n, rng),
            merges=merges or self.setting(options, "merges"),
            total_bytes=1000 * self.setting(options, "training_kb"),
            sample_bytes=1000 * self.setting(options, "sample_kb"),
        )

    def _mixture(self, options: Options, texts: dict[str, list[str]], index: int, chosen: list[str]) -> dict[str, Any]:
        """Shares that every method finds for one known mixture, all from the same counts."""
        import numpy as np

        from tokenry.tokenization import MixtureInference, TokenEfficiency, classify_tokens, draw_shares, fit_ranks

        known = self._known(options, texts, index)
        inference = MixtureInference.from_tokenizer(known.tokenizer, unseen="keep")
        samples = _quietly(lambda: inference.count(known.samples))
        names = list(known.shares)
        random = draw_shares(len(names), np.random.default_rng([options.seed, index, 1])).tolist()
        ways: dict[str, Callable[[], dict[str, float]]] = {
            self.baseline: lambda: dict.fromkeys(names, 1 / len(names)),
            "random": lambda: dict(zip(names, random, strict=True)),
            TC: lambda: classify_tokens(samples),
            NNLS: lambda: fit_ranks(samples),
            MIXTURE: lambda: inference.solve(samples).proportions_,
        }
        return {
            "truth": known.shares,
            "training_bytes": known.training_bytes,
            "shares": {method: ways[method]() for method in chosen if method in ways},
            "efficiency": TokenEfficiency().efficiency(samples, known.samples) if TEE in chosen else None,
        }

    def _time(self, options: Options, texts: dict[str, list[str]], chosen: list[str]) -> dict[str, Any]:
        """Seconds from the sample texts to the shares, taking turns."""
        from tokenry.tokenization import MixtureInference, TokenEfficiency, classify_tokens, fit_ranks

        known = self._known(options, texts, 0)
        inference = MixtureInference.from_tokenizer(known.tokenizer, unseen="keep")
        data = known.samples
        ways = {
            TC: lambda: classify_tokens(inference.count(data)),
            TEE: lambda: TokenEfficiency().efficiency(inference.count(data), data),
            NNLS: lambda: fit_ranks(inference.count(data)),
            MIXTURE: lambda: inference.fit(data),
        }
        ways = {method: way for method, way in ways.items() if method in chosen}
        if not ways:
            return {}
        repeats = min(options.repeats, 2) if options.effort == "demo" else options.repeats
        timings = _quietly(lambda: interleave(ways, repeats=repeats))
        return {method: [timing.median, timing.spread] for method, timing in timings.items()}

    def _row(self, method: str, runs: list[dict[str, Any]], times: dict[str, Any]) -> dict[str, Any]:
        from tokenry.tokenization import log10_mse

        def errors(name: str) -> list[float]:
            return [log10_mse(run["shares"][name], run["truth"]) for run in runs]

        own, uniform = errors(method), errors(self.baseline)
        miss = [max(abs(run["shares"][method][k] - v) for k, v in run["truth"].items()) for run in runs]
        row = {
            "method": method,
            "error": round(fmean(own), 3),
            "error_spread": round(stdev(own), 3),
            "points": round(100 * fmean(miss), 3),
            "points_spread": round(100 * stdev(miss), 3),
            "gain": round(10 ** (fmean(uniform) - fmean(own)), 2),
            "seconds": None,
        }
        if method == MIXTURE:
            row["slug"] = "data-mixture-inference"
        if method in times:
            row["seconds"], row["seconds_spread"] = (round(x, 4) for x in times[method])
        return row

    def _grow(self, options: Options, texts: dict[str, list[str]], merges: int, growing: list[str]) -> dict[str, Any]:
        """Solve time and squared error with so many merges, mean of two mixtures."""
        from tokenry.tokenization import MixtureInference, fit_ranks, log10_mse

        found: dict[str, Any] = {"merges": merges}
        for method in growing:
            seconds, errors = [], []
            for index in range(2):
                known = self._known(options, texts, index, merges)
                inference = MixtureInference.from_tokenizer(known.tokenizer, unseen="keep")
                samples = _quietly(lambda inference=inference, known=known: inference.count(known.samples))
                found["merges"] = samples.counts.steps
                way = (
                    (lambda samples=samples: fit_ranks(samples))
                    if method == NNLS
                    else (lambda inference=inference, samples=samples: inference.solve(samples).proportions_)
                )
                shares = way()
                timing = interleave({method: way}, repeats=3, warmup=0, min_seconds=0.01)[method]
                seconds.append(timing.median)
                errors.append(10 ** log10_mse(shares, known.shares))
            found[method] = [fmean(seconds), fmean(errors)]
        return found

    def _own(self, options: Options, texts: dict[str, list[str]]) -> tuple[str, str, list[str]]:
        """The tokenizer in question: shares of its training text, and bytes per token of each category."""
        import numpy as np

        from tokenry.assets import model_path
        from tokenry.tokenization import MixtureInference, read_merge_list

        path = options.model or model_path("small")
        if options.data is None:
            from tokenry.assets import held_out_texts

            texts = {"english prose": held_out_texts("english"), **texts}
        listed = read_merge_list(path)
        merges = min(self.setting(options, "merges"), len(listed.merges))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = MixtureInference.from_tokenizer(listed, max_merges=merges, unseen="keep").fit(texts)
        short = {name: _head(given, TREAT_BYTES) for name, given in texts.items()}
        whole = _quietly(lambda: MixtureInference.from_tokenizer(listed, unseen="keep").count(short))
        tokens = np.asarray(whole.counts.token_counts.sum(axis=1)).ravel()
        treat = dict(zip(whole.categories, (whole.bytes / tokens).tolist(), strict=True))
        chars = dict(zip(whole.categories, (whole.chars / tokens).tolist(), strict=True))
        width = max(map(len, treat))
        lines = [f"{'category':{width}}  training share  bytes/token  characters/token"]
        for name, share in sorted(found.proportions_.items(), key=lambda item: -item[1]):
            lines.append(f"{name:{width}}  {100 * share:13.1f}%  {treat[name]:11.2f}  {chars[name]:16.2f}")
        name = Path(path).name if options.model else "the embedded model's tokenizer"
        notes = [f"{name}: {warning.message}" for warning in said]
        return f"Inferred training text of {name} ({merges} merges)", "\n".join(lines), notes

    def _notes(
        self, options: Options, rows: list[dict[str, Any]], runs: list[dict[str, Any]], texts: dict[str, list[str]]
    ) -> list[str]:
        sizes = sorted(run["training_bytes"] for run in runs)
        notes = [
            f"{len(runs)} mixtures of {self.setting(options, 'categories')} of {len(texts)} categories, drawn uniformly from "
            f"the simplex; {sizes[0] // 1000} to {sizes[-1] // 1000} KB of training text, "
            f"{self.setting(options, 'merges')} merges; even texts train, odd texts are the samples. The truth is the bytes read.",
            "TEE is fitted on the other mixtures; the others need no tokenizer of known mixture.",
        ]
        if options.effort == "demo":
            notes.append("Demonstration: less text and fewer mixtures than the full run.")
        by_name = {row["method"]: row for row in rows}
        if MIXTURE in by_name:
            better = [r["method"] for r in rows if r["error"] < by_name[MIXTURE]["error"] and r["method"] != MIXTURE]
            if better:
                notes.append(
                    f"{' and '.join(better)} came closer than the linear program here. With mixtures this small the "
                    "difference is within the spread; NNLS rests on frequencies that fall like 1/rank, the program does not."
                )
        return notes


def files(folder: str) -> list[Path]:
    """The category files of a folder."""
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(
            f"tokenizers: data must be a folder of *.txt files, one per category; {folder} is not a folder"
        )
    return sorted(path.glob("*.txt"))


def categories(folder: str | None) -> dict[str, list[str]]:
    """Category to its texts (lines): the user's files, or the embedded languages and code."""
    if folder is not None:
        found = {}
        for path in files(folder):
            with path.open(encoding="utf-8", errors="replace") as file:
                found[path.stem] = [line for line in file.read(SAMPLE_FILE).splitlines(keepends=True) if line.strip()]
        return found
    from tokenry.assets import held_out_texts, language_samples

    code = [line + "\n" for passage in held_out_texts("code") for line in passage.splitlines()]
    return {**language_samples(), "python": code}


def _quietly(call: Callable[[], Any]) -> Any:
    """Run without the warnings about small samples: the sizes stand in the notes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*bytes of text; below")
        warnings.filterwarnings("ignore", message=r".*merges occur in no category")
        return call()


def _head(texts: list[str], limit: int) -> list[str]:
    size, taken = 0, []
    for text in texts:
        if size >= limit:
            break
        taken.append(text)
        size += len(text.encode("utf-8", "surrogatepass"))
    return taken


def _efficiency(runs: list[dict[str, Any]], left_out: int) -> dict[str, float]:
    """TEE's shares for one mixture, its slope fitted on all others."""
    from tokenry.tokenization import TokenEfficiency

    others = [run for i, run in enumerate(runs) if i != left_out]
    tee = TokenEfficiency().fit([run["efficiency"] for run in others], [list(run["truth"].values()) for run in others])
    shares = tee.predict(runs[left_out]["efficiency"]).tolist()
    return dict(zip(runs[left_out]["truth"], shares, strict=True))


def _sweeps(points: list[dict[str, Any]], growing: list[str]) -> list[Sweep]:
    seconds = {method: [(point["merges"], point[method][0]) for point in points] for method in growing}
    errors = {method: [(point["merges"], point[method][1]) for point in points] for method in growing}
    return [
        Sweep(
            title="Solve time by merges",
            x="merges",
            y="seconds",
            points=seconds,
            exponents={method: fit_exponent(*zip(*values, strict=True)) for method, values in seconds.items()},
            caption="Without counting; mean of two mixtures, each the median of three turns.",
        ),
        Sweep(
            title="Error by merges",
            x="merges",
            y="mean squared error",
            points=errors,
            caption="More merges help as long as the samples are large enough to hold them.",
        ),
    ]
