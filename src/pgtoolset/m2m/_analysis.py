"""The association behind an attribute such as `Post.tags`: which tables and columns, which keys.

See https://docs.sqlalchemy.org/en/20/orm/basic_relationships.html#many-to-many
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Column, Table
from sqlalchemy import types as sqltypes
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import Mapper, RelationshipProperty

from pgtoolset._arguments import (
    KeyParser,
    check_relationship,
    conditions_of,
    is_equality,
    relationship_of,
    shown,
)
from pgtoolset._postgres.arrays import DIALECT, is_bound_as_it_is
from pgtoolset._text import printable
from pgtoolset.m2m._associations import Association, AssociationObject, End
from pgtoolset.m2m._names import free_prefix

#: In the `info` of a relationship: its association, which is forgotten with the mapping.
_INFO = "pgtoolset.m2m"

#: Types of which PostgreSQL compares values as Python compares them.
_COMPARED_ALIKE = (
    sqltypes.Integer,
    sqltypes.Boolean,
    sqltypes.Date,
    sqltypes.String,
    sqltypes.Uuid,
)


def association_of(rel_attr: object) -> Association:
    """Return the association behind an attribute, analysed once; `TypeError` for anything else."""
    prop = relationship_of(rel_attr)
    # An `info` can be copied to another relationship.
    known_of, known = prop.info.get(_INFO, (None, None))
    if known is None or known_of is not prop:
        known = _analyse(check_relationship(rel_attr))
        prop.info[_INFO] = prop, known
    association: Association = known
    return association


def _analyse(prop: RelationshipProperty[Any]) -> Association:
    name = f"{shown(prop.parent.class_)}.{printable(prop.key)}"
    table: Any = prop.secondary
    owner_pairs: Any = prop.synchronize_pairs
    related_pairs: Any = prop.secondary_synchronize_pairs
    owner_columns = tuple(column for _, column in owner_pairs)
    related_columns = tuple(column for _, column in related_pairs)
    pair = {*owner_columns, *related_columns}
    ends = (prop.parent, prop.mapper)
    tables: set[Any] = {table, *(each for mapper in ends for each in mapper.tables)}
    return Association(
        name=name,
        table=table,
        owner=_end(prop.parent, owner_pairs, table, related_columns),
        related=_end(prop.mapper, related_pairs, table, owner_columns),
        shared=_shared(name, owner_columns, related_columns),
        extras=tuple(
            column for column in table.columns if column not in pair and column.computed is None
        ),
        generated=tuple(column for column in table.columns if _is_generated(column)),
        viewers=tuple(_viewers(table, ends)),
        objects=tuple(_objects(table, prop.parent, owner_columns, related_columns)),
        prefix=free_prefix(tables),
    )


def _shared(
    name: str, owner: tuple[Column[Any], ...], related: tuple[Column[Any], ...]
) -> dict[int, int]:
    """Return where the columns of both ends are among the related, and among the owner's."""
    shared = {at: owner.index(column) for at, column in enumerate(related) if column in owner}
    if len(shared) == len(related):
        raise TypeError(
            f"rel_attr: both ends of the Many-to-Many relationship {name} are the same columns "
            "of its association table"
        )
    return shared


def _end(mapper: Mapper[Any], pairs: Any, table: Table, others: tuple[Column[Any], ...]) -> End:
    columns = tuple(column for _, column in pairs)
    referenced = tuple(column for column, _ in pairs)
    attributes = tuple(mapper.get_property_by_column(column).key for column in referenced)
    known = _key_positions(mapper)
    width = len(mapper.primary_key)
    positions = tuple([known[name] for name in attributes if name in known])
    is_key, is_whole_key = len(positions) == len(attributes), set(positions) == set(range(width))
    keys: list[Any] = [*mapper.primary_key, *columns]
    return End(
        name=shown(mapper.class_),
        mapper=mapper,
        parser=KeyParser(mapper),
        columns=columns,
        referenced=referenced,
        attributes=attributes,
        positions=positions if is_key else None,
        key_order=tuple(map(positions.index, range(width))) if is_key and is_whole_key else None,
        width=width,
        collections=_collections(mapper, set(columns), table, others),
        has_one_spelling=all(_has_one_spelling(each) for each in keys),
    )


