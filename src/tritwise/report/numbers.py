"""How numbers are written, the same on the page and in the plots.

Units are decimal: 1 kB is 1,000 bytes and 1 MB is 1,000,000, because a byte model counts its text that way.
"""

import math

_LARGEST = 10**18
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def number(value: object) -> float | None:
    """`value` as a float, or None for what cannot be a figure of a run: text, null, true, NaN, infinity, beyond ±1e18.

    A trace below 1e-18 becomes 0, so that no ratio of two figures overflows and no axis spans hundreds of decades.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        return None
    return float(value) if abs(value) >= 1 / _LARGEST else 0.0


def count(value: float) -> str:
    """A whole number with thousands separated: 1,115,394."""
    return f"{round(value):,}"


def exact_bytes(value: float) -> str:
    """1,115,394 B."""
    return f"{round(value):,} B"


def human_bytes(value: float, digits: int = 3) -> str:
    """1.12 MB; below 1,000 bytes exactly: 640 B. `digits` are significant digits."""
    size, unit = float(value), 0
    while abs(size) >= 999.5 and unit + 1 < len(_UNITS):
        size, unit = size / 1000, unit + 1
    if unit == 0:
        return f"{round(size)} B"
    return f"{significant(size, digits)} {_UNITS[unit]}"


def significant(value: float, digits: int = 3) -> str:
    """`digits` significant digits, no powers of ten, no digit before the point dropped: 0.0123, 1.23, 1,235."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")  # 0.9996 has three digits as 1.00, not as 1.000
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{value:,.{min(decimals, 12)}f}"


def tick(value: float) -> str:
    """A number for an axis: as few digits as it needs, 0.5, 25, 1,000."""
    return f"{value:,.6f}".rstrip("0").rstrip(".") if abs(value) < 1000 else f"{value:,.0f}"


def tick_bytes(value: float) -> str:
    """A byte count for an axis: 0, 500 kB, 2.5 MB."""
    if value == 0:
        return "0"
    size, unit = float(value), 0
    while abs(size) >= 1000 and unit + 1 < len(_UNITS):
        size, unit = size / 1000, unit + 1
    return f"{tick(round(size, 3))} {_UNITS[unit]}"


def percent(share: float, digits: int = 3) -> str:
    """A share as a percentage: 0.0421 is 4.21 %."""
    return f"{significant(100 * share, digits)} %"


def tick_percent(share: float) -> str:
    """A share for an axis: 0.01 %, 5 %."""
    return f"{tick(100 * share)} %"


def duration(seconds: float) -> str:
    """4.2 s, 2 min 18 s, 1 h 5 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"
