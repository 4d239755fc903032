"""Logits processors and stopping criteria on rows of different lengths, each on its own real prefix.

The library's processors take one rectangular ``input_ids``. Rows that have accepted different numbers of tokens are
asked one length at a time, always with the whole batch in its order, so that a processor that counts rows counts right;
answers for rows of another length are thrown away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.generation import logits_process as lp
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)

if TYPE_CHECKING:
    from tokenry.decoding.engine.state import DecodingState

__all__ = ["RowProcessors", "RowStopping"]

NO_LIMIT = 1 << 40  # as a length: longer than any text
# These look at the scores alone: all rows can be asked at once, without a prefix.
PREFIX_FREE = (
    lp.TemperatureLogitsWarper,
    lp.TopKLogitsWarper,
    lp.TopPLogitsWarper,
    lp.MinPLogitsWarper,
    lp.TypicalLogitsWarper,
    lp.EpsilonLogitsWarper,
    lp.EtaLogitsWarper,
    lp.InfNanRemoveLogitsProcessor,
    lp.LogitNormalization,
    lp.SuppressTokensLogitsProcessor,
)


class RowProcessors:
    """Apply ``generate``'s processors at a node, as if its path had been generated token by token.

    Args:
        state: The engine's state; the path's tokens are written behind each row's own in ``state.ids``.
    """

    def __init__(self, state: DecodingState) -> None:
        self.state = state
        self.processors = state.logits_processor
        self.prefix_free = all(type(p) in PREFIX_FREE for p in self.processors)

    def __call__(self, scores: Tensor, came: Tensor, depth: int) -> Tensor:
        """Processed scores ``(B, V)`` after the ``depth`` tokens ``came``, ``(B, depth)``."""
        if not self.processors:
            return scores
        state = self.state
        if self.prefix_free:
            return self.processors(state.ids[:, :1], scores)
        lengths = [n + depth for n in state.lengths]
        if depth:
            at = torch.tensor(lengths, device=scores.device)[:, None] - 1
            frozen = torch.tensor(state.finished, device=scores.device)[:, None]
            state.ids.scatter_(1, at, came[:, -1:].masked_fill(frozen, state.pad))
        wanted = sorted({n for n, done in zip(lengths, state.finished, strict=True) if not done})
        if len(wanted) == 1:
            return self.processors(state.ids[:, : wanted[0]], scores)
        out = scores
        for length in wanted:
            rows = [b for b, n in enumerate(lengths) if n == length]
            out = out.index_copy(
                0,
                index := torch.tensor(rows, device=scores.device),
                self.processors(state.ids[:, :length], scores.clone()).index_select(0, index),
            )
        return out


class RowStopping:
    """Where each row's newly accepted tokens end.

    Args:
        criteria: ``generate``'s list. Stop tokens and the length are looked up on the host; a time limit is asked once
            per pass, everything else after every token.

    Attributes:
        max_length: Length that no row may exceed.
    """

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        limits = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
        self.max_length = min(limits) if limits else NO_LIMIT
        self.stop_tokens = {
            int(t) for c in criteria if type(c) is EosTokenCriteria for t in torch.as_tensor(c.eos_token_id).flatten()
        }
        self.timed = [c for c in criteria if type(c) is MaxTimeCriteria]
        known = (MaxLengthCriteria, EosTokenCriteria, MaxTimeCriteria)
        self.others = StoppingCriteriaList([c for c in criteria if type(c) not in known])

    def clip(self, tokens: list[int], length: int) -> tuple[int, bool]:
        """How many of a row's new tokens count, by stop token and length, and whether the row is done.

        Example:
            >>> stopping = RowStopping(StoppingCriteriaList([MaxLengthCriteria(7)]))
            >>> stopping.clip([4, 5, 6], length=5)
            (2, True)
        """
        room = max(self.max_length - length, 1)
        count, done = min(len(tokens), room), len(tokens) >= room
        if self.stop_tokens:
            for i, token in enumerate(tokens[:count]):
                if token in self.stop_tokens:
                    return i + 1, True
        return count, done

    def ask(self, state: DecodingState, counts: list[int], done: list[bool]) -> None:
        """Ask the other criteria after each new token; shortens ``counts`` and sets ``done`` in place.

        ``state.ids`` holds the new tokens, ``state.lengths`` is still without them.
        """
        if self.others:
            for j in range(max(counts, default=0)):
                ends = {n + j + 1 for n, c in zip(state.lengths, counts, strict=True) if c > j}
                for end in sorted(ends):
                    verdict = self.others(state.ids[:, :end], None).tolist()
                    for b, stop in enumerate(verdict):
                        if stop and counts[b] > j and state.lengths[b] + j + 1 == end:
                            counts[b], done[b] = j + 1, True
        if self.timed and any(bool(c(state.ids, None).any()) for c in self.timed):
            done[:] = [True] * len(done)
