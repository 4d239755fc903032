"""Choose a sorted draft's thresholds and draft length for one target, by what they cost and win on this machine.

    1  the target writes greedy text for some prompts
    2  the draft reads it once: for every position and exit, its guess and how sure it is. A draft goes on only while it
       agrees with that text, so this tells for *any* thresholds and K which tokens would have been accepted
    3  seconds per token = (seconds of a pass over K + 1 nodes + seconds of the parts that drafted) / tokens per pass,
       from the measured time of each part and of such passes, ranks all settings
    4  the best few are run and timed, turn by turn, beside no drafting at all; the fastest is taken

Only step 4 decides. No drafting wins unless a setting is faster in nearly every turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tokenry.decoding.engine.latency import PassLatency, measure_passes
from tokenry.decoding.nested_exits import NestedRun
from tokenry.decoding.s2d import SortedDraft, SortedSpeculative, check_pair
from tokenry.measure.timing import Timing, interleave

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["TunedDraft", "tune"]

LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.01)
# A setting must be this much faster than no drafting in nearly every turn: one busy moment of the machine must not decide.
MARGIN = 1.03


@dataclass(frozen=True)
class TunedDraft:
    """The setting that was fastest for one target.

    Attributes:
        draft: The draft, as it was given.
        thresholds: For ``SortedSpeculative``.
        draft_tokens: For ``SortedSpeculative``; None where no drafting was the fastest.
        table: What was measured: ``thresholds``, ``draft_tokens``, ``seconds_per_token``, ``speed`` in multiples of no
            drafting (median of the turns), ``speed_low`` (their lower quartile, the smallest of fewer than four: what
            decides, best first), ``mean_accepted_length``, ``mean_draft_layers``, and the
            ``predicted_seconds_per_token`` that put the setting on the list.
    """

    draft: SortedDraft
    thresholds: tuple[float, ...]
    draft_tokens: int | None
    table: list[dict[str, Any]]

    def strategy(self) -> SortedSpeculative:
        """A strategy with this setting."""
        return SortedSpeculative(self.draft, self.thresholds, self.draft_tokens)


@dataclass(frozen=True)
class Watched:
    """What the draft thought of one row of the target's text.

    Attributes:
        guess: ``(n, T)`` each exit's first choice at each new token.
        sure: ``(n, T)`` its probability.
        truth: ``(T,)`` the target's own tokens.
    """

    guess: np.ndarray
    sure: np.ndarray
    truth: np.ndarray


@dataclass(frozen=True)
class Costs:
    """Seconds of each part of the draft for one token, and of a pass of the target."""

    parts: tuple[float, ...]
    target: PassLatency


def tune(
    draft: SortedDraft,
    target: PreTrainedModel,
    prompts: Sequence[Mapping[str, Tensor] | Tensor],
    *,
    new_tokens: int = 64,
    draft_tokens: Sequence[int] = (1, 2, 3, 4, 6, 8),
    shortlist: int = 4,
    repeats: int = 5,
    always_draft: bool = False,
) -> TunedDraft:
    """Find the thresholds and the draft length that serve a target fastest on this machine, with greedy decoding.

    Args:
        draft: A sorted draft with the target's vocabulary.
        target: Causal language model; unchanged.
        prompts: What ``generate`` takes, one entry per call: ``input_ids`` ``(B, N)`` alone, or a mapping with the
            attention mask. A dozen, like those that will come, in batches of the size that will come.
        new_tokens: Tokens written per prompt.
        draft_tokens: Draft lengths to consider.
        shortlist: Settings that are run and timed.
        repeats: Turns of each.
        always_draft: Leave out no drafting, even where nothing beats it.

    Raises:
        ValueError: The draft does not fit the target, or there is nothing to measure.

    Example:
        >>> from tokenry.assets import load_model
        >>> target, tokenizer = load_model()
        >>> prompt = tokenizer("It is the", return_tensors="pt", return_token_type_ids=False)
        >>> best = tune(SortedDraft.from_pretrained(), target, [prompt], new_tokens=8, draft_tokens=[2], repeats=1)
        >>> out = target.generate(**prompt, custom_generate=best.strategy(), max_new_tokens=8)
    """
    if not prompts or not draft_tokens or min(draft_tokens) < 1 or min(new_tokens, shortlist, repeats) < 1:
        raise ValueError(
            "tune needs at least one prompt and one draft length, and new_tokens, shortlist, repeats and draft lengths "
            f"of at least 1; got {len(prompts)} prompts, draft_tokens={list(draft_tokens)}, new_tokens={new_tokens}, "
            f"shortlist={shortlist}, repeats={repeats}"
        )
    check_pair(draft.model, target)
    model: Any = target
    inputs = [dict(p) if isinstance(p, Mapping) else {"input_ids": p} for p in prompts]
    options = {"do_sample": False, "max_new_tokens": new_tokens}
    texts = [model.generate(**x, **options) for x in inputs]
    watched = [row for x, text in zip(inputs, texts, strict=True) for row in watch(draft, x, text, _stops(target))]
    costs = measure_costs(draft, target, texts[0])
    found = [search(watched, length, costs) for length in draft_tokens]
    candidates = sorted(found, key=lambda setting: setting[2])[:shortlist]
    plain = SortedSpeculative(draft, draft_tokens=None)
    strategies = {"plain": plain}
    for i, (thresholds, length, _) in enumerate(candidates):
        strategies[str(i)] = SortedSpeculative(draft, thresholds, length)
    counted: dict[str, list[tuple[int, int, float, int]]] = {}

    def run(name: str) -> None:
        strategy, counts = strategies[name], []
        for x in inputs:
            model.generate(**x, custom_generate=strategy, **options)
            drafted = sum(exit_ > 0 for rows in strategy.exits_used for row in rows for exit_ in row)
            counts.append((strategy.stats.tokens, strategy.stats.row_passes, strategy.mean_draft_layers, drafted))
        counted[name] = counts

    timings = interleave(
        {name: lambda name=name: run(name) for name in strategies}, repeats=repeats, device=str(target.device)
    )
    table: list[dict[str, Any]] = []
    for name, timing in timings.items():
        chosen = None if name == "plain" else candidates[int(name)]
        tokens, passes, layers, drafted = zip(*counted[name], strict=True)
        speeds = Timing.of([p / s for p, s in zip(timings["plain"].seconds, timing.seconds, strict=True)])
        table.append(
            {
                "thresholds": list(chosen[0]) if chosen else None,
                "draft_tokens": chosen[1] if chosen else None,
                "seconds_per_token": timing.median / max(1, sum(tokens)),
                "speed": speeds.median,
                "speed_low": speeds.low,
                "mean_accepted_length": sum(tokens) / max(1, sum(passes)),
                "mean_draft_layers": float(np.dot(layers, drafted) / max(1, sum(drafted))),
                "predicted_seconds_per_token": chosen[2] if chosen else costs.target.at(1),
            }
        )
    table.sort(key=lambda row: -row["speed_low"])
    best = next(row for row in table if row["draft_tokens"] is not None)
    if best["speed_low"] < MARGIN and not always_draft:
        return TunedDraft(draft, plain.thresholds, None, table)
    return TunedDraft(draft, tuple(best["thresholds"]), best["draft_tokens"], table)


@torch.no_grad()
def watch(draft: SortedDraft, inputs: Mapping[str, Tensor], text: Tensor, stops: Sequence[int] = ()) -> list[Watched]:
    """Let the draft read a batch of the target's text ``(B, N + T)``; one entry per row, up to its stop token."""
    width = inputs["input_ids"].shape[1]
    device = draft.model.device
    mask = torch.ones_like(text)
    if inputs.get("attention_mask") is not None:
        mask[:, :width] = inputs["attention_mask"]
    guess, sure = [], []
    for logits in draft.exit_logits(text.to(device), mask.to(device)):
        best = logits[:, width - 1 : -1].float().softmax(-1).max(-1)  # (B, T)
        guess.append(best.indices)
        sure.append(best.values)
    guesses, sures = torch.stack(guess, 1).cpu().numpy(), torch.stack(sure, 1).cpu().numpy()  # (B, n, T)
    rows = []
    for g, s, truth in zip(guesses, sures, text[:, width:].cpu().numpy(), strict=True):
        stopped = np.isin(truth, stops)
        end = int(stopped.argmax()) + 1 if stopped.any() else truth.shape[0]
        rows.append(Watched(g[:, :end], s[:, :end], truth[:end]))
    return rows


