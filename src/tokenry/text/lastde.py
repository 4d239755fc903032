"""Lastde and Lastde++: tell generated text from the local variation of its tokens' log-probabilities, untrained.

Xu et al., "Training-free LLM-generated Text Detection by Mining Token Probability Sequences", ICLR 2025,
arXiv 2410.06072. With ℓ_t = ln p(x_t | x_<t), t = 1 ... n, of a text under a scoring model:

    y^(τ)_j = mean(ℓ_j ... ℓ_{j+τ-1})                    sliding mean, stride 1, τ = 1 ... τ'
    MDE     = (DE(y^(1)), ..., DE(y^(τ')))                diversity entropy, orbits of s values, ε = floor(r n) bins
    Lastde  = mean_t ℓ_t / Agg(MDE)                       Agg: unbiased standard deviation over the scales
    Lastde++ = (Lastde(x) - mean_s Lastde(x̃_s)) / std_s Lastde(x̃_s)

where every token of x̃_s, s = 1 ... S, is drawn on its own from a reference model given the real prefix, so that one
forward pass is enough. Likelihood says how probable a text is; the entropy, how unevenly: human text jumps more.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tokenry.kernels.diversity_entropy import diversity_entropy, multiscale_diversity_entropy
from tokenry.text.detector import CAUTION, Detector
from tokenry.text.scoring import Field, TokenStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "AGGREGATIONS",
    "VARIANTS",
    "Explanation",
    "LastdeDetector",
    "aggregate",
    "diversity_entropy",
    "lastde",
    "lastde_plus_plus",
    "multiscale_diversity_entropy",
]

UNRELIABLE_BELOW = 50  # scored tokens


class Variant(NamedTuple):
    """Settings of the paper: orbit size s, bins per token r, largest scale τ', whether draws are compared with."""

    embed_size: int
    bins_per_token: float
    scales: int
    agg: str
    sampled: bool


VARIANTS = {
    "lastde": Variant(3, 10, 5, "std", sampled=False),
    "lastde-closed": Variant(3, 1, 15, "std", sampled=False),  # for text of GPT-4's class
    "lastde++": Variant(4, 8, 15, "std", sampled=True),
}

AGGREGATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "std": lambda mde: mde.std(-1),
    "expstd": lambda mde: mde.std(-1).exp(),
    "range": lambda mde: mde.amax(-1) - mde.amin(-1),
    "exprange": lambda mde: (mde.amax(-1) - mde.amin(-1)).exp(),
    "norm": lambda mde: mde.norm(dim=-1),
}


def aggregate(mde: Tensor, agg: str = "std") -> Tensor:
    """One number from the diversity entropies of the scales: (..., τ') -> (...); ``agg`` is one of ``AGGREGATIONS``."""
    if agg not in AGGREGATIONS:
        raise ValueError(f"agg must be one of {', '.join(AGGREGATIONS)}, got {agg!r}")
    if mde.shape[-1] < 2 and agg != "norm":
        raise ValueError(f"agg={agg!r} needs at least 2 scales, got {mde.shape[-1]}; more scales, or agg='norm'")
    return AGGREGATIONS[agg](mde)


def _lastde(log_probs: Tensor, embed_size: int, bins_per_token: float, scales: int, agg: str) -> Tensor:
    n, needed = log_probs.shape[-1], scales + embed_size + 1
    if n < needed:
        raise ValueError(
            f"the text has {n} scored tokens, but {needed} are needed (scales={scales} + embed_size={embed_size} + 1); "
            f"under about {UNRELIABLE_BELOW} a score means little"
        )
    if not torch.isfinite(log_probs).all():
        raise ValueError("log_probs holds NaN or infinity: were the logits in half precision? Use float32 or bfloat16")
    bins = int(bins_per_token * n)
    if bins < 2:
        raise ValueError(f"bins_per_token={bins_per_token} gives {bins} bins for {n} tokens; at least 2 are needed")
    spread = aggregate(multiscale_diversity_entropy(log_probs, embed_size, bins, scales), agg)
    mean = log_probs.mean(-1)
    return torch.where(spread > 0, mean / spread.where(spread > 0, 1.0), -math.inf)


