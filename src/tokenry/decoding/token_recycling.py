"""Token Recycling: draft from the candidates that earlier passes threw away.

Luo et al., "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling", 2024,
arXiv:2408.08696.

    A[t]           the k likeliest tokens after token t, as seen the last time t was run, best first     (V, k)
    draft          token(root) = last committed token;  token(child r of i) = A[token(i)][r]
    after a pass   A[token(i)] = topk(logits_i, k) for every node i of the tree, the rejected ones too

No training, no second model: the tree's shape is fixed, its tokens are looked up, and the model's own discarded
candidates keep the table fresh. The text is the model's own (``tokenry.decoding.engine.acceptance``).
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tokenry.decoding.engine.acceptance import Accepted
from tokenry.decoding.engine.decoder_blocks import output_size
from tokenry.decoding.engine.draft_tree import DraftTree
from tokenry.decoding.engine.latency import pass_latency
from tokenry.decoding.engine.state import DecodingState, Proposal
from tokenry.decoding.engine.strategy import DraftStrategy
from tokenry.decoding.engine.tree_size import TreeSizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["TREE_80", "TokenRecycling", "TokenRecyclingMatrix"]

# The paper's tree: per level, how many children the nodes of the level above have (the rest has none).
_CHILDREN = (
    {"": 8},
    {"0": 8, "1": 4, "2": 3, "3": 2, "4": 1, "5": 1, "6": 1, "7": 1},
    {"00": 8, "01": 3, "02": 2, "03": 1, "04": 1, "05": 1, "06": 1, "07": 1, "10": 2, "11": 1, "20": 1, "30": 1, "40": 1, "50": 1},
    {"000": 5, "001": 2, "002": 1, "003": 1, "004": 1, "010": 1, "020": 1, "100": 1, "200": 1, "300": 1},
    {"0000": 3, "0001": 1, "0002": 1, "0010": 1, "0100": 1, "1000": 1},
    {"00000": 2, "00010": 1},
)  # fmt: skip
TREE_80: tuple[tuple[int, ...], ...] = tuple(
    (*map(int, parent), rank) for level in _CHILDREN for parent, n in level.items() for rank in range(n)
)
# Candidates for the automatic size, and how likely the truth is at each place of a row (for the order in which the
# template's nodes are taken; measured on the embedded model with a filled table).
AUTO_NODES = (0, 1, 2, 3, 5, 8, 12, 18, 28, 45, 80)
PLACE = (0.5, 0.13, 0.07, 0.05, 0.035, 0.03, 0.025, 0.02)


class TokenRecyclingMatrix:
    """The table of candidates, kept from prompt to prompt.

    It belongs to a tokenizer and a model, not to a user: it remembers which token followed which in everything that
    was generated with it. ``reset`` it between users who must not learn from each other.

    Args:
        vocab_size: Rows: the model's output size (``model.lm_head.out_features``).
        k: Candidates per token. Default 8 (paper).
        device: Where the table lives; a run moves it to the model.
        dtype: ``torch.int64`` (paper) or ``torch.int32``, half the memory.

    Raises:
        ValueError: ``k`` is not between 1 and the vocabulary, or another dtype.

    Example:
        >>> TokenRecyclingMatrix(32_000).nbytes
        2048000
    """

    def __init__(
        self, vocab_size: int, k: int = 8, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.int64
    ) -> None:
        if not 1 <= k <= vocab_size:
            raise ValueError(f"k={k} candidates per token need 1 <= k <= vocab_size={vocab_size}")
        if dtype not in (torch.int64, torch.int32):
            raise ValueError(f"the matrix holds torch.int64 or torch.int32, got {dtype}")
        self.table = torch.zeros(vocab_size, k, dtype=dtype, device=device)  # (V, k)
        self._written: Tensor | None = None  # (V,) number of the last write of each row
        self._writes = 0

    @property
    def vocab_size(self) -> int:
        """Rows."""
        return self.table.shape[0]

    @property
    def k(self) -> int:
        """Candidates per token."""
        return self.table.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory of the table in bytes."""
        return self.table.nbytes

    def to(self, device: torch.device | str) -> TokenRecyclingMatrix:
        """Move the table, in place; returns itself."""
        self.table = self.table.to(device)
        if self._written is not None:
            self._written = self._written.to(device)
        return self

    def reset(self) -> None:
        """Forget everything: the next prompt starts cold."""
        self.table.zero_()

    def candidates(self, tokens: Tensor, ranks: Tensor) -> Tensor:
        """Candidate number ``ranks`` ``(n,)`` after each of ``tokens`` ``(B, n)``: ``(B, n)``."""
        return self.table.view(-1)[tokens * self.k + ranks].long()

    def places(self, before: Tensor, after: Tensor) -> Tensor:
        """Where ``after`` stands in the row of ``before`` (same shapes); -1 if it does not."""
        found = self.table[before] == after[..., None]  # (..., k)
        return torch.where(found.any(-1), found.int().argmax(-1), -1)

    def write(self, tokens: Tensor, logits: Tensor) -> None:
        """Row of each token := its ``k`` likeliest next tokens; of a token's several nodes the last one counts.

        Args:
            tokens: ``(n,)``.
            logits: ``(n, V)``.
        """
        best = logits.topk(self.k, -1).indices.to(self.table.dtype)  # (n, k)
        n = tokens.shape[0]
        if n > 1:  # index assignment leaves open which of several writes wins: let all write the last one's values
            if self._written is None:
                self._written = torch.full((self.vocab_size,), -1, device=self.table.device)
            number = torch.arange(self._writes, self._writes + n, device=tokens.device)
            self._written.scatter_reduce_(0, tokens, number, "amax")
            best = best[self._written[tokens] - self._writes]
            self._writes += n
        self.table[tokens] = best

    def save(self, path: str | Path) -> None:
        """Write the table to a ``safetensors`` file."""
        save_file(
            {"matrix": self.table.contiguous().cpu()},
            str(path),
            metadata={"format": "pt", "tokenry": "token-recycling"},
        )

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> TokenRecyclingMatrix:
        """Read a table that ``save`` wrote.

        Raises:
            ValueError: The file holds no such table.
        """
        with safe_open(str(path), "pt", device=str(device)) as file:
            if "matrix" not in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                raise ValueError(
                    f"{path} holds no token recycling matrix (a tensor named 'matrix'); found {list(file.keys())}"
                )
            table = file.get_tensor("matrix")
        if table.ndim != 2:
            raise ValueError(f"{path}: the matrix must be (vocab_size, k), got shape {tuple(table.shape)}")
        loaded = cls(*table.shape, device=device, dtype=table.dtype)
        loaded.table = table
        return loaded


