"""INSERT ... ON CONFLICT that is compiled once.

SQLAlchemy 2.0 has no cache key for its own ON CONFLICT, so it compiles such a statement at every
call; 2.1 has one.
https://docs.sqlalchemy.org/en/20/dialects/postgresql.html#insert-on-conflict-upsert and
https://docs.sqlalchemy.org/en/20/core/connections.html#sql-caching
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Column, literal_column
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql.dml import OnConflictDoNothing, OnConflictDoUpdate
from sqlalchemy.sql.visitors import InternalTraversal

__all__ = ["Insert", "overwrite_conflicts", "skip_conflicts"]

_HAS_CACHE_KEY = bool(getattr(OnConflictDoNothing, "inherit_cache", False))
_TARGET: list[Any] = [
    ("constraint_target", InternalTraversal.dp_string),
    ("inferred_target_elements", InternalTraversal.dp_multi_list),
    ("inferred_target_whereclause", InternalTraversal.dp_clauseelement),
]
#: The values follow from the columns.
_TARGET_AND_COLUMNS = [*_TARGET, ("columns", InternalTraversal.dp_multi_list)]


class Insert(postgresql.Insert):
    """`sqlalchemy.dialects.postgresql.insert(table)`, for the functions below."""

    inherit_cache = True


class _Skip(OnConflictDoNothing):
    inherit_cache = True
    _traverse_internals = _TARGET


class _Overwrite(OnConflictDoUpdate):
    inherit_cache = True
    _traverse_internals = _TARGET_AND_COLUMNS
    columns: Sequence[Column[Any]]


def skip_conflicts(statement: Insert, target: Sequence[Column[Any]]) -> Insert:
    """Return `statement` with ON CONFLICT (target) DO NOTHING."""
    statement = statement.on_conflict_do_nothing(index_elements=target)
    if not _HAS_CACHE_KEY:
        statement._post_values_clause = _Skip(index_elements=target)
    return statement


def overwrite_conflicts(
    statement: Insert, target: Sequence[Column[Any]], columns: Sequence[Column[Any]]
) -> Insert:
    """Return `statement` with ON CONFLICT (target) DO UPDATE.

    A row that is in the way gets the values for `columns` that were to be inserted.
    """
    values: dict[Any, Any] = {
        column.key: literal_column("DEFAULT")
        if column.identity is not None and column.identity.always
        else statement.excluded[column.key]
        for column in columns
    }
    statement = statement.on_conflict_do_update(index_elements=target, set_=values)
    if not _HAS_CACHE_KEY:
        clause = _Overwrite(index_elements=target, set_=values)
        clause.columns = columns
        statement._post_values_clause = clause
    return statement
