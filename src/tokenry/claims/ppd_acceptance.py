"""How much is accepted: tokens per pass of trained prompts beside prompt lookup, and hit rates by distance."""

from __future__ import annotations

import itertools
import statistics
from typing import TYPE_CHECKING, Any

from tokenry.assets import load_model, model_path, prompts
from tokenry.claims.registry import Context, Measurement, measures
from tokenry.claims.small_models import english, rows_of
from tokenry.measure import count_passes

if TYPE_CHECKING:
    from tokenry.decoding import DraftStrategy, ParallelPrompts

NEW_TOKENS = 128
BUDGET = 60  # the paper's for its 13B model; all its trees fit a pass of 64 nodes
STEPS = 300
TEMPERATURES = (0.7, 1.0)


def setup(device: str, name: str = "small") -> tuple[Any, Any, list[Any], ParallelPrompts]:
    """An embedded model, its tokenizer, the held-out prompts, each encoded alone, and its parallel prompts."""
    from tokenry.decoding import ParallelPrompts

    model, tokenizer = load_model(name, device=device)
    encode = {"return_tensors": "pt", "return_token_type_ids": False}
    trained = ParallelPrompts.from_pretrained(model_path(name) / "parallel_prompts").to(device)
    return model, tokenizer, [tokenizer(prompt, **encode).to(device) for prompt in prompts()], trained


def random_prompts(like: ParallelPrompts, seed: int) -> ParallelPrompts:
    """Prompt embeddings of the same shape that nobody trained."""
    import torch

    from tokenry.decoding import ParallelPrompts

    noise = torch.randn(like.embeddings.shape, generator=torch.Generator().manual_seed(seed))
    return ParallelPrompts(noise.to(like.embeddings.device))


def generate(
    model: Any, inputs: Any, strategy: DraftStrategy | None = None, *, new: int = NEW_TOKENS, **options: Any
) -> Any:
    """Text of one call: greedy unless ``options`` ask for sampling, stock ``generate`` without a strategy."""
    chosen = {"custom_generate": strategy} if strategy is not None else {}
    return model.generate(**inputs, max_new_tokens=new, **{"do_sample": False} | chosen | options)


def tokens_per_pass(
    model: Any, inputs: list[Any], strategy: DraftStrategy, new: int = NEW_TOKENS, seed: int = 0, **options: Any
) -> dict[str, Any]:
    """Counts of a strategy over all prompts, the i-th drawn with ``seed + i`` where the options ask for sampling."""
    import torch

    from tokenry.decoding import DecodingStats

    runs = []
    for i, x in enumerate(inputs):
        torch.manual_seed(seed + i)
        generate(model, x, strategy, new=new, **options)
        runs.append(strategy.stats)
    each = [round(run.mean_accepted_length, 3) for run in runs]
    return DecodingStats.total(runs).summary() | {"per_prompt": each}


def looked_up(model: Any, inputs: list[Any], new: int = NEW_TOKENS, seed: int = 0, **options: Any) -> dict[str, Any]:
    """The same for the library's own prompt lookup, which counts nothing itself."""
    import torch

    tokens = 0
    with count_passes(model) as passes:
        for i, x in enumerate(inputs):
            torch.manual_seed(seed + i)
            out = generate(model, x, new=new, prompt_lookup_num_tokens=10, **options)
            tokens += out.shape[1] - x["input_ids"].shape[1]
    return {"mean_accepted_length": tokens / passes.number}