def _key_positions(mapper: Mapper[Any]) -> dict[str, int]:
    """Return where in the primary key the value of an attribute is, by the attribute's name."""
    positions = {
        mapper.get_property_by_column(column).key: at
        for at, column in enumerate(mapper.primary_key)
    }
    for each in mapper.iterate_to_root():
        # The key of a joined table may have an attribute of its own, which always equals that of
        # the table above.
        if each.inherit_condition is None:
            continue
        for condition in filter(is_equality, conditions_of(each.inherit_condition)):
            names = {
                mapper.get_property_by_column(side).key
                for side in (condition.left, condition.right)
            }
            for position in [positions[name] for name in names if name in positions]:
                positions.update(dict.fromkeys(names, position))
    return positions


def _collections(
    mapper: Mapper[Any], columns: set[Any], table: Table, others: tuple[Any, ...]
) -> tuple[str, ...]:
    """Return the names of the attributes that show rows of `table` and can be out of date."""
    found: dict[str, None] = {}
    for each in mapper.self_and_descendants:
        for relationship in each.relationships:
            if not _shows(relationship, table):
                continue
            local: set[Any] = {column for _, column in relationship.synchronize_pairs}
            if relationship.secondary is None or local == columns or local != set(others):
                found[relationship.key] = None
    return tuple(found)


def _shows(relationship: RelationshipProperty[Any], table: Table) -> bool:
    """Whether a relationship shows rows of the table and is loaded as a whole.

    Dynamic and write-only ones are read by a query at each use.
    """
    reads = relationship.secondary is table or table in relationship.mapper.tables
    return reads and relationship.lazy not in ("dynamic", "write_only")


def _viewers(
    table: Table, ends: tuple[Mapper[Any], Mapper[Any]]
) -> Iterator[tuple[Mapper[Any], tuple[str, ...]]]:
    for mapper in _mappers(ends[0]):
        names = [each.key for each in mapper.relationships if _shows(each, table)]
        if names and not any(mapper.isa(end) for end in ends):
            yield mapper, tuple(names)


def _objects(
    table: Table, owner: Mapper[Any], one: tuple[Column[Any], ...], other: tuple[Column[Any], ...]
) -> Iterator[AssociationObject]:
    for mapper in _mappers(owner):
        if table in mapper.tables:
            names = [
                tuple(
                    mapper.get_property_by_column(column).key
                    for column in columns
                    if mapper.columns.contains_column(column)
                )
                for columns in (one, other)
            ]
            yield AssociationObject(mapper, *names)


def _mappers(mapper: Mapper[Any]) -> list[Mapper[Any]]:
    return sorted(mapper.registry.mappers, key=lambda each: each.class_.__qualname__)


def _is_generated(column: Column[Any]) -> bool:
    """Whether each row gets a value of its own, as of a surrogate key."""
    return column.primary_key and (
        column.server_default is not None or column.table.autoincrement_column is column
    )


def _has_one_spelling(column: Column[Any]) -> bool:
    """Whether PostgreSQL tells values of a column apart exactly where Python does."""
    type_: Any = column.type.dialect_impl(DIALECT)
    if not isinstance(type_, _COMPARED_ALIKE) or not is_bound_as_it_is(column):
        return False
    if isinstance(type_, sqltypes.Uuid):
        return type_.as_uuid
    if isinstance(type_, sqltypes.Enum):
        return type_.enum_class is None  # a member can be given by its label
    # CHAR ignores blanks at the end; CITEXT and some collations ignore the case.
    is_padded = isinstance(type_, sqltypes.CHAR | postgresql.CITEXT)
    return not is_padded and getattr(type_, "collation", None) is None
