"""Compare caches: what a fixed number of entries per head costs in predictions, and saves in memory and time."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tokenry.assets import held_out_texts, load_model
from tokenry.compare.kind import Column, Comparison, Options, Outcome, Plot, Sweep
from tokenry.layers.cache_argument import CACHE
from tokenry.measure.session import Session
from tokenry.measure.timing import fit_exponent, interleave

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache, PreTrainedConfig, PreTrainedModel

__all__ = ["KVCache"]

FULL = "full cache"
EMS = "EMS"
TIDAL = "TidalDecode, read only"
POOL = 7  # neighbours that SnapKV averages over, as published; the local score does without
START = 1  # the first layer that selects
SLUGS = {EMS: "ems", "EMS, no merging": "ems", TIDAL: "tidaldecode"}
STEPS = 8  # tokens per timed call
LEAST_CONTEXT = 24  # a needle, the question for it, and some text
RETRIEVER = "retriever"  # the embedded model that finds needles; the small one does not


def make_cache(name: str, config: PreTrainedConfig, budget: int, window: int) -> Cache:
    """A new cache of the method ``name``."""
    from transformers import DynamicCache

    from tokenry import kvcache

    makers: dict[str, Callable[[], Cache]] = {
        FULL: lambda: DynamicCache(config=config),
        EMS: lambda: kvcache.EMSCache(config, budget, window),
        "EMS, no merging": lambda: kvcache.EMSCache(config, budget, window, merge_ratio=0.0),
        "global score only": lambda: kvcache.GlobalCache(config, budget, window),
        "H2O": lambda: kvcache.H2OCache(config, budget, window),
        "SnapKV": lambda: kvcache.SnapKVCache(config, budget, window, POOL),
        "SnapKV-like (local)": lambda: kvcache.SnapKVCache(config, budget, window),
        "expected attention": lambda: kvcache.ExpectedAttentionCache(config, budget, window=window),
        "TOVA": lambda: kvcache.TOVACache(config, budget, window),
        "KeyDiff": lambda: kvcache.KeyDiffCache(config, budget, window),
        "key norm": lambda: kvcache.KeyNormCache(config, budget, window),
        "sinks and recent": lambda: kvcache.SinkCache(config, budget),
        "sliding window": lambda: kvcache.SlidingWindowCache(config, budget),
    }
    return makers[FULL if name in READ_ONLY else name]()


def reads_as(name: str, model: Any, budget: int) -> AbstractContextManager[Any]:
    """The context in which the method ``name`` decodes; nothing for those that are caches."""
    return readings(model, budget)[name]() if name in READ_ONLY else nullcontext()


def readings(model: Any, budget: int) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """Ways to read ``budget`` entries of a full cache in each step; all read everything where TidalDecode does."""
    from tokenry.kvcache import OwnTopReading, RecentReading, full_attention_layers, read_sparsely, tidal

    layers = full_attention_layers(model)
    start = layers[min(START, len(layers) - 1)]
    full = frozenset(layer for layer in layers if layer <= start)
    return {
        TIDAL: lambda: tidal(model, budget, start, -1),
        "window, read only": lambda: read_sparsely(model, RecentReading(budget, full)),
        "own best, read only": lambda: read_sparsely(model, OwnTopReading(budget, full)),
    }


READ_ONLY = [TIDAL, "window, read only", "own best, read only"]
NAMES = [
    FULL, EMS, "EMS, no merging", "global score only", "H2O", "SnapKV", "SnapKV-like (local)", "expected attention", "TOVA", "KeyDiff",
    "key norm", "sinks and recent", "sliding window", *READ_ONLY,
]  # fmt: skip


def read_texts(data: str | None) -> list[str]:
    """The user's texts: a text file (passages between blank lines), a JSON list, or a folder of text files."""
    if data is None:
        return held_out_texts("english")
    path = Path(data)
    if path.is_dir():
        texts = [file.read_text("utf-8") for file in sorted(path.glob("*.txt"))]
    elif path.is_file():
        text = path.read_text("utf-8")
        if path.suffix == ".json":
            texts = json.loads(text)
            if not isinstance(texts, list) or not all(isinstance(x, str) for x in texts):
                raise ValueError(f"{data} must hold a JSON list of strings")
        else:
            texts = [text]
    else:
        raise ValueError(
            f"no such file or folder: {data}; give a .txt, a .json list of texts, or a folder of .txt files"
        )
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{data} holds no text; give a .txt, a .json list of texts, or a folder of .txt files")
    return texts


