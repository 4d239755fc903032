"""Claims of TidalDecode (arXiv:2410.05076): what it reads and how well on the embedded model, what it costs at long contexts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tokenry.assets import load_model
from tokenry.claims.ems import NEEDLE_CONTEXT, NEEDLE_PASSAGES, needles_found, passages, planted
from tokenry.claims.registry import Context, Measurement, measures
from tokenry.layers.cache_argument import CACHE
from tokenry.measure import fit_exponent, interleave, mean_interval, paired_interval

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache, PreTrainedModel

CONTEXT, FOLLOWING, PASSAGES = 96, 16, 60
START = 1  # of the six layers of the embedded model
BUDGETS = (8, 24)
TIDAL, CORRECTED, OWN, WINDOW, RANDOM = "TidalDecode", "corrected at layer 3", "own top-k", "window", "random"


@measures("tidaldecode", "divergence")
def divergence(context: Context) -> Measurement:
    """KL from full attention over 16 tokens decoded after 96, paired per passage."""

    def at(budget: int) -> dict[str, list[float]]:
        from tokenry.kvcache import OwnTopReading, RandomReading, RecentReading, read_sparsely, reading_fidelity, tidal

        model, tokenizer = load_model("small", device=context.device)
        tokens = passages(tokenizer, CONTEXT + FOLLOWING + 1, PASSAGES, context.seed)
        full = frozenset(range(START + 1))  # all rules read everything where TidalDecode does
        readings: dict[str, Callable[[], AbstractContextManager[object]]] = {
            TIDAL: lambda: tidal(model, budget, START, -1),
            CORRECTED: lambda: tidal(model, budget, START, 3),
            OWN: lambda: read_sparsely(model, OwnTopReading(budget, full)),
            WINDOW: lambda: read_sparsely(model, RecentReading(budget, full)),
            RANDOM: lambda: read_sparsely(model, RandomReading(budget, full, context.seed)),
        }
        found = reading_fidelity(model, tokens, CONTEXT, readings, batch_size=20)
        return {name: found[name].divergence.tolist() for name in readings}

    found = {b: context.session.step(f"budget{b}", partial(at, b)) for b in (*BUDGETS, CONTEXT + FOLLOWING)}
    whole = max(max(found[CONTEXT + FOLLOWING][name]) for name in (TIDAL, CORRECTED, OWN))
    gaps = {}
    for b in BUDGETS:
        gaps[f"{b}: own top-k below TidalDecode"] = paired_interval(found[b][TIDAL], found[b][OWN])
        gaps[f"{b}: TidalDecode below random"] = paired_interval(found[b][RANDOM], found[b][TIDAL])
    few, many = BUDGETS
    gaps[f"{many} below {few}"] = paired_interval(found[few][TIDAL], found[many][TIDAL])
    means = {b: {name: mean_interval(values) for name, values in found[b].items()} for b in BUDGETS}
    value, spread = means[few][TIDAL]
    listed = "; ".join(
        f"k = {b}: " + ", ".join(f"{n} {m:.4f} +- {h:.4f}" for n, (m, h) in means[b].items()) for b in BUDGETS
    )
    return Measurement(
        shows=whole == 0 and all(mean - half > 0 for mean, half in gaps.values()),
        value=value,
        baseline=means[few][WINDOW][0],
        spread=spread,
        sentence=(
            f"KL from full attention over {FOLLOWING} tokens after {CONTEXT}, {len(found[few][TIDAL])} passages, nats: "
            f"{listed}; k = {CONTEXT + FOLLOWING}: {whole:g} (must be 0; own top-k below TidalDecode below random at both "
            f"budgets and {many} below {few}, with paired 95 % intervals; the window and the correction are reported)"
        ),
        details={
            "means": {str(b): {n: {"divergence": m, "+-": h} for n, (m, h) in means[b].items()} for b in BUDGETS},
            "paired differences": {name: {"mean": m, "+-": h} for name, (m, h) in gaps.items()},
        },
        charts=tuple(
            {
                "type": "bars",
                "title": f"KL from full attention, {b} of {CONTEXT} tokens read (nats)",
                "values": {name: mean for name, (mean, _) in means[b].items()},
                "baseline": TIDAL,
                "caption": "Shorter is better. Own top-k is what a selection could reach at best.",
            }
            for b in BUDGETS
        ),
    )


@measures("tidaldecode", "recall")
def recall(context: Context) -> Measurement:
    """Share of the layers' own top-32 of 512 tokens that TidalDecode reads, beside a plain window, per passage."""
    budget, length, steps = 32, 512, 8

    def run() -> dict[str, Any]:
        import torch

        from tokenry.kvcache import calibrate

        model, tokenizer = load_model("small", device=context.device)
        tokens = passages(tokenizer, length, 32, context.seed)
        chosen, measured = tokens[::4], [row for i, row in enumerate(tokens) if i % 4]
        first = calibrate(model, chosen, budget, START, steps=steps)
        each = [calibrate(model, row[None], budget, START, steps=steps) for row in measured]
        overlap, recent = (
            torch.stack([getattr(f, name) for f in each]).mean(0).tolist() for name in ("overlap", "recent")
        )
        return {
            "correction": first.correction,
            "tidal": [found.recall[first.correction] for found in each],
            "uncorrected": [found.recall[-1] for found in each],
            "window": [found.window[first.correction] for found in each],
            "uncorrected window": [found.window[-1] for found in each],
            "overlap": [[round(x, 3) for x in row] for row in overlap],
            "recent": [round(x, 3) for x in recent],
        }

    found = context.session.step("recall", run)
    ours, window = mean_interval(found["tidal"]), mean_interval(found["window"])
    more = paired_interval(found["tidal"], found["window"])
    plain, plain_window = statistics.fmean(found["uncorrected"]), statistics.fmean(found["uncorrected window"])
    return Measurement(
        shows=more[0] - more[1] > 0,
        value=ours[0],
        baseline=window[0],
        spread=ours[1],
        sentence=(
            f"share of their own top-{budget} of {length} tokens that the layers above {START} are given, "
            f"{len(found['tidal'])} passages: {ours[0]:.3f} +- {ours[1]:.3f} corrected at layer {found['correction']} "
            f"(calibrated on other passages), a window {window[0]:.3f} (TidalDecode minus window {more[0]:+.3f} +- "
            f"{more[1]:.3f}, must be above 0 with its paired 95 % interval); without correction {plain:.3f}, window "
            f"{plain_window:.3f}; chance {budget / length:.3f}"
        ),
        details={
            "correction": found["correction"],
            "overlap of the layers' top-k": found["overlap"],
            "share of each layer's own top-k in the window": found["recent"],
        },
    )


