"""Primary keys: one parser for every capability, typed by the columns.

A key that `AsyncSession.get` would not find exactly is refused before any SQL: `1.5`, `True` and
`"x"` for an integer, `2**40` for one of 32 bits, a `datetime` for a date. PostgreSQL, the driver or
a cast would each make something else of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from sqlalchemy.orm import Mapper

from pgtoolset._arguments.mappings import check_iterable
from pgtoolset._arguments.parts import Part, part_of
from pgtoolset._arguments.shown import cause_to_show, shown
from pgtoolset._text import printable

#: The values of a primary key in the order of the mapper's columns.
PrimaryKey: TypeAlias = tuple[Any, ...]


class KeyParser:
    """Parses primary keys of one mapper: a scalar, a tuple in the mapper's order, or a mapping.

    Attributes:
        attributes: the names of the attributes of the primary key, in the mapper's order.
    """

    __slots__ = ("_class", "_parts", "attributes")

    def __init__(self, mapper: Mapper[Any]) -> None:
        self._class: type[Any] = mapper.class_
        self._parts: tuple[Part, ...] = tuple(part_of(column.type) for column in mapper.primary_key)
        self.attributes: tuple[str, ...] = tuple(
            mapper.get_property_by_column(column).key for column in mapper.primary_key
        )

    def parse(self, name: str, value: Any) -> PrimaryKey:
        """Return the values of a key, or raise `TypeError` or `ValueError`.

        Args:
            name: the argument, for messages.
            value: what the caller gave.
        """
        return tuple(
            self._parsed(name, attribute, part, each)
            for attribute, part, each in zip(
                self.attributes, self._parts, self._split(name, value), strict=True
            )
        )

    def parse_all(self, name: str, values: Iterable[Any]) -> list[PrimaryKey]:
        """Return the values of each key of an iterable."""
        given = check_iterable(name, f"primary keys of {shown(self._class)}", values)
        columns = self._columns(given)
        if columns is not None and self.are_exact(columns):
            return list(zip(*columns, strict=True))
        return [self.parse(name, value) for value in given]

    def are_exact(self, columns: Sequence[Collection[Any]]) -> bool:
        """Whether every value is certainly one of its column: the fast answer for many keys.

        Args:
            columns: the values of each column of the key, in the mapper's order.
        """
        return all(part.are_exact(each) for part, each in zip(self._parts, columns, strict=True))

    def _columns(self, values: list[Any]) -> list[Collection[Any]] | None:
        if len(self._parts) == 1:
            return [values]
        if set(map(type, values)) != {tuple} or set(map(len, values)) != {len(self._parts)}:
            return None
        return list(zip(*values, strict=True))

    def _split(self, name: str, value: Any) -> Sequence[Any]:
        """Return the values of a key of any form, in the mapper's order."""
        if isinstance(value, Mapping):
            if set(value) != set(self.attributes):
                got = ", ".join(map(shown, value))
                raise ValueError(f"{name}: {self._is_of_columns()}; the mapping has {got}")
            return [value[attribute] for attribute in self.attributes]
        if len(self._parts) == 1 and self._parts[0].is_sequence:
            return self._split_array(value)
        if isinstance(value, tuple | list):
            if len(value) != len(self._parts):
                raise ValueError(f"{name}: {self._is_of_columns()}; got {shown(value)}")
            return value
        if len(self._parts) > 1:
            raise TypeError(f"{name}: {self._is_of_columns()}, as a tuple; got {shown(value)}")
        return [value]

    def _split_array(self, value: Any) -> Sequence[Any]:
        """The one value is a sequence itself: `[1, 2]`, or `([1, 2],)` as a whole key."""
        if isinstance(value, tuple) and len(value) == 1 and isinstance(value[0], list | tuple):
            return value
        return [value]

    def _is_of_columns(self) -> str:
        count = len(self.attributes)
        columns = f"{count} column{'s' * (count > 1)} ({printable(', '.join(self.attributes))})"
        return f"a primary key of {shown(self._class)} has {columns}"

    def _parsed(self, name: str, attribute: str, part: Part, value: Any) -> Any:
        if value is None:
            what = self._part(name, attribute)
            raise ValueError(f"{what} is part of the primary key, so it is never None")
        if hasattr(value, "_sa_instance_state"):
            what = self._part(name, attribute)
            raise TypeError(f"{what}: expected a value of the primary key, not an instance")
        try:
            return part.parse(value)
        except (TypeError, ValueError) as error:
            expected, cause = str(error), cause_to_show(error.__cause__, value)
            refusal = TypeError if isinstance(error, TypeError) else ValueError
        # Raised here, where nothing is chained that shows the value.
        what = self._part(name, attribute)
        raise refusal(f"{what} is {expected}, not {shown(value)}") from cause

    def _part(self, name: str, attribute: str) -> str:
        return f"{name}: {shown(self._class)}.{printable(attribute)}"


def parse_key(name: str, mapper: Mapper[Any], value: Any) -> PrimaryKey:
    """Return the values of a primary key of `mapper`; see `KeyParser.parse`."""
    return KeyParser(mapper).parse(name, value)


def parse_keys(name: str, mapper: Mapper[Any], values: Iterable[Any]) -> list[PrimaryKey]:
    """Return the values of each primary key of an iterable; see `KeyParser.parse_all`."""
    return KeyParser(mapper).parse_all(name, values)
