"""Locks without a database: the real ones' arguments, conflicts, order, lifetimes and errors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from typing import Any, TypeVar

from sqlalchemy import FromClause, Table, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapper
from sqlalchemy.util import greenlet_spawn

from pgtoolset._arguments import (
    advisory_numbers,
    check_flag,
    check_mode,
    mapper_of,
    optional_seconds,
    parse_keys,
    sync_session,
    tables_of,
)
from pgtoolset._arguments import milliseconds as to_milliseconds
from pgtoolset._lifecycle import abandon
from pgtoolset._postgres.sqlstates import LOCK_NOT_AVAILABLE
from pgtoolset._postgres.tables import qualified_names
from pgtoolset._record import record_of
from pgtoolset.errors import LockTimeoutError
from pgtoolset.protocols import TransactionalSession
from pgtoolset.testing.doubles import _loading as loading
from pgtoolset.testing.doubles._locking import ALONE, TOGETHER, Hold, Request, Resource
from pgtoolset.testing.doubles._refusals import refusal
from pgtoolset.testing.doubles._store import Store
from pgtoolset.testing.doubles.database import MemoryDatabase
from pgtoolset.testing.doubles.session import MemorySession, MemorySyncSession
from pgtoolset.transactions import get_transaction
from pgtoolset.values import Blocker, LockMode, LockWait, RowLockMode

__all__ = ["MemoryLocks"]

S = TypeVar("S", bound=TransactionalSession)
M = TypeVar("M")

#: Of asyncpg, which it does not import.
_dialect = make_url("postgresql+asyncpg://").get_dialect()()
_dialect.default_schema_name = "public"

_APPLICATION = "MemorySession"


class MemoryLocks:
    """`lock_tables`, `advisory_lock`, `lock_rows` and `list_lock_waits` for sessions of a
    `MemoryDatabase`.

    Who holds what, who has to wait and when a lock ends is as in PostgreSQL; so are the arguments
    that are refused, and `LockTimeoutError` with its blockers, whose pid is the `number` of the
    session in the way. Writing, reading and flushing take their own locks, so a session waits for a
    table that another has locked.

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
        sync = sync_of(session)
        targets = tables_of(tables)
        lock_mode = check_mode(LockMode, mode)
        check_flag("nowait", nowait)
        milliseconds = to_milliseconds(optional_seconds("timeout", timeout))
        return _table_block(session, sync, targets, lock_mode, 0 if nowait else milliseconds)

    def advisory_lock(
        self,
        session: AsyncSession,
        key: int | tuple[int, int] | str,
        *,
        shared: bool = False,
        nowait: bool = False,
        timeout: float | timedelta | str | None = None,
    ) -> AbstractAsyncContextManager[bool]:
        """As `pgtoolset.advisory_lock`."""
        sync = sync_of(session)
        numbers = advisory_numbers("key", key)
        check_flag("shared", shared)
        check_flag("nowait", nowait)
        milliseconds = to_milliseconds(optional_seconds("timeout", timeout))
        return _advisory_block(
            session, sync, key, numbers, TOGETHER if shared else ALONE, nowait, milliseconds
        )

    async def lock_rows(
        self,
        session: AsyncSession,
        model: type[M],
        pks: Iterable[Any],
        *,
        mode: RowLockMode | str = RowLockMode.UPDATE,
        skip_locked: bool = False,
        nowait: bool = False,
        timeout: float | timedelta | str | None = None,
    ) -> Sequence[M]:
        """As `pgtoolset.lock_rows`."""
        sync = sync_of(session)
        mapper = mapper_of(model)
        keys = parse_keys("pks", mapper, pks)
        lock_mode = check_mode(RowLockMode, mode)
        check_flag("skip_locked", skip_locked)
        check_flag("nowait", nowait)
        if skip_locked and nowait:
            raise ValueError("skip_locked and nowait exclude each other")
        milliseconds = to_milliseconds(optional_seconds("timeout", timeout))
        limit = 0 if nowait else milliseconds
        if not keys:
            return []
        if session.in_transaction() and limit is not None:
            async with get_transaction(session):
                return await _lock_rows(session, sync, mapper, keys, lock_mode, skip_locked, limit)
        fresh = not session.in_transaction()
        try:
            return await _lock_rows(session, sync, mapper, keys, lock_mode, skip_locked, limit)
        except LockTimeoutError:
            if fresh:
                await abandon(session)
            raise

    async def list_lock_waits(
        self, connection_or_session: AsyncSession | MemoryDatabase
    ) -> Sequence[LockWait]:
        """As `pgtoolset.list_lock_waits`, of a `MemorySession` or a `MemoryDatabase`."""
        if isinstance(connection_or_session, MemorySession):
            store = sync_of(connection_or_session).work.store
        elif isinstance(connection_or_session, MemoryDatabase):
            store = connection_or_session.store
        else:
            raise TypeError(
                f"connection_or_session must be a MemorySession or a MemoryDatabase, not {connection_or_session!r}"
            )
        waits = [request for request in store.locks.queue if not request.granted.done()]
        return [_told(store, request) for request in sorted(waits, key=lambda each: each.since)]


