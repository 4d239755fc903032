"""What a causal language model says about every token of a text: the material of zero-shot detectors.

For the tokens x_0 ... x_n of one text and a scoring model p, with ℓ_t = ln p(x_t | x_<t), t = 1 ... n. The first
token (where the tokenizer puts one there, the beginning-of-sequence token) only conditions and is never scored.
With a reference model q (p itself unless another is given) every position further has

    μ_t = Σ_v q_t(v) ln p_t(v)          σ²_t = Σ_v q_t(v) (ln p_t(v))² - μ_t²
    ℓ̃_t = ln p_t(x̃_t),  x̃_t ~ q(· | x_<t)     drawn at every position alone, given the real prefix

so one forward pass of each model serves any number of draws.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from tokenry.assets.embedded import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TokenScorer", "TokenStatistics", "token_log_probs", "token_statistics"]

Field = Literal["log_probs", "ranks", "entropies", "expected", "variances", "sampled"]
CHUNK = 1 << 22  # logits held in float32 at a time


@dataclass(frozen=True)
class TokenStatistics:
    """What is known of each of the n scored tokens of one text; None where it was not asked for.

    Attributes:
        log_probs: ℓ, (n,), natural logarithm.
        ranks: Place of the token among all by probability, from 1, (n,).
        entropies: Entropy of the scoring model's prediction in nats, (n,).
        expected: μ, (n,).
        variances: σ², (n,).
        sampled: ℓ̃ of S draws, (S, n).
    """

    log_probs: Tensor
    ranks: Tensor | None = None
    entropies: Tensor | None = None
    expected: Tensor | None = None
    variances: Tensor | None = None
    sampled: Tensor | None = None

    def __len__(self) -> int:
        return self.log_probs.shape[-1]

    def first(self, tokens: int) -> TokenStatistics:
        """The same for the first ``tokens`` scored tokens only (all if there are fewer)."""
        known = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value[..., :tokens] for name, value in known.items() if value is not None})

    @classmethod
    def join(cls, parts: Sequence[TokenStatistics]) -> TokenStatistics:
        """One text from consecutive pieces."""
        columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(cls)}
        joined: dict[str, Any] = {name: torch.cat(c, dim=-1) for name, c in columns.items() if c[0] is not None}
        return cls(**joined)


def _check_logits(logits: Tensor, name: str) -> None:
    if torch.isnan(logits).any():
        raise ValueError(
            f"the {name}'s logits hold NaN (dtype {logits.dtype}): half precision overflowed or the weights are "
            "damaged; load the model in float32 or bfloat16"
        )


def token_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label; the softmax is taken in float32, a few rows at a time.

    Args:
        logits: Scores over the vocabulary, (..., n, V); ``logits[..., t, :]`` predicts ``labels[..., t]``.
        labels: Token ids, (..., n).

    Returns:
        (..., n), float32, natural logarithm.

    Raises:
        ValueError: Shapes do not fit, a label lies outside the vocabulary, or the logits hold NaN.

    Example:
        >>> token_log_probs(torch.zeros(3, 8), torch.tensor([0, 5, 7])).exp()
        tensor([0.1250, 0.1250, 0.1250])
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)}: need (..., n, V) and (..., n)"
        )
    flat = token_statistics(logits.flatten(0, -2), labels.flatten())
    return flat.log_probs.view(labels.shape)


def token_statistics(
    logits: Tensor,
    labels: Tensor,
    *,
    reference_logits: Tensor | None = None,
    wanted: Sequence[Field] = ("log_probs",),
    uniforms: Tensor | None = None,
) -> TokenStatistics:
    """All asked-for figures of n positions from their logits.

    Args:
        logits: The scoring model's, (n, V).
        labels: Token ids, (n,).
        reference_logits: The reference model's, (n, V'), same tokens; where V' and V differ (padded vocabularies) both
            are cut to the smaller before the softmax. None: the scoring model's own.
        wanted: Which figures.
        uniforms: Random numbers in [0, 1) that make the draws, (n, S); needed for ``sampled``. A draw is the first
            token at which q's cumulated probability exceeds the number: the full softmax, no temperature, no top-k.

    Returns:
        ``TokenStatistics`` in float32.
    """
    _check_logits(logits, "scoring model")
    vocabulary = logits.shape[-1]
    if reference_logits is not None:
        _check_logits(reference_logits, "reference model")
        vocabulary = min(vocabulary, reference_logits.shape[-1])
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < vocabulary:
        raise ValueError(
            f"token ids run from {int(labels.min())} to {int(labels.max())}, but the model knows 0 to {vocabulary - 1}: "
            "is this the model's own tokenizer?"
        )
    if "sampled" in wanted and uniforms is None:
        raise ValueError("sampled log-probabilities need uniforms of shape (n, S)")
    labels = labels.long()
    rows = max(1, CHUNK // vocabulary)
    parts = []
    for begin in range(0, max(len(labels), 1), rows):
        piece = slice(begin, begin + rows)
        log_p = logits[piece, :vocabulary].float().log_softmax(-1)  # (r, V)
        own = log_p.gather(-1, labels[piece].unsqueeze(-1))  # (r, 1)
        found: dict[str, Tensor] = {"log_probs": own.squeeze(-1)}
        if "ranks" in wanted:
            found["ranks"] = (log_p > own).sum(-1).float() + 1
        if "entropies" in wanted:
            found["entropies"] = torch.special.entr(log_p.exp()).sum(-1)
        if {"expected", "variances", "sampled"} & set(wanted):
            other = None if reference_logits is None else reference_logits[piece, :vocabulary].float()
            q = log_p.exp() if other is None else other.softmax(-1)
            if {"expected", "variances"} & set(wanted):
                weighted = q * log_p.masked_fill(q == 0, 0.0)
                found["expected"] = weighted.sum(-1)
                found["variances"] = (weighted * log_p.masked_fill(q == 0, 0.0)).sum(-1) - found["expected"] ** 2
            if "sampled" in wanted and uniforms is not None:
                cumulated = q.cumsum(-1)
                drawn = torch.searchsorted(cumulated, uniforms[piece].to(q) * cumulated[:, -1:], right=True)
                found["sampled"] = log_p.gather(-1, drawn.clamp_(max=vocabulary - 1)).T  # (S, r)
        parts.append(TokenStatistics(**found))
    return TokenStatistics.join(parts)


def _context_of(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return int(found) if found else 1 << 30


class TokenScorer:
    """Tokenize texts, run the models over them in batches, and hand out the figures of each text.

    Texts longer than the model's context are scored with a sliding window: each window but the first scores only its
    second half, so that every token has at least half a context before it.

    Args:
        model: Causal language model, or anything ``tokenry.assets.load_model`` loads (``"small"``, a folder, a hub id).
        tokenizer: Its tokenizer. None: the one beside ``model``, which must then be a name.
        reference_model: Model q, over the same tokenizer. None: ``model`` itself.
        reference_tokenizer: Its tokenizer, only to check that it is the same. None: the one beside ``reference_model``
            where that is a name, else taken to be ``tokenizer``.
        n_samples: Draws S per position.
        seed: Seed of the draws. A text's draws depend on it and on the text's tokens alone, not on the batch.
        max_tokens: Score only the first so many tokens of each text. None: all.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        reference_model: PreTrainedModel | str | None = None,
        reference_tokenizer: PreTrainedTokenizerBase | None = None,
        n_samples: int = 100,
        seed: int = 0,
        max_tokens: int | None = None,
    ) -> None:
        if n_samples < 2:
            raise ValueError(f"n_samples must be at least 2 (100 in the paper), got {n_samples}: a spread needs two")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1 or None, got {max_tokens}")
        if not isinstance(model, str) and tokenizer is None:
            raise ValueError("give the tokenizer with the model, or give the model's name or folder instead")
        self.n_samples, self.seed, self.max_tokens = n_samples, seed, max_tokens
        self._model, self._tokenizer = model, tokenizer
        self._reference, self._reference_tokenizer = reference_model, reference_tokenizer

    @cached_property
    def _loaded(self) -> tuple[Any, Any, Any]:
        model: Any = self._model
        tokenizer: Any = self._tokenizer
        if isinstance(model, str):
            model, own = load_model(model)
            tokenizer = tokenizer or own
        reference: Any = self._reference
        theirs: Any = self._reference_tokenizer
        if isinstance(reference, str):
            reference, own = load_model(reference)
            theirs = theirs or own
        if theirs is not None and theirs is not tokenizer and theirs.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"the scoring model's tokenizer ({tokenizer.name_or_path}, {len(tokenizer)} tokens) and the reference "
                f"model's ({theirs.name_or_path}, {len(theirs)} tokens) differ: both models must read the same tokens"
            )
        return model, tokenizer, reference

    @property
    def model(self) -> PreTrainedModel:
        """The scoring model p."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of both models."""
        return self._loaded[1]

    @property
    def reference_model(self) -> PreTrainedModel | None:
        """The reference model q; None where it is the scoring model."""
        return self._loaded[2]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, cut to ``max_tokens`` scored ones.

        Raises:
            ValueError: Not strings, an empty text, or no text at all.
        """
        if isinstance(texts, str):
            raise ValueError("texts must be a list of strings, got one string: put it in brackets, [text]")
        for place, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"text {place} is a {type(text).__name__}, not a string")
            if not text.strip():
                raise ValueError(f"text {place} is empty: there is nothing to score")
        if not len(texts):
            return []
        found = self.tokenizer(list(texts), verbose=False, return_attention_mask=False)["input_ids"]
        end = None if self.max_tokens is None else self.max_tokens + 1
        return [list(ids)[:end] for ids in found]

    def statistics(
        self, texts: Sequence[str], *, wanted: Sequence[Field] = ("log_probs",), batch_size: int = 16
    ) -> list[TokenStatistics]:
        """Figures of each text; ``wanted`` as in ``token_statistics``, ``batch_size`` in windows."""
        return self.statistics_of_tokens(self.encode(texts), wanted=wanted, batch_size=batch_size)

    def statistics_of_tokens(
        self, tokens: Sequence[Sequence[int]], *, wanted: Sequence[Field] = ("log_probs",), batch_size: int = 16
    ) -> list[TokenStatistics]:
        """The same for texts that are token ids already; the first id of each conditions and is not scored."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        for place, ids in enumerate(tokens):
            if len(ids) < 2:
                raise ValueError(f"text {place} has {len(ids)} token(s): one to condition and one to score are needed")
        found: dict[int, list[TokenStatistics]] = {place: [] for place in range(len(tokens))}
        jobs = [(place, *w) for place, ids in enumerate(tokens) for w in self._windows(len(ids))]
        jobs.sort(key=lambda job: job[1] - job[2])  # longest first: rows of a batch are nearly alike
        pieces: dict[tuple[int, int], TokenStatistics] = {}
        for begin in range(0, len(jobs), batch_size):
            for job, piece in self._run(jobs[begin : begin + batch_size], tokens, wanted):
                pieces[job[0], job[1]] = piece
        for key in sorted(pieces):
            found[key[0]].append(pieces[key])
        return [TokenStatistics.join(found[place]) for place in range(len(tokens))]

    def _windows(self, length: int) -> Iterator[tuple[int, int, int]]:
        """(begin, end, first token scored) of each window over a text of ``length`` tokens."""
        contexts = [_context_of(m) for m in (self.model, self.reference_model) if m is not None]
        context = min(contexts)
        yield 0, min(length, context), 1
        scored = context
        while scored < length:
            end = min(length, scored + context // 2)
            yield end - context, end, scored
            scored = end

    def _uniforms(self, ids: Sequence[int]) -> Tensor:
        """Random numbers of one text, (len(ids) - 1, S), from the seed and the tokens."""
        mark = zlib.crc32(np.asarray([self.seed, *ids], dtype=np.int64).tobytes())  # the generator takes 32 bits
        generator = torch.Generator().manual_seed(mark)
        return torch.rand(len(ids) - 1, self.n_samples, generator=generator)

    @torch.inference_mode()
    def _run(
        self, jobs: Sequence[tuple[int, int, int, int]], tokens: Sequence[Sequence[int]], wanted: Sequence[Field]
    ) -> Iterator[tuple[tuple[int, int, int, int], TokenStatistics]]:
        longest = max(end - begin for _, begin, end, _ in jobs)
        device = self.model.device
        ids = torch.zeros(len(jobs), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (place, begin, end, _) in enumerate(jobs):  # padded on the right
            ids[row, : end - begin] = torch.tensor(tokens[place][begin:end])
            mask[row, : end - begin] = 1
        ids, mask = ids.to(device), mask.to(device)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (B, L, V)
        other = None
        if self.reference_model is not None and {"expected", "variances", "sampled"} & set(wanted):
            where = self.reference_model.device
            out = self.reference_model(input_ids=ids.to(where), attention_mask=mask.to(where), use_cache=False)
            other = out.logits.to(device)
        for row, job in enumerate(jobs):
            place, begin, end, scored = job
            rows = slice(scored - begin - 1, end - begin - 1)  # logits at t - 1 predict token t
            uniforms = None
            if "sampled" in wanted:
                uniforms = self._uniforms(tokens[place])[scored - 1 : end - 1].to(device)
            piece = token_statistics(
                logits[row, rows],
                ids[row, scored - begin : end - begin],
                reference_logits=None if other is None else other[row, rows],
                wanted=wanted,
                uniforms=uniforms,
            )
            if not torch.isfinite(piece.log_probs).all():
                raise ValueError(
                    f"text {place} holds a token to which the scoring model gives probability 0: its logits are "
                    "infinite there; load the model in float32 or bfloat16"
                )
            yield job, piece
