"""Claims of Parallel Prompt Decoding on the embedded models: text, speed and memory; acceptance is ``ppd_acceptance``."""

from __future__ import annotations

import statistics
from typing import Any

from tokenry.assets import prompts
from tokenry.claims.ppd_acceptance import BUDGET, NEW_TOKENS, generate, random_prompts, setup
from tokenry.claims.registry import Context, Measurement, measures
from tokenry.claims.small_models import english, rows_of, train

BATCH = 8


@measures("ppd", "lossless")
def lossless(context: Context) -> Measurement:
    """Identical ids for every prompt, alone and in left-padded batches of eight, with trained and with random prompts."""
    import torch

    from tokenry.decoding import ParallelPromptDecoding, explain_difference, sparse_trees

    model, tokenizer, inputs, trained = setup(context.device)
    table: Any = trained.accuracy
    trees = sparse_trees(table, BUDGET)
    strategies = {
        "trained": ParallelPromptDecoding(trained, trees),
        "random": ParallelPromptDecoding(random_prompts(trained, context.seed), trees),
    }
    new = NEW_TOKENS // 2

    def chunk(first: int) -> dict[str, Any]:
        some, found = inputs[first : first + BATCH], {"alone": 0, "batch": 0, "random": 0}
        texts = prompts()[first : first + BATCH]
        batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False).to(context.device)
        rows = generate(model, batch, strategies["trained"], new=new)[:, batch["input_ids"].shape[1] :]
        different = []
        for i, (x, row) in enumerate(zip(some, rows, strict=True)):
            width = x["input_ids"].shape[1]
            text = generate(model, x, new=new)[0]
            mine = {
                "alone": generate(model, x, strategies["trained"], new=new)[0],
                "batch": torch.cat([x["input_ids"][0], row[: len(text) - width]]),
                "random": generate(model, x, strategies["random"], new=new)[0],
            }
            for kind, other in mine.items():
                difference = explain_difference(model, text.cpu(), other.cpu())
                found[kind] += difference is None
                if difference is not None:
                    different.append(
                        {"prompt": first + i, "kind": kind, "at": difference.position, "gap": difference.gap}
                    )
        return found | {"different": different}

    step = context.session.step
    parts = [step(f"prompts{first}", lambda f=first: chunk(f)) for first in range(0, len(inputs), BATCH)]
    same = {kind: sum(part[kind] for part in parts) for kind in ("alone", "batch", "random")}
    return Measurement(
        shows=all(n == len(inputs) for n in same.values()),
        value=float(min(same.values())),
        baseline=float(len(inputs)),
        sentence=f"text identical to plain greedy for {same['alone']} of {len(inputs)} prompts alone, {same['batch']} in "
        f"batches of {BATCH} and {same['random']} with random prompt embeddings, {new} new tokens each, float32, trees of "
        f"budget {BUDGET} (must be all)",
        details={"differences": [d for part in parts for d in part["different"]]},
    )


@measures("ppd", "never-slower")
def never_slower(context: Context) -> Measurement:
    """Wall-clock ratio of the automatic budget to stock greedy generate, turn by turn, batch 1 and 8."""
    from tokenry.decoding import ParallelPromptDecoding, best_budget
    from tokenry.measure import interleave

    model, tokenizer, inputs, trained = setup(context.device)
    batch = tokenizer(prompts()[::5], return_tensors="pt", padding=True, return_token_type_ids=False).to(context.device)
    table: Any = trained.accuracy

    def timed(which: list[Any]) -> dict[str, Any]:
        automatic, fixed = ParallelPromptDecoding(trained), ParallelPromptDecoding(trained, BUDGET)
        functions = {
            "plain": lambda: [generate(model, x) for x in which],
            "automatic": lambda: [generate(model, x, automatic) for x in which],
            "fixed": lambda: [generate(model, x, fixed) for x in which],
        }
        timings = interleave(functions, repeats=5, device=context.device)
        return {
            name: [round(p / m, 3) for p, m in zip(timings["plain"].seconds, timings[name].seconds, strict=True)]
            for name in ("automatic", "fixed")
        }

    step = context.session.step
    one = step("batch1", lambda: timed(inputs[::8]))
    eight = step("batch8", lambda: timed([batch]))
    budgets = {str(rows): best_budget(model, table, batch_size=rows) for rows in (1, BATCH)}
    parts = {"alone": statistics.median(one["automatic"]), f"batch of {BATCH}": statistics.median(eight["automatic"])}
    return Measurement(
        shows=min(parts.values()) >= 1 / 1.05,
        value=round(parts["alone"], 3),
        baseline=1.0,
        spread=round(statistics.stdev(one["automatic"]), 3),
        sentence="speed in multiples of stock greedy generate, automatic budget: "
        + ", ".join(f"{name} {ratio:.2f}" for name, ratio in parts.items())
        + f" (none may be below 0.95); the latency curve alone chooses budget {budgets['1']} for one row (0: plain "
        f"decoding); budget {BUDGET} regardless: {statistics.median(one['fixed']):.2f}",
        details={"batch1": one, "batch8": eight, "best_budget": budgets, "new_tokens": NEW_TOKENS},
    )


