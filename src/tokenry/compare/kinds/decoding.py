"""Compare ways to generate the same greedy text: passes of the model, accepted length, speed, memory."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tokenry.assets import load_model, model_path, prompts
from tokenry.compare.kind import Column, Comparison, Options, Outcome, Plot, Sweep
from tokenry.measure.counting import peak_activations
from tokenry.measure.session import Session
from tokenry.measure.timing import fit_exponent, interleave, peak_extra_memory

__all__ = ["Decoding", "read_prompts"]

GREEDY, LOOKUP, ASSISTED = "greedy generate", "prompt lookup", "assisted generation"
ZERO, COLD, HOT, AUTO = "zero-node tree", "token recycling, cold", "token recycling, hot", "token recycling, auto"
SINGLE = (LOOKUP, ASSISTED)  # the library allows a batch of one only
WARM_PROMPTS = 4  # prompts that fill a hot table; never the measured ones


def read_prompts(path: str) -> list[str]:
    """Prompts of a file: one per line, a JSON list, or JSON lines with a ``prompt`` (or ``text``) each.

    Raises:
        ValueError: The file is missing, empty, or holds something else.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"data={path!r} is not a file; give prompts one per line, a JSON list, or JSONL with 'prompt'")
    text = file.read_text("utf-8").strip()
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
    if not found or not all(isinstance(p, str) and p.strip() for p in found):
        raise ValueError(f"{path}: every entry must be a text, or an object with 'prompt'; found {len(found)} entries")
    return found


@dataclass
class _Bench:
    """The model, the encoded prompts, and a call per method."""

    model: Any
    tokenizer: Any
    batches: list[Any]
    calls: dict[str, Callable[[Any, int], Any]]
    strategies: dict[str, Any]


