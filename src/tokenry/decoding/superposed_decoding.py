"""Superposed Decoding: k drafts for the price of one pass per token.

Shen et al., "Superposed Decoding: Multiple Generations from a Single Autoregressive Inference Pass", 2024,
arXiv:2405.18400.

    x_t = sum_i w_i E[draft_i[t]]                   the model reads a mixture of the drafts' last tokens, w = softmax(L)
    p   = softmax(z / temperature), its n best      one distribution for all drafts
    g_d(v) = sum_i lambda_i P_i(v | draft_d's last i tokens)        n-grams tell the drafts apart
    log s_d(v) = (1 - alpha) log p(v) + alpha log g_d(v)            no v known to any n-gram: (1 - alpha) log p(v) - 200
    L  = the k best of L_d + log s_d(v) over drafts and tokens

The model has one row and one cache per prompt, whatever k is. Drafts after the first token are approximations: the text of
each is not what the model would have written alone.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.utils import ModelOutput

from tokenry.decoding.engine.decoder_blocks import check_positions
from tokenry.decoding.engine.statistics import DecodingStats
from tokenry.decoding.engine.stopping import RowStopping
from tokenry.decoding.ngram_model import NGramModel
from tokenry.layers.cache_argument import CACHE

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

__all__ = ["SuperposedDecoding", "SuperposedOutput"]

LAMBDAS = (0.01, 0.04, 0.15, 0.18, 0.12)
PENALTY = 200.0
ENDED = -1e7  # what a draft that has ended is worth among the living


@dataclass
class SuperposedOutput(ModelOutput):
    """Drafts of every prompt, the best first.

    Attributes:
        sequences: ``(B, k, N)`` prompts (left-padded) and drafts, padded behind a stop token.
        scores: ``(B, k)`` cumulative scores L; with n-grams they are not the model's likelihood.
        perplexities: ``(B, k)`` exp(-L / generated tokens, stop token included): what the drafts are ordered by.
        finished: ``(B, k)`` whether the draft ended with a stop token.
        alive_sequences: ``(B, k, N)`` the drafts that were still going on, by falling score.
        alive_scores: ``(B, k)``.
        finished_sequences: ``(B, k, N)`` the best ended ones; a row of padding where there are fewer.
        finished_scores: ``(B, k)``; -inf where there are fewer.
    """

    sequences: Tensor | None = None
    scores: Tensor | None = None
    perplexities: Tensor | None = None
    finished: Tensor | None = None
    alive_sequences: Tensor | None = None
    alive_scores: Tensor | None = None
    finished_sequences: Tensor | None = None
    finished_scores: Tensor | None = None


class SuperposedDecoding:
    """Several drafts in one pass per token, for any decoder-only language model that takes ``inputs_embeds``.

    Args:
        num_drafts: k, drafts per prompt.
        ngrams: Counts that tell the drafts apart; None leaves them out (later drafts get worse then).
        alpha: Weight of the n-grams, 0 to below 1. Default 0.54 (paper, prompts of 15 tokens).
        temperature: Of the model's distribution; sharp. Default 0.06 (paper).
        top_tokens: Candidates per step, at least 2 k. Default k squared, as in the paper for k = 3, but at least 2 k.
        lambdas: Weights of the context lengths 1, 2, ... Default: the paper's five.

    Attributes:
        stats: Counts of the last call.

    Raises:
        ValueError: A number does not fit; see the message.

    Example:
        >>> from tokenry.assets import load_model
        >>> model, tokenizer = load_model()
        >>> inputs = tokenizer("The people of the", return_tensors="pt", return_token_type_ids=False)
        >>> drafts = model.generate(**inputs, custom_generate=SuperposedDecoding(num_drafts=3), max_new_tokens=8)
        >>> drafts.shape[:2]
        torch.Size([1, 3])
    """

    def __init__(
        self,
        num_drafts: int = 3,
        ngrams: NGramModel | None = None,
        *,
        alpha: float = 0.54,
        temperature: float = 0.06,
        top_tokens: int | None = None,
        lambdas: Sequence[float] = LAMBDAS,
    ) -> None:
        if num_drafts < 1:
            raise ValueError(f"num_drafts={num_drafts} must be at least 1")
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be positive")
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha={alpha} must be at least 0 and below 1")
        self.top_tokens = top_tokens if top_tokens is not None else max(num_drafts**2, 2 * num_drafts)
        if self.top_tokens < 2 * num_drafts:
            raise ValueError(
                f"top_tokens={top_tokens} must be at least twice num_drafts={num_drafts}: the first step needs that many "
                "different tokens"
            )
        if ngrams is not None and len(lambdas) > ngrams.orders:
            raise ValueError(
                f"{len(lambdas)} lambdas need contexts of up to {len(lambdas)} tokens, the n-grams have up to {ngrams.orders}"
            )
        self.num_drafts, self.ngrams = num_drafts, ngrams
        self.alpha = alpha if ngrams is not None else 0.0
        self.temperature, self.lambdas = temperature, tuple(lambdas)
        self.stats = DecodingStats()

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        **model_kwargs: Any,
    ) -> Tensor | SuperposedOutput:
        """Run the decoding loop. ``generate`` calls this; the arguments are what it has prepared.

        Logits processors and stopping criteria are asked about the best draft of each prompt.

        Returns:
            ``(B, k, N)`` drafts, or a ``SuperposedOutput`` with ``return_dict_in_generate=True``.
        """
        config = generation_config or model.generation_config
        self._check(model, input_ids, config, model_kwargs)
        began, stopping = time.perf_counter(), RowStopping(stopping_criteria or StoppingCriteriaList())
        processors: Any = logits_processor or LogitsProcessorList()
        rows, width = input_ids.shape
        pad = config.pad_token_id if config.pad_token_id is not None else min(stopping.stop_tokens, default=0)
        drafts = _Drafts(input_ids, self.num_drafts, stopping.stop_tokens, pad)
        mask = model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        cache = model_kwargs.get(CACHE) or DynamicCache(config=model.config)
        embed = model.get_input_embeddings()
        keeps = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        feed: dict[str, Tensor] = {"input_ids": input_ids}
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        steps = stopping.max_length - width
        check_positions(model, int(positions.max()) + 1, steps)
        self.stats = DecodingStats()
        for step in range(steps):
            out = model(**feed, attention_mask=mask, position_ids=positions, **{CACHE: cache}, use_cache=True, **keeps)
            logits = processors(drafts.alive[:, 0], out.logits[:, -1].float())  # (B, V)
            drafts.extend(*self._candidates(logits, drafts, mask), first=step == 0)
            self.stats.forward_passes += 1
            best = drafts.alive[:, 0]
            if stopping.others and bool(stopping.others(best, None).all()):  # pyrefly: ignore
                break
            if any(bool(c(best, None).any()) for c in stopping.timed):  # pyrefly: ignore
                break
            vectors = embed(drafts.alive[:, :, -1]).float()  # (B, k, H)
            mixed = (drafts.scores.softmax(-1)[..., None] * vectors).sum(1, keepdim=True)  # (B, 1, H)
            feed = {"inputs_embeds": mixed.to(model.dtype)}
            mask = torch.cat([mask, mask.new_ones(rows, 1)], 1)
            positions = positions[:, -1:] + 1
        output = drafts.output()
        self.stats.tokens = rows * self.stats.forward_passes
        self.stats.accepted = [(1,) * rows] * self.stats.forward_passes
        self.stats.nodes = [1] * self.stats.forward_passes
        self.stats.seconds = time.perf_counter() - began
        return output if config.return_dict_in_generate else output["sequences"]

    def _check(
        self, model: PreTrainedModel, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> None:
        if model.config.is_encoder_decoder:
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder; superposed decoding needs a decoder-only model"
            )
        if not {"inputs_embeds", "position_ids"} <= set(inspect.signature(model.forward).parameters):
            raise ValueError(
                f"{type(model).__name__} takes no inputs_embeds or no position_ids; superposed decoding feeds a mix of embeddings"
            )
        if input_ids.shape[0] == 0:
            raise ValueError("the batch is empty: give at least one prompt")
        if input_ids.shape[1] == 0 or model_kwargs.get("inputs_embeds") is not None:
            raise ValueError("superposed decoding needs the prompt as input_ids with at least one token")
        if config.do_sample:
            raise ValueError("superposed decoding is deterministic; leave do_sample at False and set temperature here")
        if (config.num_beams or 1) > 1 or (config.num_return_sequences or 1) > 1:
            raise ValueError("ask for several texts with num_drafts; leave num_beams and num_return_sequences at 1")
        if config.use_cache is False:
            raise ValueError("superposed decoding goes on from the key/value cache; leave use_cache at True")
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        if self.top_tokens > vocabulary:
            raise ValueError(f"top_tokens={self.top_tokens} is more than the vocabulary of {vocabulary}")
        if self.ngrams is not None and not _fits(self.ngrams.vocab_size, vocabulary):
            raise ValueError(
                f"the n-grams were counted with a vocabulary of {self.ngrams.vocab_size}, the model has {vocabulary}; count them "
                "with the model's own tokenizer"
            )
        cache = model_kwargs.get(CACHE)
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError("superposed decoding starts from an empty cache; leave it unset")

    def _candidates(self, logits: Tensor, drafts: _Drafts, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The step's tokens ``(B, n)`` and their log-scores under every draft ``(B, k, n)``."""
        kept = (logits / self.temperature).topk(self.top_tokens)
        log_p = kept.values.log_softmax(-1)[:, None]  # (B, 1, n); a softmax of the vocabulary first would underflow
        if self.ngrams is None:
            return kept.indices, log_p.expand(-1, self.num_drafts, -1)
        longest = len(self.lambdas)
        rows, k, width = drafts.alive.shape
        history = drafts.alive[..., -longest:].flatten(0, 1).cpu().numpy()  # (B k, H)
        tokens = kept.indices[:, None].expand(-1, k, -1).flatten(0, 1).cpu().numpy()  # (B k, n)
        length = mask.sum(-1) + (width - mask.shape[1])  # tokens of each row, padding apart
        enough = length.cpu().numpy().repeat(k)[:, None]
        g = np.zeros(tokens.shape)
        for order, weight in enumerate(self.lambdas, 1):
            if order <= history.shape[1]:
                g += weight * self.ngrams.probabilities(history, tokens, order) * (enough >= order)
        log_g = torch.from_numpy(g).to(logits).log().view(rows, k, -1)
        unknown = (log_g == -torch.inf).all(-1, keepdim=True)
        mixed = (1 - self.alpha) * log_p + self.alpha * log_g
        return kept.indices, torch.where(unknown, (1 - self.alpha) * log_p - PENALTY, mixed)


