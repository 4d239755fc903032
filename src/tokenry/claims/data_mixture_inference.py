"""Claims of data mixture inference: known mixtures, released tokenizers."""

from __future__ import annotations

import lzma
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tokenry.claims.registry import Context, Measurement, measures

SLUG = "data-mixture-inference"
MIXTURES = 6
CATEGORIES = 5
MERGES = 300
RELEASED_MERGES = 200  # beyond that, samples of a few hundred KB hold too few of the merges
LANGUAGES = [
    "eng_Latn",
    "deu_Latn",
    "fra_Latn",
    "spa_Latn",
    "ita_Latn",
    "por_Latn",
    "nld_Latn",
    "pol_Latn",
    "rus_Cyrl",
    "arb_Arab",
    "hin_Deva",
    "zho_Hans",
    "jpn_Jpan",
    "kor_Hang",
    "tur_Latn",
]
SPEECH_BYTES = 400_000
# Shares of training bytes in per cent, (code, not English): an independent measurement on the same files.
EXPECTED_CODE = {"gpt2": 0.6, "cl100k": 50.0, "claude": 51.0, "starcoder": 59.0, "o200k": 32.0}
FILES = {
    "gpt2": "gpt2.tokenizer.json.xz",
    "cl100k": "cl100k_base.tiktoken.xz",
    "claude": "claude.tokenizer.json.xz",
    "starcoder": "starcoder.tokenizer.json.xz",
    "o200k": "o200k_base.tiktoken.xz",
}


def embedded_categories() -> dict[str, list[str]]:
    """The embedded categories: eight languages and Python code, as lines."""
    from tokenry.assets import held_out_texts, language_samples

    code = [line + "\n" for passage in held_out_texts("code") for line in passage.splitlines()]
    return {**language_samples(), "python": code}


def _mixture(seed: int, index: int, **options: Any) -> tuple[Any, Any, Any]:
    """The index-th known mixture of a seed, the fitted inference, and the counted samples."""
    import numpy as np

    from tokenry.tokenization import MixtureInference, draw_shares, train_known_mixture

    texts = embedded_categories()
    rng = np.random.default_rng([seed, index])
    names = rng.permutation(sorted(texts))[:CATEGORIES].tolist()
    known = train_known_mixture(
        {name: texts[name] for name in names}, draw_shares(CATEGORIES, rng), merges=MERGES, **options
    )
    inference = MixtureInference.from_tokenizer(known.tokenizer, unseen="keep")
    samples = inference.count(known.samples)
    return known, inference.solve(samples), samples


def _one_mixture(seed: int, index: int) -> dict[str, Any]:
    import numpy as np

    from tokenry.tokenization import TokenEfficiency, classify_tokens, draw_shares, fit_ranks, log10_mse

    known, found, samples = _mixture(seed, index)
    names = list(known.shares)
    guess = draw_shares(len(names), np.random.default_rng([seed, index, 1]))
    return {
        "truth": known.shares,
        "found": found.proportions_,
        "training_bytes": known.training_bytes,
        "efficiency": TokenEfficiency().efficiency(samples, known.samples),
        "inference": log10_mse(found.proportions_, known.shares),
        "uniform": log10_mse(dict.fromkeys(names, 1 / len(names)), known.shares),
        "random": log10_mse(dict(zip(names, guess.tolist(), strict=True)), known.shares),
        "TC": log10_mse(classify_tokens(samples), known.shares),
        "NNLS": log10_mse(fit_ranks(samples), known.shares),
    }


def _efficiency_error(runs: list[dict[str, Any]], left_out: int) -> float:
    """Error of TEE on one tokenizer after fitting its slope on all others."""
    from tokenry.tokenization import TokenEfficiency, log10_mse

    others = [run for i, run in enumerate(runs) if i != left_out]
    tee = TokenEfficiency().fit([run["efficiency"] for run in others], [list(run["truth"].values()) for run in others])
    run = runs[left_out]
    shares = tee.predict(run["efficiency"]).tolist()
    return log10_mse(dict(zip(run["truth"], shares, strict=True)), run["truth"])


