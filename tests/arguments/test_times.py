"""`_arguments.times`: one grammar for every `timeout` and `interval`."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest

from pgtoolset._arguments import milliseconds, optional_seconds, seconds


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (5, 5.0),
        (0.25, 0.25),
        (timedelta(minutes=1), 60.0),
        ("500ms", 0.5),
        ("5s", 5.0),
        (" 1.5 min ", 90.0),
        (".5h", 1800.0),
        ("2d", 172800.0),
        ("500us", 0.0005),
        ("60d", 60 * 86400.0),
    ],
)
def test_forms(value: Any, expected: float) -> None:
    """A time is a number of seconds, a timedelta, or a number with a unit of PostgreSQL's."""
    assert seconds("timeout", value) == expected
    assert optional_seconds("timeout", value) == expected
    assert optional_seconds("timeout", None) is None


@pytest.mark.parametrize("value", [10**400, timedelta.max, "9" * 400 + "d", 1e300])
def test_any_length(value: Any) -> None:
    """A time is taken however long it is, and a setting gets the longest that it can hold."""
    assert 1e8 < seconds("timeout", value) <= 1e9
    assert milliseconds(seconds("timeout", value)) == 2**31 - 1


@pytest.mark.parametrize(
    "value",
    [0, 0.0, -1, -(10**400), timedelta(0), timedelta(seconds=-1), "0s", "0.0ms"],
)
def test_above_zero(value: Any) -> None:
    """0 and less is a `ValueError`, but 0 where a function allows it."""
    with pytest.raises(ValueError, match=r"^interval must be above 0"):
        seconds("interval", value)
    if not str(value).startswith("-"):
        assert seconds("timeout", value, zero=True) == 0


@pytest.mark.parametrize("value", ["5", "-5s", "5 fortnights", "s", "", "5s'; DROP", "5S", "٣s"])
def test_strings_that_are_no_time(value: str) -> None:
    """A string without a unit, or with an unknown one, is a `ValueError` that lists the units."""
    with pytest.raises(ValueError, match=r"^timeout must be a number with one of the units us, ms"):
        seconds("timeout", value)


@pytest.mark.parametrize("value", [True, False, b"5s", [5], object(), Decimal(5)])
def test_types_that_are_no_time(value: Any) -> None:
    """A value of another type is a `TypeError`."""
    with pytest.raises(TypeError, match=r"^timeout must be seconds, a timedelta or a string"):
        optional_seconds("timeout", value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_finite(value: float) -> None:
    """A time is finite: no limit is `None`."""
    with pytest.raises(ValueError, match="finite"):
        seconds("timeout", value)


@pytest.mark.parametrize(
    ("duration", "expected"), [(1e-9, 1), (0.0015, 2), (0.1, 100), (1.1, 1100), (5.0, 5000)]
)
def test_milliseconds(duration: float, expected: int) -> None:
    """PostgreSQL counts whole milliseconds: rounded up, at least one."""
    assert milliseconds(duration) == expected
    assert milliseconds(None) is None
