"""What all zero-shot detectors of generated text share: score texts, choose a threshold, say which lie above it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_curve

from tokenry.text.scoring import Field, TokenScorer, TokenStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["CAUTION", "Detector", "choose_threshold"]

CAUTION = "A score is evidence, not proof: people write predictable text too, and edited machine text can pass."


def choose_threshold(scores: Sequence[float], labels: Sequence[int], false_positive_rate: float | None = None) -> float:
    """Threshold above which a text counts as machine-made.

    Args:
        scores: Higher is more machine-like.
        labels: 1 for machine text, 0 for human.
        false_positive_rate: The largest share of the human texts that may lie above it; machine texts are not
            needed then. None: Youden's J, the threshold with the largest true minus false positive rate.

    Raises:
        ValueError: A label other than 0 and 1, or a needed class without a text.

    Example:
        >>> choose_threshold([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1])
        0.5
    """
    values, classes = np.asarray(scores, dtype=float), np.asarray(labels)
    if values.shape != classes.shape:
        raise ValueError(f"got {len(values)} texts and {len(classes)} labels: each text needs one")
    if not set(np.unique(classes)) <= {0, 1}:
        raise ValueError(f"labels must be 0 (human) or 1 (machine), got {sorted(set(classes.tolist()), key=str)}")
    human = np.sort(values[classes == 0])
    if not len(human):
        raise ValueError("no human text (label 0): a threshold needs some")
    if false_positive_rate is not None:
        if not 0 <= false_positive_rate < 1:
            raise ValueError(f"false_positive_rate must lie in [0, 1), got {false_positive_rate}")
        allowed = int(false_positive_rate * len(human) + 1e-9)
        return float(human[len(human) - allowed - 1])
    if len(human) == len(values):
        raise ValueError("no machine text (label 1): give some, or a false_positive_rate, which needs human texts only")
    finite = np.nan_to_num(values, neginf=np.finfo(float).min, posinf=np.finfo(float).max)
    false, true, thresholds = roc_curve(classes, finite)
    best = float(thresholds[np.argmax(true - false)])
    below = finite[finite < best]
    middle = best / 2 + below.max() / 2 if len(below) else best  # between the last text below and the first above
    return float(middle) if middle < best else float(np.nextafter(best, -np.inf))


class Detector(BaseEstimator, ABC):
    """Base of the detectors, in the manner of scikit-learn: ``score``, ``fit``, ``predict``.

    A subclass says which figures of the tokens it needs (``fields``) and makes one number of them
    (``score_statistics``).
    """

    model: PreTrainedModel | str
    tokenizer: PreTrainedTokenizerBase | None
    reference_model: PreTrainedModel | str | None
    reference_tokenizer: PreTrainedTokenizerBase | None
    n_samples: int
    seed: int
    max_tokens: int | None
    threshold_: float

    @abstractmethod
    def fields(self) -> tuple[Field, ...]:
        """The figures of the tokens that this detector needs."""

    @abstractmethod
    def score_statistics(self, statistics: TokenStatistics) -> float:
        """Score of one text from the figures of its tokens."""

    @property
    def scorer(self) -> TokenScorer:
        """Runs the models; they are loaded on first use where they were given by name."""
        settings = (self.model, self.tokenizer, self.reference_model, self.reference_tokenizer)
        settings = (*map(id, settings), self.n_samples, self.seed, self.max_tokens)
        if getattr(self, "scorer_settings_", None) != settings:
            self.scorer_ = TokenScorer(
                self.model,
                self.tokenizer,
                reference_model=self.reference_model,
                reference_tokenizer=self.reference_tokenizer,
                n_samples=self.n_samples,
                seed=self.seed,
                max_tokens=self.max_tokens,
            )
            self.scorer_settings_ = settings
        return self.scorer_

    def score(self, texts: Sequence[str], batch_size: int = 16) -> np.ndarray:
        """Score of each text, (N,); higher is more machine-like. Evidence, not proof.

        Scores of texts of different lengths are not comparable: cut all to one length with ``max_tokens``.

        Args:
            texts: N texts.
            batch_size: Texts in one forward pass.

        Raises:
            ValueError: Not a list of strings, an empty text, or one that is too short (the message says by how much).
        """
        tokens = self.scorer.encode(texts)
        scores = np.empty(len(tokens), dtype=np.float64)
        order = sorted(range(len(tokens)), key=lambda place: -len(tokens[place]))
        for begin in range(0, len(order), batch_size):
            places = order[begin : begin + batch_size]
            found = self.scorer.statistics_of_tokens(
                [tokens[place] for place in places], wanted=self.fields(), batch_size=batch_size
            )
            for place, statistics in zip(places, found, strict=True):
                scores[place] = self.score_statistics(statistics)
        return scores

    def fit(
        self,
        texts: Sequence[str],
        labels: Sequence[int],
        *,
        false_positive_rate: float | None = None,
        batch_size: int = 16,
    ) -> Detector:
        """Choose ``threshold_`` from texts of known origin; nothing is trained.

        Args:
            texts: N texts, of about the length of those to be judged.
            labels: 1 for machine text, 0 for human.
            false_positive_rate: Share of the human texts that may lie above the threshold. None: Youden's J.
            batch_size: Texts in one forward pass.
        """
        if len(texts) != len(labels):
            raise ValueError(f"got {len(texts)} texts and {len(labels)} labels: each text needs one")
        choose_threshold([0.0] * len(labels), labels, false_positive_rate)  # refuse bad labels before the models run
        self.threshold_ = choose_threshold(self.score(texts, batch_size).tolist(), labels, false_positive_rate)
        self.classes_ = np.array([0, 1])
        return self

    def decision_function(self, texts: Sequence[str], batch_size: int = 16) -> np.ndarray:
        """Score minus threshold, (N,)."""
        if not hasattr(self, "threshold_"):
            raise NotFittedError("no threshold yet: call fit(texts, labels) first, or use score(texts) alone")
        return self.score(texts, batch_size) - self.threshold_

    def predict(self, texts: Sequence[str], batch_size: int = 16) -> np.ndarray:
        """1 for each text whose score lies above the threshold, else 0, (N,). Evidence, not proof."""
        return (self.decision_function(texts, batch_size) > 0).astype(int)
