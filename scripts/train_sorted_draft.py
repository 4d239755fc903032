"""Fine-tune the embedded draft model with the sorted loss, so that its first and second layer can draft too.

    python scripts/train_sorted_draft.py --english FOLDER --work build/sorted-draft

The text is that of ``train_embedded_models.py``: public-domain English from ``FOLDER/*.txt.gz`` and the running Python's
standard library. The run writes a checkpoint every 25 steps into ``--work`` and goes on from there when it is started
again. The finished draft is written to ``src/tokenry/assets/models/sorted-draft``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch

from tokenry.assets import load_model
from tokenry.claims.small_models import cosine, muon_and_adamw, rows_of
from tokenry.decoding import SortedDraft
from train_embedded_models import documents, encode

EXITS = (1, 2, 3)
ROWS, LENGTH = 16, 256
PEAK_LR = 2e-3


@torch.no_grad()
def bits_per_byte(draft: SortedDraft, tokenizer, texts: list[str]) -> list[float]:
    """Mean bits per byte of every exit over whole documents, cut into windows of the context length, in float32."""
    context = draft.model.config.max_position_embeddings
    bits, bytes_seen = [0.0] * len(draft.exits), 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        bytes_seen += len(text.encode())
        for start in range(0, len(ids), context - 1):
            window = torch.tensor([[tokenizer.eos_token_id, *ids[start : start + context - 1]]])
            for j, logits in enumerate(draft.exit_logits(window)):
                loss = torch.nn.functional.cross_entropy(logits[0, :-1], window[0, 1:], reduction="sum")
                bits[j] += loss.item() / math.log(2)
    return [round(b / bytes_seen, 4) for b in bits]


def train(draft: SortedDraft, ids: torch.Tensor, work: Path, steps: int) -> dict:
    """Train in place, going on from the checkpoint if there is one."""
    optimizers = muon_and_adamw(draft, PEAK_LR)
    checkpoint = work / "sorted-draft.pt"
    first, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        draft.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, seconds = state["step"], state["seconds"]
        print(f"going on from step {first}")
    draft.train()
    for step in range(first, steps):
        began = time.perf_counter()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = cosine((step + 1) / steps, PEAK_LR)
        loss = draft.sorted_loss(rows_of(ids, ROWS, LENGTH, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds += time.perf_counter() - began
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}/{steps} loss {loss.item():.3f} {time.perf_counter() - began:.2f} s/step", flush=True)
        if (step + 1) % 25 == 0 or step == steps - 1:
            temporary = checkpoint.with_suffix(".tmp")
            torch.save(
                {
                    "model": draft.state_dict(),
                    "optimizers": [o.state_dict() for o in optimizers],
                    "step": step + 1,
                    "seconds": seconds,
                },
                temporary,
            )
            temporary.replace(checkpoint)
    draft.eval()
    return {"steps": steps, "tokens": steps * ROWS * LENGTH, "seconds": round(seconds)}


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
    if not split["train_english"]:
        parser.error(f"no *.txt.gz in {args.english}")
    model, tokenizer = load_model("draft")
    draft = SortedDraft(model, EXITS)
    texts = split["train_english"] * 2 + split["train_code"]  # English twice: there is less of it
    random.Random(1).shuffle(texts)
    ids = torch.from_numpy(encode(tokenizer, texts))
    before = {f"before_{k}": bits_per_byte(draft, tokenizer, split[f"held_out_{k}"]) for k in ("english", "code")}
    facts = train(draft, ids, args.work, args.steps) | before
    draft.to(torch.bfloat16).float()  # as shipped: rounded to bf16
    facts |= {
        f"bits_per_byte_{k}": bits_per_byte(draft, tokenizer, split[f"held_out_{k}"]) for k in ("english", "code")
    }
    facts["parameters"] = sum(p.numel() for p in draft.parameters())
    draft.to(torch.bfloat16).save_pretrained(args.out)
    (args.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    (args.out / "README.md").write_text(model_card(facts), "utf-8")
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
