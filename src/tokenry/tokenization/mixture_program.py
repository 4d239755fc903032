"""The linear program of mixture inference: inequalities are added as they are found violated.

A pair's priority stands unchanged from one change of its counts to the next. So a round needs no walk over the steps: it
asks for every such stretch whether the smallest cutoff within it is lower, and then for the first step where it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokenry.tokenization.pair_counts import PairCounts

__all__ = ["MixtureSolution", "solve_mixture"]

SCALE = 1000.0  # frequencies enter the program in per mille, which makes the solver's tolerance 1e-10 of a frequency
TOLERANCE = 1e-9  # a pair may exceed the true merge by this frequency unnoticed
PER_STEP = 3  # inequalities of one step that one round adds at most (paper: 10)
# Inequalities that one round adds at most, times the merges (paper: 100 in all; ten times slower at T = 1,000).
PER_ROUND = 3


@dataclass(frozen=True, eq=False)
class MixtureSolution:
    """Optimum of the linear program.

    Attributes:
        shares: ``(n,)`` a, shares of the categories in units of the denominator.
        step_slack: ``(T,)`` v.
        pair_slack: Index of a pair to its u, where that is positive.
        objective: Sum of both slacks.
        n_constraints: Inequalities that were needed.
        n_rounds: How often the program was solved.
    """

    shares: np.ndarray
    step_slack: np.ndarray
    pair_slack: dict[int, float]
    objective: float
    n_constraints: int
    n_rounds: int


class _Program:
    """The linear program, growing by inequalities; HiGHS keeps the basis between solves."""

    def __init__(self, n: int, steps: int) -> None:
        import highspy

        class Quiet(highspy.Highs):
            """Says nothing, not even its name when it is made."""

            def enableCallbacks(self) -> None:
                self.setOptionValue("output_flag", False)
                super().enableCallbacks()

        self._optimal = highspy.HighsModelStatus.kOptimal
        self.model = Quiet()
        for option, value in (("threads", 1), ("solver", "simplex")):
            self.model.setOptionValue(option, value)
        empty = np.zeros(0)
        none = np.zeros(n, np.int32)
        self.model.addCols(n, np.zeros(n), np.zeros(n), np.ones(n), 0, none, np.zeros(0, np.int32), empty)
        self.model.addRows(
            1, np.ones(1), np.ones(1), n, np.zeros(1, np.int32), np.arange(n, dtype=np.int32), np.ones(n)
        )
        self.n, self.columns, self.steps = n, n, steps
        self.step_column: dict[int, int] = {}
        self.pair_column: dict[int, int] = {}

    def add(self, steps: np.ndarray, pairs: np.ndarray, lead: np.ndarray) -> None:
        """Add ``lead @ a + v[step] + u[pair] >= 0`` for k inequalities; lead: ``(k, n)``."""
        fresh = 0
        for names, known in ((steps, self.step_column), (pairs, self.pair_column)):
            for name in names.tolist():
                if name not in known:
                    known[name] = self.columns + fresh
                    fresh += 1
        start, nothing = np.zeros(fresh, np.int32), np.zeros(0, np.int32)
        self.model.addCols(
            fresh, np.ones(fresh), np.zeros(fresh), np.full(fresh, np.inf), 0, start, nothing, np.zeros(0)
        )
        self.columns += fresh
        k = len(steps)
        index = np.empty((k, self.n + 2), np.int32)
        index[:, : self.n] = np.arange(self.n)
        index[:, self.n] = [self.step_column[t] for t in steps.tolist()]
        index[:, self.n + 1] = [self.pair_column[p] for p in pairs.tolist()]
        values = np.concatenate([lead * SCALE, np.ones((k, 2))], axis=1)
        starts = np.arange(k, dtype=np.int32) * (self.n + 2)
        self.model.addRows(k, np.zeros(k), np.full(k, np.inf), index.size, starts, index.ravel(), values.ravel())

    def solve(self) -> tuple[np.ndarray, np.ndarray, dict[int, float]]:
        """Shares, step slack, pair slack.

        Raises:
            RuntimeError: The solver stopped without an optimum.
        """
        self.model.run()
        status = self.model.getModelStatus()
        if status != self._optimal:
            raise RuntimeError(
                f"the linear program was not solved: HiGHS says {self.model.modelStatusToString(status)!r} with "
                f"{self.columns} columns; try fewer merges (max_merges) or larger samples"
            )
        values = np.maximum(np.asarray(self.model.getSolution().col_value), 0.0)
        step_slack = np.zeros(self.steps)
        for step, column in self.step_column.items():
            step_slack[step] = values[column] / SCALE
        return values[: self.n], step_slack, {p: values[c] / SCALE for p, c in self.pair_column.items()}


class _RangeMinimum:
    """Smallest value of a window, and the first place below a bound, for many windows at once (sparse table)."""

    def __init__(self, values: np.ndarray) -> None:
        self.levels = [values]
        while len(self.levels[-1]) > (half := 1 << (len(self.levels) - 1)):
            last = self.levels[-1]
            self.levels.append(np.minimum(last[:-half], last[half:]))

    def first_below(self, start: np.ndarray, end: np.ndarray, bound: np.ndarray) -> np.ndarray:
        """First index in ``[start, end)`` whose value is below ``bound``; ``end`` where there is none."""
        at = start.copy()
        for level in reversed(range(len(self.levels))):
            table, width = self.levels[level], 1 << level
            fits = at + width <= end
            clear = fits & (table[np.where(fits, at, 0)] >= bound)
            at[clear] += width
        return at


def _violated(
    counts: PairCounts, value: np.ndarray, cutoff: np.ndarray, known: np.ndarray, end: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, pairs and rows of new violated inequalities, the earliest steps first, by the limits of one round.

    A row's ``value`` (E,) stands from its step to ``end`` (E,), and violates every step there whose cutoff (T,) is lower.
    """
    minimum = _RangeMinimum(cutoff)
    rows = np.flatnonzero(value > cutoff.min())
    low, steps = 0, len(cutoff)
    limit = max(300, PER_ROUND * steps)
    taken: list[np.ndarray] = []
    count = 0
    while low < steps and count < limit and len(rows):
        first = minimum.first_below(np.maximum(counts.step[rows], low), end[rows], value[rows])
        live = first < end[rows]
        rows, first = rows[live], first[live]
        if not len(rows):
            break
        order = np.argsort(first, kind="stable")
        batch = 4 * limit
        high = int(first[order[batch]]) + 1 if len(order) > batch else steps
        now = first < high
        near, begin = rows[now], first[now]
        span = np.minimum(end[near], high) - begin
        which = np.repeat(np.arange(len(near)), span)
        at = np.arange(span.sum()) - np.repeat(np.cumsum(span) - span, span) + begin[which]
        row = near[which]
        hit = value[row] > cutoff[at]
        at, row = at[hit], row[hit]
        new = ~np.isin(at * len(counts.pairs) + counts.pair[row], known)
        at, row = at[new], row[new]
        order = np.lexsort((-value[row], at))
        at, row = at[order], row[order]
        rank = np.arange(len(at)) - np.searchsorted(at, at)
        at, row = at[rank < PER_STEP], row[rank < PER_STEP]
        taken.append(np.stack([at, row]))
        count += len(at)
        low = high
    found = np.concatenate(taken, axis=1) if taken else np.zeros((2, 0), np.int64)
    found = found[:, :limit]
    return found[0], counts.pair[found[1]], found[1]


