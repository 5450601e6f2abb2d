"""The triggers that announce changes to `RowWatcher(notify=True)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Column, Table
from sqlalchemy.orm import Mapper
from sqlalchemy.schema import ExecutableDDLElement

from pgtoolset._arguments import mapper_of, shown
from pgtoolset._postgres.notifications import EVENTS, AnnounceFunction, AnnounceTrigger

__all__ = ["row_change_trigger"]


def row_change_trigger(model: type[Any]) -> Sequence[ExecutableDDLElement]:
    """Return the DDL of triggers that announce committed changes to watchers with `notify=True`.

    Execute it with the `schema_translate_map` of each tenant: each table in each schema has a
    channel of its own.

    For each table of the class that is one function and four statement-level triggers (INSERT,
    UPDATE, DELETE, TRUNCATE). Existing ones are replaced, so running the DDL twice is not an error.
    The role that runs it owns the function. Where another role owns a function of that name, the
    DDL raises an error that names the role: an owner may change what its function does.
    A statement costs its transaction one notification. It names the keys if they fit into 7,999
    bytes and are integers, strings, UUIDs or dates; otherwise watchers poll all their rows of the
    table. A transaction with notifications takes a lock of the whole database cluster at its
    commit: the page on watching says what that costs.

    Args:
        model: a mapped class.

    Returns:
        DDL elements in the order in which they have to run: for a connection's `execute`, for
        Alembic's `op.execute`, and as listeners of `after_create` of a table or a metadata.

    Raises:
        TypeError: `model` is not a mapped class, or is mapped to something other than tables.

    Example:
        >>> async with engine.begin() as connection:
        ...     for ddl in row_change_trigger(Account):
        ...         await connection.execute(ddl)

    See https://www.postgresql.org/docs/current/sql-notify.html and
    https://docs.sqlalchemy.org/en/20/core/ddl.html
    """
    mapper = mapper_of(model)  # not configured, so that related classes may be defined later
    elements: list[ExecutableDDLElement] = []
    for table in mapper.tables:
        if not isinstance(table, Table):
            raise TypeError(
                f"model: {shown(model)} is mapped to {shown(table)}; only tables have triggers"
            )
        elements.append(AnnounceFunction(table, _key_columns(mapper, table)))
        elements.extend(AnnounceTrigger(table, event) for event in EVENTS)
    return tuple(elements)


def _key_columns(mapper: Mapper[Any], table: Table) -> list[Column[Any]]:
    """Return the columns of a table that hold the mapper's primary key, in its order.

    The list is empty where one of them is missing.
    """
    found: list[Column[Any]] = []
    for key in mapper.primary_key:
        same = [
            column
            for column in mapper.get_property_by_column(key).columns
            if isinstance(column, Column) and column.table is table
        ]
        found.extend(same[:1])
    return found if len(found) == len(mapper.primary_key) else []
