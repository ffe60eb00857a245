"""Numbers as a person reads them. In: values, None where there is none. Out: short texts with a true minus sign, `-` as a dash for None."""

import math
from collections.abc import Callable

Formatter = Callable[[float | None], str]

_DASH, _MINUS, _THIN_SPACE = "\u2013", "\u2212", "\u2009"


def decimals(digits: int, signed: bool = False) -> Formatter:
    """A formatter to a fixed number of decimals, so that a column's points stand below each other."""
    sign = "+" if signed else ""

    def text(value: float | None) -> str:
        return _DASH if value is None else _with_minus(f"{value:{sign},.{digits}f}")

    return text


def significant(value: float | None) -> str:
    """Three digits: `4.21`, `46.4`, `1,312`."""
    if value is None:
        return _DASH
    if not math.isfinite(value):
        return _with_minus(str(value))
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return _with_minus(f"{value:,.{digits}f}")


def plain(value: float | None) -> str:
    """As short as it can be written: `0.175`, `2`, `1e-05`."""
    return _DASH if value is None else _with_minus(f"{value:g}")


def percent(value: float | None) -> str:
    """A share of 0..1: `1.2 %`; what is there but rounds to nothing is `<0.1 %`."""
    if value is None:
        return _DASH
    if 0 < value < 0.0005:
        return f"<0.1{_THIN_SPACE}%"
    return f"{100 * value:.1f}{_THIN_SPACE}%"


def count(value: float | None) -> str:
    """A whole number with its thousands apart: `2,304`."""
    return _DASH if value is None else f"{value:,.0f}"


def short_count(value: float | None) -> str:
    """A count in thousands, millions or milliards: `300 k`, `1.23 M`."""
    if value is None or abs(value) < 10_000:
        return count(value)
    for unit in ("k", "M", "G"):
        value /= 1000
        if value < 999.5 or unit == "G":
            return f"{value:.3g}{_THIN_SPACE}{unit}" if value < 999.5 else f"{value:,.0f}{_THIN_SPACE}{unit}"
    raise AssertionError("the last unit takes every value")


def interval(pair: tuple[float, float] | None, text: Formatter) -> str:
    """Both ends of a 95 % interval, or nothing."""
    return f"{text(pair[0])} {_DASH} {text(pair[1])}" if pair else ""


def _with_minus(text: str) -> str:
    return text.replace("-", _MINUS)
