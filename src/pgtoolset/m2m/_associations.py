"""What is to be known of a Many-to-Many relationship before a row of its association table can be
written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import (
    BinaryExpression,
    BooleanClauseList,
    Column,
    ColumnElement,
    Executable,
    Index,
    Table,
)
from sqlalchemy.orm import Mapper, QueryableAttribute, RelationshipProperty
from sqlalchemy.schema import PrimaryKeyConstraint, UniqueConstraint
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import Grouping

_known: WeakKeyDictionary[RelationshipProperty[Any], Association] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True, eq=False)
class End:
    """One end of a relationship: a mapped class, and how the association table refers to it.

    Attributes:
        mapper: of the class.
        columns: of the association table.
        referenced: the columns of the class's tables that they refer to.
        attributes: the names of the attributes of those.
        positions: where in the identity their values stand; `None` where one is no part of the
            primary key.
        collections: the attributes of the class that show associations of this table, and are
            loaded at once.
    """

    mapper: Mapper[Any]
    columns: tuple[Column[Any], ...]
    referenced: tuple[Column[Any], ...]
    attributes: tuple[str, ...]
    positions: tuple[int, ...] | None
    collections: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.mapper.class_.__name__


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Association:
    """A Many-to-Many relationship, seen from its owner.

    Attributes:
        name: `"Post.tags"`.
        table: the association table.
        owner: the end that has the attribute.
        related: the end that the attribute shows.
        shared: positions in `related.columns` of columns that are the owner's too, and where they
            are in its columns.
        extras: the table's columns beyond the keys that can be written.
        unique: whether a unique constraint covers exactly the pair.
        collides: whether another one might be violated by rows whose pairs differ.
        statements: the statements for this relationship, by their shape; each is made once.
        shapes: what they have for the extra columns, by the names of those with a value.
    """

    name: str
    table: Table
    owner: End
    related: End
    shared: dict[int, int]
    extras: tuple[Column[Any], ...]
    unique: bool
    collides: bool
    statements: dict[Any, Executable] = field(default_factory=dict)
    shapes: dict[frozenset[str], Any] = field(default_factory=dict)

    @property
    def related_columns(self) -> list[Column[Any]]:
        """The related columns that are not the owner's too."""
        return [
            column
            for position, column in enumerate(self.related.columns)
            if position not in self.shared
        ]

    @property
    def pair(self) -> list[Column[Any]]:
        return [*self.owner.columns, *self.related_columns]


def association_of(rel_attr: object) -> Association:
    """The association behind an attribute such as `Post.tags`, analysed once; `TypeError` where
    there is none."""
    if not isinstance(rel_attr, QueryableAttribute):
        raise TypeError(
            f"rel_attr must be a Many-to-Many relationship, written as in Post.tags; not {rel_attr!r}"
        )
    prop: Any = rel_attr.property
    known = _known.get(prop) if isinstance(prop, RelationshipProperty) else None
    if known is None:
        known = _analyse(rel_attr, prop)
        _known[prop] = known
    return known


def _analyse(rel_attr: QueryableAttribute[Any], prop: Any) -> Association:
    if not isinstance(prop, RelationshipProperty):
        raise TypeError(
            f"{rel_attr} is not a Many-to-Many relationship: it is no relationship at all"
        )
    name = f"{prop.parent.class_.__name__}.{prop.key}"
    if prop.secondary is None:
        raise TypeError(
            f"{name} is not a Many-to-Many relationship: it has no association table (`secondary`)"
        )
    if prop.viewonly:
        raise TypeError(
            f"{name} is a Many-to-Many relationship to look at only (`viewonly`); write through another"
        )
    table = prop.secondary
    if not isinstance(table, Table):
        raise TypeError(
            f"{name}: the `secondary` of a Many-to-Many relationship must be a Table, not {table!r}"
        )
    owner_pairs: Any = prop.synchronize_pairs
    related_pairs: Any = prop.secondary_synchronize_pairs
    for join, pairs in ((prop.primaryjoin, owner_pairs), (prop.secondaryjoin, related_pairs)):
        conditions = list(conditions_of(join))
        if len(conditions) != len(pairs) or not all(
            is_equality(condition) for condition in conditions
        ):
            raise TypeError(
                f"{name}: this Many-to-Many relationship has conditions beyond its keys ({join}), so that its "
                f"collection is not all of an owner's rows; write through a relationship without them"
            )
    owner_columns = tuple(column for _, column in owner_pairs)
    related_columns = tuple(column for _, column in related_pairs)
    owner = _end(prop.parent, owner_pairs, table, related_columns)
    related = _end(prop.mapper, related_pairs, table, owner_columns)
    shared = {
        position: owner_columns.index(column)
        for position, column in enumerate(related_columns)
        if column in owner_columns
    }
    if len(shared) == len(related_columns):
        raise TypeError(
            f"{name}: both ends of this Many-to-Many relationship are the same columns of {table.name}"
        )
    pair = {*owner_columns, *related_columns}
    unique = list(unique_keys(table))
    return Association(
        name=name,
        table=table,
        owner=owner,
        related=related,
        shared=shared,
        extras=tuple(
            column for column in table.columns if column not in pair and column.computed is None
        ),
        unique=any(deferrable is False and key == pair for key, deferrable in unique),
        collides=any(
            key != pair and not all(_is_generated(column) for column in key - pair)
            for key, _ in unique
        )
        or any(key < pair for key, _ in unique),
    )


