"""JSON that a database holds or announces: any role may have written it.

It is parsed with a limit and refused without an error, so a hostile text is no more than an unknown
one. https://docs.python.org/3/library/json.html#module-json has the warning about size.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

__all__ = ["json_in"]


def json_in(text: str | None, *, longest: int) -> Any:
    """Return the value of a JSON text; `None` where it is too long or not JSON.

    Args:
        text: of any content.
        longest: the length that is parsed, in characters.
    """
    if text is None or len(text) > longest:
        return None
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):  # a ValueError also for an integer of 4,300 digits
        return None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)
