"""Which requests of a batch share which prefix, and in which order they run.

Zheng et al., "BatchLLM: Optimizing Large Batched LLM Inference with Global Prefix Sharing and Throughput-oriented Token
Batching", 2024, arXiv:2412.03594.

All requests are known, so their prompts make one prefix tree, d(v) tokens from its root to node v. A *group* computes one
prefix once, its members go on from there; one request has one prefix. Worth of a set of opened nodes, one per group:

    saved     = Σ_groups (members - 1) · prefix tokens
    F(v, o)   = max( Σ_c F(c, o) + e(v) · o,   Σ_c F(c, d(v)) + e(v) · d(v) - d(v) )

is what is saved below v when o is the depth of the deepest open node above it and e(v) requests end at v; v is opened where
the second term is larger. F(root, 0) is the exact optimum. Of equal sets the one with the fewest groups counts.

    order     groups by falling  Σ new tokens / Σ prompt tokens to compute,  members alike

so that requests that decode for long start early and later prefills fill the passes beside them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

__all__ = ["BatchPlan", "PrefixGroup", "kv_bytes_per_token", "plan_batch"]

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class PrefixGroup:
    """Requests that share a prefix.

    Attributes:
        prefix: The shared tokens; empty for a request that shares nothing.
        members: Indices of the requests, in the order in which they run.
    """

    prefix: Tokens
    members: tuple[int, ...]


@dataclass(frozen=True)
class BatchPlan:
    """Groups in the order in which they run, and what they save. Prints as a table.

    Attributes:
        groups: All requests, each in exactly one group.
        prompt_tokens: Length of each request's prompt, in input order.
        new_tokens: What each request is expected to generate.
        saved_first_level: Tokens saved if requests were grouped by their first token, with what all of those share.
        saved_bound: Tokens that a cache of every prefix at every level would save.
        kv_bytes: Bytes of keys and values per token, if given.
    """

    groups: tuple[PrefixGroup, ...]
    prompt_tokens: tuple[int, ...]
    new_tokens: tuple[int, ...]
    saved_first_level: int
    saved_bound: int
    kv_bytes: int | None = None
    group_of: tuple[int, ...] = field(repr=False, default=())

    @property
    def total(self) -> int:
        """Prompt tokens of all requests."""
        return sum(self.prompt_tokens)

    @property
    def saved(self) -> int:
        """Prompt tokens that are not computed again."""
        return sum((len(group.members) - 1) * len(group.prefix) for group in self.groups)

    @property
    def computed(self) -> int:
        """Prompt tokens that are computed: each group's prefix once, and every remainder."""
        return self.total - self.saved

    def prefix_tokens(self, group: int) -> int:
        """Length of a group's prefix."""
        return len(self.groups[group].prefix)

    def remainder(self, request: int) -> int:
        """Prompt tokens of a request behind its group's prefix."""
        return self.prompt_tokens[request] - self.prefix_tokens(self.group_of[request])

    def held_together(self, new_tokens: Sequence[int]) -> int:
        """Tokens whose keys and values all requests would hold if they ran at the same time to their ends."""
        return self.computed + sum(new_tokens) - len(new_tokens)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("group", "prefix", "requests", "remainders", "new", "new/computed")]
        for number, group in enumerate(self.groups):
            rest, new = (sum(map(of, group.members)) for of in (self.remainder, self.new_tokens.__getitem__))
            ratio = new / (len(group.prefix) + rest)
            rows.append(
                (str(number), str(len(group.prefix)), str(len(group.members)), str(rest), str(new), f"{ratio:.2f}")
            )
        if len(rows) > 13:
            rows[11:-1] = [("...",) * len(rows[0])]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        share = f"{100 * self.saved / self.total:.1f} %"
        lines += [
            f"{self.total:,} prompt tokens in {len(self.prompt_tokens):,} requests, {self.computed:,} computed, "
            f"{self.saved:,} saved ({share}; at most {self.saved_bound:,}, by first token {self.saved_first_level:,})"
        ]
        if self.kv_bytes is not None:
            whole = self.kv_bytes * self.held_together(self.new_tokens)
            lines.append(
                f"{self.kv_bytes:,} bytes of keys and values per token, {whole / 2**20:,.1f} MiB for all at once"
            )
        return "\n".join(lines)