def _end(mapper: Mapper[Any], pairs: Any, table: Table, others: tuple[Column[Any], ...]) -> End:
    columns = tuple(column for _, column in pairs)
    referenced = tuple(column for column, _ in pairs)
    keys = {
        mapper.get_property_by_column(column).key: at
        for at, column in enumerate(mapper.primary_key)
    }
    for each in mapper.iterate_to_root():
        # A key of a joined table may have an attribute of its own, which always equals that of the
        # table above.
        for condition in (
            () if each.inherit_condition is None else conditions_of(each.inherit_condition)
        ):
            if is_equality(condition):
                names = {
                    mapper.get_property_by_column(side).key
                    for side in (condition.left, condition.right)
                }
                for found in [keys[name] for name in names if name in keys]:
                    keys.update(dict.fromkeys(names, found))
    attributes = tuple(mapper.get_property_by_column(column).key for column in referenced)
    positions = tuple(keys[name] for name in attributes) if set(attributes) <= set(keys) else None
    return End(
        mapper,
        columns,
        referenced,
        attributes,
        positions,
        _collections(mapper, set(columns), table, others),
    )


def _collections(
    mapper: Mapper[Any], columns: set[Any], table: Table, others: tuple[Any, ...]
) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for each in mapper.self_and_descendants:
        for relationship in each.relationships:
            # Those loaded by a query of their own at each use have nothing that could be out of
            # date.
            if relationship.secondary is table and relationship.lazy not in (
                "dynamic",
                "write_only",
            ):
                local: set[Any] = {column for _, column in relationship.synchronize_pairs}
                if local == columns or local != set(others):
                    found[relationship.key] = None
    return tuple(found)


def conditions_of(join: Any) -> Iterator[Any]:
    if isinstance(join, Grouping):
        yield from conditions_of(join.element)
    elif isinstance(join, BooleanClauseList) and join.operator is operators.and_:
        for clause in join.clauses:
            yield from conditions_of(clause)
    else:
        yield join


def is_equality(condition: ColumnElement[Any]) -> bool:
    return (
        isinstance(condition, BinaryExpression)
        and condition.operator is operators.eq
        and isinstance(condition.left, Column)
        and isinstance(condition.right, Column)
    )


def unique_keys(table: Table) -> Iterator[tuple[set[Any], bool]]:
    """The columns of each unique constraint and index, and whether it is of no use to ON
    CONFLICT."""
    for constraint in table.constraints:
        if (
            isinstance(constraint, PrimaryKeyConstraint | UniqueConstraint)
            and len(constraint.columns) > 0
        ):
            yield set(constraint.columns), bool(constraint.deferrable)
    for index in table.indexes:
        if index.unique:
            yield set(index.columns), _is_partial(index)


def _is_partial(index: Index) -> bool:
    where = index.dialect_options["postgresql"]["where"]
    return where is not None or not all(isinstance(each, Column) for each in index.expressions)


def _is_generated(column: Column[Any]) -> bool:
    """Whether each row gets a value that no other has: what a surrogate key is made of."""
    return column.primary_key and (
        column.server_default is not None or column.table.autoincrement_column is column
    )