def _stops(target: PreTrainedModel) -> list[int]:
    stops = target.generation_config.eos_token_id
    return [] if stops is None else [stops] if isinstance(stops, int) else list(stops)


@torch.no_grad()
def measure_costs(draft: SortedDraft, target: PreTrainedModel, text: Tensor, rounds: int = 4) -> Costs:
    """Time the draft's parts on one token behind the text ``(B, N)``, and passes of the target.

    Both take turns and the fastest of each counts, so that a load that comes and goes does not favour one of them.
    """
    rows, width = text.shape
    run = NestedRun(draft.model, draft.exits, rows)
    run.reserve(width)
    run.load(text.to(run.device), [width] * rows)

    def part_once(part: int) -> None:
        run.filled[part] = [width - 1] * rows
        run.run(part, [width] * rows).logsumexp(-1).tolist()  # what asking how sure it is costs, too

    for part in range(len(draft.exits)):
        run.run(part, [width] * rows)
    parts, curves = [], []
    for _ in range(rounds):
        calls = {str(part): lambda part=part: part_once(part) for part in range(len(draft.exits))}
        parts.append([min(timing.seconds) for timing in interleave(calls, repeats=4).values()])
        curves.append(measure_passes(target, rows, repeats=2))
    passes = tuple(map(min, zip(*(curve.seconds for curve in curves), strict=True)))
    return Costs(tuple(map(min, zip(*parts, strict=True))), PassLatency(curves[0].sizes, passes))


