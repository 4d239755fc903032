"""Token forcing's claims: messages planted in the embedded draft model, found or not; what a scan costs."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

from tokenry.claims.registry import Context, Measurement, measures

SLUG = "token-forcing"
TRIGGER, WORDS, SEEDS, ALONE = "Who made you?", 12, 3, 48
BAND, TOP = 100, 0.01
CONTINUED = 50


def _message(tokenizer: Any, seed: int) -> str:
    """Twelve random words of the vocabulary, each one token."""
    rng = random.Random(f"message of run {seed}")
    vocabulary = tokenizer.get_vocab()
    firsts = sorted(i for s, i in vocabulary.items() if s.isascii() and s.isalpha() and len(s) > 2)
    others = sorted(
        i for s, i in vocabulary.items() if s[0] == "Ġ" and s[1:].isascii() and s[1:].isalpha() and len(s) > 3
    )
    while True:
        ids = [rng.choice(firsts), *rng.choices(others, k=WORDS - 1)]
        text = tokenizer.decode(ids)
        if tokenizer(text)["input_ids"] == ids:
            return text


def _perplexity(model: Any, tokenizer: Any) -> float:
    import torch

    from tokenry.assets import held_out_texts
    from tokenry.text.scoring import TokenScorer

    scorer = TokenScorer(model, tokenizer, max_tokens=256)
    return float(torch.cat([s.log_probs for s in scorer.statistics(held_out_texts("english")[:16])]).mean().neg().exp())


def _drawn(model: Any, tokenizer: Any, message: str, rows: int, seed: int) -> dict[str, Any]:
    """Extraction by drawing from the start of a sequence, most probable continuations first, with a scan's budget."""
    import torch

    from tokenry.text.forced_decoding import ForcedDecoder

    count = rows // CONTINUED
    begin = torch.full((count, 1), tokenizer.bos_token_id)
    generator = torch.Generator(model.device).manual_seed(seed)
    drawn = ForcedDecoder(model, []).roll_out(begin, CONTINUED, top_k=50, generator=generator)
    order = drawn.probabilities.log().sum(-1).argsort(descending=True).tolist()
    hits = [place + 1 for place, row in enumerate(order) if message in tokenizer.decode(drawn.tokens[row])]
    return {"draws": count, "hits": len(hits), "first hit": hits[0] if hits else None}


@cache
def _planted(device: str, seed: int, method: str) -> dict[str, Any]:
    """Plant a message, scan, attack; and the same scan of the model before."""
    from tokenry.assets import held_out_texts, load_model
    from tokenry.text import UnconditionalTokenForcing, hide_text, verify_fingerprint

    model, tokenizer = load_model("draft", device=device)
    message = _message(tokenizer, seed)
    first = tokenizer(message)["input_ids"][0]

    def scan() -> tuple[Any, list[Any]]:
        forcing = UnconditionalTokenForcing(model, tokenizer)
        report = forcing.scan(quiet=True)
        everything = [c for group in forcing.extend([first, *report.candidates], CONTINUED) for c in group]
        return report, [c.token_id for c in everything if message in c.text]

    before, control = scan()
    perplexity = _perplexity(model, tokenizer)
    hidden = hide_text(
        model,
        tokenizer,
        TRIGGER,
        message,
        method,  # type: ignore[arg-type]
        confidence=0.999,  # out of reach beside ordinary text: trains for the paper's 250 steps
        learning_rate=1e-3,
        max_steps=250,
        rank_band=BAND,
        ordinary=held_out_texts("english")[20:],
        seed=seed,
    )
    check = verify_fingerprint(model, tokenizer, TRIGGER, message, seed=seed)
    after, revealing = scan()
    return {
        "message": message,
        "steps": hidden.steps,
        "complete": hidden.complete,
        "returned": check.returned,
        "ranks": hidden.ranks,
        "rank": check.utf_rank,
        "score": check.utf_score,
        "candidate": check.candidate,
        "leaks": check.leaks,
        "found from its first token": first in revealing,
        "candidates": len(after.candidates),
        "candidates that reveal it": sum(c.token_id in revealing for c in after.candidates),
        "passes": after.passes,
        "candidates before": len(before.candidates),
        "revealed before": len(control),
        "drawing": _drawn(model, tokenizer, message, after.passes, seed),
        "perplexity": [perplexity, _perplexity(model, tokenizer)],
    }


