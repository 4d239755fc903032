"""Claims of BatchLLM, measured on questions about passages of public-domain English with the embedded model."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tokenry.assets import held_out_texts, load_model
from tokenry.claims.registry import Context, Measurement, measures

if TYPE_CHECKING:
    from tokenry.decoding import BatchStats

SLUG = "batchllm"
NEW_TOKENS = 32
KV_TOKENS = 4096  # memory of every method, in tokens
INSTRUCTION = "Below is a passage from a book. Read it with care, then answer the question that stands after it.\n\n"
QUESTIONS = (
    "Who is speaking, and to whom?",
    "What does the writer want the reader to believe?",
    "Name the places in this passage.",
    "Is the mood of the passage glad or sad, and which words show it?",
    "Sum the passage up in one sentence.",
    "What happened just before this scene, as far as one can tell?",
    "List every person who is mentioned.",
    "Which century was this written in, and how do you know?",
    "Write a title for the passage.",
    "What will happen next?",
)


def workload(tokenizer: Any, passages: int, seed: int) -> list[list[int]]:
    """Prompts in the order of arrival: one instruction, passages of 200 to 400 tokens, 2 to 10 questions about each."""
    draw = random.Random(seed)
    texts = draw.sample(held_out_texts("english"), passages)
    prompts = []
    for text in texts:
        passage = tokenizer(INSTRUCTION + text)["input_ids"][: draw.randint(200, 400)]
        for question in draw.sample(QUESTIONS, draw.randint(2, 10)):
            prompts.append(passage + tokenizer(f"\n\nQuestion: {question}\nAnswer:")["input_ids"])
    draw.shuffle(prompts)
    return prompts


def left_padded(model: Any, requests: list[list[int]], rows: int, **options: Any) -> list[list[int]]:
    """The library's own ``generate`` in batches as the requests come; new ids, cut at the stop token."""
    import torch

    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | options
    stop = options.get("eos_token_id", model.generation_config.eos_token_id)
    new = []
    for first in range(0, len(requests), rows):
        some = requests[first : first + rows]
        width = max(map(len, some))
        ids = torch.tensor([[0] * (width - len(r)) + r for r in some], device=model.device)
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in some], device=model.device)
        for row in model.generate(input_ids=ids, attention_mask=mask, **options)[:, width:].tolist():
            new.append(row[: row.index(stop) + 1] if stop in row else row)
    return new