@measures(SLUG, "known-mixtures")
def known_mixtures(context: Context) -> Measurement:
    """Six tokenizers trained on known mixtures of five categories."""
    step = context.session.step
    runs = [step(f"mixture{i}", lambda i=i: _one_mixture(context.seed, i)) for i in range(MIXTURES)]
    errors = {key: [run[key] for run in runs] for key in ("inference", "uniform", "random", "TC", "NNLS")}
    errors["TEE"] = [_efficiency_error(runs, i) for i in range(MIXTURES)]
    mean = {key: fmean(values) for key, values in errors.items()}
    nearest = min(mean["uniform"], mean["TEE"], mean["TC"])
    shows = mean["inference"] < -4.0 and mean["inference"] <= nearest - 2.0
    return Measurement(
        shows=shows,
        value=round(mean["inference"], 3),
        baseline=round(mean["uniform"], 3),
        spread=round(stdev(errors["inference"]), 3),
        sentence=(
            f"mean log10 MSE {mean['inference']:.2f} over {MIXTURES} known mixtures of {CATEGORIES} of 9 categories, "
            f"{MERGES} merges (uniform {mean['uniform']:.2f}, TC {mean['TC']:.2f}, TEE {mean['TEE']:.2f}; must be below -4 "
            f"and 2 orders below all three); least squares on the ranks, which costs next to nothing: {mean['NNLS']:.2f}"
        ),
        details={"errors": errors, "mean": mean, "runs": runs},
        charts=(
            {
                "type": "bars",
                "title": "Mean log10 MSE of the shares (further left is better)",
                "values": mean,
                "baseline": "uniform",
                "caption": f"{MIXTURES} tokenizers trained on known mixtures of {CATEGORIES} categories.",
            },
        ),
    )


@measures(SLUG, "sample-size")
def sample_size(context: Context) -> Measurement:
    """The same mixtures, inferred from samples of several sizes."""
    from tokenry.tokenization import log10_mse

    sizes = (10_000, 20_000, 40_000, 65_000)

    def one(index: int, size: int) -> float:
        import warnings

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*bytes of text; below")
            known, found, _ = _mixture(context.seed, index, sample_bytes=size)
        return log10_mse(found.proportions_, known.shares)

    errors = {
        size: [context.session.step(f"{size}/{i}", lambda i=i, size=size: one(i, size)) for i in range(MIXTURES)]
        for size in sizes
    }
    means = {size: fmean(values) for size, values in errors.items()}
    first, last = means[sizes[0]], means[sizes[-1]]
    course = ", ".join(f"{size // 1000} KB {means[size]:.2f}" for size in sizes)
    return Measurement(
        shows=last < first,
        value=round(last, 3),
        baseline=round(first, 3),
        spread=round(stdev(errors[sizes[-1]]), 3),
        sentence=f"mean log10 MSE by sample per category: {course} (the largest sample must beat the smallest)",
        details={"points": [[size, means[size]] for size in sizes], "errors": {str(k): v for k, v in errors.items()}},
        charts=(
            {
                "type": "lines",
                "title": "Error over the size of the sample",
                "series": {"mixture inference": [[size, means[size]] for size in sizes]},
                "x_title": "bytes of sample text per category",
                "y_title": "mean log10 MSE",
                "log_y": False,
            },
        ),
    )


