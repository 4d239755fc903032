"""Decode with drafts: the loop that verifies any proposer's tree in one pass of the model per step.

    pass:    nodes of the tree, at positions (root's position + depth), look at the cache and at their own ancestors
    accept:  which nodes the model itself would have produced (``tokenry.decoding.engine.acceptance``)
    commit:  clip at stop tokens and budget, move the accepted keys and values to the front, go on from the bonus token

    invariant before a pass: the cache holds every committed token of a row except its last one, the root

Rows of a batch accept different numbers of tokens. All live in one cache: row b's tokens stand without holes at its
front, what lies behind is masked, positions count each row's own tokens.
"""

from __future__ import annotations

import inspect
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from tokenry.decoding.engine.acceptance import Accepted, accept_greedy, accept_walk
from tokenry.decoding.engine.decoder_blocks import attention_is_exchanged, check_positions
from tokenry.decoding.engine.draft_cache import DraftCache
from tokenry.decoding.engine.output import DecodingOutput, KeptScores
from tokenry.decoding.engine.state import DecodingState
from tokenry.decoding.engine.stopping import NO_LIMIT, RowProcessors, RowStopping
from tokenry.layers.cache_argument import CACHE

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.generation.streamers import BaseStreamer

    from tokenry.decoding.engine.strategy import DraftStrategy

__all__ = ["check_decoding", "check_reach", "commit", "decode", "start_decoding"]


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
    check_reach(model, state)
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
                if pending.shape[1] and not proposal.tree.is_chain:
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
    if input_ids.shape[0] == 0:
        raise ValueError("the batch is empty: give at least one prompt")
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
    if attention_is_exchanged(model):
        raise ValueError(
            "draft trees need the model's own attention in every pass; leave the context that exchanged it (sparse reading "
            "of the cache) before generating with drafts"
        )
    attention = model.config._attn_implementation or "eager"
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


def check_reach(model: PreTrainedModel, state: DecodingState) -> None:
    """Refuse a text that a model's learned table of positions does not reach.

    Passes clamp positions to the table, for drafts that are thrown away; a text that is too long would be read wrongly.
    """
    new = 1 if state.budget == NO_LIMIT else state.budget - state.prompt_length
    check_positions(model, int(state.position.max()) + 1, new)


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
