"""Rows become instances, and what a session has loaded is loaded again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Table, inspect
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import (
    MANYTOONE,
    Mapper,
    RelationshipProperty,
    Session,
    make_transient_to_detached,
)
from sqlalchemy.orm.attributes import set_committed_value

from pgtoolset.testing.doubles._columns import attribute_of, inherited, row_at
from pgtoolset.testing.doubles._store import Row, RowId, Work
from pgtoolset.values import RowLockMode

__all__ = ["identity_from", "load", "lock_row", "refresh", "values_at"]

Identity = tuple[Any, ...]


def identity_from(mapper: Mapper[Any], ident: Any) -> Identity:
    """A primary key as `Session.get` takes it: a scalar, a tuple, or a mapping of attribute
    names."""
    names = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
    if isinstance(ident, Mapping):
        if set(ident) != set(names):
            raise InvalidRequestError(
                f"the primary key of {mapper.class_.__name__} is ({', '.join(names)})"
            )
        return tuple(ident[name] for name in names)
    identity = tuple(ident) if isinstance(ident, tuple | list) else (ident,)
    if len(identity) != len(names):
        raise InvalidRequestError(
            f"Incorrect number of values in identifier: the primary key of {mapper.class_.__name__} is "
            f"({', '.join(names)})"
        )
    return identity


def values_at(
    work: Work, mapper: Mapper[Any], identity: Identity
) -> tuple[Mapper[Any], Row] | None:
    """What is stored under a primary key: the class that it is of, and the values of its
    attributes."""
    base = mapper.base_mapper
    assert isinstance(base.local_table, Table)
    at = row_at(work, base, base.local_table, identity)
    row = None if at is None else work.row(at)
    if row is None:
        return None
    if base.polymorphic_on is not None:
        kind: Any = row[base.polymorphic_on.key or ""]
        found = base.polymorphic_map[kind]
        if not found.isa(mapper):
            return None
        mapper = found
    values: Row = {}
    for table in mapper.tables:
        assert isinstance(table, Table)
        place = row_at(work, mapper, table, identity)
        part = None if place is None else work.row(place)
        if part is None:
            return None
        for column in table.columns:
            name = attribute_of(mapper, column)
            if name is not None:
                values[name] = part[column.key]
    return mapper, values


def lock_row(work: Work, mapper: Mapper[Any], identity: Identity, mode: RowLockMode) -> None:
    """Lock the row, waiting for it, where there is one."""
    for place in rows_of(work, mapper, identity):
        work.lock(("row", *place), mode)


def rows_of(work: Work, mapper: Mapper[Any], identity: Identity) -> list[RowId]:
    """Where the parts of an instance are, in the tables of its class."""
    found = values_at(work, mapper, identity)
    if found is None:
        return []
    places = [
        row_at(work, found[0], table, identity)
        for table in found[0].tables
        if isinstance(table, Table)
    ]
    return [place for place in places if place is not None]


def load(session: Any, mapper: Mapper[Any], identity: Identity, *, populate_existing: bool) -> Any:
    """The instance with a primary key, or `None`. One that the session has keeps what it has,
    unless it is expired."""
    found = values_at(session.work, mapper, identity)
    if found is None:
        return None
    actual, values = found
    present = session.identity_map.get(actual.identity_key_from_primary_key(identity))
    if present is None:
        return _made(session, actual, values)
    state: Any = inspect(present)
    for name, value in values.items():
        if populate_existing or name not in state.dict:
            set_committed_value(present, name, value)
    return present


def _made(session: Session, mapper: Mapper[Any], values: Row) -> Any:
    instance = mapper.class_manager.new_instance()
    for name, value in values.items():
        set_committed_value(instance, name, value)
    make_transient_to_detached(instance)
    session.add(instance)
    return instance


def refresh(session: Any, instance: Any, names: list[str] | None) -> None:
    """Load attributes again, columns and relationships."""
    state: Any = inspect(instance)
    mapper: Mapper[Any] = state.mapper
    found = values_at(session.work, mapper, tuple(state.identity))
    if found is None:
        raise InvalidRequestError(
            f"Could not refresh instance '{type(instance).__name__} {tuple(state.identity)!r}'"
        )
    for name, value in found[1].items():
        if names is None or name in names:
            set_committed_value(instance, name, value)
    for name in names or ():
        if name in mapper.relationships:
            related = _related(session, instance, mapper.relationships[name])
            uselist = mapper.relationships[name].uselist
            set_committed_value(instance, name, related if uselist else next(iter(related), None))
        elif name not in found[1]:
            raise InvalidRequestError(
                f"{type(instance).__name__} has no mapped column or relationship {name!r}"
            )


def _related(session: Any, instance: Any, relationship: RelationshipProperty[Any]) -> list[Any]:
    work: Work = session.work
    stored = values_at(work, relationship.parent, tuple(inspect(instance).identity))
    assert stored is not None
    from_there = relationship.direction is MANYTOONE
    pairs: Any = relationship.synchronize_pairs
    near_and_far = [(far, near) for near, far in pairs] if from_there else pairs
    wanted = {
        str(far.key): stored[1][stored[0].get_property_by_column(near).key]
        for near, far in near_and_far
    }
    if None in wanted.values():
        return []
    far_column = near_and_far[0][1]
    if relationship.secondary is None:
        return _instances(session, relationship.mapper, far_column.table, wanted)
    related = []
    secondary_pairs: Any = relationship.secondary_synchronize_pairs
    for at in work.find(far_column.table, wanted):
        link = work.row(at) or {}
        values = {str(source.key): link[column.key] for source, column in secondary_pairs}
        related += _instances(session, relationship.mapper, secondary_pairs[0][0].table, values)
    return list({id(each): each for each in related}.values())


def _instances(session: Any, mapper: Mapper[Any], table: Table, values: Row) -> list[Any]:
    found = []
    for at in session.work.find(table, values):
        row = session.work.row(at)
        identity = tuple(row[_in_table(mapper, table, column)] for column in mapper.primary_key)
        instance = load(session, mapper, identity, populate_existing=False)
        if instance is not None:
            found.append((identity, instance))
    return [instance for _, instance in sorted(found, key=lambda each: repr(each[0]))]


def _in_table(mapper: Mapper[Any], table: Table, column: Any) -> str:
    """The column of one of the class's tables that holds this part of the primary key."""
    if column.table is table:
        return str(column.key)
    return str(
        next(
            child.key
            for parent, child in inherited(mapper)
            if parent is column and child.table is table
        )
    )
