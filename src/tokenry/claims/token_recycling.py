"""Claims of Token Recycling, measured on the embedded model beside plain greedy decoding and prompt lookup."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from tokenry.assets import load_model, prompts
from tokenry.claims.registry import Context, Measurement, measures
from tokenry.measure import count_passes

if TYPE_CHECKING:
    from tokenry.decoding import DraftStrategy

NEW_TOKENS = 128
BATCH = 8
CHUNK = 8  # prompts per resumable step


def _setup(device: str) -> tuple[Any, list[Any]]:
    """The embedded model and the held-out prompts, each encoded alone."""
    model, tokenizer = load_model(device=device)
    encode = {"return_tensors": "pt", "return_token_type_ids": False}
    return model, [tokenizer(prompt, **encode).to(device) for prompt in prompts()]


def _generate(model: Any, inputs: Any, strategy: DraftStrategy | None = None, **options: Any) -> Any:
    chosen = {"custom_generate": strategy} if strategy is not None else {}
    return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **chosen, **options)


def _counted(model: Any, inputs: Any, **options: Any) -> tuple[Any, int, int]:
    """Text, passes of the model, tokens emitted, for strategies that count nothing themselves."""
    with count_passes(model) as passes:
        out = _generate(model, inputs, **options)
    return out, passes.number, out.shape[1] - inputs["input_ids"].shape[1]


@measures("token-recycling", "lossless")
def lossless(context: Context) -> Measurement:
    """Identical ids for every prompt, alone and in left-padded batches of eight."""
    import torch

    from tokenry.decoding import TokenRecycling, explain_difference

    model, inputs = _setup(context.device)
    _, tokenizer = load_model()
    alone = TokenRecycling(tree=None)
    together = TokenRecycling(tree=None)

    stops = model.generation_config.eos_token_id

    def chunk(first: int) -> dict[str, Any]:
        some, same, same_batch, different = inputs[first : first + CHUNK], 0, 0, []
        batch = tokenizer(
            prompts()[first : first + CHUNK], return_tensors="pt", padding=True, return_token_type_ids=False
        )
        rows = _generate(model, batch.to(context.device), together)[:, batch["input_ids"].shape[1] :]
        for i, (x, row) in enumerate(zip(some, rows, strict=True)):
            text, mine = _generate(model, x)[0], _generate(model, x, alone)[0]
            new = text[x["input_ids"].shape[1] :]
            padding = row[len(new) :]
            same += torch.equal(mine, text)
            same_batch += torch.equal(row[: len(new)], new) and bool(
                ((padding == tokenizer.pad_token_id) | (padding == stops)).all()
            )
            for kind, other in (("alone", mine), ("batch", torch.cat([x["input_ids"][0], row[: len(new)]]))):
                found = explain_difference(model, text.cpu(), other.cpu())
                if found is not None:
                    different.append(
                        {"prompt": first + i, "kind": kind, "at": found.position, "gap": found.gap, "ulps": found.ulps}
                    )
        return {"same": same, "same_batch": same_batch, "different": different}

    found = [
        context.session.step(f"prompts{first}", lambda f=first: chunk(f)) for first in range(0, len(inputs), CHUNK)
    ]
    same, batch = (sum(part[key] for part in found) for key in ("same", "same_batch"))
    return Measurement(
        shows=same == batch == len(inputs),
        value=float(min(same, batch)),
        baseline=float(len(inputs)),
        sentence=f"text identical to plain greedy for {same} of {len(inputs)} prompts alone and {batch} of {len(inputs)} "
        f"in batches of {BATCH}, {NEW_TOKENS} new tokens each, float32, 80-node tree (must be all)",
        details={"differences": [d for part in found for d in part["different"]]},
    )


@measures("token-recycling", "accepted-length")
def accepted_length(context: Context) -> Measurement:
    """Tokens per pass: hot, cold, chain, prompt lookup, plain."""
    from tokenry.decoding import DecodingStats, TokenRecycling

    model, inputs = _setup(context.device)
    some = inputs[::2]

    def drafted(tree: Any, *, hot: bool) -> dict[str, Any]:
        strategy, runs = TokenRecycling(tree=tree), []
        for x in some:
            if not hot and strategy.matrix is not None:
                strategy.matrix.reset()
            _generate(model, x, strategy)
            runs.append(strategy.stats)
        warm = runs[1:] if hot else runs  # the first prompt of a hot run is cold
        total = DecodingStats.total(warm)
        return total.summary() | {"per_prompt": [round(r.mean_accepted_length, 3) for r in warm]}

    def looked_up(**options: Any) -> dict[str, Any]:
        counted = [_counted(model, x, **options)[1:] for x in some]
        return {"mean_accepted_length": sum(t for _, t in counted) / sum(p for p, _ in counted)}

    step = context.session.step
    hot = step("hot", lambda: drafted(None, hot=True))
    cold = step("cold", lambda: drafted(None, hot=False))
    chain = step("chain", lambda: drafted([[0] * depth for depth in range(1, 7)], hot=True))
    lookup = step("prompt-lookup", lambda: looked_up(prompt_lookup_num_tokens=10))
    plain = step("plain", lambda: drafted(0, hot=True))
    length = {
        name: float(part["mean_accepted_length"])
        for name, part in {"hot": hot, "cold": cold, "chain": chain, "lookup": lookup, "plain": plain}.items()
    }
    shows = (
        length["hot"] >= 2.0
        and length["hot"] > max(length["cold"], length["lookup"], length["chain"])
        and length["cold"] > 1.0
        and length["plain"] == 1.0
    )
    return Measurement(
        shows=shows,
        value=round(length["hot"], 3),
        baseline=round(length["plain"], 3),
        spread=round(statistics.stdev(hot["per_prompt"]), 3),
        sentence=f"{length['hot']:.2f} tokens per pass hot (must be at least 2.0), {length['cold']:.2f} cold, a chain of six "
        f"{length['chain']:.2f}, prompt lookup {length['lookup']:.2f} (hot must be above these three), plain "
        f"{length['plain']:.2f} (must be 1.00)",
        details={"hot": hot, "cold": cold, "chain": chain, "prompt_lookup": lookup, "new_tokens": NEW_TOKENS},
    )


@measures("token-recycling", "never-slower")
def never_slower(context: Context) -> Measurement:
    """Wall-clock ratio of the automatic tree to stock greedy generate, turn by turn, cold and hot, batch 1 and 8."""
    import torch

    from tokenry.decoding import TokenRecycling
    from tokenry.measure import interleave

    model, inputs = _setup(context.device)
    _, tokenizer = load_model()
    batch = tokenizer(prompts()[::5], return_tensors="pt", padding=True, return_token_type_ids=False).to(context.device)

    def timed(which: list[Any], others: list[Any]) -> dict[str, Any]:
        strategy = TokenRecycling()
        for x in others:
            _generate(model, x, strategy)
        matrix: Any = strategy.matrix  # made by the first call
        table = matrix.table
        filled = table.clone()

        def from_(start: torch.Tensor) -> None:
            for x in which:
                table.copy_(start)  # every turn starts alike: the measured prompts have not been seen
                _generate(model, x, strategy)

        functions = {
            "plain": lambda: [_generate(model, x) for x in which],
            "cold": lambda: from_(torch.zeros_like(filled)),
            "hot": lambda: from_(filled),
        }
        timings = interleave(functions, repeats=5, device=context.device)
        ratios = {
            name: [p / m for p, m in zip(timings["plain"].seconds, timings[name].seconds, strict=True)]
            for name in ("cold", "hot")
        }
        return {name: {"ratio": statistics.median(r), "all": [round(x, 3) for x in r]} for name, r in ratios.items()}

    one = context.session.step("batch1", lambda: timed(inputs[::10], inputs[1::10]))
    eight = context.session.step("batch8", lambda: timed([batch], inputs[1::10]))
    parts = {
        "alone, hot": one["hot"],
        "alone, cold": one["cold"],
        "batch of 8, hot": eight["hot"],
        "batch of 8, cold": eight["cold"],
    }
    worst = min(parts, key=lambda name: parts[name]["ratio"])
    return Measurement(
        shows=parts[worst]["ratio"] >= 1 / 1.05,
        value=round(parts["alone, hot"]["ratio"], 3),
        baseline=1.0,
        spread=round(statistics.stdev(parts["alone, hot"]["all"]), 3),
        sentence="speed in multiples of stock greedy generate, automatic tree: "
        + ", ".join(f"{name} {part['ratio']:.2f}" for name, part in parts.items())
        + " (none may be below 0.95)",
        details={"ratios": parts, "new_tokens": NEW_TOKENS},
    )


@measures("token-recycling", "storage")
def storage(context: Context) -> Measurement:
    """Size of the table for a vocabulary of 32,000."""
    from tokenry.decoding import TokenRecyclingMatrix

    value = TokenRecyclingMatrix(32_000).nbytes / 2**20
    return Measurement(
        shows=value < 2.0,
        value=round(value, 3),
        sentence=f"{value:.2f} MB (2^20 bytes) for 32,000 x 8 candidates in int64 (must be under 2)",
    )
