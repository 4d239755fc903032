"""Explain a difference between two texts that should be equal.

In exact arithmetic a verified draft gives the model's own greedy text. In floating point a pass over many rows rounds
differently from a pass over one, so two first choices that lie closer together than the rounding can change places.
``explain_difference`` says whether that is what happened.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Difference", "explain_difference"]


@dataclass(frozen=True)
class Difference:
    """The first place where two texts part.

    Attributes:
        position: Index of the token.
        tokens: The token of the first and of the second text.
        gap: Best minus second-best logit there, computed in float64.
        ulps: The gap in units in the last place of the model's dtype at the best logit.
    """

    position: int
    tokens: tuple[int, int]
    gap: float
    ulps: float


def explain_difference(model: PreTrainedModel, expected: Tensor, actual: Tensor) -> Difference | None:
    """Where and why two texts of one prompt part, or None if they do not.

    Args:
        model: The model that wrote both; a float64 copy of it judges.
        expected: ``(N,)`` the plain greedy text, prompt included.
        actual: ``(M,)`` the other one.

    Example:
        >>> explain_difference(None, torch.tensor([1, 2]), torch.tensor([1, 2])) is None
        True
    """
    shared = min(len(expected), len(actual))
    differing = (expected[:shared] != actual[:shared]).nonzero()
    if not len(differing):
        if len(expected) == len(actual):
            return None
        differing = torch.tensor([[shared]])
    at = int(differing[0])
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        best = exact(input_ids=expected[None, :at].to(model.device)).logits[0, -1].topk(2).values.tolist()
    ulp = 2.0 ** math.floor(math.log2(max(abs(best[0]), 1e-30))) * torch.finfo(model.dtype).eps
    tokens = tuple(int(text[at]) if at < len(text) else -1 for text in (expected, actual))
    return Difference(at, (tokens[0], tokens[1]), best[0] - best[1], (best[0] - best[1]) / ulp)