@measures("tidaldecode", "planted-needles")
def planted_needles(context: Context) -> Measurement:
    """Needle tokens named while an eighth of the context is read in each step, paired per passage."""
    budget = NEEDLE_CONTEXT // 8

    def run() -> dict[str, dict[str, list[float]]]:
        from tokenry.kvcache import OwnTopReading, RecentReading, read_sparsely, reading_fidelity, tidal

        model, tokenizer = load_model("retriever", device=context.device)
        full = frozenset(range(START + 1))
        readings: dict[str, Callable[[], AbstractContextManager[object]]] = {
            TIDAL: lambda: tidal(model, budget, START, -1),
            OWN: lambda: read_sparsely(model, OwnTopReading(budget, full)),
            WINDOW: lambda: read_sparsely(model, RecentReading(budget, full)),
        }
        tokens = planted(tokenizer, context.seed)
        return needles_found(reading_fidelity(model, tokens, NEEDLE_CONTEXT, readings, batch_size=20))

    found = context.session.step("needles", run)
    means = {name: mean_interval(figures["passages"]) for name, figures in found.items()}
    lost, lost_half = paired_interval(found["full"]["passages"], found[TIDAL]["passages"])
    gain, gain_half = paired_interval(found[TIDAL]["passages"], found[WINDOW]["passages"])
    value, spread = means[TIDAL]
    return Measurement(
        shows=lost - lost_half <= 0 and gain - gain_half > 0,
        value=value,
        baseline=means[WINDOW][0],
        spread=spread,
        sentence=(
            f"needle tokens named with {budget} of {NEEDLE_CONTEXT} entries read, {NEEDLE_PASSAGES} passages at five depths: "
            + ", ".join(f"{name} {mean:.1f} %" for name, (mean, _) in means.items())
            + f"; paired, full attention over TidalDecode {lost:+.1f} +- {lost_half:.1f} points (must not be above 0 with its "
            f"95 % interval), TidalDecode over a window {gain:+.1f} +- {gain_half:.1f} (must be)"
        ),
        details=dict(found),
    )


