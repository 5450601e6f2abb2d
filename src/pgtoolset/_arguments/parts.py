"""One column of a primary key: which Python values are exactly values of its type.

The errors of `Part.parse` say what is expected, as in "an integer of 32 bits"; the caller knows of
which attribute. See https://docs.sqlalchemy.org/en/20/core/type_basics.html
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import ClauseElement
from sqlalchemy import types as sqltypes
from sqlalchemy.dialects import postgresql
from sqlalchemy.types import TypeDecorator, TypeEngine

from pgtoolset._arguments.shown import shown
from pgtoolset._native import association_rows
from pgtoolset._postgres.arrays import DIALECT
from pgtoolset._text import printable


class Part:
    """A column of any type: every value is taken that can be the value of a key."""

    @property
    def is_sequence(self) -> bool:
        """Whether one value is a list or a tuple."""
        return False

    def parse(self, value: Any) -> Any:
        """Return the value as the identity of a row has it, or raise `TypeError`, `ValueError`."""
        if isinstance(value, Mapping | set | list | ClauseElement):
            raise TypeError("a plain value")
        try:
            hash(value)
        except TypeError:
            raise TypeError("a hashable value") from None
        return value

    def are_exact(self, values: Collection[Any]) -> bool:
        """Whether all values are certainly as `parse` would return them."""
        return False


class _Typed(Part):
    """A column whose values are of one Python type and need no further look."""

    def __init__(self, expected: str, *types: type[Any], but: tuple[type[Any], ...] = ()) -> None:
        self._expected = expected
        self._types = types
        self._but = but

    def parse(self, value: Any) -> Any:
        if not isinstance(value, self._types) or isinstance(value, self._but):
            raise TypeError(self._expected)
        return value

    def are_exact(self, values: Collection[Any]) -> bool:
        return set(map(type, values)) <= {self._types[0]}


class _Integer(Part):
    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._lowest, self._highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def parse(self, value: Any) -> int:
        if isinstance(value, bool):
            raise TypeError("an integer")
        try:
            number = operator.index(value)
        except TypeError:
            raise TypeError("an integer") from None
        if not self._lowest <= number <= self._highest:
            raise ValueError(f"an integer of {self._bits} bits")
        return number

    def are_exact(self, values: Collection[Any]) -> bool:
        return association_rows.are_integers(values, self._lowest, self._highest)


class _String(Part):
    def parse(self, value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError("a string")
        if not _is_text(value):
            raise ValueError("a string of Unicode characters other than NUL")
        return value

    def are_exact(self, values: Collection[Any]) -> bool:
        return set(map(type, values)) <= {str} and _is_text("".join(values))


class _Enum(Part):
    def __init__(self, type_: sqltypes.Enum) -> None:
        self._class = type_.enum_class
        self._labels = frozenset(type_.enums)

    def parse(self, value: Any) -> Any:
        if self._class is not None and isinstance(value, self._class):
            return value
        name = "a label of an enum" if self._class is None else f"a {shown(self._class)}"
        if not isinstance(value, str):
            raise TypeError(name)
        if value not in self._labels:
            raise ValueError(f"{name}: one of {printable(', '.join(sorted(self._labels)))}")
        return value


class _Uuid(Part):
    def __init__(self, type_: sqltypes.Uuid[Any]) -> None:
        self._as_uuid = type_.as_uuid

    def parse(self, value: Any) -> UUID | str:
        if isinstance(value, str):
            try:
                value = UUID(value)
            except ValueError:
                raise ValueError("a UUID") from None
        if not isinstance(value, UUID):
            raise TypeError("a UUID")
        # As PostgreSQL spells it, so that two spellings are one key.
        return value if self._as_uuid else str(value)

    def are_exact(self, values: Collection[Any]) -> bool:
        # asyncpg has a subclass of its own.
        return self._as_uuid and all(issubclass(kind, UUID) for kind in set(map(type, values)))


class _Number(Part):
    """NUMERIC: PostgreSQL rounds a parameter to the scale, and would find another key's row."""

    def __init__(self, type_: sqltypes.Numeric[Any]) -> None:
        self._as_decimal = type_.asdecimal
        self._whole: int | None = None
        self._scale: int | None = type_.scale
        if type_.precision is not None:
            self._scale = type_.scale or 0
            self._whole = type_.precision - self._scale

    def parse(self, value: Any) -> Any:
        if not isinstance(value, Decimal | int | float) or isinstance(value, bool):
            raise TypeError("a number")
        number = Decimal(str(value))
        if number.is_finite():
            self._check_digits(number.normalize())
        # The driver would send all binary digits of a float: 1.4899999... for 1.49.
        return number if isinstance(value, float) and self._as_decimal else value

    def _check_digits(self, number: Decimal) -> None:
        if self._scale is not None and -int(number.as_tuple().exponent) > self._scale:
            raise ValueError(f"a number with at most {self._scale} decimal places")
        if self._whole is not None and number and number.adjusted() >= self._whole:
            raise ValueError(f"a number with at most {self._whole} digits before the point")


