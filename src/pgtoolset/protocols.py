"""The contracts of pgtoolset as typed protocols.

A double of yours satisfies a protocol by its shape and imports nothing from here:

    class RecordingSession:
        def in_transaction(self) -> bool: ...
        def begin(self) -> AbstractAsyncContextManager[object]: ...
        def begin_nested(self) -> AbstractAsyncContextManager[object]: ...

is a `TransactionalSession`, and `get_transaction` works with it.

The protocols of locks, watching and many-to-many have the public functions as their methods, with
the same parameters and types. The package itself satisfies them, and so do the doubles of
`pgtoolset.testing`:

    class Till:
        def __init__(self, locks: TableLocker = pgtoolset) -> None: ...

This module imports no implementation.
"""

from __future__ import annotations

from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

from pgtoolset._row_protocols import AssociationRows, RowComparator
from pgtoolset.events import Observer
from pgtoolset.types import (
    AdvisoryKey,
    ColumnAttribute,
    Duration,
    LockModeSpelling,
    LockWaitSource,
    ManyToMany,
    PrimaryKeys,
    Related,
    RowLockModeSpelling,
    TableTarget,
)
from pgtoolset.values import LockWait, M2MChange, RowChange

__all__ = [
    "AdvisoryLocker",
    "AssociationRows",
    "AssociationWriter",
    "ChangeStream",
    "ChangeWaiter",
    "DatabaseContext",
    "DatabaseDependency",
    "LockObserver",
    "ManagedSession",
    "Observer",
    "RowComparator",
    "RowLocker",
    "SessionFactory",
    "StartableTransaction",
    "TableLocker",
    "TransactionalSession",
    "Watcher",
]

S = TypeVar("S", bound="TransactionalSession")
M = TypeVar("M")
M_co = TypeVar("M_co", covariant=True)
S_co = TypeVar("S_co", covariant=True)


class TransactionalSession(Protocol):
    """A session whose transactions nest: all that `get_transaction` needs.

    SQLAlchemy's `AsyncSession` satisfies it. An `async_scoped_session` does not: call it, and pass
    the session that it returns.
    """

    def in_transaction(self) -> bool:
        """Whether a transaction has begun, with or without a connection."""
        ...

    def begin(self) -> AbstractAsyncContextManager[Any]:
        """Return a block that is a transaction: its end commits, an exception rolls back."""
        ...

    def begin_nested(self) -> AbstractAsyncContextManager[Any]:
        """Return a block that is a savepoint: its end releases it, an exception rolls it back."""
        ...


class StartableTransaction(Protocol):
    """What `ManagedSession.begin` returns: a block, or, awaited, a transaction that the methods of
    the session end."""

    def __await__(self) -> Generator[Any, None, Any]: ...

    async def __aenter__(self) -> Any: ...

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> bool | None: ...


class ManagedSession(Protocol):
    """A `TransactionalSession` that its owner commits and closes: what a `SessionFactory` makes."""

    def in_transaction(self) -> bool: ...

    def begin(self) -> StartableTransaction: ...

    def begin_nested(self) -> AbstractAsyncContextManager[Any]: ...

    def commit(self) -> Awaitable[None]:
        """Commit the open transaction; without one, do nothing."""
        ...

    def rollback(self) -> Awaitable[None]:
        """Roll back the open transaction; without one, do nothing."""
        ...

    def close(self) -> Awaitable[None]:
        """Give the connection back. The session is not used again."""
        ...


class SessionFactory(Protocol[S_co]):
    """Makes a new session at each call. `async_sessionmaker` is one."""

    def __call__(self) -> S_co: ...


class DatabaseDependency(Protocol[S_co]):
    """What `create_db_dependency` returns: a FastAPI dependency and plain async generator function.

    See https://fastapi.tiangolo.com/tutorial/dependencies/dependencies-with-yield/
    """

    def __call__(self) -> AsyncGenerator[S_co, None]: ...


class DatabaseContext(Protocol[S_co]):
    """What `create_db_context` returns: each call opens one unit of work."""

    def __call__(self) -> AbstractAsyncContextManager[S_co]: ...


class TableLocker(Protocol):
    """Locks tables for a block. See `pgtoolset.lock_tables`."""

    def lock_tables(
        self,
        session: S,
        tables: Iterable[TableTarget],
        *,
        mode: LockModeSpelling = ...,
        timeout: Duration | None = ...,
        nowait: bool = ...,
    ) -> AbstractAsyncContextManager[S]:
        """Return a block that holds `mode` on all of `tables`.

        Raises:
            LockTimeoutError: a lock could not be acquired in time.
        """
        ...


class AdvisoryLocker(Protocol):
    """Locks a key whose meaning only the application knows. See `pgtoolset.advisory_lock`."""

    def advisory_lock(
        self,
        session: AsyncSession,
        key: AdvisoryKey,
        *,
        shared: bool = ...,
        nowait: bool = ...,
        timeout: Duration | None = ...,
    ) -> AbstractAsyncContextManager[bool]:
        """Return a block that holds the lock on `key`.

        It yields `True`; with `nowait`, `False` where another session holds the lock.

        Raises:
            LockTimeoutError: the lock could not be acquired in time.
        """
        ...