def _fits(counted: int, vocabulary: int) -> bool:
    """Whether n-grams of ``counted`` tokens belong to a model whose embedding may be padded to ``vocabulary`` rows."""
    return counted <= vocabulary < counted + 1024


class _Drafts:
    """The k drafts of every prompt: those that go on, and the best of those that have ended."""

    def __init__(self, prompts: Tensor, k: int, stop_tokens: set[int], pad: int) -> None:
        rows, self.width = prompts.shape
        self.k, self.pad = k, pad
        self.stops = torch.tensor(sorted(stop_tokens), device=prompts.device)
        self.alive = prompts[:, None].expand(-1, k, -1)  # (B, k, N)
        self.scores = torch.zeros(rows, k, device=prompts.device)  # L
        self.finished = torch.full_like(self.alive, pad)  # (B, k, N), padded behind the stop token
        self.finished_scores = torch.full_like(self.scores, -torch.inf)
        self.finished_tokens = torch.ones(rows, k, device=prompts.device)  # generated tokens, the stop token included

    @property
    def new_tokens(self) -> int:
        """Tokens generated so far."""
        return self.alive.shape[2] - self.width

    def extend(self, tokens: Tensor, log_scores: Tensor, *, first: bool) -> None:
        """Choose the k best continuations. At first all drafts are alike, so only draft 0 is continued."""
        n = tokens.shape[1]
        total = self.scores[..., None] + log_scores  # (B, k, n)
        if first:
            total = total[:, :1]
        best = total.flatten(1).topk(2 * self.k)  # (B, 2k)
        parent, token = best.indices // n, tokens.gather(1, best.indices % n)
        longer = torch.cat([_pick(self.alive, parent), token[..., None]], -1)  # (B, 2k, N + 1)
        stopped = torch.isin(token, self.stops)
        going = best.values.masked_fill(stopped, ENDED).topk(self.k)
        self.alive, self.scores = _pick(longer, going.indices), going.values
        if len(self.stops):
            ended = best.values.masked_fill(~stopped, -torch.inf)
            every = torch.cat([self.finished_scores, ended], 1).topk(self.k)
            grown = torch.nn.functional.pad(self.finished, (0, 1), value=self.pad)
            lengths = torch.cat([self.finished_tokens, torch.full_like(ended, self.new_tokens)], 1)
            self.finished = _pick(torch.cat([grown, longer], 1), every.indices)
            self.finished_scores, self.finished_tokens = every.values, lengths.gather(1, every.indices)

    def output(self) -> SuperposedOutput:
        """Everything found, the k best by perplexity first."""
        ended = torch.nn.functional.pad(
            self.finished, (0, self.alive.shape[2] - self.finished.shape[2]), value=self.pad
        )
        finished = ended.masked_fill((self.finished_scores == -torch.inf)[..., None], self.pad)
        scores, ids = torch.cat([self.scores, self.finished_scores], 1), torch.cat([self.alive, finished], 1)
        tokens = torch.cat([torch.full_like(self.scores, max(self.new_tokens, 1)), self.finished_tokens], 1)
        perplexity = (-scores / tokens).exp()
        order = perplexity.argsort(dim=1, stable=True)[:, : self.k]
        return SuperposedOutput(
            sequences=_pick(ids, order),
            scores=scores.gather(1, order),
            perplexities=perplexity.gather(1, order),
            finished=order >= self.k,
            alive_sequences=self.alive,
            alive_scores=self.scores,
            finished_sequences=finished,
            finished_scores=self.finished_scores,
        )


def _pick(ids: Tensor, which: Tensor) -> Tensor:
    """Rows ``which`` ``(B, m)`` of ``ids`` ``(B, n, N)``."""
    return ids.gather(1, which[..., None].expand(-1, -1, ids.shape[2]))