def solve_mixture(counts: PairCounts, denominators: np.ndarray, *, skip: int = 0) -> MixtureSolution:
    """Solve the linear program by adding violated inequalities until none is left.

    Args:
        counts: Pair counts of n categories over T merges.
        denominators: ``(n,)`` what a category's counts are divided by.
        skip: Leave out the inequalities of the first ``skip`` steps (their merges are applied all the same).

    Returns:
        The optimum of the whole program, up to a frequency of 1e-9 in every inequality.

    Raises:
        RuntimeError: The solver failed; never a silent uniform answer.

    Example:
        >>> from tokenry.tokenization import count_pairs
        >>> counts = count_pairs([{"ab": 9, "cd": 1}, {"ab": 1, "cd": 9}], [("a", "b"), ("c", "d")])
        >>> solve_mixture(counts, counts.initial).objective
        0.0
    """
    n, steps = len(denominators), counts.steps
    present = counts.merge_pair >= 0
    present[:skip] = False
    at = np.flatnonzero(present)
    merge_row = counts.row(counts.merge_pair[at], at)
    at, merge_row = at[merge_row >= 0], merge_row[merge_row >= 0]
    end = np.full(len(counts.pair), steps)
    same = counts.pair[1:] == counts.pair[:-1]
    end[:-1][same] = counts.step[1:][same]

    program = _Program(n, steps)
    shares, step_slack, pair_slack = np.full(n, 1.0 / n), np.zeros(steps), {}
    known = np.zeros(0, np.int64)
    rounds = 0
    while True:
        raw = counts.running(shares / denominators)
        cutoff = np.full(steps, np.inf)
        cutoff[at] = raw[merge_row] + step_slack[at] + TOLERANCE
        slack = np.zeros(len(counts.pairs))
        slack[list(pair_slack)] = list(pair_slack.values())
        new_steps, new_pairs, rows = _violated(counts, raw - slack[counts.pair], cutoff, known, end)
        if not len(new_steps):
            break
        leading = merge_row[np.searchsorted(at, new_steps)]
        lead = (counts.counts_at(leading) - counts.counts_at(rows)) / denominators
        program.add(new_steps, new_pairs, lead)
        known = np.concatenate([known, new_steps * len(counts.pairs) + new_pairs])
        shares, step_slack, pair_slack = program.solve()
        rounds += 1
    objective = float(step_slack.sum() + sum(pair_slack.values()))
    used = {p: u for p, u in pair_slack.items() if u > 0}
    return MixtureSolution(shares / shares.sum(), step_slack, used, objective, len(known), rounds)
