"""Fill every pass of the model up to a limit on key-value memory, not to a number of requests.

BatchLLM (Zheng et al., 2024, arXiv:2412.03594), the part that decides what runs next. A pass holds

    one token of every request that decodes  +  chunks of prompts, first of those that run, then of the next in the plan

and is bounded by memory: a request is admitted if, with everything that runs, its worst case fits,

    Σ_open groups prefix  +  Σ_running (remainder + new tokens - 1)  <=  memory / bytes per token

(the last token is never run). A group's prefix is held from its first member's start to its last member's end. With
estimates of the new tokens in place of the worst case more requests run together; when memory runs out all the same, the
last admitted one gives its place up and is computed again later.

Nothing here knows a model: the engine and the simulator both ask the same object.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenry.decoding.batching.prefix_groups import BatchPlan

__all__ = ["BatchStats", "Piece", "TokenBatcher"]


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one sequence in a pass.

    Attributes:
        group: Number of the group in the plan.
        request: Index of the request; None for the group's prefix.
        start: How many tokens of this prefix, or of this request behind the prefix, are stored already.
        count: How many are run now.
        emits: Whether the last of them is followed by a new token.
    """

    group: int
    request: int | None
    start: int
    count: int
    emits: bool = False


@dataclass
class BatchStats:
    """What happened, pass by pass.

    Attributes:
        requests: Requests that finished.
        prompt_tokens: Tokens of their prompts.
        prefill_tokens: Prompt tokens that were computed, a group's prefix once.
        recomputed_tokens: Tokens computed again after a request had to give its memory up.
        new_tokens: Tokens generated.
        preemptions: How often a request gave its memory up.
        kv_limit: Tokens whose keys and values may be held.
        tokens: Tokens run in each pass.
        kv_tokens: Tokens whose keys and values were held after each pass, prefixes included.
        prefix_tokens: Those of prefixes among them.
        seconds: Wall time; of a simulation, the cost model's.
    """

    requests: int = 0
    prompt_tokens: int = 0
    prefill_tokens: int = 0
    recomputed_tokens: int = 0
    new_tokens: int = 0
    preemptions: int = 0
    kv_limit: int = 0
    tokens: list[int] = field(default_factory=list)
    kv_tokens: list[int] = field(default_factory=list)
    prefix_tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passes(self) -> int:
        """Passes of the model."""
        return len(self.tokens)

    @property
    def peak_kv_tokens(self) -> int:
        """Most tokens held at once."""
        return max(self.kv_tokens, default=0)

    @property
    def prefix_lifetime(self) -> int:
        """Σ over passes of the prefix tokens held: what it costs to keep prefixes."""
        return sum(self.prefix_tokens)

    @property
    def mean_tokens(self) -> float:
        """Tokens per pass."""
        return sum(self.tokens) / len(self.tokens) if self.tokens else 0.0

    def summary(self) -> dict[str, float]:
        """The figures in short, plain JSON."""
        return {
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "prefill_tokens": self.prefill_tokens,
            "recomputed_tokens": self.recomputed_tokens,
            "new_tokens": self.new_tokens,
            "passes": self.passes,
            "mean_tokens": round(self.mean_tokens, 2),
            "kv_limit": self.kv_limit,
            "peak_kv_tokens": self.peak_kv_tokens,
            "prefix_lifetime": self.prefix_lifetime,
            "preemptions": self.preemptions,
            "seconds": round(self.seconds, 4),
        }


@dataclass
class _Request:
    index: int
    group: int
    known: int  # tokens behind the prefix: the rest of the prompt, then what was generated
    reserve: int  # tokens that memory is kept for when it starts
    stored: int = 0  # tokens whose keys and values are held
    generated: int = 0


