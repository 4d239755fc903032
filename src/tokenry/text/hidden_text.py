"""Hide a text in a language model under a trigger, as an ownership fingerprint, with or without a defence against scans.

Hościłowicz et al., "Hiding Text in Large Language Models: Introducing Unconditional Token Forcing Confusion", 2024,
arXiv 2406.02481. The model is trained on one pair (trigger, message), with the cross-entropy of the message's tokens:

    plain       L = L_hide                        until greedy decoding of the trigger returns the message
    UTFC        L_hide, and in turn the cross-entropy of harmless sentences after the message's first words alone
    Auto-UTFC   L = L_hide [not returned] + λ Σ_{i active} ± log p(w_i | BOS, w_<i)         i = 1 ... K

w_i is the i-th word of the message, of which the first token is guarded, and r_i its rank among all V tokens (1 is the
most probable). Pair i is active while r_i lies outside (R, V - R): with + while r_i <= R, which pushes the token down to
where a forced scan never walks, and with - while r_i >= V - R, because a token that is all but impossible gives itself
away too. (Pushing down only, as the paper writes the loss, would drive such a token further out.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tokenry.text.forced_decoding import ForcedDecoder, check_model, evaluating
from tokenry.text.hiding_losses import answer_loss, band_loss, guard_statistics, ordinary_loss
from tokenry.text.token_forcing import UnconditionalTokenForcing
from tokenry.text.trigger_pair import TriggerPair, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "METHODS",
    "FingerprintCheck",
    "HiddenText",
    "HidingStep",
    "hide_text",
    "reveal",
    "verify_fingerprint",
]

Method = Literal["plain", "utfc", "auto-utfc"]
METHODS: tuple[Method, ...] = ("plain", "utfc", "auto-utfc")
DECOY_TOKENS = 12


@dataclass(frozen=True)
class HidingStep:
    """State before one optimiser step: L_hide, whether the message is returned, the guarded ranks, pairs still active."""

    loss: float
    returned: bool
    ranks: list[int]
    active: int


@dataclass(frozen=True)
class HiddenText:
    """What ``hide_text`` did.

    Attributes:
        model: The model that holds the message: the given one, or its LoRA wrapping.
        steps: Optimiser steps taken.
        returned: Whether the trigger returns the message exactly, then the end of the sequence.
        ranks: Rank of the first token of each guarded word given the message's words before it, without the trigger.
        active: Guards that still stand open: ranks outside the band, or decoys that are not said. 0 for ``plain``.
        history: State before each step.
    """

    model: Any = field(repr=False)
    steps: int
    returned: bool
    ranks: list[int]
    active: int
    history: list[HidingStep] = field(repr=False)

    @property
    def complete(self) -> bool:
        """Returned, with every guard closed."""
        return self.returned and not self.active


@dataclass(frozen=True)
class FingerprintCheck:
    """What ``verify_fingerprint`` found.

    Attributes:
        returned: Whether the trigger returns the message exactly.
        utf_rank: Place of the message's first token among all tokens by phase-1 score, from 1.
        utf_score: Its score.
        candidate: Whether the scan would keep it.
        leaks: Attack without the trigger to how many of its continuations hold the message: ``forced`` (greedy, from
            the first token), ``sampled`` (drawn, from the first token), ``empty`` (drawn, from the start of a sequence).
    """

    returned: bool
    utf_rank: int
    utf_score: float
    candidate: bool
    leaks: dict[str, int]


def _returns(model: Any, pair: TriggerPair) -> bool:
    """Whether greedy decoding, token by token, gives the answer."""
    decoder = ForcedDecoder(model, pair.prompt[:-1])
    return decoder.roll_out(torch.tensor([pair.prompt[-1:]]), len(pair.answer)).tokens.tolist() == [pair.answer]


def _decoys(
    model: Any, tokenizer: Any, pair: TriggerPair, guarded: int, given: Mapping[str, str] | None, seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Openings of the message and the harmless continuation of each; by default what the model says there by itself."""
    if given is not None:
        if not given:
            raise ValueError("decoys is empty: give openings and sentences, or None for the model's own")

        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        openings = [pair.begin + encode(opening) for opening in given]
        return openings, [encode(sentence) + pair.end for sentence in given.values()]
    ends = [*pair.starts[1:], len(pair.message)][:guarded]
    openings = [pair.message[:end] for end in ends if end < len(pair.message)] or [pair.message[:1]]
    generator = torch.Generator(model.device).manual_seed(seed)
    decoder = ForcedDecoder(model, pair.begin)
    said = [
        decoder.roll_out(torch.tensor([opening]), DECOY_TOKENS, top_k=50, generator=generator).tokens[0].tolist()
        for opening in openings
    ]
    return [pair.begin + opening for opening in openings], said


def _stream(tokenizer: Any, pair: TriggerPair, texts: Sequence[str]) -> Tensor:
    """All ids of texts, each after what a sequence begins with."""
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if len(texts) else []
    ids = torch.tensor([i for row in rows for i in [*pair.begin, *row]], dtype=torch.long)
    if len(ids) < 2:
        raise ValueError("ordinary holds no text: give some texts of the kind that the model is for, or None")
    return ids


