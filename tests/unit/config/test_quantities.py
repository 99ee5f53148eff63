"""Sizes and times as users write them."""

from __future__ import annotations

import pytest

from steer.config import quantities
from steer.values import Invalid


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [
        ("512M", 512 << 20),
        ("1g", 1 << 30),
        ("1.5GiB", 3 << 29),
        ("2048KB", 2 << 20),
        ("1048576", 1 << 20),
        (2 << 20, 2 << 20),
        ("1T", 1 << 40),
    ],
)
def test_size(text: str | int, bytes_: int) -> None:
    assert quantities.size_bytes(text) == bytes_


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not a size"),
        ("much", "not a size"),
        ("-1M", "not a size"),
        ("1 M", "not a size"),
        ("1MM", "not a size"),
        ("٣M", "not a size"),
        ("512", "too small"),
        (0, "too small"),
        (-1, "too small"),
        pytest.param(10**5000, "too large", id="more digits than int() writes"),
        ("2000000T", "too large"),
    ],
)
def test_bad_size(text: str | int, why: str) -> None:
    with pytest.raises(Invalid, match=why):
        quantities.size_bytes(text)


@pytest.mark.parametrize(
    ("text", "mean_s", "deviation_s"),
    [
        ("90", 90.0, 0.0),
        (90.5, 90.5, 0.0),
        ("1h", 3600.0, 0.0),
        ("1h±10m", 3600.0, 600.0),
        ("1h+-10m", 3600.0, 600.0),
        ("1d +/- 1.5h", 86400.0, 5400.0),
        ("1500ms", 1.5, 0.0),
    ],
)
def test_lifetime(text: str | float, mean_s: float, deviation_s: float) -> None:
    assert quantities.lifetime(text) == (mean_s, deviation_s)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("soon", "not a time"),
        ("1h±", "not a time"),
        ("1h±1m±1m", "not a time"),
        ("-5", "not a time"),
        (float("nan"), "not a time"),
        (float("inf"), "not a time"),
        ("0.5", "too small"),
        ("366d", "too large"),
        ("10s±10s", "the deviation is too large"),
    ],
)
def test_bad_lifetime(text: str | float, why: str) -> None:
    with pytest.raises(Invalid, match=why):
        quantities.lifetime(text)


def test_lifetimes_are_spread_evenly_around_their_mean() -> None:
    lifetime = quantities.lifetime("1h±10m")
    assert [lifetime.of(share) for share in (0.0, 0.5, 1.0)] == [3000.0, 3600.0, 4200.0]
