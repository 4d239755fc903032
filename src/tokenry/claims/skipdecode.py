"""Claims of SkipDecode, measured on a small model trained here: quality after fine-tuning with the policy, and speed."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from tokenry.claims.registry import Context, Measurement, measures
from tokenry.claims.small_models import English, english, train
from tokenry.decoding.skipdecode import SkipSchedule, skip_decode, skip_training

LAYERS, PROMPT, TARGET = 8, 64, 64
TWICE_AS_FAST = SkipSchedule.for_speedup(LAYERS, 2.0)
FOUR_TIMES = SkipSchedule.for_speedup(LAYERS, 4.0)  # eight layers leave no room for five times: two layers must stay


@dataclasses.dataclass(frozen=True)
class TopDropped(SkipSchedule):
    """The baseline: the same counts, but the *top* layers are left out, as in early exit."""

    def active(self, count: int, layers: int) -> frozenset[int]:
        """The first ``count`` layers."""
        return frozenset(range(count))


def _model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096, hidden_size=128, intermediate_size=344, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=4, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=1,
        )
    )  # fmt: skip


def _target_loss(model: Any, batch: Any, schedule: SkipSchedule | None) -> Any:
    """Mean loss of the last ``TARGET`` tokens, under a schedule or with all layers."""
    import torch

    labels = batch.clone()
    labels[:, :PROMPT] = -100
    if schedule is None:
        return model(input_ids=batch, labels=labels, use_cache=False).loss
    with skip_training(model, schedule, new_tokens=TARGET):
        lengths = torch.full((len(batch),), PROMPT)
        return model(input_ids=batch, labels=labels, prompt_lengths=lengths).loss


def _held_out(model: Any, text: English, schedule: SkipSchedule | None) -> float:
    """Nats per target token on 128 held-out windows."""
    import torch

    length = PROMPT + TARGET
    windows = text.held_out[: 128 * length].view(-1, length).to(model.device)
    with torch.no_grad():
        losses = [_target_loss(model, rows, schedule).item() for rows in windows.split(16)]
    return round(statistics.fmean(losses), 4)


@measures("skipdecode", "fine-tuned-policy")
def fine_tuned_policy(context: Context) -> Measurement:
    """Held-out loss of targets: dense, skipping untrained, skipping trained, dropping the top trained."""
    import torch

    text = english(context)
    base = _model().to(context.device)
    train(context, "train/dense", base, text.train, steps=500, rows=8, length=PROMPT + TARGET)
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    loss: dict[str, float] = {}

    def tuned(name: str, schedule: SkipSchedule | None) -> None:
        model = _model().to(context.device)
        model.load_state_dict(weights)
        objective = lambda m, batch: _target_loss(m, batch, schedule)  # noqa: E731
        train(
            context, f"tune/{name}", model, text.train, steps=200, rows=8, length=PROMPT + TARGET, lr=1e-3, seed=1,
            loss=objective,
        )  # fmt: skip
        loss[name] = context.session.step(f"loss/{name}", lambda: _held_out(model, text, schedule))
        if schedule is None:
            for key, skipped in (("untrained 2x", TWICE_AS_FAST), ("untrained 4x", FOUR_TIMES)):
                loss[key] = context.session.step(f"loss/{key}", lambda skipped=skipped: _held_out(model, text, skipped))

    with torch.random.fork_rng():
        tuned("dense", None)
        tuned("2x", TWICE_AS_FAST)
        tuned("4x", FOUR_TIMES)
        tuned("top dropped 2x", TopDropped(TWICE_AS_FAST.max_layers, TWICE_AS_FAST.min_layers))
    gap = {name: round(value - loss["dense"], 4) for name, value in loss.items()}
    shows = (
        gap["2x"] <= gap["untrained 2x"] / 3
        and loss["2x"] <= loss["top dropped 2x"]
        and gap["2x"] <= gap["4x"]
        and gap["2x"] <= 0.2
    )
    return Measurement(
        shows=shows,
        value=gap["2x"],
        baseline=gap["untrained 2x"],
        sentence=f"held-out loss of the targets, nats per token: all layers {loss['dense']:.3f}; half the layers, fine-tuned "
        f"with the policy {loss['2x']:.3f} (the gap must be at most 0.2 and a third of the untrained one), a quarter "
        f"{loss['4x']:.3f} (must not be better); skipped without fine-tuning {loss['untrained 2x']:.3f} and "
        f"{loss['untrained 4x']:.3f}; the same counts with the top layers dropped, fine-tuned, "
        f"{loss['top dropped 2x']:.3f} (must not be better)",
        details={"loss": loss, "gap": gap, "layers": LAYERS},
        charts=(
            {
                "type": "bars",
                "title": "Loss of held-out targets above that of all layers, nats per token",
                "values": {name: value for name, value in gap.items() if name != "dense"},
            },
        ),
    )


@measures("skipdecode", "speed-follows-layers")
def speed_follows_layers(context: Context) -> Measurement:
    """Tokens per second against the layer count, random weights, a small head."""
    import warnings

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tokenry.measure import interleave

    layers, new, rows = 16, 48, 8

    def run() -> dict[str, Any]:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256, hidden_size=512, intermediate_size=1376, num_hidden_layers=layers, num_attention_heads=8,
            num_key_value_heads=8, bos_token_id=0, eos_token_id=None, pad_token_id=1,
        )  # fmt: skip
        model: Any = LlamaForCausalLM(config)
        model.to(context.device).eval()
        # Prompts of one token: then every pass costs the same per layer, and the layer count is what to expect.
        ids = torch.randint(2, 256, (rows, 1), device=context.device)
        schedules = {f"{speedup:g}x": SkipSchedule.for_speedup(layers, speedup) for speedup in (2.0, 3.0, 4.0, 5.0)}
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}

        def skipping(schedule: SkipSchedule) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                with skip_decode(model, schedule):
                    model.generate(ids, **options)

        functions = {"dense": lambda: model.generate(ids, **options)}
        functions |= {name: lambda schedule=schedule: skipping(schedule) for name, schedule in schedules.items()}
        timings = interleave(functions, repeats=5, device=context.device)
        out = {}
        for name, schedule in schedules.items():
            ratios = [d / s for d, s in zip(timings["dense"].seconds, timings[name].seconds, strict=True)]
            ran = schedule.max_layers + sum(schedule.counts(new)[: new - 1])  # the prompt, then each token but the last
            out[name] = {
                "measured": statistics.median(ratios),
                "all": [round(r, 3) for r in ratios],
                "layers": round(layers * new / ran, 3),
            }
        return out

    found = context.session.step("speed", run)
    worst = min(found, key=lambda name: found[name]["measured"] / found[name]["layers"])
    share = found[worst]["measured"] / found[worst]["layers"]
    return Measurement(
        shows=share >= 0.85,
        value=round(found["2x"]["measured"], 3),
        baseline=round(found["2x"]["layers"], 3),
        spread=round(statistics.stdev(found["2x"]["all"]), 3),
        sentence="speed in multiples of the model with all layers, measured (and by the layer count): "
        + ", ".join(f"{name} {part['measured']:.2f} ({part['layers']:.2f})" for name, part in found.items())
        + f"; batch of {rows}, prompts of one token, {new} written; the lowest share of the layer count is {share:.3f} "
        "(must be at least 0.85)",
        details={"schedules": found},
    )
