"""The columns of an association table beyond the keys: values that were given, and defaults.

SQLAlchemy evaluates a Python-side default once for an INSERT ... SELECT; a row inserted by itself
would get one of its own. So they are evaluated here, once per row.
https://docs.sqlalchemy.org/en/20/core/defaults.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Column, FromClause, Select, bindparam
from sqlalchemy.schema import Sequence as DatabaseSequence

from pgtoolset._postgres.arrays import element
from pgtoolset.m2m._associations import Association


class Extras:
    """The extra columns that an INSERT names, given the names of those with a value. The others
    default by themselves.

    Attributes:
        columns: in the order of `expressions`.
        array_columns: those whose values differ from row to row, by the name of their parameter.
    """

    def __init__(self, association: Association, given: frozenset[str]) -> None:
        self.columns: list[Column[Any]] = []
        self.array_columns: dict[str, Column[Any]] = {}
        self._given: dict[str, Column[Any]] = {}
        self._scalars: dict[str, Any] = {}
        self._scalar_columns: dict[str, Column[Any]] = {}
        self._expressions: list[Any] = []
        for at, column in enumerate(association.extras):
            default: Any = column.default
            if column.name in given:
                self._given[f"v{at}"] = self._scalar_columns[f"v{at}"] = column
                self._add(column, bindparam(f"v{at}", type_=column.type))
            elif isinstance(default, DatabaseSequence):
                self._add(column, default.next_value())
            elif default is None:
                continue
            elif default.is_callable:
                self.array_columns[f"x{at}"] = column
                self._add(column, f"x{at}")
            elif default.is_clause_element:
                argument = default.arg
                self._add(
                    column, argument.scalar_subquery() if isinstance(argument, Select) else argument
                )
            else:
                self._scalars[f"v{at}"] = default.arg
                self._scalar_columns[f"v{at}"] = column
                self._add(column, bindparam(f"v{at}", type_=column.type))

    def _add(self, column: Column[Any], expression: Any) -> None:
        self.columns.append(column)
        self._expressions.append(expression)

    def expressions(self, rows: FromClause, prefix: str = "") -> list[Any]:
        """What the columns are to be; `rows` has what differs from row to row, under the
        parameters' names."""
        return [
            element(rows.c[prefix + expression], column)
            if isinstance(expression, str)
            else expression
            for column, expression in zip(self.columns, self._expressions, strict=True)
        ]

    def scalar_expressions(self) -> list[Any]:
        """What the columns are to be, where there is one row and `array_columns` is empty."""
        return self._expressions

    def parameters(
        self, values: Mapping[str, Any], keys: Mapping[Column[Any], Any], rows: int
    ) -> dict[str, Any]:
        """The values of the parameters; `keys` has a list per key column, or the one value that all
        rows have."""
        parameters = self._scalars | {
            name: values[column.name] for name, column in self._given.items()
        }
        if not self.array_columns:
            return parameters
        known = {column.key: value for column, value in keys.items()}
        known |= {column.key: parameters[name] for name, column in self._scalar_columns.items()}
        context = Row(
            known, {column.key for column, value in keys.items() if isinstance(value, list)}
        )
        for name, column in self.array_columns.items():
            default: Any = column.default
            evaluated = []
            for context.number in range(rows):
                evaluated.append(default.arg(context))
            parameters[name] = evaluated
            context.add(column.key, evaluated)
        return parameters


class Row:
    """What a context-sensitive default is called with: the parameters of its row, as in
    SQLAlchemy's own context."""

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
            f"a default of an association table is called with the parameters of its row alone, through "
            f"get_current_parameters(); there is no {name!r} here"
        )


def extras_of(association: Association, values: Mapping[str, Any]) -> Extras:
    """The extra columns where `values` are given; made once for each set of names."""
    names = frozenset(values)
    known: Extras | None = association.shapes.get(names)
    if known is None:
        known = association.shapes[names] = Extras(association, names)
    return known
