"""`cleanup_tables`: empty every table of a metadata, restart its sequences, spare the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sqlalchemy import Connection, Engine, MetaData, Table
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Mapper, Session, registry
from sqlalchemy.util import greenlet_spawn

from pgtoolset._arguments import (
    check_atomic,
    check_bind,
    metadata_of,
    milliseconds,
    optional_seconds,
    writable_session,
)
from pgtoolset._compatibility import is_in_block
from pgtoolset._lifecycle import abandon
from pgtoolset._postgres import emptying
from pgtoolset._postgres.contents import Contents, Relation, contents_of, filled_and_moved
from pgtoolset._postgres.emptying import Details, Reaction, Reference
from pgtoolset._postgres.locks import lock_block, sessions_holding
from pgtoolset._postgres.lookout import Lookout, Wanted
from pgtoolset._postgres.sending import send
from pgtoolset._postgres.tables import (
    bind_arguments_of,
    options_of,
    qualified_names,
    sequences_of,
    translation_of,
)
from pgtoolset.errors import OutsideReferenceError, TransactionStateError
from pgtoolset.transactions import get_transaction
from pgtoolset.types import Duration
from pgtoolset.values import Blocker, LockMode

__all__ = ["HasMetadata", "cleanup_tables"]

#: The costs of TRUNCATE and DELETE, measured; a factor of two in either decides nothing. TRUNCATE
#: takes a millisecond for each table, and must name every table that references one of them. In
#: that time DELETE empties so many pages of a table (8 kB each), or a part of a page where
#: PostgreSQL must look for each row in another table, at best through an index.
_PAGES_PER_TRUNCATE = 16
_PAGES_PER_TRUNCATE_REFERENCED = 1 / 8


class HasMetadata(Protocol):
    """An object with tables: a declarative base."""

    @property
    def metadata(self) -> MetaData: ...


async def cleanup_tables(
    session: AsyncSession,
    base: HasMetadata | MetaData,
    *,
    timeout: Duration | None = "5s",
) -> None:
    """Empty every table of `base.metadata`, restart its sequences, and commit.

    An open transaction of the session is rolled back first, and every object leaves the session.
    The options of the session's connection, such as `schema_translate_map`, hold for this call too.

    Only tables that are not empty are touched, and sequences that have moved: of a column that
    owns them, or has them in its default, unless a table outside of the metadata has them too.
    No user trigger fires. Where DELETE is refused and TRUNCATE is not, the table is truncated.

    A partitioned table stands for its partitions. The rows of an inheritance child stay unless the
    metadata has the child. Tables that the database lacks are skipped, and so are views and foreign
    tables.

    Args:
        session: an `AsyncSession` in any state, but not inside a block such as `session.begin()`.
        base: a declarative base, or a `MetaData`.
        timeout: how long to wait for each lock: seconds, a `timedelta`, or a number with a unit of
            PostgreSQL's settings such as `"500ms"`. `None` waits without limit.

    Raises:
        OutsideReferenceError: rows of a table outside of the metadata reference rows to delete; the
            error names the references. Nothing was touched.
        LockTimeoutError: another transaction is in the way; the error names the blockers. Nothing
            was touched.
        TransactionStateError: the session is inside a block such as `session.begin()`, which could
            not go on afterwards, or in AUTOCOMMIT; or a table was replaced during the call.
        ValueError, TypeError: an argument is not valid; raised before any SQL.

    Example:
        >>> await cleanup_tables(session, Base)

    See https://www.postgresql.org/docs/current/sql-truncate.html
    """
    sync = writable_session(session, "cleanup_tables")
    tables = list(metadata_of(base).tables.values())
    seconds = optional_seconds("timeout", timeout)
    bind_arguments: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if tables:
        bind_arguments = bind_arguments_of("base", sync, tables, _mappers_of(base))
        # Before the rollback, with which those of the session's connection end.
        bind = sync.get_bind(**bind_arguments)
        check_bind(bind)
        options = options_of(sync, bind)
    if is_in_block(sync):
        raise TransactionStateError(
            "cleanup_tables ends the transaction of its session, and this session is inside a "
            "block such as session.begin(): call it after the block, or with another session"
        )
    check_atomic(sync)
    await abandon(session)
    sync.expunge_all()
    if not tables:
        return
    try:
        async with get_transaction(session):
            await _Cleaning(sync, tables, seconds, bind_arguments, options).run()
    except _NothingToDo:
        pass


def _mappers_of(base: HasMetadata | MetaData) -> Iterable[Mapper[Any]]:
    found = getattr(base, "registry", None)
    return found.mappers if isinstance(found, registry) else ()


class _NothingToDo(Exception):
    """Rolls back a transaction that has only read."""


class _Cleaning:
    """One cleaning, in the transaction of its session."""

    def __init__(
        self,
        session: Session,
        tables: Sequence[Table],
        timeout: float | None,
        bind_arguments: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        self._session = session
        self._tables = tables
        self._timeout = timeout
        self._bind_arguments = bind_arguments
        self._options = options
        #: Until the tables to empty are known, all of them are wanted, for reading.
        self._wanted = Wanted("empty the tables", (), LockMode.ACCESS_SHARE.value)

    async def run(self) -> None:
        async with Lookout(self._timeout, holders=self._holders) as lookout:
            await greenlet_spawn(self._clean, lookout)

    async def _holders(self, outside: AsyncConnection, pid: int | None) -> list[Blocker]:
        mode = LockMode(self._wanted.mode)
        return await sessions_holding(outside, self._wanted.tables, mode, but=pid)

    def _clean(self, lookout: Lookout) -> None:
        """Find what to do, and do it. Runs in SQLAlchemy's greenlet."""
        connection = self._connection()
        translation = translation_of(self._session, connection)
        names = qualified_names(self._tables, connection.dialect, translation)
        sequences = qualified_names(sequences_of(self._tables), connection.dialect, translation)
        self._wanted.tables = names
        lookout.watch(connection, self._wanted)
        found = contents_of(connection, names, sequences, milliseconds(self._timeout))
        filled, moved = filled_and_moved(connection, found)
        if not filled and not moved:
            raise _NothingToDo
        plan = self._prepare(connection, found, filled) if filled else _Plan()
        emptying.empty(
            connection,
            truncated=plan.truncated,
            deleted=plan.deleted,
            reactions=plan.reactions,
            sequences=moved,
            settings=found.settings,
        )

    def _prepare(
        self, connection: Connection, found: Contents, filled: Sequence[Relation]
    ) -> _Plan:
        """Lock the tables that have rows, and decide how to empty them."""
        exclusive = any(_may_be_truncated(each, bool(found.published)) for each in filled)
        mode = LockMode.ACCESS_EXCLUSIVE if exclusive else LockMode.EXCLUSIVE
        self._lock(connection, filled, mode)
        # From here on no session adds a row to these tables, a foreign key, or a row that refers to
        # one of them.
        empty: list[Relation] = []
        while True:
            known = [*filled, *empty]
            details = emptying.details_of(connection, found.tables, found.partitioned, known)
            _refuse_replaced(details.replaced)
            plan, wanted = _plan_of(filled, details, found.published)
            more = wanted - {relation.oid for relation in known}
            if not more:
                break
            # Empty tables that PostgreSQL wants in the same TRUNCATE, and tables that refer to one.
            added = emptying.relations_of(connection, more)
            self._lock(connection, added, LockMode.ACCESS_EXCLUSIVE)
            empty += added
        _refuse(emptying.with_rows(connection, plan.from_outside))
        plan.truncated.extend(relation for relation in empty if relation.oid in wanted)
        return plan

    def _connection(self) -> Connection:
        """Return the session's connection, where each statement sees all that is committed."""
        if isinstance(self._session.get_bind(**self._bind_arguments), Engine):
            options = {**self._options, "isolation_level": "READ COMMITTED"}
            return self._session.connection(
                bind_arguments=self._bind_arguments, execution_options=options
            )
        return self._session.connection(bind_arguments=self._bind_arguments)

    def _lock(self, connection: Connection, tables: Sequence[Relation], mode: LockMode) -> None:
        ordered = sorted(tables, key=lambda relation: relation.name)
        self._wanted.mode = mode.value
        self._wanted.tables = [relation.name for relation in ordered]
        names = [relation.only for relation in ordered]
        send(connection, lock_block(names, mode, milliseconds(self._timeout)))


