"""BatchLLM: generate for many known prompts at once, computing what they share once and filling memory, not a count.

Zheng et al., "BatchLLM: Optimizing Large Batched LLM Inference with Global Prefix Sharing and Throughput-oriented Token
Batching", 2024, arXiv:2412.03594.

    plan       groups of requests with one shared prefix each, most tokens saved          tokenry.decoding.batching.prefix_groups
    schedule   groups as units, those that decode longest for their prompts first; passes of one token per decoding
               request and chunks of prompts, bounded by key-value memory                 tokenry.decoding.batching.token_batching
    pass       all pieces in a row; attention over prefix and own tokens merged exactly   tokenry.decoding.batching.packed_attention

The text of a request is what it would be alone: this is scheduling only.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from tokenry.decoding.batching.packed_attention import PackedAttention, PackedPass, SlotPool
from tokenry.decoding.batching.prefix_groups import BatchPlan, as_new_tokens, as_tokens, plan_batch
from tokenry.decoding.batching.token_batching import BatchStats, Piece, TokenBatcher
from tokenry.decoding.engine.decoder_blocks import attention_is_exchanged, learned_positions
from tokenry.decoding.engine.stopping import RowStopping

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

__all__ = ["batch_generate", "parse_memory"]

UNITS = {"": 1, "B": 1} | {f"{p}{b}": s**n for b, s in (("iB", 1024), ("B", 1000)) for n, p in enumerate("KMGT", 1)}
POOLED = "keys and values of all requests live in one pool of its own"
# The library's own generate takes these; packed passes have no place for them.
REFUSED = {
    "assistant_model": "drafting is for one prompt at a time",
    "streamer": "results are handed out by on_result",
    "custom_generate": "this is a way of generating itself",
    "inputs_embeds": "prefixes are found in token ids",
    "cache": POOLED,
    "past_key_values": POOLED,
    "cache_implementation": POOLED,
    "attention_mask": "requests are given without padding",
    "return_dict_in_generate": "token ids are returned",
    "max_length": "give max_new_tokens",
}


def batch_generate(
    model: PreTrainedModel,
    requests: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    *,
    memory_limit: int | str | None = None,
    max_tokens_per_pass: int = 512,
    expected_new_tokens: int | Sequence[int] | None = None,
    grouping: Literal["optimal", "first-level", "none"] = "optimal",
    order: Literal["decode-heavy", "input"] = "decode-heavy",
    on_result: Callable[[int, Tensor], None] | None = None,
    **generation: Any,
) -> tuple[list[Tensor], BatchStats]:
    """Generate for all requests; each gets the text that ``model.generate`` gives it alone.

    Args:
        model: Causal language model of transformers, as it is; its attention is exchanged while this runs.
        requests: Token ids of every prompt, without padding.
        max_new_tokens: For all, or one number per request.
        memory_limit: Bytes for keys and values: a number, or text such as ``"8GiB"`` or ``"500MB"``. Never exceeded.
            Default: half of what is free on the model's device.
        max_tokens_per_pass: Above this no prompt tokens are added to a pass. Default 512.
        expected_new_tokens: What requests will generate, where that is known to be less than ``max_new_tokens``: more
            then run at once. Where it is too low and memory runs out, the last started request is computed again later.
        grouping: ``"optimal"``, ``"first-level"`` or ``"none"``; see ``plan_batch``.
        order: ``"decode-heavy"`` or ``"input"``; see ``plan_batch``.
        on_result: Called with the index and the ids of each request as soon as it ends.
        **generation: What ``generate`` takes: ``eos_token_id``, ``do_sample``, ``temperature``, ``repetition_penalty``,
            ``stop_strings`` with ``tokenizer``, ``logits_processor``, ``generation_config`` ... When sampling, every
            request draws from a generator of its own, seeded from torch's global one by its index, so that neither
            order nor memory change the draws.

    Returns:
        Prompt and new ids of every request ``(N,)``, in input order, and what happened.

    Raises:
        ValueError: Something cannot be run; the message says what, and what to do. Nothing has been run then.

    Example:
        >>> from tokenry.assets import load_model
        >>> model, tokenizer = load_model("draft")
        >>> texts = ["The sea was calm and the wind", "The sea was calm and the captain", "It was late"]
        >>> outs, stats = batch_generate(model, tokenizer(texts)["input_ids"], 8, memory_limit="100MB")
        >>> stats.prompt_tokens - stats.prefill_tokens > 0
        True
        >>> alone = model.generate(**tokenizer(texts[1:2], return_tensors="pt"), max_new_tokens=8, do_sample=False)
        >>> torch.equal(outs[1], alone[0])
        True
    """
    began = time.perf_counter()
    limit = parse_memory(memory_limit) if memory_limit is not None else _free_memory(model.device) // 2
    plan = plan_batch(requests, max_new_tokens, grouping=grouping, order=order)
    most = plan.new_tokens
    if expected_new_tokens is not None:
        expected = as_new_tokens(expected_new_tokens, len(most), "expected_new_tokens")
        plan = plan_batch(requests, list(map(min, expected, most)), grouping=grouping, order=order)
    texts = [list(as_tokens(request, number)) for number, request in enumerate(requests)]
    _check(model, texts, most, generation)
    rules = _Rules(model, texts, most, generation)
    attention = PackedAttention(model)
    with attention.attached():
        kv_bytes = attention.probe()
        slots = min(limit // kv_bytes, plan.held_together(most))
        batcher = TokenBatcher(replace(plan, kv_bytes=kv_bytes), slots, most, max_tokens_per_pass)
        pool = SlotPool(slots)
        attention.allocate(slots)
        results: dict[int, Tensor] = {}
        while not batcher.done:
            pieces = batcher.next_pass()
            _free(pool, batcher)
            tokens = [_tokens(plan, texts, piece) for piece in pieces]
            packed = PackedPass.build(pieces, tokens, [plan.prefix_tokens(p.group) for p in pieces], pool, model.device)
            logits = attention.run(packed)  # (E, V)
            for request, token in zip(packed.requests, rules.next_tokens(packed.requests, logits, texts), strict=True):
                texts[request].append(token)
                if batcher.emitted(request, stop=rules.stops(request, texts[request])):
                    results[request] = torch.tensor(texts[request], device=model.device)
                    if on_result is not None:
                        on_result(request, results[request])
            _free(pool, batcher)
    batcher.stats.seconds = time.perf_counter() - began
    return [results[request] for request in range(len(texts))], batcher.stats


def _free(pool: SlotPool, batcher: TokenBatcher) -> None:
    while batcher.freed:
        pool.give_back(batcher.freed.pop())


def _tokens(plan: BatchPlan, texts: list[list[int]], piece: Piece) -> Sequence[int]:
    if piece.request is None:
        return plan.groups[piece.group].prefix[piece.start : piece.start + piece.count]
    begin = plan.prefix_tokens(piece.group) + piece.start
    return texts[piece.request][begin : begin + piece.count]


class _Rules:
    """How the next token is chosen and when a request ends: what ``generate`` would prepare for each request alone.

    Plain greedy decoding with stop tokens and lengths is prepared once and decided for all rows together. Everything
    else may depend on a request's own tokens and is prepared and asked one by one.
    """

    def __init__(self, model: Any, texts: list[list[int]], most: Sequence[int], generation: dict[str, Any]) -> None:
        self.processors: list[LogitsProcessorList] = []
        self.stopping: list[RowStopping] = []
        self.config: GenerationConfig = model.generation_config
        self.device = model.device

        def keep(
            model: Any,
            input_ids: Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: StoppingCriteriaList,
            generation_config: GenerationConfig,
            **_: Any,
        ) -> Tensor:
            self.processors.append(logits_processor)
            self.stopping.append(RowStopping(stopping_criteria))
            self.config = generation_config
            return input_ids

        for text, new in zip(texts, most, strict=True):
            ids = torch.tensor([text], device=self.device)
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, custom_generate=keep, **generation
            )
            if len(self.stopping) == 1:
                self._check()
                first = self.stopping[0]
                self.plain = not (self.config.do_sample or self.processors[0] or first.others or first.timed)
            if self.plain:
                break
        if self.config.do_sample:
            seed = int(torch.randint(2**62, ()))
            self.generators = [torch.Generator(self.device).manual_seed(seed + i) for i in range(len(texts))]

    def _check(self) -> None:
        config = self.config
        if (config.num_beams or 1) > 1:
            raise ValueError(
                f"num_beams={config.num_beams}: requests follow one continuation each; leave num_beams at 1"
            )
        if (config.num_return_sequences or 1) > 1:
            raise ValueError(
                f"num_return_sequences={config.num_return_sequences}: give the request several times instead"
            )
        if getattr(config, "guidance_scale", None) not in (None, 1.0):
            raise ValueError("guidance_scale runs the model beside itself; leave it unset")

    def next_tokens(self, requests: list[int], logits: Tensor, texts: list[list[int]]) -> list[int]:
        """The next token after each of ``logits`` ``(E, V)``."""
        if self.plain:
            return logits.argmax(-1).tolist()
        chosen = []
        for request, row in zip(requests, logits.float(), strict=True):
            ids: Any = torch.tensor([texts[request]], device=self.device)
            scores = self.processors[request](ids, row[None])
            if self.config.do_sample:
                chosen.append(torch.multinomial(scores.softmax(-1)[0], 1, generator=self.generators[request]))
            else:
                chosen.append(scores[0].argmax(-1, keepdim=True))
        return torch.cat(chosen).tolist() if chosen else []

    def stops(self, request: int, text: list[int]) -> bool:
        """Whether the last token of ``text`` ends it (its length apart)."""
        rule = self.stopping[0 if self.plain else request]
        if text[-1] in rule.stop_tokens:
            return True
        if not rule.others and not rule.timed:
            return False
        ids = torch.tensor([text], device=self.device)
        return any(bool(c(ids, None).any()) for c in [*rule.others, *rule.timed])


def _check(model: Any, texts: list[list[int]], most: Sequence[int], generation: dict[str, Any]) -> None:
    """Refuse what cannot work, before anything runs."""
    for name, why in REFUSED.items():
        if generation.get(name) is not None:
            raise ValueError(f"{name} cannot be used in batch_generate: {why}")
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; batch_generate needs a decoder-only model")
    if attention_is_exchanged(model):
        raise ValueError(
            "batch_generate exchanges the model's attention itself; leave the context that has exchanged it (sparse reading "
            "of the cache) before"
        )
    if len({weight.device for weight in model.parameters()}) > 1:
        raise ValueError("the model's weights lie on several devices; load it onto one to run batch_generate")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    config = model.config.get_text_config(decoder=True)
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other:
        raise ValueError(
            f"{type(model).__name__} has layers of type {', '.join(sorted(other))}, which cannot share prefixes"
        )
    longest = max(range(len(texts)), key=lambda i: len(texts[i]) + most[i])
    length = len(texts[longest]) + most[longest] - 1
    rope = getattr(config, "rope_parameters", None)
    known = getattr(config, "max_position_embeddings", None)
    positions = learned_positions(config)
    if positions is not None and length > positions:
        raise ValueError(
            f"request {longest} reaches {length:,} tokens, the model has {positions:,} positions; shorten its prompt or "
            "lower max_new_tokens"
        )
    kinds = {part.get("rope_type") for part in _rope_parts(rope)} & {"dynamic", "longrope"}
    first = min(
        (part.get("original_max_position_embeddings") or known or length for part in _rope_parts(rope)), default=length
    )
    if kinds and length > first:
        raise ValueError(
            f"rope_type={kinds.pop()!r} turns all positions by the longest sequence of a pass, so requests beyond "
            f"{first:,} tokens would change the others; request {longest} reaches {length:,}"
        )
    for number, text in enumerate(texts):
        if max(text) >= vocabulary:
            raise ValueError(
                f"request {number} holds token {max(text)}, the model's vocabulary ends at {vocabulary - 1}"
            )


def _rope_parts(rope: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Rotary parameters, which some models keep one set of for each type of layer."""
    if not rope:
        return []
    return [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, dict)]


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def parse_memory(given: int | str) -> int:
    """Bytes from a number or a text with a unit.

    Raises:
        ValueError: It is neither, or not positive.

    Example:
        >>> parse_memory("1.5GiB"), parse_memory("500 MB"), parse_memory(4096)
        (1610612736, 500000000, 4096)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*", str(given), re.IGNORECASE)
    units = {name.lower(): size for name, size in UNITS.items()}
    size = int(float(match[1]) * units[match[2].lower()]) if match and match[2].lower() in units else 0
    if size < 1:
        raise ValueError(
            f"a memory limit is a positive number of bytes or a text such as '8GiB' or '500MB', got {given!r}"
        )
    return size
