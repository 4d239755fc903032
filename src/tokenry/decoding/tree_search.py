"""Dynamic sparse trees: which guesses to verify, and how many prompt tokens to hang on each, under a budget of nodes.

Chen et al., "Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM Inference", 2024,
arXiv:2405.18628.

    acc[j, k]           probability that the k-th guess of prompt token j+1 is right                    (m, K), measured
    p(path i_1 ... i_l) = prod_j acc[j, i_j]              chance that the guesses of a path are all right
    state d             d prompt tokens hung on the node accepted last: guesses for d tokens ahead are at hand
    tree of state d     the s_d likeliest paths of length <= d;  f(d) = sum of their p = expected matches
    contribution c_i    p_i - sum of p over the chosen children of i: chance that the accepted path ends at node i
    prompt tokens n_i   start with n_i = m; while sum n_i > budget - s_d: take one from the node with the least loss
                        c_i (f(n_i) - f(n_i - 1)), always leaving one
    value               R = sum_d pi_d f(d), pi stationary for P(d -> n) = sum of c_i with n_i = n, the rest to a
                        state 0 that is worth nothing and leads to state m

The sizes (s_1, ..., s_m) with the largest R are kept. How long a pass over so many nodes takes on a machine then says
which budget is best there (``best_budget``).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tokenry.decoding.engine.latency import PassLatency, pass_latency

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["SparseNode", "SparseTrees", "best_budget", "expected_speed", "sparse_trees"]

DIGITS = 5  # products are rounded, so that ties do not hang on the last bit
COMBINATIONS = 10_000  # sizes tried per budget; where all would be more, evenly spaced ones
BUDGETS = (5, 8, 12, 16, 20, 24, 32, 40, 48, 60, 80, 105, 140, 200, 285)


class SparseNode(NamedTuple):
    """A guess of a tree.

    Attributes:
        path: Which guess of prompt token 1, 2, ...: ``(2, 0)`` is the best second guess after the third first one.
        contribution: Chance that the accepted path ends here.
        prompts: Prompt tokens hung on it: the next state if it does.
    """

    path: tuple[int, ...]
    contribution: float
    prompts: int


SparseTrees = dict[int, list[SparseNode]]  # state -> its tree, the likeliest nodes first


def likeliest_paths(acc: Sequence[Sequence[float]], depth: int, size: int) -> list[tuple[tuple[int, ...], float]]:
    """The ``size`` paths of at most ``depth`` guesses with the largest products, and these; parents before children.

    Example:
        >>> likeliest_paths([[0.5, 0.2], [0.3, 0.1]], 2, 3)
        [((0,), 0.5), ((1,), 0.2), ((0, 0), 0.15)]
    """
    found: list[tuple[tuple[int, ...], float]] = []
    open_: list[tuple[float, int, tuple[int, ...], float]]
    open_ = [(-round(p, DIGITS), 1, (k,), p) for k, p in enumerate(acc[0])]
    heapq.heapify(open_)
    while open_ and len(found) < size:
        rounded, length, path, product = heapq.heappop(open_)
        found.append((path, -rounded))
        if length < depth:  # a child is never likelier than its parent, so none is missed
            for k, p in enumerate(acc[length]):
                heapq.heappush(open_, (-round(product * p, DIGITS), length + 1, (*path, k), product * p))
    return found


def contributions(paths: Sequence[tuple[tuple[int, ...], float]]) -> list[float]:
    """Per path: its product less those of its children."""
    rest = dict(paths)
    for path, product in paths:
        if len(path) > 1:
            rest[path[:-1]] -= product
    return [rest[path] for path, _ in paths]


def hang_prompts(ends: Sequence[float], matches: Sequence[float], m: int, tokens: int) -> list[int]:
    """How many prompt tokens each node gets: those whose loss would cost most.

    Args:
        ends: Contribution of each node.
        matches: ``matches[n]`` expected matches in state n, for n = 0 ... m.
        m: Prompt tokens at most per node.
        tokens: Prompt tokens that there is room for, one per node at least.
    """
    hung = [m] * len(ends)
    losses = [(c * (matches[m] - matches[m - 1]), i) for i, c in enumerate(ends)]
    heapq.heapify(losses)
    for _ in range(m * len(ends) - tokens):
        _, i = heapq.heappop(losses)
        hung[i] -= 1
        n = hung[i]
        if n > 1:
            heapq.heappush(losses, (ends[i] * (matches[n] - matches[n - 1]), i))
    return hung


def table_of(acc: Tensor | Sequence[Sequence[float]]) -> list[list[float]]:
    """The accuracy table as checked lists.

    Raises:
        ValueError: It is empty, ragged, or holds what no probabilities of one guess being right can be.
    """
    rows = [[float(p) for p in row] for row in acc]
    if not rows or not rows[0] or len({len(row) for row in rows}) != 1:
        raise ValueError(
            f"the accuracy table needs one row of equal length per prompt token, got rows of {[len(r) for r in rows]}; "
            "ParallelPrompts.measure makes one"
        )
    for j, row in enumerate(rows):
        if not all(0 <= p <= 1 for p in row) or sum(row) > 1 + 1e-4:
            raise ValueError(
                f"row {j} of the accuracy table holds {min(row):g} to {max(row):g} with sum {sum(row):g}; the chances "
                "of the first, second, ... guess being the right one lie in 0 to 1 and add up to 1 at most"
            )
    return rows


def sparse_trees(acc: Tensor | Sequence[Sequence[float]], budget: int) -> SparseTrees:
    """One tree per state, together the most valuable ones under the budget.

    Args:
        acc: ``(m, K)`` accuracy table (``ParallelPrompts.measure``).
        budget: Nodes per pass, guesses and their prompt tokens together; the root and its own m prompt tokens come on
            top. The paper's choices: 60 for a 13B model, 105 for 7B, 285 for 1.4B, all on an A100.

    Raises:
        ValueError: The table holds no probabilities or the budget is below m + 2.

    Example:
        >>> trees = sparse_trees([[0.5, 0.2, 0.1], [0.3, 0.1, 0.1]], budget=7)
        >>> [(node.path, node.prompts) for node in trees[2]]
        [((0,), 2), ((1,), 1), ((0, 0), 1)]
    """
    table = table_of(acc)
    m = len(table)
    if budget < m + 2:
        raise ValueError(
            f"budget={budget} nodes per pass are too few for {m} prompt tokens; give at least {m + 2}, or use "
            "fewer prompt tokens"
        )
    smallest, largest = max(1, budget // (m + 1)), budget // 2
    tried = list(range(smallest, largest + 1))
    at_most = max(2, int(COMBINATIONS ** (1 / max(1, m - 1)) + 1e-9))
    if m > 2 and len(tried) > at_most:
        tried = sorted({smallest + round(i * (largest - smallest) / (at_most - 1)) for i in range(at_most)})
    # State 1 has as many guesses as its budget holds with one prompt token each: a path of length 1 costs no other.
    likeliest = [{min(len(table[0]), largest): likeliest_paths(table, 1, largest)}]
    for d in range(2, m + 1):
        paths = likeliest_paths(table, d, largest)
        likeliest.append({size: paths[:size] for size in tried})
    ends = [{size: contributions(paths) for size, paths in by_size.items()} for by_size in likeliest]
    matches = [{size: sum(p for _, p in paths) for size, paths in by_size.items()} for by_size in likeliest]

    chains, rewards, choices = [], [], []
    for sizes in itertools.product(*likeliest):
        f = [0.0, *(matches[d][size] for d, size in enumerate(sizes))]
        chain = [[0.0] * m + [1.0]]  # nothing matched: the root's own m prompt tokens are left
        hung = []
        for d, size in enumerate(sizes):
            c = ends[d][size]
            n = hang_prompts(c, f, m, budget - len(c))
            row = [max(1 - sum(c), 1e-9), *[0.0] * m]
            for p, prompts in zip(c, n, strict=True):
                row[prompts] += p
            chain.append(row)
            hung.append(n)
        chains.append(chain)
        rewards.append(f)
        choices.append((sizes, hung))
    value = (stationary(torch.tensor(chains, dtype=torch.float64)) * torch.tensor(rewards, dtype=torch.float64)).sum(-1)
    sizes, hung = choices[int(value.mul(1e9).round().argmax())]  # the first of equals
    return {
        d + 1: [
            SparseNode(path, c, n) for (path, _), c, n in zip(likeliest[d][size], ends[d][size], hung[d], strict=True)
        ]
        for d, size in enumerate(sizes)
    }


def stationary(chain: Tensor) -> Tensor:
    """Stationary distributions ``(..., S)`` of Markov chains ``(..., S, S)`` whose rows are transition weights."""
    steps = chain / chain.sum(-1, keepdim=True)
    size = chain.shape[-1]
    equations = steps.transpose(-1, -2) - torch.eye(size, dtype=chain.dtype)
    equations[..., -1, :] = 1.0  # the distribution adds up to one
    right = torch.zeros(size, 1, dtype=chain.dtype)
    right[-1] = 1.0
    return torch.linalg.solve(equations, right).squeeze(-1)


def expected_speed(trees: Mapping[int, Sequence[SparseNode]], latency: PassLatency) -> tuple[float, float]:
    """Expected tokens per pass and time per pass, in plain passes, of decoding with ``trees``.

    The token that every pass yields by itself counts, and a pass without a match is one pass (the published value
    charges two and leaves the sure token out; it ranks trees, but cannot be compared with plain decoding).

    Example:
        >>> trees = {1: [SparseNode((0,), 0.5, 1)]}
        >>> expected_speed(trees, PassLatency((1, 5), (1.0, 2.0)))
        (1.5, 1.75)
    """
    m = max(trees)
    chain = torch.zeros(m, m, dtype=torch.float64)  # states 1 ... m
    matches, cost = torch.zeros(2, m, dtype=torch.float64)
    for d, nodes in trees.items():
        for path, contribution, prompts in nodes:
            chain[d - 1, prompts - 1] += contribution
            matches[d - 1] += contribution * len(path)
        chain[d - 1, m - 1] += max(1 - sum(node.contribution for node in nodes), 1e-9)
        cost[d - 1] = latency.ratio(1 + m + sum(1 + node.prompts for node in nodes))
    share = stationary(chain)
    return 1 + float(share @ matches), float(share @ cost)


def best_budget(
    model: PreTrainedModel,
    acc: Tensor | Sequence[Sequence[float]],
    *,
    batch_size: int = 1,
    budgets: Sequence[int] = BUDGETS,
) -> int:
    """The budget that promises the most tokens per second on this machine; 0: plain decoding is at least as fast.

    Args:
        model: The model that will decode; the latency of its passes is measured once and kept (``pass_latency``).
        acc: ``(m, K)`` accuracy table.
        batch_size: Rows of a pass.
        budgets: Budgets to choose from; those below m + 2 are left out.
    """
    latency = pass_latency(model, batch_size)
    best, fastest = 0, 1.0
    for budget in budgets:
        if budget >= len(table_of(acc)) + 2:
            tokens, cost = expected_speed(sparse_trees(acc, budget), latency)
            if tokens / cost > fastest:
                best, fastest = budget, tokens / cost
    return best
