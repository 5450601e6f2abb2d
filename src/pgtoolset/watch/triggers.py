"""The triggers that `RowWatcher(notify=True)` is woken by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Column, Table
from sqlalchemy.orm import Mapper
from sqlalchemy.schema import ExecutableDDLElement

from pgtoolset._postgres.notifications import EVENTS, AnnounceFunction, AnnounceTrigger
from pgtoolset.watch.targets import mapper_of

__all__ = ["row_change_trigger"]


def row_change_trigger(model: type[Any]) -> Sequence[ExecutableDDLElement]:
    """The DDL of triggers that announce every committed change of the model's rows to watchers with
    `notify=True`.

    For each table that the class maps: a function and four statement-level triggers (INSERT,
    UPDATE, DELETE, TRUNCATE), created or replaced, so that running it twice is no error. A
    statement costs its transaction one notification, which names the keys if they fit into 7,999
    bytes and says "look at the table" otherwise; keys other than integers, strings, UUIDs and dates
    are never named. A transaction with notifications takes a lock of the whole database cluster at
    its commit: see the page on watching for what that costs.

    Args:
        model: a mapped class.

    Returns:
        DDL elements in the order in which they have to run, for a connection's `execute`, for
        Alembic's `op.execute`, and as listeners of a table's or a metadata's `after_create`.

    Raises:
        TypeError: `model` is not a mapped class, or maps something that is not a table.

    Example:
        >>> async with engine.begin() as connection:
        ...     for ddl in row_change_trigger(Account):
        ...         await connection.execute(ddl)

    See https://www.postgresql.org/docs/current/sql-notify.html and
    https://docs.sqlalchemy.org/en/20/core/ddl.html
    """
    mapper = mapper_of(model)  # which may wait for classes of the same module still
    elements: list[ExecutableDDLElement] = []
    for table in mapper.tables:
        if not isinstance(table, Table):
            raise TypeError(f"{model.__name__} maps {table!r}, and only a table can have triggers")
        elements.append(AnnounceFunction(table, key_columns(mapper, table)))
        elements.extend(AnnounceTrigger(table, event) for event in EVENTS)
    return tuple(elements)


def key_columns(mapper: Mapper[Any], table: Table) -> list[Column[Any]]:
    """The columns of `table` that hold the mapper's primary key, in its order; none where one is
    missing."""
    found: list[Column[Any]] = []
    for key in mapper.primary_key:
        same = [
            c
            for c in mapper.get_property_by_column(key).columns
            if isinstance(c, Column) and c.table is table
        ]
        found.extend(same[:1])
    return found if len(found) == len(mapper.primary_key) else []
