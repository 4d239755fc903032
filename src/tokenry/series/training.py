"""Train a forecasting module on windows of a table.

The recipe is the one behind the published tables (Liu et al., ICLR 2024, arXiv:2310.06625): Adam on the mean squared
error of scaled values, batches of 32, the learning rate halved every epoch from the third on, at most 10 epochs, stopped
after 3 epochs without a better validation error, the best epoch kept. Where a file is given, the state is written to it
after every epoch, so that a killed run goes on where it was, with the same result.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from tokenry.measure import whole_file
from tokenry.series.windows import Windows

__all__ = ["Recipe", "Training", "WindowModel", "seeded"]


@contextmanager
def seeded(seed: int, device: str) -> Iterator[None]:
    """Draw from a fixed seed inside, and leave the caller's generators as they were."""
    with torch.random.fork_rng([torch.device(device)] if device.startswith("cuda") else []):
        torch.manual_seed(seed)
        yield


class WindowModel:
    """A forecasting module that takes batches of windows.

    Args:
        module: Called like ``ITransformerForPrediction``, on ``device``.
        device: Torch device.
        dtype: ``"float32"``, or ``"bfloat16"`` for autocast.
        compile: Run it through ``torch.compile``.
    """

    def __init__(self, module: nn.Module, device: str, dtype: str, compile: bool = False) -> None:
        self.module, self.device, self.dtype = module, device, dtype
        self._call: Callable[..., Any] = torch.compile(module) if compile else module
        self._takes_marks = "past_time_features" in inspect.signature(module.forward).parameters

    def autocast(self) -> AbstractContextManager[object]:
        """Half precision inside, where it was asked for."""
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, torch.bfloat16)

    def forecast(self, batch: dict[str, Tensor]) -> Tensor:
        """Values of the next rows (B, S, N), float32; time features are left out where the module takes none."""
        if "past_time_features" in batch and not self._takes_marks:
            batch = {"past_values": batch["past_values"]}
        with self.autocast():
            return self._call(**batch).prediction_outputs.float()

    @torch.no_grad()
    def errors(self, windows: Windows, columns: list[int] | None = None, stride: int = 1) -> dict[str, Any]:
        """Errors on scaled values; the module is left in evaluation mode.

        Args:
            windows: At least one.
            columns: Average over these series only. None: all.
            stride: Use every ``stride``-th window.

        Returns:
            ``mse``, ``mae``, ``windows``, ``mse_by_step`` (S numbers).
        """
        self.module.eval()
        squares: Tensor | float = 0.0  # (S,)
        absolute = torch.zeros((), dtype=torch.float64, device=self.device)
        count = 0
        for chosen in torch.arange(0, len(windows), stride).split(256):
            batch = windows.batch(chosen)
            target = batch.pop("future_values")
            error = self.forecast(batch) - target  # (B, S, N)
            error = error if columns is None else error[..., columns]
            squares = squares + error.double().square().mean(2).sum(0)
            absolute += error.double().abs().mean((1, 2)).sum()
            count += len(chosen)
        by_step = (torch.as_tensor(squares) / count).tolist()
        mean = sum(by_step) / len(by_step)
        return {"mse": mean, "mae": float(absolute / count), "windows": count, "mse_by_step": by_step}


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: Most epochs.
        patience: Epochs without a better validation error before it stops.
        learning_rate: Adam's first step size.
        batch_size: Windows in a step.
        stride: Train and validate on every ``stride``-th window only.
        seed: Of the order and of dropout.
    """

    epochs: int
    patience: int
    learning_rate: float
    batch_size: int
    stride: int
    seed: int


class Training:
    """A run that can be left after any epoch and taken up again.

    Args:
        model: What is trained; at least one of its parameters must ask for a gradient.
        recipe: How.
        path: File of the state. If it is there, the run goes on from it. None: nothing is kept.

    Attributes:
        history: ``epoch``, ``train`` and ``val`` (mean squared errors) and ``seconds`` of every epoch so far.
        stopped: Whether the run is over.
    """

    def __init__(self, model: WindowModel, recipe: Recipe, path: Path | None) -> None:
        self.model, self.recipe, self.path = model, recipe, path
        parameters = [p for p in model.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr=recipe.learning_rate)
        self.history: list[dict[str, float]] = []
        self.stopped = False
        self._best_error, self._best, self._best_epoch = math.inf, self._weights(), 0
        if path is not None and path.exists():
            self._read(path)

    def run(self, train: Windows, valid: Windows, last: int, *, quiet: bool) -> None:
        """Train up to an epoch, or until the run is over; the module ends with the weights of the best epoch so far.

        Args:
            train: Windows to train on.
            valid: Windows that choose the best epoch. None of them: the training error chooses.
            last: Stop (for now) after this epoch.
            quiet: No progress bar.

        Raises:
            ValueError: Errors that are no longer finite.
        """
        recipe = self.recipe
        per_epoch = max(-(-len(train) // recipe.stride) // recipe.batch_size, 1)
        with _progress(quiet) as bar:
            task = bar.add_task("training", total=per_epoch * recipe.epochs, completed=per_epoch * len(self.history))
            while len(self.history) < last and not self.stopped:
                epoch, began = len(self.history) + 1, time.perf_counter()
                loss = self._epoch(train, epoch, lambda: bar.advance(task))
                seconds = time.perf_counter() - began
                error = self.model.errors(valid, stride=recipe.stride)["mse"] if len(valid) else loss
                if not math.isfinite(loss + error):
                    raise ValueError(
                        f"the error is no longer finite in epoch {epoch}; lower learning_rate ({recipe.learning_rate:g})"
                    )
                if error < self._best_error:
                    self._best_error, self._best, self._best_epoch = error, self._weights(), epoch
                self.history.append({"epoch": epoch, "train": loss, "val": error, "seconds": seconds})
                self.stopped = epoch - self._best_epoch >= recipe.patience or epoch == recipe.epochs
                bar.update(task, description=f"epoch {epoch}: validation MSE {error:.4f}")
                self._write()
        self.model.module.load_state_dict(self._best)
        self.model.module.eval()

    def _epoch(self, train: Windows, epoch: int, tick: Callable[[], None]) -> float:
        """One pass over the training windows in a new order; the mean loss. The last partial batch is left out."""
        recipe, device = self.recipe, self.model.device
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * 0.5 ** max(epoch - 2, 0)
        self.model.module.train()
        total = torch.zeros((), device=device)
        steps = 0
        with seeded(recipe.seed * 1009 + epoch, device):
            order = torch.randperm(len(train))
            if recipe.stride > 1:
                order = order[order % recipe.stride == 0]
            size = min(recipe.batch_size, len(order))
            for start in range(0, len(order) - size + 1, size):
                batch = train.batch(order[start : start + size])
                target = batch.pop("future_values")
                loss = nn.functional.mse_loss(self.model.forecast(batch), target)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
                total += loss.detach()
                steps += 1
                tick()
        return float(total / steps)

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self.model.module.state_dict().items()}

    def _read(self, path: Path) -> None:
        state = torch.load(path, map_location=self.model.device, weights_only=True)
        self.model.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history, self.stopped = state["history"], state["stopped"]
        self._best_error, self._best, self._best_epoch = state["best_error"], state["best"], state["best_epoch"]

    def _write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "stopped": self.stopped,
            "best_error": self._best_error,
            "best": self._best,
            "best_epoch": self._best_epoch,
        }
        with whole_file(self.path) as unfinished:
            torch.save(state, unfinished)


def _progress(quiet: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=quiet,
    )
