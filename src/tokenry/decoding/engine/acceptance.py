"""Which drafted nodes stand: the rules that keep the model's own text.

With p_i the model's distribution at node i (after all logits processors) and x_i the node's token:

    greedy       y_i = argmax p_i; a child c of an accepted node i is accepted iff x_c = y_i; the deepest chain counts,
                 then y of its last node is emitted as well (the bonus)
    sampling     draw z ~ p_i at an accepted node i; go to the first child with x_c = z, else emit z and stop: exact
                 ancestral sampling, whatever the tree was
    sampling     children drawn from q: accept child c with probability min(1, p(x_c) / q_c(x_c)), otherwise
    with q       p <- normalise(max(p - q_c, 0)) and try the next child; when none is left, emit z ~ p
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenry.decoding.engine.draft_tree import DraftTree

__all__ = ["Accepted", "accept_greedy", "accept_walk"]


@dataclass
class Accepted:
    """What a pass decided.

    Attributes:
        paths: ``(B, A)`` accepted nodes, root first, padded with the row's last one.
        emitted: ``(B, A)`` the token after each node of ``paths``: the accepted tokens, then the bonus.
        counts: Tokens that each row emits (accepted nodes with the root = accepted tokens with the bonus).
        tokens: The first ``counts[b]`` entries of ``emitted``, on the host.
        nodes: The first ``counts[b]`` entries of ``paths``, on the host.
        scores: Processed scores at the nodes of ``paths``, each ``(B, V)``, where the walk has computed them.
    """

    paths: Tensor
    emitted: Tensor
    counts: list[int]
    tokens: list[list[int]]
    nodes: list[list[int]]
    scores: list[Tensor] | None = None


def accept_greedy(tree: DraftTree, tokens: Tensor, logits: Tensor, candidates: Tensor | None = None) -> Accepted:
    """Follow the model's first choices, all nodes at once, with one transfer to the host.

    Args:
        tree: The draft's structure.
        tokens: ``(B, T)``.
        logits: ``(B, T, V)``.
        candidates: ``(B, T)`` bool, False where a row has no candidate at that node. None: the tree's own.

    Example:
        >>> tree = DraftTree([-1, 0, 0, 1])
        >>> logits = torch.nn.functional.one_hot(torch.tensor([[5, 6, 0, 7]]), 8).float()
        >>> accept_greedy(tree, torch.tensor([[1, 5, 2, 6]]), logits).tokens
        [[5, 6, 7]]
    """
    targets = logits.max(-1).indices  # (B, T); on a CPU twice as fast as argmax
    if tree.size == 1:
        host = targets.tolist()
        return Accepted(torch.zeros_like(targets), targets, [1] * len(host), host, [[0]] * len(host))
    match = tokens[:, 1:] == targets[:, tree.parent[1:]]  # (B, T-1)
    match &= tree.is_candidate[1:] if candidates is None else candidates[:, 1:]
    # A node stands when all its ancestors but the root match: their number is its depth.
    standing = match.float() @ tree.reach  # (B, T)
    depth = torch.where(standing == tree.depth, tree.depth, -1)
    last = depth.argmax(-1)  # the deepest; the first of several
    paths = tree.root_paths[last]  # (B, D+1)
    emitted = targets.gather(1, paths)
    host = torch.cat([last[:, None], emitted], 1).tolist()  # the pass's one transfer
    nodes = [tree.path_lists[row[0]] for row in host]
    counts = [len(path) for path in nodes]
    return Accepted(
        paths, emitted, counts, [row[1 : n + 1] for row, n in zip(host, counts, strict=True)], [list(p) for p in nodes]
    )


def accept_walk(
    tree: DraftTree,
    tokens: Tensor,
    logits: Tensor,
    process: Callable[[Tensor, Tensor, int], Tensor],
    *,
    do_sample: bool,
    candidates: Tensor | None = None,
    draft_probs: Tensor | None = None,
    active: list[bool] | None = None,
) -> Accepted:
    """Walk down the tree, level by level, asking the logits processors at visited nodes only.

    Args:
        tree: The draft's structure.
        tokens: ``(B, T)``.
        logits: ``(B, T, V)``.
        process: ``process(scores (B, V), came (B, d), d)`` returns the processed scores after the ``d`` tokens ``came``.
        do_sample: Draw instead of taking the first choice.
        candidates: ``(B, T)`` bool, or None for the tree's own.
        draft_probs: ``(B, T, V)``: what each node's token was drawn from. None: the draft is deterministic.
        active: Rows that are still generating. None: all.
    """
    rows = torch.arange(tokens.shape[0], device=tokens.device)
    may = tree.is_candidate.expand_as(tokens) if candidates is None else candidates
    node = torch.zeros_like(rows)  # (B,)
    alive = torch.ones_like(node, dtype=torch.bool) if active is None else torch.tensor(active, device=node.device)
    count = torch.zeros_like(node)
    paths: list[Tensor] = []
    emitted: list[Tensor] = []
    all_scores: list[Tensor] = []
    for depth in range(tree.max_depth + 1):
        came = torch.stack(emitted, 1) if emitted else tokens[:, :0]
        scores = process(logits[rows, node].to(dtype=torch.float32, copy=True), came, depth)  # (B, V)
        children = tree.children[node]  # (B, C)
        there = children.clamp_min(0)
        usable = (children >= 0) & may.gather(1, there) & alive[:, None]
        if do_sample and draft_probs is not None:
            child, drawn = _accept_drawn(
                scores.softmax(-1), tokens.gather(1, there), usable, draft_probs[rows[:, None], there]
            )
        else:
            drawn = torch.multinomial(scores.softmax(-1), 1).squeeze(1) if do_sample else scores.argmax(-1)
            hit = usable & (tokens.gather(1, there) == drawn[:, None])
            child = torch.where(hit.any(-1), hit.int().argmax(-1), -1)  # the first: duplicates share one draw
        paths.append(node)
        emitted.append(drawn)
        all_scores.append(scores)
        count = count + alive
        alive = alive & (child >= 0)
        if depth == tree.max_depth or not alive.any():
            break
        node = torch.where(alive, there.gather(1, child.clamp_min(0)[:, None]).squeeze(1), node)
    path, out = torch.stack(paths, 1), torch.stack(emitted, 1)
    host = torch.cat([count[:, None], path, out], 1).tolist()
    counts = [row[0] for row in host]
    width = path.shape[1]
    return Accepted(
        path,
        out,
        counts,
        [row[1 + width : 1 + width + row[0]] for row in host],
        [row[1 : 1 + row[0]] for row in host],
        all_scores,
    )


def _accept_drawn(p: Tensor, tokens: Tensor, usable: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Recursive rejection over a node's drawn children.

    Args:
        p: ``(B, V)`` the model's distribution.
        tokens: ``(B, C)`` the children's tokens.
        usable: ``(B, C)`` whether the child exists.
        q: ``(B, C, V)`` what each child was drawn from.

    Returns:
        Index of the accepted child or -1, and the token that follows, both ``(B,)``.
    """
    child = torch.full_like(tokens[:, 0], -1)
    for c in range(tokens.shape[1]):
        token, open_ = tokens[:, c, None], usable[:, c] & (child < 0)
        ratio = p.gather(1, token) / q[:, c].gather(1, token).clamp_min(torch.finfo(p.dtype).tiny)
        taken = open_ & (torch.rand_like(ratio) < ratio).squeeze(1)
        child = torch.where(taken, c, child)
        rest = (p - q[:, c]).clamp_min(0)
        mass = rest.sum(-1, keepdim=True)
        # p = q leaves nothing, but is never rejected: keep p there, for rounding's sake.
        p = torch.where((open_ & ~taken)[:, None] & (mass > 0), rest / mass.clamp_min(torch.finfo(p.dtype).tiny), p)
    drawn = torch.multinomial(p, 1).squeeze(1)
    accepted = tokens.gather(1, child.clamp_min(0)[:, None]).squeeze(1)
    return child, torch.where(child >= 0, accepted, drawn)
