"""Train a Block Transformer on a folder of text, from nothing or from a GPT-NeoX model.

    python scripts/train_block_transformer.py --text corpus/ --out run/ --variant block_main_b4_5 --tokenizer EleutherAI/pythia-70m
    python scripts/train_block_transformer.py --text corpus/ --out run/ --uptrain EleutherAI/pythia-160m --steps 57200

The paper's recipe: documents with random padding in front packed into rows of 2,048 tokens, 256 rows per step, AdamW
(0.9, 0.95) with weight decay 0.1, 3,000 steps of warm-up, cosine to a tenth, 572,000 steps, bfloat16. Every ``--save-every``
steps the state is written; the same command goes on from there with the same result. ``--out`` ends as a folder for
``AutoModelForCausalLM.from_pretrained`` (after ``import tokenry.language.block_transformer``).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenry.assets import load_model
from tokenry.language import (
    VARIANTS,
    BlockTransformerConfig,
    BlockTransformerForCausalLM,
    block_transformer_from,
    pack_documents,
)
from tokenry.measure import whole_file


def documents(folder: Path) -> list[str]:
    """Paragraphs of every ``*.txt`` below the folder."""
    texts = [path.read_text("utf-8", errors="replace") for path in sorted(folder.rglob("*.txt"))]
    return [part.strip() for text in texts for part in text.split("\n\n") if part.strip()]


def rows(
    texts: list[str], tokenizer, config: BlockTransformerConfig, row_length: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Packed rows, epoch after epoch, each epoch in another order and with other padding."""
    epoch = 0
    while True:
        order = list(texts)
        random.Random(seed * 1_000_003 + epoch).shuffle(order)
        encoded = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in order)
        packed = pack_documents(
            encoded,
            block_length=config.block_length,
            row_length=row_length,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=config.padding,
            seed=seed * 1_000_003 + epoch,
        )
        empty = True
        for row in packed:
            empty = False
            yield row
        if empty:
            raise SystemExit(
                f"the text does not fill one row of {row_length} tokens; give more, or a smaller --row-length"
            )
        epoch += 1


def rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then cosine to a tenth."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


def make_model(args: argparse.Namespace, tokenizer) -> BlockTransformerForCausalLM:
    if args.uptrain:
        return block_transformer_from(
            AutoModelForCausalLM.from_pretrained(args.uptrain), block_length=args.block_length
        )
    settings = {
        "vocab_size": -(-len(tokenizer) // 128) * 128,
        "block_length": args.block_length,
        "max_position_embeddings": args.row_length,
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    }
    sizes = {
        name: getattr(args, name) for name in ("hidden_size", "block_layers", "token_layers") if getattr(args, name)
    }
    return BlockTransformerForCausalLM(VARIANTS[args.variant].config(**settings, **sizes))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder of *.txt")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", help="folder or hub id; default: that of the embedded models")
    parser.add_argument("--variant", choices=[*VARIANTS], default="block_main_b4_5")
    parser.add_argument("--uptrain", help="GPT-NeoX model to begin with, folder or hub id")
    for name in ("--hidden-size", "--block-layers", "--token-layers"):
        parser.add_argument(name, type=int, help="instead of the variant's")
    parser.add_argument("--block-length", type=int, default=4)
    parser.add_argument("--row-length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=256, help="per step")
    parser.add_argument("--accumulate", type=int, default=1, help="parts in which a step's rows are run")
    parser.add_argument("--steps", type=int, default=572_000)
    parser.add_argument("--stop-after", type=int, help="leave at this step, as if killed")
    parser.add_argument("--warmup", type=int, default=3000)
    parser.add_argument("--lr", type=float, help="default: the variant's")
    parser.add_argument("--save-every", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.lr = args.lr or VARIANTS[args.variant].learning_rate
    if args.rows % args.accumulate:
        parser.error(f"--rows {args.rows} must be a multiple of --accumulate {args.accumulate}")
    args.out.mkdir(parents=True, exist_ok=True)

    texts = documents(args.text)
    if not texts:
        parser.error(f"no *.txt with text in {args.text}")
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer) if args.tokenizer else load_model("draft")[1]
    torch.manual_seed(args.seed)
    model = make_model(args, tokenizer).to(args.device).train()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
    )
    stream = rows(texts, tokenizer, model.config, args.row_length, args.seed)
    state, first = args.out / "state.pt", 0
    if state.exists():
        saved = torch.load(state, weights_only=True, map_location=args.device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
        for _ in range(first * args.rows):  # the stream is the same every time: skip what was seen
            next(stream)
    log = (args.out / "log.jsonl").open("a", encoding="utf-8")
    began = time.perf_counter()
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args)
        batch = [next(stream) for _ in range(args.rows)]
        ids, mask = (torch.stack(parts).to(args.device) for parts in zip(*batch, strict=True))
        counted = mask[:, model.config.block_length :].sum()
        total = torch.zeros((), device=args.device)
        for part_ids, part_mask in zip(ids.chunk(args.accumulate), mask.chunk(args.accumulate), strict=True):
            with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.device != "cpu"):
                loss = model(part_ids, attention_mask=part_mask, labels=part_ids, num_items_in_batch=counted).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if done % args.save_every == 0 or done == args.steps:
            entry = {"step": done, "loss": round(total.item(), 4), "seconds": round(time.perf_counter() - began, 1)}
            log.write(json.dumps(entry) + "\n")
            log.flush()
            print(f"step {done} of {args.steps}: loss {entry['loss']}", flush=True)
            with whole_file(state) as unfinished:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}, unfinished)
        if done == args.stop_after and done < args.steps:
            log.close()
            return
    log.close()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
