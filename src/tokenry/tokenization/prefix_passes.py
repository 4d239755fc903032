"""Passes of a language model over token sequences that share a beginning, with one key-value cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tokenry.layers.cache_argument import CACHE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Ids", "PrefixPasses", "shared_beginning"]

Ids = tuple[int, ...]
CHUNK = 512  # tokens of a long beginning per pass, of which no logits are kept
RERUN = 32  # fewer new tokens than that do not get a pass of their own


class PrefixPasses:
    """What a model says after token sequences, most of which it has read before.

    The cache is cut back to what the next sequences share with it, so that only new tokens are run. Several sequences
    are one batch, filled up on the right: nothing looks ahead, so what stands there is never seen.

    Args:
        model: Causal language model whose layers all attend to the whole context.
        context: Tokens before every sequence, at least one.

    Attributes:
        passes: How often the model was called.

    Raises:
        ValueError: The model's cache cannot be cut back.
    """

    def __init__(self, model: PreTrainedModel, context: Ids) -> None:
        self.model, self.context = model, context
        self.cache = DynamicCache(config=model.config)
        for index, layer in enumerate(self.cache.layers):
            if type(layer) is not DynamicLayer:
                raise ValueError(
                    f"layer {index} of the model keeps a {type(layer).__name__}, which cannot be cut back when an encoding "
                    "changes; use a model whose layers all attend to the whole context (no sliding window, no linear attention)"
                )
        self.passes = 0
        self._held: Ids = ()  # what the cache holds
        limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self._limit = limit if isinstance(limit, int) else None
        takes = inspect.signature(model.forward).parameters
        self._last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def _pass(self, rows: Sequence[Ids], **options: Any) -> Tensor:
        """Logits ``(R, S, V)`` of rows behind what the cache holds."""
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *row[-1:] * (longest - len(row))] for row in rows], device=self.model.device)
        self.passes += 1
        with torch.inference_mode():
            return self.model(input_ids=ids, use_cache=True, **{CACHE: self.cache}, **options).logits

    def _check_length(self, length: int) -> None:
        if self._limit is not None and length > self._limit:
            raise ValueError(
                f"the text takes {length} tokens and the model reads {self._limit}; start again from the end of the text"
            )

    def _hold(self, ids: Ids) -> None:
        """Make the cache hold exactly ``ids``."""
        same = shared_beginning([self._held, ids])
        if same < len(self._held):
            self.cache.crop(same - len(self._held))
        for start in range(same, len(ids), CHUNK):
            self._pass([ids[start : start + CHUNK]], **self._last_only)
        self._held = ids

    def after(self, sequences: Sequence[Ids]) -> dict[Ids, Tensor]:
        """Log-probability of the next token after each sequence, in one pass behind what all of them share.

        Args:
            sequences: Tokens behind the context; the empty one is allowed.

        Returns:
            Sequence to ``(V,)`` float64 on the CPU.
        """
        rows: list[Ids] = []
        for ids in sorted({(*self.context, *ids) for ids in sequences}, key=len, reverse=True):
            if not any(row[: len(ids)] == ids for row in rows):
                rows.append(ids)
        shortest = len(self.context) + min(map(len, sequences))
        common = min(shared_beginning(rows), shortest - 1)
        self._check_length(len(rows[0]))
        known = shared_beginning([self._held, rows[0][:common]])
        if common - known <= (RERUN if len(rows) == 1 else 0):  # few new tokens: all in the one pass
            common = known
        self._hold(rows[0][:common])
        if len(rows) > 1 and common:
            self.cache.batch_repeat_interleave(len(rows))
        logits = self._pass([row[common:] for row in rows])  # (R, S, V)
        if len(rows) > 1:  # the longest has no filling
            self.cache.batch_select_indices(torch.zeros(1, dtype=torch.long, device=logits.device))
        self._held = rows[0]
        places = []
        for ids in sequences:
            whole = (*self.context, *ids)
            places.append(
                (next(r for r, row in enumerate(rows) if row[: len(whole)] == whole), len(whole) - 1 - common)
            )
        row, position = torch.tensor(places, device=logits.device).T
        found = logits[row, position].cpu().double().log_softmax(-1)  # (n, V)
        return dict(zip(sequences, found, strict=True))

    def logprob(self, ids: Ids) -> float:
        """Log-probability of ``ids`` after the context."""
        whole, total = (*self.context, *ids), 0.0
        self._check_length(len(whole))
        self._hold(self.context[:-1])
        for start in range(len(self.context) - 1, len(whole) - 1, CHUNK):
            piece = whole[start : min(start + CHUNK, len(whole) - 1)]
            logits = self._pass([piece])[0]  # (S, V)
            self._held += piece
            following = torch.tensor(whole[start + 1 : start + 1 + len(piece)], device=logits.device)
            exact = torch.promote_types(logits.dtype, torch.float32)
            chosen = logits.log_softmax(-1, dtype=exact).gather(1, following[:, None])  # (S, 1)
            total += chosen.double().sum().item()
        return total


def shared_beginning(rows: Sequence[Ids]) -> int:
    """Length of the common beginning."""
    count = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count