def paged(
    model: Any, requests: list[list[int]], kv_tokens: int, new_tokens: int, *, planned: bool, **options: Any
) -> Any:
    """The library's ``generate_batch``, with pages of 16 tokens so that passages are shared; new ids."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    from tokenry.decoding import plan_batch, planned_scheduler

    stop = model.generation_config.eos_token_id
    rules = {"eos_token_id": stop, "pad_token_id": 0, "do_sample": False, "max_new_tokens": new_tokens} | options
    config = ContinuousBatchingConfig(page_size=16, num_blocks=kv_tokens // 16, max_batch_tokens=512)

    def run(chosen: Any) -> list[list[int]]:
        out = model.generate_batch(
            requests, generation_config=GenerationConfig(**rules), continuous_batching_config=chosen, warmup=False
        )
        return [result.generated_tokens for result in out.values()]

    if not planned:
        return run(config)
    with planned_scheduler(requests, plan_batch(requests, new_tokens), config) as named:
        return run(named)


def _ours(model: Any, requests: list[list[int]], kv_tokens: int = KV_TOKENS, new_tokens: int = NEW_TOKENS, **options: Any) -> tuple[list[list[int]], BatchStats]:  # fmt: skip
    from tokenry.decoding import batch_generate, kv_bytes_per_token

    limit = kv_tokens * kv_bytes_per_token(model.config, model.dtype)
    outs, stats = batch_generate(model, requests, new_tokens, memory_limit=limit, do_sample=False, **options)
    return [out[len(r) :].tolist() for r, out in zip(requests, outs, strict=True)], stats


@measures(SLUG, "identical")
def identical(context: Context) -> Measurement:
    """The text of every request alone, with much and with little memory; the limit kept; the plan's prompt tokens run."""
    from tokenry.decoding import plan_batch

    model, tokenizer = load_model(device=context.device)
    requests = workload(tokenizer, 6, context.seed)
    chunk = 8
    alone = []
    for first in range(0, len(requests), chunk):
        some = requests[first : first + chunk]
        alone += context.session.step(f"alone{first}", lambda some=some: left_padded(model, some, 1))
    small = max(map(len, requests)) + 2 * NEW_TOKENS
    plan = plan_batch(requests, NEW_TOKENS)

    def batched(kv_tokens: int, passes: int) -> dict[str, Any]:
        new, stats = _ours(model, requests, kv_tokens, max_tokens_per_pass=passes)
        same = sum(mine == theirs for mine, theirs in zip(new, alone, strict=True))
        return stats.summary() | {"same": same, "kept": stats.peak_kv_tokens <= kv_tokens}

    runs = {
        "much": context.session.step("much", lambda: batched(1 << 16, 512)),
        "little": context.session.step("little", lambda: batched(small, 64)),
    }
    right = all(r["kept"] and r["prefill_tokens"] == plan.computed for r in runs.values())
    same = min(r["same"] for r in runs.values())
    return Measurement(
        shows=right and same == len(requests),
        value=float(same),
        baseline=float(len(requests)),
        sentence=f"text identical to generate alone for {runs['much']['same']} of {len(requests)} requests with memory for "
        f"all and {runs['little']['same']} with memory for {small:,} tokens and 64 tokens per pass (must be all), peak "
        f"{runs['little']['peak_kv_tokens']:,} (must not be above), {runs['much']['prefill_tokens']:,} and "
        f"{runs['little']['prefill_tokens']:,} prompt tokens computed (the plan says {plan.computed:,})",
        details={"runs": runs, "new_tokens": NEW_TOKENS},
    )


@measures(SLUG, "one-level-loss")
def one_level_loss(context: Context) -> Measurement:
    """What one prefix per request saves of what all levels of the tree would."""
    from tokenry.decoding import plan_batch

    _, tokenizer = load_model()
    plans = [plan_batch(workload(tokenizer, 12, context.seed + i), NEW_TOKENS) for i in range(5)]
    losses = [100 * (1 - plan.saved / plan.saved_bound) for plan in plans]
    share = 100 * statistics.mean(plan.saved / plan.total for plan in plans)
    return Measurement(
        shows=max(losses) <= 5.0,
        value=round(statistics.mean(losses), 3),
        spread=round(statistics.stdev(losses), 3),
        sentence=f"one prefix per request saves {share:.1f} % of the prompt tokens and loses {statistics.mean(losses):.2f} % of "
        f"what every level of the prefix tree would save (at most {max(losses):.2f} % over five request sets; must be at most "
        "5 %)",
        details={
            "sets": [
                {"requests": len(p.prompt_tokens), "total": p.total, "saved": p.saved, "bound": p.saved_bound,
                 "by_first_token": p.saved_first_level}
                for p in plans
            ]
        },
    )  # fmt: skip