@measures("ppd", "on-a-draft-model")
def on_a_draft_model(context: Context) -> Measurement:
    """Speculative decoding of the small model by the draft model, which decodes plainly or with parallel prompts."""
    import torch

    from tokenry.decoding import DecodingStats, DraftModelDecoding, ParallelPromptDecoding
    from tokenry.measure import interleave

    model, _, inputs, _ = setup(context.device)
    draft, _, _, trained = setup(context.device, "draft")
    some = inputs[::4]

    def timed() -> dict[str, Any]:
        strategies = {
            "plain draft": DraftModelDecoding(draft, 5),
            "prompts": DraftModelDecoding(draft, 5, ParallelPromptDecoding(trained, 16)),
        }
        texts: dict[str, list[Any]] = {}
        stats: dict[str, DecodingStats] = {}

        def run(name: str) -> None:
            runs, texts[name] = [], []
            for x in some:
                texts[name].append(generate(model, x, strategies[name])[0])
                runs.append(strategies[name].stats)
            stats[name] = DecodingStats.total(runs)

        timings = interleave({name: lambda n=name: run(n) for name in strategies}, repeats=5, device=context.device)
        pairs = zip(timings["plain draft"].seconds, timings["prompts"].seconds, strict=True)
        return {
            "ratios": [round(p / m, 3) for p, m in pairs],
            "same": all(torch.equal(a, b) for a, b in zip(*texts.values(), strict=True)),
            "draft_passes": {name: s.draft_passes for name, s in stats.items()},
            "target_passes": {name: s.forward_passes for name, s in stats.items()},
        }

    found = context.session.step("timed", timed)
    ratio, passes = statistics.median(found["ratios"]), found["draft_passes"]
    return Measurement(
        shows=found["same"] and ratio > 1.0,
        value=round(ratio, 3),
        baseline=1.0,
        spread=round(statistics.stdev(found["ratios"]), 3),
        sentence=f"speculative decoding with parallel prompts on the draft model is {ratio:.2f} times as fast as without "
        f"(must be above 1); passes of the draft {passes['prompts']} against {passes['plain draft']}, text "
        f"{'the same' if found['same'] else 'DIFFERENT'}",
        details=found,
    )


