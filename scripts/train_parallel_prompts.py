"""Train the parallel prompts that ship with an embedded model, and measure how often they guess right.

    python scripts/train_parallel_prompts.py --english FOLDER --work build/prompts

``FOLDER`` holds ``*.txt.gz``; the texts are those that the embedded models were trained on
(``scripts/train_embedded_models.py``). Each row is 32 tokens of a training document and 96 that the model writes
behind them: what the prompts will meet. Rows and training are kept in ``--work``; started again, the script goes on
from there. The result is ``src/tokenry/assets/models/<model>/parallel_prompts``: two files in PEFT's format and
``acceptance.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from embedded_text import documents, training_texts
from tokenry.assets import load_model, model_path, prompts
from tokenry.claims.small_models import token_stream
from tokenry.decoding import DecodingStats, ParallelPromptDecoding, ParallelPrompts

PREFIX, CONTINUATION = 32, 96
BATCH, CUTS, LR = 16, 16, 1e-2
MEASURED_ROWS = 256  # for the accuracy table: not trained on
BUDGETS = (16, 60)  # whose tokens per pass are reported
NEW_TOKENS = 128


@torch.no_grad()
def rows_of(model, tokenizer, english: Path, count: int, file: Path) -> torch.Tensor:
    """``(count, 128)`` training text with the model's own continuation."""
    if file.exists():
        return load_file(file)["rows"]
    ids = token_stream(tokenizer, training_texts(documents(english), 2))
    starts = torch.randint(len(ids) - PREFIX, (count,), generator=torch.Generator().manual_seed(0))
    prefixes = ids[starts[:, None] + torch.arange(PREFIX)]
    written = []
    for part in prefixes.split(32):
        options = {"min_new_tokens": CONTINUATION, "max_new_tokens": CONTINUATION, "do_sample": False}
        written.append(model.generate(part.to(model.device), attention_mask=torch.ones_like(part), **options).cpu())
        print(f"rows {sum(map(len, written))}/{count}", flush=True)
    rows = torch.cat(written)
    save_file({"rows": rows}, file)
    return rows


def tokens_per_pass(model, tokenizer, strategy) -> float:
    """On the forty embedded prompts."""
    runs = []
    for text in prompts():
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(model.device)
        model.generate(**inputs, custom_generate=strategy, max_new_tokens=NEW_TOKENS, do_sample=False)
        runs.append(strategy.stats)
    return round(DecodingStats.total(runs).mean_accepted_length, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--english", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/prompts"))
    parser.add_argument("--model", choices=["small", "draft"], default="small")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1280)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(args.model, device=args.device)
    rows = rows_of(model, tokenizer, args.english, args.rows, args.work / f"{args.model}-rows.safetensors")
    learned, held_out = rows[:-MEASURED_ROWS], rows[-MEASURED_ROWS:]

    sentence = tokenizer("Next 2 words", return_tensors="pt")["input_ids"]  # the start the paper gives them
    trained = ParallelPrompts(model, args.prompts, init_ids=sentence)
    began, checkpoint = time.perf_counter(), args.work / f"{args.model}.pt"
    losses = trained.fit(model, learned, steps=args.steps, batch_size=BATCH, cuts=CUTS, lr=LR, checkpoint=checkpoint)
    print(f"loss {sum(losses[:20]) / 20:.3f} at first, {sum(losses[-20:]) / 20:.3f} at last", flush=True)
    table = trained.measure(model, held_out, cuts=CUTS)
    folder = model_path(args.model) / "parallel_prompts"
    trained.save_pretrained(folder, base_model=f"tokenry/{args.model}")
    facts = json.loads((folder / "acceptance.json").read_text("utf-8")) | {
        "training": {
            "steps": args.steps,
            "texts_per_step": BATCH,
            "places_per_text": CUTS,
            "peak_lr": LR,
            "seconds_of_the_last_run": round(time.perf_counter() - began),
            "loss": round(sum(losses[-20:]) / 20, 4),
        },
        "measured_on": f"{MEASURED_ROWS * CUTS} places in {MEASURED_ROWS} rows of {PREFIX} + {CONTINUATION} tokens",
        "tokens_per_pass": {
            str(budget): tokens_per_pass(model, tokenizer, ParallelPromptDecoding(trained, budget))
            for budget in BUDGETS
        },
        "tokens_per_pass_on": f"{len(prompts())} held-out prompts of {NEW_TOKENS} new tokens each, greedy, float32",
    }
    (folder / "acceptance.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    print(json.dumps(facts), table.cumsum(1)[:, [0, -1]])


if __name__ == "__main__":
    main()
