"""Counting, so that a claim about speed can be believed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["DecodingStats"]


@dataclass
class DecodingStats:
    """What one call of ``generate`` did, or several added up.

    Attributes:
        forward_passes: Passes of the target model, prefill apart. A first pass that took the prompt along counts here.
        prefill_passes: Passes over the prompt alone.
        draft_passes: Passes of a draft model.
        tokens: Tokens emitted after the prompts, all rows together.
        accepted: Per pass and row: tokens that the pass decided, before clipping at the end; plain decoding has 1, a
            finished row 0.
        nodes: Per pass: nodes verified, the root included.
        seconds: Wall time.

    Example:
        >>> stats = DecodingStats(forward_passes=2, tokens=5, accepted=[(2,), (3,)], nodes=[9, 9])
        >>> stats.mean_accepted_length
        2.5
    """

    forward_passes: int = 0
    prefill_passes: int = 0
    draft_passes: int = 0
    tokens: int = 0
    accepted: list[tuple[int, ...]] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def row_passes(self) -> int:
        """Passes counted per row that was still generating: equals ``forward_passes`` for a batch of one."""
        return sum(sum(n > 0 for n in pass_) for pass_ in self.accepted)

    @property
    def mean_accepted_length(self) -> float:
        """Tokens per pass and row; plain decoding has 1.00."""
        return self.tokens / self.row_passes if self.row_passes else 0.0

    @property
    def mean_nodes(self) -> float:
        """Nodes verified per pass."""
        return sum(self.nodes) / len(self.nodes) if self.nodes else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of wall time."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @classmethod
    def total(cls, many: Iterable[DecodingStats]) -> DecodingStats:
        """Several runs added up.

        Example:
            >>> DecodingStats.total([DecodingStats(tokens=3), DecodingStats(tokens=4)]).tokens
            7
        """
        out = cls()
        for stats in many:
            out.forward_passes += stats.forward_passes
            out.prefill_passes += stats.prefill_passes
            out.draft_passes += stats.draft_passes
            out.tokens += stats.tokens
            out.accepted += stats.accepted
            out.nodes += stats.nodes
            out.seconds += stats.seconds
        return out

    def summary(self) -> dict[str, float]:
        """The figures in short, plain JSON."""
        return {
            "forward_passes": self.forward_passes,
            "draft_passes": self.draft_passes,
            "tokens": self.tokens,
            "mean_accepted_length": round(self.mean_accepted_length, 4),
            "mean_nodes": round(self.mean_nodes, 2),
            "seconds": round(self.seconds, 4),
        }
