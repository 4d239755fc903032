"""Train the two language models that ship inside Tokenry.

Text: public-domain English (State of the Union and inaugural addresses, King James Genesis,
Shakespeare) and the source of the running Python's standard library. Nothing else.

    python scripts/train_embedded_models.py --english FOLDER --work build/lm --minutes 40

``FOLDER`` holds ``*.txt.gz``. The run writes a checkpoint every 100 steps into ``--work`` and goes on
from there when it is started again. The finished models are written to ``src/tokenry/assets/models``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tokenry.assets.english import english_documents, is_held_out
from tokenry.claims.small_models import cosine, muon_and_adamw

END, PAD = "<|endoftext|>", "<|pad|>"
VOCAB_SIZE = 4096
CONTEXT = 1024
BATCH_TOKENS = 16 * CONTEXT
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


def documents(english: Path) -> dict[str, list[str]]:
    """All texts as documents, each assigned to ``train`` or ``held_out`` by its hash (about 5 % held out)."""
    split: dict[str, list[str]] = {"train_english": [], "held_out_english": [], "train_code": [], "held_out_code": []}

    def put(kind: str, text: str) -> None:
        split[("held_out_" if is_held_out(text) else "train_") + kind].append(text)

    for text in english_documents(english):
        put("english", text)
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if {"site-packages", "test", "tests", "lib2to3", "idlelib", "encodings", "turtledemo"} & set(
            parts
        ) or path.name.startswith("_sysconfigdata"):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if 200 < len(text) < 300_000:
            put("code", text)
    return split


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


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    end = tokenizer.convert_tokens_to_ids(END)
    out: list[int] = []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        out += [end, *ids]
    return np.asarray(out, dtype=np.int64)


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Mean bits per byte over whole documents, cut into windows of the context length, in float32."""
    bits = bytes_seen = 0.0
    end = tokenizer.convert_tokens_to_ids(END)
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        bytes_seen += len(text.encode())
        for start in range(0, len(ids), CONTEXT - 1):
            window = torch.tensor([[end, *ids[start : start + CONTEXT - 1]]])
            loss = model(input_ids=window, labels=window).loss.item()
            bits += loss * (window.shape[1] - 1) / math.log(2)
    return bits / bytes_seen


def train(name: str, ids: np.ndarray, work: Path, steps: int, device: str) -> tuple[LlamaForCausalLM, dict]:
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
    optimizers = muon_and_adamw(model, PEAK_LR[name])
    checkpoint = work / f"{name}.pt"
    first, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, seconds = state["step"], state["seconds"]
        print(f"{name}: going on from step {first}")
    compiled = torch.compile(model)
    tokens = torch.from_numpy(ids)
    per_epoch = (len(ids) - CONTEXT) // CONTEXT
    rows = BATCH_TOKENS // CONTEXT
    for step in range(first, steps):
        began = time.perf_counter()
        starts = []
        for k in range(step * rows, (step + 1) * rows):  # every epoch: another offset and another order
            epoch, index = divmod(k, per_epoch)
            order = np.random.RandomState(epoch).permutation(per_epoch)
            starts.append(int(order[index]) * CONTEXT + (epoch * 379) % CONTEXT)
        batch = torch.stack([tokens[s : s + CONTEXT] for s in starts]).to(device)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = cosine((step + 1) / steps, PEAK_LR[name])
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = compiled(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds += time.perf_counter() - began
        if step % 10 == 0 or step == steps - 1:
            print(
                f"{name} step {step}/{steps} loss {loss.item():.3f} {time.perf_counter() - began:.2f} s/step",
                flush=True,
            )
        if (step + 1) % 100 == 0 or step == steps - 1:
            temporary = checkpoint.with_suffix(".tmp")
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizers": [o.state_dict() for o in optimizers],
                    "step": step + 1,
                    "seconds": seconds,
                },
                temporary,
            )
            temporary.replace(checkpoint)
    return model.cpu(), {
        "steps": steps,
        "tokens": steps * BATCH_TOKENS,
        "epochs": round(steps * rows / per_epoch, 2),
        "seconds": round(seconds),
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
- Training: {facts["steps"]} steps of {BATCH_TOKENS} tokens ({facts["epochs"]} epochs), Muon for matrices and AdamW for the rest, peak
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
    if not split["train_english"]:
        parser.error(f"no *.txt.gz in {args.english}")
    random.Random(0).shuffle(split["train_english"])
    tokenizer_folder = args.work / "tokenizer"
    if tokenizer_folder.exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    else:
        tokenizer = train_tokenizer(split["train_english"] * 2 + split["train_code"])
        tokenizer.save_pretrained(tokenizer_folder)
    texts = split["train_english"] * 2 + split["train_code"]  # English twice: there is less of it
    random.Random(1).shuffle(texts)
    ids = encode(tokenizer, texts)
    sizes = {k: sum(len(t.encode()) for t in v) for k, v in split.items()}
    print("bytes", sizes, "tokens", len(ids), flush=True)
    for name in [args.only] if args.only else [*SIZES]:
        model, facts = train(name, ids, args.work, args.steps, args.device)
        model = model.to(torch.bfloat16).float().eval()  # as shipped: rounded to bf16
        facts |= {
            f"bits_per_byte_{kind}": round(bits_per_byte(model, tokenizer, split[f"held_out_{kind}"]), 4)
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
