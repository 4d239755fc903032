"""Train the two language models that ship inside Tokenry.

    python scripts/train_embedded_models.py --english FOLDER --work build/lm

``FOLDER`` holds ``*.txt.gz``; what else is read says ``embedded_text.py``. The run writes a checkpoint every 25 steps into
``--work`` and goes on from there when it is started again. The finished models are written to
``src/tokenry/assets/models``.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from embedded_text import CONTEXT, bits_per_byte, documents, training_texts
from tokenry.claims.small_models import token_stream
from tokenry.claims.training_loop import train_steps

END, PAD = "<|endoftext|>", "<|pad|>"
VOCAB_SIZE = 4096
ROWS = 16  # of CONTEXT tokens, per step
SIZES = {
    "small": {
        "hidden_size": 288,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
    },
    "draft": {
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
PEAK_LR = {"small": 3e-3, "draft": 5e-3}


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
    )


def starts(step: int, length: int) -> list[int]:
    """Where the rows of a step begin in so many tokens: every epoch has another offset and another order."""
    per_epoch, found = windows(length), []
    for k in range(step * ROWS, (step + 1) * ROWS):
        epoch, index = divmod(k, per_epoch)
        order = np.random.RandomState(epoch).permutation(per_epoch)
        found.append(int(order[index]) * CONTEXT + (epoch * 379) % CONTEXT)
    return found


def windows(length: int) -> int:
    """Rows in an epoch of so many tokens."""
    return (length - CONTEXT) // CONTEXT


def train(name: str, ids: Tensor, work: Path, steps: int, device: str) -> tuple[LlamaForCausalLM, dict]:
    """One of the models, from nothing or from its checkpoint, and the facts about its training."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        **SIZES[name],
    )
    model = LlamaForCausalLM(config).to(device)
    compiled = torch.compile(model)

    def loss(step: int) -> Tensor:
        batch = torch.stack([ids[s : s + CONTEXT] for s in starts(step, len(ids))]).to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            return compiled(input_ids=batch, labels=batch, use_cache=False).loss

    log = train_steps(
        model,
        loss,
        steps=steps,
        lr=PEAK_LR[name],
        say=lambda text: print(f"{name}: {text}", flush=True),
        checkpoint=work / f"{name}.pt",
    )
    return model.cpu(), {
        "steps": steps,
        "tokens": steps * ROWS * CONTEXT,
        "epochs": round(steps * ROWS / windows(len(ids)), 2),
        "seconds": round(log["seconds"]),
    }


def model_card(name: str, facts: dict) -> str:
    """The model card, from what was measured."""
    size = SIZES[name]
    return f"""---
license: apache-2.0
language: [en, code]
library_name: transformers
---
# Tokenry {name}

A {facts["parameters"] / 1e6:.1f} M parameter causal language model that ships inside Tokenry so that decoding and cache methods
can be tried, compared and tested on something that really predicts text. It is **not** meant for any other use: it
writes plausible-looking English and Python, and knows nothing.

- Architecture: Llama, {size["num_hidden_layers"]} layers, width {size["hidden_size"]}, {size["num_attention_heads"]} heads
  ({size["num_key_value_heads"]} for keys and values), context {CONTEXT}, tied embeddings, stored in bfloat16.
- Tokenizer: byte-level BPE, {VOCAB_SIZE} entries, trained on the training text; the two embedded models share it.
- Text: public-domain English (State of the Union and inaugural addresses, King James Genesis, Shakespeare;
  {facts["text_bytes"]["train_english"] / 1e6:.1f} MB, seen twice an epoch) and the source of the Python 3.11 standard library
  ({facts["text_bytes"]["train_code"] / 1e6:.1f} MB). About 5 % of the documents, chosen by hash, were held out.
- Training: {facts["steps"]} steps of {ROWS * CONTEXT} tokens ({facts["epochs"]} epochs), Muon for matrices and AdamW for the rest, peak
  learning rate {PEAK_LR[name]}, cosine to zero, bfloat16 autocast, {facts["seconds"] / 60:.0f} minutes on two CPU cores shared with
  other work. Script: `scripts/train_embedded_models.py`.
- **Bits per byte on held-out text: {facts["bits_per_byte"]:.3f}** (English {facts["bits_per_byte_english"]:.3f}, code
  {facts["bits_per_byte_code"]:.3f}), whole documents in windows of {CONTEXT} tokens, weights as shipped, computed in float32.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--english", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/lm"))
    parser.add_argument("--out", type=Path, default=Path("src/tokenry/assets/models"))
    parser.add_argument("--only", choices=[*SIZES])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    split = documents(args.english)
    random.Random(0).shuffle(split["train_english"])
    tokenizer_folder = args.work / "tokenizer"
    if tokenizer_folder.exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    else:
        tokenizer = train_tokenizer(split["train_english"] * 2 + split["train_code"])
        tokenizer.save_pretrained(tokenizer_folder)
    ids = token_stream(tokenizer, training_texts(split, 1))
    sizes = {k: sum(len(t.encode()) for t in v) for k, v in split.items()}
    print("bytes", sizes, "tokens", len(ids), flush=True)
    for name in [args.only] if args.only else [*SIZES]:
        model, facts = train(name, ids, args.work, args.steps, args.device)
        model = model.to(torch.bfloat16).float().eval()  # as shipped: rounded to bf16
        facts |= {
            f"bits_per_byte_{kind}": bits_per_byte(
                lambda ids, model=model: [model(ids).logits], tokenizer, split[f"held_out_{kind}"]
            )[0]
            for kind in ("english", "code")
        }
        held_out = {k: sizes[f"held_out_{k}"] for k in ("english", "code")}
        facts["bits_per_byte"] = round(
            sum(facts[f"bits_per_byte_{k}"] * n for k, n in held_out.items()) / sum(held_out.values()), 4
        )
        facts |= {"parameters": sum(p.numel() for p in model.parameters()), "text_bytes": sizes}
        folder = args.out / name
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
        (folder / "README.md").write_text(model_card(name, facts), "utf-8")
        print(name, json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