@measures("tidaldecode", "exact-when-it-fits")
def exact_when_it_fits(context: Context) -> Measurement:
    """Text and logits with a budget of the context equal those of full attention, bit for bit."""

    def run() -> dict[str, int]:
        import torch

        from tokenry.kvcache import tidal

        model, tokenizer = load_model("small", device=context.device)
        network: Any = model
        new, equal, changed = 32, 0, 0
        prompts = passages(tokenizer, 64, 16, context.seed).to(context.device)

        def write(row: Tensor) -> Any:
            return network.generate(
                row[None], attention_mask=torch.ones_like(row[None]), max_new_tokens=new, min_new_tokens=new,
                do_sample=False, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip

        for row in prompts:
            full = write(row)
            for budget in (64 + new, 8):
                with tidal(model, budget, START, 3):
                    found = write(row)
                same = torch.equal(found.sequences, full.sequences)
                same = same and all(torch.equal(a, b) for a, b in zip(found.logits, full.logits, strict=True))
                equal += same and budget > 8
                changed += not same and budget == 8
        return {"prompts": len(prompts), "equal": equal, "changed with a budget of 8": changed}

    found = context.session.step("logits", run)
    return Measurement(
        shows=found["equal"] == found["prompts"] and found["changed with a budget of 8"] > 0,
        value=found["equal"],
        baseline=found["prompts"],
        sentence=(
            f"32 tokens written after 64 with a budget of 96, and all their logits, are bit-equal to full attention's for "
            f"{found['equal']} of {found['prompts']} prompts (must be all); with a budget of 8 "
            f"{found['changed with a budget of 8']} of them change (must be more than 0)"
        ),
        details=found,
    )


@measures("tidaldecode", "attention-cost")
def attention_cost(context: Context) -> Measurement:
    """One token's attention at 4k to 64k tokens, tensors of the head shape of Llama-3-8B, one layer at a time."""
    depth, full, budget = 32, 2, 256
    lengths = [4096 * 2**i for i in range(5)]

    def at(length: int) -> dict[str, float]:
        import torch
        from torch.nn.functional import scaled_dot_product_attention as sdpa

        from tokenry.kernels.sparse_decode_attention import (
            full_attention_and_top,
            masked_attention,
            sparse_decode_attention,
        )

        generator = torch.Generator().manual_seed(context.seed)
        query, key, value = (
            torch.randn(1, heads, size, 128, generator=generator).to(context.device)
            for heads, size in ((32, 1), (8, length), (8, length))
        )
        scaling = 128**-0.5
        positions = full_attention_and_top(query, key, value, budget, scaling=scaling)[1]
        folded = query.view(1, 8, 4, 128)
        gathered = positions.view(1, 8, -1, 1).expand(-1, -1, -1, 128)
        numbers = (torch.arange(8, device=positions.device)[:, None] * length + positions.view(8, -1)).flatten()
        found = interleave(
            {
                "full": lambda: sdpa(folded, key, value),
                "selecting": lambda: full_attention_and_top(query, key, value, budget, scaling=scaling),
                "sparse": lambda: sparse_decode_attention(query, key, value, positions, scaling=scaling),
                "full, as transformers calls it": lambda: sdpa(query, key, value, enable_gqa=True),
                "full with the rest hidden": lambda: masked_attention(query, key, value, positions, scaling=scaling),
                "copying keys with gather": lambda: key.gather(2, gathered),
                "copying keys with index_select": lambda: key.view(-1, 128).index_select(0, numbers),
            },
            repeats=7,
            min_seconds=0.1,
            device=context.device,
        )
        return {name: timing.median for name, timing in found.items()}

    found = {length: context.session.step(f"length{length}", partial(at, length)) for length in lengths}
    names = ("full", "selecting", "sparse")
    exponents = {name: fit_exponent(lengths, [found[n][name] for n in lengths]) for name in names}
    step = {n: full * t["full"] + 2 * t["selecting"] + (depth - full - 2) * t["sparse"] for n, t in found.items()}
    faster = {n: depth * found[n]["full"] / step[n] for n in lengths}
    exponents["a step"] = fit_exponent(lengths, [step[n] for n in lengths])
    listed = ", ".join(f"{ratio:.2f} at {n // 1024}k" for n, ratio in faster.items())
    return Measurement(
        shows=exponents["sparse"] <= 0.3
        and exponents["full"] >= 0.8
        and all(ratio > 1 for n, ratio in faster.items() if n >= 16384),
        value=faster[lengths[-1]],
        baseline=1.0,
        sentence=(
            f"attention of one token, 32 query and 8 key heads of 128, {budget} tokens read: a sparse layer grows with the "
            f"context to the power {exponents['sparse']:.2f} (must be at most 0.3), a full one {exponents['full']:.2f} (must "
            f"be at least 0.8), a selecting one {exponents['selecting']:.2f}; the {depth} layers of a step (2 full, 2 "
            f"selecting, {depth - 4} sparse) are faster than {depth} full ones by {listed} (must be above 1 from 16k on)"
        ),
        details={
            "milliseconds": {str(n): {name: round(1000 * s, 3) for name, s in t.items()} for n, t in found.items()},
            "exponents": exponents,
            "faster": {str(n): ratio for n, ratio in faster.items()},
        },
        charts=(
            {
                "type": "lines",
                "title": "Attention of one token in one layer",
                "series": {name: [[n, 1000 * found[n][name]] for n in lengths] for name in names},
                "x_title": "tokens in the cache",
                "y_title": "milliseconds",
                "caption": "A sparse layer reads 256 tokens per query head, whatever the context.",
            },
        ),
    )


@dataclass(frozen=True)
class Shape:
    """A Llama model with random weights: right for times, not for quality."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    dtype: str

    def build(self, device: str) -> PreTrainedModel:
        """The model, made on its device."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=4096,
            hidden_size=self.hidden,
            intermediate_size=self.feed_forward,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=2**17,
        )
        with torch.device(device):
            return LlamaForCausalLM._from_config(config, dtype=getattr(torch, self.dtype)).eval()


