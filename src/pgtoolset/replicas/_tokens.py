"""Tokens: a position in the WAL as a text that clients keep, and parsed without trust."""

from __future__ import annotations

import re

from pgtoolset._arguments import shown
from pgtoolset._postgres.nodes import Position

__all__ = ["PRIMARY", "format_token", "parse_token"]

#: A token that means the primary: what a client keeps where its position could not be asked for.
PRIMARY = "1.primary"

#: Version, system identifier, timeline and LSN. 16 digits of base 16 are 64 bits.
_TOKEN = re.compile(r"1\.([0-9a-f]{1,16})\.([0-9a-f]{1,8})\.([0-9a-f]{1,16})")


def format_token(position: Position) -> str:
    """Return the token of a position: at most 44 characters, all of them letters, digits and dots.

    It needs no quotes in a header, a cookie or a URL.
    """
    return f"1.{position.system:x}.{position.timeline:x}.{position.lsn:x}"


def parse_token(token: object) -> Position | None:
    """Return the position of a token; `None` where this library has not made it.

    Raises:
        TypeError: it is not a `str`.
    """
    if not isinstance(token, str):
        raise TypeError(f"after must be a token of position(), or None, not {shown(token)}")
    match = _TOKEN.fullmatch(token)
    if match is None:
        return None
    system, timeline, lsn = (int(digits, 16) for digits in match.groups())
    return Position(system, timeline, lsn)
