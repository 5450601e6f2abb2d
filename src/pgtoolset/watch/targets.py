"""What is watched: a mapped class, some of its columns, and a key. All of it is checked here,
before any SQL."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar
from uuid import UUID

from sqlalchemy import BigInteger, Column, Dialect, Enum, Integer, SmallInteger, String, Uuid
from sqlalchemy import inspect as inspect_mapping
from sqlalchemy.exc import NoInspectionAvailable
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import ColumnProperty, Mapper
from sqlalchemy.orm.attributes import QueryableAttribute
from sqlalchemy.types import TypeDecorator, TypeEngine

__all__ = [
    "Target",
    "check_predicate",
    "check_seconds",
    "check_session",
    "mapper_of",
    "parse_key",
    "raw_key",
    "resolve_target",
]

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
        return self.model.__name__


def mapper_of(model: type[M]) -> Mapper[M]:
    """The mapper of a class, configured or not; `TypeError` where it has none."""
    try:
        mapper: Any = inspect_mapping(model)
    except NoInspectionAvailable:
        mapper = None
    if not isinstance(mapper, Mapper) or not isinstance(model, type):
        raise TypeError(f"model must be a mapped class, not {model!r}")
    return mapper


def resolve_target(model: type[M], columns: Iterable[Any] | None) -> Target[M]:
    """The target that `model` and `columns` name; `TypeError` or `ValueError` where they name
    none."""
    mapper = mapper_of(model)
    keys = tuple(mapper.get_property_by_column(column).key for column in mapper.primary_key)
    if columns is None:
        names = [each.key for each in mapper.column_attrs if isinstance(each.columns[0], Column)]
    else:
        if isinstance(columns, (str, QueryableAttribute)) or not isinstance(columns, Iterable):
            raise TypeError(f"columns must be a list of attributes or names, not {columns!r}")
        chosen = {_attribute_name(mapper, each) for each in columns}
        if not chosen:
            raise ValueError(
                "columns is empty: name at least one, or leave it out to watch every column"
            )
        names = [each.key for each in mapper.column_attrs if each.key in chosen]
    return Target(model, mapper, keys, tuple(names))


def _attribute_name(mapper: Mapper[Any], column: Any) -> str:
    name = mapper.class_.__name__
    if isinstance(column, QueryableAttribute):
        owner: Any = column.parent
        if not isinstance(owner, Mapper) or not mapper.isa(owner):
            raise ValueError(f"{column} is no attribute of {name}")
        key = column.key
    elif isinstance(column, str):
        key = column
    else:
        raise TypeError(
            f"columns are attributes such as {name}.{mapper.primary_key[0].key}, or names, not {column!r}"
        )
    if not isinstance(mapper.attrs.get(key), ColumnProperty):
        raise ValueError(
            f"{name} has no mapped column {key!r}; it has {', '.join(sorted(mapper.column_attrs.keys()))}"
        )
    return key


def parse_key(target: Target[Any], pk_value: Any) -> tuple[Any, ...]:
    """The parts of a key in the mapper's order, from a scalar, a tuple or a mapping."""
    if isinstance(pk_value, Mapping):
        if set(pk_value) != set(target.keys):
            raise ValueError(
                f"the primary key of {target} is ({', '.join(target.keys)}); got ({', '.join(map(str, pk_value))})"
            )
        parts = tuple(pk_value[key] for key in target.keys)
    elif isinstance(pk_value, (tuple, list)):
        parts = tuple(pk_value)
    else:
        parts = (pk_value,)
    if len(parts) != len(target.keys):
        raise ValueError(
            f"the primary key of {target} has {len(target.keys)} part(s) ({', '.join(target.keys)}); "
            f"got {len(parts)}: {pk_value!r}"
        )
    for name, part in zip(target.keys, parts, strict=True):
        if part is None:
            raise ValueError(
                f"{target}.{name} is part of the primary key, so no row has None there"
            )
    return parts


def raw_key(target: Target[Any], parts: tuple[Any, ...], dialect: Dialect) -> Any:
    """The key as the driver takes it and gives it back: a scalar, or a tuple for a composite
    one."""
    values = tuple(
        _raw_part(f"{target}.{name}", column.type, part, dialect)
        for name, column, part in zip(target.keys, target.mapper.primary_key, parts, strict=True)
    )
    try:
        hash(values)
    except TypeError:
        raise TypeError(f"a key of {target} must be hashable, not {parts!r}") from None
    return values[0] if len(values) == 1 else values


def _raw_part(what: str, type_: TypeEngine[Any], value: Any, dialect: Dialect) -> Any:
    own = type_.dialect_impl(dialect)
    process = own.bind_processor(dialect)
    bare: Any = own.impl_instance if isinstance(own, TypeDecorator) else own
    if bare is own:
        _check_part(what, bare, value)
    if process is not None:
        try:
            value = process(value)
        except Exception as error:
            raise ValueError(f"{value!r} cannot be {what}: {error}") from error
    if bare is not own:
        _check_part(what, bare, value)
    if isinstance(bare, Uuid) and isinstance(value, str):
        return UUID(value)
    return value


def _check_part(what: str, type_: TypeEngine[Any], value: Any) -> None:
    if isinstance(type_, Integer):
        bits = (
            15 if isinstance(type_, SmallInteger) else 63 if isinstance(type_, BigInteger) else 31
        )
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{what} is an integer, not {value!r}")
        if not -(2**bits) <= value < 2**bits:
            raise ValueError(f"{what} has {bits + 1} bits, and {value} does not fit")
    elif isinstance(type_, String) and not isinstance(type_, Enum):
        if not isinstance(value, str):
            raise TypeError(f"{what} is a string, not {value!r}")
        if "\x00" in value:
            raise ValueError(f"{what} cannot contain a NUL character")
    elif isinstance(type_, Uuid):
        if not isinstance(value, (str, UUID)):
            raise TypeError(f"{what} is a UUID, not {value!r}")
        if isinstance(value, str):
            try:
                UUID(value)
            except ValueError:
                raise ValueError(f"{what} is a UUID, not {value!r}") from None


def check_session(session: object) -> None:
    """Raise `TypeError` for what is no `AsyncSession`."""
    if not isinstance(session, AsyncSession):
        raise TypeError(f"session must be an AsyncSession, not {session!r}")


def check_predicate(until: object) -> None:
    """Raise `TypeError` for what cannot tell whether a wait is over."""
    if until is not None and (not callable(until) or inspect.iscoroutinefunction(until)):
        raise TypeError(f"until must be a plain function of the row, not {until!r}")


def check_seconds(name: str, value: Any, *, zero: bool = False) -> float:
    """A length of time in seconds, from a number or a `timedelta`."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds or a timedelta, not {value!r}")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(
            f"{name} must be {'at least' if zero else 'above'} 0 and finite, not {value!r}"
        )
    return float(value)
