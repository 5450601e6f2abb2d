"""The columns of an association table beyond the keys: values that were given, and defaults.

SQLAlchemy evaluates a Python-side default once for an INSERT ... SELECT, and once per row for rows
that are inserted one by one. The rows here are to get what the ORM's get, so the defaults are
evaluated here, once per row.
https://docs.sqlalchemy.org/en/20/core/defaults.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Column, FromClause, Select, bindparam
from sqlalchemy.schema import Sequence as DatabaseSequence

from pgtoolset.m2m._associations import Association


class Extras:
    """The extra columns that an INSERT names, given the names of those with a value.

    The other columns get their defaults from PostgreSQL.

    Attributes:
        columns: in the order of `expressions`.
        array_columns: those whose values differ from row to row, by the name of their parameter.
    """

    def __init__(self, association: Association, given: frozenset[str]) -> None:
        self.columns: list[Column[Any]] = []
        self.array_columns: dict[str, Column[Any]] = {}
        self._expressions: list[Any] = []
        self._given: dict[str, Column[Any]] = {}
        self._defaults: dict[str, Any] = {}
        self._scalar_columns: dict[str, Column[Any]] = {}
        for at, column in enumerate(association.extras):
            name = f"{association.prefix}v{at}"
            if column.name in given:
                self._given[name] = column
                self._add_scalar(name, column)
            elif column.default is not None:
                self._add_default(name, column, column.default)

    def _add_default(self, name: str, column: Column[Any], default: Any) -> None:
        if isinstance(default, DatabaseSequence):
            self._add(column, default.next_value())
        elif default.is_callable:
            self.array_columns[name] = column
            self._add(column, name)
        elif default.is_clause_element:
            is_query = isinstance(default.arg, Select)
            self._add(column, default.arg.scalar_subquery() if is_query else default.arg)
        else:
            self._defaults[name] = default.arg
            self._add_scalar(name, column)

    def _add_scalar(self, name: str, column: Column[Any]) -> None:
        self._scalar_columns[name] = column
        self._add(column, bindparam(name, type_=column.type))

    def _add(self, column: Column[Any], expression: Any) -> None:
        self.columns.append(column)
        self._expressions.append(expression)

    def expressions(self, rows: FromClause, prefix: str = "") -> list[Any]:
        """Return the values for the columns, as expressions.

        Args:
            rows: has the values that differ from row to row, as they are stored.
            prefix: of the names of its columns, before the name of the parameter.
        """
        return [
            rows.c[prefix + expression] if isinstance(expression, str) else expression
            for expression in self._expressions
        ]

    def scalar_expressions(self) -> list[Any]:
        """Return the values for the columns of one row, where `array_columns` is empty."""
        return self._expressions

    def parameters(
        self, values: Mapping[str, Any], keys: Mapping[Column[Any], Any], rows: int
    ) -> dict[str, Any]:
        """Return the values of the parameters, Python-side defaults evaluated once per row.

        Args:
            values: what the caller gave, by column name.
            keys: a list per key column, or the one value that all rows have.
            rows: how many rows there are.
        """
        parameters = dict(self._defaults)
        parameters |= {name: values[column.name] for name, column in self._given.items()}
        if not self.array_columns:
            return parameters
        known = {column.key: value for column, value in keys.items()}
        known |= {column.key: parameters[name] for name, column in self._scalar_columns.items()}
        lists = {column.key for column, value in keys.items() if isinstance(value, list)}
        context = RowContext(known, lists)
        for name, column in self.array_columns.items():
            default: Any = column.default
            evaluated = []
            for context.number in range(rows):
                evaluated.append(default.arg(context))
            parameters[name] = evaluated
            context.add(column.key, evaluated)
        return parameters


class RowContext:
    """What a context-sensitive default is called with: the parameters of its row.

    It has this much of SQLAlchemy's own context.
    """

    def __init__(self, values: dict[str, Any], lists: set[str]) -> None:
        self._values = values
        self._lists = lists
        self.number = 0

    def add(self, key: str, values: Sequence[Any]) -> None:
        self._values[key] = values
        self._lists.add(key)

    def get_current_parameters(self, isolate_multiinsert_groups: bool = True) -> dict[str, Any]:
        number = self.number
        return {
            key: value[number] if key in self._lists else value
            for key, value in self._values.items()
        }

    @property
    def current_parameters(self) -> dict[str, Any]:
        return self.get_current_parameters()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            "a default of an association table is called with the parameters of its row alone, "
            f"through get_current_parameters(); there is no {name!r} here"
        )
