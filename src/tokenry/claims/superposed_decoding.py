"""Claims of Superposed Decoding on the embedded model: quality of the drafts, passes and time, what the mixture means."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

from tokenry.assets import held_out_texts, load_model
from tokenry.claims.registry import Context, Measurement, measures
from tokenry.claims.small_models import english
from tokenry.measure import count_passes, interleave, paired_interval

K, PROMPT, NEW, PROMPTS = 3, 15, 10, 60


def _prompts(tokenizer: Any) -> Any:
    """``(PROMPTS, PROMPT)`` ids, from the middle of held-out English passages."""
    import torch

    rows = tokenizer(held_out_texts("english"), add_special_tokens=False)["input_ids"]
    pieces = [row[i : i + PROMPT] for i in range(40, 4000, 97) for row in rows if len(row) >= i + PROMPT]
    return torch.tensor(pieces[:PROMPTS])


def _ngrams(context: Context) -> Any:
    """Counts over the embedded model's own English training text."""
    from tokenry.decoding import NGramModel

    text = english(context)
    ends = (text.train == text.tokenizer.eos_token_id).nonzero().flatten().tolist()
    ids = text.train.tolist()
    documents = [ids[a + 1 : b] for a, b in zip(ends, [*ends[1:], len(ids)], strict=True)]
    return NGramModel.from_documents(documents, len(text.tokenizer))


