"""FS-GEN: a fast small model proposes every token, a slow large one steps in where it is needed.

Zhang et al., "Fast and Slow Generating: An Empirical Study on Large and Small Language Models Collaborative Decoding",
2024, arXiv:2406.12295.

    s = S(prefix), l = L(prefix)             (B, V) logits, cut to the vocabulary that both have
    router(softmax(s)) says no               next token from s
    router says yes                          next token from fuse(l, s):
        oracle         l
        contrastive    s + beta (l - s), and -inf where l < max(l) + log(alpha)
        proxy          l + alpha (s_tuned - s); the router looks at s_tuned, which also answers when it says no
        speculative    S drafts K tokens, L checks them all in one pass, the first wrong one becomes L's own
    mismatch                                 the large model was asked, and the token is not S's first choice

With beta = 0.5 (the paper's) the contrastive rule is the mean of both logits; beta > 1 is contrast in the usual sense.
Speculative decoding is lossless while the router always asks; otherwise tokens between rounds go unchecked.

The loop is the draft engine's (``tokenry.decoding.engine``), the cached reading row by row ``RowReader``'s.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenry.decoding.collaboration import CollaborationTrace
from tokenry.decoding.collaboration_router import Router
from tokenry.decoding.engine.decoder_blocks import output_size
from tokenry.decoding.engine.draft_tree import DraftTree
from tokenry.decoding.engine.loop import check_reach
from tokenry.decoding.engine.output import DecodingOutput
from tokenry.decoding.engine.passes import Passes
from tokenry.decoding.engine.row_reader import RowReader, check_reader
from tokenry.decoding.engine.state import DecodingState, Proposal
from tokenry.decoding.engine.strategy import DraftStrategy
from tokenry.decoding.same_vocabulary import check_shared_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Collaboration", "CollaborationOutput", "collaborate", "fuse_contrastive", "fuse_proxy"]

Method = Literal["oracle", "contrastive", "speculative", "proxy"]
ALPHA = {"contrastive": 0.1, "proxy": 1.0}  # the paper's


def fuse_contrastive(large: Tensor, small: Tensor, alpha: float = 0.1, beta: float = 0.5) -> Tensor:
    """Small logits moved towards (beta < 1) or beyond (beta > 1) the large ones, among what the large finds plausible.

    Args:
        large: ``(..., V)`` logits.
        small: ``(..., V)``.
        alpha: Tokens less than ``alpha`` times as likely as the large model's best are ruled out; 0 < alpha <= 1.
        beta: 0 gives the small logits, 1 the large ones.

    Example:
        >>> fuse_contrastive(torch.tensor([2.0, 1.0, -9.0]), torch.tensor([0.0, 3.0, 9.0])).tolist()
        [1.0, 2.0, -inf]
    """
    fused = small + beta * (large - small)
    return fused.masked_fill(large < large.amax(-1, keepdim=True) + math.log(alpha), -torch.inf)


def fuse_proxy(large: Tensor, small: Tensor, tuned: Tensor, alpha: float = 1.0) -> Tensor:
    """Large logits with what tuning changed in a small model, all ``(..., V)``.

    Example:
        >>> fuse_proxy(torch.tensor([2.0, 1.0]), torch.tensor([0.0, 3.0]), torch.tensor([0.0, 5.0])).tolist()
        [2.0, 3.0]
    """
    return large + alpha * (tuned - small)


@dataclass
class CollaborationOutput(DecodingOutput):
    """What ``generate`` returns with ``return_dict_in_generate=True``: the engine's fields and who decided what."""

    collaboration: CollaborationTrace | None = None