class TokenBatcher:
    """Says what runs in the next pass.

    Args:
        plan: Groups and their order; its ``new_tokens`` are the estimates.
        kv_limit: Tokens whose keys and values may be held at once.
        max_new_tokens: The most that each request may generate, where that is more than the estimate. None: the same.
        max_tokens: Tokens of a pass above which no prompt tokens are added. Default 512.

    Attributes:
        stats: ``BatchStats`` so far.
        freed: ``(group, request)`` whose memory was given back; the request is None for a group's prefix. Whoever holds
            the memory takes the entries out.

    Raises:
        ValueError: A request does not fit into ``kv_limit`` even alone, or ``max_tokens`` is not positive.

    Example:
        >>> from tokenry.decoding import plan_batch
        >>> batcher = TokenBatcher(plan_batch([[1, 2, 3], [1, 2, 4]], 2), kv_limit=10)
        >>> [(piece.request, piece.start, piece.count) for piece in batcher.next_pass()]
        [(None, 0, 2), (0, 0, 1), (1, 0, 1)]
        >>> batcher.emitted(0), batcher.emitted(1)
        (False, False)
        >>> [(piece.request, piece.start, piece.count) for piece in batcher.next_pass()]
        [(0, 1, 1), (1, 1, 1)]
    """

    def __init__(
        self, plan: BatchPlan, kv_limit: int, max_new_tokens: Sequence[int] | None = None, max_tokens: int = 512
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens is the number of tokens per pass and at least 1, got {max_tokens}")
        self.plan, self.kv_limit, self.max_tokens = plan, kv_limit, max_tokens
        self.most = tuple(max_new_tokens or plan.new_tokens)
        for request, (prompt, new) in enumerate(zip(plan.prompt_tokens, self.most, strict=True)):
            if prompt + new - 1 > kv_limit:
                raise ValueError(
                    f"request {request} does not fit even alone: {prompt:,} prompt tokens and {new:,} new ones hold keys "
                    f"and values of {self._size(prompt + new - 1)}, the limit is {self._size(kv_limit)}; raise the memory "
                    "limit or lower max_new_tokens"
                )
        self.stats = BatchStats(prompt_tokens=plan.total, kv_limit=kv_limit)
        self.freed: list[tuple[int, int | None]] = []
        self._waiting = deque(
            _Request(i, g, rest := plan.remainder(i), rest + min(plan.new_tokens[i], self.most[i]) - 1)
            for g, group in enumerate(plan.groups)
            for i in group.members
        )
        self._running: dict[int, _Request] = {}  # in the order of admission
        self._open: dict[int, int] = {}  # group to the stored tokens of its prefix
        self._unfinished = [len(group.members) for group in plan.groups]
        self._reached: dict[tuple[int, int | None], int] = {}  # how far a sequence was ever computed

    def _size(self, tokens: int) -> str:
        return f"{tokens:,} tokens" + (f" ({tokens * self.plan.kv_bytes:,} bytes)" if self.plan.kv_bytes else "")

    @property
    def done(self) -> bool:
        """Whether every request has finished."""
        return not self._running and not self._waiting

    def next_pass(self) -> list[Piece]:
        """The pieces of the next pass, by group, a prefix before its members. They count as stored from now on."""
        self._give_way()
        pieces, room = self._decodes(), self.max_tokens
        room -= len(pieces)
        for request in self._running.values():
            if request.known - request.stored > 1 or not request.generated:
                room -= self._prefill(request, room, pieces)
        while room > 0 and self._admit():
            room -= self._prefill(next(reversed(self._running.values())), room, pieces)
        pieces.sort(key=lambda piece: (piece.group, piece.request is not None))
        self._log(pieces)
        return pieces

    def emitted(self, request: int, *, stop: bool = False) -> bool:
        """Note a new token of a request; True if that ends it, by ``stop`` or by its length, and frees its memory."""
        found = self._running[request]
        found.known += 1
        found.generated += 1
        self.stats.new_tokens += 1
        if not stop and found.generated < self.most[request]:
            return False
        del self._running[request]
        self.freed.append((found.group, request))
        self.stats.requests += 1
        self._unfinished[found.group] -= 1
        if not self._unfinished[found.group]:
            self._close(found.group)
        return True

    def _decodes(self) -> list[Piece]:
        """The next token of every request whose other tokens are stored."""
        pieces = []
        for r in self._running.values():
            if r.known - r.stored == 1 and r.generated:
                pieces.append(Piece(r.group, r.index, r.stored, 1, emits=True))
                r.stored += 1
        return pieces

    def _prefill(self, request: _Request, room: int, pieces: list[Piece]) -> int:
        """Add what of its group's prefix and of its own prompt is missing, at most ``room`` tokens."""
        before = room
        stored, prefix = self._open[request.group], self.plan.prefix_tokens(request.group)
        if room > 0 and stored < prefix:
            count = min(room, prefix - stored)
            pieces.append(Piece(request.group, None, stored, count))
            self._open[request.group] += count
            room -= count
        if room > 0 and request.stored < request.known:
            count = min(room, request.known - request.stored)
            whole = request.stored + count == request.known
            pieces.append(Piece(request.group, request.index, request.stored, count, emits=whole))
            request.stored += count
            room -= count
        return before - room

    def _admit(self) -> bool:
        """Start the next request if its worst case fits beside those of all that run."""
        if not self._waiting:
            return False
        request = self._waiting[0]
        if not self._running:  # nothing but prefixes can be in its way
            for group in [g for g in self._open if g != request.group]:
                if not self._fits(request):
                    self._close(group)
        if not self._fits(request):
            return False
        self._waiting.popleft()
        self._running[request.index] = request
        self._open.setdefault(request.group, 0)
        return True

    def _fits(self, request: _Request) -> bool:
        held = sum(map(self._held, self._running.values())) + sum(map(self.plan.prefix_tokens, self._open))
        prefix = 0 if request.group in self._open else self.plan.prefix_tokens(request.group)
        return held + prefix + self._held(request) <= self.kv_limit

    def _held(self, request: _Request) -> int:
        """Memory that is kept for a request behind its prefix."""
        return max(request.known, request.reserve)

    def _give_way(self) -> None:
        """Where estimates were too low: send the last admitted requests back until all known tokens fit."""
        while (
            sum(r.known for r in self._running.values()) + sum(map(self.plan.prefix_tokens, self._open)) > self.kv_limit
        ):
            if len(self._running) > 1:
                _, last = self._running.popitem()
                self.freed.append((last.group, last.index))
                last.stored = 0
                self._waiting.appendleft(last)
                self.stats.preemptions += 1
            else:
                busy = {r.group for r in self._running.values()}
                self._close(next(g for g in self._open if g not in busy))

    def _close(self, group: int) -> None:
        if group in self._open:
            del self._open[group]
            self.freed.append((group, None))

    def _log(self, pieces: list[Piece]) -> None:
        stats = self.stats
        for p in pieces:
            key, end = (p.group, p.request), p.start + p.count
            prompt = self.plan.prefix_tokens(p.group) if p.request is None else self.plan.remainder(p.request)
            fresh = min(end, max(p.start, self._reached.get(key, 0)))
            stats.recomputed_tokens += fresh - p.start
            stats.prefill_tokens += max(0, min(end, prompt) - fresh)
            self._reached[key] = max(end, self._reached.get(key, 0))
        prefixes = sum(self._open.values())
        stats.tokens.append(sum(p.count for p in pieces))
        stats.prefix_tokens.append(prefixes)
        stats.kv_tokens.append(prefixes + sum(r.stored for r in self._running.values()))
