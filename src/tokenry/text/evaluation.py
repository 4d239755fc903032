"""How well scores separate machine text from human text: area under the ROC curve with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tokenry.text.detector import choose_threshold

__all__ = ["Interval", "auroc", "auroc_gain", "true_positive_rate"]

Scores = Sequence[Sequence[float]]


class Interval(NamedTuple):
    """An estimate and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def _won(human: Scores, machine: Scores) -> np.ndarray:
    """Share of the seeds in which machine text i scores above human text j (a tie is half): (machines, humans)."""
    if not len(human) or len(human) != len(machine) or not len(human[0]) or not len(machine[0]):
        raise ValueError("need scores of at least one human and one machine text, as many lists of both")
    tables = []
    for people, machines in zip(human, machine, strict=True):
        m, h = np.asarray(machines, dtype=float)[:, None], np.asarray(people, dtype=float)[None, :]
        if np.isnan(m).any() or np.isnan(h).any():
            raise ValueError("a score is NaN: a detector failed on one of the texts")
        tables.append((m > h) + 0.5 * (m == h))
    return np.mean(tables, axis=0)


def _bootstrap(won: np.ndarray, repeats: int, seed: int) -> Interval:
    generator = np.random.default_rng(seed)
    machines, humans = won.shape
    u = generator.multinomial(machines, np.full(machines, 1 / machines), repeats)  # how often each text is drawn
    v = generator.multinomial(humans, np.full(humans, 1 / humans), repeats)
    values = ((u @ won) * v).sum(1) / (machines * humans)
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(float(won.mean()), float(low), float(high))


def auroc(human: Scores, machine: Scores, *, repeats: int = 2000, seed: int = 0) -> Interval:
    """Area under the ROC curve, machine text positive, averaged over seeds.

    Args:
        human: For each seed the scores of the human texts, all in one order.
        machine: For each seed the scores of the machine texts, all in one order.
        repeats: Bootstrap draws; texts are drawn, each with all its seeds.
        seed: Seed of the bootstrap.

    Example:
        >>> auroc([[0.1, 0.4]], [[0.3, 0.9]]).value
        0.75
    """
    return _bootstrap(_won(human, machine), repeats, seed)


def auroc_gain(
    human: Scores,
    machine: Scores,
    baseline_human: Scores,
    baseline_machine: Scores,
    *,
    repeats: int = 2000,
    seed: int = 0,
) -> Interval:
    """Area of one detector minus that of another on the same texts, with a paired bootstrap interval."""
    return _bootstrap(_won(human, machine) - _won(baseline_human, baseline_machine), repeats, seed)


def true_positive_rate(human: Sequence[float], machine: Sequence[float], false_positive_rate: float = 0.01) -> float:
    """Share of the machine texts above the lowest threshold that no more than so large a share of human texts exceeds.

    Raises:
        ValueError: There is no human text, or the rate lies outside [0, 1).

    Example:
        >>> true_positive_rate([0.1, 0.4], [0.3, 0.9])
        0.5
    """
    threshold = choose_threshold(human, [0] * len(human), false_positive_rate)
    return float(np.mean(np.asarray(machine, dtype=float) > threshold))
