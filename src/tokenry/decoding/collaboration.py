"""What a large and a small model did together, token by token, and the law of how often the large one was needed.

Zhang et al., "Fast and Slow Generating: An Empirical Study on Large and Small Language Models Collaborative Decoding",
2024, arXiv:2406.12295.

    collaboration frequency    CoF = mismatches / tokens, with the large model asked at every token
    scaling law                CoF(r) = b - a r^(-alpha),   r = size of the large / size of the small model
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Binned", "CollaborationTrace", "ScalingLaw", "fit_scaling"]

Uncertainty = Literal["p1", "gap", "entropy"]


@dataclass(frozen=True)
class Binned:
    """Tokens sorted into bins.

    Attributes:
        edges: Limits of the bins, one more than there are bins; the last bin has both its limits.
        tokens: Routed tokens in each bin.
        mismatches: How many of them were mismatches.
    """

    edges: tuple[float, ...]
    tokens: tuple[int, ...]
    mismatches: tuple[int, ...]

    @property
    def frequency(self) -> tuple[float, ...]:
        """Mismatches per token of each bin; NaN where a bin is empty."""
        return tuple(m / n if n else float("nan") for m, n in zip(self.mismatches, self.tokens, strict=True))


@dataclass(frozen=True)
class CollaborationTrace:
    """One entry per emitted token of each row, ``(B, N)``; a row that ended early is filled with token -1.

    Attributes:
        token: Emitted tokens, -1 behind a row's end.
        routed: Where the large model was asked. Speculative: where a round of drafting and checking began.
        mismatch: Where the emitted token is not the small model's first choice although the large model was asked.
        p1: Largest probability of the model that the router looks at; NaN where it was not run (a bonus token).
        gap: Largest minus second-largest probability.
        entropy: Entropy in nats.
        top: ``(B, N, top_k)`` largest probabilities, best first.
        large_passes: Calls of the large model.
        large_tokens: Tokens that it has read, the prompt and those it caught up on included.
        small_passes: Calls of the small model or models.
        small_tokens: Tokens that they have read.
    """

    token: Tensor
    routed: Tensor
    mismatch: Tensor
    p1: Tensor
    gap: Tensor
    entropy: Tensor
    top: Tensor
    large_passes: int = 0
    large_tokens: int = 0
    small_passes: int = 0
    small_tokens: int = 0

    @property
    def total(self) -> int:
        """Emitted tokens."""
        return int((self.token >= 0).sum())

    @property
    def latent(self) -> int:
        """Times the large model was asked, row by row."""
        return int(self.routed.sum())

    @property
    def mismatches(self) -> int:
        """Times it changed the small model's choice."""
        return int(self.mismatch.sum())

    def frequency(self) -> float:
        """Mismatches per emitted token; with the router that always asks this is the collaboration frequency."""
        return self.mismatches / self.total if self.total else 0.0

    def share_asked(self) -> float:
        """Routed tokens per emitted token."""
        return self.latent / self.total if self.total else 0.0

    def by_uncertainty(self, bins: int | Sequence[float] = 10, measure: Uncertainty = "p1") -> Binned:
        """Mismatches by what the small model thought of its own token.

        Args:
            bins: Number of bins of equal width over the measure's range (0 to 1; entropy: up to its maximum), or edges.
            measure: ``"p1"``, ``"gap"`` or ``"entropy"``.
        """
        values, wrong = self._known(measure)
        highest = max(float(values.max()), 1e-9) if measure == "entropy" and len(values) else 1.0
        return _bin(values, wrong, bins, highest)

    def by_position(self, bins: int | Sequence[float] = 10) -> Binned:
        """Mismatches by place in the answer, 0 (first token) to 1 (its end)."""
        lengths = (self.token >= 0).sum(-1, keepdim=True).clamp_min(1)  # (B, 1)
        place = torch.arange(self.token.shape[1]) / lengths  # (B, N)
        return _bin(place[self.routed], self.mismatch[self.routed], bins, 1.0)

    def auc(self, measure: Uncertainty = "p1") -> float:
        """Area under the ROC curve of foreseeing a mismatch: 0.5 is chance, 1.0 perfect.

        Raises:
            ValueError: There are no mismatches, or nothing else.
        """
        from sklearn.metrics import roc_auc_score

        values, wrong = self._known(measure)
        if wrong.all() or not wrong.any():
            raise ValueError(f"{len(wrong)} routed tokens with {int(wrong.sum())} mismatches: both kinds are needed")
        return float(roc_auc_score(wrong.numpy(), (values if measure == "entropy" else -values).numpy()))

    def summary(self) -> dict[str, float]:
        """The figures in short, plain JSON."""
        return {
            "tokens": self.total,
            "asked": self.latent,
            "mismatches": self.mismatches,
            "frequency": round(self.frequency(), 4),
            "share_asked": round(self.share_asked(), 4),
            "large_passes": self.large_passes,
            "large_tokens": self.large_tokens,
            "small_passes": self.small_passes,
            "small_tokens": self.small_tokens,
        }

    @classmethod
    def join(cls, traces: Iterable[CollaborationTrace]) -> CollaborationTrace:
        """The traces of several runs as one, shorter ones filled up.

        Example:
            >>> t = torch.ones(1, 2)
            >>> one = CollaborationTrace(t.long(), t > 0, t > 0, t, t, t, t[..., None])
            >>> CollaborationTrace.join([one, one]).total
            4
        """
        many = list(traces)
        if not many:
            raise ValueError("there are no traces to join; give at least one")
        longest = max(trace.token.shape[1] for trace in many)
        filling = {"token": -1, "routed": False, "mismatch": False}
        joined: dict[str, Any] = {}
        for name in ("token", "routed", "mismatch", "p1", "gap", "entropy", "top"):
            parts = []
            for trace in many:
                part = getattr(trace, name)
                behind = (0, 0) * (part.ndim - 2) + (0, longest - part.shape[1])
                parts.append(F.pad(part, behind, value=filling.get(name, float("nan"))))
            joined[name] = torch.cat(parts)
        for name in ("large_passes", "large_tokens", "small_passes", "small_tokens"):
            joined[name] = sum(getattr(trace, name) for trace in many)
        return cls(**joined)

    def _known(self, measure: Uncertainty) -> tuple[Tensor, Tensor]:
        """The measure and whether it was a mismatch, of tokens that both models have judged."""
        if measure not in ("p1", "gap", "entropy"):
            raise ValueError(f"measure must be 'p1', 'gap' or 'entropy', got {measure!r}")
        values = getattr(self, measure)
        known = self.routed & ~values.isnan()
        return values[known], self.mismatch[known]


