"""The attribute that the tests of a contract change, and three values for it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, TypeAlias
from uuid import UUID

from sqlalchemy import Enum as SqlEnum
from sqlalchemy.orm import Mapper, QueryableAttribute
from sqlalchemy.types import TypeEngine

from pgtoolset._arguments import check_columns, mapper_of

#: An attribute of a mapped class, `Order.status`, or its name.
Attribute: TypeAlias = str | QueryableAttribute[Any]

Values: TypeAlias = tuple[Any, Any, Any]

_DAY = datetime(2001, 2, 3, 4, 5, 6)

#: Each type stands before the ones that it derives from.
_BY_TYPE: tuple[tuple[type[Any], Values], ...] = (
    (int, (1, 2, 3)),
    (float, (1.5, 2.5, 3.5)),
    (Decimal, (Decimal(1), Decimal(2), Decimal(3))),
    (bytes, (b"one", b"two", b"three")),
    (date, (_DAY.date(), _DAY.date() + timedelta(1), _DAY.date() + timedelta(2))),
    (time, (time(1), time(2), time(3))),
    (timedelta, (timedelta(1), timedelta(2), timedelta(3))),
    (UUID, (UUID(int=1), UUID(int=2), UUID(int=3))),
)


def column_and_values(
    model: type[Any], key: Attribute, value: Attribute | None, values: Sequence[Any] | None
) -> tuple[str, str | None, Values]:
    """Return the names of the two attributes, and three values for the second.

    Raises:
        ValueError, TypeError: an attribute is not one of the class, or there are no such values.
    """
    mapper = mapper_of(model)
    key_name = _name_in(mapper, "key", key)
    if value is None:
        return key_name, None, _three(values or ("one", "two", "three"))
    value_name = _name_in(mapper, "value", value)
    if values is None:
        values = _values_of(mapper.columns[value_name].type)
    if values is None:
        raise ValueError(
            f"values: give three values for {model.__name__}.{value_name}, because none can be "
            "chosen for its type"
        )
    return key_name, value_name, _three(values)


def _name_in(mapper: Mapper[Any], argument: str, attribute: Attribute) -> str:
    try:
        (name,) = check_columns(mapper, [attribute])
    except (TypeError, ValueError) as error:
        message = str(error).removeprefix("columns: ")
        raise type(error)(f"{argument}: {message}") from None
    return name


def _three(values: Sequence[Any]) -> Values:
    if len(values) != 3:
        raise ValueError(f"values must be three, not {len(values)}")
    return values[0], values[1], values[2]


def _values_of(type_: TypeEngine[Any]) -> Values | None:
    try:
        python = type_.python_type
    except NotImplementedError:
        return None
    if isinstance(type_, SqlEnum):
        members: list[Any] = list(type_.enum_class or type_.enums)
        return _three(members[:3]) if len(members) >= 3 else None
    if issubclass(python, str):
        length = getattr(type_, "length", None)
        return ("one", "two", "three") if length is None or length >= 5 else ("1", "2", "3")
    if issubclass(python, datetime):
        zone = UTC if getattr(type_, "timezone", False) else None
        start = _DAY.replace(tzinfo=zone)
        return start, start + timedelta(1), start + timedelta(2)
    if issubclass(python, bool):
        return None  # it has two
    return next((found for each, found in _BY_TYPE if issubclass(python, each)), None)