def lastde(
    log_probs: Tensor, embed_size: int = 3, bins_per_token: float = 10, scales: int = 5, agg: str = "std"
) -> Tensor:
    """Lastde of each sequence of log-probabilities.

    Args:
        log_probs: ℓ, (..., n), natural logarithm, no padding.
        embed_size: Values s in an orbit. The defaults are the paper's for open models' text.
        bins_per_token: r: the histogram has floor(r n) bins.
        scales: Largest scale τ'.
        agg: One of ``AGGREGATIONS``.

    Returns:
        (...): negative; larger is more machine-like. Where the entropies do not vary at all (constant probabilities, one
        token repeated) it is -inf, with a ``RuntimeWarning``.

    Raises:
        ValueError: Fewer than ``scales + embed_size + 1`` values, or one that is not finite.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> ragged = -torch.rand(120, generator=generator) * 5
        >>> bool(lastde(ragged) < 0)
        True
    """
    found = _lastde(log_probs, embed_size, bins_per_token, scales, agg)
    if torch.isinf(found).any():
        warnings.warn(
            "the diversity entropy is the same at all scales (constant probabilities, one token repeated?): "
            "Lastde is -inf and says nothing",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


def lastde_plus_plus(
    log_probs: Tensor,
    sampled: Tensor,
    embed_size: int = 4,
    bins_per_token: float = 8,
    scales: int = 15,
    agg: str = "std",
) -> Tensor:
    """Lastde++ of one text: its Lastde against that of the draws, in their standard deviations (unbiased).

    Args:
        log_probs: ℓ, (n,).
        sampled: ℓ̃ of the draws, (S, n).
        embed_size: Values s in an orbit. The defaults are the paper's, ``scales`` that of the released settings.
        bins_per_token: r.
        scales: Largest scale τ'.
        agg: One of ``AGGREGATIONS``; the authors have since come to advise ``expstd``.

    Returns:
        A number; larger is more machine-like. -inf, with a ``RuntimeWarning``, where text or draws do not vary.
    """
    if sampled.ndim != 2 or sampled.shape[-1] != log_probs.shape[-1] or len(sampled) < 2:
        raise ValueError(
            f"sampled must be (S, {log_probs.shape[-1]}) with S at least 2 (100 in the paper), got {tuple(sampled.shape)}"
        )
    every = torch.cat([log_probs.unsqueeze(0), sampled.to(log_probs)])  # (1 + S, n)
    found = _lastde(every, embed_size, bins_per_token, scales, agg).double()
    own, draws = found[0], found[1:][torch.isfinite(found[1:])]
    spread = draws.std() if len(draws) > 1 else draws.new_zeros(())
    if torch.isinf(own) or spread == 0:
        warnings.warn(
            "the text's or the draws' Lastde does not vary: Lastde++ is -inf and says nothing",
            RuntimeWarning,
            stacklevel=2,
        )
        return own.new_tensor(-math.inf)
    return (own - draws.mean()) / spread


@dataclass(frozen=True)
class Explanation:
    """Where a score comes from.

    Attributes:
        tokens: The n scored tokens as text.
        log_probs: Log-probability of each, in nats.
        diversity_entropy: Of the scales 1 ... τ'.
        likelihood: Mean log-probability.
        aggregated: Agg of the entropies.
        score: The detector's score of the text.
        caution: What a reader must know.
    """

    tokens: list[str]
    log_probs: list[float]
    diversity_entropy: list[float]
    likelihood: float
    aggregated: float
    score: float
    caution: str = CAUTION


class LastdeDetector(Detector):
    """Lastde or Lastde++ as a detector, in the manner of scikit-learn.

    Args:
        model: Scoring model: a causal language model, or its name or folder (``"small"`` is the embedded one).
        tokenizer: Its tokenizer; None where ``model`` is a name.
        variant: ``lastde++``, ``lastde`` or ``lastde-closed`` (settings for text of GPT-4's class): sets the defaults of
            the next four, which are the paper's.
        embed_size: Values s in an orbit.
        bins_per_token: Bins of the histogram per scored token, r.
        scales: Largest scale τ'.
        agg: ``std``, ``expstd``, ``range``, ``exprange`` or ``norm``.
        n_samples: Draws S of Lastde++ (100 in the paper; 10 do nearly as well).
        reference_model: Model q that the draws come from, over the same tokenizer. None: the scoring model.
        seed: Seed of the draws: a text's score depends on it and on the text, not on the batch.
        reference_tokenizer: Its tokenizer, only to check that it is the same.
        max_tokens: Score only the first so many tokens of each text, which makes texts of different lengths comparable.
            None: all; texts beyond the model's context are scored with a sliding window.

    Raises:
        ValueError: An unknown variant or aggregation, a setting out of range, two different tokenizers.

    Example:
        >>> from tokenry.assets import held_out_texts
        >>> detector = LastdeDetector("small", variant="lastde++", n_samples=20, max_tokens=150)
        >>> human = held_out_texts("english")[:4]
        >>> detector.fit(human, [0, 0, 0, 0], false_positive_rate=0.25).predict(human).sum()
        np.int64(1)
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        variant: str = "lastde++",
        *,
        embed_size: int | None = None,
        bins_per_token: float | None = None,
        scales: int | None = None,
        agg: str | None = None,
        n_samples: int = 100,
        reference_model: PreTrainedModel | str | None = None,
        seed: int = 0,
        reference_tokenizer: PreTrainedTokenizerBase | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.variant = variant
        self.embed_size = embed_size
        self.bins_per_token = bins_per_token
        self.scales = scales
        self.agg = agg
        self.n_samples = n_samples
        self.reference_model = reference_model
        self.seed = seed
        self.reference_tokenizer = reference_tokenizer
        self.max_tokens = max_tokens
        self._settings()

    def _settings(self) -> dict:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")
        defaults = VARIANTS[self.variant]
        names = ("embed_size", "bins_per_token", "scales", "agg")
        found = {n: getattr(defaults, n) if getattr(self, n) is None else getattr(self, n) for n in names}
        if found["embed_size"] < 2:
            raise ValueError(f"embed_size must be at least 2, got {found['embed_size']}: single numbers have no angle")
        if found["bins_per_token"] <= 0:
            raise ValueError(f"bins_per_token must be positive, got {found['bins_per_token']}")
        if found["scales"] < 1:
            raise ValueError(f"scales must be at least 1, got {found['scales']}")
        aggregate(torch.zeros(found["scales"]), found["agg"])
        if self.n_samples < 2:
            raise ValueError(f"n_samples must be at least 2 (100 in the paper), got {self.n_samples}")
        needed = found["scales"] + found["embed_size"] + 1
        if self.max_tokens is not None and self.max_tokens < needed:
            raise ValueError(f"max_tokens must be at least {needed} with these settings, got {self.max_tokens}")
        return found

    def fields(self) -> tuple[Field, ...]:
        """The figures of the tokens that the variant needs."""
        return ("log_probs", "sampled") if VARIANTS[self.variant].sampled else ("log_probs",)

    def score_statistics(self, statistics: TokenStatistics) -> float:
        """Score of one text from the figures of its tokens."""
        settings = self._settings()
        if len(statistics) < UNRELIABLE_BELOW and len(statistics) > settings["scales"] + settings["embed_size"]:
            warnings.warn(
                f"only {len(statistics)} scored tokens: under about {UNRELIABLE_BELOW} a score is unreliable",
                UserWarning,
                stacklevel=2,
            )
        if not VARIANTS[self.variant].sampled:
            return float(lastde(statistics.log_probs, **settings))
        if statistics.sampled is None:
            raise ValueError("Lastde++ needs statistics with wanted=('log_probs', 'sampled')")
        return float(lastde_plus_plus(statistics.log_probs, statistics.sampled, **settings))

    def explain(self, text: str) -> Explanation:
        """Per-token log-probabilities, the entropy of each scale, and the score that they make."""
        if not isinstance(text, str):
            raise ValueError(f"explain takes one string, got a {type(text).__name__}")
        ids = self.scorer.encode([text])
        statistics = self.scorer.statistics_of_tokens(ids, wanted=self.fields())[0]
        score = self.score_statistics(statistics)
        settings = self._settings()
        agg = settings.pop("agg")
        bins = int(settings["bins_per_token"] * len(statistics))
        mde = multiscale_diversity_entropy(statistics.log_probs, settings["embed_size"], bins, settings["scales"])
        return Explanation(
            tokens=[str(self.scorer.tokenizer.decode([token])) for token in ids[0][1:]],
            log_probs=statistics.log_probs.tolist(),
            diversity_entropy=mde.tolist(),
            likelihood=float(statistics.log_probs.mean()),
            aggregated=float(aggregate(mde, agg)),
            score=score,
        )
