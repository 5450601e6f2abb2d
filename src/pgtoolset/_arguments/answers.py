"""What an HTTP answer may say: statuses, types of problems, and texts for constraints."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from pgtoolset._arguments.names import check_name
from pgtoolset._arguments.shown import shown

#: The characters of a URI but for "@", before which a password may stand.
#: https://www.rfc-editor.org/rfc/rfc3986#section-2
_URI = re.compile(r"[A-Za-z0-9._~:/?#\[\]!$&'()*+,;=%-]+", re.ASCII)


def check_constraint_texts(name: str, value: object) -> dict[str, str]:
    """Return the text for each constraint, by its name; empty for `None`.

    Args:
        name: the argument, for messages.
        value: what the caller gave.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must map names of constraints to texts, not be {shown(value)}")
    texts: dict[str, str] = {}
    for constraint, text in value.items():
        key = check_name(f"a key of {name}", constraint)
        if not isinstance(text, str):
            raise TypeError(f"{name}: the text for {shown(key)} must be a str, not {shown(text)}")
        if not text.strip():
            raise ValueError(f"{name}: the text for {shown(key)} must not be empty")
        texts[key] = text
    return texts


def check_type_base(name: str, value: object) -> str | None:
    """Return the beginning of URIs; `None` for `None`.

    Args:
        name: the argument, for messages.
        value: what the caller gave.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise TypeError(f"{name} must be the beginning of a URI, not {shown(value)}")
    if _URI.fullmatch(value) is None:
        raise ValueError(
            f'{name} must be the beginning of a URI, such as "https://example.com/problems/", with '
            f"no user in it, not {shown(value)}"
        )
    return value


def check_problem_statuses(
    name: str, values: Sequence[object], known: Collection[int]
) -> tuple[int, ...]:
    """Return the statuses that are given, each once; all for none.

    Args:
        name: the argument, for messages.
        values: what the caller gave.
        known: the statuses that there are.
    """
    chosen: dict[int, None] = {}
    for each in values:
        if isinstance(each, bool) or not isinstance(each, int):
            raise TypeError(f"{name} must be ints, not {shown(each)}")
        if each not in known:
            choice = ", ".join(map(str, known))
            raise ValueError(f"{name} must be of {choice}, not {shown(each)}")
        chosen[int(each)] = None
    return tuple(chosen or known)
