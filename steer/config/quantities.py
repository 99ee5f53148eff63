"""Sizes and times as users write them: "512M", "90s", "1h", "1h±10m". Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from steer.values import Invalid

_NUMBER = r"([0-9]{1,15}(?:\.[0-9]{1,9})?)"
_TIME = rf"{_NUMBER}(ms|s|m|h|d|)"
_SIZE = rf"(?i){_NUMBER}([KMGT]?)(?:iB|B)?"
_UNITS_S: Mapping[str, float] = {
    "ms": 0.001,
    "": 1.0,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
    "d": 86400.0,
}
_UNITS_BYTES: Mapping[str, int] = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_DEVIATION_MARK = r"±|\+-|\+/-"

SIZE_ALLOWED = "a size from 1M to 1024T, such as 512M or 2G"
SIZE_MIN_BYTES, SIZE_MAX_BYTES = 1 << 20, 1 << 50
LIFETIME_ALLOWED = (
    "a time from 1s to 365d, such as 1h, with or without a deviation: 1h±10m, 1h+-10m"
)
LIFETIME_MIN_S, LIFETIME_MAX_S = 1.0, 365 * 86400.0


def seconds(text: str) -> float:
    """Read a time: a number with ms, s, m, h or d, or a number of seconds.

    Raises:
        Invalid: it is none.
    """
    found = re.fullmatch(_TIME, text)
    if not found:
        raise Invalid("not a time")
    return float(found[1]) * _UNITS_S[found[2]]


def size_bytes(value: str | int) -> int:
    """Read a size: a number with K, M, G or T, which are powers of 1024, or a number of bytes.

    Raises:
        Invalid: it is none, or out of range.
    """
    size = value if isinstance(value, int) else _read_size_bytes(value)
    if not SIZE_MIN_BYTES <= size <= SIZE_MAX_BYTES:
        raise Invalid("too small" if size < SIZE_MIN_BYTES else "too large")
    return size


def _read_size_bytes(text: str) -> int:
    found = re.fullmatch(_SIZE, text)
    if not found:
        raise Invalid("not a size")
    return int(float(found[1]) * _UNITS_BYTES[found[2].upper()])


class Lifetime(NamedTuple):
    """How long something may live.

    Args:
        mean_s: in the mean.
        deviation_s: how much more or less at most, so that not all end at once.
    """

    mean_s: float
    deviation_s: float

    def of(self, share: float) -> float:
        """The seconds of one of them.

        Args:
            share: from 0 to 1, evenly distributed, and always the same for the same one.
        """
        return self.mean_s + self.deviation_s * (2.0 * share - 1.0)


def lifetime(value: str | float) -> Lifetime:
    """Read a time with an optional deviation: "1h±10m".

    Raises:
        Invalid: it is none, or out of range.
    """
    mean, *deviations = re.split(_DEVIATION_MARK, str(value))
    if len(deviations) > 1:
        raise Invalid("not a time")
    mean_s, deviation_s = seconds(mean.strip()), sum(seconds(each.strip()) for each in deviations)
    if not LIFETIME_MIN_S <= mean_s <= LIFETIME_MAX_S:
        raise Invalid("too small" if mean_s < LIFETIME_MIN_S else "too large")
    if mean_s - deviation_s < LIFETIME_MIN_S:
        raise Invalid("the deviation is too large")
    return Lifetime(mean_s, deviation_s)


READ: Mapping[str, Callable[[Any], object]] = {"max_memory": size_bytes, "max_lifetime": lifetime}
"""How the value of each of these keys is read."""
