"""Choose how much a pass of parallel prompt decoding may verify, from its cost and its success, down to nothing.

The accuracy table promises T_a tokens per pass for the trees a of a budget; this text turns out to match q times as
often as promised. With r_a the time of a pass in plain passes, from the latency curve until passes have been timed,

    gain(a) = (1 + q (T_a - 1)) / r_a

and the trees with the largest gain are run, plain decoding unless they win by a margin. Plain passes show nothing about
q, so after a pause, longer each time, the trees are tried again; passes with trees show nothing about the load of the
machine, so a few plain ones are timed in between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from statistics import median

from tokenry.decoding.engine.latency import PassLatency
from tokenry.decoding.engine.tree_size import BATCH_MARGIN, MARGIN, MEMORY
from tokenry.decoding.tree_search import BUDGETS, SparseTrees, expected_speed, sparse_trees

__all__ = ["PromptBudget"]

PRIOR = 3.0  # matches that the table's promise is worth
PAUSES = (48, 384)  # plain passes before trying again: the first time, at most
ENOUGH = 3  # timed passes before a median is believed
TREES_IN_A_ROW = 48  # passes with trees until plain ones are timed again
SUCCESS = (0.4, 0.6, 0.8, 1.0, 1.25, 1.6, 2.0)  # values of q for which a plan must be the best to be kept


@lru_cache(maxsize=8)
def plans(acc: tuple[tuple[float, ...], ...], latency: PassLatency) -> list[tuple[SparseTrees, float]]:
    """Trees that are the fastest for some success, with the tokens per pass that the table promises."""
    made: list[tuple[SparseTrees, float, float]] = []
    for m in range(1, len(acc) + 1):  # the first m prompt tokens alone are a smaller pass
        for budget in BUDGETS:
            if budget < m + 2:
                continue
            if latency.ratio(1 + m + budget) > m + 1:  # a pass yields m + 1 tokens at most
                break
            trees = sparse_trees(acc[:m], budget)
            made.append((trees, *expected_speed(trees, latency)))
    kept: list[tuple[SparseTrees, float]] = []
    for q in SUCCESS if made else ():
        trees, tokens, _ = max(made, key=lambda plan: (1 + q * (plan[1] - 1)) / plan[2])
        if all(trees is not other for other, _ in kept):
            kept.append((trees, tokens))
    return kept


class PromptBudget:
    """Plans, what they cost and how far their promise is kept. Plan 0 is plain decoding.

    Args:
        acc: Accuracy table.
        latency: Seconds per pass.

    Attributes:
        trees: Trees of each plan; None for plain decoding.

    Example:
        >>> budget = PromptBudget([[0.5, 0.2]], PassLatency((1, 99), (1.0, 1.001)))
        >>> for _ in range(3):
        ...     budget.took(0, 1.0)
        >>> budget.choose() > 0
        True
    """

    def __init__(self, acc: Sequence[Sequence[float]], latency: PassLatency) -> None:
        kept = plans(tuple(map(tuple, acc)), latency)
        self.trees: list[SparseTrees | None] = [None, *(trees for trees, _ in kept)]
        self._promised = [1.0, *(tokens for _, tokens in kept)]
        self._expects: list[dict[int, float]] = [{}]  # per plan: state -> expected matches
        self._curve = [1.0]  # per plan: time of its largest state's pass
        for trees, _ in kept:
            m = len(trees)
            self._expects.append({d: sum(c * len(path) for path, c, _ in nodes) for d, nodes in trees.items()})
            self._curve.append(latency.ratio(1 + m + sum(1 + node.prompts for node in trees[m])))
        self._seconds: list[deque[float]] = [deque(maxlen=9 if trees else 5) for trees in self.trees]
        self._matched: list[float] = []
        self._expected: list[float] = []
        self.begin(1)

    def begin(self, rows: int) -> None:
        """A new batch of rows. What was learnt is kept for a single row; in a batch rows differ too much."""
        if rows > 1 or len(self._matched) != 1:
            self._matched, self._expected = [0.0] * rows, [0.0] * rows
            self._rest, self._pause, self._in_a_row = 0, PAUSES[0], 0

    def took(self, plan: int, seconds: float) -> None:
        """A pass with ``plan`` took so long, everything around it included."""
        self._seconds[plan].append(seconds)

    def cost(self, plan: int) -> float:
        """Time of a pass in plain passes; what has not been timed is as far off the curve as what has."""
        plain = median(self._seconds[0])
        timed = [median(times) / plain if len(times) >= ENOUGH else 0.0 for times in self._seconds]
        if timed[plan]:
            return timed[plan]
        off = [ratio / curve for ratio, curve in zip(timed[1:], self._curve[1:], strict=True) if ratio]
        return self._curve[plan] * (median(off) if off else 1.0)

    def learn(self, plan: int, row: int, state: int, matched: int) -> None:
        """A pass with ``plan`` matched so many guesses in ``row``, which was in ``state``."""
        if state:
            state = min(state, max(self._expects[plan]))  # the guesses of another plan's prompt tokens are at hand
            self._matched[row] = self._matched[row] * MEMORY + matched
            self._expected[row] = self._expected[row] * MEMORY + self._expects[plan][state]

    def success(self, rows: Sequence[int]) -> float:
        """How often guesses match, in multiples of the promise: the slowest row ends the batch."""
        return min((self._matched[row] + PRIOR) / (self._expected[row] + PRIOR) for row in rows)

    def choose(self, finished: Sequence[bool] = (False,)) -> int:
        """The plan to run, for the rows that are not finished."""
        if len(self.trees) == 1 or len(self._seconds[0]) < ENOUGH:
            return 0
        if self._rest:
            self._rest -= 1
            return 0
        q = self.success([row for row, done in enumerate(finished) if not done])
        gains = [(1 + q * (tokens - 1)) / self.cost(plan) for plan, tokens in enumerate(self._promised)]
        best = max(range(len(gains)), key=gains.__getitem__)
        pays = gains[best] > (MARGIN if len(finished) == 1 else BATCH_MARGIN)
        if pays and self._in_a_row < TREES_IN_A_ROW:
            self._in_a_row += 1
            return best
        if self._in_a_row:  # the plain passes were timed long ago
            self._rest, self._in_a_row = ENOUGH - 1, 0
        elif any(self._expected) or any(self._seconds[1:]):
            # Harder or slower than promised: pause, forget the text and the oldest times, try again.
            self._rest, self._pause = self._pause, min(2 * self._pause, PAUSES[1])
            self._matched, self._expected = [0.0] * len(finished), [0.0] * len(finished)
            for times in self._seconds[1:]:
                for _ in range(min(ENOUGH, len(times))):
                    times.popleft()
        return 0