def step_times(
    model: PreTrainedModel, length: int, budget: int, *, dynamic: bool, repeats: int = 5
) -> dict[str, list[float]]:
    """Seconds of whole decoding steps after ``length - 1`` random tokens, turn by turn.

    Args:
        model: The model.
        length: Tokens that the step attends to, its own included.
        budget: Tokens that a head reads in a sparse layer.
        dynamic: Also with a cache that grows, which copies itself for each token.
        repeats: Turns.
    """
    import torch
    from transformers import DynamicCache, StaticCache

    from tokenry.kvcache import tidal

    config, device = model.config, str(model.device)
    token = torch.tensor([[5]], device=device)
    static: Any = StaticCache(config=config, max_cache_len=length)
    head = config.hidden_size // config.num_attention_heads
    static.early_initialization(1, config.num_key_value_heads, head, model.dtype, model.device)
    caches: dict[str, Cache] = {"static": static}
    if dynamic:
        caches["growing"] = DynamicCache(config=config)
    for index, layer in enumerate(static.layers):
        layer.keys.normal_()
        layer.values.normal_()
        if dynamic:
            caches["growing"].update(layer.keys[:, :, :-1], layer.values[:, :, :-1], index)

    @contextmanager
    def prepared(cache: Cache) -> Iterator[None]:
        """One step from the same state every time."""
        if cache is static:
            for layer in static.layers:
                layer.cumulative_length.fill_(length - 1)
        yield
        if cache is not static:
            cache.crop(-1)

    def run(cache: Cache, reading: Callable[[], AbstractContextManager[object]]) -> None:
        with torch.inference_mode(), reading():
            for _ in range(4):
                with prepared(cache):
                    model(token, **{CACHE: cache})

    readings = {"full": nullcontext, "TidalDecode": partial(tidal, model, budget)}
    functions = {
        f"{name}, {kind} cache": partial(run, cache, reading)
        for kind, cache in caches.items()
        for name, reading in readings.items()
    }
    timings = interleave(functions, repeats=repeats, device=device)
    return {name: [seconds / 4 for seconds in timing.seconds] for name, timing in timings.items()}