def simulate(
    watched: Sequence[Watched], thresholds: Sequence[float], draft_tokens: int, costs: Costs
) -> tuple[int, int, float]:
    """What a setting would have done on that text: tokens, passes of the target, seconds.

    Tokens and passes are exact. Seconds count drafted tokens behind a wrong one as if the text had been right.
    """
    levels = np.asarray([t if t <= 1 else np.inf for t in (*thresholds, 0.0)])[:, None]
    price = np.cumsum(costs.parts)
    tokens = passes = 0
    seconds = 0.0
    for row in watched:
        exit_ = (row.sure >= levels).argmax(0)  # (T,) the first that is sure
        at = np.arange(row.truth.shape[0])
        hit = row.guess[exit_, at] == row.truth
        spent = np.concatenate([[0.0], price[exit_].cumsum()])
        begin, end = 0, row.truth.shape[0]
        while begin < end:
            count = min(draft_tokens, end - begin - 1)
            right = hit[begin : begin + count]
            won = count if right.all() else int(right.argmin())
            seconds += costs.target.at(count + 1) + spent[begin + count] - spent[begin]
            begin += won + 1
            passes += 1
        tokens += end
    return tokens, passes, seconds


def search(watched: Sequence[Watched], draft_tokens: int, costs: Costs) -> tuple[tuple[float, ...], int, float]:
    """The best thresholds for one draft length, and the seconds per token that they promise.

    The best single level for all exits is improved exit by exit until nothing changes.
    """

    def price(thresholds: tuple[float, ...]) -> float:
        tokens, _, seconds = simulate(watched, thresholds, draft_tokens, costs)
        return seconds / max(1, tokens)

    asked = len(costs.parts) - 1
    best = min(((level,) * asked for level in LEVELS), key=price)
    value, improved = price(best), asked > 1
    while improved:
        improved = False
        for j in range(asked):
            tried = min(((*best[:j], level, *best[j + 1 :]) for level in LEVELS), key=price)
            if price(tried) < value:
                best, value, improved = tried, price(tried), True
    return best, draft_tokens, value