def _refuse(references: Sequence[Reference]) -> None:
    if references:
        labels = [reference.label for reference in references]
        raise OutsideReferenceError(
            "rows of tables outside of the metadata reference rows to delete: "
            f"{', '.join(labels)}. Nothing was deleted; empty those tables first, or add them to "
            "the metadata.",
            references=labels,
        )


def _refuse_replaced(names: Sequence[str]) -> None:
    if names:
        raise TransactionStateError(
            f"{', '.join(names)}: replaced by another table of that name while cleanup_tables "
            "waited for its lock. Nothing was deleted; call it again."
        )


def _may_be_truncated(relation: Relation, has_published: bool) -> bool:
    """Whether the lock on a table must allow TRUNCATE, or ALTER TABLE of its rules.

    It is taken before the foreign keys are known, because they are not certain without it. To take
    a stronger lock afterwards could be a deadlock with a transaction that reads the table.
    """
    if relation.has_rules or relation.is_for_truncate:
        return True
    if relation.is_referenced:
        return relation.pages > 1 or has_published
    return relation.pages > _PAGES_PER_TRUNCATE


@dataclass(slots=True)
class _Plan:
    """The tables to empty, and how.

    Attributes:
        truncated: tables for TRUNCATE, with every table that references them.
        deleted: tables for DELETE.
        from_outside: the foreign keys of other tables to these.
        reactions: the user's triggers and rules on these tables, which must not act.
    """

    truncated: list[Relation] = field(default_factory=list)
    deleted: list[Relation] = field(default_factory=list)
    from_outside: list[Reference] = field(default_factory=list)
    reactions: list[Reaction] = field(default_factory=list)