@measures(SLUG, "lru-cache")
def lru_cache(context: Context) -> Measurement:
    """Prompt tokens computed and how long prefixes are held, beside a least-recently-used cache, in the simulator."""
    from tokenry.decoding import plan_batch, simulate, simulate_lru

    _, tokenizer = load_model()
    requests = workload(tokenizer, 12, context.seed)
    plan, limit = plan_batch(requests, NEW_TOKENS), 2 * KV_TOKENS
    ours = simulate(plan, limit)
    none = simulate(plan_batch(requests, NEW_TOKENS, grouping="none", order="input"), limit)
    equal = max(ours.prefix_tokens)
    sizes = sorted({256, 512, 1024, 2048, 4096, equal})
    lru = {size: simulate_lru(requests, NEW_TOKENS, limit, size) for size in sizes}

    def saved(stats: BatchStats) -> float:
        return 100 * (1 - stats.prefill_tokens / stats.prompt_tokens)

    small, same = lru[1024], lru[equal]
    shows = (
        plan.saved >= 0.95 * plan.saved_bound
        and saved(small) < saved(ours)
        and saved(same) < saved(ours)
        and ours.prefix_lifetime < same.prefix_lifetime
    )
    return Measurement(
        shows=shows,
        value=round(saved(ours), 2),
        baseline=round(saved(small), 2),
        sentence=f"{saved(ours):.1f} % of the prompt tokens saved ({100 * plan.saved / plan.saved_bound:.1f} % of what is "
        f"possible; must be at least 95), a cache of 1,024 tokens saves {saved(small):.1f} %, one as large as the most that "
        f"prefixes take here ({equal:,}) {saved(same):.1f} % (both must be less); prefixes are held for "
        f"{ours.prefix_lifetime:,} token-passes, in that cache for {same.prefix_lifetime:,} (must be more)",
        details={
            "requests": len(requests),
            "ours": ours.summary(),
            "none": none.summary(),
            "lru": {str(size): s.summary() for size, s in lru.items()},
        },
        charts=(
            {
                "type": "bars",
                "title": "Prompt tokens saved, in percent",
                "values": {f"cache of {size:,}": round(saved(s), 1) for size, s in lru.items()}
                | {"batchllm": round(saved(ours), 1)},
                "baseline": "batchllm",
                "caption": "Least-recently-used caches of so many tokens, requests as they come; simulated.",
            },
        ),
    )


def _ratio(timings: Any, name: str, ours: str = "batchllm") -> dict[str, Any]:
    """How many times as long as ours, turn by turn."""
    every = [t / m for t, m in zip(timings[name].seconds, timings[ours].seconds, strict=True)]
    return {"ratio": statistics.median(every), "all": [round(x, 3) for x in every]}


@measures(SLUG, "time-follows-tokens")
def time_follows_tokens(context: Context) -> Measurement:
    """Wall time against the same engine without sharing, beside the tokens that both run."""
    from tokenry.measure import interleave

    model, tokenizer = load_model(device=context.device)
    requests = workload(tokenizer, 6, context.seed)

    def run() -> dict[str, Any]:
        tokens = {}

        def call(name: str, **options: Any) -> Callable[[], None]:
            def go() -> None:
                tokens[name] = sum(_ours(model, requests, **options)[1].tokens)

            return go

        functions = {"batchllm": call("batchllm"), "none": call("none", grouping="none", order="input")}
        timings = interleave(functions, repeats=5, device=context.device)
        return {"time": _ratio(timings, "none"), "tokens": tokens["none"] / tokens["batchllm"], "run": tokens}

    found = context.session.step("time", run)
    time, tokens = found["time"]["ratio"], found["tokens"]
    return Measurement(
        shows=time >= 0.6 * tokens,
        value=round(time, 3),
        baseline=1.0,
        spread=round(statistics.stdev(found["time"]["all"]), 3),
        sentence=f"{time:.2f} times as fast as the same engine without sharing, where {tokens:.2f} times fewer tokens are run "
        "(must be at least 0.6 of that)",
        details=found | {"requests": len(requests)},
    )