class _Moment(Part):
    """A date, time or interval: PostgreSQL rounds a parameter to the precision of the type."""

    def __init__(self, expected: str, type_: type[Any], precision: int | None, zone: bool) -> None:
        self._expected = expected
        self._type = type_
        self._microseconds = 1 if precision is None else 10 ** max(0, 6 - precision)
        self._zone = zone

    def parse(self, value: Any) -> Any:
        if not isinstance(value, self._type):
            raise TypeError(self._expected)
        if getattr(value, "tzinfo", None) is not None and not self._zone:
            raise ValueError(f"{self._expected} without a time zone")
        microsecond = value.microseconds if isinstance(value, timedelta) else value.microsecond
        if microsecond % self._microseconds:
            raise ValueError(f"{self._expected} in steps of {self._microseconds} us")
        return value


class _Bytes(Part):
    def parse(self, value: Any) -> bytes:
        if not isinstance(value, bytes | bytearray | memoryview):
            raise TypeError("bytes")
        return bytes(value)

    def are_exact(self, values: Collection[Any]) -> bool:
        return set(map(type, values)) <= {bytes}


class _Array(Part):
    @property
    def is_sequence(self) -> bool:
        return True

    def parse(self, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise TypeError("a list or tuple")
        return value


class _Decorated(Part):
    """A `TypeDecorator`: what it makes of the value is judged by the type behind it."""

    def __init__(self, type_: TypeDecorator[Any]) -> None:
        self._process: Callable[[Any, Any], Any] = type_.process_bind_param
        self._behind = part_of(type_.load_dialect_impl(DIALECT))

    @property
    def is_sequence(self) -> bool:
        return self._behind.is_sequence

    def parse(self, value: Any) -> Any:
        if isinstance(value, ClauseElement):
            raise TypeError("a plain value")
        try:
            processed = self._process(value, DIALECT)
        except Exception as error:
            raise ValueError(f"a value that its type can bind ({type(error).__name__})") from error
        if processed is None:
            raise ValueError("a value that its type does not bind as NULL")
        self._behind.parse(processed)
        return value


def part_of(type_: TypeEngine[Any]) -> Part:
    """Return the `Part` for a column of a type."""
    # `dialect_impl` chooses among the variants of a type.
    type_ = type_.dialect_impl(DIALECT)
    for kind, make in _MAKERS:
        if isinstance(type_, kind):
            return make(type_)
    return Part()


def _part_of_decorator(type_: TypeDecorator[Any]) -> Part:
    if type(type_).bind_processor is not TypeDecorator.bind_processor:
        return Part()
    if type(type_).process_bind_param is not TypeDecorator.process_bind_param:
        return _Decorated(type_)
    return part_of(type_.load_dialect_impl(DIALECT))


def _bits(type_: sqltypes.Integer) -> int:
    if isinstance(type_, sqltypes.SmallInteger):
        return 16
    return 64 if isinstance(type_, sqltypes.BigInteger) else 32


def _moment(expected: str, class_: type[Any], type_: Any) -> Part:
    # Only PostgreSQL's own types have a precision.
    return _Moment(expected, class_, getattr(type_, "precision", None), type_.timezone)


def _is_text(value: str) -> bool:
    if "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


#: The first that fits decides: some of these types derive from others that are further down.
_MAKERS: tuple[tuple[type[Any], Callable[[Any], Part]], ...] = (
    # A TypeDecorator for the sake of other databases.
    (sqltypes.Interval, lambda type_: _Moment("a timedelta", timedelta, None, zone=True)),
    (TypeDecorator, _part_of_decorator),
    (postgresql.DOMAIN, lambda type_: part_of(type_.data_type)),
    (sqltypes.Enum, _Enum),
    (sqltypes.ARRAY, lambda type_: _Array()),
    (sqltypes.Uuid, _Uuid),
    (sqltypes.Integer, lambda type_: _Integer(_bits(type_))),
    (sqltypes.String, lambda type_: _String()),
    (sqltypes.Float, lambda type_: _Typed("a number", float, int, Decimal, but=(bool,))),
    (sqltypes.Numeric, _Number),
    (sqltypes.Boolean, lambda type_: _Typed("True or False", bool)),
    (sqltypes.DateTime, lambda type_: _moment("a datetime", datetime, type_)),
    (sqltypes.Date, lambda type_: _Typed("a date without a time", date, but=(datetime,))),
    (sqltypes.Time, lambda type_: _moment("a time", time, type_)),
    (
        postgresql.INTERVAL,
        lambda type_: _Moment("a timedelta", timedelta, type_.precision, zone=True),
    ),
    (sqltypes.LargeBinary, lambda type_: _Bytes()),
)
