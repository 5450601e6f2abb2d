"""The rows of a call as a statement has them: parameters, and arrays in the form that is stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Column, ColumnElement, FromClause, bindparam, literal_column, select

from pgtoolset._postgres.arrays import element, unnest
from pgtoolset._postgres.catalog import compare, pg
from pgtoolset.m2m._associations import Association

Columns = dict[str, Column[Any]]


def owner_parameters(association: Association) -> Columns:
    """Return the columns of the owner's key by the names of their parameters."""
    prefix = association.prefix
    return {f"{prefix}o{at}": column for at, column in enumerate(association.owner.columns)}


def related_parameters(association: Association) -> Columns:
    """Return the columns of the related key by the names of their parameters."""
    prefix = association.prefix
    return {f"{prefix}r{at}": column for at, column in enumerate(association.related_columns)}


def is_of_selected_owner(association: Association) -> list[ColumnElement[bool]]:
    """Return the conditions of `is_of_owner` for a statement that also selects the owner's key.

    They have parameters of their own: PostgreSQL infers one type for each, TEXT for what is
    selected and perhaps VARCHAR for what is compared.
    """
    return [
        column == bindparam(f"{association.prefix}p{at}", type_=column.type)
        for at, column in enumerate(association.owner.columns)
    ]


def is_of_owner(association: Association) -> list[ColumnElement[bool]]:
    """Return conditions that hold for the rows of the one owner in the parameters."""
    return [
        column == bindparam(name, type_=column.type)
        for name, column in owner_parameters(association).items()
    ]


def stored_rows(
    association: Association, keys: Mapping[str, Column[Any]], extras: Columns, name: str
) -> FromClause:
    """Return a subquery of the arrays' rows, each key once, in an order that both sides share.

    The values have the form in which their columns store them, so whatever is joined with the
    subquery or inserted from it needs no further look at types: where a type stores strings in
    lower case, "A" and "a" are one row here.

    Args:
        association: the relationship.
        keys: columns by the names of the parameters.
        extras: more columns that have a value for each row; they do not tell rows apart.
        name: the alias, without the prefix.
    """
    prefix = association.prefix
    columns = {**keys, **extras}
    order = association.in_table_order(keys)
    rows = unnest(f"{prefix}rows", columns)
    stored = {each: element(rows.c[each], column) for each, column in columns.items()}
    labelled = [value.label(each) for each, value in stored.items()]
    if not extras:
        ordered = select(*labelled).order_by(*(stored[each] for each in order))
        return ordered.distinct().subquery(f"{prefix}{name}")
    # DISTINCT would compare the extra columns too.
    number = pg.row_number().over(partition_by=[stored[each] for each in keys])
    numbered = select(*labelled, number.label(f"{prefix}n")).subquery(f"{prefix}numbered")
    first = compare(numbered.c[f"{prefix}n"], "=", literal_column("1"))
    once = select(*(numbered.c[each] for each in columns)).where(first)
    return once.order_by(*(numbered.c[each] for each in order)).subquery(f"{prefix}{name}")
