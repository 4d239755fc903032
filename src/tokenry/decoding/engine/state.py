"""What a decoding loop passes around: the draft of one pass, and where every row stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenry.decoding.engine.acceptance import Accepted
from tokenry.decoding.engine.draft_cache import DraftCache
from tokenry.decoding.engine.draft_tree import DraftTree
from tokenry.decoding.engine.statistics import DecodingStats

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

__all__ = ["DecodingState", "Proposal"]


@dataclass
class Proposal:
    """A draft for the next pass.

    Attributes:
        tree: Its structure, the same for all rows.
        tokens: ``(B, T)``, the root's first. A node that a row does not use may hold any valid token.
        candidates: ``(B, T)`` bool: False where a row has no candidate. None: the tree's own marks.
        draft_probs: ``(B, T, V)``: the distribution that each node's token was drawn from, for speculative sampling.
            None where the draft is deterministic.
        embeds: ``(B, T, H)``: fed instead of ``tokens`` (soft prompt tokens, for example).
    """

    tree: DraftTree
    tokens: Tensor
    candidates: Tensor | None = None
    draft_probs: Tensor | None = None
    embeds: Tensor | None = None

    @classmethod
    def plain(cls, state: DecodingState) -> Proposal:
        """Nothing is drafted: the root alone, one step of plain decoding."""
        return cls(DraftTree.chain(0).to(state.device), state.root)


@dataclass
class DecodingState:
    """What a proposer may read.

    Attributes:
        model: The target model.
        ids: ``(B, capacity)`` tokens; row b's are ``ids[b, : lengths[b]]``, left padding included.
        lengths: Tokens of each row, the root included.
        prompt_length: Width of the prompt.
        root: ``(B, 1)`` the last committed tokens.
        finished: Rows that are done.
        budget: Length that no row may exceed.
        cache: The engine's cache, which holds all but the root.
        do_sample: Whether tokens are drawn.
        last: Decisions of the pass before; None before the first.
        stats: Counts so far.
    """

    model: PreTrainedModel
    ids: Tensor
    lengths: list[int]
    prompt_length: int
    root: Tensor
    finished: list[bool]
    budget: int
    cache: DraftCache
    do_sample: bool
    logits_processor: Any  # a LogitsProcessorList
    generation_config: GenerationConfig
    start: Tensor | None  # (B,) left padding of each row; None: no row has any
    position: Tensor  # (B, 1) position of the root
    before: int  # cached positions that stand before ids (0 unless a cache was handed over without its tokens)
    pad: int
    last: Accepted | None = None
    stats: DecodingStats = field(default_factory=DecodingStats)

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.lengths)

    @property
    def cached(self) -> list[int]:
        """Cached positions of each row."""
        return [self.before + n - 1 for n in self.lengths]

    @property
    def remaining(self) -> int:
        """Tokens that the longest-running row may still emit."""
        return self.budget - min(n for n, done in zip(self.lengths, self.finished, strict=True) if not done)

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` more tokens in ``ids``."""
        need = max(self.lengths) + tokens
        if need > self.ids.shape[1]:
            more = self.ids.new_full((self.ids.shape[0], max(need, 2 * self.ids.shape[1])), self.pad)
            more[:, : self.ids.shape[1]] = self.ids
            self.ids = more

    @property
    def device(self) -> torch.device:
        """Device of the tokens."""
        return self.ids.device