def collaborate(
    large_model: PreTrainedModel,
    method: Method = "oracle",
    router: Router | None = None,
    *,
    tuned_model: PreTrainedModel | None = None,
    alpha: float | None = None,
    beta: float = 0.5,
    draft_tokens: int = 5,
    top_k: int = 0,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None = None,
) -> Collaboration:
    """A strategy for ``small.generate(custom_generate=...)``: the model that ``generate`` is called on proposes.

    Args:
        large_model: The model that is asked. It reads only the rows for which the router says so.
        method: ``"oracle"``, ``"contrastive"``, ``"speculative"`` or ``"proxy"`` (emulator fine-tuning).
        router: When to ask. Default ``Router.normal()``: at every token.
        tuned_model: For ``"proxy"``: a tuned copy of the small model.
        alpha: Contrastive: plausibility, default 0.1. Proxy: weight of the difference, default 1.0 (both the paper's).
        beta: Contrastive: weight of the large model. Default 0.5 (paper).
        draft_tokens: Speculative: tokens drafted per round, K. Default 5 (paper).
        top_k: Largest probabilities of the small model to keep per token in the trace. Default 0.
        tokenizers: Of the small and the large model, to be compared: an id must mean the same to both.

    Returns:
        The strategy; its ``trace`` and ``stats`` tell what the last call did.

    Raises:
        ValueError: An option is out of range, or the tokenizers differ.

    Example:
        >>> from tokenry.assets import load_model
        >>> small, tokenizer = load_model("draft")
        >>> inputs = tokenizer("It was the", return_tensors="pt", return_token_type_ids=False)
        >>> strategy = collaborate(load_model("small")[0], "oracle", Router.threshold(0.5))
        >>> out = small.generate(**inputs, custom_generate=strategy, max_new_tokens=8)
        >>> strategy.trace.total, 0 < strategy.trace.share_asked() <= 1
        (8, True)
    """
    methods = ("oracle", "contrastive", "speculative", "proxy")
    if method not in methods:
        raise ValueError(f"method must be one of {', '.join(methods)}, got {method!r}")
    if (method == "proxy") != (tuned_model is not None):
        given = "no tuned_model" if tuned_model is None else f"a tuned_model for {method!r}"
        raise ValueError(f"got {given}: 'proxy' needs the tuned small model as tuned_model, the others take none")
    weight = ALPHA.get(method, 1.0) if alpha is None else alpha
    if not 0 < weight <= (1 if method == "contrastive" else math.inf):
        raise ValueError(f"alpha={alpha}: it must be above 0, and at most 1 for 'contrastive', where it is a share")
    if not math.isfinite(beta) or beta < 0:
        raise ValueError(f"beta={beta}: it must be 0 (small model) or more; 1 is the large model")
    if draft_tokens < 1:
        raise ValueError(f"draft_tokens={draft_tokens}: a round drafts at least 1 token; for no drafts take 'oracle'")
    if top_k < 0:
        raise ValueError(f"top_k={top_k}: the number of probabilities to keep per token is 0 or more")
    if tokenizers is not None:
        check_shared_ids(*tokenizers)
    for model in (large_model, tuned_model):
        if model is not None:
            check_reader(model)
    return Collaboration(large_model, method, router or Router.normal(), tuned_model, weight, beta, draft_tokens, top_k)


@dataclass
class _Pass:
    """What one step leaves for the trace; n positions were judged by the proposer."""

    before: list[int]  # tokens of each row
    routed: list[bool]
    judged: list[int]  # of the n positions, how many count in each row
    choices: Tensor  # (B, n) first choices of the small model
    measures: Tensor  # (B, n, 3 + top_k): largest probability, gap, entropy, top_k largest


class _Decision(Passes):
    """In the engine's place for the target model's passes: the small model's logits, or the fused ones where asked."""

    def __init__(self, collaboration: Collaboration, state: DecodingState, mask: Tensor | None) -> None:
        super().__init__(state.model, state, mask)
        self.collaboration = collaboration

    def prefill(self, pending: Tensor, *, all_logits: bool) -> Tensor:
        """Nothing to do: each reader reads the prompt when it is first asked."""
        return pending

    def run(self, proposal: Proposal, pending: Tensor) -> Tensor:
        """The logits that decide, ``(B, T, V)``."""
        self.state.stats.nodes.append(proposal.tree.size)
        return self.collaboration.decide(self.state, proposal)


