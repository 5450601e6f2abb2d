"""Lengths of time: one grammar for every `timeout` and `interval`."""

from __future__ import annotations

import math
import re
from datetime import timedelta
from typing import overload

from pgtoolset._arguments.shown import shown

#: The units of PostgreSQL's settings, in seconds.
#: https://www.postgresql.org/docs/current/config-setting.html#CONFIG-SETTING-NAMES-VALUES
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_WITH_UNIT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]+)\s*", re.ASCII)

#: Seconds: a longer time is as good as this one, and event loops and timers can bear it.
_LONGEST = 1e9

#: The largest value of a setting such as `lock_timeout`, in milliseconds: some 24 days.
_LONGEST_SETTING = 2**31 - 1


def seconds(name: str, value: object, *, zero: bool = False) -> float:
    """Return the seconds that a number, a `timedelta` or a string such as `"500ms"` means.

    Args:
        name: the argument, for messages.
        value: what the caller gave.
        zero: whether 0 is allowed.
    """
    result = _plain_seconds(name, value)
    if math.isnan(result) or (math.isinf(result) and isinstance(value, float)):
        raise ValueError(f"{name} must be a finite time, not {shown(value)}")
    if result < 0 or (result == 0 and not zero):
        raise ValueError(f"{name} must be {'at least' if zero else 'above'} 0, not {shown(value)}")
    return min(result, _LONGEST)


def _plain_seconds(name: str, value: object) -> float:
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, str):
        return _with_unit(name, value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"{name} must be seconds, a timedelta or a string such as '500ms', not {shown(value)}"
        )
    # An int may be too large for a float.
    return float(max(min(value, 2 * _LONGEST), -1)) if isinstance(value, int) else value


def _with_unit(name: str, value: str) -> float:
    match = _WITH_UNIT.fullmatch(value)
    if match is None or match[2] not in _UNITS:
        raise ValueError(
            f"{name} must be a number with one of the units {', '.join(_UNITS)}, such as "
            f"'500ms', not {shown(value)}"
        )
    return float(match[1]) * _UNITS[match[2]]


def optional_seconds(name: str, value: object, *, zero: bool = False) -> float | None:
    """Return the seconds, or `None` for `None`: no limit."""
    return None if value is None else seconds(name, value, zero=zero)


@overload
def milliseconds(duration: float) -> int: ...


@overload
def milliseconds(duration: float | None) -> int | None: ...


def milliseconds(duration: float | None) -> int | None:
    """Return seconds as a setting of PostgreSQL counts them: whole milliseconds, at least one.

    A time that is longer than the setting can hold becomes the longest that it holds.
    """
    if duration is None:
        return None
    return max(1, min(_LONGEST_SETTING, math.ceil(round(duration * 1000, 3))))
