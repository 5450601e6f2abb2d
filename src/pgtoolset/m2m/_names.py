"""Names of our own in statements: parameters, aliases and columns that no table of theirs can have.

A parameter of an INSERT or UPDATE that is called as a column is the value of that column, and an
alias hides the table of its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from sqlalchemy import Table
from sqlalchemy.sql import visitors

_PREFIX = "m2m_"


def free_prefix(tables: Iterable[Table]) -> str:
    """Return a prefix that begins no name of these tables, of their columns and defaults."""
    taken = {name.lower() for table in tables for name in _names(table)}
    prefix = _PREFIX
    while any(name.startswith(prefix) for name in taken):
        prefix = f"m{prefix}"
    return prefix


def _names(table: Table) -> Iterator[str]:
    yield table.name
    for column in table.columns:
        yield column.name
        yield column.key
        default: Any = column.default
        if default is not None and default.is_clause_element:
            for element in visitors.iterate(default.arg):
                for name in ("name", "key"):
                    found = getattr(element, name, None)
                    if isinstance(found, str):
                        yield found