class Collaboration(DraftStrategy):
    """Collaborative decoding with the model that ``generate`` is called on as the small one; see ``collaborate``.

    Attributes:
        trace: ``CollaborationTrace`` of the last call.
        stats: ``DecodingStats`` of the last call: passes of the large model as ``forward_passes``, of the small one as
            ``draft_passes``.
    """

    trace: CollaborationTrace

    def __init__(
        self,
        large_model: PreTrainedModel,
        method: Method,
        router: Router,
        tuned_model: PreTrainedModel | None,
        alpha: float,
        beta: float,
        draft_tokens: int,
        top_k: int,
    ) -> None:
        super().__init__()
        self.large_model, self.tuned_model = large_model, tuned_model
        self.method, self.router = method, router
        self.alpha, self.beta, self.draft_tokens, self.top_k = alpha, beta, draft_tokens, top_k
        self._readers: dict[str, RowReader] = {}
        self._steps: list[_Pass] = []
        self._routed: list[int] = []  # rows for which the large model is asked in this step

    def __call__(self, *args: Any, token_streamer: Any = None, **kwargs: Any) -> Tensor | CollaborationOutput:
        """Run the decoding loop; the arguments are what ``generate`` has prepared (see ``DraftStrategy``)."""
        output = super().__call__(*args, token_streamer=token_streamer, **kwargs)
        if isinstance(output, Tensor):
            return output
        return CollaborationOutput(**output, collaboration=self.trace)

    def passes(self, state: DecodingState, mask: Tensor | None) -> Passes:
        """Decide with both models."""
        return _Decision(self, state, mask)

    def begin(self, state: DecodingState) -> None:
        """Check the models against each other and set up their caches."""
        self._readers, self._steps = {}, []
        models = {"large": self.large_model}
        if self.tuned_model is not None:
            models["tuned"] = self.tuned_model
        models["small"] = state.model
        widths = {name: output_size(model) for name, model in models.items()}
        self._vocabulary = min(widths.values())  # padding of the output layer differs between sizes of one family
        for name, wanted in ((f"the router {self.router.name!r}", self.router.top_k), ("the trace", self.top_k)):
            if wanted > self._vocabulary:
                raise ValueError(f"{name} wants the {wanted} largest of {self._vocabulary} probabilities; lower top_k")
        if widths["small"] > self._vocabulary:
            prompt = state.ids[:, : state.prompt_length]
            if state.start is not None:
                padding = torch.arange(state.prompt_length, device=state.device) < state.start[:, None]
                prompt = prompt.masked_fill(padding, 0)
            if (highest := int(prompt.max())) >= self._vocabulary:
                raise ValueError(
                    f"the prompt holds token {highest}, but one of the models has only {self._vocabulary} tokens; all "
                    "must use one tokenizer"
                )
        if state.before:
            raise ValueError("the large model must read the whole text: give input_ids with all that the cache holds")
        start = None if state.start is None else state.start.tolist()
        if start is not None and max(start) >= state.prompt_length:
            raise ValueError(f"row {start.index(max(start))} of the prompt is all padding; give it at least one token")
        for model in models.values():
            check_reach(model, state)
        if state.model.num_parameters() > self.large_model.num_parameters():
            warnings.warn(
                "the model that generate is called on proposes and is meant to be the small one, but it has "
                f"{state.model.num_parameters():,} parameters and large_model {self.large_model.num_parameters():,}",
                stacklevel=2,
            )
        self._readers = {
            name: RowReader(model, state.batch_size, start, state.cache.cache if name == "small" else None)
            for name, model in models.items()
        }

    def propose(self, state: DecodingState) -> Proposal:
        """Run the small model, ask the router, and draft where it says yes."""
        for reader in self._readers.values():
            reader.forget([n - 1 for n in state.lengths])  # rejected drafts
        running = [row for row, done in enumerate(state.finished) if not done]
        logits = self._read(state, self._proposer, running, state.lengths)[:, 0]  # (B, V)
        probabilities = logits.float().softmax(-1)
        if self.router.rule is None:
            self._routed = running if self.router.always else []
        else:
            asked = self.router(probabilities).tolist()
            self._routed = [row for row in running if asked[row]]
        depth = min(self.draft_tokens, state.remaining - 1) if self.method == "speculative" and self._routed else 0
        judged, choices = [self._measure(probabilities)], [logits.argmax(-1)]
        if depth:
            state.reserve(depth + 1)
            rows = torch.tensor(self._routed, device=state.device)
            behind = torch.tensor(state.lengths, device=state.device)[rows]
            for step in range(1, depth + 1):
                state.ids[rows, behind + step - 1] = choices[-1][rows]
                if step < depth:
                    more = self._read(state, self._proposer, self._routed, [n + step for n in state.lengths])[:, 0]
                    judged.append(self._measure(more.float().softmax(-1)))
                    choices.append(more.argmax(-1))
        self._logits = logits
        routed = [row in self._routed for row in range(state.batch_size)]
        self._steps.append(
            _Pass(
                list(state.lengths),
                routed,
                [max(depth, 1) if r else 1 for r in routed],
                torch.stack(choices, 1),
                torch.stack(judged, 1),
            )
        )
        if not depth:
            return Proposal.plain(state)
        tokens = torch.cat([state.root, self._steps[-1].choices], 1)  # (B, 1 + K)
        drafted = torch.tensor(routed, device=state.device)[:, None].expand_as(tokens)
        return Proposal(DraftTree.chain(depth).to(state.device), tokens, candidates=drafted)

    def decide(self, state: DecodingState, proposal: Proposal) -> Tensor:
        """Logits ``(B, T, V)``: fused where the large model is asked, the small model's own at the root elsewhere."""
        own, nodes = self._logits[:, None], proposal.tree.size  # (B, 1, V)
        if not self._routed:
            return own
        state.stats.forward_passes += 1
        large = self._read(state, "large", self._routed, [n + nodes - 1 for n in state.lengths], keep=nodes)
        if self.method == "contrastive":
            fused = fuse_contrastive(large, own, self.alpha, self.beta)
        elif self.method == "proxy":
            base = self._read(state, "small", self._routed, state.lengths)  # (B, 1, V)
            self._steps[-1].choices = base.argmax(-1)
            fused = fuse_proxy(large, base, own, self.alpha)
        else:
            fused = large
        if len(self._routed) < state.batch_size:
            routed = torch.tensor(self._steps[-1].routed, device=state.device)[:, None]
            fused[:, 0] = torch.where(routed, fused[:, 0], own[:, 0].to(fused.dtype))
        return fused

    def end(self, state: DecodingState) -> None:
        """Leave the small model's cache as ``generate`` would, write the trace, let go of the other caches."""
        if not self._readers:
            return
        small = self._readers["small"]
        small.forget([n - 1 for n in state.lengths])
        behind = [row for row, n in enumerate(state.lengths) if small.cached[row] < n - 1]
        if state.last is not None and behind:
            self._read(state, "small", behind, [n - 1 for n in state.lengths])
        small.release(min(small.cached))
        proposers = [reader for name, reader in self._readers.items() if name != "large"]
        large = self._readers["large"]
        state.stats.draft_passes = sum(reader.passes for reader in proposers)
        self.trace = _trace(state, self._steps, self.top_k, large, proposers)
        self._readers, self._steps = {}, []

    @property
    def _proposer(self) -> str:
        return "small" if self.tuned_model is None else "tuned"

    def _read(self, state: DecodingState, name: str, rows: list[int], ends: Sequence[int], keep: int = 1) -> Tensor:
        """Logits ``(B, keep, V)`` of one model, at least float32; zeros in rows that are not read."""
        logits = self._readers[name].read(state.ids, rows, [ends[row] for row in rows], keep)[..., : self._vocabulary]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if len(rows) == state.batch_size:
            return logits
        return logits.new_zeros(state.batch_size, *logits.shape[1:]).index_copy(
            0, torch.tensor(rows, device=logits.device), logits
        )

    def _measure(self, probabilities: Tensor) -> Tensor:
        """Largest probability, gap, entropy and the ``top_k`` largest of ``(B, V)``: ``(B, 3 + top_k)``."""
        best = probabilities.topk(min(max(self.top_k, 2), probabilities.shape[-1]), -1).values
        entropy = torch.special.entr(probabilities).sum(-1, keepdim=True)
        return torch.cat([best[:, :1], best[:, :1] - best[:, 1:2], entropy, best[:, : self.top_k]], -1)