def _plan_of(
    filled: Sequence[Relation], details: Details, published: Collection[int]
) -> tuple[_Plan, set[int]]:
    """Choose TRUNCATE or DELETE for each table.

    Args:
        filled: the tables that have rows.
        details: of these.
        published: the oids of the tables where PostgreSQL may refuse a DELETE or an UPDATE.

    Returns:
        The plan, and the oids of all tables to truncate: with the filled ones, empty ones that
        refer to them.
    """
    graph = _Graph(details)
    # A DELETE writes into these too, though they may be empty.
    needed = {
        graph.top_of(each.referenced)
        for each in details.references
        if each.writes and graph.top_of(each.referencing) in published
    }
    needed |= {relation.oid for relation in filled if relation.is_for_truncate}
    truncated = _truncated(filled, graph, needed)
    emptied = {relation.oid for relation in filled}
    plan = _Plan(
        truncated=[relation for relation in filled if relation.oid in truncated],
        deleted=[relation for relation in filled if relation.oid not in truncated],
        from_outside=_from_outside(details.references, emptied, graph),
        reactions=[
            each
            for each in details.reactions
            if (top := graph.top_of(each.relation)) in truncated | emptied
            and (each.on_truncate if top in truncated else each.on_delete)
        ],
    )
    return plan, truncated


def _from_outside(
    references: Iterable[Reference], emptied: set[int], graph: _Graph
) -> list[Reference]:
    """Return the foreign keys to emptied tables of tables that the metadata does not have."""
    return [
        reference
        for reference in references
        if graph.top_of(reference.referenced) in emptied
        and graph.top_of(reference.referencing) is None
    ]


def _truncated(
    filled: Sequence[Relation], graph: _Graph, needed: Collection[int | None]
) -> set[int]:
    """Return the oids of the tables for which TRUNCATE is allowed, and needed or cheaper."""
    oids = {relation.oid for relation in filled}
    truncated: set[int] = set()
    for relation in filled:
        together = graph.truncated_with(relation.oid)
        # A TRUNCATE must not touch a table outside of the metadata; nor an empty one without need.
        if together is None:
            continue
        if relation.oid in needed or (
            together <= oids and graph.is_truncate_cheaper(relation, len(together - truncated))
        ):
            truncated |= together
    return truncated


class _Graph:
    """Which tables reference which. A partition counts as the table that it belongs to."""

    def __init__(self, details: Details) -> None:
        #: By the oid of a table or partition: the table of the metadata that it belongs to.
        self._tops = {
            oid: next(root for root in roots if details.roots[root] == {root})
            for oid, roots in details.roots.items()
        }
        #: By the oid of a table: the tables that reference it, `None` for those outside.
        self._referencing: dict[int, set[int | None]] = {}
        for reference in details.references:
            referenced = self._tops[reference.referenced]
            self._referencing.setdefault(referenced, set()).add(self.top_of(reference.referencing))

    def top_of(self, oid: int) -> int | None:
        """Return the table of the metadata that a relation belongs to; `None` for others."""
        return self._tops.get(oid)

    def truncated_with(self, oid: int) -> set[int] | None:
        """Return all tables that a TRUNCATE of one must name; `None` where one is outside."""
        found = {oid}
        waiting = [oid]
        while waiting:
            for referencing in self._referencing.get(waiting.pop(), ()):
                if referencing is None:
                    return None
                if referencing not in found:
                    found.add(referencing)
                    waiting.append(referencing)
        return found

    def is_truncate_cheaper(self, relation: Relation, tables: int) -> bool:
        """Whether a TRUNCATE of so many tables takes less time than a DELETE from this one."""
        if not self._referencing.get(relation.oid):
            return relation.pages > _PAGES_PER_TRUNCATE * tables
        return relation.pages > 1 and relation.pages >= _PAGES_PER_TRUNCATE_REFERENCED * tables
