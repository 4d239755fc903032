"""Passes of the target model: over the prompt as the library runs it, over a draft with its own mask and positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenry.kernels.tree_attention import tree_mask
from tokenry.layers.cache_argument import CACHE

if TYPE_CHECKING:
    from tokenry.decoding.engine.state import DecodingState, Proposal

__all__ = ["Passes"]


class Passes:
    """Passes of the target model.

    Args:
        model: The target.
        state: The engine's state.
        mask: ``(B, N)`` padding mask of the prompt, or None.
    """

    def __init__(self, model: Any, state: DecodingState, mask: Tensor | None) -> None:
        self.model, self.state, self.mask = model, state, mask
        self.dtype = model.dtype
        self.keeps_logits = model._supports_logits_to_keep()
        config = model.config.get_text_config(decoder=True)
        # A learned position table ends. Nodes behind its end lie behind the budget as well and are never emitted.
        learned = getattr(config, "rope_parameters", None) is None
        self.last_position = getattr(config, "max_position_embeddings", None) if learned else None

    def prefill(self, pending: Tensor, *, all_logits: bool) -> Tensor:
        """Run prompt tokens ``(B, N)`` that the cache lacks; returns logits ``(B, N or 1, V)``."""
        logits = self._prompt(pending, roots=0, keep=0 if all_logits else 1)
        self.state.cache.length += pending.shape[1]
        self.state.stats.prefill_passes += 1
        return logits

    def run(self, proposal: Proposal, pending: Tensor) -> Tensor:
        """Verify a draft: logits ``(B, T, V)``. ``pending`` prompt tokens go along when the draft is the root alone."""
        state, tree = self.state, proposal.tree
        state.stats.forward_passes += 1
        state.stats.nodes.append(tree.size)
        if pending.shape[1]:
            logits = self._prompt(torch.cat([pending, state.root], 1), roots=1, keep=1)[:, -1:]
            state.cache.length += pending.shape[1]
            return logits
        length = state.cache.length
        positions = state.position if tree.size == 1 else state.position + tree.depth  # (B, T)
        if self.last_position is not None:
            positions = positions.clamp_max(self.last_position - 1)
        if state.start is not None or any(n != length for n in state.cached):
            cached = torch.tensor(state.cached, device=state.device)
            start = torch.zeros_like(cached) if state.start is None else state.start
            mask = tree_mask(tree.ancestor, cached, start, length, self.dtype)  # (B, 1, T, L + T)
        else:
            mask = None if tree.size == 1 else tree.mask(length, self.dtype)  # (1, 1, T, L + T)
        state.cache.prepare(tree.size)
        draft = {"inputs_embeds": proposal.embeds} if proposal.embeds is not None else {"input_ids": proposal.tokens}
        logits = self.model(
            **draft, attention_mask=mask, position_ids=positions, **{CACHE: state.cache.cache}, use_cache=True
        ).logits
        self._adopt()
        return logits

    def _prompt(self, ids: Tensor, *, roots: int, keep: int) -> Tensor:
        """Prompt tokens through the library's own causal mask, exactly as stock ``generate`` runs them."""
        state, n = self.state, ids.shape[1]
        behind = torch.arange(n, device=ids.device) - (n - roots)
        state.cache.prepare(n)
        logits = self.model(
            input_ids=ids,
            attention_mask=None if self.mask is None else self.mask[:, : state.cache.length + n],
            position_ids=(state.position + behind).clamp_min(0),  # (B, n)
            **{CACHE: state.cache.cache},
            use_cache=True,
            **({"logits_to_keep": keep} if self.keeps_logits else {}),
        ).logits
        self._adopt()
        return logits

    def _adopt(self) -> None:
        state = self.state
        if not state.cache.adopted:
            room = state.before + state.prompt_length + min(state.budget - state.prompt_length, 1024)
            state.cache.adopt(room + 96)
