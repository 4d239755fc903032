"""Choose how many nodes to verify, from what passes cost and what they win.

For nested trees s = 0 < 1 < ... the text that was really emitted tells, after the fact, how many tokens each of them
would have won from each of its roots. With a_s the mean of that (in a batch, of the slowest row) and c_s the seconds of a pass,

    gain(s) = (a_s / c_s) / (1 / c_0)

and the tree with the largest gain is run, plain decoding (s = 0) unless another one wins by a margin.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

from tokenry.decoding.engine.draft_tree import DraftTree
from tokenry.decoding.engine.latency import PassLatency

__all__ = ["TreeSizes"]

MARGIN = 1.04  # a tree must promise this gain over plain decoding
BATCH_MARGIN = 1.25  # in a batch: ragged rows cost masks of their own from then on, and estimates per row are rougher
MEMORY = 0.94  # weight of the past per simulated pass: about the last sixteen count
ENOUGH = 3.0  # simulated passes before an estimate is believed


class TreeSizes:
    """Nested trees, what they cost and what they win.

    Args:
        paths: Index paths, the most useful first, every prefix before its extensions: the first n make a tree.
        latency: Seconds per pass.
        nodes: Nodes of each candidate besides the root, ascending, starting with 0.

    Example:
        >>> sizes = TreeSizes([[0], [0, 0]], PassLatency((1, 3), (1.0, 1.2)), (0, 1, 2))
        >>> sizes.begin(1)
        >>> sizes.learn(0, [0] * 20)  # the best candidate was always right
        >>> sizes.trees[sizes.choose()].nodes
        2
    """

    def __init__(self, paths: Sequence[Sequence[int]], latency: PassLatency, nodes: Sequence[int]) -> None:
        self.latency = latency
        self.nodes = [n for n in nodes if n <= len(paths)]
        self._load: deque[float] = deque(maxlen=9)
        self._correction: list[deque[float]] = [deque(maxlen=15) for _ in self.nodes]
        self.trees = [DraftTree.from_paths(sorted(paths[:n], key=lambda path: (len(path), path))) for n in self.nodes]
        self._next: dict[tuple[int, int], int] = {}  # (node, rank) -> node of the largest tree
        self._needs = [0]  # smallest candidate that holds the node
        index: dict[tuple[int, ...], int] = {(): 0}
        for i, path in enumerate(map(tuple, paths[: self.nodes[-1]]), 1):
            index[path] = i
            self._next[index[path[:-1]], path[-1]] = i
            self._needs.append(next(s for s, n in enumerate(self.nodes) if i <= n))
        self.wins: list[list[float]] = []  # per row and candidate: tokens per pass lately
        self.weight: list[list[float]] = []
        self.begin(1)

    def begin(self, rows: int) -> None:
        """A new batch of rows. What was learnt before is kept for a single row; in a batch rows differ too much."""
        if rows > 1 or not self.wins:
            self.wins = [[1.0] * len(self.nodes) for _ in range(rows)]
            self.weight = [[0.0] * len(self.nodes) for _ in range(rows)]
        self._ranks: list[list[int]] = [[] for _ in range(rows)]
        self._at = [[0] * len(self.nodes) for _ in range(rows)]

    def learn(self, row: int, ranks: Sequence[int]) -> None:
        """Row ``row`` went on by tokens that stood at these places of the lists before them (-1: not in the list)."""
        known, at = self._ranks[row], self._at[row]
        known.extend(ranks)
        for size in range(1, len(self.nodes)):
            depth = self.trees[size].max_depth
            while at[size] + depth <= len(known):
                won = 1 + self._matches(known, at[size], size)
                at[size] += won
                self.weight[row][size] = self.weight[row][size] * MEMORY + 1
                self.wins[row][size] += (won - self.wins[row][size]) / self.weight[row][size]

    def _matches(self, ranks: list[int], start: int, size: int) -> int:
        """Nodes of candidate ``size`` that the ranks from ``start`` on would have matched."""
        node = matched = 0
        for rank in ranks[start:]:
            node = self._next.get((node, rank), -1)
            if node < 0 or self._needs[node] > size:
                break
            matched += 1
        return matched

    def took(self, size: int, seconds: float) -> None:
        """A pass with candidate ``size`` took so long, everything around it included."""
        factor = seconds / self.latency.at(self.nodes[size] + 1)
        self._load.append(factor)
        self._correction[size].append(factor / median(self._load))

    def cost(self, size: int) -> float:
        """Seconds of a pass: the latency curve's, corrected by how passes of this size compared with the ones around them.

        The machine's load of the moment hits all sizes alike and stays out of the comparison.
        """
        seen = self._correction[size]
        return self.latency.at(self.nodes[size] + 1) * (median(seen) if len(seen) >= 3 else 1.0)

    def gain(self, size: int, rows: Sequence[int] = (0,)) -> float:
        """Expected speed of candidate ``size`` in multiples of plain decoding: the slowest row ends the batch."""
        if size == 0 or any(self.weight[row][size] < ENOUGH for row in rows):
            return 1.0
        return min(self.wins[row][size] for row in rows) * self.cost(0) / self.cost(size)

    def choose(self, finished: Sequence[bool] = (False,)) -> int:
        """The candidate to run, for the rows that are not finished."""
        rows = [row for row, done in enumerate(finished) if not done]
        gains = [self.gain(size, rows) for size in range(len(self.nodes))]
        best = max(range(len(gains)), key=gains.__getitem__)
        return best if gains[best] > (MARGIN if len(finished) == 1 else BATCH_MARGIN) else 0
