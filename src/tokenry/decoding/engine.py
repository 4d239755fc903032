"""Decode with drafts: the loop that verifies any proposer's tree in one pass of the model per step.

    pass:    nodes of the tree, at positions (root's position + depth), look at the cache and at their own ancestors
    accept:  which nodes the model itself would have produced (``tokenry.decoding.acceptance``)
    commit:  clip at stop tokens and budget, move the accepted keys and values to the front, go on from the bonus token

    invariant before a pass: the cache holds every committed token of a row except its last one, the root

Rows of a batch accept different numbers of tokens. All live in one cache: row b's tokens stand without holes at its
front, what lies behind is masked, positions count each row's own tokens.
"""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from tokenry.decoding.acceptance import Accepted, accept_greedy, accept_walk
from tokenry.decoding.draft_cache import DraftCache
from tokenry.decoding.draft_tree import DraftTree
from tokenry.decoding.passes import Passes
from tokenry.decoding.statistics import DecodingStats
from tokenry.decoding.stopping import RowProcessors, RowStopping
from tokenry.layers.cache_argument import CACHE

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.generation.streamers import BaseStreamer

__all__ = [
    "DecodingOutput",
    "DecodingState",
    "DraftStrategy",
    "KeptScores",
    "Proposal",
    "check_decoding",
    "commit",
    "start_decoding",
]


@dataclass
class DecodingOutput(GenerateDecoderOnlyOutput):
    """What ``generate`` returns with ``return_dict_in_generate=True``: the library's fields and the counts."""

    decoding_stats: DecodingStats | None = None


@dataclass
class Proposal:
    """A draft for the next pass.

    Attributes:
        tree: Its structure, the same for all rows.
        tokens: ``(B, T)``, the root's first. A node that a row does not use may hold any valid token.
        candidates: ``(B, T)`` bool: False where a row has no candidate. None: the tree's own marks.
        draft_probs: ``(B, T, V)``: the distribution that each node's token was drawn from, for speculative sampling.
            None where the draft is deterministic.
        embeds: ``(B, T, H)``: fed instead of ``tokens`` (soft prompt tokens, for example).
    """

    tree: DraftTree
    tokens: Tensor
    candidates: Tensor | None = None
    draft_probs: Tensor | None = None
    embeds: Tensor | None = None