class KVCache(Comparison):
    """Caches of equal budgets on the same passages."""

    kind = "kvcache"
    title = "Key-value cache compression"
    question = "How much of the cache can go, and what does the model say differently then?"
    baseline = FULL
    columns: ClassVar[list[Column]] = [
        Column(key="divergence", title="Divergence from the full cache", unit="nats", better="lower"),
        Column(key="needle", title="Needle found", unit="%", better="higher"),
        Column(key="against", title="Divergence minus EMS's", unit="nats", better="lower"),
        Column(key="agreement", title="Same top token", unit="%", better="higher"),
        Column(key="loss", title="Loss of the true text", unit="nats/token", better="lower", digits=4),
        Column(key="bytes", title="Cache after the prompt", unit="KiB per text", better="lower"),
        Column(key="saved", title="Cache is smaller by", unit="x", better="higher"),
        Column(key="read", title="Reading the prompt, full cache = 1", unit="x", better="lower"),
        Column(key="step", title="One new token, full cache = 1", unit="x", better="lower"),
        Column(key="budget", title="Entries per head"),
    ]
    plots: ClassVar[list[Plot]] = [
        Plot(
            title="Divergence against needles found",
            x="needle",
            y="divergence",
            caption="Nearer the lower right corner is better: what was said once is found again, and little else changes.",
        ),
        Plot(
            title="Divergence against memory",
            x="bytes",
            y="divergence",
            log_x=True,
            caption="Nearer the lower left corner is better: fewer bytes, fewer changed predictions.",
        ),
        Plot(title="Time of one new token against the full cache", y="step"),
    ]
    settings: ClassVar[dict[str, Any]] = {
        "budgets": [24, 48, 96],
        "window": 16,
        "context": 256,
        "following": 32,
        "passages": 48,
        "needles": 16,
        "timing_context": 960,
        "lengths": [128, 256, 512, 960],
    }
    demo: ClassVar[dict[str, Any]] = {
        "budgets": [32],
        "context": 128,
        "passages": 8,
        "needles": 4,
        "timing_context": 512,
        "lengths": [128, 256, 512],
    }

    def methods(self) -> list[str]:
        """All caches, the full one first."""
        return list(NAMES)

    def plan(self, options: Options) -> dict[str, Any]:
        """The sizes of this run, by setting."""
        return {name: self.setting(options, name) for name in self.settings}

    def check(self, options: Options) -> None:
        """Refuse bad sizes and missing data before a model is loaded."""
        super().check(options)
        plan = self.plan(options)
        for budget in plan["budgets"]:
            if not 1 <= plan["window"] < budget:
                raise ValueError(
                    f"kvcache: window={plan['window']} must be at least 1 and smaller than budget {budget}"
                )
            if budget < 5:
                raise ValueError(f"kvcache: budgets must be at least 5 (4 sinks and a token), got {budget}")
            if budget >= plan["context"]:
                raise ValueError(
                    f"kvcache: budget {budget} keeps all of a context of {plan['context']} tokens; "
                    "give smaller budgets or a longer context"
                )
        if plan["context"] < LEAST_CONTEXT:
            raise ValueError(
                f"kvcache: a context must hold a needle and the question for it, {LEAST_CONTEXT} tokens at least; got "
                f"{plan['context']}"
            )
        for name in ("following", "passages", "needles"):
            if plan[name] < 2:
                raise ValueError(f"kvcache: {name} must be at least 2, got {plan[name]}")
        read_texts(options.data)

    def run(self, options: Options, session: Session) -> Outcome:
        """Predictions and needles at every budget, then times, then growth with the length of the prompt."""
        plan, names = self.plan(options), self.chosen(options)

        load = cache(partial(load_model, dtype=options.dtype, device=options.device))

        def model(embedded: str = "small") -> tuple[PreTrainedModel, Any]:
            return load(options.model or embedded)

        rows: list[dict[str, Any]] = []
        worse: dict[int, dict[str, tuple[float, float]]] = {}
        depths: dict[int, dict[str, list[float]]] = {}
        for budget in plan["budgets"]:
            quality = session.step(f"predictions/{budget}", partial(_predictions, model, names, budget, plan, options))
            needles = session.step(f"needles/{budget}", partial(_needles, model, names, budget, plan, options))
            times = session.step(f"times/{budget}", partial(_times, model, names, budget, plan, options))
            worse[budget], depths[budget] = {}, needles
            for name in names:
                if name == FULL and rows:
                    continue
                figures, time = quality[name], times[name]
                row = {
                    "method": name if name == FULL else f"{name} ({budget})",
                    "slug": SLUGS.get(name),
                    "budget": None if name == FULL else budget,
                    "divergence": statistics.fmean(figures["kl"]),
                    "divergence_spread": _half_width(figures["kl"]),
                    "agreement": 100 * statistics.fmean(figures["agreement"]),
                    "loss": statistics.fmean(figures["loss"]),
                    "needle": statistics.fmean(needles[name]),
                    "bytes": time["bytes"] / 1024,
                    "saved": times[FULL]["bytes"] / time["bytes"],
                }
                if EMS in names and name not in (EMS, FULL):
                    paired = [a - b for a, b in zip(figures["kl"], quality[EMS]["kl"], strict=True)]
                    worse[budget][name] = statistics.fmean(paired), _half_width(paired)
                    row["against"], row["against_spread"] = worse[budget][name]
                for key in ("read", "step"):
                    row[key] = time[key]["median"] / times[FULL][key]["median"]
                    row[f"{key}_spread"] = time[key]["spread"] / times[FULL][key]["median"]
                rows.append(row)
        budget = plan["budgets"][0]
        sweeps = [_by_depth(depths[budget], names, budget), *self._sweeps(model, names, budget, plan, options, session)]
        examples = session.step("examples", partial(_examples, model, names, budget, plan, options))
        return Outcome(rows=rows, sweeps=sweeps, notes=_notes(plan, worse, rows, options), examples=examples)

    def _sweeps(
        self, model: Any, names: list[str], budget: int, plan: dict[str, Any], options: Options, session: Session
    ) -> list[Sweep]:
        lengths = [length for length in plan["lengths"] if length > budget]
        points: dict[str, dict[str, list[tuple[float, float]]]] = {"read": {}, "step": {}, "bytes": {}}
        for length in lengths:
            sized = {**plan, "timing_context": length}
            found = session.step(f"growth/{length}", partial(_times, model, names, budget, sized, options))
            for name in names:
                for key in ("read", "step"):
                    points[key].setdefault(name, []).append((length, found[name][key]["median"] * 1000))
                points["bytes"].setdefault(name, []).append((length, found[name]["bytes"] / 1024))
        if len(lengths) < 2:
            return []
        titles = {
            "read": ("Reading the prompt and cutting the cache", "milliseconds", "The prompt is read in full by all."),
            "step": ("One new token", "milliseconds", "On a small model the time of a token is mostly not attention."),
            "bytes": ("Cache after the prompt", "KiB", f"{budget} entries per head, whatever the prompt's length."),
        }
        return [
            Sweep(
                title=title,
                x="tokens in the prompt",
                y=unit,
                points=points[key],
                exponents={n: fit_exponent(*zip(*p, strict=True)) for n, p in points[key].items()},
                caption=caption,
            )
            for key, (title, unit, caption) in titles.items()
        ]