class RowLocker(Protocol):
    """Locks rows until the transaction ends. See `pgtoolset.lock_rows`."""

    async def lock_rows(
        self,
        session: AsyncSession,
        model: type[M],
        pks: PrimaryKeys,
        *,
        mode: RowLockModeSpelling = ...,
        skip_locked: bool = ...,
        nowait: bool = ...,
        timeout: Duration | None = ...,
    ) -> Sequence[M]:
        """Return the instances that were found and locked, in key order, with the values as locked.

        Raises:
            LockTimeoutError: a row could not be locked in time.
        """
        ...


class LockObserver(Protocol):
    """Lists which session waits for which. See `pgtoolset.list_lock_waits`."""

    async def list_lock_waits(self, connection_or_session: LockWaitSource) -> Sequence[LockWait]:
        """Return every session of the database that waits for a lock now."""
        ...


class ChangeWaiter(Protocol):
    """Waits until a row has changed. See `pgtoolset.wait_for_row_change`."""

    async def wait_for_row_change(
        self,
        session: AsyncSession,
        model: type[M],
        pk_value: Any,
        *,
        columns: Iterable[ColumnAttribute] | None = ...,
        interval: Duration = ...,
        timeout: Duration | None = ...,
        until: Callable[[M], bool] | None = ...,
        baseline: M | Mapping[str, Any] | None = ...,
    ) -> M:
        """Return the row as an instance in the caller's session, with the new values.

        Raises:
            RowNotFoundError: there is no such row.
            RowDeletedError: the row was deleted meanwhile.
            WaitTimeoutError: the row did not change in time.
        """
        ...


class ChangeStream(Protocol[M_co]):
    """The changes of one row, as an async iterator and as a block. See `Watcher.changes`.

    Entering the block waits until the row was looked at once, so that `current` is known and no
    later change is missed. Leaving it ends the watching.
    """

    @property
    def current(self) -> Mapping[str, Any] | None:
        """The row as it was given last, or found first; `None` where it does not exist."""
        ...

    def __aiter__(self) -> AsyncIterator[RowChange[M_co]]: ...

    def __anext__(self) -> Awaitable[RowChange[M_co]]: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> bool | None: ...

    async def aclose(self) -> None:
        """Stop watching; the iteration ends."""
        ...


class Watcher(Protocol):
    """Serves any number of waiters at once. See `pgtoolset.RowWatcher`."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> bool | None: ...

    async def close(self) -> None:
        """Stop watching. Each waiter gets a `WatcherClosedError`. A second call does nothing."""
        ...

    async def wait(
        self,
        model: type[M],
        pk_value: Any,
        *,
        columns: Iterable[ColumnAttribute] | None = ...,
        timeout: Duration | None = ...,
        until: Callable[[M], bool] | None = ...,
        baseline: M | Mapping[str, Any] | None = ...,
    ) -> RowChange[M]:
        """Return the next change of the row.

        Raises:
            RowNotFoundError: there is no such row.
            WaitTimeoutError: the row did not change in time.
            WatcherClosedError: the watcher is not open, or was closed meanwhile.
        """
        ...

    def changes(
        self, model: type[M], pk_value: Any, *, columns: Iterable[ColumnAttribute] | None = ...
    ) -> ChangeStream[M]:
        """Return every change of the row from now on. Changes that wait to be read are merged."""
        ...


class AssociationWriter(Protocol):
    """Writes the rows of association tables. See `pgtoolset.m2m_add` and its siblings."""

    async def m2m_add(
        self,
        session: AsyncSession,
        instance: Any,
        rel_attr: ManyToMany[Related],
        *related: Related,
        pks: PrimaryKeys = ...,
        ignore_conflicts: bool = ...,
        values: Mapping[str, Any] | None = ...,
    ) -> int:
        """Associate `instance` with each of `related` and `pks`; return the rows added."""
        ...

    async def m2m_remove(
        self,
        session: AsyncSession,
        instance: Any,
        rel_attr: ManyToMany[Related],
        *related: Related,
        pks: PrimaryKeys = ...,
    ) -> int:
        """Delete these associations where they exist; return the number of rows deleted."""
        ...

    async def m2m_set(
        self,
        session: AsyncSession,
        instance: Any,
        rel_attr: ManyToMany[Related],
        *related: Related,
        pks: PrimaryKeys = ...,
        values: Mapping[str, Any] | None = ...,
        keep_existing: bool = ...,
    ) -> M2MChange:
        """Make the associations of `instance` exactly these; return how many came and went."""
        ...

    async def m2m_add_many(
        self,
        session: AsyncSession,
        rel_attr: ManyToMany[Any],
        links: Iterable[tuple[Any, Any]],
        *,
        ignore_conflicts: bool = ...,
        values: Mapping[str, Any] | None = ...,
    ) -> int:
        """Associate every pair of owner and related; return the number of rows added."""
        ...
