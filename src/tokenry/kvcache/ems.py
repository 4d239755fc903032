"""EMS: evict, then merge what was evicted into what stayed, in every head on its own.

Li et al., "EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression Based on Global-Local
Importance", 2024, arXiv:2412.08521. For one key head with N cached tokens, attention ``a[q, i]`` (mean over the
group's query heads), a budget of b entries and a window of the w newest tokens:

    score        s_i = max(ĝ_i, l_i)         g: mean over all queries that see i, scaled to the mass of l (ĝ);
                                             l: mean over the last w queries
    evict        the window stays; of the older tokens the best b - w stay ("heavy");
                 the next floor(r·b) are merge candidates, all others are dropped
    merge        candidate t joins the heavy token j with the most similar key if cos(k_t, k_j) >= τ,
                 else class 0, the zero class: dropped
                 K_j <- (s_j K_j + Σ s_t K_t) / (s_j + Σ s_t),   V_j with the same weights

Every head ends with b entries, but the number merged follows each head's redundancy. One ``scatter_add`` into
b - w + 1 slots does all heads at once; slot 0 is thrown away.

No code of the authors is public, and the paper leaves constants open: the maximum, the weights, r = 1 and τ = 0.6
are this library's choices.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from tokenry.kvcache.compression import CompressedCache
from tokenry.kvcache.scores import GlobalLocal

__all__ = ["EMSCache", "ZeroClassMerge", "merge_classes"]


def merge_classes(keys: Tensor, candidates: Tensor, threshold: float = 0.6) -> Tensor:
    """Class of each candidate: the kept entry with the most similar key, or the zero class.

    Args:
        keys: ``[..., K, D]`` keys of the kept entries, as cached (rotated).
        candidates: ``[..., M, D]`` keys of the candidates.
        threshold: Least cosine similarity that merges.

    Returns:
        ``[..., M]`` int64: 0 drops, ``c >= 1`` is the c-th kept entry.

    Example:
        >>> kept = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> merge_classes(kept, torch.tensor([[0.1, 2.0], [-1.0, 0.0]])).tolist()
        [2, 0]
    """
    a, b = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (candidates, keys))
    best, which = torch.matmul(a, b.transpose(-1, -2)).max(dim=-1)
    return torch.where(best >= threshold, which + 1, 0)


class ZeroClassMerge:
    """Merger: join a candidate to the most similar kept key, or drop it.

    Args:
        merge_ratio: Candidates per entry of the budget. 0 never merges.
        threshold: Least cosine similarity of keys that merges, in [-1, 1].
    """

    def __init__(self, merge_ratio: float = 1.0, threshold: float = 0.6) -> None:
        if merge_ratio < 0:
            raise ValueError(f"merge_ratio must be at least 0 (0 only evicts), got {merge_ratio}")
        if not -1 <= threshold <= 1:
            raise ValueError(f"threshold is a cosine similarity, in [-1, 1]; got {threshold}")
        self.merge_ratio, self.threshold = merge_ratio, threshold

    def candidates(self, budget: int) -> int:
        """Number of merge candidates per head."""
        return int(self.merge_ratio * budget)

    def classes(self, keys: Tensor, candidates: Tensor) -> Tensor:
        """See ``merge_classes``."""
        return merge_classes(keys, candidates, self.threshold)


class EMSCache(CompressedCache):
    """A key-value cache of ``budget`` entries per head: one argument of ``generate``.

    The prompt is read with full attention; after each layer's attention its cache is cut to the budget. A prompt of
    at most ``budget`` tokens is left as it is, bit for bit. Works in batches (padding on the left), with grouped
    heads, beams and any ``attn_implementation`` except flex attention, for every architecture that uses the attention
    interface of ``transformers``. Cannot be rolled back, so not for speculative decoding.

    Args:
        config: ``model.config``, the model's own object: while a layer is being read, its attention call is observed
            through it (``tokenry.kvcache.observe``); between calls nothing is attached to the model.
        budget: Entries per head, window included. Default 256 (paper, LongBench).
        window: Newest tokens that stay as they are and whose attention is the local score. Default 32 [ours].
        merge_ratio: Merge candidates per entry of the budget. Default 1.0 [ours]; 0 only evicts.
        threshold: Least cosine similarity of keys that merges. Default 0.6 [ours].
        combine: ``"max"`` [ours] or ``"sum"`` of global and local score.
        every: Compress again while decoding, whenever more than ``budget + every`` entries are stored, with running
            sums (they cost ``(window + 4) * 4`` bytes per entry and head, and the attention of every decode step is
            computed a second time). Default None: once, after the prompt.

    Raises:
        ValueError: window >= budget, budget < 2, threshold outside [-1, 1], merge_ratio < 0, a model without
            full-attention layers, or (while running) one whose queries cannot be observed.

    Example:
        >>> import torch
        >>> from tokenry.assets import load_model
        >>> model, tokenizer = load_model("small")
        >>> inputs = tokenizer("It was the best of times, it was the worst of times, " * 4, return_tensors="pt")
        >>> cache = EMSCache(config=model.config, budget=24, window=8)
        >>> out = model.generate(**inputs, cache=cache, max_new_tokens=4, do_sample=False)
        >>> cache.layers[0].stored, cache.get_seq_length() == out.shape[1] - 1
        (27, True)
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        budget: int = 256,
        window: int = 32,
        merge_ratio: float = 1.0,
        threshold: float = 0.6,
        *,
        combine: Literal["max", "sum"] = "max",
        every: int | None = None,
    ) -> None:
        merger = ZeroClassMerge(merge_ratio, threshold)
        super().__init__(config, GlobalLocal(combine), budget=budget, window=window, every=every, merger=merger)
