"""Output for programs: the values of a database as JSON, on one line of ASCII."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import date, time, timedelta
from typing import Any

__all__ = ["as_json"]


def as_json(value: Any, *, indent: int | None = None) -> str:
    """Return a value as JSON, in which control characters are escaped.

    Dates and times are in ISO 8601, intervals in seconds, bytes in hexadecimal digits after `\\x`,
    and what JSON has no type for is the text of PostgreSQL or of Python.
    """
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    plain: Any
    match value:
        case None | bool() | int() | str():
            plain = value
        case float():
            plain = value if math.isfinite(value) else str(value)
        case date() | time():  # a datetime is a date
            plain = value.isoformat()
        case timedelta():
            plain = value.total_seconds()
        case bytes() | bytearray() | memoryview():
            plain = f"\\x{bytes(value).hex()}"
        case Mapping():
            plain = {str(name): _plain(each) for name, each in value.items()}
        case list() | tuple() | set() | frozenset():
            plain = [_plain(each) for each in value]
        case _:
            plain = str(value)
    return plain