def sync_of(session: Any) -> MemorySyncSession:
    """The `Session` inside a `MemorySession`; the errors for everything else are those of the real
    functions."""
    sync = sync_session(session)
    if not isinstance(sync, MemorySyncSession):
        raise TypeError(
            f"session must be a MemorySession, which has a double's locks, not {session!r}"
        )
    return sync


@asynccontextmanager
async def _table_block(
    session: Any,
    sync: MemorySyncSession,
    tables: Sequence[Table],
    mode: LockMode,
    milliseconds: int | None,
) -> AsyncIterator[Any]:
    async with get_transaction(session):
        names = qualified_names(tables, _dialect, {})
        what = f"LOCK TABLE {', '.join(names)} IN {mode.value} MODE"
        await greenlet_spawn(sync.statement, what)
        ordered = sorted(
            set(tables), key=lambda table: (str(table.schema or "public"), str(table.name))
        )
        lock = _Lock(
            sync, f"lock {', '.join(names)} in {mode.value} mode", names, mode, milliseconds
        )
        for table in ordered:
            await lock.take(("table", table))
        sync.work.log(what)
        yield session


@asynccontextmanager
async def _advisory_block(
    session: Any,
    sync: MemorySyncSession,
    key: Any,
    numbers: tuple[int, ...],
    mode: str,
    nowait: bool,
    milliseconds: int | None,
) -> AsyncIterator[bool]:
    hold: Hold | None = None
    resource: Resource = ("advisory", numbers)
    try:
        async with get_transaction(session):
            what = f"take the advisory lock {key!r} in {mode} mode"
            await greenlet_spawn(sync.statement, what)
            if nowait and sync.work.store.locks.in_the_way(sync.work.number, resource, mode):
                yield False
            else:
                hold = await _Lock(sync, what, (), mode, milliseconds).take(resource)
                sync.work.log(f"ADVISORY LOCK {key!r}")
                yield True
    finally:
        if hold is not None:
            sync.work.store.locks.release(hold)