def _faster(times: dict[str, list[float]], kind: str) -> list[float]:
    """Ratios of the turns: full attention to TidalDecode."""
    pair = times[f"full, {kind} cache"], times[f"TidalDecode, {kind} cache"]
    return [full / ours for full, ours in zip(*pair, strict=True)]


@measures("tidaldecode", "step-time")
def step_time(context: Context) -> Measurement:
    """Whole decoding steps of a small model with random weights, at 4k to 32k tokens."""
    shape, budget, lengths = Shape(512, 1408, 12, 8, 2, "float32"), 256, [4096, 16384, 32768]

    def at(length: int) -> dict[str, list[float]]:
        return step_times(shape.build(context.device), length, budget, dynamic=True)

    found = {length: context.session.step(f"length{length}", partial(at, length)) for length in lengths}
    ratios = {n: {kind: _faster(found[n], kind) for kind in ("static", "growing")} for n in lengths}
    medians = {n: {kind: statistics.median(r) for kind, r in kinds.items()} for n, kinds in ratios.items()}
    longest = ratios[lengths[-1]]["static"]
    listed = "; ".join(f"{n // 1024}k: {m['static']:.2f}, growing cache {m['growing']:.2f}" for n, m in medians.items())
    return Measurement(
        shows=min(longest) > 1,
        value=statistics.median(longest),
        baseline=1.0,
        spread=statistics.stdev(longest),
        sentence=(
            f"speed of a whole decoding step in multiples of full attention's, {budget} tokens read, 12 layers (2 full, 2 "
            f"selecting, 8 sparse), random weights, static cache: {listed} (every turn at {lengths[-1] // 1024}k with the "
            "static cache must be above 1)"
        ),
        details={
            "shape": asdict(shape),
            "milliseconds": {
                str(n): {name: round(1000 * statistics.median(s), 2) for name, s in times.items()}
                for n, times in found.items()
            },
        },
    )


@measures("tidaldecode", "latency")
def latency(context: Context) -> Measurement:
    """Whole decoding steps of the shape of Llama-2-7B at 10K, 32K and 100K tokens, and with 8 key heads."""
    return latency_of(
        context,
        {
            "Llama-2-7B": Shape(4096, 11008, 32, 32, 32, "bfloat16"),
            "8 key heads": Shape(4096, 11008, 32, 32, 8, "bfloat16"),
        },
        [10_000, 32_000, 100_000],
        budgets=(256, 512),
    )


def latency_of(
    context: Context, shapes: dict[str, Shape], lengths: list[int], budgets: tuple[int, ...], target: float = 2.1
) -> Measurement:
    """Steps of several shapes; the first shape at the longest context decides."""

    def at(shape: Shape) -> dict[str, dict[str, list[float]]]:
        model = shape.build(context.device)
        return {f"{n}/{b}": step_times(model, n, b, dynamic=False) for n in lengths for b in budgets}

    found = {name: context.session.step(name, partial(at, shape)) for name, shape in shapes.items()}
    ratios = {name: {key: _faster(times, "static") for key, times in each.items()} for name, each in found.items()}
    medians = {name: {key: statistics.median(r) for key, r in each.items()} for name, each in ratios.items()}
    first = next(iter(shapes))
    longest = ratios[first][f"{lengths[-1]}/{budgets[0]}"]
    listed = "; ".join(
        f"{name}: " + ", ".join(f"{key} {ratio:.2f}" for key, ratio in each.items()) for name, each in medians.items()
    )
    return Measurement(
        shows=statistics.median(longest) >= target,
        value=statistics.median(longest),
        baseline=1.0,
        spread=statistics.stdev(longest),
        sentence=(
            f"speed of a whole decoding step in multiples of full attention's, random weights, by context/budget: {listed} "
            f"({first} at {lengths[-1]}/{budgets[0]} must be at least {target})"
        ),
        details={
            "milliseconds": {
                name: {key: {k: 1000 * statistics.median(s) for k, s in times.items()} for key, times in each.items()}
                for name, each in found.items()
            }
        },
    )
