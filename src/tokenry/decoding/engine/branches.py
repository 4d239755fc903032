"""Run short branches behind many places of a text in one pass: what training parallel prompts needs.

    text       x_1 ... x_N, run once; its keys and values are constants
    cut c      a branch b_1 b_2 ... continues x_1 ... x_c at the positions c+1, c+2, ...
    mask       b_i of cut c sees x_1 ... x_c and b_1 ... b_i of its own branch, nothing of other branches

K branches of one text cost one pass over K tokens per step instead of K passes over the text, and gradients flow
through the branches alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from tokenry.decoding.engine.draft_cache import DraftCache
from tokenry.layers.cache_argument import CACHE

__all__ = ["Branches"]


class Branches:
    """Texts and the cuts in them behind which branches are run.

    Args:
        model: Causal language model in evaluation mode.
        ids: ``(B, N)`` texts, left-padded.
        cuts: ``(K,)`` columns; a branch continues the text up to and including its column.
        mask: ``(B, N)``, 0 at padding; None: there is none.

    Attributes:
        logits: ``(B, K, V)`` of the model at the cuts.

    Raises:
        ValueError: A layer does not attend to the whole text.
    """

    def __init__(self, model: Any, ids: Tensor, cuts: Tensor, mask: Tensor | None = None) -> None:
        self.model = model
        self.cache: Any = DynamicCache(config=model.config)
        DraftCache(self.cache)  # refuses layers whose state cannot be shared by branches
        real = torch.ones_like(ids) if mask is None else mask
        positions = (real.cumsum(-1) - 1).clamp_min(0)  # (B, N)
        keep = {"logits_to_keep": cuts} if self.model._supports_logits_to_keep() else {}
        with torch.no_grad():
            logits = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                **{CACHE: self.cache},
                use_cache=True,
                **keep,
            ).logits
        self.logits = logits if keep else logits[:, cuts]
        self.width = ids.shape[1]
        self.position = positions[:, cuts]  # (B, K)
        columns = torch.arange(self.width, device=ids.device)
        self.past = (columns <= cuts[:, None]) & real.bool()[:, None]  # (B, K, N)

    def _run(self, tokens: Tensor, steps: Tensor, own: Tensor) -> Tensor:
        """Logits of branch tokens.

        Args:
            tokens: ``(B, s, K)`` ids or ``(B, s, K, H)`` embeddings: s tokens for each of the K branches.
            steps: ``(s,)`` how far behind its cut each stands.
            own: ``(s, S)`` bool: which of the branch's S tokens run so far, these included, each may see.

        Returns:
            ``(B, s, K, V)``.
        """
        rows, s, k = tokens.shape[:3]
        same = torch.eye(k, dtype=torch.bool, device=tokens.device)
        branch = (own[:, None, :, None] & same[:, None, :]).flatten(2).flatten(0, 1)  # (s K, S K)
        past = self.past[:, None].expand(-1, s, -1, -1).flatten(1, 2)  # (B, s K, N)
        may = torch.cat([past, branch.expand(rows, -1, -1)], -1)[:, None]  # (B, 1, s K, N + S K)
        mask = torch.zeros(may.shape, dtype=self.model.dtype, device=tokens.device)
        mask = mask.masked_fill_(~may, torch.finfo(self.model.dtype).min)
        at = (self.position[:, None] + steps[:, None]).flatten(1)  # (B, s K)
        given = {"inputs_embeds" if tokens.ndim == 4 else "input_ids": tokens.flatten(1, 2)}
        logits = self.model(**given, attention_mask=mask, position_ids=at, **{CACHE: self.cache}, use_cache=True).logits
        return logits.unflatten(1, (s, k))

    def _rewind(self) -> None:
        self.cache.crop(self.width - self.cache.get_seq_length())

    @torch.no_grad()
    def greedy(self, steps: int) -> Tensor:
        """The model's logits after 1, 2, ... ``steps`` tokens of each branch's greedy continuation: ``(B, K, steps, V)``."""
        token, found = self.logits.argmax(-1), []
        for step in range(1, steps + 1):
            own = torch.ones(1, step, dtype=torch.bool, device=token.device)
            logits = self._run(token[:, None], torch.tensor([step], device=token.device), own)[:, 0]  # (B, K, V)
            found.append(logits)
            token = logits.argmax(-1)
        self._rewind()
        return torch.stack(found, 2)

    def prompts(self, embeddings: Tensor) -> Tensor:
        """Logits of prompt tokens hung on every cut.

        Args:
            embeddings: ``(m, e, H)``: e copies of each of m prompt tokens. Copy v of token j stands j places behind
                the cut and sees copy v of the tokens up to j; the copies' logits are averaged.

        Returns:
            ``(B, K, m, V)``.
        """
        m, e, hidden = embeddings.shape
        rows, k = self.position.shape
        step = torch.arange(m, device=embeddings.device).repeat_interleave(e)
        copy = torch.arange(e, device=embeddings.device).repeat(m)
        own = (step[:, None] >= step) & (copy[:, None] == copy)  # (m e, m e)
        tokens = embeddings.to(self.model.dtype).view(1, m * e, 1, hidden).expand(rows, -1, k, -1)
        logits = self._run(tokens, step + 1, own)  # (B, m e, K, V)
        self._rewind()
        return logits.unflatten(1, (m, e)).mean(2).transpose(1, 2)