class PrefixTree:
    """Compact prefix tree of the prompts without their last tokens, which must be run to have logits.

    Node 0 is the root. ``depth`` (tokens), ``parent``, ``ends`` (requests that end there) and ``count`` (requests that
    end there or below) are lists over nodes.
    """

    def __init__(self, prompts: Sequence[Tokens]) -> None:
        self.depth, self.parent = [0], [-1]
        self.ends: list[list[int]] = [[]]
        path = [0]  # nodes from the root to the last request
        previous = np.empty(0, dtype=np.int64)
        for request in sorted(range(len(prompts)), key=lambda i: prompts[i][:-1]):
            tokens = np.asarray(prompts[request][:-1], dtype=np.int64)
            shortest = min(len(tokens), len(previous))
            differ = np.flatnonzero(tokens[:shortest] != previous[:shortest])
            shared, previous = int(differ[0]) if len(differ) else shortest, tokens
            below = None
            while self.depth[path[-1]] > shared:
                below = path.pop()
            if self.depth[path[-1]] < shared:  # split the edge that the last request took
                path.append(self._add(shared, path[-1]))
                self.parent[below] = path[-1]  # type: ignore[index]
            if len(tokens) > shared:
                path.append(self._add(len(tokens), path[-1]))
            self.ends[path[-1]].append(request)
        self.order = sorted(range(1, len(self.depth)), key=self.depth.__getitem__)  # parents before children
        self.count = [len(ends) for ends in self.ends]
        for node in reversed(self.order):
            self.count[self.parent[node]] += self.count[node]

    def _add(self, depth: int, parent: int) -> int:
        self.depth.append(depth)
        self.parent.append(parent)
        self.ends.append([])
        return len(self.depth) - 1

    def bound(self) -> int:
        """Tokens saved if every edge of the tree were computed once."""
        return sum((self.count[v] - 1) * (self.depth[v] - self.depth[self.parent[v]]) for v in self.order)

    def open_none(self) -> list[int]:
        """The node whose prefix each node's requests share: the root, for nothing."""
        return [0] * len(self.depth)

    def open_best(self) -> list[int]:
        """The node whose prefix each node's requests share, at the optimum."""
        nodes = len(self.depth)
        level = [0] * nodes
        for v in self.order:
            level[v] = level[self.parent[v]] + 1
        unit = sum(self.count[:1]) + 1  # a saved token outweighs all groups, so that groups break ties only
        below: list[Any] = [0] * nodes  # Σ_c F(c, ·) over the depths of the node's path, itself included
        opens_below = [0] * nodes  # v is opened if the deepest open node is one of the first so many of its path
        for v in reversed(self.order):
            path, u = [0] * (level[v] + 1), v
            while u > 0:
                path[level[u]] = self.depth[u]
                u = self.parent[u]
            worth = unit * len(self.ends[v]) * np.array(path, dtype=np.int64) + below[v]
            opened = worth[-1] - unit * self.depth[v] - 1
            opens_below[v] = int((worth[:-1] < opened).sum())  # worth grows with the depth of the open node
            below[self.parent[v]] = below[self.parent[v]] + np.maximum(worth[:-1], opened)
            below[v] = 0
        owner = [0] * nodes
        for v in self.order:
            above = owner[self.parent[v]]
            owner[v] = v if level[above] < opens_below[v] else above
        return owner

    def open_first_level(self) -> list[int]:
        """Nodes just below the root share what all of their requests share."""
        owner = [0] * len(self.depth)
        for v in self.order:
            owner[v] = owner[self.parent[v]] or (v if self.count[v] > 1 else 0)
        return owner


