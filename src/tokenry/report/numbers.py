"""Write numbers for people."""

from __future__ import annotations

import math

__all__ = ["exponent", "readable", "short"]

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def readable(value: object, digits: int = 3) -> str:
    """A value with so many significant digits: 1234567 becomes ``1.23 M``; None a dash; text stays.

    Example:
        >>> readable(0.123456), readable(31.0), readable(1234567), readable(None), readable(True), readable(2e-7)
        ('0.123', '31.0', '1.23 M', '–', 'yes', '2×10⁻⁷')
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return str(value)
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-4:
        power = math.floor(math.log10(size))
        mantissa = f"{value / 10**power:.{max(digits - 1, 0)}f}".rstrip("0").rstrip(".")
        return f"{mantissa}×10{str(power).translate(SUPERSCRIPTS)}"
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e5, "k")):
        if size >= limit:
            return f"{_significant(value / (1e3 if letter == 'k' else limit), digits)} {letter}"
    return _significant(value, digits)


def _significant(value: float, digits: int) -> str:
    if isinstance(value, int):
        return str(value)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def exponent(value: float) -> str:
    """Two decimals, and no minus before a zero.

    Example:
        >>> exponent(1.984), exponent(-0.001)
        ('1.98', '0.00')
    """
    return f"{round(value, 2) + 0.0:.2f}"


def short(value: float) -> str:
    """A round value without trailing zeros, as on an axis.

    Example:
        >>> short(0.5), short(20.0), short(2000000.0)
        ('0.5', '20', '2 M')
    """
    text, _, letter = readable(value).partition(" ")
    if "." in text and "×" not in text:
        text = text.rstrip("0").rstrip(".")
    return f"{text} {letter}".strip()