@measures("ppd", "accepted-length")
def accepted_length(context: Context) -> Measurement:
    """Tokens per pass of the shipped prompts, of random ones, of prompt lookup and of plain decoding, forty prompts."""
    from tokenry.decoding import ParallelPromptDecoding, sparse_trees

    model, _, inputs, trained = setup(context.device)
    table: Any = trained.accuracy
    trees = sparse_trees(table, BUDGET)
    mine = ParallelPromptDecoding(trained, trees)
    untrained = ParallelPromptDecoding(random_prompts(trained, context.seed), trees)
    step = context.session.step
    parts = {
        "trained": step("trained", lambda: tokens_per_pass(model, inputs, mine)),
        "random": step("random", lambda: tokens_per_pass(model, inputs[::4], untrained)),
        "lookup": step("prompt-lookup", lambda: looked_up(model, inputs)),
    }
    length = {name: float(part["mean_accepted_length"]) for name, part in parts.items()}
    return Measurement(
        shows=length["trained"] > max(length["lookup"], length["random"], 1.0),
        value=round(length["trained"], 3),
        baseline=round(length["lookup"], 3),
        spread=round(statistics.stdev(parts["trained"]["per_prompt"]), 3),
        sentence=f"{length['trained']:.2f} tokens per pass with the shipped prompts, trees of budget {BUDGET}; prompt "
        f"lookup {length['lookup']:.2f}, random prompt embeddings {length['random']:.2f}, plain 1.00 (must be above all)",
        details=parts | {"new_tokens": NEW_TOKENS},
    )


@measures("ppd", "accepted-length-sampled")
def accepted_length_sampled(context: Context) -> Measurement:
    """The same where the text is sampled and so repeats itself less, at two temperatures."""
    from tokenry.decoding import ParallelPromptDecoding, TokenRecycling, sparse_trees

    model, _, inputs, trained = setup(context.device)
    table: Any = trained.accuracy
    trees = sparse_trees(table, BUDGET)
    untrained = ParallelPromptDecoding(random_prompts(trained, context.seed), trees)
    new = NEW_TOKENS // 2
    parts: dict[str, dict[str, Any]] = {}
    for temperature in TEMPERATURES:
        given = {"new": new, "seed": context.seed, "do_sample": True, "temperature": temperature, "top_k": 0}
        runs = {
            "trained": lambda g=given: tokens_per_pass(model, inputs, ParallelPromptDecoding(trained, trees), **g),
            "random": lambda g=given: tokens_per_pass(model, inputs[::4], untrained, **g),
            "lookup": lambda g=given: looked_up(model, inputs, **g),
            "recycling": lambda g=given: tokens_per_pass(model, inputs, TokenRecycling(tree=None), **g),
        }
        step = context.session.step
        parts[f"{temperature}"] = {name: step(f"{name}-{temperature}", run) for name, run in runs.items()}
    length = {t: {name: float(p["mean_accepted_length"]) for name, p in part.items()} for t, part in parts.items()}
    last = f"{TEMPERATURES[-1]}"
    told = [
        f"temperature {t} {n['trained']:.2f} tokens per pass with the shipped prompts, prompt lookup {n['lookup']:.2f}, "
        f"random prompt embeddings {n['random']:.2f}, plain 1.00, token recycling {n['recycling']:.2f}"
        for t, n in length.items()
    ]
    return Measurement(
        shows=all(n["trained"] > max(n["lookup"], n["random"], 1.0) for n in length.values()),
        value=round(length[last]["trained"], 3),
        baseline=round(length[last]["lookup"], 3),
        spread=round(statistics.stdev(parts[last]["trained"]["per_prompt"]), 3),
        sentence=f"sampling, trees of budget {BUDGET}: {'; '.join(told)} (must be above prompt lookup, random and plain at "
        f"both temperatures; token recycling is not judged)",
        details=parts | {"new_tokens": new},
    )


