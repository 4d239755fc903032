"""Trees of guesses with prompt tokens hung on their nodes: the extended trees of parallel prompt decoding.

    node path     [i_1 ... i_l]           guess i_j of prompt token j
    prompt path   [i_1 ... i_l, -1, -2 ...]   the prompt tokens behind that node, -1 first
    order         by depth, then by path: parents before children

Rows of a batch are in different states. One tree serves them all: the union of their states' trees, each node with the
most prompt tokens that any of them hangs there; a row in state d takes the nodes of depth <= d for candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from tokenry.decoding.engine.draft_tree import DraftTree
from tokenry.decoding.tree_search import SparseNode, SparseTrees

__all__ = ["TOP_K", "PromptTree", "checked_trees"]

TOP_K = 10  # guesses per prompt token


def checked_trees(trees: Mapping[int, Sequence[Any]], m: int) -> SparseTrees:
    """Trees as ``SparseNode`` lists, one for each state 1, 2, ...

    Args:
        trees: State to its nodes ``(path, contribution, prompt tokens)``.
        m: Prompt tokens that there are.

    Raises:
        ValueError: A state is missing, a path has no parent or asks for a guess or a prompt token that there is not.
    """
    states = len(trees)
    if sorted(trees) != list(range(1, states + 1)) or not 1 <= states <= m:
        raise ValueError(f"trees are needed for the states 1, 2, ... up to {m} prompt tokens, got {sorted(trees)}")
    checked = {}
    for d in range(1, states + 1):
        nodes = [SparseNode(tuple(int(i) for i in path), float(c), int(n)) for path, c, n in trees[d]]
        known = {node.path for node in nodes}
        for path, _, n in nodes:
            where = f"the tree of state {d}: path {list(path)}"
            if not 1 <= len(path) <= d:
                raise ValueError(f"{where} needs 1 to {d} guesses: {d} prompt tokens have made some")
            if not all(0 <= i < TOP_K for i in path):
                raise ValueError(f"{where} has a guess outside 0 to {TOP_K - 1}")
            if len(path) > 1 and path[:-1] not in known:
                raise ValueError(f"{where} has no parent: {list(path[:-1])} must be in the tree, too")
            if not 1 <= n <= states:
                raise ValueError(f"{where} has {n} prompt tokens; a node needs 1 to {states}")
        if len(known) != len(nodes):
            raise ValueError(f"the tree of state {d} holds a path twice")
        checked[d] = nodes
    return checked


class PromptTree:
    """The extended tree for one state, or for the states that the rows of a batch are in.

    Args:
        trees: One tree per state (``checked_trees``).
        states: States to serve; state 0 has the root and its prompt tokens alone.
        copies: Copies of each prompt token (ensemble prompts).
        device: Where the index tensors live.

    Attributes:
        tree: The ``DraftTree``; prompt tokens are no candidates.
        guess: ``(T,)`` index of a node's token in the row's guesses ``(m * TOP_K,)``; 0 for other nodes.
        prompt_nodes: ``(Q,)`` nodes that are prompt tokens.
        prompt_rows: ``(Q,)`` which row of the embeddings each of them is.
        hung: ``(T,)`` prompt tokens behind each node.
        hung_nodes: ``(T, m, copies)`` these nodes, padded with 0.
    """

    def __init__(
        self, trees: SparseTrees, states: Iterable[int], copies: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        m = len(trees)
        hung: dict[tuple[int, ...], int] = {(): m}
        for d in states:
            for path, _, n in trees.get(d, ()):
                hung[path] = max(n, hung.get(path, 0))
        # Copy v of prompt token j has the path element -(j + v m): copies are chains of their own.
        paths = list(hung) + [
            (*path, *(-(j + v * m) for j in range(1, length + 1)))
            for path, n in hung.items()
            for v in range(copies)
            for length in range(1, n + 1)
        ]
        paths.sort(key=lambda path: (len(path), path))
        index = {path: i for i, path in enumerate(paths)}
        candidate = [path in hung for path in paths]
        self.tree = DraftTree(
            [-1, *(index[path[:-1]] for path in paths[1:])],
            rank=[-1, *(path[-1] for path in paths[1:])],
            is_candidate=candidate,
            device=device,
        )
        self.hung_list = [hung.get(path, 0) for path in paths]
        hung_nodes = torch.zeros(len(paths), m, copies, dtype=torch.long)
        for i, path in enumerate(paths):
            for v in range(copies):
                for j in range(self.hung_list[i]):
                    hung_nodes[i, j, v] = index[(*path, *(-(1 + u + v * m) for u in range(j + 1)))]
        prompts = [(i, -path[-1] - 1) for i, path in enumerate(paths) if not candidate[i]]
        self.guess = torch.tensor(
            [TOP_K * (len(path) - 1) + path[-1] if path and candidate[i] else 0 for i, path in enumerate(paths)],
            device=device,
        )
        self.prompt_nodes = torch.tensor([i for i, _ in prompts], dtype=torch.long, device=device)
        self.prompt_rows = torch.tensor([j % m * copies + j // m for _, j in prompts], dtype=torch.long, device=device)
        self.hung = torch.tensor(self.hung_list, device=device)
        self.hung_nodes = hung_nodes.to(device)