@measures(SLUG, "omitted-category")
def omitted_category(context: Context) -> Measurement:
    """Each category of four mixtures left out of the samples in turn."""
    from tokenry.tokenization import MixtureInference, log10_mse

    def one(index: int) -> list[dict[str, Any]]:
        import warnings

        known, found, _ = _mixture(context.seed, index)
        inference = MixtureInference.from_tokenizer(known.tokenizer, unseen="keep")
        rows = [{"omitted": "", "mass": 0.0, "error": log10_mse(found.proportions_, known.shares)}]
        for gone in known.shares:
            rest = {name: share / (1 - known.shares[gone]) for name, share in known.shares.items() if name != gone}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=r".*merges occur in no category")
                shares = inference.fit({name: known.samples[name] for name in rest}).proportions_
            uniform = log10_mse(dict.fromkeys(rest, 1 / len(rest)), rest)
            error = log10_mse(shares, rest)
            rows.append({"omitted": gone, "mass": known.shares[gone], "error": error, "uniform": uniform})
        return rows

    tables = [context.session.step(f"mixture{i}", lambda i=i: one(i)) for i in range(4)]
    left = [row for table in tables for row in table if row["omitted"]]
    whole = fmean(table[0]["error"] for table in tables)
    error, uniform = fmean(row["error"] for row in left), fmean(row["uniform"] for row in left)
    return Measurement(
        shows=whole < error < uniform,
        value=round(error, 3),
        baseline=round(uniform, 3),
        spread=round(stdev(row["error"] for row in left), 3),
        sentence=(
            f"mean log10 MSE {error:.2f} against the renormalised truth when one of five categories is missing, "
            f"{whole:.2f} when none is, uniform {uniform:.2f} (must lie between the two)"
        ),
        details={"rows": left},
    )


def _released_samples(context: Context) -> dict[str, list[str]]:
    """Seventeen categories: fifteen languages, code, speeches."""
    import gzip

    def unpack(path: Path) -> str:
        return lzma.decompress(path.read_bytes()).decode("utf-8")

    folder = context.data("multilingual-sib200")
    samples = {
        name: [row.split("\t")[3] for row in unpack(folder / f"{name}.tsv.xz").splitlines()[1:]] for name in LANGUAGES
    }
    sources = sorted(context.data("code-samples").glob("*.txt.xz"))
    samples["code"] = [text for path in sources for text in unpack(path).split("\f")]
    with gzip.open(context.data("english-public-domain") / "presidential.txt.gz", "rt", encoding="utf-8") as file:
        samples["speeches"] = file.read(SPEECH_BYTES).split("\n")
    return samples


def _released(context: Context, names: list[str]) -> dict[str, dict[str, Any]]:
    """Shares of released tokenizers in per cent: code, English (web-like and speeches), the rest."""
    from tokenry.tokenization import MixtureInference

    files = context.data("tokenizer-vocabs")
    load: list[dict[str, list[str]]] = []

    def one(name: str) -> dict[str, Any]:
        if not load:
            load.append(_released_samples(context))
        found = MixtureInference.from_tokenizer(files / FILES[name], max_merges=RELEASED_MERGES).fit(load[0])
        shares = {key: round(100 * share, 3) for key, share in found.proportions_.items()}
        english = shares["eng_Latn"] + shares["speeches"]
        return {
            "code": shares["code"],
            "english": round(english, 3),
            "not_english": round(100 - english - shares["code"], 3),
            "shares": shares,
            "objective": found.objective_,
            "n_constraints": found.n_constraints_,
            "missing": ["".join(merge) for merge in found.missing_merges_],
        }

    context.data("multilingual-sib200"), context.data("code-samples"), context.data("english-public-domain")
    return {name: context.session.step(name, lambda name=name: one(name)) for name in names}


def _within(found: float, wanted: float) -> bool:
    return abs(found - wanted) <= 10.0


@measures(SLUG, "gpt4o-not-english")
def gpt4o_not_english(context: Context) -> Measurement:
    """Share of GPT-4o's tokenizer data that is neither English nor code."""
    found = _released(context, ["o200k", "gpt2"])
    value = found["o200k"]["not_english"]
    return Measurement(
        shows=_within(value, 39.0),
        value=round(value, 1),
        baseline=round(found["gpt2"]["not_english"], 1),
        sentence=(
            f"{value:.1f} % of o200k's training bytes are not English (paper 39 %, must be within 10 points; GPT-2: "
            f"{found['gpt2']['not_english']:.1f} %), from {RELEASED_MERGES} merges and 17 categories"
        ),
        details={"tokenizers": found},
    )


