"""`cleanup_tables`: empty every table of a metadata, restart its sequences, spare the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from sqlalchemy import Connection, Engine, MetaData
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
from pgtoolset._postgres.choosing import Limits, Plan, may_be_truncated, plan_of, too_many_rows
from pgtoolset._postgres.contents import (
    Contents,
    Relation,
    contents_of,
    filled_and_moved,
    flags,
)
from pgtoolset._postgres.emptying import Details, Reference
from pgtoolset._postgres.inventory import inventory_of
from pgtoolset._postgres.locks import lock_block, sessions_holding
from pgtoolset._postgres.lookout import Lookout, Wanted
from pgtoolset._postgres.sending import send
from pgtoolset._postgres.tables import (
    bind_arguments_of,
    options_of,
    translation_of,
)
from pgtoolset.errors import OutsideReferenceError, TransactionStateError
from pgtoolset.transactions import get_transaction
from pgtoolset.types import Duration
from pgtoolset.values import Blocker, LockMode

__all__ = ["HasMetadata", "cleanup_tables"]


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
    No user trigger fires. Where DELETE is refused and TRUNCATE is not, the table is truncated, and
    empty ones that reference it. So are many rows that others reference without an index.

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
    metadata = metadata_of(base)
    tables = list(metadata.tables.values())
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
            await _Cleaning(sync, metadata, seconds, bind_arguments, options).run()
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
        metadata: MetaData,
        timeout: float | None,
        bind_arguments: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        self._session = session
        self._metadata = metadata
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
        inventory = inventory_of(self._metadata, connection.dialect, translation)
        self._wanted.tables = inventory.names
        lookout.watch(connection, self._wanted)
        found = contents_of(connection, inventory, milliseconds(self._timeout))
        filled, moved = filled_and_moved(connection, found)
        if not filled and not moved:
            raise _NothingToDo
        plan = self._prepare(connection, found, filled) if filled else Plan()
        settings = found.settings
        if plan.reads_all:
            settings = settings | emptying.unchecked(connection)
        emptying.empty(
            connection,
            truncated=plan.truncated,
            deleted=plan.deleted,
            reactions=plan.reactions,
            sequences=moved,
            settings=settings,
            keeps_plans=plan.keeps_plans,
        )

    def _prepare(self, connection: Connection, found: Contents, filled: Sequence[Relation]) -> Plan:
        """Lock the tables that have rows, and decide how to empty them."""
        largest = max(relation.pages for relation in found.candidates)
        exclusive = any(may_be_truncated(each, bool(found.published), largest) for each in filled)
        mode = LockMode.ACCESS_EXCLUSIVE if exclusive else LockMode.EXCLUSIVE
        self._lock(connection, filled, mode)
        # From here on no session adds a row to these tables, a foreign key, or a row that refers to
        # one of them.
        refused = frozenset(each.oid for each in filled if not each.allows_truncate)
        limits = Limits(found.published, refused)
        details = self._details(connection, found, filled, has_sizes=exclusive)
        if exclusive and too_many_rows(filled, details, limits):
            limits, details = _costly(connection, found, filled, limits)
        empty: list[Relation] = []
        while True:
            plan, wanted = plan_of(filled, details, limits)
            more = wanted - {relation.oid for relation in (*filled, *empty)}
            if not more:
                break
            # Empty tables that PostgreSQL wants in the same TRUNCATE, and tables that refer to one.
            added = emptying.relations_of(connection, more)
            more_refused = {each.oid for each in added if not each.allows_truncate}
            if more_refused:
                limits = replace(limits, spared=limits.spared | more_refused)
                continue
            self._lock(connection, added, LockMode.ACCESS_EXCLUSIVE)
            empty += added
            details = self._details(connection, found, [*filled, *empty], has_sizes=exclusive)
        _refuse(emptying.with_rows(connection, plan.from_outside))
        plan.truncated.extend(relation for relation in empty if relation.oid in wanted)
        return plan

    def _details(
        self,
        connection: Connection,
        found: Contents,
        known: Sequence[Relation],
        *,
        has_sizes: bool,
    ) -> Details:
        details = emptying.details_of(
            connection, found.tables, found.partitioned, known, has_sizes=has_sizes
        )
        _refuse_replaced(details.replaced)
        return details

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


def _costly(
    connection: Connection, found: Contents, filled: Sequence[Relation], limits: Limits
) -> tuple[Limits, Details]:
    """Look which tables have too many rows to delete, with the details of the whole metadata.

    So many tables may have to be truncated with one of them.
    """
    others = set(found.tables) - {relation.oid for relation in filled}
    details = emptying.details_of(connection, found.tables, found.partitioned, filled, others)
    suspected = too_many_rows(filled, details, limits)
    asked = [f"EXISTS (SELECT FROM {each.only} OFFSET {n - 1})" for each, n in suspected.items()]
    answers = flags(connection, asked)
    costly = {each.oid for each, has in zip(suspected, answers, strict=True) if has}
    return replace(limits, costly=frozenset(costly)), details


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