def _bin(values: Tensor, wrong: Tensor, bins: int | Sequence[float], highest: float) -> Binned:
    if isinstance(bins, int) and bins < 1:
        raise ValueError(f"bins is a number of bins, at least 1, or their edges, got {bins}")
    edges = np.linspace(0.0, highest, bins + 1) if isinstance(bins, int) else np.asarray(bins, dtype=float)
    if len(edges) < 2 or (np.diff(edges) <= 0).any():
        raise ValueError(f"edges of bins must rise and be at least two, got {edges.tolist()}")
    counts = [np.histogram(v.numpy(), edges)[0].tolist() for v in (values, values[wrong])]
    return Binned(tuple(edges.tolist()), tuple(counts[0]), tuple(counts[1]))


@dataclass(frozen=True)
class ScalingLaw:
    """``CoF(r) = b - a r^(-alpha)``. The three are strongly correlated: compare predictions, not parameters.

    Attributes:
        a: Scale.
        alpha: Exponent.
        b: Limit for a large model without end.
        r2: Share of the variance that the fit explains.
    """

    a: float
    alpha: float
    b: float
    r2: float = float("nan")

    def predict(self, ratio: float | Sequence[float] | np.ndarray) -> Any:
        """Collaboration frequency at a size ratio, or at several."""
        return self.b - self.a * np.asarray(ratio, dtype=float) ** -self.alpha


def fit_scaling(ratios: Sequence[float], frequencies: Sequence[float]) -> ScalingLaw:
    """Fit the scaling law by least squares.

    As in the paper's analysis the search starts from (1, 1, 1) and no parameter may fall below 0.05.

    Args:
        ratios: Size of the large over the small model, above 0.
        frequencies: Collaboration frequency of each pair, 0 to 1.

    Raises:
        ValueError: Fewer than three pairs, or values out of range.

    Example:
        >>> law = fit_scaling([2, 4, 8, 16], [0.10, 0.12, 0.135, 0.145])
        >>> round(float(law.predict(4)), 2)
        0.12
    """
    from scipy.optimize import curve_fit

    x, y = np.asarray(ratios, dtype=float), np.asarray(frequencies, dtype=float)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 3:
        raise ValueError(
            f"the law has three parameters and needs at least three pairs of ratio and frequency, got {x.size} ratios "
            f"and {y.size} frequencies"
        )
    if not (np.isfinite(x) & (x > 0)).all() or not ((y >= 0) & (y <= 1)).all():
        raise ValueError("ratios must be above 0 and frequencies between 0 and 1 (not per cent)")

    def law(ratio: np.ndarray, a: float, alpha: float, b: float) -> np.ndarray:
        return b - a * ratio**-alpha

    fitted: Any = curve_fit(law, x, y, p0=(1.0, 1.0, 1.0), bounds=(0.05, np.inf), max_nfev=100_000)
    a, alpha, b = fitted[0]
    spread = float(((y - y.mean()) ** 2).sum())
    left = float(((y - law(x, a, alpha, b)) ** 2).sum())
    return ScalingLaw(float(a), float(alpha), float(b), 1 - left / spread if spread > 0 else float("nan"))
