"""Names of databases, headers and cookies, and keys of advisory locks."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from pgtoolset._arguments.shown import shown

#: Bytes. PostgreSQL cuts longer identifiers, so two of them may become one: NAMEDATALEN is 64, with
#: a terminator.
#: https://www.postgresql.org/docs/current/sql-syntax-lexical.html#SQL-SYNTAX-IDENTIFIERS
LONGEST_NAME = 63

_HTTP_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}")


def check_name(name: str, value: object) -> str:
    """Return the name of a database; `TypeError` or `ValueError` where PostgreSQL cannot hold it.

    Args:
        name: the argument, for messages.
        value: what the caller gave.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {shown(value)}")
    if not value:
        raise ValueError(f"{name} must not be empty")
    if "\0" in value:
        raise ValueError(f"{name} must not contain a NUL character, and {shown(value)} does")
    try:
        length = len(value.encode())
    except UnicodeEncodeError:  # a lone surrogate
        raise ValueError(f"{name} must be valid Unicode, not {shown(value)}") from None
    if length > LONGEST_NAME:
        raise ValueError(
            f"{name} must have at most {LONGEST_NAME} bytes in UTF-8, and {shown(value)} has "
            f"{length}"
        )
    return value


def advisory_numbers(name: str, key: object) -> tuple[int, ...]:
    """Return the key of an advisory lock as PostgreSQL takes it: one bigint or two int4.

    Args:
        name: the argument, for messages.
        key: an `int`, a pair of `int`, or a string, whose number is always the same.
    """
    if isinstance(key, str):
        # Any string has a number, a lone surrogate too.
        digest = hashlib.sha256(key.encode(errors="surrogatepass")).digest()
        return (int.from_bytes(digest[:8], "big", signed=True),)
    if _is_int(key):
        return (_in_range(name, key, 64),)
    if isinstance(key, tuple) and len(key) == 2 and all(map(_is_int, key)):
        return tuple(_in_range(name, number, 32) for number in key)
    raise TypeError(f"{name} must be an int, a pair of int or a str, not {shown(key)}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _in_range(name: str, number: Any, bits: int) -> int:
    if not -(2 ** (bits - 1)) <= number < 2 ** (bits - 1):
        raise ValueError(f"{name} must be an int of {bits} bits with a sign, not {shown(number)}")
    return int(number)


def check_http_name(name: str, value: object) -> str:
    """Return the name of a header or a cookie.

    See https://www.rfc-editor.org/rfc/rfc9110#name-tokens
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be the name of a {name}, not {shown(value)}")
    if _HTTP_NAME.fullmatch(value) is None:
        raise ValueError(
            f"{name} must be 1 to 100 letters, digits or any of !#$%&'*+-.^_`|~, not {shown(value)}"
        )
    return value
