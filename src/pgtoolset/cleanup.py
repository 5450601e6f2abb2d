"""`cleanup_tables`: every table of a metadata empty, its sequences restarted, and nothing else
touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from sqlalchemy import Connection, Engine, MetaData, Table
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from pgtoolset._arguments import metadata_of, optional_seconds, sync_session
from pgtoolset._arguments import milliseconds as to_milliseconds
from pgtoolset._compatibility import is_in_block
from pgtoolset._lifecycle import abandon
from pgtoolset._postgres import emptying
from pgtoolset._postgres.emptying import Details, Reference, Relation, Trigger
from pgtoolset._postgres.locks import lock_block, sessions_holding
from pgtoolset._postgres.lookout import Lookout
from pgtoolset._postgres.sqlstates import LOCK_NOT_AVAILABLE, sqlstate_of
from pgtoolset._postgres.tables import bind_arguments_of, qualified_names, translation_of
from pgtoolset.errors import OutsideReferenceError, TransactionStateError
from pgtoolset.transactions import get_transaction
from pgtoolset.types import Duration
from pgtoolset.values import Blocker, LockMode

__all__ = ["HasMetadata", "cleanup_tables"]

#: TRUNCATE takes a millisecond for each table, and must be given every table that references one of
#: them. DELETE takes as long for so many pages of a table (8 kB each); for a part of a page where
#: each row must be looked for in another table, at best through an index. Measured; a factor of two
#: in either decides nothing.
_PAGES_PER_TRUNCATE = 16
_PAGES_PER_TRUNCATE_REFERENCED = 1 / 8


class HasMetadata(Protocol):
    """What has tables: a declarative base."""

    @property
    def metadata(self) -> MetaData: ...


async def cleanup_tables(
    session: AsyncSession,
    base: HasMetadata | MetaData,
    *,
    timeout: Duration | None = "5s",
) -> None:
    """Empty every table of `base.metadata` and restart every identity and serial of theirs,
    committed.

    What is open in the session is rolled back first, and every object leaves it. One statement
    finds the tables that are not empty and the sequences that have moved; only those are touched.
    No trigger of yours fires.

    A partitioned table stands for its partitions. Of an inheritance child that the metadata does
    not have, the rows stay. Tables that the database lacks are skipped, and so are views and
    foreign tables.

    Args:
        session: an `AsyncSession`, in whatever state, but not inside a block that is its
            transaction.
        base: a declarative base, or a `MetaData`.
        timeout: what locks may be waited for: seconds, a `timedelta`, a number with a unit of
            PostgreSQL's settings such as `"500ms"`; `None` waits for ever.

    Raises:
        OutsideReferenceError: rows of a table outside of the metadata reference rows that would go;
            it says which. Nothing was touched.
        LockTimeoutError: somebody else's transaction is in the way; it names them. Nothing was
            touched.
        TransactionStateError: this is inside a block such as `session.begin()`, which could not go
            on afterwards.
        ValueError, TypeError: an argument is not what it must be; before any SQL.

    Example:
        >>> await cleanup_tables(session, Base)
    """
    sync = sync_session(session)
    metadata = metadata_of(base)
    milliseconds = to_milliseconds(optional_seconds("timeout", timeout))
    tables = list(metadata.tables.values())
    bind_arguments = bind_arguments_of(sync, tables) if tables else {}
    if is_in_block(sync):
        raise TransactionStateError(
            "cleanup_tables ends the transaction of its session, and this is inside a block that is one: "
            "call it after the block, or with another session"
        )
    await abandon(session)
    sync.expunge_all()
    if not tables:
        return
    try:
        async with get_transaction(session):
            await _clean(sync, tables, milliseconds, bind_arguments)
    except _NothingToDo:
        pass


class _NothingToDo(Exception):
    """Rolls back a transaction that has only looked."""


async def _clean(
    session: Session,
    tables: Sequence[Table],
    milliseconds: int | None,
    bind_arguments: dict[str, Any],
) -> None:
    names: list[str] = []
    mode = LockMode.ACCESS_SHARE

    async def holders(outside: AsyncConnection, pid: int) -> list[Blocker]:
        return await sessions_holding(outside, names, mode, but=pid)

    def work() -> None:
        nonlocal mode
        connection = _connection(session, bind_arguments)
        names[:] = qualified_names(tables, connection.dialect, translation_of(session, connection))
        lookout.watch(connection)
        settings = emptying.begin(connection, milliseconds)
        relations, sequences = emptying.structure_of(connection, names)
        dirty, moved = emptying.changed(connection, relations, sequences)
        if not dirty and not moved:
            raise _NothingToDo
        plan = _Plan(
            relations,
            dirty,
            emptying.details_of(connection, relations, dirty) if dirty else Details(),
        )
        if dirty:
            mode = LockMode.ACCESS_EXCLUSIVE if plan.truncated else LockMode.EXCLUSIVE
            emptied = sorted([*plan.truncated, *plan.deleted], key=lambda relation: relation.name)
            names[:] = [relation.name for relation in emptied]
            connection.exec_driver_sql(
                lock_block([relation.only for relation in emptied], mode, milliseconds or 0)
            )
            # Whoever wants to reference a row of these tables waits for the lock from now on.
            _refuse(emptying.with_rows(connection, plan.from_outside) if plan.from_outside else [])
        connection.exec_driver_sql(
            emptying.empty_block(plan.truncated, plan.deleted, moved, plan.triggers, settings)
        )

    async with Lookout(None if milliseconds is None else milliseconds / 1000, holders) as lookout:
        try:
            await greenlet_spawn(work)
        except DBAPIError as error:
            if sqlstate_of(error) != LOCK_NOT_AVAILABLE:
                raise
            raise await lookout.timed_out(
                "empty the tables", tables=names, mode=mode.value
            ) from error


def _connection(session: Session, bind_arguments: dict[str, Any]) -> Connection:
    """The session's connection, in a transaction whose every statement sees what is committed."""
    if isinstance(session.get_bind(**bind_arguments), Engine):
        options = {"isolation_level": "READ COMMITTED"}
        return session.connection(bind_arguments=bind_arguments, execution_options=options)
    return session.connection(bind_arguments=bind_arguments)