async def _lock_rows(
    session: Any,
    sync: MemorySyncSession,
    mapper: Mapper[Any],
    keys: list[tuple[Any, ...]],
    mode: RowLockMode,
    skip_locked: bool,
    milliseconds: int | None,
) -> Sequence[Any]:
    await session.flush()
    name = (
        mapper.local_table.fullname
        if isinstance(mapper.local_table, Table)
        else str(mapper.local_table)
    )
    what = f"lock {len(keys)} row{'s' * (len(keys) != 1)} of {name} in {mode.value} mode"
    await greenlet_spawn(sync.statement, what)
    work, locks = sync.work, sync.work.store.locks
    lock = _Lock(sync, what, [name], mode, milliseconds)
    for table in mapper.tables:
        await _Lock(sync, what, [name], LockMode.ROW_SHARE, milliseconds).take(("table", table))
    rows = []
    for key in _in_order(keys):
        places = loading.rows_of(work, mapper, key)
        if skip_locked and any(
            locks.in_the_way(work.number, ("row", *place), mode) for place in places
        ):
            continue
        for place in places:
            await lock.take(("row", *place))
        instance = loading.load(sync, mapper, key, populate_existing=True)
        if instance is not None:
            rows.append(instance)
    work.log(
        f"LOCK {name} {[key[0] if len(key) == 1 else key for key in _in_order(keys)]!r} FOR {mode.value}"
    )
    return rows


class _Lock:
    """What is asked for, and one budget of time for all of it."""

    def __init__(
        self,
        sync: MemorySyncSession,
        what: str,
        tables: Sequence[str],
        mode: str,
        milliseconds: int | None,
    ) -> None:
        self._sync = sync
        self._store: Store = sync.work.store
        self._what = what
        self._tables = tables
        self._mode = mode
        self._seconds = None if milliseconds is None else milliseconds / 1000
        self._began = self._store.clock.time()

    async def take(self, resource: Resource) -> Hold:
        work, locks = self._sync.work, self._store.locks
        hold = locks.take(work.number, resource, self._mode, work.depth)
        if hold is not None:
            return hold
        if self._seconds == 0:
            blockers = locks.in_the_way(work.number, resource, self._mode)
        else:
            left = (
                None
                if self._seconds is None
                else max(0.0, self._began + self._seconds - self._store.clock.time())
            )
            try:
                found = await locks.wait(work.number, resource, self._mode, work.depth, left)
            except DBAPIError as error:
                self._sync.refused(error)
            if isinstance(found, Hold):
                return found
            blockers = found
        raise self._timed_out(blockers)

    def _timed_out(self, owners: list[int]) -> LockTimeoutError:
        cause = refusal(LOCK_NOT_AVAILABLE, "could not obtain lock", self._what)
        record_of(self._sync).saw(cause)
        self._sync.work.aborted = True
        blockers = [_blocker(self._store, owner) for owner in owners]
        verb = "is" if len(blockers) == 1 else "are"
        within = f"within {self._seconds:g} s" if self._seconds else "without waiting"
        error = LockTimeoutError(
            f"Could not {self._what} {within}: in the way {verb} {'; '.join(map(str, blockers))}. "
            "End that first, or wait longer (timeout).",
            tables=self._tables,
            mode=str(self._mode),
            timeout=self._seconds or 0,
            blockers=blockers,
        )
        error.__cause__ = cause
        return error


def _blocker(store: Store, owner: int) -> Blocker:
    work = store.works.get(owner)
    age = None if work is None else timedelta(seconds=store.clock.time() - work.began)
    waits = any(request.owner == owner for request in store.locks.queue)
    return Blocker(
        owner, _APPLICATION, "active" if waits else "idle in transaction", _query(store, owner), age
    )


def _query(store: Store, owner: int) -> str | None:
    return next((event.what for event in reversed(store.log) if event.session == owner), None)


def _told(store: Store, request: Request) -> LockWait:
    table: Any = request.resource[1] if request.resource[0] == "table" else None
    return LockWait(
        pid=request.owner,
        blocked_by=store.locks.in_the_way(request.owner, request.resource, request.mode),
        relation=None if table is None else qualified_names([table], _dialect, {None: "public"})[0],
        mode=str(request.mode),
        waiting_for=timedelta(seconds=store.clock.time() - request.since),
        application_name=_APPLICATION,
        query=_query(store, request.owner),
    )


def _in_order(keys: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    once = list(dict.fromkeys(keys))
    try:
        return sorted(once)
    except TypeError:  # values without an order, such as enums
        return sorted(once, key=repr)
