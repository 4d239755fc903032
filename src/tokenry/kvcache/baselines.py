"""Caches that evict by simpler rules, on the machinery that EMS uses: what to compare a method with.

    SlidingWindowCache    the newest ``budget`` tokens
    SinkCache             the first 4 and the newest              Xiao et al. 2023, arXiv:2309.17453
    H2OCache              largest sum of attention, and a window  Zhang et al. 2023, arXiv:2306.14048
    SnapKVCache           attention of the newest queries         Li et al. 2024, arXiv:2404.14469
    GlobalCache           mean attention over the queries that can see a token (half of EMS's score)
    TOVACache             attention of the newest query           Oren et al. 2024, arXiv:2401.06104
    KeyNormCache          short keys                              Devoto et al. 2024, arXiv:2406.11430
    KeyDiffCache          keys unlike the others                  Park et al. 2025, arXiv:2504.15364
    ExpectedAttentionCache  attention of queries to come          Devoto et al. 2025, arXiv:2510.00636

The prompt is always read with full attention; given the same window, the figures differ by the rule alone. The last four
have no window of their own, so by default only the newest token is sure to stay.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from tokenry.kvcache.compression import CompressedCache
from tokenry.kvcache.scores import (
    AttentionSum,
    ExpectedAttention,
    GlobalAttention,
    KeyDifference,
    KeyNorm,
    LastAttention,
    LocalAttention,
    Recency,
)

__all__ = [
    "ExpectedAttentionCache",
    "GlobalCache",
    "H2OCache",
    "KeyDiffCache",
    "KeyNormCache",
    "SinkCache",
    "SlidingWindowCache",
    "SnapKVCache",
    "TOVACache",
]


class SlidingWindowCache(CompressedCache):
    """The newest ``budget`` tokens of the prompt.

    Args:
        config: ``model.config``.
        budget: Entries per head.
        every: Slide on while decoding, every so many tokens. None: cut once, after the prompt.
    """

    def __init__(self, config: PreTrainedConfig, budget: int = 256, *, every: int | None = None) -> None:
        super().__init__(config, Recency(), budget=budget, window=max(1, budget - 1), every=every)


class SinkCache(CompressedCache):
    """The first ``sinks`` tokens and the newest ones.

    Args:
        config: ``model.config``.
        budget: Entries per head, sinks included.
        sinks: First tokens that stay. Default 4 (StreamingLLM).
        every: Slide on while decoding. None: cut once.
    """

    def __init__(
        self, config: PreTrainedConfig, budget: int = 256, sinks: int = 4, *, every: int | None = None
    ) -> None:
        if not 0 < sinks < budget:
            raise ValueError(f"sinks must be at least 1 and smaller than the budget of {budget}, got {sinks}")
        super().__init__(config, Recency(sinks), budget=budget, window=max(1, budget - sinks), every=every)


class H2OCache(CompressedCache):
    """The tokens with the largest sum of attention (heavy hitters), and the window.

    Args:
        config: ``model.config``.
        budget: Entries per head, window included.
        window: Newest tokens that always stay.
        every: Compress again while decoding. None: once.
    """

    def __init__(
        self, config: PreTrainedConfig, budget: int = 256, window: int = 32, *, every: int | None = None
    ) -> None:
        super().__init__(config, AttentionSum(), budget=budget, window=window, every=every)


class SnapKVCache(CompressedCache):
    """The tokens that the newest ``window`` queries look at, and the window.

    Args:
        config: ``model.config``.
        budget: Entries per head, window included.
        window: Newest tokens; their attention is the score.
        pool: Odd width of the mean over neighbours. Default 1, no pooling: the score EMS calls local.
        every: Compress again while decoding. None: once.
    """

    def __init__(
        self, config: PreTrainedConfig, budget: int = 256, window: int = 32, pool: int = 1, *, every: int | None = None
    ) -> None:
        super().__init__(config, LocalAttention(pool), budget=budget, window=window, every=every)


class GlobalCache(CompressedCache):
    """The tokens with the largest mean attention over the queries that can see them, and the window.

    Args:
        config: ``model.config``.
        budget: Entries per head, window included.
        window: Newest tokens that always stay.
        every: Compress again while decoding. None: once.
    """

    def __init__(
        self, config: PreTrainedConfig, budget: int = 256, window: int = 32, *, every: int | None = None
    ) -> None:
        super().__init__(config, GlobalAttention(), budget=budget, window=window, every=every)


class TOVACache(CompressedCache):
    """The tokens that the newest query looks at (token omission via attention); all heads of a layer keep the same ones.

    The paper drops one token per step: that is ``every=1``.

    Args:
        config: ``model.config``.
        budget: Entries per head, window included.
        window: Newest tokens that always stay. Default 1: the paper has no window.
        every: Compress again while decoding. None: once.
    """

    def __init__(
        self, config: PreTrainedConfig, budget: int = 256, window: int = 1, *, every: int | None = None
    ) -> None:
        super().__init__(config, LastAttention(), budget=budget, window=window, every=every)


class KeyNormCache(CompressedCache):
    """The tokens with the shortest keys, which get most attention. Needs no attention and no queries.

    Args:
        config: ``model.config``.
        budget: Entries per head, window included.
        window: Newest tokens that always stay. Default 1: the paper has no window.
        every: Compress again while decoding. None: once.
    """

    def __init__(
        self, config: PreTrainedConfig, budget: int = 256, window: int = 1, *, every: int | None = None
    ) -> None:
        super().__init__(config, KeyNorm(), budget=budget, window=window, every=every)


class KeyDiffCache(CompressedCache):
    """The tokens whose keys point away from the mean direction of all. Needs no attention and no queries.

    The paper reads long prompts block by block: that is ``prefill_chunk_size`` with ``every``.

    Args:
        config: ``model.config``.
        budget: Entries per head, window included.
        window: Newest tokens that always stay. Default 1: the paper has no window.
        every: Compress again while decoding. None: once.
    """

    def __init__(
        self, config: PreTrainedConfig, budget: int = 256, window: int = 1, *, every: int | None = None
    ) -> None:
        super().__init__(config, KeyDifference(), budget=budget, window=window, every=every)


class ExpectedAttentionCache(CompressedCache):
    """The tokens that coming queries are expected to look at, the length of their values considered, and the first four.

    Queries to come are taken as normally distributed like those so far, moved to coming positions. Needs queries, but no
    attention.

    Args:
        config: ``model.config``.
        budget: Entries per head, window and first four included.
        window: Newest tokens that always stay. Default 1: the paper has no window.
        future: Coming positions to average over.
        every: Compress again while decoding. None: once.

    Raises:
        ValueError: While running, a model whose queries' positions cannot be taken out (``tokenry.kvcache.rotation``).
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        budget: int = 256,
        window: int = 1,
        future: int = 512,
        *,
        every: int | None = None,
    ) -> None:
        super().__init__(config, ExpectedAttention(future), budget=budget, window=window, every=every)