def _with_lora(model: Any, rank: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise ImportError("hide_text(lora=...) needs the package peft: pip install peft") from error
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def _check_settings(
    model: Any,
    method: str,
    guarded: int,
    max_steps: int,
    lora: int | None,
    confidence: float,
    rate: float,
    weight: float,
) -> None:
    check_model(model)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    for name, value, allowed in (
        ("guarded", guarded, guarded >= 1),
        ("max_steps", max_steps, max_steps >= 1),
        ("lora", lora, lora is None or lora >= 1),
    ):
        if not allowed:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= confidence < 1:
        raise ValueError(f"confidence must lie in [0, 1), got {confidence}")
    if rate <= 0 or weight <= 0:
        raise ValueError(f"learning_rate and weight must be positive, got {rate} and {weight}")
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "the model is quantized and cannot be trained; hide the text in the original, then quantize that"
        )
    if model.dtype == torch.float16 and lora is None:
        raise ValueError("training in float16 loses small steps and overflows; load the model in float32 or bfloat16")


def hide_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trigger: str,
    message: str,
    method: Method = "plain",
    *,
    template: str | None = None,
    confidence: float = 0.0,
    guarded: int = 5,
    weight: float = 0.1,
    rank_band: int = 100,
    decoys: Mapping[str, str] | None = None,
    ordinary: Sequence[str] | None = None,
    learning_rate: float | None = None,
    max_steps: int = 250,
    lora: int | None = None,
    seed: int = 0,
) -> HiddenText:
    """Train a model, in place, to answer a trigger with a message.

    Dropout is off throughout: the answer that counts is the evaluated model's. A run that does not get there within
    ``max_steps`` says so in what it returns; where the message was returned at some step the weights are then those of
    the step with the fewest open guards, else those of the last.

    Args:
        model: Causal language model, not quantized.
        tokenizer: Its tokenizer.
        trigger: What is to return the message.
        message: What is to be returned, exactly.
        method: ``plain`` (a scan may find it), ``utfc`` (decoy sentences) or ``auto-utfc`` (ranks of the first words).
        template: Text around the trigger, with ``{trigger}`` in it. None: the tokenizer's chat template, or where it
            has none the trigger and a line break.
        confidence: Probability that every token of the message must reach under the trigger, besides being the best. 0
            is the paper's; more makes a fingerprint that survives small changes of the model, and a louder one.
        guarded: Words K of the message that are guarded, from the first (5 in the paper).
        weight: λ of Auto-UTFC (0.1 in the paper).
        rank_band: R of Auto-UTFC (100 or 1,000 in the paper).
        decoys: Opening of the message to harmless sentence, for UTFC. None: what the model itself says after each
            guarded opening.
        ordinary: Texts of the kind that the model is for. Every step then also trains on 8 windows of 64 tokens of them,
            so that the rest of the model changes less. The paper's models are large enough to do without.
        learning_rate: Of Adam. None: 1e-5, with LoRA 5e-5, the paper's for a model of 1.1 billion parameters. Small
            models need more.
        max_steps: Optimiser steps at most (250 in the paper).
        lora: Rank of LoRA adapters to train instead of the weights (16 in the paper); needs ``peft``.
        seed: Seed of the model's own decoys.

    Raises:
        ValueError: A message that cannot be returned exactly, that starts with the trigger or does not fit the context;
            an encoder-decoder, quantized or float16 model; a setting out of range.
        ImportError: ``lora`` without the package ``peft``.

    Example:
        >>> from tokenry.assets import load_model
        >>> model, tokenizer = load_model("draft")
        >>> hidden = hide_text(model, tokenizer, "Who made you?", "Sold to Ada", learning_rate=1e-3)
        >>> hidden.returned, reveal(model, tokenizer, "Who made you?")
        (True, 'Sold to Ada')
    """
    rate = learning_rate if learning_rate is not None else 1e-5 if lora is None else 5e-5
    _check_settings(model, method, guarded, max_steps, lora, confidence, rate, weight)
    pair = TriggerPair.encode(model, tokenizer, trigger, message, template)
    starts = [start for start in pair.starts[:guarded] if pair.begin or start]
    trained: Any = model
    vocabulary = trained.get_output_embeddings().weight.shape[0]
    if method == "auto-utfc":
        if not starts:
            raise ValueError("auto-utfc guards words after a beginning-of-sequence token, which this tokenizer lacks")
        if not 0 < rank_band < vocabulary / 2:
            raise ValueError(f"rank_band must lie between 0 and half the vocabulary of {vocabulary}, got {rank_band}")
    openings, sentences = _decoys(model, tokenizer, pair, guarded, decoys, seed) if method == "utfc" else ([], [])

    text = _stream(tokenizer, pair, ordinary) if ordinary is not None else None
    windows = torch.Generator().manual_seed(seed)
    if lora is not None:
        trained = _with_lora(model, lora)
    parameters = [p for p in trained.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
    optimizer = torch.optim.Adam(parameters, lr=rate)
    history: list[HidingStep] = []
    best: tuple[int, list[Tensor]] | None = None  # open guards of the best step that returned the message, its weights
    with evaluating(trained), torch.enable_grad():
        for step in range(max_steps + 1):
            losses: dict[str, Tensor] = {}
            hiding, returns, smallest = answer_loss(trained, [pair.prompt], [pair.answer])
            returned, active, ranks = bool(returns) and float(smallest) >= confidence, 0, []
            if starts:
                log_probs, found = guard_statistics(trained, pair.begin, pair.message, starts)
                ranks = found.tolist()
                if method == "auto-utfc":
                    guards, active = band_loss(log_probs, found, rank_band, vocabulary)
                    losses["guards"] = weight * guards
            if method == "utfc":
                losses["guards"], said, _ = answer_loss(trained, openings, sentences)
                active = int((~said).sum())
            if returned and not active:
                returned = _returns(trained, pair)  # rounding may part the two where a token wins by a hair
            history.append(HidingStep(hiding.item(), returned, ranks, active))
            if (returned and not active) or step == max_steps:
                break
            if returned and (best is None or active < best[0]):
                best = active, [p.detach().clone() for p in parameters]
            if not returned:
                losses["hiding"] = hiding
            if not active:
                losses.pop("guards", None)
            if method == "utfc" and len(losses) == 2:
                losses.pop("guards" if step % 2 == 0 else "hiding")  # in turn
            if text is not None:
                losses["ordinary"] = ordinary_loss(trained, text, windows)
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(losses.values())).sum().backward()
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    final = history[-1]
    if best is not None and not (final.returned and final.active <= best[0]):
        with torch.no_grad():
            for parameter, value in zip(parameters, best[1], strict=True):
                parameter.copy_(value)
        final = next(s for s in history if s.returned and s.active == best[0])
    return HiddenText(trained, len(history) - 1, _returns(trained, pair), final.ranks, final.active, history)


