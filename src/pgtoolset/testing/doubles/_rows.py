"""Rows that a test puts in place of a table: a mapped class, a key, and plain values."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NoReturn

from sqlalchemy import Table
from sqlalchemy.orm import Mapper

from pgtoolset._arguments import PrimaryKey, mapper_of, parse_key, shown
from pgtoolset._text import printable
from pgtoolset.testing.doubles._refusals import Refusing, no_database
from pgtoolset.testing.doubles._work import Place, Work


class MemoryRow(Refusing):
    """A row as it was put: it has the key and the values that were given, and can only be read.

    It stands where PostgreSQL's functions return an instance. It is not an instance of the mapped
    class: a value that was not put, a method, a relationship and every assignment is a
    `NoDatabaseError`.
    """

    refusal = "a row of a double has only its key and the values that were put"

    def __init__(self, model: type[Any], values: Mapping[str, Any]) -> None:
        # A copy: a list or a dict inside belongs to the reader.
        vars(self).update(copy.deepcopy(dict(values)), _model=model)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise no_database(f"MemoryRow.{name} cannot be set: a double flushes nothing")

    def __delattr__(self, name: str) -> NoReturn:
        raise no_database(f"MemoryRow.{name} cannot be deleted: a double flushes nothing")

    def __repr__(self) -> str:
        return f"<MemoryRow of {model_of(self).__name__}>"


def model_of(row: MemoryRow) -> type[Any]:
    """The class that a row was put for."""
    model: type[Any] = vars(row)["_model"]
    return model


def values_of(row: MemoryRow) -> dict[str, Any]:
    """The values of a row, those of its key included."""
    return {name: value for name, value in vars(row).items() if name != "_model"}


def place_of(model: type[Any], name: str, key: object) -> Place:
    """Where the row of a key is: classes that share a table by inheritance share its rows."""
    mapper = mapper_of(model)
    return table_of(mapper), parse_key(name, mapper, key)


def new_row(model: type[Any], key: PrimaryKey, values: object) -> MemoryRow:
    """Return a row of checked values, by attribute name."""
    mapper = mapper_of(model)
    if not isinstance(values, Mapping):
        raise TypeError(
            f"values must be a mapping of attribute names to values, not {shown(values)}"
        )
    names = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
    for each in values:
        if each in names:
            raise ValueError(f"values: {shown(model)}.{printable(each)} is part of the key")
        if each not in mapper.column_attrs:
            known = ", ".join(sorted(mapper.column_attrs.keys()))
            raise ValueError(
                f"values: {shown(model)} has no mapped column {shown(each)}; it has {known}"
            )
    return MemoryRow(model, {**dict(zip(names, key, strict=True)), **values})


def find(work: Work, model: type[Any], place: Place) -> MemoryRow | None:
    """Return a copy of the row that the session sees, where it is one of `model`."""
    row = work.value(place)
    if row is None or not issubclass(model_of(row), model):
        return None
    return MemoryRow(model_of(row), values_of(row))


def rows_of(work: Work, model: type[Any]) -> list[Mapping[str, Any]]:
    """The values of all rows of a class that the session sees, in the order of their keys."""
    places = in_order(work.places(table_of(mapper_of(model))))
    rows = [find(work, model, place) for place in places]
    return [values_of(row) for row in rows if row is not None]


def in_order(places: list[Place]) -> list[Place]:
    """Sort places by their keys as Python orders them, or by `repr` where it does not."""
    try:
        return sorted(places, key=lambda place: place[1])
    except TypeError:  # such as enums
        return sorted(places, key=lambda place: repr(place[1]))


def table_of(mapper: Mapper[Any]) -> Table:
    """The table of a class's primary key, which classes share by inheritance."""
    table = mapper.primary_key[0].table
    if not isinstance(table, Table):
        raise no_database(f"{mapper.class_.__name__} is not mapped to a table")
    return table
