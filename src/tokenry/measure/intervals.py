"""How sure a mean is: its standard error and its 95 % interval, of values or of paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

__all__ = ["mean_interval", "paired_interval", "standard_error"]


def standard_error(values: Sequence[float]) -> float:
    """Standard deviation of the mean, in the unit of the values.

    Raises:
        ValueError: Fewer than two values.

    Example:
        >>> standard_error([2.0, 4.0])
        1.0
    """
    if len(values) < 2:
        raise ValueError(f"the spread of a mean needs at least two values, got {len(values)}")
    return statistics.stdev(values) / math.sqrt(len(values))


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (1.96 standard errors: for a few dozen values or more).

    Raises:
        ValueError: Fewer than two values.

    Example:
        >>> mean_interval([2.0, 4.0])
        (3.0, 1.96)
    """
    return statistics.fmean(values), 1.96 * standard_error(values)


def paired_interval(larger: Sequence[float], smaller: Sequence[float]) -> tuple[float, float]:
    """``mean_interval`` of the differences of two things measured on the same cases, in the same order.

    Raises:
        ValueError: Not as many values of both, or fewer than two pairs.

    Example:
        >>> paired_interval([3.0, 6.0], [1.0, 2.0])
        (3.0, 1.96)
    """
    return mean_interval([a - b for a, b in zip(larger, smaller, strict=True)])