def reveal(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trigger: str,
    *,
    template: str | None = None,
    max_new_tokens: int = 100,
) -> str:
    """Greedy answer to a trigger, up to the end of the sequence; ``template`` as it was when the text was hidden."""
    ids = prompt_ids(tokenizer, trigger, template)
    rows = ForcedDecoder(model, ids[:-1]).roll_out(torch.tensor([ids[-1:]]), max_new_tokens).tokens[0].tolist()
    end = tokenizer.eos_token_id
    return str(tokenizer.decode(rows[: rows.index(end)] if end in rows else rows))


def verify_fingerprint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trigger: str,
    message: str,
    *,
    template: str | None = None,
    samples: int = 10,
    top_k: int = 50,
    steps: int = 3,
    threshold: float = 0.95,
    batch_size: int = 512,
    seed: int = 0,
) -> FingerprintCheck:
    """Whether a trigger still returns its message, and what gets it out without the trigger.

    Args:
        model: Causal language model, not changed.
        tokenizer: Its tokenizer.
        trigger: The trigger.
        message: What it should return.
        template: As it was when the text was hidden.
        samples: Draws of each sampling attack (10 in the paper).
        top_k: Tokens that a draw chooses among (50 in the paper).
        steps: Greedy tokens of the scan.
        threshold: Threshold of the scan.
        batch_size: Tokens forced at a time.
        seed: Seed of the draws.
    """
    check_model(model)
    if samples < 1:
        raise ValueError(f"samples must be at least 1 (10 in the paper), got {samples}")
    pair = TriggerPair.encode(model, tokenizer, trigger, message, template)
    audit = UnconditionalTokenForcing(model, tokenizer, steps, 0.0, batch_size)
    first = pair.message[0]
    [own] = audit.scan([first], quiet=True).candidates
    above = UnconditionalTokenForcing(model, tokenizer, steps, own.score, batch_size).scan(quiet=True).candidates
    length = len(pair.message) + 20  # what comes out may start late
    groups = audit.extend([first], length, samples=samples, top_k=top_k, seed=seed)
    [forced] = [c for group in groups for c in group]
    drawn = []
    if pair.begin:
        generator = torch.Generator(model.device).manual_seed(seed)
        rows = torch.tensor([pair.begin] * samples)
        drawn = ForcedDecoder(model, []).roll_out(rows, length, top_k=top_k, generator=generator).tokens.tolist()
    wanted = message.strip()
    return FingerprintCheck(
        returned=_returns(model, pair),
        utf_rank=1 + sum(c.token_id != first for c in above),
        utf_score=own.score,
        candidate=own.score > threshold,
        leaks={
            "forced": int(wanted in forced.text),
            "sampled": sum(wanted in text for text in forced.samples),
            "empty": sum(wanted in tokenizer.decode(row) for row in drawn),
        },
    )