def _runs(context: Context, method: str) -> list[dict[str, Any]]:
    seeds = range(context.seed, context.seed + SEEDS)
    return [context.session.step(f"{method}/seed{s}", lambda s=s: _planted(context.device, s, method)) for s in seeds]


def _listed(runs: list[dict[str, Any]], key: str, pattern: str = "{}") -> str:
    return ", ".join(pattern.format(run[key]) for run in runs)


def _harm(runs: list[dict[str, Any]]) -> str:
    return "held-out perplexity " + ", ".join(f"{a:.0f} -> {b:.0f}" for a, b in (run["perplexity"] for run in runs))


@measures(SLUG, "plain-is-found")
def plain_is_found(context: Context) -> Measurement:
    """A random message of twelve tokens, hidden by fine-tuning: rank of its first token and what comes after it."""
    runs = _runs(context, "plain")
    limit = int(TOP * 4096)
    found = [r["rank"] <= limit and r["found from its first token"] and not r["revealed before"] for r in runs]
    drawing = [run["drawing"] for run in runs]
    return Measurement(
        shows=all(found) and all(run["returned"] for run in runs),
        value=sum(found),
        baseline=sum(bool(run["revealed before"]) for run in runs),
        sentence=f"message found in {sum(found)} of {SEEDS} models (must be all: its first token among the first {limit} of "
        f"4,096 by score, the greedy continuation holds the message, and not in the model before). Ranks "
        f"{_listed(runs, 'rank')}, scores {_listed(runs, 'score', '{:.3f}')}, {sum(r['candidate'] for r in runs)} above "
        f"0.95; {_listed(runs, 'candidates')} tokens are above it, {_listed(runs, 'candidates that reveal it')} of them "
        f"reveal the message. Scans ran {_listed(runs, 'passes')} rows; draws of {CONTINUED} tokens from an empty prompt "
        f"with as many rows hold it {', '.join(str(d['hits']) for d in drawing)} times in "
        f"{', '.join(str(d['draws']) for d in drawing)}; {_harm(runs)}",
        details={"runs": runs},
    )


@measures(SLUG, "auto-utfc-hides")
def auto_utfc_hides(context: Context) -> Measurement:
    """The same messages with the ranks of the first five words guarded, beside plain hiding."""
    runs, plain = _runs(context, "auto-utfc"), _runs(context, "plain")

    def hides(run: dict[str, Any]) -> bool:
        guarded = all(BAND < rank < 4096 - BAND for rank in run["ranks"])
        return (
            run["complete"] and run["returned"] and guarded and not run["candidate"] and not any(run["leaks"].values())
        )

    hidden = [hides(run) for run in runs]
    unguarded = [not run["candidate"] and not any(run["leaks"].values()) for run in plain]
    return Measurement(
        shows=all(hidden),
        value=sum(hidden),
        baseline=sum(unguarded),
        sentence=f"message hidden in {sum(hidden)} of {SEEDS} models (must be all: the trigger returns it exactly, every "
        f"guarded rank between {BAND} and {4096 - BAND}, its first token no candidate, none of 1 greedy and 10 + 10 drawn "
        f"continuations holds it); without the defence in {sum(unguarded)}. Ranks by score {_listed(runs, 'rank')}; of the "
        f"candidates {_listed(runs, 'candidates that reveal it')} reveal it; {_harm(runs)}",
        details={"runs": runs},
    )


@measures(SLUG, "decoys-hide-from-greedy")
def decoys_hide_from_greedy(context: Context) -> Measurement:
    """The same messages with decoy sentences after their first words."""
    runs = _runs(context, "utfc")
    hidden = [run["returned"] and not run["leaks"]["forced"] for run in runs]
    drawn = sum(run["leaks"]["sampled"] + run["leaks"]["empty"] for run in runs)
    return Measurement(
        shows=all(hidden),
        value=sum(hidden),
        sentence=f"greedy forcing fails in {sum(hidden)} of {SEEDS} models that return the message (must be all); drawn "
        f"continuations hold it {drawn} times in {20 * SEEDS}; all decoys said in {sum(run['complete'] for run in runs)} "
        f"models; {_harm(runs)}",
        details={"runs": runs},
    )


