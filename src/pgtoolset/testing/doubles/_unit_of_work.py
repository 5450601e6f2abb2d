"""What a flush does: the pending, changed and deleted instances of a session become changes of
rows.

It does not know versions (`version_id_col`), SQL expressions as values and `delete-orphan`.
https://docs.sqlalchemy.org/en/20/orm/session_basics.html#flushing
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import ClauseElement, Table, inspect
from sqlalchemy.orm import MANYTOMANY, MANYTOONE, ONETOMANY, Mapper
from sqlalchemy.orm.attributes import get_history, set_committed_value
from sqlalchemy.orm.base import PassiveFlag
from sqlalchemy.orm.exc import StaleDataError

from pgtoolset.errors import NoDatabaseError
from pgtoolset.testing.doubles._columns import (
    Context,
    attribute_of,
    complete,
    default_of,
    identity_of,
    inherited,
    key_in,
    row_at,
)
from pgtoolset.testing.doubles._constraints import delete_row, insert_row, update_row
from pgtoolset.testing.doubles._store import Row, RowId, Work

#: What a relationship has gained and lost, one that is not loaded included.
_WITHOUT_LOADING = PassiveFlag.PASSIVE_NO_INITIALIZE | PassiveFlag.INCLUDE_PENDING_MUTATIONS


class Flush:
    """One flush.

    Attributes:
        written: the instances that are persistent afterwards.
        deleted: the instances that are not any more.
    """

    def __init__(
        self, work: Work, new: Iterable[Any], dirty: Iterable[Any], deleted: Iterable[Any]
    ) -> None:
        self._work = work
        self.deleted = list(deleted)
        doomed = set(map(id, self.deleted))
        self._new = [each for each in new if id(each) not in doomed]
        self._dirty = [each for each in dirty if id(each) not in doomed]
        self.written = [*self._new, *self._dirty]
        self._switched: list[Any] = []
        #: The association rows that this flush has inserted.
        self._made: list[RowId] = []
        #: For an instance, what others have to be stored before it, and what it takes from them.
        self._sources: dict[int, list[tuple[Any, Callable[[], None]]]] = {}
        self._unlinks: list[tuple[Table, Callable[[], Row]]] = []
        self._linked: list[tuple[Table, Callable[[], Row]]] = []

    def run(self) -> None:
        for instance in self.written:
            self._look_at_relationships(instance)
        stored: set[int] = set()
        doomed = {inspect(each).key: each for each in self.deleted}
        for instance in self._new:
            replaced = doomed.get(inspect(type(instance)).identity_key_from_instance(instance))
            if replaced is not None:
                # A row that is deleted and made anew in one flush is updated.
                self._leave(replaced)
                self._switched.append(replaced)
        for instance in self._new:
            self._store(instance, stored)
        for instance in self._dirty:
            self._take_from_sources(instance)
            self._update(instance)
        self._write_links()
        for instance in self.deleted:
            if not any(instance is each for each in self._switched):
                self._leave(instance)
        for instance in self._children_first():
            if not any(instance is each for each in self._switched):
                self._delete(instance)

        for instance in self.written:
            self._fill(instance)

    def _fill(self, instance: Any) -> None:
        """Load the columns that are expired, as a flush does that needs the key."""
        mapper: Mapper[Any] = inspect(type(instance))
        if not all(attribute.key in vars(instance) for attribute in mapper.column_attrs):
            for name, value in self._stored_values(mapper, instance).items():
                if name not in vars(instance):
                    set_committed_value(instance, name, value)

    # Relationships

    def _look_at_relationships(self, instance: Any) -> None:
        state: Any = inspect(instance)
        for relationship in state.mapper.relationships:
            if relationship.viewonly:
                continue
            history = get_history(instance, relationship.key, _WITHOUT_LOADING)
            added, removed = history.added or (), history.deleted or ()
            if relationship.direction is MANYTOMANY:
                self._note_links(relationship, instance, added, removed)
                continue
            for other in added:
                one, many = (
                    (other, instance) if relationship.direction is MANYTOONE else (instance, other)
                )
                if one is None:
                    self._note(relationship, None, many)
                elif many is not None:
                    self._note(relationship, one, many)
            if relationship.direction is ONETOMANY:
                for other in removed:
                    if other is not None and not any(other is each for each in self.deleted):
                        self._note(relationship, None, other)

    def _note(self, relationship: Any, one: Any, many: Any) -> None:
        sources = (
            relationship.mapper if relationship.direction is MANYTOONE else relationship.parent
        )
        targets = (
            relationship.parent if relationship.direction is MANYTOONE else relationship.mapper
        )
        pairs = [
            (sources.get_property_by_column(source).key, targets.get_property_by_column(target).key)
            for source, target in relationship.synchronize_pairs
        ]

        def take() -> None:
            for source, target in pairs:
                setattr(many, target, None if one is None else self._value(one, source))

        self._sources.setdefault(id(many), []).append((one, take))
        if not any(each is many for each in self.written):
            self._dirty.append(many)
            self.written.append(many)

    def _note_links(
        self, relationship: Any, instance: Any, added: Iterable[Any], removed: Iterable[Any]
    ) -> None:
        def row_of(other: Any) -> Callable[[], Row]:
            def row() -> Row:
                values: Row = {}
                for mapper, source, pairs in (
                    (relationship.parent, instance, relationship.synchronize_pairs),
                    (relationship.mapper, other, relationship.secondary_synchronize_pairs),
                ):
                    for column, target in pairs:
                        values[target.key] = self._value(
                            source, mapper.get_property_by_column(column).key
                        )
                return values

            return row

        self._linked += [
            (relationship.secondary, row_of(other)) for other in added if other is not None
        ]
        self._unlinks += [
            (relationship.secondary, row_of(other)) for other in removed if other is not None
        ]

    def _write_links(self) -> None:
        # Both sides of a bidirectional pair have the same news.
        for table, values in _once(self._unlinks):
            found = self._work.find(table, values)
            if not found:
                raise StaleDataError(
                    f"DELETE statement on table '{table.name}' expected to delete 1 row(s); 0 matched"
                )
            for at in found:
                delete_row(self._work, at)
        self._made = [
            insert_row(self._work, table, complete(self._work, table, values))
            for table, values in _once(self._linked)
        ]

    # Instances

    def _take_from_sources(self, instance: Any) -> None:
        for _, take in self._sources.get(id(instance), ()):
            take()

    def _store(self, instance: Any, stored: set[int]) -> None:
        if id(instance) in stored:
            return
        stored.add(id(instance))
        for source, _ in self._sources.get(id(instance), ()):
            if any(source is each for each in self._new):
                self._store(source, stored)
        self._take_from_sources(instance)
        mapper: Mapper[Any] = inspect(type(instance))
        equal = inherited(mapper)
        for table in mapper.tables:
            if not isinstance(table, Table):
                raise NoDatabaseError(
                    f"{mapper.class_.__name__} is mapped to {table!r}, which is no table"
                )
            values: Row = {}
            for column in table.columns:
                name = attribute_of(mapper, column)
                if name is not None and vars(instance).get(name) is not None:
                    values[column.key] = _plain(mapper, name, vars(instance)[name])
                elif (
                    name is not None
                    and name in vars(instance)
                    and column.default is None
                    and not column.primary_key
                ):
                    values[column.key] = None
            for parent, child in equal:
                source_name = attribute_of(mapper, parent)
                if child.table is table and source_name is not None:
                    values[child.key] = vars(instance)[source_name]
            row = complete(self._work, table, values)
            key = mapper.identity_key_from_instance(instance)
            at = None
            if any(inspect(each).key == key for each in self._switched):
                at = row_at(self._work, mapper, table, tuple(key[1]))
            if at is None or not update_row(self._work, at, row):
                insert_row(self._work, table, row)
            for column in table.columns:
                name = attribute_of(mapper, column)
                if name is not None:
                    set_committed_value(instance, name, row[column.key])

    def _update(self, instance: Any) -> None:
        state: Any = inspect(instance)
        mapper: Mapper[Any] = state.mapper
        for table in mapper.tables:
            assert isinstance(table, Table)
            values: Row = {}
            for column in table.columns:
                name = attribute_of(mapper, column)
                if name is not None and state.attrs[name].history.added:
                    values[column.key] = _plain(mapper, name, vars(instance)[name])
            if not values:
                continue
            for column in table.columns:
                if column.onupdate is not None and column.key not in values:
                    values[column.key] = default_of(
                        column, self._work, Context(values), update=True
                    )
                    name = attribute_of(mapper, column)
                    if name is not None:
                        set_committed_value(instance, name, values[column.key])
            at = row_at(self._work, mapper, table, identity_of(instance))
            if at is None or not update_row(self._work, at, values):
                raise StaleDataError(
                    f"UPDATE statement on table '{table.name}' expected to update 1 row(s); 0 were matched."
                )

    def _leave(self, instance: Any) -> None:
        """What refers to an instance that is about to be deleted, and what its relationships say of
        that."""
        mapper: Mapper[Any] = inspect(type(instance))
        values = self._stored_values(mapper, instance)
        for relationship in mapper.relationships if values else ():
            if relationship.viewonly or relationship.passive_deletes:
                continue
            mine = {
                str(target.key): values[mapper.get_property_by_column(source).key]
                for source, target in relationship.synchronize_pairs
                if relationship.direction is not MANYTOONE
            }
            if relationship.direction is MANYTOMANY:
                assert isinstance(relationship.secondary, Table)
                # What the other side has just added is nothing that this side knew of.
                for at in self._work.find(relationship.secondary, mine):
                    if at not in self._made:
                        delete_row(self._work, at)
            elif relationship.direction is ONETOMANY and not relationship.cascade.delete:
                child = relationship.mapper
                table = relationship.synchronize_pairs[0][1].table
                assert isinstance(table, Table)
                doomed = [
                    key_in(child, table, identity_of(each))
                    for each in self.deleted
                    if isinstance(each, child.class_)
                ]
                for at in self._work.find(table, mine):
                    row = self._work.row(at)
                    if row is not None and not any(key.items() <= row.items() for key in doomed):
                        update_row(self._work, at, dict.fromkeys(mine))

    def _value(self, instance: Any, name: str) -> Any:
        """An attribute, from what is stored where it is expired."""
        if name in vars(instance) or inspect(instance).key is None:
            return vars(instance).get(name)
        return self._stored_values(inspect(type(instance)), instance).get(name)

    def _stored_values(self, mapper: Mapper[Any], instance: Any) -> Row:
        """The columns of an instance, which may be expired, by attribute; nothing where its row is
        gone."""
        values: Row = {}
        if inspect(instance).key is None:
            return values
        for table in mapper.tables:
            assert isinstance(table, Table)
            at = row_at(self._work, mapper, table, identity_of(instance))
            row = None if at is None else self._work.row(at)
            for column in table.columns if row is not None else ():
                name = attribute_of(mapper, column)
                if name is not None and row is not None:
                    values[name] = row[column.key]
        return values

    def _children_first(self) -> list[Any]:
        """The deleted instances; one whose row refers to that of another comes before it."""
        ordered: list[Any] = []
        seen: set[int] = set()
        for instance in self.deleted:
            self._put_after_children(instance, ordered, seen)
        return ordered

    # Not a function inside of the one above: that would be a cycle, which keeps instances alive.
    def _put_after_children(self, instance: Any, ordered: list[Any], seen: set[int]) -> None:
        if id(instance) not in seen:
            seen.add(id(instance))
            for other in self.deleted:
                if self._refers(other, instance):
                    self._put_after_children(other, ordered, seen)
            ordered.append(instance)

    def _refers(self, one: Any, other: Any) -> bool:
        mapper, target = inspect(type(one)), inspect(type(other))
        for table in mapper.tables:
            at = row_at(self._work, mapper, table, identity_of(one))
            row = (None if at is None else self._work.row(at)) or {}
            for constraint in table.foreign_key_constraints if row else ():
                if constraint.referred_table in target.tables:
                    wanted = {each.column.key: row[each.parent.key] for each in constraint.elements}
                    place = row_at(
                        self._work, target, constraint.referred_table, identity_of(other)
                    )
                    found = None if place is None or place == at else self._work.row(place)
                    if found is not None and wanted.items() <= found.items():
                        return True
        return False

    def _delete(self, instance: Any) -> None:
        mapper: Mapper[Any] = inspect(type(instance))
        for table in reversed(mapper.tables):
            assert isinstance(table, Table)
            self._work.statement(f"DELETE {table.fullname}", writes=True)
            at = row_at(self._work, mapper, table, identity_of(instance))
            if at is not None:
                delete_row(self._work, at)


def _once(links: Iterable[tuple[Table, Callable[[], Row]]]) -> list[tuple[Table, Row]]:
    found: list[tuple[Table, Row]] = []
    for table, row_of in links:
        values = row_of()
        if (table, values) not in found:
            found.append((table, values))
    return found


def _plain(mapper: Mapper[Any], name: str, value: Any) -> Any:
    if isinstance(value, ClauseElement):
        raise NoDatabaseError(
            f"{mapper.class_.__name__}.{name} is set to the SQL expression {value}, which only a database can compute"
        )
    return value
