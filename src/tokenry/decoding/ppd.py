"""Parallel Prompt Decoding: a few trained prompt embeddings let a frozen model guess several tokens ahead at once.

Chen et al., "Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM Inference", 2024,
arXiv:2405.18628.

    P                   (m, H) trained embeddings, the model stays frozen; they stand at the positions after a token t
    logits(t)           predict the next token as always; logits(P_j) predict the one j + 1 places after t
    state               base logits and those of the d prompt tokens that hung on the node accepted last, d <= m
    pass in state d     root y = the model's own next token; node [i_1 ... i_l] = guess i_j of prompt token j, as listed
                        in the tree of state d; n prompt tokens hang on each node and see its ancestors only
    next state          d' = n of the accepted node; prompt tokens are never kept in the cache
    training            loss = 1/m sum_j 0.8^(j-1) KL(model's distribution after j greedy tokens || P_j's)

Prompt tokens are nodes that nothing looks at but other prompt tokens, so they cannot change the text
(``tokenry.decoding.engine.acceptance``); which guesses stand in the trees is ``tokenry.decoding.tree_search``.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from tokenry.decoding.engine.acceptance import Accepted
from tokenry.decoding.engine.latency import pass_latency
from tokenry.decoding.engine.state import DecodingState, Proposal
from tokenry.decoding.engine.strategy import DraftStrategy
from tokenry.decoding.parallel_prompts import ParallelPrompts
from tokenry.decoding.prompt_budget import PromptBudget
from tokenry.decoding.prompt_tree import TOP_K, PromptTree, checked_trees
from tokenry.decoding.tree_search import SparseTrees, sparse_trees

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ParallelPromptDecoding"]


class ParallelPromptDecoding(DraftStrategy):
    """Lossless tree drafting from trained prompt tokens, for any causal language model with full attention.

    Args:
        prompts: Embeddings trained for the model (``ParallelPrompts``). Wrong or random ones cost time, never text.
        trees: ``"auto"``: sized by this machine's measured pass latency, the prompts' accuracy table and what has
            matched so far, down to plain decoding. A number: the trees of that budget (``sparse_trees``), always. A
            mapping from state to nodes ``(path, contribution, prompt tokens)``: those trees, always.

    Attributes:
        stats: ``DecodingStats`` of the last call.

    Raises:
        ValueError: The trees do not fit the prompts, or there is no accuracy table to make them from.

    Example:
        >>> from tokenry.assets import load_model, model_path
        >>> model, tokenizer = load_model()
        >>> prompts = ParallelPrompts.from_pretrained(model_path() / "parallel_prompts")
        >>> inputs = tokenizer("def main(", return_tensors="pt", return_token_type_ids=False)
        >>> out = model.generate(**inputs, custom_generate=ParallelPromptDecoding(prompts, trees=12), max_new_tokens=12)
        >>> torch.equal(out, model.generate(**inputs, do_sample=False, max_new_tokens=12))
        True
    """

    def __init__(
        self, prompts: ParallelPrompts, trees: Literal["auto"] | int | Mapping[int, Sequence[Any]] = "auto"
    ) -> None:
        super().__init__()
        if isinstance(trees, str) and trees != "auto":
            raise ValueError(f'trees must be "auto", a budget or a mapping from state to nodes, got {trees!r}')
        self.prompts = prompts
        self._auto = isinstance(trees, str) and prompts.m > 0
        self._fixed: SparseTrees | None = None
        if prompts.m and isinstance(trees, (str, int)):
            if prompts.accuracy is None:
                raise ValueError(
                    f"trees={trees!r} is worked out from the prompts' accuracy table and these have none; call "
                    "prompts.measure(model, texts) first, or give the trees"
                )
            if isinstance(trees, int):
                self._fixed = checked_trees(sparse_trees(prompts.accuracy, trees), prompts.m)
        elif prompts.m and isinstance(trees, Mapping):
            self._fixed = checked_trees(trees, prompts.m)
        self._model: weakref.ref[PreTrainedModel] | None = None
        self._budgets: dict[int, PromptBudget] = {}
        self._trees: dict[tuple[int, tuple[int, ...], torch.device], PromptTree] = {}

    def begin(self, state: DecodingState) -> None:
        """Check the prompts against the model and read the latency curve."""
        model, rows = state.model, state.batch_size
        self.prompts.check(model, state.prompt_length)
        self._embed: Any = model.get_input_embeddings()
        self._table = self.prompts.embeddings.detach().to(state.device, model.dtype)  # (m e, H)
        self._forget(rows)
        self._plan, self._began, self._complete = 0, None, False
        if self._auto:
            if self._model is None or self._model() is not model:
                self._model, self._budgets, self._trees = weakref.ref(model), {}, {}
            if rows not in self._budgets:
                accuracy: Any = self.prompts.accuracy
                self._budgets[rows] = PromptBudget(accuracy.tolist(), pass_latency(model, rows))
            self._budgets[rows].begin(rows)

    def _forget(self, rows: int) -> None:
        """No guesses are at hand: state 0 for every row."""
        self._states = [0] * rows
        self._state: Tensor | None = None  # (B,) the same on the device
        self._guesses: Tensor | None = None  # (B, m * TOP_K)
        self._shape: PromptTree | None = None  # of the pass under way

    def propose(self, state: DecodingState) -> Proposal:
        """Lay the guesses at hand out as the tree of their state, with prompt tokens for the next ones."""
        trees = self._choose(state)
        if trees is None or state.remaining == 1:
            self._forget(state.batch_size)
            return Proposal.plain(state)
        at_hand = {min(d, len(trees)) for d, done in zip(self._states, state.finished, strict=True) if not done}
        key = (self._plan, tuple(sorted(at_hand)), state.device)
        if key not in self._trees:
            self._trees[key] = PromptTree(trees, at_hand, self.prompts.ensemble, state.device)
        shape = self._shape = self._trees[key]
        tree = shape.tree
        if self._guesses is None:
            tokens = state.root.expand(-1, tree.size).clone()  # (B, T)
        else:
            tokens = self._guesses[:, shape.guess]
            tokens[:, 0] = state.root[:, 0]
        embeds = self._embed(tokens)  # (B, T, H)
        embeds[:, shape.prompt_nodes] = self._table[shape.prompt_rows].to(embeds.dtype)
        candidates = None
        if self._state is not None and len(at_hand) > 1:
            candidates = tree.is_candidate & (tree.depth <= self._state[:, None])
        return Proposal(tree, tokens, candidates=candidates, embeds=embeds)

    def _choose(self, state: DecodingState) -> SparseTrees | None:
        """The trees for this pass; None for plain decoding."""
        if not self._auto:
            return self._fixed
        budget = self._budgets[state.batch_size]
        now = time.perf_counter()
        if self._began is not None and self._complete:
            budget.took(self._plan, now - self._began)
        if state.cache.length < max(state.cached):  # plain decoding takes the prompt along in its first pass
            self._plan, self._began = 0, None
        else:
            self._plan, self._began = budget.choose(state.finished), now
        self._complete = self._plan == 0 or self._guesses is not None  # without guesses a pass is smaller than its plan
        return budget.trees[self._plan]

    def observe(self, state: DecodingState, proposal: Proposal, logits: Tensor, accepted: Accepted) -> None:
        """Keep the guesses of the prompt tokens behind each row's accepted node."""
        shape = self._shape
        if proposal.embeds is None or shape is None:
            return
        if self._auto:
            for row, (d, nodes) in enumerate(zip(self._states, accepted.nodes, strict=True)):
                if nodes:
                    self._budgets[state.batch_size].learn(self._plan, row, d, len(nodes) - 1)
        self._states = [shape.hung_list[nodes[-1]] if nodes else 0 for nodes in accepted.nodes]
        last = accepted.paths[:, -1]  # (B,)
        self._state = shape.hung[last]
        nodes = shape.hung_nodes[last]  # (B, m, copies)
        rows = torch.arange(len(nodes), device=nodes.device)[:, None, None]
        # (B, m, V): of tokens that a row has not hung any node's logits, which no candidate is made of
        ahead = logits[rows, nodes].float().mean(2)
        best = ahead.topk(min(TOP_K, ahead.shape[-1]), -1).indices
        self._guesses = functional.pad(best, (0, TOP_K - best.shape[-1])).flatten(1)
