"""What the functions of this folder are given, checked before any SQL."""

from __future__ import annotations

import math
import re
from datetime import timedelta
from enum import Enum
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from pgtoolset._lifecycle import check_is_async, sync_session_of

E = TypeVar("E", bound=Enum)

#: The units of PostgreSQL's settings, in seconds.
#: https://www.postgresql.org/docs/current/config-setting.html#CONFIG-SETTING-NAMES-VALUES
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_TIMEOUT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]+)\s*", re.ASCII)

#: The largest value of `lock_timeout`, in milliseconds.
_LONGEST = 2**31 - 1


def milliseconds(timeout: object) -> int | None:
    """A timeout as PostgreSQL counts it, in whole milliseconds and at least one; `None` for no
    timeout."""
    if timeout is None:
        return None
    if isinstance(timeout, timedelta):
        seconds = timeout.total_seconds()
    elif isinstance(timeout, str):
        seconds = _seconds(timeout)
    elif isinstance(timeout, int | float) and not isinstance(timeout, bool):
        seconds = float(timeout)
    else:
        raise TypeError(
            f"timeout must be seconds, a timedelta, a string such as '500ms' or None, not {timeout!r} of "
            f"{type(timeout).__name__}"
        )
    if not seconds > 0 or math.isinf(seconds):
        raise ValueError(
            f"timeout must be above 0 and finite, not {timeout!r}; use nowait=True or None"
        )
    result = math.ceil(round(seconds * 1000, 3))
    if result > _LONGEST:
        raise ValueError(
            f"timeout must be at most {_LONGEST} ms (24 days), which {timeout!r} is not; use None"
        )
    return result


def _seconds(timeout: str) -> float:
    match = _TIMEOUT.fullmatch(timeout)
    if match is None or match[2] not in _UNITS:
        raise ValueError(
            f"timeout must be a number with one of the units {', '.join(_UNITS)}, such as '500ms', not {timeout!r}"
        )
    return float(match[1]) * _UNITS[match[2]]


def member_of(modes: type[E], mode: object) -> E:
    """The member of an enum of modes that is given by itself, its value or its name, in any
    case."""
    if isinstance(mode, modes):
        return mode
    if isinstance(mode, Enum) or not isinstance(mode, str):
        raise TypeError(f"mode must be a {modes.__name__} or its name, not {mode!r}")
    try:
        return modes(mode.upper().replace("_", " "))
    except ValueError:
        known = ", ".join(str(member.value) for member in modes)
        raise ValueError(f"mode must be one of {known}, not {mode!r}") from None


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")


def async_session(session: Any) -> Session:
    """The `Session` inside an `AsyncSession`, or `TypeError`: a lock needs the session's
    connection."""
    check_is_async(session, "session must be an AsyncSession")
    sync = sync_session_of(session)
    if sync is None:
        raise TypeError(
            f"session must be an AsyncSession, not {session!r}; an async_scoped_session gives its session when called"
        )
    return sync