def _perplexities(model: Any, sequences: Any) -> Any:
    """Perplexity ``(n,)`` of the last ``NEW`` tokens of each sequence under the model itself."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=sequences[:, :-1], use_cache=False).logits[:, -NEW:].float().log_softmax(-1)
    nats = -logits.gather(2, sequences[:, -NEW:, None])[..., 0]
    return nats.mean(1).exp()


def _drafts(model: Any, prompts: Any, ngrams: Any) -> Any:
    """Drafts ``(P, K, N)`` of every prompt, by falling score."""
    import torch

    from tokenry.decoding import SuperposedDecoding

    strategy = SuperposedDecoding(K, ngrams)
    options = {"custom_generate": strategy, "do_sample": False, "return_dict_in_generate": True} | _options()
    return torch.cat([model.generate(row[None], **options).alive_sequences for row in prompts])


def _options() -> dict[str, Any]:
    return {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 1}


@measures("superposed-decoding", "drafts-as-good-as-nucleus")
def drafts_as_good_as_nucleus(context: Context) -> Measurement:
    """Perplexity of drafts beside nucleus samples at three temperatures, greedy and beams; with and without n-grams."""
    import torch

    loaded: Any = load_model(device=context.device)
    model, tokenizer = loaded
    prompts = _prompts(tokenizer).to(context.device)

    def groups(drafts: Any) -> dict[str, Any]:
        """Drafts ``(P, k, N)``: perplexity of each place, mean and best of the k."""
        found = _perplexities(model, drafts.flatten(0, 1)).view(len(drafts), -1)
        distinct = [len({t for d in row[:, -NEW:].tolist() for t in itertools.pairwise(d)}) for row in drafts]
        return {
            "mean": found.mean().item(),
            "best": found.min(1).values.mean().item(),
            "places": [round(x, 2) for x in found.mean(0).tolist()],
            "distinct_bigrams": statistics.fmean(distinct) / (drafts.shape[1] * (NEW - 1)),
        }

    def superposed(ngrams: Any) -> dict[str, Any]:
        return groups(_drafts(model, prompts, ngrams))

    def sampled(temperature: float) -> dict[str, Any]:
        torch.manual_seed(context.seed)
        out = model.generate(
            prompts, do_sample=True, top_p=0.9, top_k=0, temperature=temperature, num_return_sequences=K, **_options()
        )
        return groups(out.view(len(prompts), K, -1))

    def stock(**chosen: Any) -> dict[str, Any]:
        out = model.generate(prompts, do_sample=False, **chosen, **_options())
        return groups(out.view(len(prompts), -1, out.shape[1]))

    step = context.session.step
    ours = step("superposed", lambda: superposed(_ngrams(context)))
    bare = step("without n-grams", lambda: superposed(None))
    nucleus = {t: step(f"nucleus {t}", lambda t=t: sampled(t)) for t in (1.0, 0.7, 0.4)}
    greedy = step("greedy", lambda: stock())
    beams = step("beams", lambda: stock(num_beams=K, num_return_sequences=K))
    spread, bare_spread = (part["places"][-1] / part["places"][0] for part in (ours, bare))
    shows = ours["mean"] <= nucleus[1.0]["mean"] and ours["best"] <= nucleus[1.0]["best"]
    everything = {"superposed": ours, "without n-grams": bare, "greedy": greedy, "beam search": beams}
    everything |= {f"nucleus, temperature {t:g}": part for t, part in nucleus.items()}
    return Measurement(
        shows=shows,
        value=round(ours["mean"], 2),
        baseline=round(nucleus[1.0]["mean"], 2),
        sentence=f"perplexity of {NEW} new tokens under the model, mean of {K} drafts and best of them: superposed "
        f"{ours['mean']:.1f} / {ours['best']:.1f}, nucleus sampling (p = 0.9) {nucleus[1.0]['mean']:.1f} / "
        f"{nucleus[1.0]['best']:.1f} (must not be lower); at temperature 0.7 {nucleus[0.7]['mean']:.1f} / "
        f"{nucleus[0.7]['best']:.1f}, at 0.4 {nucleus[0.4]['mean']:.1f} / {nucleus[0.4]['best']:.1f}; greedy "
        f"{greedy['mean']:.1f}, beam search {beams['mean']:.1f} / {beams['best']:.1f}. The last draft's perplexity over the "
        f"first's: {spread:.2f} with n-grams, {bare_spread:.2f} without. {len(prompts)} prompts",
        details=everything,
        charts=(
            {
                "type": "bars",
                "title": f"Perplexity of {NEW} new tokens under the model, mean of the drafts",
                "values": {name: round(part["mean"], 2) for name, part in everything.items()},
            },
        ),
    )


@measures("superposed-decoding", "ngrams-keep-later-drafts")
def ngrams_keep_later_drafts(context: Context) -> Measurement:
    """Without n-grams the later drafts get worse than the first one by more than with them."""
    loaded: Any = load_model(device=context.device)
    model, tokenizer = loaded
    prompts = _prompts(tokenizer).to(context.device)

    def places(ngrams: Any) -> dict[str, Any]:
        nats = [_perplexities(model, drafts).log() for drafts in _drafts(model, prompts, ngrams)]
        return {"excess": [round((row[-1] - row[0]).item(), 4) for row in nats]}

    counted = context.session.step("with", lambda: places(_ngrams(context)))["excess"]
    bare = context.session.step("without", lambda: places(None))["excess"]
    mean, half = paired_interval(bare, counted)
    return Measurement(
        shows=mean - half > 0,
        value=round(statistics.fmean(counted), 3),
        baseline=round(statistics.fmean(bare), 3),
        spread=round(half, 3),
        sentence=f"nats per token by which draft {K} is worse than draft 1: {statistics.fmean(counted):.3f} with n-grams, "
        f"{statistics.fmean(bare):.3f} without; difference {mean:.3f} +- {half:.3f} over {len(prompts)} prompts (must be above 0)",
    )


@measures("superposed-decoding", "passes-and-time")
def passes_and_time(context: Context) -> Measurement:
    """Passes and time of k drafts against k nucleus samples, one after the other and as a batch."""
    import torch

    from tokenry.decoding import SuperposedDecoding

    loaded: Any = load_model(device=context.device)
    model, tokenizer = loaded
    some = _prompts(tokenizer)[::6].to(context.device)
    ngrams = _ngrams(context)

    def one(k: int) -> dict[str, Any]:
        strategy = SuperposedDecoding(k, ngrams)
        nucleus = {"do_sample": True, "top_p": 0.9, "top_k": 0} | _options()

        def superposed() -> None:
            for row in some:
                model.generate(row[None], custom_generate=strategy, do_sample=False, **_options())

        def serial() -> None:
            torch.manual_seed(0)
            for row in some:
                for _ in range(k):
                    model.generate(row[None], **nucleus)

        def batched() -> None:
            torch.manual_seed(0)
            for row in some:
                model.generate(row[None], num_return_sequences=k, **nucleus)

        counted = {}
        for name, call in {"superposed": superposed, "serial": serial}.items():
            with count_passes(model) as passes:
                call()
            counted[name] = passes.number / len(some)
        timings = interleave(
            {"superposed": superposed, "serial": serial, "batched": batched}, repeats=5, device=context.device
        )
        ours = timings["superposed"].seconds
        ratio = {
            name: [t / m for t, m in zip(timings[name].seconds, ours, strict=True)] for name in ("serial", "batched")
        }
        return {
            "passes": counted,
            **{name: {"ratio": statistics.median(r), "all": [round(x, 3) for x in r]} for name, r in ratio.items()},
        }

    found = {k: context.session.step(f"k={k}", lambda k=k: one(k)) for k in (1, 2, 3, 5, 8)}
    three = found[K]
    fewer = three["passes"]["serial"] / three["passes"]["superposed"]
    return Measurement(
        shows=fewer >= 2.4 and three["serial"]["ratio"] >= 2.44,
        value=round(three["serial"]["ratio"], 3),
        baseline=1.0,
        spread=round(statistics.stdev(three["serial"]["all"]), 3),
        sentence=f"{K} drafts take {three['passes']['superposed']:.0f} passes, {K} nucleus samples one after the other "
        f"{three['passes']['serial']:.0f} ({fewer:.1f} times as many, must be at least 2.4); in time, n-gram look-ups included, "
        f"{three['serial']['ratio']:.2f} times as fast as serial sampling (must be at least 2.44) and "
        f"{three['batched']['ratio']:.2f} times as fast as sampling in one batch. By k, against serial / batched: "
        + ", ".join(
            f"{k}: {part['serial']['ratio']:.2f} / {part['batched']['ratio']:.2f}" for k, part in found.items()
        ),
        details={str(k): part for k, part in found.items()},
        charts=(
            {
                "type": "lines",
                "title": "Speed of k drafts in multiples of k nucleus samples",
                "x_title": "drafts k",
                "y_title": "times as fast",
                "series": {
                    name: [(k, round(part[name]["ratio"], 3)) for k, part in found.items()]
                    for name in ("serial", "batched")
                },
            },
        ),
    )


@measures("superposed-decoding", "linearity")
def linearity(context: Context) -> Measurement:
    """How close the state of a mixed input is to the same mixture of the drafts' own states."""
    import torch

    loaded: Any = load_model(device=context.device)
    model, tokenizer = loaded
    prompts = _prompts(tokenizer).to(context.device)
    table = model.get_input_embeddings()

    def run() -> dict[str, Any]:
        """Teacher-forced: three fixed nucleus drafts of each prompt, mixed with equal weights."""
        torch.manual_seed(context.seed)
        drafts = model.generate(
            prompts, do_sample=True, top_p=0.9, top_k=0, num_return_sequences=K, **_options()
        ).view(len(prompts), K, -1)  # fmt: skip
        with torch.no_grad():
            mixed = table(drafts).mean(1)  # (P, N, H)
            state = model.model(inputs_embeds=mixed, use_cache=False).last_hidden_state[:, PROMPT:]
            own = model.model(input_ids=drafts.flatten(0, 1), use_cache=False).last_hidden_state
        own = own.view(len(prompts), K, *own.shape[1:])[:, :, PROMPT:]
        other = own[torch.randperm(len(prompts))].mean(1)  # the mixture of another prompt
        near = torch.cosine_similarity(state, own.mean(1), dim=-1).mean(0)
        far = torch.cosine_similarity(state, other, dim=-1).mean(0)
        return {"cosine": [round(x, 4) for x in near.tolist()], "other": [round(x, 4) for x in far.tolist()]}

    found = context.session.step("cosine", run)
    mean, other = statistics.fmean(found["cosine"]), statistics.fmean(found["other"])
    return Measurement(
        shows=mean > other and min(found["cosine"]) > 0.5,
        value=round(mean, 3),
        baseline=round(other, 3),
        sentence=f"cosine of the final state of a mixed input and the mixture of the drafts' own states: {mean:.3f} on average, "
        f"{found['cosine'][0]:.3f} at the first new token and {found['cosine'][-1]:.3f} at the last (each must be above 0.5); "
        f"with another prompt's mixture {other:.3f} (must be lower)",
        details=found,
    )