class TokenRecycling(DraftStrategy):
    """Lossless tree drafting from recycled candidates, for any causal language model with full attention.

    Args:
        matrix: The table to use and to go on filling; None makes one at the first call and keeps it, so that later
            calls of the same object start hot.
        tree: ``"auto"``: the paper's tree or a part of it, sized by this machine's measured pass latency and by what
            drafts have won so far, down to plain decoding. None: the paper's 80 nodes, always. A number: so many of
            its nodes, the most useful first. A list of index paths (``[[0], [1], [0, 0]]``): that tree.
        k: Candidates per token for a new matrix. Default 8 (paper).
        warm_from_prompt: Also fill the table from the prompt's own logits: a better start for one more matrix product
            over the prompt. Off by default, as in the paper.

    Attributes:
        matrix: The table; None before the first call if none was given.
        stats: ``DecodingStats`` of the last call.

    Raises:
        ValueError: ``k`` or the tree do not fit; see the message.

    Example:
        >>> from tokenry.assets import load_model
        >>> model, tokenizer = load_model()
        >>> inputs = tokenizer("def main(", return_tensors="pt", return_token_type_ids=False)
        >>> strategy = TokenRecycling(tree=20)
        >>> out = model.generate(**inputs, custom_generate=strategy, max_new_tokens=12)
        >>> torch.equal(out, model.generate(**inputs, do_sample=False, max_new_tokens=12))
        True
    """

    def __init__(
        self,
        matrix: TokenRecyclingMatrix | None = None,
        tree: Literal["auto"] | int | Sequence[Sequence[int]] | DraftTree | None = "auto",
        k: int = 8,
        warm_from_prompt: bool = False,
    ) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k is the number of candidates per token and at least 1, got {k}")
        self.matrix = matrix
        self.k = matrix.k if matrix is not None else k
        self.wants_prompt_logits = warm_from_prompt
        self._auto = isinstance(tree, str)
        if isinstance(tree, str) and tree != "auto":
            raise ValueError(f'tree must be "auto", None, a number of nodes or a list of index paths, got {tree!r}')
        useful = [path for path in TREE_80 if max(path) < self.k]
        if self._auto:
            self.tree = DraftTree.chain(0)
        elif tree is None:
            self.tree = DraftTree.from_paths(useful)
        elif isinstance(tree, int):
            if not 0 <= tree <= len(useful):
                raise ValueError(
                    f"tree={tree}: the template has 0 to {len(useful)} nodes with k={self.k}; larger: give paths"
                )
            self.tree = DraftTree.from_paths(sorted(by_use(useful)[:tree], key=lambda path: (len(path), path)))
        else:
            paths: Any = tree
            self.tree = paths if isinstance(paths, DraftTree) else DraftTree.from_paths(sorted(paths, key=len))
        for path in self.tree.paths:
            if max(path) >= self.k:
                raise ValueError(
                    f"tree path {list(path)} has an index of {max(path)}, but rows have k={self.k} candidates"
                )
        self._useful = useful
        self._model: weakref.ref[PreTrainedModel] | None = None
        self._sizes: dict[int, TreeSizes] = {}

    def begin(self, state: DecodingState) -> None:
        """Check the table against the model, move it there, and read the latency curve."""
        model = state.model
        vocabulary = output_size(model)
        if self.matrix is None:
            self.matrix = TokenRecyclingMatrix(vocabulary, self.k)
        if self.matrix.vocab_size != vocabulary:
            raise ValueError(
                f"the matrix has {self.matrix.vocab_size} rows, the model's output has {vocabulary}: make it with "
                f"TokenRecyclingMatrix({vocabulary}) (the output layer counts, not the tokenizer)"
            )
        self.matrix.to(state.device)
        self._size = 0
        self._began = 0.0
        if self._auto:
            if self._model is None or self._model() is not model:
                self._model, self._sizes = weakref.ref(model), {}
            rows = state.batch_size
            if rows not in self._sizes:
                self._sizes[rows] = TreeSizes(by_use(self._useful), pass_latency(model, rows), AUTO_NODES)
            self._sizes[rows].begin(rows)

    def observe_prompt(self, state: DecodingState, ids: Tensor, logits: Tensor) -> None:
        """Fill the table from the prompt, left padding apart."""
        if state.start is None:
            real = torch.ones_like(ids, dtype=torch.bool)
        else:
            real = torch.arange(ids.shape[1], device=ids.device) >= state.start[:, None]
        self._table.write(ids[real], logits[real])

    def propose(self, state: DecodingState) -> Proposal:
        """Fill the tree level by level: one lookup each."""
        if state.remaining == 1:
            return Proposal.plain(state)
        if self._auto:
            sizes = self._sizes[state.batch_size]
            now = time.perf_counter()
            if len(state.stats.nodes) > 1:  # the first pass brings the prompt along
                sizes.took(self._size, now - self._began)
            self._began, self._size = now, sizes.choose(state.finished)
            tree = sizes.trees[self._size].to(state.device)
        else:
            tree = self.tree.to(state.device)
        if tree.size == 1:
            return Proposal.plain(state)
        tokens = state.root.expand(-1, tree.size).clone()  # (B, T)
        for begin, end in tree.levels[1:]:
            above = tokens[:, tree.parent[begin:end]]
            tokens[:, begin:end] = self._table.candidates(above, tree.rank[begin:end])
        return Proposal(tree, tokens)

    def observe(self, state: DecodingState, proposal: Proposal, logits: Tensor, accepted: Accepted) -> None:
        """Recycle every node's candidates; finished rows write nothing."""
        if self._auto:
            self._learn(state, proposal, accepted)
        tokens = proposal.tokens
        if any(state.finished):
            running = [b for b, done in enumerate(state.finished) if not done]
            tokens, logits = tokens[running], logits[running]
        self._table.write(tokens.flatten(), logits.flatten(0, 1))

    def _learn(self, state: DecodingState, proposal: Proposal, accepted: Accepted) -> None:
        before = proposal.tokens.gather(1, accepted.paths)  # (B, A)
        places = self._table.places(before, accepted.emitted).tolist()
        sizes = self._sizes[state.batch_size]
        for row, (found, count) in enumerate(zip(places, accepted.counts, strict=True)):
            if not state.finished[row]:
                sizes.learn(row, found[:count])

    @property
    def _table(self) -> TokenRecyclingMatrix:
        if self.matrix is None:
            raise RuntimeError("the strategy was used before begin()")
        return self.matrix


def by_use(paths: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Paths by how likely they are to be accepted, every prefix before its extensions."""

    def likelihood(path: Sequence[int]) -> float:
        product = 1.0
        for place in path:
            product *= PLACE[min(place, len(PLACE) - 1)]
        return product

    return sorted((tuple(path) for path in paths), key=lambda path: (-likelihood(path), len(path), path))
