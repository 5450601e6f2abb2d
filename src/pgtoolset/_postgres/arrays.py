"""Any number of values as one parameter: arrays, for each type that a key or a default can have.

A value travels in an array of a type that neither cuts nor rounds it, and is compared with a column
as the ORM compares a single value: with the type's `bind_expression`, if it has one.

See https://www.postgresql.org/docs/current/functions-array.html (unnest) and
https://docs.sqlalchemy.org/en/20/core/custom_types.html
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any
from typing import cast as cast_to

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
    select,
    tuple_,
)
from sqlalchemy import types as sqltypes
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.dialects.postgresql.ranges import AbstractMultiRange
from sqlalchemy.sql.selectable import TableValuedAlias
from sqlalchemy.types import TypeDecorator, TypeEngine

from pgtoolset._postgres.catalog import named, unnested

__all__ = [
    "DIALECT",
    "Elements",
    "among",
    "array_text",
    "element",
    "equals",
    "is_bound_as_it_is",
    "stored_type",
    "unnest",
]

#: For what a type is on PostgreSQL while a statement is made. It never connects.
DIALECT: Dialect = cast_to("Any", PGDialect)(paramstyle="named")


class Elements(TypeDecorator[list[Any]]):
    """An array whose elements are bound as `item` binds a single value, a `TypeDecorator` included.

    The type of the array has no length or precision: a cast to VARCHAR(3)[] would cut a longer key,
    and then find the row of another key.
    """

    impl = ARRAY
    cache_ok = True

    def __init__(self, item: TypeEngine[Any]) -> None:
        super().__init__(Text)
        self.item = item

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        # The dialect of psycopg has one type for all strings, and CHAR is no longer told from TEXT.
        plain = stored_type(self.item, DIALECT)
        item = Text() if _travels_as_text(plain) else _without_limits(plain)
        return postgresql.ARRAY(_in_catalog(item), dimensions=1).dialect_impl(dialect)

    def bind_processor(self, dialect: Dialect) -> Any:
        item = self.item.dialect_impl(dialect).bind_processor(dialect)
        plain = stored_type(self.item, DIALECT)
        convert = _conversion(plain)
        number = _number(plain) if dialect.driver == "psycopg" else None

        def process(values: list[Any] | None) -> Any:
            if values is None:
                return values
            processed = values if item is None else [item(value) for value in values]
            if convert is not None:
                processed = [convert(value) for value in processed]
            return processed if number is None else _of_one_type(processed, number)

        return process


def unnest(
    name: str, columns: Mapping[str, Column[Any]], *, ordinality: str | None = None
) -> TableValuedAlias:
    """Return `unnest($1::int[], $2::text[]) AS name(a, b)`, whose parameters are `a` and `b`.

    Args:
        name: the alias.
        columns: the columns that the elements are meant for, by the names of the parameters.
        ordinality: the name of a further column that counts the rows from 1.
    """
    arrays = [
        bindparam(parameter, type_=Elements(each.type)) for parameter, each in columns.items()
    ]
    outputs = [column(parameter, each.type) for parameter, each in columns.items()]
    numbered: dict[str, Any] = {} if ordinality is None else {"with_ordinality": ordinality}
    rows: TableValuedAlias = unnested(arrays).table_valued(*outputs, **numbered)
    return rows.render_derived(name=name)


def among(columns: Mapping[str, Column[Any]]) -> ColumnElement[bool]:
    """Return a condition that holds for the rows whose key is in the parameters.

    Args:
        columns: the columns of the key, by the names of the parameters: arrays of one length.
    """
    name, first = next(iter(columns.items()))
    if len(columns) == 1 and is_bound_as_it_is(first):
        return first == any_(bindparam(name, type_=Elements(first.type)))
    rows = unnest("wanted", columns)
    wanted = select(*(element(rows.c[name], each) for name, each in columns.items()))
    return (first if len(columns) == 1 else tuple_(*columns.values())).in_(wanted)


def equals(target: Column[Any], value: ColumnElement[Any]) -> ColumnElement[bool]:
    """Compare a column with an element of `unnest` as the ORM compares it with a single value."""
    return target == element(value, target)


def element(value: ColumnElement[Any], target: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return an element of `unnest` in the form in which its column stores it.

    Apply it once: a `bind_expression` that encodes would encode the value twice.
    """
    plain = stored_type(target.type, DIALECT)
    if _travels_as_text(plain):
        whole = _array_without_limits(plain) if isinstance(plain, ARRAY) else _in_catalog(plain)
        value = cast(value, whole)
    # `dialect_impl` chooses among the variants of a type, as SQLAlchemy's compiler does.
    bound = target.type.dialect_impl(DIALECT).bind_expression(value)  # type: ignore[arg-type]
    return value if bound is None else bound


def is_bound_as_it_is(target: ColumnElement[Any]) -> bool:
    """Whether `element` leaves the elements for a column as they are."""
    probe: ColumnElement[Any] = column("probe", target.type)
    return element(probe, target) is probe


def array_text(values: Sequence[Any]) -> str:
    """Return the text of an array of strings, integers and UUIDs."""
    quoted = [_quoted(each) if isinstance(each, str) else str(each) for each in values]
    return f"{{{','.join(quoted)}}}"


