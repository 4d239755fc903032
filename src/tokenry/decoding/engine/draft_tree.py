"""The draft tree: several guesses at the next tokens, arranged so that one pass verifies all of them.

    node 0            the last committed token (the root): already decided, not yet in the cache
    parent[i] < i     nodes stand in an order in which parents come before their children
    ancestor[i, j]    node i may look at node j: j = i, or j lies between i and the root
    depth[i]          position of node i, counted from the root

A chain of K drafted tokens is a tree with one leaf. The tree is structure only; its tokens are a separate tensor, so
one tree serves every pass and every row of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from tokenry.kernels.tree_attention import TreeMask

__all__ = ["DraftTree"]


class DraftTree:
    """Structure of a draft: which node follows which.

    Args:
        parent: Parent of each node; ``parent[0]`` is -1, all others come before their child.
        rank: For each node, which candidate of its parent it is (0 = best); the root's is -1. Default: order among
            siblings.
        is_candidate: False for nodes that get logits but are never accepted (the prompt tokens of parallel prompt
            decoding, for example). Default: all True.
        device: Where the index tensors live.

    Attributes:
        parent: ``(T,)`` long, the root's is -1.
        depth: ``(T,)`` long, the root's is 0.
        rank: ``(T,)`` long.
        ancestor: ``(T, T)`` bool, row i marks i and its ancestors.
        is_candidate: ``(T,)`` bool.

    Raises:
        ValueError: The nodes are not a tree in parents-first order.

    Example:
        >>> tree = DraftTree([-1, 0, 0, 1])
        >>> tree.ancestor.int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
        >>> tree.leaf_paths.tolist()
        [[0, 2, -1], [0, 1, 3]]
    """

    def __init__(
        self,
        parent: Sequence[int],
        *,
        rank: Sequence[int] | None = None,
        is_candidate: Sequence[bool] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        parents = [int(p) for p in parent]
        if not parents or parents[0] != -1:
            raise ValueError(f"node 0 is the root and its parent is -1, got {parents[:1] or 'no nodes'}")
        for i, p in enumerate(parents[1:], 1):
            if not 0 <= p < i:
                raise ValueError(f"node {i} has parent {p}; a parent must come before its child (0 to {i - 1})")
        size, depths = len(parents), [0]
        self.children_list: list[list[int]] = [[] for _ in parents]
        self.path_lists: list[list[int]] = [[0]]  # for each node: the nodes from the root to it
        for i, p in enumerate(parents[1:], 1):
            self.children_list[p].append(i)
            depths.append(depths[p] + 1)
            self.path_lists.append([*self.path_lists[p], i])
        if rank is None:
            rank = [-1] + [self.children_list[p].index(i) for i, p in enumerate(parents[1:], 1)]
        candidates = [True] * size if is_candidate is None else [bool(c) for c in is_candidate]
        if len(rank) != size or len(candidates) != size:
            raise ValueError(
                f"rank and is_candidate need one entry per node ({size}), got {len(rank)}, {len(candidates)}"
            )
        self.size = size
        self.max_depth = max(depths)
        self.rank_list = [int(r) for r in rank]
        self.device = torch.device(device)
        ancestor = torch.zeros(size, size, dtype=torch.bool)
        for i, path in enumerate(self.path_lists):
            ancestor[i, path] = True
        width = max(1, max(len(c) for c in self.children_list))
        children = torch.full((size, width), -1, dtype=torch.long)
        for i, nodes in enumerate(self.children_list):
            children[i, : len(nodes)] = torch.tensor(nodes, dtype=torch.long)
        longest = self.max_depth + 1
        paths = torch.tensor([path + [path[-1]] * (longest - len(path)) for path in self.path_lists], dtype=torch.long)

        self.parent = torch.tensor(parents, device=device)  # (T,)
        self.depth = torch.tensor(depths, device=device)  # (T,)
        self.rank = torch.tensor(self.rank_list, device=device)  # (T,)
        self.ancestor = ancestor.to(device)  # (T, T)
        self.reach = ancestor[:, 1:].float().T.contiguous().to(device)  # (T-1, T): counts what stands on a node's path
        self.is_candidate = torch.tensor(candidates, device=device)  # (T,)
        self.children = children.to(device)  # (T, C), padded with -1
        self.root_paths = paths.to(device)  # (T, D+1), each padded with its own last node
        self._masks: dict[torch.dtype, TreeMask] = {}
        self._copies: dict[torch.device, DraftTree] = {self.device: self}

    @classmethod
    def from_paths(cls, paths: Sequence[Sequence[int]], **kwargs: Any) -> DraftTree:
        """Make a tree from index paths: ``[2, 0]`` is "the best candidate of the third candidate of the root".

        Args:
            paths: One per node, every prefix before its extensions. No paths give the tree of zero nodes.
            **kwargs: Handed to ``DraftTree``.

        Raises:
            ValueError: A path is empty, negative, given twice, or its prefix is missing; the message names it.

        Example:
            >>> DraftTree.from_paths([[0], [1], [0, 0]]).parent.tolist()
            [-1, 0, 0, 1]
        """
        index: dict[tuple[int, ...], int] = {(): 0}
        parent, rank = [-1], [-1]
        for given in paths:
            path = tuple(int(r) for r in given)
            if not path or min(path) < 0:
                raise ValueError(f"the tree path {list(path)} must have at least one index and none below 0")
            if path in index:
                raise ValueError(f"the tree path {list(path)} is given twice")
            if path[:-1] not in index:
                raise ValueError(
                    f"the tree path {list(path)} has no parent: {list(path[:-1])} must stand before it in the list"
                )
            index[path] = len(parent)
            parent.append(index[path[:-1]])
            rank.append(path[-1])
        return cls(parent, rank=rank, **kwargs)

    @classmethod
    @cache
    def chain(cls, length: int) -> DraftTree:
        """A chain of ``length`` drafted tokens after the root; 0 gives plain decoding. Made once for each length.

        Example:
            >>> DraftTree.chain(3).depth.tolist()
            [0, 1, 2, 3]
        """
        if length < 0:
            raise ValueError(f"a chain has 0 or more tokens, got {length}")
        return cls(range(-1, length))

    def mask(self, length: int, dtype: torch.dtype) -> Tensor:
        """Additive attention mask ``(1, 1, T, length + T)`` behind ``length`` cached positions."""
        if dtype not in self._masks:
            self._masks[dtype] = TreeMask(self.ancestor, dtype)
        return self._masks[dtype](length)

    @property
    def nodes(self) -> int:
        """Number of drafted nodes, the root apart."""
        return self.size - 1

    @property
    def is_chain(self) -> bool:
        """Whether no node has two children: then a causal mask is the tree's own, and it can follow a prompt in one pass."""
        return self.max_depth == self.nodes

    @cached_property
    def paths(self) -> list[list[int]]:
        """The index path of every node but the root."""
        return [[self.rank_list[node] for node in path[1:]] for path in self.path_lists[1:]]

    @cached_property
    def levels(self) -> list[tuple[int, int]]:
        """First node and end of each depth, the root's first; needs breadth-first order.

        Raises:
            ValueError: The nodes are not sorted by depth.
        """
        depths = [len(path) - 1 for path in self.path_lists]
        if depths != sorted(depths):
            raise ValueError("the nodes are not in breadth-first order: sort the paths by their length")
        starts = [depths.index(d) for d in range(self.max_depth + 1)]
        return list(zip(starts, [*starts[1:], self.size], strict=True))

    @cached_property
    def leaf_paths(self) -> Tensor:
        """Nodes from the root to each leaf, ``(P, D+1)``, leaves in node order, padded with -1."""
        leaves = [path for path, children in zip(self.path_lists, self.children_list, strict=True) if not children]
        rows = [path + [-1] * (self.max_depth + 1 - len(path)) for path in leaves]
        return torch.tensor(rows, dtype=torch.long, device=self.device)

    def keep(self, nodes: int) -> DraftTree:
        """The tree of the first ``nodes`` nodes after the root: with parents first, any prefix is a tree."""
        if not 0 <= nodes <= self.nodes:
            raise ValueError(f"the tree has {self.nodes} nodes besides the root; cannot keep {nodes}")
        size = nodes + 1
        return DraftTree(
            [-1, *(path[-2] for path in self.path_lists[1:size])],
            rank=self.rank_list[:size],
            is_candidate=self.is_candidate[:size].tolist(),
            device=self.device,
        )

    def to(self, device: torch.device | str) -> DraftTree:
        """The same tree with its index tensors on ``device``; made once per device."""
        wanted = torch.device(device)
        if wanted not in self._copies:
            self._copies[wanted] = DraftTree(
                [-1, *(path[-2] for path in self.path_lists[1:])],
                rank=self.rank_list,
                is_candidate=self.is_candidate.tolist(),
                device=wanted,
            )
        return self._copies[wanted]

    def __repr__(self) -> str:
        return f"DraftTree(nodes={self.nodes}, depth={self.max_depth})"
