"""Any number of values as one parameter: typed arrays, for every type that a key or a default can
have.

See https://www.postgresql.org/docs/current/functions-array.html (unnest) and
https://docs.sqlalchemy.org/en/20/core/custom_types.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import (
    ARRAY,
    Column,
    ColumnElement,
    Dialect,
    Numeric,
    Text,
    any_,
    bindparam,
    cast,
    column,
    func,
    select,
    tuple_,
)
from sqlalchemy import types as sqltypes
from sqlalchemy.dialects import postgresql
from sqlalchemy.sql.selectable import TableValuedAlias
from sqlalchemy.types import TypeDecorator, TypeEngine


class Elements(TypeDecorator[list[Any]]):
    """An array whose elements are bound as `item` binds a single value, a `TypeDecorator` included.

    It is cast to the type without its length or precision: a cast to VARCHAR(3)[] would cut a
    longer key off silently, and then find the row of another.
    """

    impl = ARRAY
    cache_ok = True

    def __init__(self, item: TypeEngine[Any]) -> None:
        super().__init__(Text)
        self.item = item

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return postgresql.ARRAY(_unlimited(_plain(self.item, dialect)), dimensions=1).dialect_impl(
            dialect
        )

    def bind_processor(self, dialect: Dialect) -> Any:
        item = self.item.dialect_impl(dialect).bind_processor(dialect)
        literal = isinstance(_plain(self.item, dialect), ARRAY)

        def process(values: list[Any] | None) -> Any:
            if values is None or (item is None and not literal):
                return values
            processed = values if item is None else [item(value) for value in values]
            return [_literal(value) for value in processed] if literal else processed

        return process


def unnest(name: str, columns: dict[str, Column[Any]]) -> TableValuedAlias:
    """`unnest($1::int[], $2::text[]) AS name(a, b)`: a row for each element of the parameters `a`
    and `b`."""
    arrays = [
        bindparam(parameter, type_=Elements(each.type)) for parameter, each in columns.items()
    ]
    outputs = [column(parameter, each.type) for parameter, each in columns.items()]
    return func.unnest(*arrays).table_valued(*outputs).render_derived(name=name)


def among(columns: Mapping[str, Column[Any]]) -> ColumnElement[bool]:
    """True of the rows whose key is one of those in the parameters, arrays of one length.

    Args:
        columns: the columns of the key, by the names of the parameters.
    """
    if len(columns) == 1:
        ((name, only),) = columns.items()
        if not _is_bound_by_an_expression(only):
            return only == any_(bindparam(name, type_=Elements(only.type)))
    rows = unnest("wanted", dict(columns))
    wanted = select(*(element(rows.c[name], each) for name, each in columns.items()))
    if len(columns) == 1:
        return only.in_(wanted)
    return tuple_(*columns.values()).in_(wanted)


def equals(target: Column[Any], value: ColumnElement[Any]) -> ColumnElement[bool]:
    """Compare a column with an element of `unnest` as the ORM compares it with a single value."""
    return target == element(value, target)


def _is_bound_by_an_expression(target: Column[Any]) -> bool:
    probe: Any = column("probe", target.type)
    return isinstance(target.type, ARRAY) or target.type.bind_expression(probe) is not None


def element(value: ColumnElement[Any], target: Column[Any]) -> ColumnElement[Any]:
    """An element of `unnest` as a value of the column that it is meant for."""
    bound = target.type.bind_expression(value)  # type: ignore[arg-type]
    if bound is not None:
        return bound
    return cast(value, target.type) if isinstance(target.type, ARRAY) else value


def _plain(type_: TypeEngine[Any], dialect: Dialect) -> TypeEngine[Any]:
    """The type that the dialect stores `type_` as, without the decorators around it."""
    while isinstance(type_, TypeDecorator):
        type_ = type_.type_engine(dialect)
    return type_.dialect_impl(dialect)


def _unlimited(type_: TypeEngine[Any]) -> TypeEngine[Any]:
    if isinstance(type_, ARRAY):
        return Text()  # unnest would take an array of arrays apart to the last element
    if isinstance(type_, sqltypes.Enum) and type_.native_enum:
        return type_
    if isinstance(type_, sqltypes.CHAR):
        return _BlankPadded()
    if isinstance(type_, postgresql.CITEXT):
        return type_
    if isinstance(type_, sqltypes.String):
        return Text()
    if isinstance(type_, Numeric) and not isinstance(type_, sqltypes.Float):
        return Numeric()
    if isinstance(type_, sqltypes.DateTime):
        return sqltypes.DateTime(timezone=type_.timezone)
    if isinstance(type_, sqltypes.Time):
        return sqltypes.Time(timezone=type_.timezone)
    if isinstance(type_, postgresql.INTERVAL | sqltypes.Interval):
        return postgresql.INTERVAL()
    return type_


def array_text(values: Sequence[Any]) -> str:
    """An array of strings, integers and UUIDs as its text."""
    quoted = [_quoted(each) if isinstance(each, str) else str(each) for each in values]
    return f"{{{','.join(quoted)}}}"


class _BlankPadded(sqltypes.UserDefinedType[str]):
    """CHAR of any length: CHAR alone is CHAR(1)."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "BPCHAR"


def _literal(value: Any) -> str | None:
    """An array in PostgreSQL's text form. https://www.postgresql.org/docs/current/arrays.html#ARRAYS-IO"""
    return None if value is None else f"{{{','.join(_literal_element(each) for each in value)}}}"


def _literal_element(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, list | tuple):
        return str(_literal(value))
    text = "\\x" + value.hex() if isinstance(value, bytes) else str(value)
    return _quoted(text)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
