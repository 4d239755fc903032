"""Choose how much a pass of parallel prompt decoding may verify, from its cost and its success, down to nothing.

The accuracy table promises T_a tokens per pass for the trees a of a budget; this text turns out to match q times as
often as promised. With c_a the seconds of a pass (c_0: a plain one),

    gain(a) = (1 + q (T_a - 1)) c_0 / c_a

and the trees with the largest gain are run, plain decoding unless they win by a margin. Plain passes show nothing about
q, so after a pause, longer each time, the trees are tried again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from tokenry.decoding.latency import PassLatency
from tokenry.decoding.tree_search import BUDGETS, SparseTrees, expected_speed, sparse_trees
from tokenry.decoding.tree_size import BATCH_MARGIN, MARGIN, MEMORY, PassCosts

__all__ = ["PromptBudget"]

PRIOR = 3.0  # matches that the table's promise is worth
PAUSES = (48, 384)  # plain passes before trying again: the first time, at most
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


class PromptBudget(PassCosts):
    """Plans, what they cost and how far their promise is kept. Plan 0 is plain decoding.

    Args:
        acc: Accuracy table.
        latency: Seconds per pass.

    Attributes:
        trees: Trees of each plan; None for plain decoding.

    Example:
        >>> free = PromptBudget([[0.5, 0.2]], PassLatency((1, 99), (1.0, 1.001)))
        >>> free.choose() > 0
        True
        >>> dear = PromptBudget([[0.5, 0.2]], PassLatency((1, 2), (1.0, 1.9)))
        >>> dear.choose()
        0
    """

    def __init__(self, acc: Sequence[Sequence[float]], latency: PassLatency) -> None:
        kept = plans(tuple(map(tuple, acc)), latency)
        self.trees: list[SparseTrees | None] = [None, *(trees for trees, _ in kept)]
        self.promised = [1.0, *(tokens for _, tokens in kept)]
        super().__init__(latency, [0, *(len(t) + sum(1 + node.prompts for node in t[len(t)]) for t, _ in kept)])
        self.expects = [
            {d: sum(c * len(path) for path, c, _ in nodes) for d, nodes in (trees or {0: ()}).items()}
            for trees in self.trees
        ]
        self._matched: list[float] = []
        self._expected: list[float] = []
        self.begin(1)

    def begin(self, rows: int) -> None:
        """A new batch of rows. What was learnt is kept for a single row; in a batch rows differ too much."""
        if rows > 1 or len(self._matched) != 1:
            self._matched, self._expected = [0.0] * rows, [0.0] * rows
            self._rest, self._pause = 0, PAUSES[0]

    def learn(self, plan: int, row: int, state: int, matched: int) -> None:
        """A pass with ``plan`` matched so many guesses in ``row``, which was in ``state``."""
        if state:
            state = min(state, max(self.expects[plan]))  # the guesses of another plan's prompt tokens are at hand
            self._matched[row] = self._matched[row] * MEMORY + matched
            self._expected[row] = self._expected[row] * MEMORY + self.expects[plan][state]

    def success(self, rows: Sequence[int]) -> float:
        """How often guesses match, in multiples of the promise: the slowest row ends the batch."""
        return min((self._matched[row] + PRIOR) / (self._expected[row] + PRIOR) for row in rows)

    def choose(self, finished: Sequence[bool] = (False,)) -> int:
        """The plan to run, for the rows that are not finished."""
        if self._rest:
            self._rest -= 1
            return 0
        q = self.success([row for row, done in enumerate(finished) if not done])
        gains = [(1 + q * (tokens - 1)) * self.cost(0) / self.cost(plan) for plan, tokens in enumerate(self.promised)]
        best = max(range(len(gains)), key=gains.__getitem__)
        if gains[best] > (MARGIN if len(finished) == 1 else BATCH_MARGIN):
            return best
        if any(self._expected):  # the text is harder than promised: pause, then forget and try again
            self._rest, self._pause = self._pause, min(2 * self._pause, PAUSES[1])
            self._matched, self._expected = [0.0] * len(finished), [0.0] * len(finished)
        return 0
