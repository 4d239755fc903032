"""Speculative decoding with a small draft model, which may itself decode with drafts.

Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023, arXiv:2211.17192; parallel prompts on
the draft model: Chen et al., 2024, arXiv:2405.18628.

    draft      K tokens that the draft model writes greedily behind the committed text, with any strategy of its own
    verify     a chain of K nodes in one pass of the target (``tokenry.decoding.engine.acceptance``)
    rewind     the draft's cache keeps what the target accepted; the rest of its tokens is forgotten, nothing is run again

The draft writes K + 1 tokens, so that its cache holds all K when the target accepts them all. It is deterministic: greedy
text is the target's own, sampled text keeps the target's distribution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from tokenry.decoding.engine.acceptance import accept_greedy
from tokenry.decoding.engine.decoder_blocks import output_size
from tokenry.decoding.engine.draft_tree import DraftTree
from tokenry.decoding.engine.loop import check_decoding, commit, start_decoding
from tokenry.decoding.engine.output import KeptScores
from tokenry.decoding.engine.state import DecodingState, Proposal
from tokenry.decoding.engine.statistics import DecodingStats
from tokenry.decoding.engine.stopping import NO_LIMIT, RowStopping
from tokenry.decoding.engine.strategy import DraftStrategy
from tokenry.layers.cache_argument import CACHE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["DraftModelDecoding"]


class DraftModelDecoding(DraftStrategy):
    """Lossless speculative decoding for transformers' causal language models, in batches too.

    Args:
        draft_model: A faster model with the target's vocabulary.
        draft_tokens: Tokens drafted per pass of the target, K. Default 5.
        strategy: How the draft model decodes: ``ParallelPromptDecoding`` with prompts trained for it, or any other
            strategy. None: token by token.

    Attributes:
        stats: ``DecodingStats`` of the last call, passes of the draft model among them.

    Raises:
        ValueError: ``draft_tokens`` is below 1; when decoding, the two vocabularies differ in size.

    Example:
        >>> from tokenry.assets import load_model
        >>> (model, tokenizer), (draft, _) = load_model("small"), load_model("draft")
        >>> inputs = tokenizer("def main(", return_tensors="pt", return_token_type_ids=False)
        >>> out = model.generate(**inputs, custom_generate=DraftModelDecoding(draft), max_new_tokens=12)
        >>> torch.equal(out, model.generate(**inputs, do_sample=False, max_new_tokens=12))
        True
    """

    def __init__(
        self, draft_model: PreTrainedModel, draft_tokens: int = 5, strategy: DraftStrategy | None = None
    ) -> None:
        super().__init__()
        if draft_tokens < 1:
            raise ValueError(f"draft_tokens={draft_tokens}: draft at least 1 token per pass of the target")
        self.draft_model: Any = draft_model
        self.draft_tokens = draft_tokens
        self.strategy = strategy or _Plain()
        self._draft: Any = None  # the draft model's DecodingState while a run is under way

    def begin(self, state: DecodingState) -> None:
        """Let the draft model read the prompt."""
        sizes = [output_size(model) for model in (self.draft_model, state.model)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the draft model's output has {sizes[0]} tokens, the target's {sizes[1]}; a draft needs the target's "
                "vocabulary: take a smaller model of the same family"
            )
        ids = state.ids[:, : state.prompt_length]
        given: dict[str, Any] = {CACHE: DynamicCache(config=self.draft_model.config)}
        if state.start is not None:
            given["attention_mask"] = (torch.arange(ids.shape[1], device=ids.device) >= state.start[:, None]).long()
        config = GenerationConfig(do_sample=False, pad_token_id=state.pad)
        check_decoding(self.draft_model, ids, config, given)
        self._draft, pending, mask = start_decoding(
            self.draft_model, ids, LogitsProcessorList(), config, NO_LIMIT, given
        )
        self._stopping, self._kept = RowStopping(StoppingCriteriaList()), KeptScores(config)
        self._offset = self._draft.position - state.position  # a handed-over cache may hold what the draft has not read
        self._passes = self.strategy.passes(self._draft, mask)
        if pending.shape[1]:
            self._passes.prefill(pending, all_logits=False)

    def propose(self, state: DecodingState) -> Proposal:
        """Let the draft model write on from what the target has accepted."""
        tokens = min(self.draft_tokens, state.remaining - 1)
        if tokens == 0:
            return Proposal.plain(state)
        draft = self._rewound(state)
        nothing = draft.root[:, :0]
        while not all(draft.finished):
            proposal = self.strategy.propose(draft)
            logits = self._passes.run(proposal, nothing)
            accepted = accept_greedy(proposal.tree, proposal.tokens, logits, proposal.candidates)
            commit(draft, accepted, logits, self._stopping, self._kept)
            state.stats.draft_passes += 1
            written = [n - before for n, before in zip(draft.lengths, state.lengths, strict=True)]
            draft.finished = [done or n > tokens for n, done in zip(written, draft.finished, strict=True)]
            if not all(draft.finished):
                self.strategy.observe(draft, proposal, logits, accepted)
        at = torch.tensor(state.lengths, device=state.device)[:, None] + torch.arange(-1, tokens, device=state.device)
        return Proposal(DraftTree.chain(tokens).to(state.device), draft.ids.gather(1, at))

    def _rewound(self, state: DecodingState) -> DecodingState:
        """The draft's state behind the target's committed tokens; its cache holds all of them but the root."""
        draft = self._draft
        draft.lengths, draft.finished = list(state.lengths), list(state.finished)
        draft.root, draft.position = state.root, state.position + self._offset
        draft.stats = DecodingStats()
        draft.reserve(self.draft_tokens + 1)
        width = max(state.lengths)
        draft.ids[:, :width] = state.ids[:, :width]
        draft.cache.length = max(draft.cached)
        self.strategy.begin(draft)
        return draft

    def end(self, state: DecodingState) -> None:
        """Let go of the draft's cache."""
        if self._draft is not None:
            self.strategy.end(self._draft)
        self._draft = None


class _Plain(DraftStrategy):
    """One token after the other."""

    def propose(self, state: DecodingState) -> Proposal:
        return Proposal.plain(state)
