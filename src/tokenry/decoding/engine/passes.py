"""Passes of the target model: over the prompt as the library runs it, over a draft with its own mask and positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from tokenry.decoding.engine.decoder_blocks import learned_positions
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
        positions = learned_positions(model.config)
        # Nodes behind the end of a table of positions lie behind the budget as well and are never emitted.
        self.last_position = None if positions is None else positions - 1

    def prefill(self, pending: Tensor, *, all_logits: bool) -> Tensor:
        """Run prompt tokens ``(B, N)`` that the cache lacks; returns logits ``(B, N or 1, V)``."""
        logits = self._prompt(pending, {"input_ids": pending}, nodes=0, keep=0 if all_logits else 1)
        self.state.cache.length += pending.shape[1]
        self.state.stats.prefill_passes += 1
        return logits

    def run(self, proposal: Proposal, pending: Tensor) -> Tensor:
        """Verify a draft: logits ``(B, T, V)``. ``pending`` prompt tokens go along when the draft is a chain."""
        state, tree = self.state, proposal.tree
        state.stats.forward_passes += 1
        state.stats.nodes.append(tree.size)
        if pending.shape[1]:
            if proposal.embeds is None:
                whole = {"input_ids": torch.cat([pending, proposal.tokens], 1)}
            else:
                whole = {"inputs_embeds": torch.cat([self.model.get_input_embeddings()(pending), proposal.embeds], 1)}
            logits = self._prompt(pending, whole, nodes=tree.size, keep=tree.size)[:, -tree.size :]
            state.cache.length += pending.shape[1]
            return logits
        length = state.cache.length
        positions = state.position if tree.size == 1 else state.position + tree.depth  # (B, T)
        if self.last_position is not None:
            positions = positions.clamp_max(self.last_position)
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

    def _prompt(self, pending: Tensor, whole: dict[str, Tensor], *, nodes: int, keep: int) -> Tensor:
        """Prompt tokens through the library's own causal mask, exactly as stock ``generate`` runs them.

        Args:
            pending: ``(B, N)``.
            whole: The model's input: these tokens, and those of a chain of ``nodes`` behind them.
            nodes: See ``whole``; the first is the root.
            keep: Logits that are needed, counted from the end; 0: all.
        """
        state, n = self.state, pending.shape[1] + nodes
        behind = torch.arange(n, device=pending.device) - pending.shape[1]
        positions = (state.position + behind).clamp(0, self.last_position)
        mask = self.mask  # reaches to the root
        if mask is not None:
            mask = functional.pad(mask, (0, max(nodes - 1, 0)), value=1)[:, : state.cache.length + n]
        state.cache.prepare(n)
        logits = self.model(
            **whole,
            attention_mask=mask,
            position_ids=positions,  # (B, n)
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
