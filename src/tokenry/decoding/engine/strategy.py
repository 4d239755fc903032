"""The interface of a way to draft: what a method overrides, and what ``generate`` calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from tokenry.decoding.engine.acceptance import Accepted
from tokenry.decoding.engine.loop import decode
from tokenry.decoding.engine.output import DecodingOutput
from tokenry.decoding.engine.passes import Passes
from tokenry.decoding.engine.state import DecodingState, Proposal
from tokenry.decoding.engine.statistics import DecodingStats

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.generation.streamers import BaseStreamer

__all__ = ["DraftStrategy"]


class DraftStrategy:
    """A way to draft, and at the same time what ``generate(custom_generate=...)`` takes.

    A subclass overrides ``propose`` and, where it needs to, ``begin``, ``observe`` and ``end``. Verification, batches,
    sampling, stopping, streaming and counting are the engine's.

    Attributes:
        stats: Counts of the last call.
        wants_prompt_logits: Ask for ``observe_prompt``; the prompt's logits then cost a matrix product of their own.
    """

    wants_prompt_logits: bool = False

    def __init__(self) -> None:
        self.stats = DecodingStats()

    def begin(self, state: DecodingState) -> None:
        """Called once per ``generate``, before anything runs: check the model, make room."""

    def observe_prompt(self, state: DecodingState, ids: Tensor, logits: Tensor) -> None:
        """The prompt but its last token ``(B, N)``, and its logits ``(B, N, V)``, if ``wants_prompt_logits``."""

    def passes(self, state: DecodingState, mask: Tensor | None) -> Passes:
        """What turns a draft into the logits that decide: passes of the model, unless a strategy asks others too."""
        return Passes(state.model, state, mask)

    def propose(self, state: DecodingState) -> Proposal:
        """The draft for the next pass; ``Proposal.plain(state)`` drafts nothing."""
        raise NotImplementedError(f"{type(self).__name__} must override propose")

    def observe(self, state: DecodingState, proposal: Proposal, logits: Tensor, accepted: Accepted) -> None:
        """Learn from a pass: logits ``(B, T, V)`` of all nodes. Not called after the last pass."""

    def end(self, state: DecodingState) -> None:
        """Called once at the end, also after an error."""

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        token_streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Tensor | DecodingOutput:
        """Run the decoding loop. ``generate`` calls this; the arguments are what it has prepared.

        Args:
            model: Causal language model.
            input_ids: ``(B, N)``, left-padded.
            logits_processor: Applied at every node, on the node's own prefix.
            stopping_criteria: Asked after every token.
            generation_config: ``generate``'s own.
            token_streamer: Like ``generate``'s ``streamer``, which a custom strategy is not given: receives the
                prompt, then every token in order, then ``end()``.
            **model_kwargs: ``attention_mask``, ``position_ids``, the cache, as ``generate`` prepared them.

        Raises:
            ValueError: The model, the cache or an option cannot be used with drafts; the message says what to change.
        """
        return decode(
            self,
            model,
            input_ids,
            logits_processor or LogitsProcessorList(),
            stopping_criteria or StoppingCriteriaList(),
            generation_config or model.generation_config,
            token_streamer,
            model_kwargs,
        )
