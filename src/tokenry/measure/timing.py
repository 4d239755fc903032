"""Time several things fairly: warm-up, then A B A B ..., the median and its spread, ratios to a baseline."""

from __future__ import annotations

import gc
import math
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import psutil

__all__ = ["Timing", "crossing", "fit_exponent", "interleave", "peak_extra_memory"]


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs of one thing.

    Attributes:
        seconds: Every repeat, in order.
        median: Their median.
        low: Lower quartile (the smallest value when there are fewer than four).
        high: Upper quartile (the largest value when there are fewer than four).
    """

    seconds: tuple[float, ...]
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Summarise at least one measured time."""
        if len(seconds) >= 4:
            low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        else:
            low, median, high = min(seconds), statistics.median(seconds), max(seconds)
        return cls(tuple(seconds), median, low, high)

    @property
    def spread(self) -> float:
        """Half the way from ``low`` to ``high``: what stands behind ``±``."""
        return (self.high - self.low) / 2

    def as_dict(self) -> dict:
        """As plain JSON."""
        return asdict(self)


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def interleave(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 5,
    warmup: int = 1,
    device: str = "cpu",
    min_seconds: float = 0.0,
) -> dict[str, Timing]:
    """Time each function ``repeats`` times, taking turns, so that a busy moment of the machine hits all alike.

    Args:
        functions: Name to a call without arguments.
        repeats: Timed turns.
        warmup: Untimed calls of each before.
        device: ``"cuda"`` waits for the device around each call.
        min_seconds: A turn repeats its call until this much time has passed and counts the mean: for calls
            so short that one alone could not be timed. Unit: seconds.

    Returns:
        Name to ``Timing`` (seconds per call).

    Raises:
        ValueError: Nothing to time, or no turn.
    """
    if not functions:
        raise ValueError("nothing to time: functions is empty")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    for call in functions.values():
        for _ in range(warmup):
            call()
    measured: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, call in functions.items():
            _synchronize(device)
            calls, began = 0, time.perf_counter()
            while True:
                call()
                calls += 1
                _synchronize(device)
                elapsed = time.perf_counter() - began
                if elapsed >= min_seconds:
                    break
            measured[name].append(elapsed / calls)
    return {name: Timing.of(seconds) for name, seconds in measured.items()}


def peak_extra_memory(call: Callable[[], object], *, device: str = "cpu", interval: float = 0.0005) -> int:
    """Bytes that ``call`` held at its peak above what was held before it.

    On CUDA the allocator's own count. On the CPU the resident size of the process, sampled every
    ``interval`` seconds: use it for differences of many megabytes, after a warm-up call.
    """
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    process = psutil.Process()
    before = peak = process.memory_info().rss
    finished = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not finished.wait(interval):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        call()
        peak = max(peak, process.memory_info().rss)
    finally:
        finished.set()
        watcher.join()
    return peak - before


def fit_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Exponent b of ``cost = a * size ** b``, by least squares on logarithms.

    Only the larger half of the sizes counts (at least three): at small sizes fixed costs hide the growth.

    Example:
        >>> round(fit_exponent([1, 2, 4, 8, 16], [3, 12, 48, 192, 768]), 6)
        2.0
    """
    if len(sizes) != len(costs) or len(sizes) < 2:
        raise ValueError(f"need at least two sizes and as many costs, got {len(sizes)} and {len(costs)}")
    if min(sizes) <= 0 or min(costs) <= 0:
        raise ValueError("sizes and costs must be positive")
    import numpy as np

    pairs = sorted(zip(sizes, costs, strict=True))
    pairs = pairs[-max(3, (len(pairs) + 1) // 2) :]
    logs = np.log(np.asarray(pairs, dtype=float))
    slope, _ = np.polyfit(logs[:, 0], logs[:, 1], 1)
    return float(slope)


def crossing(sizes: Sequence[float], ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Size from which ``ours`` costs less for good, between two measured sizes by their logarithms.

    Args:
        sizes: Ascending, positive.
        ours: Cost at each size.
        theirs: The other's.

    Returns:
        The size; the first one where ours is cheaper throughout; None where theirs is cheaper at the largest.

    Example:
        >>> round(crossing([1, 10, 100], [5, 5, 5], [0.5, 5, 50]), 6)
        10.0
    """
    if not len(sizes) == len(ours) == len(theirs) or len(sizes) < 2:
        raise ValueError(f"need two sizes or more and a cost for each, got {len(sizes)}, {len(ours)} and {len(theirs)}")
    if ours[-1] >= theirs[-1]:
        return None
    last = max((i for i in range(len(sizes)) if ours[i] >= theirs[i]), default=-1)
    if last < 0:
        return float(sizes[0])
    before, after = (math.log(ours[i] / theirs[i]) for i in (last, last + 1))
    share = before / (before - after)
    low, high = math.log(sizes[last]), math.log(sizes[last + 1])
    return math.exp(low + share * (high - low))