class Decoding(Comparison):
    """Which way of generating gives the model's own greedy text fastest?"""

    kind = "decoding"
    title = "Decoding strategies"
    question = "Which way of generating gives the model's own greedy text fastest, and what does it cost?"
    baseline = GREEDY
    columns: ClassVar = [
        Column(key="identical", title="Text identical", unit="%", better="higher"),
        Column(key="passes", title="Passes of the model", better="lower"),
        Column(key="accepted", title="Accepted length", unit="tokens/pass", better="higher"),
        Column(key="speed", title="Speed", unit="x greedy", better="higher"),
        Column(key="tokens_per_second", title="Tokens per second", better="higher"),
        Column(key="nodes", title="Nodes per pass", digits=2),
        Column(key="memory", title="Peak extra memory", unit="MB", better="lower"),
    ]
    plots: ClassVar = [
        Plot(title="Speed against greedy generate", y="speed", caption="Above 1 is faster than stock generate."),
        Plot(title="What accepted tokens buy", x="accepted", y="speed", caption="Passes with more nodes cost more."),
    ]
    settings: ClassVar = {"prompts": 0, "new_tokens": 0, "batch_size": 1, "sweep": [0]}

    def methods(self) -> list[str]:
        """Stock generate first, then the library's own speculation, then ours."""
        return [GREEDY, ZERO, LOOKUP, ASSISTED, COLD, HOT, AUTO]

    def check(self, options: Options) -> None:
        """Refuse bad options; reads the prompts' file but loads no model."""
        super().check(options)
        for name in ("prompts", "new_tokens"):
            if self.setting(options, name) < 0:
                raise ValueError(
                    f"decoding: {name} must be 0 (chosen by effort) or more, got {self.setting(options, name)}"
                )
        if self.setting(options, "batch_size") < 1:
            raise ValueError(f"decoding: batch_size must be at least 1, got {self.setting(options, 'batch_size')}")
        if options.data is not None:
            read_prompts(options.data)

    def _plan(self, options: Options) -> tuple[list[str], list[str], int, list[int], int]:
        """Measured prompts, warming prompts, new tokens, sweep, repeats."""
        demo = options.effort == "demo"
        everything = read_prompts(options.data) if options.data else prompts()
        count = self.setting(options, "prompts") or (4 if demo else 40)
        new = self.setting(options, "new_tokens") or (48 if demo else 128)
        sweep = [n for n in self.setting(options, "sweep") if n] or ([12, 24, 48] if demo else [16, 32, 64, 128, 256])
        # Spread over the file: the embedded prompts hold English first, then code.
        count = min(count, len(everything))
        chosen = [everything[i * len(everything) // count] for i in range(count)]
        warm = [p for p in everything if p not in chosen][:: max(1, (len(everything) - count) // WARM_PROMPTS)]
        return chosen, warm[:WARM_PROMPTS], new, sweep, min(options.repeats, 3) if demo else options.repeats

    def run(self, options: Options, session: Session) -> Outcome:
        """Text and passes per method, then timed turns, then growth over the number of new tokens."""
        chosen, warm, new, sweep, repeats = self._plan(options)
        names, notes = self._eligible(options)
        bench: list[_Bench] = []

        def get() -> _Bench:
            if not bench:
                bench.append(self._bench(options, chosen, warm, new, names))
            return bench[0]

        texts = {n: session.step(f"text/{n}", lambda n=n: self._text(get(), n, new, options.device)) for n in names}
        turns = []
        for turn in range(repeats):
            first = len(bench) == 0 or turn == 0
            turns.append(
                session.step(f"time/{turn}", lambda first=first: self._turn(get(), names, new, options.device, first))
            )
        points = {n: [] for n in names}
        for size in sweep:
            step = session.step(f"sweep/{size}", lambda size=size: self._growth(get(), names, size, options.device))
            for n in names:
                points[n].append((float(size), step[n]))
        rows = [self._row(n, texts, turns, notes) for n in names]
        notes += self._losses(rows)
        exponents = {n: round(fit_exponent(*zip(*p, strict=True)), 3) for n, p in points.items() if len(p) > 1}
        example = {"Prompt": chosen[0], GREEDY: texts[GREEDY]["example"]}
        example |= {n: texts[n]["example"] for n in names if n in (HOT, AUTO)}
        growth = Sweep(
            title="Time over the number of new tokens",
            x="new tokens",
            y="seconds",
            points=points,
            exponents=exponents,
            caption="One prompt; the exponent is fitted to the larger half of the sizes.",
        )
        return Outcome(rows=rows, sweeps=[growth], notes=notes, examples=example)

    def _eligible(self, options: Options) -> tuple[list[str], list[str]]:
        names, notes = self.chosen(options), []
        draft = (model_path("draft") / "config.json").exists()
        if ASSISTED in names and (options.model is not None or not draft):
            names.remove(ASSISTED)
            why = (
                "needs a draft model with the same tokenizer"
                if options.model
                else "the embedded draft model is not there"
            )
            notes.append(f"{ASSISTED} was left out: {why}.")
        if self.setting(options, "batch_size") > 1 and any(n in names for n in SINGLE):
            left = [n for n in names if n in SINGLE]
            names = [n for n in names if n not in SINGLE]
            notes.append(f"{' and '.join(left)}: left out, the library allows a batch of one only.")
        if options.effort == "demo":
            notes.append("Demonstration: few prompts, short texts, few turns; `effort=full` is the measurement.")
        return names, notes

    def _bench(self, options: Options, chosen: list[str], warm: list[str], new: int, names: list[str]) -> _Bench:
        import torch

        from tokenry.decoding import TokenRecycling

        torch.manual_seed(options.seed)
        loaded: Any = load_model(options.model or "small", dtype=options.dtype, device=options.device)
        model, tokenizer = loaded
        tokenizer.padding_side = "left"
        limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        room = (limit - new) if limit else None

        def encode(texts: list[str]) -> Any:
            cut = {"truncation": True, "max_length": room} if room and room > 0 else {}
            found = tokenizer(texts, return_tensors="pt", padding=True, **cut).to(options.device)
            return {k: found[k] for k in ("input_ids", "attention_mask")}

        size = self.setting(options, "batch_size")
        batches = [encode(chosen[i : i + size]) for i in range(0, len(chosen), size)]
        assistant = load_model("draft", dtype=options.dtype, device=options.device)[0] if ASSISTED in names else None
        strategies: dict[str, Any] = {ZERO: TokenRecycling(tree=0), COLD: TokenRecycling(tree=None)}
        strategies |= {HOT: TokenRecycling(tree=None), AUTO: TokenRecycling()}
        strategies = {n: s for n, s in strategies.items() if n in names}
        tables = {}
        for name in (HOT, AUTO):
            if name in strategies:
                for prompt in warm:
                    model.generate(
                        **encode([prompt]), custom_generate=strategies[name], max_new_tokens=new, do_sample=False
                    )
                if strategies[name].matrix is not None:
                    tables[name] = strategies[name].matrix.table.clone()

        def call(name: str, batch: Any, count: int) -> Any:
            extra: dict[str, Any] = {}
            if name in strategies:
                extra["custom_generate"] = strategies[name]
            elif name == LOOKUP:
                extra["prompt_lookup_num_tokens"] = 10
            elif name == ASSISTED:
                extra["assistant_model"] = assistant
            matrix = strategies[name].matrix if name in strategies else None
            if matrix is not None and name == COLD:
                matrix.reset()  # every prompt starts cold
            elif matrix is not None and name in tables:
                matrix.table.copy_(tables[name])  # filled by other prompts, never by these
            return model.generate(**batch, max_new_tokens=count, do_sample=False, **extra)

        return _Bench(
            model, tokenizer, batches, {n: lambda batch, count, n=n: call(n, batch, count) for n in names}, strategies
        )

    def _text(self, bench: _Bench, name: str, new: int, device: str) -> dict[str, Any]:
        """Ids, passes and memory of one method over all prompts."""
        from tokenry.decoding import DecodingStats

        passes, ids, runs = 0, [], []
        stops = bench.model.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]

        def count(*_: object) -> None:
            nonlocal passes
            passes += 1

        hook = bench.model.register_forward_pre_hook(count)
        try:
            for batch in bench.batches:
                out = bench.calls[name](batch, new)[:, batch["input_ids"].shape[1] :]
                ids += [_until_stop(row, stops) for row in out.tolist()]
                if name in bench.strategies:
                    runs.append(bench.strategies[name].stats)
        finally:
            hook.remove()
        tokens = sum(map(len, ids))
        total = DecodingStats.total(runs)
        if device.startswith("cuda"):
            memory = peak_extra_memory(lambda: bench.calls[name](bench.batches[0], new), device=device)
        else:
            memory = peak_activations(lambda: bench.calls[name](bench.batches[0], min(new, 8)))
        return {
            "ids": ids,
            "passes": passes,
            "tokens": tokens,
            "accepted": total.mean_accepted_length
            if runs
            else tokens / passes / max(1, len(bench.batches[0]["input_ids"])),
            "nodes": total.mean_nodes if runs else None,
            "memory": memory / 2**20,
            "example": bench.tokenizer.decode(ids[0], skip_special_tokens=True),
        }

    def _turn(self, bench: _Bench, names: list[str], new: int, device: str, first: bool) -> dict[str, float]:
        """Seconds of every method over all prompts, one turn each."""

        def all_prompts(name: str) -> Callable[[], None]:
            def go() -> None:
                for batch in bench.batches:
                    bench.calls[name](batch, new)

            return go

        if first:
            for name in names:
                bench.calls[name](bench.batches[0], min(new, 16))
        timings = interleave({n: all_prompts(n) for n in names}, repeats=1, warmup=0, device=device)
        return {n: t.median for n, t in timings.items()}

    def _growth(self, bench: _Bench, names: list[str], size: int, device: str) -> dict[str, float]:
        """Seconds for ``size`` new tokens of the first prompt."""
        functions = {n: lambda n=n: bench.calls[n](bench.batches[0], size) for n in names}
        return {n: t.median for n, t in interleave(functions, repeats=3, warmup=0, device=device).items()}

    def _row(self, name: str, texts: dict[str, Any], turns: list[dict[str, float]], notes: list[str]) -> dict[str, Any]:
        mine, plain = texts[name], texts[GREEDY]
        same = [a == b for a, b in zip(mine["ids"], plain["ids"], strict=True)]
        ratios = [turn[GREEDY] / turn[name] for turn in turns]
        rates = [mine["tokens"] / turn[name] for turn in turns]
        if not all(same):
            notes.append(
                f"{name}: {same.count(False)} of {len(same)} texts differ from greedy generate "
                "(in bfloat16 and float16 near-ties may flip; in float32 they should not)."
            )
        row = {
            "method": name,
            "identical": 100 * sum(same) / len(same),
            "passes": mine["passes"],
            "accepted": mine["accepted"],
            "speed": statistics.median(ratios),
            "tokens_per_second": statistics.median(rates),
            "nodes": mine["nodes"],
            "memory": mine["memory"],
        }
        if len(turns) > 1:
            row["speed_spread"] = statistics.stdev(ratios)
            row["tokens_per_second_spread"] = statistics.stdev(rates)
        return row | ({"slug": "token-recycling"} if name in (COLD, HOT, AUTO) else {})

    def _losses(self, rows: list[dict[str, Any]]) -> list[str]:
        slower = [f"{row['method']} ({row['speed']:.2f} x)" for row in rows if row["speed"] < 0.95]
        return [f"Slower than greedy generate here: {', '.join(slower)}."] if slower else []


def _until_stop(ids: list[int], stops: list[int]) -> list[int]:
    """Up to and including the first stop token: what follows in a batch is padding."""
    end = next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]