def _half_width(values: list[float]) -> float:
    """Half of a 95 % interval of the mean."""
    return 1.96 * statistics.stdev(values) / math.sqrt(len(values))


def _passages(tokenizer: Any, length: int, limit: int, options: Options) -> Tensor:
    """``[P, length]`` token ids; a long text gives several passages, each text's first before any second."""
    import torch

    pieces: list[tuple[int, list[int]]] = []
    for text in read_texts(options.data):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces += [(i, ids[i * length : (i + 1) * length]) for i in range(len(ids) // length)]
    pieces.sort(key=lambda piece: piece[0])
    if len(pieces) < 2:
        raise ValueError(
            f"kvcache: the texts hold {len(pieces)} passages of {length} tokens and at least 2 are needed; give longer "
            "texts or a smaller context"
        )
    return torch.tensor([ids for _, ids in pieces[:limit]])


def _fidelities(network: Any, tokens: Tensor, names: list[str], budget: int, plan: dict[str, Any]) -> dict[str, Any]:
    """A ``Fidelity`` per name."""
    from tokenry.kvcache import cache_fidelity, reading_fidelity

    evicting = [n for n in names if n != FULL and n not in READ_ONLY]
    makers = {n: partial(make_cache, n, network.config, budget, plan["window"]) for n in evicting}
    found = cache_fidelity(network, tokens, plan["context"], makers)
    sparse = {n: make for n, make in readings(network, budget).items() if n in names}
    if sparse:
        read = reading_fidelity(network, tokens, plan["context"], sparse)
        found |= {n: f for n, f in read.items() if n in sparse}
    found[FULL] = found.pop("full")
    return found


def _predictions(
    model: Any, names: list[str], budget: int, plan: dict[str, Any], options: Options
) -> dict[str, dict[str, list[float]]]:
    network, tokenizer = model()
    tokens = _passages(tokenizer, plan["context"] + plan["following"] + 1, plan["passages"], options)
    return {
        name: {"kl": f.divergence.tolist(), "agreement": f.agreement.tolist(), "loss": f.loss.tolist()}
        for name, f in _fidelities(network, tokens, names, budget, plan).items()
    }


def _needles(
    model: Any, names: list[str], budget: int, plan: dict[str, Any], options: Options
) -> dict[str, list[float]]:
    """Percentage of needle tokens named, at each depth."""
    from tokenry.kvcache import DEPTHS, passkey_tokens, plant_needles

    network, tokenizer = model(RETRIEVER)
    passages = _passages(tokenizer, plan["context"], plan["needles"], options)
    tokens = plant_needles(passages, passkey_tokens(tokenizer), seed=options.seed)
    found = _fidelities(network, tokens, names, budget, plan)
    return {name: (100 * f.correct.view(-1, len(DEPTHS)).mean(0)).tolist() for name, f in found.items()}


def _by_depth(found: dict[str, list[float]], names: list[str], budget: int) -> Sweep:
    from tokenry.kvcache import DEPTHS

    return Sweep(
        title="Needles found, by their place",
        x="depth of the needle (0: the context begins with it)",
        y="%",
        points={name: list(zip(DEPTHS, found[name], strict=True)) for name in names},
        log_x=False,
        log_y=False,
        caption=f"Passkeys planted in the text, {budget} entries per head kept; three quarters are said again at the end, "
        "and the model is to go on.",
    )


def _times(model: Any, names: list[str], budget: int, plan: dict[str, Any], options: Options) -> dict[str, Any]:
    """Bytes after the prompt, seconds to read it, and seconds per new token."""
    import torch

    from tokenry.kvcache import cache_bytes

    network, tokenizer = model()
    length = plan["timing_context"]
    generator = torch.Generator().manual_seed(options.seed)
    ids = torch.randint(len(tokenizer), (1, length), generator=generator).to(network.device)
    caches: dict[str, Cache] = {}

    def read(name: str) -> None:
        caches[name] = make_cache(name, network.config, budget, plan["window"])
        with torch.inference_mode():
            network(ids, **{CACHE: caches[name]}, logits_to_keep=1)

    def step(name: str) -> None:
        with torch.inference_mode(), reads_as(name, network, budget):
            for _ in range(STEPS):
                network(ids[:, :1], **{CACHE: caches[name]})

    reading = interleave(
        {name: partial(read, name) for name in names}, repeats=options.repeats, warmup=1, device=options.device
    )
    size = {name: cache_bytes(caches[name]) for name in names}
    limit = getattr(network.config, "max_position_embeddings", None) or math.inf
    repeats = max(1, min(options.repeats, int((limit - length) // STEPS) - 1))
    stepping = interleave(
        {name: partial(step, name) for name in names}, repeats=repeats, warmup=1, device=options.device
    )
    return {
        name: {
            "bytes": size[name],
            "read": {"median": reading[name].median, "spread": reading[name].spread},
            "step": {"median": stepping[name].median / STEPS, "spread": stepping[name].spread / STEPS},
        }
        for name in names
    }


def _examples(model: Any, names: list[str], budget: int, plan: dict[str, Any], options: Options) -> dict[str, str]:
    """What the model writes after the first passage, under each cache."""
    import torch

    network, tokenizer = model()
    ids = _passages(tokenizer, plan["context"], 2, options)[:1].to(network.device)
    found = {"the end of the prompt": tokenizer.decode(ids[0, -48:])}
    for name in names:
        cache = make_cache(name, network.config, budget, plan["window"])
        with reads_as(name, network, budget):
            out = network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **{CACHE: cache},
                max_new_tokens=24,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        found[name] = tokenizer.decode(out[0, ids.shape[1] :])
    return found


def _notes(
    plan: dict[str, Any], worse: dict[int, dict[str, tuple[float, float]]], rows: list[dict[str, Any]], options: Options
) -> list[str]:
    notes = [
        f"Predictions: {plan['following']} tokens after a context of {plan['context']}, the true text being fed; the cache "
        f"is cut once, after the context. Window {plan['window']}. Intervals are 95 %, paired by passage.",
        f"Times: prompts of {plan['timing_context']} random tokens, batch of one. Every method that ranks by attention "
        "computes it a second time while the prompt is read (the local one only for its window), so reading is slower "
        "than with the full cache; a token afterwards is cheaper only where attention is a large part of it.",
    ]
    for budget, others in worse.items():
        better = [f"{n} by {-d:.4f} +- {h:.4f}" for n, (d, h) in others.items() if d + h < 0]
        equal = [n for n, (d, h) in others.items() if abs(d) <= h]
        if better:
            notes.append(f"With {budget} entries EMS is further from the full cache than {', '.join(better)} nats.")
        if equal:
            notes.append(f"With {budget} entries EMS cannot be told from {', '.join(equal)} on these passages.")
    slower = [row["method"] for row in rows if row["step"] > 1.05]
    if slower:
        notes.append(f"A new token takes longer than with the full cache under: {', '.join(slower)}.")
    if options.effort == "demo":
        notes.append("A short run: few passages, so the intervals are wide. The full run settles more.")
    whole = rows[0]["needle"]
    if options.model is None:
        notes.append("The embedded model is small and uses little of a long context; run it with your own (--model).")
        notes.append(
            "It finds no needles either: they are looked for by the embedded model retriever, which was trained to."
        )
    elif whole < 50:
        notes.append(
            f"With its full cache the model finds {whole:.0f} % of the needles: the others can be told little by."
        )
    return notes