@measures("ppd", "hit-rates")
def hit_rates(context: Context) -> Measurement:
    """Train prompts for 300 steps; hit rates by distance, against untrained ones and the best constant guesses."""
    import torch

    from tokenry.decoding import ParallelPromptDecoding, ParallelPrompts, SparseNode, sparse_trees
    from tokenry.decoding.tree_search import contributions, likeliest_paths

    text = english(context)
    model, tokenizer = load_model(device=context.device)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    start = torch.tensor(tokenizer("Next 2 words")["input_ids"])
    learned = rows_of(text.train, 1024, 96, 0, context.seed)
    held_out = rows_of(text.held_out, 48, 96, 0, context.seed)
    untrained = ParallelPrompts(model, init_ids=start)
    trained = ParallelPrompts(model, init_ids=start)

    def fitted() -> dict[str, Any]:
        losses = trained.fit(model, learned, steps=STEPS, cuts=32, seed=context.seed)
        frozen = all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
        return {"embeddings": trained.embeddings.tolist(), "losses": losses[:: STEPS // 20], "frozen": frozen}

    def constant() -> dict[str, list[list[float]]]:
        """Hit rates of the commonest tokens of the text, and of those that the model itself writes, per distance."""
        cuts = torch.arange(5, 96, 10)
        _, written = trained.logits(model, learned[:48].to(context.device), cuts)
        _, real = trained.logits(model, held_out.to(context.device), cuts)
        counts = {
            "unigram": torch.bincount(text.train, minlength=real.shape[-1]),
            "own": torch.bincount(written.argmax(-1).flatten().cpu(), minlength=real.shape[-1]),
        }
        hits = {
            name: real.argmax(-1)[..., None].cpu() == count.topk(10).indices for name, count in counts.items()
        }  # (B, K, m, 10)
        return {name: hit.float().mean((0, 1)).tolist() for name, hit in hits.items()}

    fit = context.session.step("fit", fitted)
    trained.embeddings.data.copy_(torch.tensor(fit["embeddings"]))
    with torch.no_grad():
        tables = context.session.step(
            "tables",
            lambda: (
                {
                    "trained": trained.measure(model, held_out).tolist(),
                    "untrained": untrained.measure(model, held_out).tolist(),
                }
                | constant()
            ),
        )
    trained.accuracy = torch.tensor(tables["trained"])
    size = BUDGET // 4  # a static tree: every node carries all three prompt tokens
    static = {}
    for d in (1, 2, 3):
        paths = likeliest_paths(tables["trained"], d, size)
        static[d] = [SparseNode(path, c, 3) for (path, _), c in zip(paths, contributions(paths), strict=True)]
    encode = {"return_tensors": "pt", "return_token_type_ids": False}
    inputs = [tokenizer(prompt, **encode).to(context.device) for prompt in prompts()[:20]]
    length = {}
    for name, trees in (("dynamic", sparse_trees(trained.accuracy, BUDGET)), ("static", static)):
        strategy = ParallelPromptDecoding(trained, trees)
        part = context.session.step(name, lambda s=strategy: tokens_per_pass(model, inputs, s, new=64))
        length[name] = float(part["mean_accepted_length"])

    def top(name: str) -> list[tuple[float, float]]:
        return [(row[0], sum(row)) for row in tables[name]]

    mine, others = top("trained"), [top("untrained"), top("unigram")]
    falls = all(near[i] > far[i] for near, far in itertools.pairwise(mine) for i in (0, 1))
    beats = all(mine[j][i] > other[j][i] for other in others for j in range(3) for i in (0, 1))

    def rates(name: str) -> str:
        return ", ".join(f"+{j + 2} {one:.3f}/{ten:.3f}" for j, (one, ten) in enumerate(top(name)))

    return Measurement(
        shows=bool(falls and beats and length["dynamic"] > length["static"] > 1 and fit["frozen"]),
        value=round(mine[0][1], 3),
        baseline=round(others[1][0][1], 3),
        sentence=f"first guess / first ten right after {STEPS} steps: {rates('trained')} (must fall with distance); "
        f"untrained {rates('untrained')}, the text's commonest tokens {rates('unigram')} (must be above both); for "
        f"comparison the tokens that the model itself writes most {rates('own')}; tokens per pass with a dynamic tree "
        f"{length['dynamic']:.3f}, a static one of the same budget {length['static']:.3f} (dynamic > static > 1); base "
        f"model {'unchanged' if fit['frozen'] else 'CHANGED'}",
        details={"tables": tables, "losses": fit["losses"], "tokens_per_pass": length},
    )
