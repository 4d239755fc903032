"""When to ask the large model, judged from the small model's next-token probabilities.

p_1 >= p_2 >= ...              the small model's probabilities, sorted
threshold t                    ask when p_1 < t
delta threshold t              ask when (p_1 - p_2) / 2 < t
svm                            ask when a trained classifier says so from (p_1, ..., p_K)
normal, none                   ask always, never
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenry.decoding.collaboration import CollaborationTrace

__all__ = ["Router"]


@dataclass(frozen=True)
class Router:
    """A rule that says for which rows the large model is asked.

    Made by ``Router.normal()``, ``none()``, ``threshold(t)``, ``delta_threshold(t)`` or ``svm(...)``; a rule of your
    own is ``Router("name", rule)``.

    Attributes:
        name: For reports.
        rule: ``(R, V)`` probabilities to ``(R,)`` bool. None: the answer is ``always``, whatever they are.
        always: The answer without a rule.
        top_k: Probabilities that the rule needs; the vocabulary must have as many.

    Example:
        >>> probabilities = torch.tensor([[0.9, 0.1, 0.0], [0.4, 0.35, 0.25]])
        >>> Router.threshold(0.5)(probabilities).tolist()
        [False, True]
        >>> Router.delta_threshold(0.2)(probabilities).tolist()
        [False, True]
    """

    name: str
    rule: Callable[[Tensor], Tensor] | None = None
    always: bool = False
    top_k: int = 1

    def __call__(self, probabilities: Tensor) -> Tensor:
        """For which rows of ``(R, V)`` to ask: ``(R,)`` bool."""
        if self.rule is None:
            return torch.full_like(probabilities[:, 0], self.always, dtype=torch.bool)
        return self.rule(probabilities)

    @classmethod
    def normal(cls) -> Router:
        """Ask at every token."""
        return cls("normal", always=True)

    @classmethod
    def none(cls) -> Router:
        """Never ask: the small model alone."""
        return cls("none")

    @classmethod
    def threshold(cls, threshold: float = 0.5) -> Router:
        """Ask when the largest probability is below ``threshold``. Default 0.5 (paper)."""
        _in_unit_interval(threshold)
        return cls(f"threshold {threshold:g}", lambda p: p.amax(-1) < threshold)

    @classmethod
    def delta_threshold(cls, threshold: float = 0.2) -> Router:
        """Ask when *half* the gap between the two largest probabilities is below ``threshold``. Default 0.2 (paper)."""
        _in_unit_interval(threshold)

        def rule(probabilities: Tensor) -> Tensor:
            best = probabilities.topk(2, -1).values  # (R, 2)
            return (best[:, 0] - best[:, 1]) / 2 < threshold

        return cls(f"delta threshold {threshold:g}", rule, top_k=2)

    @classmethod
    def svm(cls, classifier: Any, top_k: int) -> Router:
        """Ask when a classifier says 1 for the ``top_k`` largest probabilities, best first.

        Args:
            classifier: Has ``predict`` as in scikit-learn; ``Router.fit_svm`` trains one.
            top_k: Features that it was trained on.
        """
        if top_k < 1:
            raise ValueError(f"top_k is the number of probabilities the classifier sees and at least 1, got {top_k}")

        def rule(probabilities: Tensor) -> Tensor:
            features = probabilities.topk(top_k, -1).values.float().cpu().numpy()  # (R, top_k)
            return torch.as_tensor(classifier.predict(features) == 1, device=probabilities.device)

        return cls(f"svm {top_k}", rule, top_k=top_k)

    @classmethod
    def fit_svm(cls, trace: CollaborationTrace, *, seed: int = 0, **options: Any) -> Router:
        """Train an RBF support vector machine to foresee mismatches, on as many matches as mismatches.

        Args:
            trace: Of runs that asked at every token and kept ``top_k`` probabilities per token (paper: 1,000).
            seed: Which tokens of the more frequent class are left out.
            **options: Handed to ``sklearn.svm.SVC``.

        Raises:
            ValueError: The trace has no probabilities, or mismatches only, or matches only.
        """
        from sklearn.svm import SVC

        if trace.top.shape[-1] == 0:
            raise ValueError("the trace holds no probabilities; run collaborate(..., top_k=1000) to keep them")
        known = trace.routed & ~trace.p1.isnan()
        features, labels = trace.top[known], trace.mismatch[known]  # (n, K), (n,)
        generator = torch.Generator().manual_seed(seed)
        classes = [(labels == label).nonzero().flatten() for label in (False, True)]
        fewest = min(len(members) for members in classes)
        if fewest == 0:
            raise ValueError(
                f"{len(labels)} routed tokens with {int(labels.sum())} mismatches: both matches and mismatches are "
                "needed; collect traces of more prompts with Router.normal()"
            )
        chosen = torch.cat([m[torch.randperm(len(m), generator=generator)[:fewest]] for m in classes])
        classifier = SVC(kernel="rbf", **options).fit(features[chosen].numpy(), labels[chosen].int().numpy())
        return replace(cls.svm(classifier, features.shape[-1]), name=f"svm {features.shape[-1]} on {2 * fewest} tokens")


def _in_unit_interval(threshold: float) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"a threshold is compared with probabilities and lies between 0 and 1, got {threshold}")