@measures(SLUG, "throughput")
def throughput(context: Context) -> Measurement:
    """Requests per second against ``generate`` in batches as they come and against ``generate_batch``."""
    from tokenry.measure import interleave

    model, tokenizer = load_model(device=context.device)
    shared = workload(tokenizer, 6, context.seed)
    draw = random.Random(context.seed)
    alien = [[draw.randrange(3, 4000) for _ in r] for r in shared[:16]]

    def race(requests: list[list[int]], repeats: int) -> dict[str, Any]:
        texts: dict[str, Any] = {}
        functions = {
            "batchllm": lambda: texts.update(batchllm=_ours(model, requests)[0]),
            "generate 8": lambda: texts.update(eight=left_padded(model, requests, 8)),
            "generate 32": lambda: texts.update(many=left_padded(model, requests, 32)),
            "generate_batch": lambda: texts.update(paged=paged(model, requests, KV_TOKENS, NEW_TOKENS, planned=False)),
        }
        timings = interleave(functions, repeats=repeats, warmup=1, device=context.device)
        ratios = {name: _ratio(timings, name) for name in functions if name != "batchllm"}
        same = {name: sum(x == y for x, y in zip(text, texts["batchllm"], strict=True)) for name, text in texts.items()}
        return {"ratios": ratios, "same": same, "per_second": len(requests) / timings["batchllm"].median}

    found = context.session.step("shared", lambda: race(shared, 3))
    apart = context.session.step("nothing shared", lambda: race(alien, 3))
    ratio = {name: part["ratio"] for name, part in found["ratios"].items()}
    best = min(ratio["generate 8"], ratio["generate 32"])
    same = min(found["same"].values())
    other = {name: part["ratio"] for name, part in apart["ratios"].items()}
    return Measurement(
        shows=min(ratio.values()) > 1.0 and same == len(shared),
        value=round(best, 3),
        baseline=1.0,
        spread=round(max(statistics.stdev(part["all"]) for part in found["ratios"].values()), 3),
        sentence=f"{len(shared)} requests about 6 passages: {ratio['generate 8']:.2f} and {ratio['generate 32']:.2f} times as "
        f"fast as generate in batches of 8 and 32 as they come, {ratio['generate_batch']:.2f} times as fast as generate_batch "
        f"with pages of 16 tokens (all must be above 1), texts the same for {same} (must be all); with nothing to share "
        f"{other['generate 8']:.2f}, {other['generate 32']:.2f} and {other['generate_batch']:.2f}",
        details={"shared": found, "nothing_shared": apart, "kv_tokens": KV_TOKENS, "new_tokens": NEW_TOKENS},
        charts=(
            {
                "type": "bars",
                "title": "Speed in multiples of each, shared passages",
                "values": {name: round(value, 2) for name, value in ratio.items()},
                "caption": "How many times as fast batch_generate is, same memory for keys and values.",
            },
        ),
    )


