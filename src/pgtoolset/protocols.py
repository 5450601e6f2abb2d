"""The contracts. This module imports no implementation, so a double of yours needs nothing but it.

    class RecordingSession:
        def in_transaction(self) -> bool: ...
        def begin(self) -> AbstractAsyncContextManager[object]: ...
        def begin_nested(self) -> AbstractAsyncContextManager[object]: ...

is a `TransactionalSession`, and `get_transaction` works with it.

The contracts of locks, watching and many-to-many have the public functions as their methods. The
package itself satisfies them, and so do the doubles of `pgtoolset.testing`:

    class Till:
        def __init__(self, locks: TableLocker = pgtoolset) -> None: ...
"""

from __future__ import annotations

from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from pgtoolset.values import LockMode, LockWait, M2MChange, RowChange, RowLockMode

__all__ = [
    "AdvisoryLocker",
    "AssociationRows",
    "AssociationWriter",
    "ChangeWaiter",
    "DatabaseContext",
    "DatabaseDependency",
    "LockObserver",
    "ManagedSession",
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
S_co = TypeVar("S_co", covariant=True)


class TransactionalSession(Protocol):
    """A session whose transactions nest: all that `get_transaction` asks for.

    SQLAlchemy's `AsyncSession` satisfies it; of an `async_scoped_session` it is the session that a
    call of it gives.
    """

    def in_transaction(self) -> bool:
        """Whether a transaction has begun, with or without a connection."""
        ...

    def begin(self) -> AbstractAsyncContextManager[Any]:
        """A block that is a transaction: committed at its end, rolled back by an exception."""
        ...

    def begin_nested(self) -> AbstractAsyncContextManager[Any]:
        """A block that is a savepoint: released at its end, rolled back by an exception."""
        ...


class StartableTransaction(Protocol):
    """What `ManagedSession.begin` returns: a block, or awaited, a transaction that the session's
    methods end."""

    def __await__(self) -> Any: ...

    async def __aenter__(self) -> Any: ...

    async def __aexit__(self, exc_type: Any, exc: Any, traceback: Any, /) -> Any: ...


class ManagedSession(Protocol):
    """A `TransactionalSession` that can also be ended and closed from outside: what a
    `SessionFactory` makes."""

    def in_transaction(self) -> bool: ...

    def begin(self) -> StartableTransaction: ...

    def begin_nested(self) -> AbstractAsyncContextManager[Any]: ...

    def commit(self) -> Awaitable[None]:
        """Commit what is open; nothing to commit is no error."""
        ...

    def rollback(self) -> Awaitable[None]:
        """Roll back what is open; nothing to roll back is no error."""
        ...

    def close(self) -> Awaitable[None]:
        """Give everything back. The session is not used again."""
        ...


class SessionFactory(Protocol[S_co]):
    """Makes a new session at each call. `async_sessionmaker` is one."""

    def __call__(self) -> S_co: ...


class DatabaseDependency(Protocol[S_co]):
    """What `create_db_dependency` returns: a FastAPI dependency that is also a plain async
    generator function."""

    def __call__(self) -> AsyncGenerator[S_co, None]: ...


class DatabaseContext(Protocol[S_co]):
    """What `create_db_context` returns: each call opens one unit of work."""

    def __call__(self) -> AbstractAsyncContextManager[S_co]: ...


class TableLocker(Protocol):
    """Locks tables for a block. See `pgtoolset.lock_tables`."""

    def lock_tables(
        self,
        session: S,
        tables: Sequence[Any],
        *,
        mode: LockMode | str = ...,
        timeout: float | timedelta | str | None = ...,
        nowait: bool = ...,
    ) -> AbstractAsyncContextManager[S]:
        """A block that holds `mode` on all of `tables`; `LockTimeoutError` where it cannot be had
        in time."""
        ...


class AdvisoryLocker(Protocol):
    """Locks a key that means something to the application alone. See `pgtoolset.advisory_lock`."""

    def advisory_lock(
        self,
        session: Any,
        key: int | tuple[int, int] | str,
        *,
        shared: bool = ...,
        nowait: bool = ...,
        timeout: float | timedelta | str | None = ...,
    ) -> AbstractAsyncContextManager[bool]:
        """A block that holds the lock on `key`; with `nowait` it yields `False` where somebody else
        has it."""
        ...


class RowLocker(Protocol):
    """Locks rows until the transaction ends. See `pgtoolset.lock_rows`."""

    async def lock_rows(
        self,
        session: Any,
        model: type[M],
        pks: Iterable[Any],
        *,
        mode: RowLockMode | str = ...,
        skip_locked: bool = ...,
        nowait: bool = ...,
        timeout: float | timedelta | str | None = ...,
    ) -> Sequence[M]:
        """The instances that were found and locked, in key order, with the values as locked."""
        ...


class LockObserver(Protocol):
    """Tells who waits for whom. See `pgtoolset.list_lock_waits`."""

    async def list_lock_waits(self, connection_or_session: Any) -> Sequence[LockWait]:
        """Every session of the database that waits for a lock now."""
        ...


class ChangeWaiter(Protocol):
    """Waits until a row has changed. See `pgtoolset.wait_for_row_change`."""

    async def wait_for_row_change(
        self,
        session: Any,
        model: type[M],
        pk_value: Any,
        *,
        columns: Iterable[Any] | None = ...,
        interval: float | timedelta = ...,
        timeout: float | timedelta | None = ...,
        until: Callable[[M], bool] | None = ...,
        baseline: M | Mapping[str, Any] | None = ...,
    ) -> M:
        """The row as an instance in the caller's session, with the new values."""
        ...


class Watcher(Protocol):
    """Serves any number of waiters at once. See `pgtoolset.RowWatcher`."""

    async def __aenter__(self) -> Watcher: ...

    async def __aexit__(self, exc_type: Any, exc: Any, traceback: Any, /) -> Any: ...

    async def wait(
        self,
        model: type[M],
        pk_value: Any,
        *,
        columns: Iterable[Any] | None = ...,
        timeout: float | timedelta | None = ...,
    ) -> RowChange[M]:
        """The next change of the row."""
        ...

    def changes(
        self, model: type[M], pk_value: Any, *, columns: Iterable[Any] | None = ...
    ) -> AsyncIterator[RowChange[M]]:
        """Every change of the row from now on; where the consumer is slow, changes are merged."""
        ...


class RowComparator(Protocol):
    """Finds the rows that changed between two looks. The library's own, interpreted or compiled; it
    keeps no state."""

    def changed_lines(self, before: bytes, after: bytes) -> tuple[list[bytes], list[bytes]]:
        """The lines that `before` alone has, and those that `after` alone has."""
        ...

    def changed_rows(
        self, rows: Sequence[Sequence[Any]], known: Mapping[Any, Sequence[Any]], width: int
    ) -> list[int]:
        """The positions of the rows that differ, by the text at their end, from what is `known`
        under their key."""
        ...

    def same_value(self, left: Any, right: Any) -> bool:
        """Whether two values are the same: NaN is itself, and an odd `__eq__` is no change."""
        ...


class AssociationWriter(Protocol):
    """Writes the rows of association tables. See `pgtoolset.m2m_add` and its siblings."""

    async def m2m_add(
        self,
        session: Any,
        instance: Any,
        rel_attr: Any,
        *related: Any,
        pks: Iterable[Any] = ...,
        ignore_conflicts: bool = ...,
        values: Mapping[str, Any] | None = ...,
    ) -> int:
        """Associate `instance` with each of `related` and `pks`; how many rows were inserted."""
        ...

    async def m2m_remove(
        self, session: Any, instance: Any, rel_attr: Any, *related: Any, pks: Iterable[Any] = ...
    ) -> int:
        """Undo such associations, where they exist; how many rows were deleted."""
        ...

    async def m2m_set(
        self,
        session: Any,
        instance: Any,
        rel_attr: Any,
        *related: Any,
        pks: Iterable[Any] = ...,
        values: Mapping[str, Any] | None = ...,
        keep_existing: bool = ...,
    ) -> M2MChange:
        """Make the associations of `instance` exactly these; how many were added and removed."""
        ...

    async def m2m_add_many(
        self,
        session: Any,
        rel_attr: Any,
        links: Iterable[tuple[Any, Any]],
        *,
        ignore_conflicts: bool = ...,
        values: Mapping[str, Any] | None = ...,
    ) -> int:
        """Associate every pair of owner and related; how many rows were inserted."""
        ...


class AssociationRows(Protocol):
    """Turns instances and keys into the columns of association rows. Inside the library; a module
    is one.

    Both stop at what is not beyond doubt an instance with an identity or a key, and tell its
    position: the caller looks closer, and knows what to say.
    """

    def key_columns(
        self,
        class_: type[Any],
        instances: Sequence[Any],
        keys: Sequence[Any],
        width: int,
        positions: Sequence[int],
    ) -> list[list[Any]] | int:
        """The keys of instances of `class_`, then `keys`, each once: a list for each of
        `positions`."""
        ...

    def pair_columns(
        self,
        classes: tuple[type[Any], type[Any]],
        links: Sequence[Any],
        widths: tuple[int, int],
        positions: tuple[Sequence[int], Sequence[int]],
    ) -> list[list[Any]] | int:
        """Pairs of owner and related, each once: a list for each of the owners' positions, then of
        the related."""
        ...
