"""Tokenizers with a known training mixture, and the simple ways to guess a mixture: how good is an inference?

A mixture is drawn uniformly from the simplex (Smith & Tromble 2004), text is taken in these shares, a BPE tokenizer is
trained on it, and other text of the same categories is kept for the inference. The truth is what was read, in bytes. The
error is log10 of the mean squared error of the shares, as in Hayase et al. 2024 (arXiv:2407.16607), who also compare with

    TEE, tokenizer encoding efficiency: the better a category is compressed, the more of it there was.
        share[i] proportional to r[i]^b, r[i] = bytes per token here / under a tokenizer trained on category i alone;
        b is fitted on tokenizers whose mixture is known.
    TC, token classification: every token goes to the category where it is most frequent; share of the tokens.

and, here, least squares on the ranks (NNLS): the t-th merge of natural text is about 1/t as frequent as the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError

from tokenry.tokenization.data_mixture_inference import Samples

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

__all__ = [
    "KnownMixture",
    "TokenEfficiency",
    "classify_tokens",
    "draw_shares",
    "fit_ranks",
    "log10_mse",
    "train_bpe",
    "train_known_mixture",
]

GRID = 10_000  # M: shares are multiples of 1/M


@dataclass(frozen=True, eq=False)
class KnownMixture:
    """A tokenizer, what it was trained on, and other text of the same categories.

    Attributes:
        tokenizer: Byte-level BPE.
        shares: Category to its share of the training bytes, as read.
        samples: Category to texts that were not trained on.
        training_bytes: Bytes read in training.
    """

    tokenizer: Tokenizer
    shares: dict[str, float]
    samples: dict[str, list[str]]
    training_bytes: int


def draw_shares(n: int, rng: np.random.Generator) -> np.ndarray:
    """Shares ``(n,)`` drawn uniformly from the simplex; none is zero.

    Normalised independent numbers would not be uniform: they crowd around 1/n.

    Example:
        >>> float(draw_shares(5, np.random.default_rng(0)).sum())
        1.0
    """
    if not 1 <= n < GRID:
        raise ValueError(f"n must be between 1 and {GRID - 1}, got {n}")
    cuts = np.sort(rng.choice(GRID - 1, n - 1, replace=False) + 1)
    return np.diff(np.concatenate([[0], cuts, [GRID]])) / GRID


def controlled_splitter() -> PreTokenizer:
    """The pre-tokenizer of the paper's controlled runs: runs of digits apart, then GPT-2's pattern on bytes."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def train_bpe(texts: Iterable[str], merges: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer with the pre-tokenizer of the paper's controlled runs.

    Args:
        texts: Training texts.
        merges: How many merges to learn (fewer where the text has no more pairs).
    """
    from tokenizers import Tokenizer, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = controlled_splitter()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges, initial_alphabet=ByteLevel.alphabet(), show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def train_known_mixture(
    texts: Mapping[str, Sequence[str]],
    shares: Sequence[float] | np.ndarray,
    *,
    merges: int = 300,
    total_bytes: int = 200_000,
    sample_bytes: int | None = None,
) -> KnownMixture:
    """Train a tokenizer on a mixture of categories; even texts train, odd texts are left for the inference.

    Args:
        texts: Category to its texts (lines, sentences).
        shares: Wanted share of each category in the training bytes, in the order of ``texts``.
        merges: Merges to learn.
        total_bytes: Training text. Less where a category has too little for its share: the shares come first.
        sample_bytes: At most so many bytes of each category are left for the inference. None: all there are.

    Raises:
        ValueError: Shares that do not fit the categories, or a category without texts.
    """
    if len(shares) != len(texts) or min(shares) < 0 or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
        raise ValueError(f"shares must be {len(texts)} numbers from 0 on that sum to 1, got {list(shares)}")
    if any(len(given) < 2 for given in texts.values()):
        raise ValueError("every category needs at least two texts, one to train on and one to infer from")
    available = {name: sum(map(_size, given[0::2])) for name, given in texts.items()}
    total = min(
        [total_bytes, *(available[name] / share for name, share in zip(texts, shares, strict=True) if share > 0)]
    )
    chosen: list[str] = []
    read = {}
    samples = {}
    for (name, given), share in zip(texts.items(), shares, strict=True):
        taken, read[name] = _take(given[0::2], total * share)
        chosen += taken
        samples[name] = _take(given[1::2], math.inf if sample_bytes is None else sample_bytes)[0]
    everything = sum(read.values())
    truth = {name: size / everything for name, size in read.items()}
    return KnownMixture(train_bpe(chosen, merges), truth, samples, everything)


def _take(texts: Sequence[str], limit: float) -> tuple[list[str], int]:
    """Texts from the beginning until ``limit`` bytes are reached."""
    taken, size = [], 0
    for text in texts:
        if size >= limit:
            break
        taken.append(text)
        size += _size(text)
    return taken, size


def log10_mse(found: Mapping[str, float], truth: Mapping[str, float]) -> float:
    """log10 of the mean squared error of shares, the paper's score (lower is better); at least -16.

    Example:
        >>> round(log10_mse({"a": 0.51, "b": 0.49}, {"a": 0.5, "b": 0.5}), 6)
        -4.0
    """
    if set(found) != set(truth):
        raise ValueError(f"categories differ: {sorted(found)} and {sorted(truth)}")
    return math.log10(max(1e-16, float(np.mean([(found[name] - truth[name]) ** 2 for name in truth]))))


def classify_tokens(samples: Samples) -> dict[str, float]:
    """TC: every token to the category where it is the largest part of the text; shares of the tokens.

    Tokens that occur in no category belong to none.
    """
    counts = samples.counts.token_counts.toarray()  # (n, symbols)
    rate = counts / counts.sum(axis=1, keepdims=True)
    best = rate.argmax(axis=0)[rate.max(axis=0) > 0]
    return dict(zip(samples.categories, (np.bincount(best, minlength=len(counts)) / len(best)).tolist(), strict=True))


def fit_ranks(samples: Samples) -> dict[str, float]:
    """NNLS: non-negative shares under which merge t is about 1/t as frequent as the first; shares of bytes."""
    from scipy.optimize import nnls

    counts = samples.counts
    steps = np.flatnonzero(counts.merge_pair >= 0)
    rows = counts.row(counts.merge_pair[steps], steps)
    steps, rows = steps[rows >= 0], rows[rows >= 0]
    frequency = counts.counts_at(rows) / counts.initial  # (T, n)
    # Weighted by t, every merge asks for the same: share of its frequency x t = constant.
    shares, _ = nnls(frequency * (steps + 1.0)[:, None], np.ones(len(steps)))
    by_bytes = shares * samples.bytes / counts.initial
    return dict(zip(samples.categories, (by_bytes / by_bytes.sum()).tolist(), strict=True))


class TokenEfficiency(BaseEstimator):
    """TEE: shares from how well each category is compressed; the strength of the relation is fitted.

    Args:
        merges: Merges of the tokenizers trained on one category alone, which say how well it can be compressed.
            None: as many as the tokenizer in question has.

    Attributes:
        slope_: b of the equation above.

    Example:
        >>> TokenEfficiency().fit([[1.0, 0.5]], [[0.8, 0.2]]).slope_
        2.0...
    """

    def __init__(self, merges: int | None = None) -> None:
        self.merges = merges

    def efficiency(self, samples: Samples, texts: Mapping[str, Sequence[str]]) -> list[float]:
        """r: bytes per token of each category, against a tokenizer trained on these texts of the category alone."""
        steps = self.merges or samples.counts.steps
        here = samples.bytes / samples.counts.token_counts.sum(axis=1)
        alone = []
        for name in samples.categories:
            own = train_bpe(texts[name], steps)
            tokens = sum(len(encoded.ids) for encoded in own.encode_batch(list(texts[name])))
            alone.append(sum(map(_size, texts[name])) / tokens)
        return (here / np.asarray(alone)).tolist()

    def fit(self, efficiencies: Sequence[Sequence[float]], shares: Sequence[Sequence[float]]) -> TokenEfficiency:
        """Fit the slope on tokenizers whose shares are known, by least squares on logarithms.

        Args:
            efficiencies: r of each tokenizer.
            shares: Its true shares.
        """
        if not len(efficiencies) or len(efficiencies) != len(shares):
            raise ValueError(f"need as many efficiencies as shares, got {len(efficiencies)} and {len(shares)}")
        x = np.concatenate([np.log(e) - np.log(e).mean() for e in map(np.asarray, efficiencies)])
        logs = [np.log(np.maximum(s, 1 / GRID)) for s in map(np.asarray, shares)]
        y = np.concatenate([log - log.mean() for log in logs])
        self.slope_ = float(x @ y / (x @ x))
        return self

    def predict(self, efficiency: Sequence[float]) -> np.ndarray:
        """Shares ``(n,)`` of a tokenizer with efficiencies r."""
        if not hasattr(self, "slope_"):
            raise NotFittedError("fit TokenEfficiency on tokenizers of known mixtures first")
        logits = self.slope_ * np.log(np.asarray(efficiency))
        powers = np.exp(logits - logits.max())
        return powers / powers.sum()