@measures(SLUG, "paged-order")
def paged_order(context: Context) -> Measurement:
    """``generate_batch`` with the plan's order and admission against its own, in little memory."""
    from tokenry.measure import interleave

    model, tokenizer = load_model(device=context.device)
    requests = workload(tokenizer, 6, context.seed)

    def run() -> dict[str, Any]:
        texts, tokens, seen = {}, {}, []

        def call(name: str, planned: bool) -> Callable[[], None]:
            def go() -> None:
                seen.clear()
                texts[name] = paged(model, requests, KV_TOKENS // 2, NEW_TOKENS, planned=planned)
                tokens[name] = sum(seen)

            return go

        def count(module: Any, args: Any, kwargs: Any) -> None:
            seen.append(kwargs["input_ids"].numel())

        hook = model.register_forward_pre_hook(count, with_kwargs=True)
        try:
            timings = interleave(
                {"plan": call("plan", True), "stock": call("stock", False)}, repeats=3, device=context.device
            )
        finally:
            hook.remove()
        same = sum(x == y for x, y in zip(texts["plan"], texts["stock"], strict=True))
        return {"time": _ratio(timings, "stock", "plan"), "tokens": tokens, "same": same}

    found = context.session.step("paged", run)
    tokens, ratio = found["tokens"], found["time"]["ratio"]
    return Measurement(
        shows=tokens["plan"] < tokens["stock"] and found["same"] == len(requests),
        value=round(ratio, 3),
        baseline=1.0,
        spread=round(statistics.stdev(found["time"]["all"]), 3),
        sentence=f"generate_batch with the plan runs {tokens['plan']:,} tokens, with its own order {tokens['stock']:,} (must be "
        f"more), and is {ratio:.2f} times as fast; texts the same for {found['same']} of {len(requests)} (must be all)",
        details=found | {"kv_tokens": KV_TOKENS // 2, "page_size": 16},
    )


@measures(SLUG, "decode-first")
def decode_first(context: Context) -> Measurement:
    """Tokens per pass and modelled time of the decode-heavy order and of the order of arrival, in the simulator."""
    from tokenry.decoding import plan_batch, simulate

    orders = ("decode-heavy", "input")
    means: dict[str, list[float]] = {order: [] for order in orders}
    least: dict[str, list[int]] = {order: [] for order in orders}
    seconds: dict[str, list[float]] = {order: [] for order in orders}
    for seed in range(20):
        draw = random.Random(context.seed + seed)
        requests, new = [], []
        for _ in range(40):  # tasks: a document, questions, and answers from a label to a page
            document = [draw.randrange(1000) for _ in range(draw.randint(200, 400))]
            length = draw.choice((4, 16, 64, 256))
            for _ in range(draw.randint(2, 10)):
                requests.append(document + [draw.randrange(1000) for _ in range(20)])
                new.append(length)
        arrival = draw.sample(range(len(requests)), len(requests))
        requests, new = [requests[i] for i in arrival], [new[i] for i in arrival]
        for order in orders:
            stats = simulate(plan_batch(requests, new, order=order), 2 * KV_TOKENS)
            means[order].append(stats.mean_tokens)
            least[order].append(min(stats.tokens[8 : len(stats.tokens) // 2]))  # after warm-up, while requests wait
            seconds[order].append(stats.seconds)
    mean = {order: statistics.mean(found) for order, found in means.items()}
    faster = [b / a for a, b in zip(seconds["decode-heavy"], seconds["input"], strict=True)]
    return Measurement(
        shows=mean["decode-heavy"] > mean["input"] and statistics.mean(faster) > 1.0,
        value=round(mean["decode-heavy"], 2),
        baseline=round(mean["input"], 2),
        spread=round(statistics.stdev(means["decode-heavy"]), 2),
        sentence=f"{mean['decode-heavy']:.1f} tokens per pass with the groups that decode longest first, {mean['input']:.1f} in "
        f"the order of arrival (must be less), at least {statistics.mean(least['decode-heavy']):.0f} and "
        f"{statistics.mean(least['input']):.0f} in the first half after warm-up; modelled time {statistics.mean(faster):.3f} "
        "times shorter (must be above 1); mean of 20 simulated loads",
        details={"mean_tokens": means, "least_tokens": least, "seconds": seconds},
    )


@measures(SLUG, "gpu-throughput")
def gpu_throughput(context: Context, requests: int = 512, layers: int = 16, width: int = 2048) -> Measurement:
    """Requests per second of a 1B-shaped model with random weights: 512 requests, 60 % of the prompt tokens shared."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tokenry.measure import interleave

    config = LlamaConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256), vocab_size=32_000, max_position_embeddings=8192, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(context.seed)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(context.device).eval()
    draw = random.Random(context.seed)
    prompts: list[list[int]] = []
    while len(prompts) < requests:  # eight questions per document: 1,400 of 8 x 290 tokens can be saved
        document = [draw.randrange(3, 32_000) for _ in range(200)]
        prompts += [document + [draw.randrange(3, 32_000) for _ in range(90)] for _ in range(8)]
    draw.shuffle(prompts)
    new, limits = 64, (32_768, 131_072)

    def race(kv_tokens: int) -> dict[str, Any]:
        options: dict[str, Any] = {"eos_token_id": None}
        functions = {
            "batchllm": lambda: _ours(model, prompts, kv_tokens, new, max_tokens_per_pass=2048, **options),
            "generate": lambda: left_padded(model, prompts, 64, max_new_tokens=new, **options),
            "generate_batch": lambda: paged(model, prompts, kv_tokens, new, planned=False, **options),
            "generate_batch, planned": lambda: paged(model, prompts, kv_tokens, new, planned=True, **options),
        }
        timings = interleave(functions, repeats=2, device=context.device)
        return {name: len(prompts) / timing.median for name, timing in timings.items()}

    found = {limit: context.session.step(f"memory{limit}", lambda limit=limit: race(limit)) for limit in limits}
    rates = found[limits[-1]]
    value = rates["batchllm"] / max(rate for name, rate in rates.items() if name != "batchllm")
    return Measurement(
        shows=value > 1.0,
        value=round(value, 3),
        baseline=1.0,
        sentence=f"requests per second with memory for {limits[-1]:,} tokens: "
        + ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
        + " (batchllm must be the highest)",
        details={"per_second": {str(limit): part for limit, part in found.items()}, "requests": requests},
    )
