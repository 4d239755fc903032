"""Fine-tune the embedded draft model with the sorted loss, so that its first and second layer can draft too.

    python scripts/train_sorted_draft.py --english FOLDER --work build/sorted-draft

The text is that of ``train_embedded_models.py``: public-domain English from ``FOLDER/*.txt.gz`` and the running Python's
standard library. The run writes a checkpoint every 25 steps into ``--work`` and goes on from there when it is started
again. The finished draft is written to ``src/tokenry/assets/models/sorted-draft``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from embedded_text import bits_per_byte, documents, training_texts
from tokenry.assets import load_model
from tokenry.claims.small_models import rows_of, token_stream
from tokenry.claims.training_loop import train_steps
from tokenry.decoding import SortedDraft

EXITS = (1, 2, 3)
ROWS, LENGTH = 16, 256
PEAK_LR = 2e-3


def model_card(facts: dict) -> str:
    """The model card, from what was measured."""
    rows = "\n".join(
        f"| {exit_} | {facts['bits_per_byte_english'][j]:.3f} | {facts['bits_per_byte_code'][j]:.3f} "
        f"| {facts['before_english'][j]:.3f} | {facts['before_code'][j]:.3f} |"
        for j, exit_ in enumerate(EXITS)
    )
    return f"""---
license: apache-2.0
language: [en, code]
library_name: transformers
---
# Tokenry sorted-draft

Tokenry's embedded `draft` model ({facts["parameters"] / 1e6:.2f} M parameters, Llama, 3 layers, width 128), fine-tuned so that its first
and its first two layers, each with the shared norm and head, are language models too (sorted fine-tuning,
arXiv:2309.08968; S2D, arXiv:2407.01955). It drafts for the embedded models. It is **not** meant for any other use.

- Load it with `tokenry.decoding.SortedDraft.from_pretrained()`; as a plain transformers model it is its deepest exit.
  The exits, {", ".join(map(str, EXITS))} layers, stand in `config.json` as `sorted_exits`. Stored in bfloat16.
- Tokenizer: that of the embedded models, `load_model("draft")`.
- Text: that of the embedded models, public-domain English and the source of the Python 3.11 standard library. About 5 %
  of the documents, chosen by hash, were held out.
- Training: from the embedded `draft`, {facts["steps"]} steps of {ROWS} x {LENGTH} tokens, mean of the three exits' cross-entropies, Muon for
  matrices and AdamW for the rest, peak learning rate {PEAK_LR}, cosine to zero, float32, {facts["seconds"] / 60:.0f} minutes on a CPU core
  shared with other work. Script: `scripts/train_sorted_draft.py`.

Bits per byte on held-out text, whole documents in windows of 1024 tokens, weights as shipped, computed in float32:

| layers | English | code | before, English | before, code |
|---|---|---|---|---|
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--english", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/sorted-draft"))
    parser.add_argument("--out", type=Path, default=Path("src/tokenry/assets/models/sorted-draft"))
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    split = documents(args.english)
    model, tokenizer = load_model("draft")
    draft = SortedDraft(model, EXITS)
    ids = token_stream(tokenizer, training_texts(split, 1))

    def held_out(kind: str) -> list[float]:
        return bits_per_byte(draft.exit_logits, tokenizer, split[f"held_out_{kind}"])

    before = {f"before_{kind}": held_out(kind) for kind in ("english", "code")}
    log = train_steps(
        draft,
        lambda step: draft.sorted_loss(rows_of(ids, ROWS, LENGTH, step)),
        steps=args.steps,
        lr=PEAK_LR,
        say=lambda text: print(text, flush=True),
        checkpoint=args.work / "sorted-draft.pt",
    )
    draft.eval().to(torch.bfloat16).float()  # as shipped: rounded to bf16
    facts = {"steps": args.steps, "tokens": args.steps * ROWS * LENGTH, "seconds": round(log["seconds"])} | before
    facts |= {f"bits_per_byte_{kind}": held_out(kind) for kind in ("english", "code")}
    facts["parameters"] = sum(p.numel() for p in draft.parameters())
    draft.to(torch.bfloat16).save_pretrained(args.out)
    (args.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    (args.out / "README.md").write_text(model_card(facts), "utf-8")
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
