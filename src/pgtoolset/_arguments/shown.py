"""A value as an error message may show it."""

from __future__ import annotations

from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

from pgtoolset._text import may_hold_password, printable

_LONGEST = 80

#: Types whose `repr` is short, runs no code of the caller's and holds no secret. Each stands before
#: the types that it derives from.
_PLAIN: tuple[Any, ...] = (
    bool,
    int,
    float,
    Decimal,
    UUID,
    datetime,
    date,
    time,
    timedelta,
    type(None),
)


def shown(value: Any, *, depth: int = 3) -> str:
    """Describe a value; its `repr` might load attributes, be endless or hold a password."""
    if isinstance(value, type):
        return _name_of(value)
    if isinstance(value, Enum):  # its value may be a URL
        return f"{_name_of(type(value))}.{printable(str(value.name))}"
    if isinstance(value, str):
        # A URL or a DSN that was given in place of something else may carry a password.
        text = str.__str__(value)
        return "a URL" if may_hold_password(text) else _short(repr(text))
    if isinstance(value, _PLAIN):
        plain = next(each for each in _PLAIN if isinstance(value, each))
        return _short(plain.__repr__(value))
    if type(value) in (tuple, list) and depth:
        items = [shown(each, depth=depth - 1) for each in value[:5]] + ["..."] * (len(value) > 5)
        brackets = "()" if type(value) is tuple else "[]"
        return f"{brackets[0]}{', '.join(items)}{brackets[1]}"
    name = _name_of(type(value))
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def cause_to_show(error: BaseException | None, value: object) -> BaseException | None:
    """Return the error to chain to the one that refuses a value.

    The words of another library's error may show the value, so `None` for what may be a URL.
    """
    return None if isinstance(value, str) and may_hold_password(value) else error


def _name_of(class_: type[Any]) -> str:
    name = class_.__name__
    return "type" if may_hold_password(name) else _short(printable(name))


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
