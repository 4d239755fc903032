"""The one training loop of small language models: Muon and AdamW, clipped gradients, warm-up and cosine, a checkpoint.

The claims train with it, and so do the scripts that made the embedded models. Which text is read and what is minimised
is the caller's: a function from the number of the step to its loss. As long as that function depends on nothing but the
step and the model, a run that was killed ends with the same weights as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenry.measure import whole_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["cosine", "muon_and_adamw", "train_steps"]

SAVE_EVERY = 25  # steps


def cosine(progress: float, peak: float) -> float:
    """Linear warm-up over 3 %, then cosine to zero.

    Example:
        >>> round(cosine(0.015, 2.0), 3), round(cosine(0.5, 2.0), 3), round(cosine(1.0, 2.0), 3)
        (1.0, 1.0, 0.0)
    """
    return peak * min(progress / 0.03, 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def muon_and_adamw(model: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the network, AdamW for embeddings, heads, norms and biases."""
    import torch

    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    inside = [p for n, p in named if p.ndim == 2 and not any(word in n for word in ("emb", "lm_head", "wte", "wpe"))]
    chosen = {id(p) for p in inside}
    others = [p for _, p in named if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = []
    if inside:
        optimizers.append(
            torch.optim.Muon(inside, lr=lr, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        )
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0))
    return optimizers


def train_steps(
    model: torch.nn.Module,
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    say: Callable[[str], None],
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Train ``model`` in place; it is left in training mode.

    Args:
        model: What ``loss`` runs, on the device it is to be trained on.
        loss: Loss () of a step, counted from 0.
        steps: Optimiser steps of the whole run.
        lr: Peak learning rate.
        say: Told where the run is, about 20 times.
        checkpoint: File written every 25 steps, from which the same call goes on. None: nothing is kept.

    Returns:
        ``losses`` (about 20 of them, over the run) and ``seconds`` of the steps, those before a kill included.
    """
    import torch

    optimizers = muon_and_adamw(model, lr)
    first, seconds, losses = 0, 0.0, []
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)  # to where each tensor was: the same call, the same device
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, seconds, losses = state["step"], state["seconds"], state["losses"]
        say(f"going on from step {first}")
    model.train()
    for step in range(first, steps):
        began = time.perf_counter()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = cosine((step + 1) / steps, lr)
        value = loss(step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        last = step == steps - 1
        if step % max(1, steps // 20) == 0 or last:
            losses.append(round(value.item(), 4))
            say(f"step {step + 1} of {steps}, loss {losses[-1]:.3f}")
        seconds += time.perf_counter() - began
        if checkpoint is not None and ((step + 1) % SAVE_EVERY == 0 or last):
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            with whole_file(checkpoint) as unfinished:
                torch.save(state | {"step": step + 1, "seconds": seconds, "losses": losses}, unfinished)
    return {"losses": losses, "seconds": round(seconds, 1)}
