"""The generation loop of the Block Transformer: a step of the block decoder, then a block of local steps.

    prompt   pad tokens are put in front until its end is the end of a block
    block    B times: read the logits, choose a token, run the token decoder on it alone
    between  embed the B tokens, run the block decoder on that one position, drop the local cache

The host waits for the device once per block, where it asks whether all rows are done; what was written behind the end is cut off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.generation.utils import GenerateDecoderOnlyOutput

from tokenry.language.block_transformer_cache import BlockTransformerCache
from tokenry.layers.cache_argument import CACHE

if TYPE_CHECKING:
    from transformers import GenerationConfig
    from transformers.generation import StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

    from tokenry.language.block_transformer import BlockTransformerForCausalLM

__all__ = ["generate_blocks"]


def generate_blocks(
    model: BlockTransformerForCausalLM,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | Tensor:
    """Greedy search and sampling; ``generate`` calls it with what it has prepared.

    Args:
        model: The model.
        input_ids: ``(N, T)``, left-padded.
        logits_processor: ``LogitsProcessorList``, applied at every token.
        stopping_criteria: Asked at every token, read once per block.
        generation_config: ``generate``'s own.
        synced_gpus: Must be False.
        streamer: Receives the tokens of a block when it is full.
        **model_kwargs: ``attention_mask``, ``use_cache`` and, to go on from an earlier call, its cache.

    Raises:
        ValueError: Right padding, or an option that this model cannot honour; the message says what to change.
    """
    length = model.config.block_length
    mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get(CACHE)
    _check(generation_config, mask, cache, synced_gpus)
    new, mask, cache = _align(model, input_ids, mask, cache, generation_config)
    keep_cache = model_kwargs.get("use_cache") is not False
    aligned = new  # (N, whole blocks) for recomputation without a cache

    ends_with_token = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    pad: Any = generation_config._pad_token_tensor  # set wherever a row can end
    limit = stopping_criteria.max_length or float("inf")
    returned = generation_config.return_dict_in_generate
    scores: list[Tensor] | None = [] if returned and generation_config.output_scores else None
    raw: list[Tensor] | None = [] if returned and generation_config.output_logits else None
    ids, running = input_ids, torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    alive: list[Tensor] = []  # whether any row went on after each token of this block
    while True:
        if not keep_cache:
            cache = BlockTransformerCache(length, cache.fill)
        hidden, _ = model.extend(cache, (new if keep_cache else aligned).to(model.device), mask)
        logits = model.lm_head(hidden)[:, -1].to(dtype=torch.float32, device=ids.device)  # (N, V)
        chosen_from = logits_processor(ids, logits)
        if scores is not None:
            scores.append(chosen_from)
        if raw is not None:
            raw.append(logits)
        if generation_config.do_sample:
            tokens = torch.multinomial(chosen_from.softmax(-1), 1)[:, 0]
        else:
            tokens = chosen_from.max(-1).indices  # (N,); on a CPU twice as fast as argmax
        if ends_with_token:
            tokens = torch.where(running, tokens, pad)
        new = tokens[:, None]
        ids = torch.cat([ids, new], 1)
        running = running & ~stopping_criteria(ids, None if scores is None else tuple(scores))
        alive.append(running.any())
        if keep_cache:
            mask = None  # the cache knows what came before
        else:
            aligned = torch.cat([aligned, new], 1)
            mask = None if mask is None else F.pad(mask, (0, 1), value=1)
        if (cache.length + 1) % length and ids.shape[1] < limit:
            continue
        went_on = torch.stack(alive).tolist()
        extra = len(went_on) - 1 - went_on.index(False) if False in went_on else 0
        ids = ids[:, : ids.shape[1] - extra]
        if streamer is not None:
            for column in ids[:, ids.shape[1] - (len(alive) - extra) :].cpu().unbind(1):
                streamer.put(column)
        if False in went_on:
            break
        alive = []
    cache.crop(-extra)
    if streamer is not None:
        streamer.end()
    if not returned:
        return ids
    count = ids.shape[1] - input_ids.shape[1]
    fields: dict[str, Any] = {"sequences": ids, CACHE: cache if keep_cache else None}
    fields |= {
        name: None if kept is None else tuple(kept[:count]) for name, kept in (("scores", scores), ("logits", raw))
    }
    return GenerateDecoderOnlyOutput(**fields)


def _check(config: GenerationConfig, mask: Tensor | None, cache: Any, synced_gpus: bool) -> None:
    """Refuse what this loop cannot do, before anything runs."""
    for name in ("output_attentions", "output_hidden_states", "prefill_chunk_size", "cache_implementation"):
        if getattr(config, name, None):
            raise ValueError(
                f"{name}={getattr(config, name)!r}: the two decoders have positions of their own, so this has no meaning "
                "per token here; leave it unset"
            )
    if synced_gpus:
        raise ValueError("synced_gpus: rows stop by blocks here, so devices cannot be kept in step; leave it off")
    if cache is not None and not isinstance(cache, BlockTransformerCache):
        raise ValueError(
            f"{CACHE} must be a BlockTransformerCache that an earlier generate returned, got {type(cache).__name__}"
        )
    if mask is not None:
        mask = mask.bool()
        if not bool(mask[:, -1].all() & (mask[:, 1:] >= mask[:, :-1]).all()):
            raise ValueError(
                "the attention mask has gaps or right padding; the prompt must end where a block ends: set "
                'tokenizer.padding_side = "left"'
            )


def _align(
    model: BlockTransformerForCausalLM,
    input_ids: Tensor,
    mask: Tensor | None,
    cache: BlockTransformerCache | None,
    config: GenerationConfig,
) -> tuple[Tensor, Tensor | None, BlockTransformerCache]:
    """The tokens to begin with, from the beginning of a block, the mask of all of them, and the cache."""
    length, padding = model.config.block_length, model.config.padding
    if cache is not None and cache.length:
        cached = cache.get_seq_length()
        covered = mask.shape[1] if mask is not None else getattr(config, "_mask_length", input_ids.shape[1])
        new = input_ids[:, cached:] if covered == input_ids.shape[1] else input_ids
        if not new.shape[1]:
            raise ValueError(
                f"the cache holds {cached} tokens and the prompt has {input_ids.shape[1]}: give at least one token more"
            )
        return new, None if mask is None else F.pad(mask, (cache.fill, 0)), cache
    fill = -input_ids.shape[1] % length
    if mask is not None:  # whatever the tokenizer padded with, blocks are filled with the token known from training
        input_ids = input_ids.masked_fill(mask == 0, padding)
        mask = F.pad(mask, (fill, 0))
    cache = BlockTransformerCache(length) if cache is None else cache
    cache.fill = fill
    return F.pad(input_ids, (fill, 0), value=padding), mask, cache
