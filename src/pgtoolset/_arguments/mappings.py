"""Mapped classes, their columns, tables, and the plain options of a call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, TypeVar

from sqlalchemy import Column, MetaData, Table
from sqlalchemy import inspect as inspect_mapping
from sqlalchemy.orm import ColumnProperty, Mapper
from sqlalchemy.orm.attributes import QueryableAttribute

from pgtoolset._arguments.shown import shown
from pgtoolset._text import may_hold_password, printable

M = TypeVar("M")
E = TypeVar("E", bound=Enum)


def check_flag(name: str, value: object) -> None:
    """Raise `TypeError` for a value that is not a `bool`."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {shown(value)}")


def check_at_most_one(**flags: object) -> None:
    """Raise `TypeError` for a flag that is not a `bool`, `ValueError` where two are `True`."""
    for name, value in flags.items():
        check_flag(name, value)
    given = [name for name, value in flags.items() if value]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other; pass one of them")


def check_count(name: str, value: object) -> None:
    """Raise `TypeError` for a value that is not an `int`, `ValueError` for one below 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {shown(value)}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {shown(value)}")


def check_provider(name: str, method: str, value: object) -> None:
    """Raise `TypeError` for a value that is neither `None` nor an object with a method."""
    if value is not None and (
        isinstance(value, type) or not callable(getattr(value, method, None))
    ):
        raise TypeError(f"{name} must be an object with {method}(), not {shown(value)}")


def check_text(name: str, value: object) -> None:
    """Raise for a value that is neither `None` nor a text."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {shown(value)}")
    if value == "" or (isinstance(value, str) and may_hold_password(value)):
        raise ValueError(f"{name} must be a name, which is not empty, and not a URL")


def check_iterable(name: str, what: str, values: object) -> list[Any]:
    """Return any iterable as a list. A string or a mapping is one by accident, and a `TypeError`.

    Args:
        name: the argument.
        what: its content, in the plural: `"primary keys"`.
        values: what the caller gave.
    """
    if isinstance(values, list | tuple):  # nearly always, and a mapping takes longer to exclude
        return list(values)
    if isinstance(values, str | bytes | Mapping | type) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be an iterable of {what}, not {shown(values)}")
    return list(values)


def check_mode(modes: type[E], mode: object) -> E:
    """Return the member of an enum of modes that is given as itself, its value or its name."""
    if isinstance(mode, modes):
        return mode
    if isinstance(mode, Enum) or not isinstance(mode, str):
        raise TypeError(f"mode must be a {modes.__name__} or its name, not {shown(mode)}")
    try:
        return modes(mode.upper().replace("_", " "))
    except ValueError:
        known = ", ".join(str(member.value) for member in modes)
        raise ValueError(f"mode must be one of {known}, not {shown(mode)}") from None


def mapper_of(model: type[M], name: str = "model") -> Mapper[M]:
    """Return the mapper of a mapped class, configured or not."""
    mapper: Any = inspect_mapping(model, raiseerr=False)
    if not isinstance(mapper, Mapper) or not isinstance(model, type):
        instance = hasattr(model, "_sa_instance_state")
        advice = "; pass the class, not an instance" if instance else ""
        raise TypeError(f"{name} must be a mapped class, not {shown(model)}{advice}")
    return mapper


def check_columns(mapper: Mapper[Any], columns: Iterable[Any] | None) -> tuple[str, ...]:
    """Return the names of the mapped column attributes that are given, in the mapper's order.

    Args:
        mapper: of the class that must have them.
        columns: attributes or names, mixed; `None` for every mapped column.
    """
    if columns is None:
        chosen = {each.key for each in mapper.column_attrs if isinstance(each.columns[0], Column)}
    else:
        if isinstance(columns, QueryableAttribute):
            given = printable(str(columns))
            raise TypeError(
                f"columns must be an iterable of attributes or names, not {given} alone"
            )
        chosen = {
            _column_name(mapper, each)
            for each in check_iterable("columns", "attributes or names", columns)
        }
        if not chosen:
            raise ValueError("columns must name at least one column, or be None for every column")
    return tuple(each.key for each in mapper.column_attrs if each.key in chosen)


def _column_name(mapper: Mapper[Any], column: object) -> str:
    if isinstance(column, QueryableAttribute):
        owner: Any = column.parent
        if not isinstance(owner, Mapper) or not mapper.isa(owner):
            raise ValueError(
                f"columns: {printable(str(column))} is not an attribute of {shown(mapper.class_)}"
            )
        key = column.key
    elif isinstance(column, str):
        key = column
    else:
        key = printable(mapper.get_property_by_column(mapper.primary_key[0]).key)
        example = f"{shown(mapper.class_)}.{key}"
        raise TypeError(f"columns must hold attributes ({example}) or names, not {shown(column)}")
    if not isinstance(mapper.attrs.get(key), ColumnProperty):
        known = printable(", ".join(sorted(mapper.column_attrs.keys())))
        model = shown(mapper.class_)
        raise ValueError(f"columns: {model} has no mapped column {shown(key)}; it has {known}")
    return key


def tables_of(tables: object) -> list[Table]:
    """Return every table of the mapped classes and `Table` objects, each once."""
    if isinstance(tables, Table):
        raise TypeError(
            "tables must be an iterable of mapped classes and Table objects, not one Table"
        )
    found: dict[Table, None] = {}
    for each in check_iterable("tables", "mapped classes and Table objects", tables):
        found |= dict.fromkeys([each] if isinstance(each, Table) else _mapped_tables(each))
    if not found:
        raise ValueError("tables must name at least one table, and it is empty")
    return list(found)


def _mapped_tables(model: Any) -> list[Table]:
    mapper: Any = inspect_mapping(model, raiseerr=False) if isinstance(model, type) else None
    if not isinstance(mapper, Mapper):
        raise TypeError(f"tables must hold mapped classes and Table objects, not {shown(model)}")
    tables = [table for table in mapper.tables if isinstance(table, Table)]
    if not tables:
        raise TypeError(f"tables: {shown(model)} is not mapped to a table, so it cannot be locked")
    return tables


def metadata_of(base: object) -> MetaData:
    """Return the metadata that is given as itself or by a declarative base."""
    metadata = base if isinstance(base, MetaData) else getattr(base, "metadata", None)
    if not isinstance(metadata, MetaData) or hasattr(base, "_sa_instance_state"):
        raise TypeError(f"base must be a declarative base or a MetaData, not {shown(base)}")
    return metadata