@measures(SLUG, "code-share")
def code_share(context: Context) -> Measurement:
    """Share of code behind GPT-3.5's and Claude's tokenizers."""
    found = _released(context, ["cl100k", "claude", "gpt2"])
    shares = [found[name]["code"] for name in ("cl100k", "claude")]
    return Measurement(
        shows=all(_within(share, 60.0) for share in shares),
        value=round(fmean(shares), 1),
        baseline=round(found["gpt2"]["code"], 1),
        sentence=(
            f"code is {shares[0]:.1f} % of cl100k's and {shares[1]:.1f} % of Claude's training bytes (paper: about 60 %, both "
            f"must be within 10 points; GPT-2: {found['gpt2']['code']:.1f} %)"
        ),
        details={"tokenizers": found},
    )


@measures(SLUG, "released-tokenizers")
def released_tokenizers(context: Context) -> Measurement:
    """Five released tokenizers beside each other."""
    found = _released(context, list(FILES))
    code = {name: found[name]["code"] for name in FILES}
    other = {name: found[name]["not_english"] for name in FILES}
    far = max(abs(code[name] - EXPECTED_CODE[name]) for name in FILES)
    ordered = (
        code["gpt2"] + 10 < code["o200k"] < min(code["cl100k"], code["claude"])
        and abs(code["cl100k"] - code["claude"]) <= 10
        and max(code["cl100k"], code["claude"]) < code["starcoder"]
        and other["o200k"] > other["cl100k"] > other["gpt2"]
    )
    listed = ", ".join(f"{name} {code[name]:.1f}" for name in FILES)
    return Measurement(
        shows=ordered and far <= 10.0,
        value=round(far, 2),
        sentence=(
            f"code in per cent of the training bytes: {listed}; not English: gpt2 {other['gpt2']:.1f}, cl100k "
            f"{other['cl100k']:.1f}, o200k {other['o200k']:.1f} (code must be within 10 points of 0.6, 50, 51, 59, 32 and "
            "in the order gpt2, o200k, cl100k and Claude, StarCoder; the rest in the order given)"
        ),
        details={"tokenizers": found, "expected_code": EXPECTED_CODE},
        charts=(
            {
                "type": "stacked",
                "title": "What released tokenizers were trained on",
                "groups": {
                    name: {
                        "English": shares["english"],
                        "other languages": shares["not_english"],
                        "code": shares["code"],
                    }
                    for name, shares in found.items()
                },
                "caption": f"Inferred from their first {RELEASED_MERGES} merges and small samples of 17 categories.",
            },
        ),
    )


@measures(SLUG, "llama3-extends")
def llama3_extends(context: Context) -> Measurement:
    """Whether Llama-3's vocabulary begins with that of GPT-3.5."""
    files = context.data("tokenizer-vocabs")

    def lines(name: str) -> list[bytes]:
        return lzma.decompress((files / f"{name}.tiktoken.xz").read_bytes()).splitlines()

    def one() -> dict[str, int]:
        old, new = lines("cl100k_base"), lines("llama3")
        return {"entries": len(old), "same": sum(a == b for a, b in zip(old, new, strict=False)), "all": len(new)}

    step: Callable[[str, Callable[[], Any]], Any] = context.session.step
    found = step("compare", one)
    share = 100 * found["same"] / found["entries"]
    return Measurement(
        shows=found["same"] == found["entries"],
        value=round(share, 2),
        sentence=(
            f"{found['same']:,} of cl100k's {found['entries']:,} entries stand at the same rank in Llama-3's {found['all']:,} "
            "(must be all): from the first 100,000 merges both get the same answer"
        ),
        details=found,
    )
