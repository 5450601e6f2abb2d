"""Locks in memory: PostgreSQL's modes, conflicts, lifetimes and errors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

from sqlalchemy import FromClause, Table
from sqlalchemy.dialects import postgresql

from pgtoolset._arguments import (
    advisory_numbers,
    check_at_most_one,
    check_flag,
    check_mode,
    mapper_of,
    milliseconds,
    optional_seconds,
    parse_keys,
    shown,
    tables_of,
)
from pgtoolset._lifecycle import abandon
from pgtoolset._postgres.sqlstates import LOCK_NOT_AVAILABLE
from pgtoolset._postgres.tables import qualified_names
from pgtoolset.errors import LockTimeoutError
from pgtoolset.protocols import TransactionalSession
from pgtoolset.testing.doubles import _rows as rows
from pgtoolset.testing.doubles._locking import Request, Resource
from pgtoolset.testing.doubles._refusals import database_error
from pgtoolset.testing.doubles._work import Store, Work
from pgtoolset.testing.doubles.database import MemoryDatabase
from pgtoolset.testing.doubles.session import work_of
from pgtoolset.transactions import get_transaction
from pgtoolset.values import Blocker, LockMode, LockWait, RowLockMode

__all__ = ["MemoryLocks"]

S = TypeVar("S", bound=TransactionalSession)
M = TypeVar("M")

_new_dialect: Any = postgresql.dialect
_dialect = _new_dialect()
_dialect.default_schema_name = "public"

_APPLICATION = "MemorySession"


class MemoryLocks:
    """`lock_tables`, `advisory_lock`, `lock_rows` and `list_lock_waits` on a `MemoryDatabase`.

    Sessions wait for one another as in PostgreSQL, and a lock ends when PostgreSQL would end it. A
    `LockTimeoutError` has the blockers; their pid is the `number` of the session. A deadlock is an
    error with SQLSTATE 40P01. `put`, `remove` and the writes of `MemoryAssociations` take locks of
    their own; what `execute` records takes none.

    Example:
        >>> database, locks = MemoryDatabase(), MemoryLocks()
        >>> async with locks.lock_tables(database.session(), [Account], mode="SHARE"):
        ...     try:
        ...         async with locks.lock_tables(database.session(), [Account], nowait=True): ...
        ...     except LockTimeoutError as error:
        ...         blocker = error.blockers[0].pid
        >>> assert blocker == 1  # the first session
    """

    def lock_tables(
        self,
        session: S,
        tables: Iterable[type[Any] | FromClause],
        *,
        mode: LockMode | str = LockMode.SHARE_UPDATE_EXCLUSIVE,
        timeout: float | timedelta | str | None = "5s",
        nowait: bool = False,
    ) -> AbstractAsyncContextManager[S]:
        """As `pgtoolset.lock_tables`."""
        work = work_of(session)
        targets = tables_of(tables)
        lock_mode = check_mode(LockMode, mode)
        check_flag("nowait", nowait)
        limit = _limit(timeout, nowait)
        names = qualified_names(targets, _dialect, {})
        what = f"lock {', '.join(names)} in {lock_mode.value} mode"
        wanted = _Wanted(work, what, names, lock_mode, limit)
        return _table_block(session, wanted, targets)

    def advisory_lock(
        self,
        session: TransactionalSession,
        key: int | tuple[int, int] | str,
        *,
        shared: bool = False,
        nowait: bool = False,
        timeout: float | timedelta | str | None = None,
    ) -> AbstractAsyncContextManager[bool]:
        """As `pgtoolset.advisory_lock`."""
        work = work_of(session)
        numbers = advisory_numbers("key", key)
        check_flag("shared", shared)
        check_flag("nowait", nowait)
        limit = _limit(timeout, nowait)
        mode = "SHARE" if shared else "EXCLUSIVE"
        what = f"take the advisory lock {shown(key)} in {mode} mode"
        wanted = _Wanted(work, what, (), mode, limit)
        return _advisory_block(session, wanted, ("advisory", numbers))

    async def lock_rows(
        self,
        session: TransactionalSession,
        model: type[M],
        pks: Iterable[Any],
        *,
        mode: RowLockMode | str = RowLockMode.UPDATE,
        skip_locked: bool = False,
        nowait: bool = False,
        timeout: float | timedelta | str | None = None,
    ) -> Sequence[M]:
        """As `pgtoolset.lock_rows`, for rows that were put.

        In place of instances it returns read-only rows, which have the key and the values that were
        put. They are ordered by their keys as Python orders them.
        """
        work = work_of(session)
        mapper = mapper_of(model)
        keys = parse_keys("pks", mapper, pks)
        lock_mode = check_mode(RowLockMode, mode)
        check_at_most_one(skip_locked=skip_locked, nowait=nowait)
        limit = _limit(timeout, nowait)
        if not keys:
            return []
        places = [(rows.table_of(mapper), key) for key in dict.fromkeys(keys)]
        names = [rows.table_of(mapper).fullname]
        what = (
            f"lock {len(keys)} row{'s' * (len(keys) != 1)} of {names[0]} in {lock_mode.value} mode"
        )
        wanted = _Wanted(work, what, names, lock_mode, limit)
        fresh = not session.in_transaction()
        try:
            if fresh or (limit is None and not skip_locked):
                found = await _lock_rows(wanted, model, rows.in_order(places), skip_locked)
            else:
                async with get_transaction(session):
                    found = await _lock_rows(wanted, model, rows.in_order(places), skip_locked)
        except LockTimeoutError:
            if fresh:
                await abandon(session)
            raise
        return cast("Sequence[M]", found)

    async def list_lock_waits(self, connection_or_session: object) -> Sequence[LockWait]:
        """As `pgtoolset.list_lock_waits`, of a `MemorySession` or a `MemoryDatabase`."""
        if isinstance(connection_or_session, MemoryDatabase):
            store = connection_or_session._store
        else:
            store = work_of(connection_or_session).store
        return [_wait(store, request) for request in store.locks.waiting]


def _limit(timeout: object, nowait: bool) -> float | None:
    """The seconds to wait, as PostgreSQL counts them: whole milliseconds."""
    limit = milliseconds(optional_seconds("timeout", timeout))
    return 0 if nowait else None if limit is None else limit / 1000


class _Wanted:
    """A lock that a call asks for, with one budget of time for all that it needs."""

    def __init__(
        self, work: Work, what: str, tables: Sequence[str], mode: str, limit: float | None
    ) -> None:
        self.work = work
        self.what = what
        self.mode = mode
        self.limit = limit
        self._tables = tables

    def begin(self) -> None:
        self.work.statement(self.what[0].upper() + self.what[1:])
        self._began = self.work.store.clock.time()

    async def take(
        self, resource: Resource, mode: str | None = None, *, nowait: bool = False
    ) -> None:
        left = 0 if nowait else self.limit
        if left:
            left = max(1e-3, self._began + left - self.work.store.clock.time())
        blockers = await self.work.lock(resource, mode or self.mode, left)
        if blockers:
            raise self._timed_out(blockers)

    def _timed_out(self, owners: list[int]) -> LockTimeoutError:
        store = self.work.store
        blockers = [_blocker(store, owner) for owner in owners]
        within = f"within {self.limit:g} s" if self.limit else "without waiting"
        error = LockTimeoutError(
            f"could not {self.what} {within}: blocked by {'; '.join(map(str, blockers))}; "
            "end that transaction first, or wait longer (timeout)",
            tables=self._tables,
            mode=str(self.mode),
            timeout=self.limit or 0,
            blockers=blockers,
        )
        error.__cause__ = database_error(LOCK_NOT_AVAILABLE, "could not obtain lock", self.what)
        return error


@asynccontextmanager
async def _table_block(
    session: Any, wanted: _Wanted, tables: Sequence[Table]
) -> AsyncIterator[Any]:
    async with get_transaction(session):
        wanted.begin()
        # The global order of `qualified_names`.
        for table in sorted(tables, key=lambda each: (each.schema or "public", each.name)):
            await wanted.take(("table", table))
        yield session


@asynccontextmanager
async def _advisory_block(session: Any, wanted: _Wanted, resource: Resource) -> AsyncIterator[bool]:
    async with get_transaction(session):
        wanted.begin()
        work = wanted.work
        is_free = not work.store.locks.blockers(work.number, resource, wanted.mode)
        if is_free or wanted.limit != 0:
            await wanted.take(resource)
        yield is_free or wanted.limit != 0


async def _lock_rows(
    wanted: _Wanted, model: type[Any], places: list[Any], skip_locked: bool
) -> list[Any]:
    wanted.begin()
    work = wanted.work
    for table in tables_of([model]):
        await wanted.take(("table", table), LockMode.ROW_SHARE, nowait=skip_locked)
    found = []
    for place in places:
        resource = ("row", *place)
        is_blocked = bool(work.store.locks.blockers(work.number, resource, wanted.mode))
        if rows.find(work, model, place) is None or (skip_locked and is_blocked):
            continue
        await wanted.take(resource)
        row = rows.find(work, model, place)  # as the session that held the lock left it
        if row is not None:
            found.append(row)
    return found


def _blocker(store: Store, owner: int) -> Blocker:
    work = store.open.get(owner)
    age = None if work is None else timedelta(seconds=store.clock.time() - work.began)
    waits = any(request.owner == owner for request in store.locks.waiting)
    state = "active" if waits else "idle in transaction"
    return Blocker(owner, _APPLICATION, state, _query(store, owner), age)


def _query(store: Store, owner: int) -> str | None:
    return next((event.what for event in reversed(store.log) if event.session == owner), None)


def _wait(store: Store, request: Request) -> LockWait:
    table: Any = request.resource[1] if request.resource[0] == "table" else None
    return LockWait(
        pid=request.owner,
        blocked_by=store.locks.blockers(request.owner, request.resource, request.mode),
        relation=None if table is None else qualified_names([table], _dialect, {None: "public"})[0],
        mode=str(request.mode),
        waiting_for=timedelta(seconds=store.clock.time() - request.since),
        application_name=_APPLICATION,
        query=_query(store, request.owner),
    )
