"""Compare ways to generate the same greedy text: passes of the model, accepted length, speed, memory."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from tokenry.assets import load_model, prompts, read_text_file
from tokenry.compare.kind import Column, Comparison, Options, Outcome, Plot, Sweep
from tokenry.compare.kinds.decoding_contenders import CONTENDERS, GREEDY, Bench, Contender, Ready
from tokenry.measure.counting import count_passes, peak_activations
from tokenry.measure.session import Session
from tokenry.measure.timing import fit_exponent, interleave, peak_extra_memory

__all__ = ["Decoding", "read_prompts"]

BEYOND = 16  # positions left free behind the last token: the library's own speculation drafts past it
WARM_PROMPTS = 4  # prompts that methods may learn from; never the measured ones


def read_prompts(path: str) -> list[str]:
    """Prompts of a file: one per line, a JSON list, or JSON lines with a ``prompt`` (or ``text``) each.

    Raises:
        ValueError: The file is missing, empty, or holds something else.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"data={path!r} is not a file; give prompts one per line, a JSON list, or JSONL with 'prompt'")
    text = read_text_file(file).strip()
    if not text:
        raise ValueError(f"{path} is empty; give prompts one per line, a JSON list, or JSONL with 'prompt'")
    try:
        if text.startswith("["):
            entries = json.loads(text)
        elif text.startswith("{"):
            entries = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            entries = [line for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} looks like JSON but is not: {error}") from error
    found = [e.get("prompt", e.get("text")) if isinstance(e, dict) else e for e in entries]
    wrong = [number for number, prompt in enumerate(found, 1) if not isinstance(prompt, str) or not prompt.strip()]
    if wrong:
        raise ValueError(
            f"{path}: every entry must be a text, or an object with 'prompt'; entry {wrong[0]} of {len(found)} is "
            f"{json.dumps(entries[wrong[0] - 1], ensure_ascii=False):.60}"
        )
    if not found:
        raise ValueError(f"{path} is an empty list; give at least one prompt")
    return found


