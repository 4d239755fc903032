"""What a plan would do, without a model: passes, tokens in them, memory held and modelled time; and a prefix cache beside it.

    seconds of a pass = fixed + per_token · tokens + per_kv_token · key-value tokens held

``simulate`` asks the scheduler that ``batch_generate`` asks. ``simulate_lru`` runs requests as they come, with the block
cache of a serving engine: whole blocks of prompts stay until the cache is full, then the least recently used goes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenry.decoding.batching.prefix_groups import BatchPlan, as_new_tokens, as_tokens, plan_batch
from tokenry.decoding.batching.token_batching import BatchStats, Piece, TokenBatcher

__all__ = ["PassCost", "simulate", "simulate_lru"]


@dataclass(frozen=True)
class PassCost:
    """Seconds of a pass.

    The defaults say what one token costs in units of itself on a machine that needs 64 of them to be busy: a pass of
    fewer costs as much. Measure your own for real seconds.

    Example:
        >>> PassCost(fixed=1.0, per_token=0.5).seconds(tokens=4, kv_tokens=100)
        3.0
    """

    fixed: float = 64.0
    per_token: float = 1.0
    per_kv_token: float = 0.0

    def seconds(self, tokens: int, kv_tokens: int) -> float:
        """Of one pass."""
        return self.fixed + self.per_token * tokens + self.per_kv_token * kv_tokens


def simulate(
    plan: BatchPlan,
    kv_limit: int,
    cost: PassCost | None = None,
    *,
    new_tokens: int | Sequence[int] | None = None,
    max_new_tokens: int | Sequence[int] | None = None,
    max_tokens_per_pass: int = 512,
) -> BatchStats:
    """Run a plan without a model.

    Args:
        plan: From ``plan_batch``.
        kv_limit: Tokens whose keys and values may be held.
        cost: Of a pass. Default ``PassCost()``.
        new_tokens: What each request really generates. Default: what the plan expects.
        max_new_tokens: The most each may generate, if the plan's numbers are estimates. Default: the larger of both.
        max_tokens_per_pass: Above this no prompt tokens are added to a pass.

    Example:
        >>> stats = simulate(plan_batch([[1, 2, 3], [1, 2, 4]], 2), kv_limit=10)
        >>> stats.prefill_tokens, stats.passes, stats.peak_kv_tokens
        (4, 2, 6)
    """
    count = len(plan.prompt_tokens)
    real = plan.new_tokens if new_tokens is None else as_new_tokens(new_tokens, count, "new_tokens")
    most = list(map(max, real, plan.new_tokens)) if max_new_tokens is None else as_new_tokens(max_new_tokens, count)
    return _run(TokenBatcher(plan, kv_limit, most, max_tokens_per_pass), real, cost or PassCost())


def _run(batcher: TokenBatcher, real: Sequence[int], cost: PassCost) -> BatchStats:
    generated = [0] * len(real)
    stats = batcher.stats
    while not batcher.done:
        for piece in batcher.next_pass():
            if piece.emits and piece.request is not None:
                generated[piece.request] += 1
                batcher.emitted(piece.request, stop=generated[piece.request] >= real[piece.request])
        stats.seconds += cost.seconds(stats.tokens[-1], stats.kv_tokens[-1])
    return stats


class _LruBatcher(TokenBatcher):
    """First come, first served, with a cache of prompt blocks of a fixed size."""

    def __init__(
        self, prompts: list[tuple[int, ...]], plan: BatchPlan, kv_limit: int, max_tokens: int, cached: int, block: int
    ) -> None:
        super().__init__(plan, kv_limit, max_tokens=max_tokens)
        self.prompts, self.block, self.room = prompts, block, cached // block
        self.kept: OrderedDict[tuple[int, ...], None] = OrderedDict()  # prompts up to the end of a block, oldest first
        self.found: dict[int, int] = {}  # request to the tokens it took from the cache

    def _hits(self, request: int) -> int:
        """Leading blocks of a prompt that the cache has."""
        blocks = self._blocks(request)
        return next((i for i, prefix in enumerate(blocks) if prefix not in self.kept), len(blocks))

    def _blocks(self, request: int) -> list[tuple[int, ...]]:
        prompt = self.prompts[request]
        return [prompt[:end] for end in range(self.block, len(prompt), self.block)]  # the last token is always run

    def _held(self, request: Any) -> int:
        found = self.found.get(request.index)
        return super()._held(request) - (self._hits(request.index) * self.block if found is None else found)

    def _admit(self) -> bool:
        hits = self._hits(self._waiting[0].index) if self._waiting else 0
        if not super()._admit():
            return False
        request = next(reversed(self._running.values()))
        request.stored = self.found[request.index] = hits * self.block
        self._reached[request.group, request.index] = request.stored
        for prefix in self._blocks(request.index):  # what this pass computes, the next request may use in the same one
            self.kept[prefix] = None
            self.kept.move_to_end(prefix)
        while len(self.kept) > self.room:
            self.kept.popitem(last=False)
        return True

    def _give_way(self) -> None:
        """Nobody has to: lengths are known, and tokens found in the cache are not held twice."""

    def _log(self, pieces: list[Piece]) -> None:
        super()._log(pieces)
        held = len(self.kept) * self.block
        self.stats.prefix_tokens[-1] = held
        self.stats.kv_tokens[-1] += held - sum(self.found[r] for r in self._running)


def simulate_lru(
    requests: Sequence[Sequence[int]],
    new_tokens: int | Sequence[int],
    kv_limit: int,
    cached_tokens: int,
    cost: PassCost | None = None,
    *,
    block: int = 16,
    max_tokens_per_pass: int = 512,
) -> BatchStats:
    """Run requests in the order given, with a least-recently-used cache of prompt blocks.

    Args:
        requests: Token ids of every prompt.
        new_tokens: What each generates.
        kv_limit: Tokens whose keys and values may be held, the cache included.
        cached_tokens: Tokens of the cache.
        cost: Of a pass. Default ``PassCost()``.
        block: Tokens per block; only whole blocks are shared.
        max_tokens_per_pass: Above this no prompt tokens are added to a pass.

    Raises:
        ValueError: The cache leaves no memory for the requests, or a block has no token.

    Example:
        >>> prompts = [[1, 2, 3, 4, 5], [7, 7, 7, 7, 7], [1, 2, 3, 4, 6]]
        >>> [simulate_lru(prompts, 1, 100, cached, block=4, max_tokens_per_pass=5).prefill_tokens for cached in (4, 8)]
        [15, 11]
    """
    if block < 1:
        raise ValueError(f"block is the number of tokens per block and at least 1, got {block}")
    if not 0 <= cached_tokens < kv_limit:
        raise ValueError(
            f"cached_tokens={cached_tokens:,} must be at least 0 and leave room within kv_limit={kv_limit:,}"
        )
    plan = plan_batch(requests, new_tokens, grouping="none", order="input")
    prompts = [as_tokens(request, number) for number, request in enumerate(requests)]
    room = kv_limit - cached_tokens
    batcher = _LruBatcher(prompts, plan, room, max_tokens_per_pass, cached_tokens, block)
    stats = _run(batcher, plan.new_tokens, cost or PassCost())
    stats.kv_limit = kv_limit
    return stats
