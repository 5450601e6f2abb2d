"""A value as an error message may show it."""

from __future__ import annotations

from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

_LONGEST = 80

#: Types whose `repr` is short, runs no code of the caller's and holds no secret.
_PLAIN = (bool, int, float, Decimal, UUID, date, datetime, time, timedelta, Enum, type(None))


def shown(value: Any) -> str:
    """Describe a value; its `repr` might load attributes, be endless or hold a password."""
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, str):
        # A URL that was given in place of something else may carry a password.
        return "a URL" if "://" in value else _short(repr(value))
    if isinstance(value, _PLAIN):
        return _short(repr(value))
    if type(value) in (tuple, list):
        items = [shown(each) for each in value[:5]] + ["..."] * (len(value) > 5)
        brackets = "()" if type(value) is tuple else "[]"
        return f"{brackets[0]}{', '.join(items)}{brackets[1]}"
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
