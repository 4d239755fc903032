"""The zero-shot detectors that Lastde is measured against, each one number from the figures of a text's tokens.

    likelihood         mean ℓ_t
    rank               -mean r_t                        r_t: place of the token by probability, from 1
    log-rank           -mean ln r_t
    entropy            mean H_t
    lrr                -mean ℓ_t / mean ln r_t           Su et al. 2023, arXiv 2306.05540
    fast-detectgpt     (mean ℓ - mean_s mean ℓ̃_s) / std_s mean ℓ̃_s, S draws         Bao et al. 2024, arXiv 2310.05130
    fast-detectgpt-analytic     Σ (ℓ_t - μ_t) / sqrt(Σ σ²_t), no draws

All are oriented as published; higher is meant to be more machine-like.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from tokenry.text.detector import Detector
from tokenry.text.scoring import Field, TokenStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "CRITERIA",
    "BaselineDetector",
    "entropy",
    "fast_detect_gpt",
    "fast_detect_gpt_analytic",
    "likelihood",
    "log_rank",
    "lrr",
    "rank",
]


def _of(statistics: TokenStatistics, name: Field) -> Tensor:
    found = getattr(statistics, name)
    if found is None:
        raise ValueError(f"these statistics lack {name}: ask for them with wanted=[..., {name!r}]")
    return found.double()


def likelihood(statistics: TokenStatistics) -> float:
    """Mean log-probability."""
    return float(_of(statistics, "log_probs").mean())


def rank(statistics: TokenStatistics) -> float:
    """Negated mean rank."""
    return -float(_of(statistics, "ranks").mean())


def log_rank(statistics: TokenStatistics) -> float:
    """Negated mean logarithm of the rank."""
    return -float(_of(statistics, "ranks").log().mean())


def entropy(statistics: TokenStatistics) -> float:
    """Mean entropy of the predictions."""
    return float(_of(statistics, "entropies").mean())


def lrr(statistics: TokenStatistics) -> float:
    """Likelihood by log-rank; +inf, with a warning, where every token was the most probable one."""
    below = -log_rank(statistics)
    if below == 0:
        warnings.warn("every token is the scorer's first choice: LRR is infinite", RuntimeWarning, stacklevel=2)
        return math.inf
    return -likelihood(statistics) / below


def fast_detect_gpt(statistics: TokenStatistics) -> float:
    """Likelihood against that of the draws, in the draws' standard deviations (unbiased)."""
    drawn = _of(statistics, "sampled").mean(-1)  # (S,)
    return _standardised(likelihood(statistics), float(drawn.mean()), float(drawn.std()))


def fast_detect_gpt_analytic(statistics: TokenStatistics) -> float:
    """The same with expectation and variance reckoned instead of drawn."""
    expected, variance = _of(statistics, "expected").sum(), _of(statistics, "variances").clamp(min=0).sum()
    return _standardised(float(_of(statistics, "log_probs").sum()), float(expected), math.sqrt(float(variance)))


def _standardised(value: float, mean: float, std: float) -> float:
    if std == 0:
        warnings.warn("the draws do not vary: the score says nothing and is -inf", RuntimeWarning, stacklevel=3)
        return -math.inf
    return (value - mean) / std


class Criterion(NamedTuple):
    """A score and the figures of the tokens that it needs."""

    score: Callable[[TokenStatistics], float]
    wanted: tuple[Field, ...]


CRITERIA: dict[str, Criterion] = {
    "likelihood": Criterion(likelihood, ("log_probs",)),
    "rank": Criterion(rank, ("ranks",)),
    "log-rank": Criterion(log_rank, ("ranks",)),
    "entropy": Criterion(entropy, ("entropies",)),
    "lrr": Criterion(lrr, ("log_probs", "ranks")),
    "fast-detectgpt": Criterion(fast_detect_gpt, ("log_probs", "sampled")),
    "fast-detectgpt-analytic": Criterion(fast_detect_gpt_analytic, ("log_probs", "expected", "variances")),
}


class BaselineDetector(Detector):
    """A published baseline as a detector.

    Args:
        model: Scoring model: a causal language model, or its name or folder.
        tokenizer: Its tokenizer; None where ``model`` is a name.
        criterion: One of ``CRITERIA``.
        n_samples: Draws per position of ``fast-detectgpt``; the paper's is 10,000, Lastde's comparison uses 100 for
            both.
        reference_model: Model that the draws come from. None: the scoring model.
        reference_tokenizer: Its tokenizer, only to check that it is the same.
        seed: Seed of the draws.
        max_tokens: Score only the first so many tokens. None: all.

    Example:
        >>> BaselineDetector("small", criterion="likelihood").score(["It was a bright cold day in April."]).shape
        (1,)
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        criterion: str = "likelihood",
        *,
        n_samples: int = 100,
        reference_model: PreTrainedModel | str | None = None,
        reference_tokenizer: PreTrainedTokenizerBase | None = None,
        seed: int = 0,
        max_tokens: int | None = None,
    ) -> None:
        if criterion not in CRITERIA:
            raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
        self.model = model
        self.tokenizer = tokenizer
        self.criterion = criterion
        self.n_samples = n_samples
        self.reference_model = reference_model
        self.reference_tokenizer = reference_tokenizer
        self.seed = seed
        self.max_tokens = max_tokens

    def fields(self) -> tuple[Field, ...]:
        """The figures of the tokens that the criterion needs."""
        return CRITERIA[self.criterion].wanted

    def score_statistics(self, statistics: TokenStatistics) -> float:
        """Score of one text from the figures of its tokens."""
        return CRITERIA[self.criterion].score(statistics)
