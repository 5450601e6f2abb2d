"""Many-to-Many associations in memory: a set of pairs of keys for each association table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pgtoolset._arguments import PrimaryKey, check_flag, check_iterable, shown
from pgtoolset.protocols import TransactionalSession
from pgtoolset.testing.doubles._refusals import UNIQUE, database_error, no_database
from pgtoolset.testing.doubles._relationships import Relationship
from pgtoolset.testing.doubles._rows import in_order
from pgtoolset.testing.doubles._work import Place, Work
from pgtoolset.testing.doubles.session import work_of
from pgtoolset.values import LockMode, M2MChange, RowLockMode

__all__ = ["MemoryAssociations"]


class MemoryAssociations:
    """`m2m_add`, `m2m_remove`, `m2m_set` and `m2m_add_many` on sessions of a `MemoryDatabase`.

    Associations are pairs of keys. An instance counts by its primary key, in whatever state it is;
    it is not loaded, flushed or expired. There are no foreign keys, and the association table has
    no further columns. An association that exists is an `IntegrityError`, where a unique constraint
    of the mapping covers the pair.

    Example:
        >>> database, associations = MemoryDatabase(), MemoryAssociations()
        >>> async with create_db_context(database.session)() as memory:
        ...     await associations.m2m_add(memory, Post(id=1), Post.tags, pks=[1, 2])
        >>> assert database.associations(Post.tags) == [(1, 1), (1, 2)]
    """

    async def m2m_add(
        self,
        session: TransactionalSession,
        instance: Any,
        rel_attr: Any,
        *related: Any,
        pks: Iterable[Any] = (),
        ignore_conflicts: bool = False,
        values: Mapping[str, Any] | None = None,
    ) -> int:
        """As `pgtoolset.m2m_add`."""
        relationship = Relationship(rel_attr)
        check_flag("ignore_conflicts", ignore_conflicts)
        _refuse_values(relationship, values)
        work = work_of(session)
        _, places = _places(relationship, instance, related, pks)
        what = f"ADD {relationship.name} {_shown(places)}"
        return await _add(work, relationship, what, places, ignore_conflicts)

    async def m2m_remove(
        self,
        session: TransactionalSession,
        instance: Any,
        rel_attr: Any,
        *related: Any,
        pks: Iterable[Any] = (),
    ) -> int:
        """As `pgtoolset.m2m_remove`."""
        relationship = Relationship(rel_attr)
        work = work_of(session)
        _, places = _places(relationship, instance, related, pks)
        if not places:
            return 0
        await _begin(work, relationship, f"REMOVE {relationship.name} {_shown(places)}")
        return await _remove(work, places)

    async def m2m_set(
        self,
        session: TransactionalSession,
        instance: Any,
        rel_attr: Any,
        *related: Any,
        pks: Iterable[Any] = (),
        values: Mapping[str, Any] | None = None,
        keep_existing: bool = False,
    ) -> M2MChange:
        """As `pgtoolset.m2m_set`. Of two sets of one owner the second waits for the first."""
        relationship = Relationship(rel_attr)
        check_flag("keep_existing", keep_existing)
        _refuse_values(relationship, values)
        work = work_of(session)
        owner, places = _places(relationship, instance, related, pks)
        await _begin(work, relationship, f"SET {relationship.name} {_shown(places)}")
        await work.lock(("row", relationship.owner.table, owner), RowLockMode.NO_KEY_UPDATE)
        present = [
            place
            for place in work.places(relationship.table)
            if relationship.keys(place)[0] == owner
        ]
        added = 0
        for place in places:
            if place not in present:
                added += await _insert(work, relationship, place, ignore_conflicts=False)
        removed = await _remove(work, [place for place in present if place not in places])
        return M2MChange(added, removed)

    async def m2m_add_many(
        self,
        session: TransactionalSession,
        rel_attr: Any,
        links: Iterable[tuple[Any, Any]],
        *,
        ignore_conflicts: bool = False,
        values: Mapping[str, Any] | None = None,
    ) -> int:
        """As `pgtoolset.m2m_add_many`."""
        relationship = Relationship(rel_attr)
        check_flag("ignore_conflicts", ignore_conflicts)
        _refuse_values(relationship, values)
        work = work_of(session)
        places = []
        for link in check_iterable("links", "pairs (owner, related)", links):
            if not isinstance(link, tuple | list):
                raise TypeError(f"links must hold pairs (owner, related), not {shown(link)}")
            if len(link) != 2:
                raise ValueError(
                    f"links must hold pairs (owner, related); one has {len(link)} elements"
                )
            owner = relationship.owner.key_or_instance("links", link[0])
            places.append(
                relationship.place(owner, relationship.related.key_or_instance("links", link[1]))
            )
        once = in_order(list(dict.fromkeys(places)))
        what = f"ADD MANY {relationship.name} {_shown(once)}"
        return await _add(work, relationship, what, once, ignore_conflicts)


def _refuse_values(relationship: Relationship, values: Mapping[str, Any] | None) -> None:
    if values is not None and not isinstance(values, Mapping):
        raise TypeError(f"values must be a mapping of column names to values, not {shown(values)}")
    if values:
        raise no_database(
            f"{relationship.name}: the doubles keep no values= of {relationship.table.name}"
        )


def _places(
    relationship: Relationship, instance: object, related: Iterable[object], pks: Iterable[Any]
) -> tuple[PrimaryKey, list[Place]]:
    """The owner's key, and where the associations of a call are, each once."""
    owner = relationship.owner.key_of(instance)
    keys = [relationship.related.key_of(each) for each in related]
    keys += relationship.related.parser.parse_all("pks", pks)
    return owner, in_order([relationship.place(owner, key) for key in dict.fromkeys(keys)])


def _shown(places: Iterable[Place]) -> str:
    return shown([place[1] for place in places])


async def _begin(work: Work, relationship: Relationship, what: str) -> None:
    work.statement(what)
    await work.lock(("table", relationship.table), LockMode.ROW_EXCLUSIVE)


async def _add(
    work: Work, relationship: Relationship, what: str, places: list[Place], ignore: bool
) -> int:
    if not places:
        return 0
    await _begin(work, relationship, what)
    return sum(
        [await _insert(work, relationship, place, ignore_conflicts=ignore) for place in places]
    )


async def _insert(
    work: Work, relationship: Relationship, place: Place, *, ignore_conflicts: bool
) -> bool:
    # As a unique index does it: wait for the transaction that inserted or deletes the same.
    await work.lock(("row", *place), RowLockMode.UPDATE)
    if work.value(place) is None:
        work.change(place, True)
        return True
    if ignore_conflicts:
        return False
    if not relationship.is_unique:
        raise no_database(
            f"{relationship.name}: the association exists, and no unique constraint of the mapping "
            f"covers the keys of {relationship.table.name}, so a double cannot decide what happens"
        )
    what = f"INSERT INTO {relationship.table.name}"
    work.fail(database_error(UNIQUE, "the association exists", what))


async def _remove(work: Work, places: Iterable[Place]) -> int:
    removed = 0
    for place in places:
        if work.value(place) is not None:
            await work.lock(("row", *place), RowLockMode.UPDATE)
            if work.value(place) is not None:
                work.change(place, None)
                removed += 1
    return removed