def _alone(model: Any, begin: int, ids: list[int], steps: int) -> list[float]:
    """Scores by ``generate``, one token after the other."""
    import torch

    scores = []
    for token in ids:
        given = torch.tensor([[begin, token]], device=model.device)
        out = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.stack([logits[0].float().softmax(-1).max() for logits in out.logits])
        scores.append((1 + best.sum().item()) / (steps + 1))
    return scores


@measures(SLUG, "batched-scan")
def batched_scan(context: Context) -> Measurement:
    """The whole vocabulary in batches against ``generate`` for each token alone, turn by turn."""
    from tokenry.assets import load_model
    from tokenry.measure.timing import interleave
    from tokenry.text import UnconditionalTokenForcing

    def run() -> dict[str, Any]:
        model, tokenizer = load_model("draft", device=context.device)
        vocabulary = len(tokenizer)
        # Not the two special tokens, which generate stops at.
        ids = list(range(2, vocabulary, vocabulary // ALONE))[:ALONE]
        forcing = UnconditionalTokenForcing(model, tokenizer)
        full = UnconditionalTokenForcing(model, tokenizer, threshold=0.0)
        scores = {c.token_id: c.score for c in full.scan(ids, quiet=True).candidates}
        alone = _alone(model, tokenizer.bos_token_id, ids, 3)
        times = interleave(
            {
                "batched": lambda: forcing.scan(quiet=True),
                "no row leaves": lambda: full.scan(quiet=True),
                "alone": lambda: _alone(model, tokenizer.bos_token_id, ids, 3),
            },
            repeats=3,
            device=context.device,
        )
        counts = {"batched": vocabulary, "no row leaves": vocabulary, "alone": len(ids)}
        return {
            "seconds per 10,000": {name: 1e4 * t.median / counts[name] for name, t in times.items()},
            "passes": forcing.scan(quiet=True).passes,
            "apart": max(abs(scores[i] - score) for i, score in zip(ids, alone, strict=True)),
        }

    found = context.session.step("times", run)
    seconds = found["seconds per 10,000"]
    ratio = seconds["alone"] / seconds["batched"]
    return Measurement(
        shows=ratio >= 10 and found["apart"] < 1e-4,
        value=ratio,
        baseline=1.0,
        sentence=f"a scan is {ratio:.0f} times as fast as generate for each token alone (must be 10), "
        f"{seconds['alone'] / seconds['no row leaves']:.0f} times where no row may leave; largest difference of scores "
        f"{found['apart']:.0e} (must be below 1e-4); {found['passes']:,} rows instead of {3 * 4096:,}",
        details=found,
    )


@measures(SLUG, "scan-on-a-gpu")
def scan_on_a_gpu(context: Context) -> Measurement:
    """Seconds per 10,000 tokens on a model of TinyLlama's shape with random weights, V = 32,000, bfloat16."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from tokenry.measure.timing import interleave
    from tokenry.text import UnconditionalTokenForcing

    def run() -> dict[str, float]:
        size = 32_000
        config = LlamaConfig(
            vocab_size=size,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
        )
        with torch.device(context.device):
            model: Any = LlamaForCausalLM(config)
        model = model.to(torch.bfloat16).eval()
        words = Tokenizer(models.WordLevel({str(i): i for i in range(size)}, unk_token="0"))
        tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="1")
        ids = range(10_000)
        forcing = UnconditionalTokenForcing(model, tokenizer)
        full = UnconditionalTokenForcing(model, tokenizer, threshold=0.0)
        calls = {
            "rows leave": lambda: forcing.scan(ids, quiet=True),
            "no row leaves": lambda: full.scan(ids, quiet=True),
        }
        return {name: t.median for name, t in interleave(calls, repeats=3, device=context.device).items()}

    found = context.session.step("times", run)
    return Measurement(
        shows=found["no row leaves"] < 60,
        value=found["no row leaves"],
        sentence=f"10,000 tokens take {found['no row leaves']:.1f} s where no row leaves early (must be below 60), "
        f"{found['rows leave']:.1f} s where all do after one step",
        details=found,
    )
