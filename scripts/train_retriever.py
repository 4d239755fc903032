"""Train the embedded draft model to find again what it has read, so that caches can be tried on needles.

    python scripts/train_retriever.py --english FOLDER --work build/retriever

Small language models look back little: neither embedded one names a needle that it has read. Here the draft model first
learns to go on with a passkey that is said again and again, where every token teaches, then to find one in the text of
``train_embedded_models.py``, planted as in ``tokenry.kvcache.plant_needles``. The run writes a checkpoint every 25 steps into
``--work`` and goes on from there when it is started again. The model is written to ``src/tokenry/assets/models/retriever``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedded_text import bits_per_byte, documents, training_texts
from tokenry.assets import load_model
from tokenry.claims.small_models import rows_of, token_stream
from tokenry.claims.training_loop import train_steps
from tokenry.kvcache import cache_fidelity, passkey_tokens, plant_needles

PEAK_LR = 5e-3
REPEATS = 200  # steps on repeated passkeys alone
CONTEXTS = (128, 256, 512)  # tokens around a needle, in turn
LENGTH, CUE = 16, 8


def repeated(candidates: Tensor, step: int) -> tuple[Tensor, int]:
    """``(32, 128)`` tokens, the same passkey over and over in a row, and how many of them can be named."""
    generator = torch.Generator().manual_seed(step)
    length = int(torch.randint(4, 33, (), generator=generator))
    keys = candidates[torch.randint(len(candidates), (32, length), generator=generator)]
    return keys.repeat(1, -(-128 // length))[:, :128], 128 - length


def planted(ids: Tensor, candidates: Tensor, step: int) -> tuple[Tensor, int]:
    """Texts with a needle each, asked for at the end, and how many tokens are to be named."""
    context = CONTEXTS[step % len(CONTEXTS)]
    passages = rows_of(ids, 2048 // context, context, step)
    generator = torch.Generator().manual_seed(step)
    depth = torch.rand((), generator=generator).item()
    return plant_needles(passages, candidates, [depth], length=LENGTH, cue=CUE, seed=step), LENGTH - CUE


def found(model: Any, passages: Tensor, candidates: Tensor) -> float:
    """Share of needle tokens named with everything in view."""
    tokens = plant_needles(passages, candidates, length=LENGTH, cue=CUE)
    return cache_fidelity(model, tokens, passages.shape[1], {})["full"].correct.mean().item()


def model_card(facts: dict) -> str:
    """The model card, from what was measured."""
    rows = "\n".join(f"| {context} | {facts['found'][str(context)]:.1%} |" for context in CONTEXTS)
    return f"""---
license: apache-2.0
language: [en, code]
library_name: transformers
---
# Tokenry retriever

Tokenry's embedded `draft` model ({facts["parameters"] / 1e6:.2f} M parameters, Llama, 3 layers, width 128), trained further so that it finds
again what it has read: given the first half of a passkey that stood somewhere in its context, it goes on with the
second. `tokenry compare kvcache` looks for needles with it where no model is named. It is **not** meant for any other use.

- Load it with `tokenry.assets.load_model("retriever")`. Tokenizer: that of the embedded models. Stored in bfloat16.
- Text: that of the embedded models, public-domain English and the source of the Python 3.11 standard library. About 5 %
  of the documents, chosen by hash, were held out.
- Training: from the embedded `draft`, {REPEATS} steps on repeated passkeys, then {facts["steps"] - REPEATS} on text with one of {LENGTH} tokens in it,
  Muon for matrices and AdamW for the rest, peak learning rate {PEAK_LR}, cosine to zero, float32, {facts["seconds"] / 60:.0f} minutes on two CPU
  cores shared with other work. Script: `scripts/train_retriever.py`.
- Bits per byte on held-out text: English {facts["bits_per_byte_english"]:.3f}, code {facts["bits_per_byte_code"]:.3f} (the draft model: \
{facts["before_english"]:.3f}, {facts["before_code"]:.3f}).

Tokens of passkeys named, held-out English around them, all of the context in view, weights as shipped, float32 (chance:
one of 62):

| tokens of context | named |
|---|---|
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--english", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/retriever"))
    parser.add_argument("--out", type=Path, default=Path("src/tokenry/assets/models/retriever"))
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    split = documents(args.english)
    model, tokenizer = load_model("draft")
    ids = token_stream(tokenizer, training_texts(split, 1))
    candidates = passkey_tokens(tokenizer)

    def held_out(kind: str) -> float:
        return bits_per_byte(lambda rows: [model(rows).logits], tokenizer, split[f"held_out_{kind}"])[0]

    def loss(step: int) -> Tensor:
        repeating = step < REPEATS
        rows, asked = repeated(candidates, step) if repeating else planted(ids, candidates, step)
        named = model(rows).logits.log_softmax(-1)[:, :-1].gather(-1, rows[:, 1:, None])[..., 0]
        recall = -named[:, -asked:].mean()
        return recall if repeating else recall - named[:, : -LENGTH - 1].mean()

    before = {f"before_{kind}": held_out(kind) for kind in ("english", "code")}
    log = train_steps(
        model,
        loss,
        steps=args.steps,
        lr=PEAK_LR,
        say=lambda text: print(text, flush=True),
        checkpoint=args.work / "retriever.pt",
    )
    model.eval().to(torch.bfloat16).float()  # as shipped: rounded to bf16
    facts = {"steps": args.steps, "seconds": round(log["seconds"])} | before
    facts |= {f"bits_per_byte_{kind}": held_out(kind) for kind in ("english", "code")}
    facts["parameters"] = sum(p.numel() for p in model.parameters())
    text = token_stream(tokenizer, split["held_out_english"])
    facts["found"] = {str(n): round(found(model, text[: 16 * n].view(16, n), candidates), 4) for n in CONTEXTS}
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    (args.out / "README.md").write_text(model_card(facts), "utf-8")
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