def _travels_as_text(plain: TypeEngine[Any]) -> bool:
    """Whether the values are lists.

    unnest would take an array of arrays apart to the last element, and the driver a list of
    multiranges.
    """
    return isinstance(plain, ARRAY | AbstractMultiRange)


def _conversion(plain: TypeEngine[Any]) -> Callable[[Any], Any] | None:
    """What makes of a bound value an element of the array; `None` where it is one already."""
    if isinstance(plain, ARRAY):
        return _literal
    if isinstance(plain, AbstractMultiRange):
        return _multirange
    if not isinstance(plain, Numeric) or isinstance(plain, sqltypes.Float):
        return None
    return None if plain.scale is None else _rounded


def _number(plain: TypeEngine[Any]) -> Callable[[Any], Any] | None:
    """The Python type of a number; `None` for other types."""
    if isinstance(plain, sqltypes.Integer):
        return int
    if isinstance(plain, sqltypes.Float):
        return float
    return Decimal if isinstance(plain, Numeric) else None


def _of_one_type(values: list[Any], number: Callable[[Any], Any]) -> list[Any]:
    """Numbers that are equal in Python are one key, and psycopg refuses a list of several types."""
    kinds = set(map(type, values))
    kinds.discard(type(None))
    if len(kinds) < 2:
        return values
    return [None if value is None else number(value) for value in values]


def _rounded(value: Any) -> Any:
    """A float without the digits that a scale cuts: asyncpg sends 1.4899999... for 1.49."""
    return Decimal(str(value)) if isinstance(value, float) else value


def stored_type(type_: TypeEngine[Any], dialect: Dialect) -> TypeEngine[Any]:
    """Return the type that the dialect stores `type_` as, without the decorators around it."""
    plain = type_.dialect_impl(dialect)
    while isinstance(plain, TypeDecorator):
        plain = plain.type_engine(dialect).dialect_impl(dialect)
    return plain


class _BlankPadded(sqltypes.UserDefinedType[str]):
    """CHAR of any length: CHAR alone is CHAR(1)."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "pg_catalog.bpchar"


#: The same type without its length or precision, by the first kind that fits.
_WITHOUT_LIMITS: tuple[tuple[type[Any], Callable[[Any], TypeEngine[Any]]], ...] = (
    (postgresql.DOMAIN, lambda type_: _without_limits(stored_type(type_.data_type, DIALECT))),
    (sqltypes.Enum, lambda type_: type_ if type_.native_enum else Text()),
    (sqltypes.CHAR, lambda type_: _BlankPadded()),
    (postgresql.CITEXT, lambda type_: type_),
    (sqltypes.String, lambda type_: Text()),
    (sqltypes.Float, lambda type_: type_),
    (Numeric, lambda type_: Numeric()),
    (sqltypes.DateTime, lambda type_: sqltypes.DateTime(timezone=type_.timezone)),
    (sqltypes.Time, lambda type_: sqltypes.Time(timezone=type_.timezone)),
    (postgresql.INTERVAL, lambda type_: postgresql.INTERVAL()),
    (sqltypes.Interval, lambda type_: postgresql.INTERVAL()),
    (postgresql.BIT, lambda type_: postgresql.BIT(varying=True)),
)


def _without_limits(type_: TypeEngine[Any]) -> TypeEngine[Any]:
    for kind, unlimited in _WITHOUT_LIMITS:
        if isinstance(type_, kind):
            return unlimited(type_)
    return type_


def _array_without_limits(type_: ARRAY[Any]) -> TypeEngine[Any]:
    """The same array without lengths: PostgreSQL does not compare VARCHAR[] with TEXT[]."""
    item = stored_type(type_.item_type, DIALECT)
    unlimited = _without_limits(item)
    if isinstance(unlimited, Text) and not isinstance(item, Text):
        unlimited = sqltypes.VARCHAR()
    return postgresql.ARRAY(_in_catalog(unlimited))


def _in_catalog(type_: TypeEngine[Any]) -> TypeEngine[Any]:
    """The same type in the name of a cast, with its schema where PostgreSQL has made it."""
    return named(type_, DIALECT.type_compiler_instance.process(type_))


def _literal(value: Any) -> str | None:
    """An array in PostgreSQL's text form.

    See https://www.postgresql.org/docs/current/arrays.html#ARRAYS-IO
    """
    return None if value is None else f"{{{','.join(_literal_element(each) for each in value)}}}"


def _multirange(value: Any) -> str | None:
    """A multirange in PostgreSQL's text form."""
    if value is None or isinstance(value, str):
        return value
    return f"{{{','.join(map(_range, value))}}}"


def _range(value: Any) -> str:
    """A range in PostgreSQL's text form, whether it is SQLAlchemy's or the driver's.

    See https://www.postgresql.org/docs/current/rangetypes.html#RANGETYPES-IO
    """
    if value.isempty:
        return "empty"
    lower, upper = ("" if each is None else f'"{each}"' for each in (value.lower, value.upper))
    return f"{'[' if value.lower_inc else '('}{lower},{upper}{']' if value.upper_inc else ')'}"


def _literal_element(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, list | tuple):
        return str(_literal(value))
    if hasattr(value, "isempty"):
        return _quoted(_range(value))
    text = "\\x" + value.hex() if isinstance(value, bytes) else str(value)
    return _quoted(text)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
