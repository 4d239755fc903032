"""Small language models trained inside a claim: the same text, loop and bookkeeping for every method.

A training is one resumable step. Its weights lie beside the session's steps; a claim that is started again after a kill
reads them instead of training again.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenry.assets.embedded import held_out_texts, load_model
from tokenry.assets.english import english_documents, is_held_out
from tokenry.claims.registry import Context
from tokenry.claims.training_loop import train_steps

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

__all__ = ["English", "english", "rows_of", "token_stream", "train"]


@dataclass(frozen=True)
class English:
    """Public-domain English as token ids.

    Attributes:
        tokenizer: What encoded it; default that of the embedded models.
        train: ``(N,)`` ids of all training documents, in an order fixed by a seed, each after an end-of-text token.
        held_out: ``(M,)`` ids of text that neither the embedded models nor these ever saw.
    """

    tokenizer: PreTrainedTokenizerFast
    train: Tensor
    held_out: Tensor


def english(context: Context, tokenizer: Any = None) -> English:
    """Training and held-out text; needs the data set ``english-public-domain``.

    Raises:
        NotRunnable: The data set is not there.
    """
    documents = [d for d in english_documents(context.data("english-public-domain")) if not is_held_out(d)]
    random.Random(0).shuffle(documents)
    tokenizer = tokenizer or load_model("draft")[1]
    return English(tokenizer, token_stream(tokenizer, documents), token_stream(tokenizer, held_out_texts("english")))


def token_stream(tokenizer: Any, texts: list[str]) -> Tensor:
    """``(N,)`` ids of all texts in a row, an end-of-text token before each."""
    import torch

    end = tokenizer.eos_token_id
    ids: list[int] = []
    for row in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        ids += [end, *row]
    return torch.tensor(ids)


def rows_of(ids: Tensor, rows: int, length: int, step: int, seed: int = 0) -> Tensor:
    """Batch number ``step``: ``(rows, length)`` windows at places that depend on ``seed`` and ``step`` alone."""
    import torch

    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(ids) - length, (rows,), generator=generator)
    return ids[starts[:, None] + torch.arange(length)]


def train(
    context: Context,
    key: str,
    model: Any,
    ids: Tensor,
    *,
    steps: int,
    rows: int = 8,
    length: int = 128,
    lr: float = 3e-3,
    seed: int = 0,
    loss: Callable[[Any, Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """Train ``model`` in place and leave it in evaluation mode.

    Args:
        context: Gives the session, whose folder keeps the weights.
        key: Name of the step, unique within the claim.
        model: A causal language model, or any module if ``loss`` is given.
        ids: ``(N,)`` training ids.
        steps: Optimiser steps.
        rows: Windows per step.
        length: Tokens per window.
        lr: Peak learning rate.
        seed: Which windows are seen; the same for methods that must see the same text.
        loss: ``loss(model, batch)`` with batch ``(rows, length)``. Default: the model's own next-token loss.

    Returns:
        ``losses`` (about 20 of them, over the run), ``tokens`` seen and ``seconds``.
    """
    from safetensors.torch import load_model as load_weights
    from safetensors.torch import save_model

    objective = loss or (lambda m, batch: m(input_ids=batch, labels=batch, use_cache=False).loss)
    steps_file = context.session.path
    weights = steps_file and steps_file.with_name(f"{context.session.fingerprint}-{key.replace('/', '-')}.safetensors")

    def run() -> dict[str, Any]:
        log = train_steps(
            model,
            lambda step: objective(model, rows_of(ids, rows, length, step, seed).to(context.device)),
            steps=steps,
            lr=lr,
            say=lambda text: context.session.say(f"{key}: {text}"),
        )
        if weights is not None:
            save_model(model, str(weights))
        return log | {"tokens": steps * rows * length}

    if context.session.done(key) and weights is not None and weights.exists():
        load_weights(model, str(weights))
        log = context.session.step(key, run)
    elif context.session.done(key):
        log = run()  # the step is known, its weights are gone
    else:
        log = context.session.step(key, run)
    model.eval()
    return log
