"""The fusion rules of FS-GEN as logits processors, for loops other than Tokenry's.

    small.generate(logits_processor=[OracleProcessor(large)])                the large model's logits
    small.generate(logits_processor=[ContrastiveProcessor(large)])           both, weighted
    large.generate(logits_processor=[ContrastiveProcessor(small, "small")])  the same from the other side
    large.generate(logits_processor=[ProxyProcessor(small, tuned)])          what tuning changed, added

Every model keeps a cache of its own and reads only what is new since it was last asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LogitsProcessor

from tokenry.decoding.engine.row_reader import RowReader, check_reader
from tokenry.decoding.fs_gen import fuse_contrastive, fuse_proxy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ContrastiveProcessor", "OracleProcessor", "ProxyProcessor"]


class _FusionProcessor(LogitsProcessor):
    """Asks further models for their logits on the same prefix.

    Args:
        models: The further models, M of them.
        pad_token_id: Leading tokens of this id are left padding. None: no row has padding.
    """

    def __init__(self, models: list[PreTrainedModel], pad_token_id: int | None) -> None:
        for model in models:
            check_reader(model)
        self.models, self.pad_token_id = models, pad_token_id
        self._readers: list[RowReader] = []
        self._ids: Tensor | None = None
        self._start: list[int] = []

    def fuse(self, scores: Tensor, logits: list[Tensor]) -> Tensor:
        """From ``(B, V)`` scores and M further logits ``(B, V)`` to fused scores ``(B, V)``."""
        raise NotImplementedError(f"{type(self).__name__} must override this")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Fused log-probabilities; what the scores rule out, or what one of the models has no token for, is -inf."""
        rows, length = input_ids.shape
        start = [0] * rows
        if self.pad_token_id is not None:
            start = (input_ids == self.pad_token_id).long().cumprod(-1).sum(-1).clamp_max(length - 1).tolist()
        if self._ids is None or len(self._ids) != rows or self._start != start:
            self._readers, shared = [RowReader(model, rows, start) for model in self.models], 0
        else:  # a step on, another prompt, or beams in another order: keep what is the same in all rows
            both = min(self._ids.shape[1], length - 1)
            shared = int((self._ids[:, :both] == input_ids[:, :both]).all(0).long().cumprod(0).sum())
        self._ids, self._start = input_ids.clone(), start
        found = []
        for reader in self._readers:
            reader.forget([shared] * rows)
            found.append(reader.read(input_ids, list(range(rows)), [length] * rows)[:, 0].to(scores.dtype))
        common = min(scores.shape[-1], *(logits.shape[-1] for logits in found))
        fused = self.fuse(scores[:, :common], [logits[:, :common] for logits in found])
        fused = fused.masked_fill(scores[:, :common] == -torch.inf, -torch.inf)
        fused = fused.log_softmax(-1)  # the same to greedy search and sampling; beams add scores up
        return F.pad(fused, (0, scores.shape[-1] - common), value=-torch.inf)


class OracleProcessor(_FusionProcessor):
    """Replace the scores by the large model's logits.

    Args:
        large_model: The large model; ``generate`` runs on the small one.
        pad_token_id: Leading tokens of this id are left padding.
    """

    def __init__(self, large_model: PreTrainedModel, *, pad_token_id: int | None = None) -> None:
        super().__init__([large_model], pad_token_id)

    def fuse(self, scores: Tensor, logits: list[Tensor]) -> Tensor:
        """The large model's."""
        return logits[0]


class ContrastiveProcessor(_FusionProcessor):
    """Weigh two models' logits among the tokens that the large one finds plausible.

    Args:
        model: The second model.
        role: What it is: ``"large"`` when ``generate`` runs on the small one, ``"small"`` when on the large one.
        alpha: Plausibility, 0 < alpha <= 1. Default 0.1 (paper).
        beta: Weight of the large model. Default 0.5 (paper); above 1 it is contrast.
        pad_token_id: Leading tokens of this id are left padding.

    Example:
        >>> from tokenry.assets import load_model
        >>> small, tokenizer = load_model("draft")
        >>> inputs = tokenizer("It was the", return_tensors="pt", return_token_type_ids=False)
        >>> fused = [ContrastiveProcessor(load_model("small")[0])]
        >>> small.generate(**inputs, logits_processor=fused, do_sample=False, max_new_tokens=4).shape[1]
        7
    """

    def __init__(
        self,
        model: PreTrainedModel,
        role: Literal["large", "small"] = "large",
        *,
        alpha: float = 0.1,
        beta: float = 0.5,
        pad_token_id: int | None = None,
    ) -> None:
        if role not in ("large", "small"):
            raise ValueError(f"role says what the given model is: 'large' or 'small', got {role!r}")
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha={alpha}: it is a share of the best token's probability, above 0 and at most 1")
        super().__init__([model], pad_token_id)
        self.role, self.alpha, self.beta = role, alpha, beta

    def fuse(self, scores: Tensor, logits: list[Tensor]) -> Tensor:
        """``small + beta (large - small)``, masked."""
        large, small = (logits[0], scores) if self.role == "large" else (scores, logits[0])
        return fuse_contrastive(large, small, self.alpha, self.beta)


class ProxyProcessor(_FusionProcessor):
    """Add to the large model's scores what tuning has changed in a small one.

    Args:
        small_model: The small model before tuning.
        tuned_model: The same after tuning; ``generate`` runs on the large model.
        alpha: Weight of the difference, above 0. Default 1.0 (paper).
        pad_token_id: Leading tokens of this id are left padding.
    """

    def __init__(
        self,
        small_model: PreTrainedModel,
        tuned_model: PreTrainedModel,
        *,
        alpha: float = 1.0,
        pad_token_id: int | None = None,
    ) -> None:
        if not alpha > 0:
            raise ValueError(f"alpha={alpha}: the weight of the difference is above 0; 0 would leave the scores alone")
        super().__init__([small_model, tuned_model], pad_token_id)
        self.alpha = alpha

    def fuse(self, scores: Tensor, logits: list[Tensor]) -> Tensor:
        """``large + alpha (tuned - small)``."""
        return fuse_proxy(scores, logits[0], logits[1], self.alpha)
