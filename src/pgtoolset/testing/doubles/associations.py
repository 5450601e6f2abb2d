"""Many-to-Many writes without a database: what is given is checked by the same code, what is
written are rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Column, Table, inspect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.util import greenlet_spawn

from pgtoolset._arguments import check_flag, sync_session
from pgtoolset.m2m._relationships import ManyToMany, Related
from pgtoolset.testing.doubles import _loading as loading
from pgtoolset.testing.doubles._columns import Context, complete, default_of
from pgtoolset.testing.doubles._constraints import delete_row, insert_row, key_lock, update_row
from pgtoolset.testing.doubles._store import Row, RowId, Work, pick
from pgtoolset.testing.doubles.session import MemorySyncSession
from pgtoolset.values import LockMode, M2MChange, RowLockMode

if TYPE_CHECKING:  # replaced with this module by the doubles on plain keys
    from pgtoolset.m2m._arguments import (
        check_instances,
        check_key,
        check_links,
        check_values,
        listed,
    )
    from pgtoolset.m2m._associations import Association, End, association_of
    from pgtoolset.m2m._collections import expire, remember
    from pgtoolset.m2m._extras import extras_of
    from pgtoolset.m2m._keys import check_shared, not_found

    # How the real functions come from what is given to columns of keys. They take the session that they
    # are given.
    from pgtoolset.m2m._preparing import Touched, divided, ends_of, owner_and_columns, pair_columns

__all__ = ["MemoryAssociations"]

T = TypeVar("T")


class MemoryAssociations:
    """`m2m_add`, `m2m_remove`, `m2m_set` and `m2m_add_many` for sessions of a `MemoryDatabase`.

    They refuse, count, flush and expire as the real ones do, evaluate defaults as often, and are
    judged by the same constraints; two sets of one owner wait for each other.

    Example:
        >>> database, associations = MemoryDatabase(), MemoryAssociations()
        >>> async with create_db_context(database.session)() as memory:
        ...     new = Post(id=1)
        ...     memory.add_all([new, Tag(key=1), Tag(key=2)])
        ...     assert await associations.m2m_add(memory, new, Post.tags, pks=[1, 2]) == 2
        >>> rows = database.rows(Post.tags.property.secondary)
        >>> assert rows == [{"post": 1, "tag": 1}, {"post": 1, "tag": 2}]
    """

    async def m2m_add(
        self,
        session: AsyncSession,
        instance: Any,
        rel_attr: ManyToMany[Related],
        *related: Related,
        pks: Iterable[Any] = (),
        ignore_conflicts: bool = False,
        values: Mapping[str, Any] | None = None,
    ) -> int:
        """As `pgtoolset.m2m_add`."""
        association = association_of(rel_attr)
        check_flag("ignore_conflicts", ignore_conflicts)
        given = check_values(association, values)
        sync = _checked(session)
        check_instances(sync, association, association.owner, [instance])
        keys = listed("pks", "primary keys", pks)
        if not related and not keys:
            return 0
        owner, columns = await _keys_of(session, sync, association, instance, related, keys)
        links = _Links(association, given, [[value] * len(columns[0]) for value in owner], columns)

        def add() -> int:
            return sum(
                links.insert(sync.work, row, ignore_conflicts=ignore_conflicts)
                for row in links.rows(sync.work)
            )

        return await _executed(
            sync,
            association,
            f"ADD {association.name}",
            add,
            *ends_of(association, instance, related, keys),
        )

    async def m2m_remove(
        self,
        session: AsyncSession,
        instance: Any,
        rel_attr: ManyToMany[Related],
        *related: Related,
        pks: Iterable[Any] = (),
    ) -> int:
        """As `pgtoolset.m2m_remove`."""
        association = association_of(rel_attr)
        sync = _checked(session)
        check_instances(sync, association, association.owner, [instance])
        keys = listed("pks", "primary keys", pks)
        if not related and not keys:
            return 0
        owner, columns = await _keys_of(session, sync, association, instance, related, keys)
        links = _Links(association, {}, [[value] * len(columns[0]) for value in owner], columns)

        def remove() -> int:
            found = [at for pair in links.pairs() for at in sync.work.find(association.table, pair)]
            return sum(delete_row(sync.work, at) for at in found)

        return await _executed(
            sync,
            association,
            f"REMOVE {association.name}",
            remove,
            *ends_of(association, instance, related, keys),
        )

    async def m2m_set(
        self,
        session: AsyncSession,
        instance: Any,
        rel_attr: ManyToMany[Related],
        *related: Related,
        pks: Iterable[Any] = (),
        values: Mapping[str, Any] | None = None,
        keep_existing: bool = False,
    ) -> M2MChange:
        """As `pgtoolset.m2m_set`."""
        association = association_of(rel_attr)
        check_flag("keep_existing", keep_existing)
        given = check_values(association, values)
        sync = _checked(session)
        check_instances(sync, association, association.owner, [instance])
        keys = listed("pks", "primary keys", pks)
        owner, columns = await _keys_of(session, sync, association, instance, related, keys)
        links = _Links(association, given, [[value] * len(columns[0]) for value in owner], columns)
        mine = {
            column.key: value
            for column, value in zip(association.owner.columns, owner, strict=True)
        }

        def replace() -> M2MChange:
            _lock_owner(sync.work, association.owner, owner)
            return links.replace(
                sync.work, mine, rewrite=bool(association.extras) and not keep_existing
            )

        ends = ends_of(association, instance, related, None)
        return await _executed(sync, association, f"SET {association.name}", replace, *ends)

    async def m2m_add_many(
        self,
        session: AsyncSession,
        rel_attr: ManyToMany[Any],
        links: Iterable[tuple[Any, Any]],
        *,
        ignore_conflicts: bool = False,
        values: Mapping[str, Any] | None = None,
    ) -> int:
        """As `pgtoolset.m2m_add_many`."""
        association = association_of(rel_attr)
        check_flag("ignore_conflicts", ignore_conflicts)
        given = check_values(association, values)
        sync = _checked(session)
        pairs = listed("links", "pairs (owner, related)", links)
        if not pairs:
            return 0
        columns, width = await _keys_of_pairs(session, sync, association, pairs)
        check_shared(association, columns[:width], columns[width:])
        new = _Links(association, given, columns[:width], columns[width:])

        def add() -> int:
            return sum(
                new.insert(sync.work, row, ignore_conflicts=ignore_conflicts)
                for row in new.rows(sync.work)
            )

        ends: list[Touched] = []
        for at, end in enumerate((association.owner, association.related)):
            if end.collections:
                ends.append((end, *divided(end, [pair[at] for pair in pairs])))
        return await _executed(sync, association, f"ADD MANY {association.name}", add, *ends)


class _Links:
    """The rows that a call asks for, each pair once."""

    def __init__(
        self,
        association: Association,
        given: Mapping[str, Any],
        owners: Sequence[Sequence[Any]],
        related: Sequence[Sequence[Any]],
    ) -> None:
        self._association = association
        self._given = given
        self._extras = extras_of(association, given)
        self._columns: dict[Column[Any], list[Any]] = {
            column: list(values)
            for end, lists in ((association.owner, owners), (association.related, related))
            for column, values in zip(end.columns, lists, strict=True)
        }
        self._count = len(related[0])
        self._names = [column.key for column in association.pair]
        named = {column: self._columns[column] for column in association.pair}
        # Python-side defaults are evaluated here, before anything is locked, and once per row that
        # is asked for.
        self._parameters = (
            self._extras.parameters(given, named, self._count) if self._extras.columns else {}
        )

    def pairs(self) -> list[Row]:
        """The columns of the keys, in their order."""
        return [self._pair(at) for at in self._order()]

    def rows(self, work: Work) -> Iterator[Row]:
        """The whole rows, made when they are asked for, because serials are taken only then."""
        for at in self._order():
            yield self._row(work, at)

    def insert(self, work: Work, row: Row, *, ignore_conflicts: bool) -> bool:
        """Insert a row; whether it was."""
        table, pair = self._association.table, {name: row[name] for name in self._names}
        if ignore_conflicts:
            if self._association.unique:
                work.statement(f"INSERT {table.fullname}", writes=True)
                key_lock(work, table, pair)
            if work.find(table, pair):
                return False
        insert_row(work, table, row)
        return True

    def replace(self, work: Work, mine: Row, *, rewrite: bool) -> M2MChange:
        """Make the rows of an owner exactly these."""
        association, table = self._association, self._association.table
        present: dict[tuple[Any, ...], list[RowId]] = {}
        for place in work.find(table, mine):
            present.setdefault(pick(work.row(place) or {}, self._names), []).append(place)
        wanted = {pick(self._pair(at), self._names): at for at in self._order()}
        added = [at for pair, at in wanted.items() if pair not in present]
        kept = {pair: at for pair, at in wanted.items() if pair in present}
        removed = [places for pair, places in present.items() if pair not in wanted]

        def delete(places: Iterable[RowId]) -> None:
            for place in places:
                delete_row(work, place)

        if association.unique and not association.collides:
            for at in added:
                insert_row(work, table, self._row(work, at))
            for pair, at in kept.items() if rewrite else ():
                row = self._row(work, at)
                update_row(
                    work,
                    present[pair][0],
                    {column.key: row[column.key] for column in association.extras},
                )
            delete(place for places in removed for place in places)
        elif rewrite:
            delete(place for places in present.values() for place in places)
            for at in wanted.values():
                insert_row(work, table, self._row(work, at))
        else:
            # Where nothing forbids it, an association may be there more than once; afterwards it is
            # there once.
            surplus = [
                place for pair, places in present.items() if pair in wanted for place in places[1:]
            ]
            delete([*(place for places in removed for place in places), *surplus])
            for at in added:
                insert_row(work, table, self._row(work, at))
        return M2MChange(len(added), len(removed))

    def _order(self) -> list[int]:
        numbers = list(range(self._count))
        try:
            return sorted(numbers, key=lambda at: pick(self._pair(at), self._names))
        except TypeError:  # values without an order, such as enums
            return numbers

    def _pair(self, at: int) -> Row:
        return {column.key: values[at] for column, values in self._columns.items()}

    def _row(self, work: Work, at: int) -> Row:
        row = self._pair(at)
        for number, column in enumerate(self._association.extras):
            if column.name in self._given:
                row[column.key] = self._given[column.name]
            elif f"x{number}" in self._parameters:
                row[column.key] = self._parameters[f"x{number}"][at]
            else:
                row[column.key] = default_of(column, work, Context(row))
        return complete(work, self._association.table, row)


def _checked(session: Any) -> MemorySyncSession:
    sync = sync_session(session)
    if not isinstance(sync, MemorySyncSession):
        raise TypeError(
            f"session must be a MemorySession, which has a double's rows, not {session!r}"
        )
    return sync


async def _keys_of(
    session: Any,
    sync: MemorySyncSession,
    association: Association,
    instance: Any,
    related: Any,
    keys: list[Any],
) -> tuple[list[Any], list[list[Any]]]:
    """The owner's key, and the related keys as columns. What is not loaded is looked up here, in
    place of a SELECT."""
    owner, end = association.owner, association.related
    if owner.positions is None or end.positions is None:
        check_instances(sync, association, end, related)
        keys = [check_key(association, end, key) for key in keys]
        await session.flush()
        if end.positions is None:
            related = [*related, *(_found(sync, association, end, key) for key in keys)]
            keys = []
        for side, instances in ((owner, [instance]), (end, related)):
            _have_loaded(sync, association, side, instances)
    return await owner_and_columns(session, sync, association, instance, related, keys)


async def _keys_of_pairs(
    session: Any, sync: MemorySyncSession, association: Association, pairs: list[Any]
) -> tuple[list[list[Any]], int]:
    ends = association.owner, association.related
    if any(end.positions is None for end in ends):
        pairs = check_links(sync, association, pairs)
        await session.flush()
        sides = []
        for at, end in enumerate(ends):
            items = [pair[at] for pair in pairs]
            if end.positions is None:
                items = [
                    _found(sync, association, end, item) if isinstance(item, tuple) else item
                    for item in items
                ]
                _have_loaded(sync, association, end, items)
            sides.append(items)
        pairs = list(zip(*sides, strict=True))
    return await pair_columns(session, sync, association, pairs)


def _found(
    sync: MemorySyncSession, association: Association, end: End, key: tuple[Any, ...]
) -> Any:
    instance = loading.load(sync, end.mapper, key, populate_existing=False)
    if instance is None:
        raise not_found(association, end, key)
    return instance


def _have_loaded(
    sync: MemorySyncSession, association: Association, end: End, instances: Iterable[Any]
) -> None:
    for instance in instances if end.positions is None else ():
        state: Any = inspect(instance)
        if not all(name in state.dict for name in end.attributes):
            found = loading.values_at(sync.work, end.mapper, tuple(state.identity))
            if found is None:
                raise not_found(association, end, tuple(state.identity))
            for name in end.attributes:
                set_committed_value(instance, name, found[1][name])


def _lock_owner(work: Work, end: End, owner: Sequence[Any]) -> None:
    table = end.referenced[0].table
    assert isinstance(table, Table)
    work.lock(("table", table), LockMode.ROW_SHARE)
    named = {
        column.key: value
        for column, value in zip(end.referenced, owner, strict=True)
        if column.table is table
    }
    for place in work.find(table, named):
        work.lock(("row", *place), RowLockMode.NO_KEY_UPDATE)


async def _executed(
    sync: MemorySyncSession,
    association: Association,
    what: str,
    work: Callable[[], T],
    *ends: Touched,
) -> T:
    """Do it as a statement, and expire what shows the associations, as the real functions do."""

    def run() -> T:
        sync.statement(what, writes=True)
        sync.work.log(what)
        try:
            sync.work.store.fail_if_asked("M2M")
            return work()
        except DBAPIError as error:
            sync.refused(error)

    try:
        remember(sync, association)
        result = await greenlet_spawn(run)
    except DBAPIError:
        raise
    except BaseException:
        for end, instances, keys in ends:
            expire(sync, end, instances, keys)
        raise
    for end, instances, keys in ends:
        expire(sync, end, instances, keys)
    return result
