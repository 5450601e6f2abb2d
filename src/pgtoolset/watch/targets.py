"""A mapped class and its watched columns, and the key of a row for the driver."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Generic, TypeVar
from uuid import UUID

from sqlalchemy import Dialect, Float, Numeric, Uuid
from sqlalchemy.orm import Mapper
from sqlalchemy.types import TypeDecorator, TypeEngine

from pgtoolset._arguments import PrimaryKey, cause_to_show, check_columns, mapper_of, shown
from pgtoolset._postgres.arrays import Elements
from pgtoolset._text import printable

__all__ = ["Target", "exact_part", "raw_key", "resolve_target"]

M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class Target(Generic[M]):
    """A mapped class and those of its columns that are watched.

    Attributes:
        model: the class.
        mapper: its mapper.
        keys: the attributes of its primary key, in the mapper's order.
        columns: the watched attributes, in the mapper's order.
    """

    model: type[M]
    mapper: Mapper[M]
    keys: tuple[str, ...]
    columns: tuple[str, ...]

    def __str__(self) -> str:
        return shown(self.model)

    def with_every_column(self) -> Target[M]:
        """Return the target that also watches every other mapped column."""
        chosen = {*self.columns, *check_columns(self.mapper, None)}
        columns = tuple(each.key for each in self.mapper.column_attrs if each.key in chosen)
        return Target(self.model, self.mapper, self.keys, columns)


def resolve_target(model: type[M], columns: Iterable[Any] | None) -> Target[M]:
    """Return the target of the arguments `model` and `columns`, or raise before any SQL."""
    mapper = mapper_of(model)
    keys = tuple(mapper.get_property_by_column(column).key for column in mapper.primary_key)
    return Target(model, mapper, keys, check_columns(mapper, columns))


def raw_key(target: Target[Any], key: PrimaryKey, dialect: Dialect) -> Any:
    """Return a parsed key as asyncpg takes it in arrays and gives it back, hashable.

    Returns:
        A scalar, or a tuple for a composite key.
    """
    values: list[Any] = []
    for name, column, part in zip(target.keys, target.mapper.primary_key, key, strict=True):
        try:
            value = _raw_part(column.type, part, dialect)
            hash(value)
        except Exception as error:
            refusal = error
        else:
            values.append(value)
            continue
        what = f"pk_value: the type of {target}.{printable(name)} cannot bind it"
        # Raised here, where nothing is chained that shows the value.
        raise ValueError(f"{what} ({type(refusal).__name__})") from cause_to_show(refusal, part)
    return values[0] if len(values) == 1 else tuple(values)


def _raw_part(type_: TypeEngine[Any], part: Any, dialect: Dialect) -> Any:
    (value,) = Elements(type_).bind_processor(dialect)([exact_part(type_, part)])
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str) and isinstance(_plain(type_, dialect), Uuid):
        return UUID(value)  # asyncpg takes a string and gives a UUID back
    return value


def exact_part(type_: TypeEngine[Any], part: Any) -> Any:
    """Return a value of a key as the driver sends it without a difference.

    asyncpg sends all binary digits of a float as NUMERIC: 1.2 would not be 1.20.
    """
    is_exact = isinstance(type_, Numeric) and not isinstance(type_, Float)
    return Decimal(str(part)) if is_exact and isinstance(part, float) else part


def _plain(type_: TypeEngine[Any], dialect: Dialect) -> TypeEngine[Any]:
    """Return the type that the dialect sends, without the decorators around it."""
    while isinstance(type_, TypeDecorator):
        type_ = type_.load_dialect_impl(dialect)
    return type_
