"""A mapped class as rows: columns and their attributes, keys, tables that inherit, and what a
column has by default.

Defaults that only the server could compute are not known here.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Column, Table, inspect
from sqlalchemy.orm import Mapper
from sqlalchemy.orm.exc import FlushError

from pgtoolset.errors import NoDatabaseError
from pgtoolset.m2m._analysis import _conditions_of as conditions_of
from pgtoolset.m2m._analysis import _is_equality as is_equality
from pgtoolset.testing.doubles._constraints import named
from pgtoolset.testing.doubles._store import Row, RowId, Work


def attribute_of(mapper: Mapper[Any], column: Column[Any]) -> str | None:
    """The attribute that a column is mapped to, if any."""
    known: dict[Any, Any] = getattr(mapper, "_columntoproperty", {})
    return mapper.get_property_by_column(column).key if column in known else None


def identity_of(instance: Any) -> tuple[Any, ...]:
    """The primary key of an instance that has been flushed."""
    identity: Any = inspect(instance).identity
    return tuple(identity)


def row_at(
    work: Work, mapper: Mapper[Any], table: Table, identity: tuple[Any, ...]
) -> RowId | None:
    """Where the row with a primary key is, in one of the tables of a class."""
    found = work.find(table, key_in(mapper, table, identity))
    return found[0] if found else None


def key_in(mapper: Mapper[Any], table: Table, identity: tuple[Any, ...]) -> Row:
    """The primary key in the columns of one of the tables of a class."""
    values = dict(zip(mapper.primary_key, identity, strict=True))
    for parent, child in inherited(mapper):
        if parent in values:
            values[child] = values[parent]
    return {str(column.key): value for column, value in values.items() if column.table is table}


def inherited(mapper: Mapper[Any]) -> list[tuple[Column[Any], Column[Any]]]:
    """Columns of a parent's table, and those of the tables below it that equal them; the topmost
    first."""
    pairs: list[tuple[Column[Any], Column[Any]]] = []
    for each in reversed(list(mapper.iterate_to_root())):
        for condition in (
            () if each.inherit_condition is None else conditions_of(each.inherit_condition)
        ):
            if is_equality(condition):
                left, right = condition.left, condition.right
                pairs.append((right, left) if left.table is each.local_table else (left, right))
    return pairs


def default_of(column: Column[Any], work: Work, context: Any, *, update: bool = False) -> Any:
    """The default of a column: Python's, a serial's, or one that the server would have as a
    constant."""
    default: Any = column.onupdate if update else column.default
    if default is not None and default.is_scalar:
        return default.arg
    if default is not None and default.is_callable:
        return default.arg(context)
    if update and default is None:
        return None
    table: Any = column.table
    if column.identity is not None or (column is table.autoincrement_column and default is None):
        return work.store.next_serial(table, column.key)
    expression: Any = (
        default.arg if default is not None else getattr(column.server_default, "arg", None)
    )
    if expression is None and default is None:
        return None
    if isinstance(expression, str):
        return column.type.python_type(expression)
    if getattr(expression, "name", None) in (
        "now",
        "current_timestamp",
        "clock_timestamp",
        "statement_timestamp",
    ):
        return datetime.now(UTC if getattr(column.type, "timezone", False) else None)
    raise NoDatabaseError(
        f"only a database can compute the default of {column} ({expression}); give the column a value, or a default "
        "in Python"
    )


class Context:
    """What a context-sensitive default is called with."""

    def __init__(self, row: Row) -> None:
        self._row = row

    def get_current_parameters(self, isolate_multiinsert_groups: bool = True) -> Row:
        return dict(self._row)

    @property
    def current_parameters(self) -> Row:
        return dict(self._row)


def complete(work: Work, table: Table, values: Row) -> Row:
    """A row with a value for each column, from defaults where none is given."""
    row = dict(values)
    for column in table.columns:
        if column.key not in row:
            row[column.key] = default_of(column, work, Context(row))
        elif column is table.autoincrement_column and row[column.key] is None:
            raise FlushError(f"{named(table, row)} has no key")
    return {column.key: row[column.key] for column in table.columns}