def plan_batch(
    requests: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    *,
    kv_bytes: int | None = None,
    grouping: Literal["optimal", "first-level", "none"] = "optimal",
    order: Literal["decode-heavy", "input"] = "decode-heavy",
) -> BatchPlan:
    """Group requests by shared prefixes and order the groups.

    Args:
        requests: Token ids of every prompt (lists, tuples, arrays or 1-D tensors).
        max_new_tokens: Tokens that each request generates, or one number for all. Better estimates make a better order.
        kv_bytes: Bytes of keys and values per token (``kv_bytes_per_token``), for the table.
        grouping: ``"optimal"``: most tokens saved; ``"first-level"``: by the first branch of the prefix tree;
            ``"none"``: every request alone.
        order: ``"decode-heavy"`` or ``"input"``: groups by their first request.

    Raises:
        ValueError: No requests, an empty one, text instead of ids, or lengths that do not fit.

    Example:
        >>> plan = plan_batch([[1, 2, 3, 4], [9, 9], [1, 2, 3, 5, 6]], max_new_tokens=8)
        >>> plan.groups[1]
        PrefixGroup(prefix=(1, 2, 3), members=(0, 2))
        >>> plan.total, plan.computed, plan.saved
        (11, 8, 3)
    """
    prompts = [as_tokens(request, number) for number, request in enumerate(_not_empty(requests))]
    new = as_new_tokens(max_new_tokens, len(prompts))
    openers = {"optimal": "open_best", "first-level": "open_first_level", "none": "open_none"}
    if grouping not in openers:
        raise ValueError(f"grouping must be one of {', '.join(openers)}, got {grouping!r}")
    if order not in ("decode-heavy", "input"):
        raise ValueError(f"order must be 'decode-heavy' or 'input', got {order!r}")
    tree = PrefixTree(prompts)
    owner: list[int] = getattr(tree, openers[grouping])()
    members: dict[int, list[int]] = {}
    for node, ends in enumerate(tree.ends):
        for request in ends:
            members.setdefault(owner[node] or -1 - request, []).append(request)
    groups = [
        PrefixGroup(prompts[found[0]][: tree.depth[node]] if node > 0 else (), tuple(sorted(found)))
        for node, found in members.items()
    ]
    if order == "decode-heavy":

        def key(group: PrefixGroup) -> tuple[float, int, int]:
            decode = sum(new[i] for i in group.members)
            rest = sum(len(prompts[i]) - len(group.prefix) for i in group.members)
            return -decode / (len(group.prefix) + rest), -decode, min(group.members)

        def member(group: PrefixGroup, i: int) -> tuple[float, int, int]:
            return -new[i] / (len(prompts[i]) - len(group.prefix)), -new[i], i

        groups = [
            PrefixGroup(g.prefix, tuple(sorted(g.members, key=lambda i, g=g: member(g, i))))
            for g in sorted(groups, key=key)
        ]
    else:
        groups.sort(key=lambda group: group.members[0])
    group_of = [0] * len(prompts)
    for number, group in enumerate(groups):
        for request in group.members:
            group_of[request] = number
    first = tree.open_first_level()
    heads = {v for v in tree.order if first[v] == v}
    return BatchPlan(
        groups=tuple(groups),
        prompt_tokens=tuple(map(len, prompts)),
        new_tokens=new,
        saved_first_level=sum((tree.count[v] - 1) * tree.depth[v] for v in heads),
        saved_bound=tree.bound(),
        kv_bytes=kv_bytes,
        group_of=tuple(group_of),
    )


def _not_empty(requests: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    if isinstance(requests, (str, bytes)) or len(requests) == 0:
        raise ValueError("no requests: give a list with the token ids of every prompt")
    return requests


def as_tokens(request: Any, number: int) -> Tokens:
    """A prompt as a tuple of token ids.

    Raises:
        ValueError: It is text, empty, or holds something else than whole numbers of at least 0.
    """
    if isinstance(request, (str, bytes)) or (
        isinstance(request, Sequence) and any(isinstance(t, str) for t in request)
    ):
        raise ValueError(f"request {number} is text; give token ids: tokenizer(prompt)['input_ids']")
    if hasattr(request, "tolist"):
        request = request.tolist()
    try:
        tokens = tuple(map(operator.index, request))
    except TypeError:
        raise ValueError(f"request {number} must be a flat list of token ids, got {request!r:.80}") from None
    if not tokens:
        raise ValueError(f"request {number} is empty: a prompt needs at least one token")
    if min(tokens) < 0:
        raise ValueError(f"request {number} holds {min(tokens)}; token ids are at least 0")
    return tokens


def as_new_tokens(max_new_tokens: int | Sequence[int], requests: int, name: str = "max_new_tokens") -> Tokens:
    """One number per request.

    Raises:
        ValueError: As many numbers as requests were needed, or one is below 1.
    """
    given = [max_new_tokens] * requests if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(given) != requests:
        raise ValueError(
            f"{name} has {len(given)} numbers for {requests} requests; give one each, or one number for all"
        )
    for number, value in enumerate(given):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be whole numbers of at least 1, got {value!r} for request {number}")
    return tuple(given)


def kv_bytes_per_token(config: Any, dtype: Any) -> int:
    """Bytes of keys and values per token: 2 · layers · key-value heads · head size · bytes of ``dtype``.

    Args:
        config: A causal language model's configuration.
        dtype: Torch dtype of the cache.
    """
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * size * dtype.itemsize