def _refuse(references: Sequence[Reference]) -> None:
    if references:
        labels = [reference.label for reference in references]
        raise OutsideReferenceError(
            f"rows of tables outside of the metadata reference rows that were to be deleted: {', '.join(labels)}. "
            "Nothing was deleted; empty those tables first, or add them to the metadata.",
            references=labels,
        )


class _Plan:
    """Which tables are truncated, from which all rows are deleted, and what stands in the way.

    Attributes:
        truncated: tables for TRUNCATE, with every table that references them.
        deleted: tables for DELETE.
        from_outside: the foreign keys of other tables to these.
        triggers: those that must not fire.
    """

    def __init__(
        self, relations: Sequence[Relation], dirty: Sequence[Relation], details: Details
    ) -> None:
        by_oid = {relation.oid: relation for relation in relations}
        self._tops = {oid: self._top(roots, details) for oid, roots in details.roots.items()}
        #: By the oid of a table: the tables that reference it, `None` for those outside; itself is
        #: none of them.
        self._referencing: dict[int, set[int | None]] = {}
        for reference in details.references:
            referencing = self._tops.get(reference.referencing)
            self._referencing.setdefault(self._tops[reference.referenced], set()).add(referencing)
        # A partition goes with the table that it is of, where that is one of these.
        rest: set[int | None] = {
            relation.oid for relation in dirty if self._tops.get(relation.oid) == relation.oid
        }
        truncated: set[int | None] = set()
        for oid in [relation.oid for relation in dirty if relation.oid in rest]:
            together = self._truncated_with(oid)
            # Tables that are empty, or not ours, are not to be touched.
            if together <= rest and self._is_cheaper(by_oid[oid], len(together - truncated)):
                truncated |= together
        emptied = rest | truncated
        self.truncated = [relation for relation in relations if relation.oid in truncated]
        self.deleted = [relation for relation in relations if relation.oid in rest - truncated]
        self.from_outside = [
            reference
            for reference in details.references
            if self._tops[reference.referenced] in emptied
            and reference.referencing not in self._tops
        ]
        self.triggers: list[Trigger] = [
            trigger for trigger in details.triggers if self._tops[trigger.relation] in emptied
        ]

    @staticmethod
    def _top(roots: set[int], details: Details) -> int:
        return next(root for root in roots if details.roots[root] == {root})

    def _truncated_with(self, oid: int) -> set[int | None]:
        """All that a TRUNCATE of a table must name; `None` stands for those outside."""
        found: set[int | None] = {oid}
        waiting: list[int | None] = [oid]
        while waiting:
            table = waiting.pop()
            new = self._referencing.get(table, set()) - found if table is not None else set()
            found |= new
            waiting += new
        return found

    def _is_cheaper(self, relation: Relation, tables: int) -> bool:
        if not self._referencing.get(relation.oid):
            return relation.pages > _PAGES_PER_TRUNCATE * tables
        return relation.pages > 1 and relation.pages >= _PAGES_PER_TRUNCATE_REFERENCED * tables