@dataclass
class DecodingState:
    """What a proposer may read.

    Attributes:
        model: The target model.
        ids: ``(B, capacity)`` tokens; row b's are ``ids[b, : lengths[b]]``, left padding included.
        lengths: Tokens of each row, the root included.
        prompt_length: Width of the prompt.
        root: ``(B, 1)`` the last committed tokens.
        finished: Rows that are done.
        budget: Length that no row may exceed.
        cache: The engine's cache, which holds all but the root.
        do_sample: Whether tokens are drawn.
        last: Decisions of the pass before; None before the first.
        stats: Counts so far.
    """

    model: PreTrainedModel
    ids: Tensor
    lengths: list[int]
    prompt_length: int
    root: Tensor
    finished: list[bool]
    budget: int
    cache: DraftCache
    do_sample: bool
    logits_processor: Any  # a LogitsProcessorList
    generation_config: GenerationConfig
    start: Tensor | None  # (B,) left padding of each row; None: no row has any
    position: Tensor  # (B, 1) position of the root
    before: int  # cached positions that stand before ids (0 unless a cache was handed over without its tokens)
    pad: int
    last: Accepted | None = None
    stats: DecodingStats = field(default_factory=DecodingStats)

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.lengths)

    @property
    def cached(self) -> list[int]:
        """Cached positions of each row."""
        return [self.before + n - 1 for n in self.lengths]

    @property
    def remaining(self) -> int:
        """Tokens that the longest-running row may still emit."""
        return self.budget - min(n for n, done in zip(self.lengths, self.finished, strict=True) if not done)

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` more tokens in ``ids``."""
        need = max(self.lengths) + tokens
        if need > self.ids.shape[1]:
            more = self.ids.new_full((self.ids.shape[0], max(need, 2 * self.ids.shape[1])), self.pad)
            more[:, : self.ids.shape[1]] = self.ids
            self.ids = more

    @property
    def device(self) -> torch.device:
        """Device of the tokens."""
        return self.ids.device


class DraftStrategy:
    """A way to draft, and at the same time what ``generate(custom_generate=...)`` takes.

    A subclass overrides ``propose`` and, where it needs to, ``begin``, ``observe`` and ``end``. Verification, batches,
    sampling, stopping, streaming and counting are the engine's.

    Attributes:
        stats: Counts of the last call.
        wants_prompt_logits: Ask for ``observe_prompt``; the prompt's logits then cost a matrix product of their own.
    """

    wants_prompt_logits: bool = False

    def __init__(self) -> None:
        self.stats = DecodingStats()

    def begin(self, state: DecodingState) -> None:
        """Called once per ``generate``, before anything runs: check the model, make room."""

    def observe_prompt(self, state: DecodingState, ids: Tensor, logits: Tensor) -> None:
        """The prompt but its last token ``(B, N)``, and its logits ``(B, N, V)``, if ``wants_prompt_logits``."""

    def passes(self, state: DecodingState, mask: Tensor | None) -> Passes:
        """What turns a draft into the logits that decide: passes of the model, unless a strategy asks others too."""
        return Passes(state.model, state, mask)

    def propose(self, state: DecodingState) -> Proposal:
        """The draft for the next pass; ``Proposal(DraftTree.chain(0), state.root)`` is plain decoding."""
        raise NotImplementedError(f"{type(self).__name__} must override propose")

    def observe(self, state: DecodingState, proposal: Proposal, logits: Tensor, accepted: Accepted) -> None:
        """Learn from a pass: logits ``(B, T, V)`` of all nodes. Not called after the last pass."""

    def end(self, state: DecodingState) -> None:
        """Called once at the end, also after an error."""

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        token_streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Tensor | DecodingOutput:
        """Run the decoding loop. ``generate`` calls this; the arguments are what it has prepared.

        Args:
            model: Causal language model.
            input_ids: ``(B, N)``, left-padded.
            logits_processor: Applied at every node, on the node's own prefix.
            stopping_criteria: Asked after every token.
            generation_config: ``generate``'s own.
            token_streamer: Like ``generate``'s ``streamer``, which a custom strategy is not given: receives the
                prompt, then every token in order, then ``end()``.
            **model_kwargs: ``attention_mask``, ``position_ids``, the cache, as ``generate`` prepared them.

        Raises:
            ValueError: The model, the cache or an option cannot be used with drafts; the message says what to change.
        """
        return decode(
            self,
            model,
            input_ids,
            logits_processor or LogitsProcessorList(),
            stopping_criteria or StoppingCriteriaList(),
            generation_config or model.generation_config,
            token_streamer,
            model_kwargs,
        )


def decode(
    strategy: DraftStrategy,
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
    model_kwargs: dict[str, Any],
) -> Tensor | DecodingOutput:
    """The loop behind ``DraftStrategy.__call__``."""
    check_decoding(model, input_ids, config, model_kwargs)
    began = time.perf_counter()
    stopping = RowStopping(stopping_criteria)
    state, pending, mask = start_decoding(model, input_ids, logits_processor, config, stopping.max_length, model_kwargs)
    processors = RowProcessors(state)
    plain_greedy = not state.do_sample and not logits_processor
    keep = KeptScores(config)
    strategy.stats = state.stats
    if streamer is not None:
        streamer.put(input_ids.cpu())
    streamed = input_ids.shape[1]
    runner = strategy.passes(state, mask)
    with torch.no_grad():
        try:
            strategy.begin(state)
            if pending.shape[1] and strategy.wants_prompt_logits:
                strategy.observe_prompt(state, pending, runner.prefill(pending, all_logits=True))
                pending = pending[:, :0]
            while True:
                proposal = strategy.propose(state)
                if pending.shape[1] and proposal.tree.size > 1:
                    runner.prefill(pending, all_logits=False)
                    pending = pending[:, :0]
                logits = runner.run(proposal, pending)  # (B, T, V)
                pending = pending[:, :0]
                if plain_greedy:
                    accepted = accept_greedy(proposal.tree, proposal.tokens, logits, proposal.candidates)
                else:
                    state.reserve(proposal.tree.max_depth + 1)
                    accepted = accept_walk(
                        proposal.tree,
                        proposal.tokens,
                        logits,
                        processors,
                        do_sample=state.do_sample,
                        candidates=proposal.candidates,
                        draft_probs=proposal.draft_probs,
                        active=None if not any(state.finished) else [not f for f in state.finished],
                    )
                done = commit(state, accepted, logits, stopping, keep)
                if streamer is not None:
                    streamed = _stream(streamer, state, streamed)
                if done:
                    break
                strategy.observe(state, proposal, logits, accepted)
        finally:
            state.stats.seconds = time.perf_counter() - began
            strategy.end(state)
            state.cache.release()
    sequences = state.ids[:, : max(state.lengths)].clone()
    if streamer is not None:
        streamer.end()
    state.stats.tokens = sum(state.lengths) - state.prompt_length * state.batch_size
    state.stats.seconds = time.perf_counter() - began
    if not config.return_dict_in_generate:
        return sequences
    steps = sequences.shape[1] - state.prompt_length
    fields: dict[str, Any] = {"sequences": sequences, CACHE: state.cache.cache}
    fields |= {name: keep.stacked(name, steps) for name in ("scores", "logits")}
    return DecodingOutput(**fields, decoding_stats=state.stats)


def check_decoding(
    model: PreTrainedModel, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]
) -> None:
    """Refuse what cannot work, before anything runs."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder; draft trees need a decoder-only causal language model")
    if model_kwargs.get("inputs_embeds") is not None or input_ids.shape[1] == 0:
        raise ValueError("draft trees need the prompt as input_ids with at least one token, not as inputs_embeds")
    if (config.num_beams or 1) > 1:
        raise ValueError(f"num_beams={config.num_beams}: drafts follow one continuation; leave num_beams at 1")
    if config.use_cache is False or model_kwargs.get("use_cache") is False:
        raise ValueError("use_cache=False: drafts are verified against the key/value cache; leave use_cache at True")
    if getattr(config, "guidance_scale", None) not in (None, 1.0):
        raise ValueError(
            "guidance_scale runs the model inside a logits processor, step by step; leave it unset with draft trees"
        )
    if config.output_attentions or config.output_hidden_states:
        raise ValueError(
            "output_attentions and output_hidden_states have no meaning per token in a tree pass; leave them off"
        )
    attention = model.config._attn_implementation or "eager"
    if attention.startswith("tokenry_"):
        raise ValueError(
            "draft trees need the model's own attention in every pass; leave the context that exchanged it (sparse reading "
            "of the cache) before generating with drafts"
        )
    if attention not in ("sdpa", "eager"):
        raise ValueError(
            f"attn_implementation={attention!r} cannot take the mask of a draft tree; load the model with "
            'attn_implementation="sdpa" (or "eager")'
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{name} takes no position_ids, so siblings of a draft tree cannot share a position")
    cache = model_kwargs.get(CACHE)
    if cache is None or not hasattr(cache, "layers"):
        raise ValueError(f"draft trees need a DynamicCache, got {type(cache).__name__}; leave {CACHE} unset")


def start_decoding(
    model: PreTrainedModel,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    config: GenerationConfig,
    max_length: int,
    model_kwargs: dict[str, Any],
) -> tuple[DecodingState, Tensor, Tensor | None]:
    """The state before the first pass, the prompt tokens that the cache lacks, and the 2-D padding mask."""
    rows, width = input_ids.shape
    cache = DraftCache(model_kwargs[CACHE])
    mask = model_kwargs.get("attention_mask")
    if mask is not None and bool(mask.all()):
        mask = None
    seen = mask.shape[1] if mask is not None else getattr(config, "_mask_length", None) or width
    cached = cache.length
    if seen == width:  # the whole sequence was given, the cache may hold a beginning of it
        if cached >= width:
            cache.truncate(width - 1)
            cached = width - 1
        pending = input_ids[:, cached:-1]
    else:  # only what is new was given
        pending = input_ids[:, :-1]
    total = cached + pending.shape[1] + 1
    positions = model_kwargs.get("position_ids")
    if positions is None:
        full = torch.ones(rows, total, dtype=torch.long, device=input_ids.device) if mask is None else mask
        positions = (full.cumsum(-1) - 1).clamp_min(0)
    pad = config.pad_token_id
    if pad is None:
        stops = config.eos_token_id
        pad = (stops[0] if isinstance(stops, (list, tuple)) else stops) if stops is not None else 0
    start = None
    if mask is not None:
        start = total - mask.sum(-1)  # (B,)
        if not torch.equal(mask.bool(), torch.arange(total, device=mask.device) >= start[:, None]):
            raise ValueError('the attention mask has gaps or right padding; set tokenizer.padding_side = "left"')
    ids = input_ids.new_full((rows, min(max_length, width + 4096) + 64), int(pad))
    ids[:, :width] = input_ids
    state = DecodingState(
        model=model,
        ids=ids,
        lengths=[width] * rows,
        prompt_length=width,
        root=input_ids[:, -1:],
        finished=[False] * rows,
        budget=max_length,
        cache=cache,
        do_sample=bool(config.do_sample),
        logits_processor=processors,
        generation_config=config,
        start=start,
        position=positions[:, -1:].expand(rows, 1),
        before=total - width,
        pad=int(pad),
    )
    return state, pending, mask


def commit(state: DecodingState, accepted: Accepted, logits: Tensor, stopping: RowStopping, keep: KeptScores) -> bool:
    """Take the accepted tokens over, clipped; returns whether every row is done."""
    rows = state.batch_size
    counts, done = [0] * rows, list(state.finished)
    for b in range(rows):
        if not state.finished[b]:
            counts[b], done[b] = stopping.clip(accepted.tokens[b], state.lengths[b])
    state.stats.accepted.append(
        tuple(0 if finished else n for n, finished in zip(accepted.counts, state.finished, strict=True))
    )
    width = max(counts)
    state.reserve(width)
    emitted = accepted.emitted[:, :width]
    if rows == 1:
        state.ids[:, state.lengths[0] : state.lengths[0] + width] = emitted
    else:
        behind = torch.tensor(state.lengths, device=state.device)[:, None] + torch.arange(width, device=state.device)
        frozen = torch.tensor(state.finished, device=state.device)[:, None]
        state.ids.scatter_(1, behind, emitted.masked_fill(frozen, state.pad))
    if stopping.others or stopping.timed:
        stopping.ask(state, counts, done)
        width = max(counts)
    keep.add(logits, accepted, counts)
    if rows == 1:
        path = accepted.nodes[0][:width]
        state.cache.keep_path(path, accepted.paths[0, :width])
        state.root = accepted.emitted[:, width - 1 : width]
        state.position = state.position + width
    else:
        cached = state.cached
        ends = [state.before + n + c - 1 for n, c in zip(state.lengths, counts, strict=True)]
        straight = list(range(width))
        if all(n == state.cache.length and c == width for n, c in zip(cached, counts, strict=True)) and all(
            nodes[:width] == straight for nodes in accepted.nodes
        ):
            state.cache.length += width  # everything stands where it must already
        else:
            state.cache.keep_rows(accepted.paths[:, :width], torch.tensor(cached, device=state.device), max(ends))
        taken = torch.tensor(counts, device=state.device)[:, None]
        state.root = accepted.emitted.gather(1, (taken - 1).clamp_min(0))
        state.position = state.position + taken
    for b in range(rows):
        state.lengths[b] += counts[b]
        if done[b] and not state.finished[b]:
            state.ids[b, state.lengths[b] :] = state.pad
    state.finished = done
    state.last = accepted
    return all(done)


def _stream(streamer: BaseStreamer, state: DecodingState, streamed: int) -> int:
    """Hand over every column that all rows have reached; returns how many columns have been handed over."""
    running = [n for n, done in zip(state.lengths, state.finished, strict=True) if not done]
    reached = min(running) if running else max(state.lengths)
    for column in state.ids[:, streamed:reached].cpu().unbind(1):
        streamer.put(column)
    return max(streamed, reached)


class KeptScores:
    """Scores and logits of the emitted tokens, where ``generate`` was asked for them."""

    def __init__(self, config: GenerationConfig) -> None:
        dictionary = bool(config.return_dict_in_generate)
        self.wanted = {
            "scores": dictionary and bool(config.output_scores),
            "logits": dictionary and bool(config.output_logits),
        }
        self.rows: dict[str, list[list[Tensor]]] = {name: [] for name, wanted in self.wanted.items() if wanted}

    def add(self, logits: Tensor, accepted: Accepted, counts: list[int]) -> None:
        """Keep what belongs to each row's first ``counts[b]`` tokens of a pass."""
        for name, rows in self.rows.items():
            if name == "scores" and accepted.scores is not None:
                found = torch.stack(accepted.scores, 1)  # (B, A, V)
            else:
                index = accepted.paths[..., None].expand(-1, -1, logits.shape[-1])
                found = logits.gather(1, index).float()
            if not rows:
                rows.extend([] for _ in counts)
            for row, values, count in zip(rows, found, counts, strict=True):
                row.extend(values[:count].unbind(0))

    def stacked(self, name: str, steps: int) -> tuple[Tensor, ...] | None:
        """Per emitted token ``(B, V)``; zeros where a row was done already."""
        if not self.wanted[name]:
            return None
        rows = self.rows[name]
        nothing = torch.zeros_like(rows[0][0])
        return tuple(torch.stack([row[i] if i < len(row) else nothing for row in rows]) for i in range(steps))
