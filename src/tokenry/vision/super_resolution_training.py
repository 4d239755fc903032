"""Train a super-resolution network from scratch, for minutes: what experiments and comparisons share.

Patches of photographs and their antialiased bicubic reductions, flipped and turned at random; L1 loss; Adam whose rate is halved
after 1/2, 4/5, 9/10 and 19/20 of the steps (the authors of DLGSANet do so). A run writes as it goes and goes on where it was killed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenry.measure.whole_file import whole_file
from tokenry.vision.super_resolution import bicubic_downscale

__all__ = ["SuperResolutionTraining", "train_super_resolution"]

HALVINGS = (0.5, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class SuperResolutionTraining:
    """How long and how fast.

    Attributes:
        steps: Optimizer steps.
        batch: Patches in a step.
        patch: Side of a patch, in pixels of the small image.
        lr: First rate of Adam.
        save_every: Steps between two checkpoints and lines of the log.
    """

    steps: int = 1000
    batch: int = 8
    patch: int = 24
    lr: float = 1e-3
    save_every: int = 100


def _batch(
    pairs: Sequence[tuple[Tensor, Tensor]], training: SuperResolutionTraining, scale: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Patches of step ``step``: the same ones whether or not the run was interrupted before it."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    small, large = [], []
    for _ in range(training.batch):
        low, full = pairs[draw(len(pairs))]
        top, left = (draw(side - training.patch + 1) for side in low.shape[-2:])
        turn = draw(8)
        for patches, image, factor in ((small, low, 1), (large, full, scale)):
            side = factor * training.patch
            patch = image[:, factor * top : factor * top + side, factor * left : factor * left + side]
            patch = patch.flip(-1) if turn & 1 else patch
            patch = patch.flip(-2) if turn & 2 else patch
            patches.append(patch.mT if turn & 4 else patch)
    return torch.stack(small), torch.stack(large)


def _checked(photographs: Sequence[Tensor], training: SuperResolutionTraining, scale: int) -> None:
    if not photographs:
        raise ValueError("need photographs to train on, got none")
    least = scale * training.patch
    for number, photograph in enumerate(photographs):
        if photograph.dtype != torch.uint8 or photograph.ndim != 3 or photograph.shape[0] != 3:
            raise ValueError(
                f"photographs must be (3, H, W) uint8, number {number} is {tuple(photograph.shape)} of {photograph.dtype}"
            )
        if min(photograph.shape[-2:]) < least:
            raise ValueError(
                f"photographs must have {least} pixels a side for patches of {training.patch} at scale {scale}, number "
                f"{number} has {photograph.shape[-2]}x{photograph.shape[-1]}; leave it out or make patch smaller"
            )


def train_super_resolution(
    model: nn.Module,
    photographs: Sequence[Tensor],
    training: SuperResolutionTraining,
    *,
    seed: int = 0,
    folder: str | Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train a network in place; it is left in evaluation mode.

    Args:
        model: The network, with an attribute ``upscale``, initialised by the caller.
        photographs: (3, H, W) uint8 each, of any sizes.
        training: How.
        seed: Of the patches.
        folder: Where ``checkpoint.pt`` (weights under ``params``, optimizer, step) and ``log.jsonl`` are kept; the same call
            goes on from there, to the same result as if it had not stopped. None: nothing is kept.
        on_step: Called with the step and its loss.

    Returns:
        Mean loss between the lines of the log, of the whole run.

    Raises:
        ValueError: No photographs, or too small ones; a folder with a run of other settings.
    """
    scale = int(model.upscale)  # type: ignore[arg-type]
    _checked(photographs, training, scale)
    device = next(model.parameters()).device
    pairs = []
    for photograph in photographs:
        height, width = (side - side % scale for side in photograph.shape[-2:])
        full = photograph[None, :, :height, :width].float() / 255
        pairs.append((bicubic_downscale(full, scale)[0], full[0]))
    optimizer = torch.optim.Adam(model.parameters(), lr=training.lr, betas=(0.9, 0.99))
    settings = asdict(training) | {"seed": seed, "photographs": len(photographs), "upscale": scale}
    path = None if folder is None else Path(folder) / "checkpoint.pt"
    done, losses, seconds = 0, [], 0.0
    if path is not None and path.exists():
        saved: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        if saved["settings"] != settings:
            raise ValueError(f"{path} is of a run with {saved['settings']}, not {settings}; name another folder")
        model.load_state_dict(saved["params"])
        optimizer.load_state_dict(saved["optimizer"])
        done, losses, seconds = saved["step"], saved["losses"], saved["seconds"]
    model.train()
    began, total, since = time.perf_counter() - seconds, torch.zeros((), device=device), 0
    for step in range(done, training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.lr * 0.5 ** sum(step >= share * training.steps for share in HALVINGS)
        small, large = (x.to(device) for x in _batch(pairs, training, scale, seed, step))
        loss = F.l1_loss(model(small), large)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.detach()
        since += 1
        if on_step is not None:
            on_step(step + 1, loss.item())
        if (step + 1) % training.save_every == 0 or step + 1 == training.steps:
            losses.append(total.item() / since)
            total, since = torch.zeros_like(total), 0
            if path is not None:
                _save(path, model, optimizer, step + 1, losses, time.perf_counter() - began, settings)
    model.eval()
    return losses


def _save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    losses: list[float],
    seconds: float,
    settings: dict[str, Any],
) -> None:
    """Replace the checkpoint and add a line to the log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = {
        "params": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "losses": losses,
        "seconds": seconds,
        "settings": settings,
    }
    with whole_file(path) as unfinished:
        torch.save(saved, unfinished)
    with path.with_name("log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "loss": losses[-1], "seconds": round(seconds, 2)}) + "\n")