def _vicuna_7b() -> Any:
    """The architecture of Vicuna-7B, without weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig())  # the library's default is the 7B


@measures("ppd", "parameters")
def parameters(context: Context) -> Measurement:
    """Trainable parameters for Vicuna-7B."""
    import torch

    from tokenry.decoding import ParallelPrompts

    model = _vicuna_7b()
    base = sum(p.numel() for p in model.parameters())
    mine = sum(p.numel() for p in ParallelPrompts(torch.zeros(3, model.config.hidden_size)).parameters())
    share = 100 * mine / base
    return Measurement(
        shows=round(share, 4) <= 0.0002,
        value=round(share, 6),
        sentence=f"{mine:,} of {base:,} parameters are trained for Vicuna-7B: {share:.6f} % (must be 0.0002 when rounded)",
    )


@measures("ppd", "memory")
def memory(context: Context) -> Measurement:
    """Bytes that stay in memory between passes, against Vicuna-7B's weights in half precision."""
    from tokenry.decoding import sparse_trees
    from tokenry.decoding.prompt_tree import PromptTree

    model, budget = _vicuna_7b(), 105
    weights = 2 * sum(p.numel() for p in model.parameters())
    prompts_ = 2 * 3 * model.config.hidden_size
    table: Any = setup("cpu")[3].accuracy
    trees = sparse_trees(table, budget)
    held = 0
    for d in trees:
        shape = PromptTree(trees, {d})
        tensors = [*vars(shape).values(), *vars(shape.tree).values()]
        held += sum(t.nbytes for t in tensors if hasattr(t, "nbytes"))
    share = 100 * (prompts_ + held) / weights
    return Measurement(
        shows=share <= 0.0004,
        value=round(share, 6),
        sentence=f"prompt embeddings {prompts_:,} bytes and index tensors of the trees of budget {budget} {held:,} bytes: "
        f"{share:.5f} % of Vicuna-7B's weights in half precision (must be at most 0.0004)",
        details={"prompts": prompts_, "trees": held, "weights": weights},
    )


@measures("ppd", "speed-by-budget")
def speed_by_budget(context: Context) -> Measurement:
    """Train a language model and its prompts, then time every budget against stock greedy generate."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tokenry.decoding import ParallelPromptDecoding, ParallelPrompts, best_budget, pass_latency
    from tokenry.measure import interleave

    text = english(context)
    large = context.device == "cuda"
    width, depth = (1024, 12) if large else (64, 2)
    torch.manual_seed(context.seed)
    config = LlamaConfig(
        vocab_size=len(text.tokenizer),
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(context.device)
    steps = (1500, 600) if large else (20, 20)
    train(context, "base", model, text.train, steps=steps[0], rows=32, length=256, lr=1e-3)
    learned = rows_of(text.train, 2048, 128, 0, 1)
    trained = ParallelPrompts(model)

    def fitted() -> dict[str, Any]:
        trained.fit(model, learned, steps=steps[1], cuts=32)
        table = trained.measure(model, rows_of(text.held_out, 64, 128, 0, 1)).tolist()
        return {"embeddings": trained.embeddings.tolist(), "table": table}

    fit = context.session.step("prompts", fitted)
    trained.embeddings.data.copy_(torch.tensor(fit["embeddings"]))
    trained.accuracy = torch.tensor(fit["table"])
    half = model.to(torch.bfloat16) if large else model
    written = rows_of(text.held_out, 4, 64, 1, 1).to(context.device)
    inputs = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in written]
    budgets = [10, 20, 40, 60, 105, 140, 200]

    def timed() -> dict[str, Any]:
        strategies = {str(b): ParallelPromptDecoding(trained, b) for b in budgets}
        functions: dict[str, Any] = {"plain": lambda: [generate(half, x, pad_token_id=0) for x in inputs]}
        for name, strategy in strategies.items():
            functions[name] = lambda s=strategy: [generate(half, x, s, pad_token_id=0) for x in inputs]
        timings = interleave(functions, repeats=3, device=context.device)
        plain = statistics.median(timings["plain"].seconds)
        return {name: plain / statistics.median(timings[name].seconds) for name in strategies}

    speed = context.session.step("speed", timed)
    curve = pass_latency(half)
    chosen = best_budget(half, trained.accuracy, budgets=budgets)
    reached = speed.get(str(chosen), 1.0)
    best = max(speed, key=lambda name: speed[name])
    return Measurement(
        shows=reached > 1.0 and reached >= 0.9 * speed[best],
        value=round(reached, 3),
        baseline=1.0,
        sentence=f"the latency curve chooses budget {chosen}, {reached:.2f} times as fast as stock greedy generate (must be "
        f"above 1 and within 10 % of the fastest measured, budget {best} at {speed[best]:.2f})",
        details={
            "speed": speed,
            "parameters": sum(p.numel() for p in model.parameters()),
            "latency_ratio": {str(size): round(curve.ratio(size), 3) for size in curve.sizes},
        },
    )