class Decoding(Comparison):
    """Which way of generating gives the model's own greedy text fastest?"""

    kind = "decoding"
    title = "Decoding strategies"
    question = "Which way of generating gives the model's own greedy text fastest, and what does it cost?"
    baseline = GREEDY
    columns: ClassVar = [
        Column(key="identical", title="Text identical", unit="%", better="higher"),
        Column(key="speed", title="Speed", unit="x greedy", better="higher"),
        Column(key="perplexity", title="Perplexity of the new text", better="lower"),
        Column(key="passes", title="Passes of the model", better="lower"),
        Column(key="accepted", title="Accepted length", unit="tokens/pass", better="higher"),
        Column(key="tokens_per_second", title="Tokens per second", better="higher"),
        Column(key="nodes", title="Nodes per pass", digits=2),
        Column(key="memory", title="Peak extra memory", unit="MiB", better="lower"),
    ]
    plots: ClassVar = [
        Plot(title="Speed against greedy generate", y="speed", caption="Above 1 is faster than stock generate."),
        Plot(title="What accepted tokens buy", x="accepted", y="speed", caption="Passes with more nodes cost more."),
    ]
    settings: ClassVar = {"prompts": 40, "new_tokens": 128, "batch_size": 1, "sweep": [16, 32, 64, 128, 256]}
    demo: ClassVar = {"prompts": 4, "new_tokens": 48, "sweep": [16, 48]}

    def methods(self) -> list[str]:
        """Stock generate first, then the library's own speculation, then ours."""
        return [contender.name for contender in CONTENDERS]

    def check(self, options: Options) -> None:
        """Refuse bad options; reads the prompts' file but loads no model."""
        super().check(options)
        for name in ("prompts", "new_tokens", "batch_size"):
            if self.setting(options, name) < 1:
                raise ValueError(f"decoding: setting {name} must be at least 1, got {self.setting(options, name)}")
        if min(self.setting(options, "sweep")) < 1:
            raise ValueError(f"decoding: setting sweep must be numbers from 1 up, got {self.setting(options, 'sweep')}")
        if options.data is not None:
            read_prompts(options.data)

    def _plan(self, options: Options) -> tuple[list[str], list[str], int, list[int], int]:
        """Measured prompts, warming prompts, new tokens, sweep, repeats."""
        everything = read_prompts(options.data) if options.data else prompts()
        new, sweep = self.setting(options, "new_tokens"), self.setting(options, "sweep")
        held_back = min(WARM_PROMPTS, len(everything) // 8)
        count = min(self.setting(options, "prompts"), len(everything) - held_back)
        # Spread over the file: the embedded prompts hold English first, then code.
        chosen = [everything[i * len(everything) // count] for i in range(count)]
        warm = [p for p in everything if p not in chosen] or [p for p in prompts() if p not in chosen]
        warm = warm[:: max(1, len(warm) // WARM_PROMPTS)]
        repeats = min(options.repeats, 2) if options.effort == "demo" else options.repeats
        return chosen, warm[:WARM_PROMPTS], new, sweep, repeats

    def run(self, options: Options, session: Session) -> Outcome:
        """Text and passes per method, then timed turns, then growth over the number of new tokens."""
        chosen, warm, new, sweep, repeats = self._plan(options)
        contenders, notes = self._eligible(options)
        names = [contender.name for contender in contenders]
        made: list[tuple[Bench, dict[str, Ready]]] = []

        def bench() -> tuple[Bench, dict[str, Ready]]:
            if not made:
                made.append(self._bench(options, chosen, warm, new, contenders))
            return made[0]

        texts = {n: session.step(f"text/{n}", lambda n=n: self._text(*bench(), n, new, options.device)) for n in names}
        turns = []
        for turn in range(repeats):
            first = not made or turn == 0
            turns.append(session.step(f"time/{turn}", lambda first=first: self._turn(*bench(), new, first)))
        points: dict[str, list[tuple[float, float]]] = {n: [] for n in names}
        for size in sweep:
            step = session.step(f"sweep/{size}", lambda size=size: self._growth(*bench(), size, sweep))
            for n in step:
                points[n].append((float(size), step[n]))
            if not step:
                notes.append(f"Not in the growth: {size} new tokens do not fit into the model's context.")
        rows = [self._row(contender, texts, turns, notes) for contender in contenders]
        notes.append(f"{len(chosen)} prompts measured; what learns or is tuned did so on {len(warm)} others.")
        if texts[GREEDY]["cut"]:
            notes.append(
                f"{texts[GREEDY]['cut']} prompt(s) were cut to what the model's context leaves beside {new} new tokens."
            )
        notes += self._losses(rows)
        exponents = {n: round(fit_exponent(*zip(*p, strict=True)), 3) for n, p in points.items() if len(p) > 1}
        examples = {"Prompt": chosen[0], GREEDY: texts[GREEDY]["example"]}
        examples |= {n: t["example"] for n, t in texts.items() if t["example"] != examples[GREEDY]}
        growth = Sweep(
            title="Time over the number of new tokens",
            x="new tokens",
            y="seconds",
            points=points,
            exponents=exponents,
            caption="One prompt; the exponent is fitted to the larger half of the sizes.",
        )
        return Outcome(rows=rows, sweeps=[growth], notes=notes, examples=examples)

    def _eligible(self, options: Options) -> tuple[list[Contender], list[str]]:
        """Who takes part, and why the others do not."""
        names, notes, found = self.chosen(options), [], []
        for contender in (c for c in CONTENDERS if c.name in names):
            why = contender.missing(options)
            if not why and contender.single and self.setting(options, "batch_size") > 1:
                why = "takes a batch of one only"
            if why:
                notes.append(f"{contender.name} was left out: {why}.")
            else:
                found.append(contender)
        if options.effort == "demo":
            notes.append("Demonstration: few prompts, short texts, few turns; the full run settles more.")
        return found, notes

    def _bench(
        self, options: Options, chosen: list[str], warm: list[str], new: int, contenders: list[Contender]
    ) -> tuple[Bench, dict[str, Ready]]:
        import torch

        torch.manual_seed(options.seed)
        loaded: Any = load_model(options.model or "small", dtype=options.dtype, device=options.device)
        model, tokenizer = loaded
        tokenizer.padding_side = "left"
        limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        limit = limit - BEYOND if limit else None
        room = limit - new if limit else None
        if limit is not None and room is not None and room < 1:
            raise ValueError(
                f"decoding: {new} new tokens leave no room for a prompt in the model's context of {limit + BEYOND} tokens; "
                f"lower new_tokens to {limit - 1} or less"
            )

        def encode(texts: list[str]) -> Any:
            cut = {"truncation": True, "max_length": room} if room else {}
            found = tokenizer(texts, return_tensors="pt", padding=True, **cut).to(options.device)
            return {k: found[k] for k in ("input_ids", "attention_mask")}

        size = self.setting(options, "batch_size")
        batches = [encode(chosen[i : i + size]) for i in range(0, len(chosen), size)]
        lengths = [len(ids) for ids in tokenizer(chosen, verbose=False)["input_ids"]]
        cut = sum(length > room for length in lengths) if room else 0
        bench = Bench(model, tokenizer, batches, [encode([prompt]) for prompt in warm], new, options, limit, cut)
        return bench, {contender.name: contender.prepare(bench) for contender in contenders}

    def _text(self, bench: Bench, ready: dict[str, Ready], name: str, new: int, device: str) -> dict[str, Any]:
        """Ids, passes and memory of one method over all prompts."""
        from tokenry.decoding import DecodingStats

        passes, ids, runs, nats = 0, [], [], 0.0
        stops = bench.model.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        method = ready[name]

        for batch in bench.batches:
            with count_passes(bench.model) as counted:
                out = method.run(batch, new)
            passes += counted.number
            found = [_until_stop(row, stops) for row in out[:, batch["input_ids"].shape[1] :].tolist()]
            nats += sum(_surprise(bench.model, batch, row, new_ids) for row, new_ids in enumerate(found))
            ids += found
            if method.strategy is not None:
                runs.append(method.strategy.stats)
        tokens = sum(map(len, ids))
        total = DecodingStats.total(runs)
        if device.startswith("cuda"):
            memory = peak_extra_memory(lambda: method.run(bench.batches[0], new), device=device)
        else:
            memory = peak_activations(lambda: method.run(bench.batches[0], min(new, 8)))
        return {
            "ids": ids,
            "passes": passes,
            "tokens": tokens,
            "accepted": total.mean_accepted_length
            if runs
            else tokens / passes / max(1, len(bench.batches[0]["input_ids"])),
            "nodes": total.mean_nodes if runs else None,
            "memory": memory / 2**20,
            "perplexity": math.exp(nats / tokens) if tokens else None,
            "cut": bench.cut,
            "example": bench.tokenizer.decode(ids[0], skip_special_tokens=True),
        }

    def _turn(self, bench: Bench, ready: dict[str, Ready], new: int, first: bool) -> dict[str, float]:
        """Seconds of every method over all prompts, one turn each."""

        def all_prompts(method: Ready) -> Callable[[], None]:
            def go() -> None:
                for batch in bench.batches:
                    method.run(batch, new)

            return go

        if first:
            for method in ready.values():
                method.run(bench.batches[0], min(new, 16))
        functions = {name: all_prompts(method) for name, method in ready.items()}
        timings = interleave(functions, repeats=1, warmup=0, device=bench.options.device)
        return {n: t.median for n, t in timings.items()}

    def _growth(self, bench: Bench, ready: dict[str, Ready], size: int, sizes: list[int]) -> dict[str, float]:
        """Seconds for ``size`` new tokens of the first prompt; empty where the context has no room for them."""
        batch = bench.batches[0]
        if bench.limit is not None:
            if size >= bench.limit:
                return {}
            room = bench.limit - max(n for n in sizes if n < bench.limit)  # the same prompt before every size
            batch = {key: value[:, -room:] for key, value in batch.items()}
        functions = {n: lambda method=method: method.run(batch, size) for n, method in ready.items()}
        timings = interleave(functions, repeats=3, warmup=0, device=bench.options.device)
        return {n: t.median for n, t in timings.items()}

    def _row(
        self, contender: Contender, texts: dict[str, Any], turns: list[dict[str, float]], notes: list[str]
    ) -> dict[str, Any]:
        name = contender.name
        mine, plain = texts[name], texts[GREEDY]
        same = [a == b for a, b in zip(mine["ids"], plain["ids"], strict=True)]
        ratios = [turn[GREEDY] / turn[name] for turn in turns]
        rates = [mine["tokens"] / turn[name] for turn in turns]
        if not contender.lossless:
            notes.append(f"{name} changes the text by design; its perplexity says what that costs.")
        elif not all(same):
            notes.append(
                f"{name}: {same.count(False)} of {len(same)} texts differ from greedy generate "
                "(in bfloat16 and float16 near-ties may flip; in float32 they should not)."
            )
        row = {
            "method": name,
            "slug": contender.slug,
            "identical": 100 * sum(same) / len(same),
            "speed": statistics.median(ratios),
            "tokens_per_second": statistics.median(rates),
            **{key: mine[key] for key in ("perplexity", "passes", "accepted", "nodes", "memory")},
        }
        if len(turns) > 1:
            row["speed_spread"] = statistics.stdev(ratios)
            row["tokens_per_second_spread"] = statistics.stdev(rates)
        return {key: value for key, value in row.items() if key != "slug" or value is not None}

    def _losses(self, rows: list[dict[str, Any]]) -> list[str]:
        slower = [f"{row['method']} ({row['speed']:.2f} x)" for row in rows if row["speed"] < 0.95]
        return [f"Slower than greedy generate here: {', '.join(slower)}."] if slower else []


def _surprise(model: Any, batch: dict[str, Any], row: int, new_ids: list[int]) -> float:
    """Nats of ``new_ids`` after the batch's prompt number ``row``, in one plain pass of the model."""
    import torch

    prompt = batch["input_ids"][row][batch["attention_mask"][row].bool()]
    following = torch.tensor(new_ids, device=prompt.device, dtype=torch.long)
    with torch.no_grad():
        logits = model(input_ids=torch.cat([prompt, following])[None, :-1], use_cache=False).logits[0]
    likely = logits[len(prompt) - 1 :].float().log_softmax(-1)
    return -likely.gather(1, following[:, None]).sum().item()


def _until_stop(ids: list[int], stops: list[int]) -> list[int]:
    """Up to and including the first stop token: what follows in a batch is padding."""
    end = next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]