def _trace(
    state: DecodingState, steps: list[_Pass], top_k: int, large: RowReader, proposers: list[RowReader]
) -> CollaborationTrace:
    """Put the steps' measures where their tokens ended up."""
    rows, longest = state.batch_size, max(state.lengths) - state.prompt_length
    lengths = torch.tensor([*(step.before for step in steps), state.lengths])  # (P + 1, B)
    emitted = torch.arange(longest) < (lengths[-1] - state.prompt_length)[:, None]  # (B, N)
    token = state.ids[:, state.prompt_length : state.prompt_length + longest].cpu().masked_fill(~emitted, -1)
    routed, mismatch = torch.zeros_like(emitted), torch.zeros_like(emitted)
    measures = torch.full((rows, longest, 3 + top_k), torch.nan)
    if steps:
        width = max(step.choices.shape[1] for step in steps)
        choices = torch.stack([F.pad(step.choices, (0, width - step.choices.shape[1])) for step in steps]).cpu()
        found = torch.stack([F.pad(s.measures, (0, 0, 0, width - s.measures.shape[1])) for s in steps]).cpu()
        asked = torch.tensor([step.routed for step in steps])  # (P, B)
        judged = torch.tensor([step.judged for step in steps])
        judged = torch.minimum(judged, lengths[1:] - lengths[:-1])  # what was clipped was not emitted
        step, row, place = (torch.arange(width) < judged[..., None]).nonzero(as_tuple=True)
        column = lengths[step, row] + place - state.prompt_length
        measures[row, column] = found[step, row, place]
        mismatch[row, column] = asked[step, row] & (choices[step, row, place] != token[row, column])
        first = place == 0
        routed[row[first], column[first]] = asked[step[first], row[first]]
    return CollaborationTrace(
        token,
        routed,
        mismatch,
        *measures[..., :3].unbind(-1),
        top=measures[..., 3:],
        large_passes=large.passes,
        large_tokens=large.tokens,
        small_passes=sum(reader.passes for reader in proposers),
        small_tokens=sum(reader.tokens for reader in proposers),
    )
