"""The contracts. This module imports no implementation, so a double of yours needs nothing but it.

    class RecordingSession:
        def in_transaction(self) -> bool: ...
        def begin(self) -> AbstractAsyncContextManager[object]: ...
        def begin_nested(self) -> AbstractAsyncContextManager[object]: ...

is a `TransactionalSession`, and `get_transaction` works with it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeVar

__all__ = [
    "DatabaseContext",
    "DatabaseDependency",
    "ManagedSession",
    "SessionFactory",
    "StartableTransaction",
    "TransactionalSession",
]

S_co = TypeVar("S_co", covariant=True)


class TransactionalSession(Protocol):
    """A session whose transactions nest: all that `get_transaction` asks for.

    SQLAlchemy's `AsyncSession` satisfies it; of an `async_scoped_session` it is the session that a call of it gives.
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
    """What `ManagedSession.begin` returns: a block, or awaited, a transaction that the session's methods end."""

    def __await__(self) -> Any: ...

    async def __aenter__(self) -> Any: ...

    async def __aexit__(self, exc_type: Any, exc: Any, traceback: Any, /) -> Any: ...


class ManagedSession(Protocol):
    """A `TransactionalSession` that can also be ended and closed from outside: what a `SessionFactory` makes."""

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
    """What `create_db_dependency` returns: a FastAPI dependency that is also a plain async generator function."""

    def __call__(self) -> AsyncGenerator[S_co, None]: ...


class DatabaseContext(Protocol[S_co]):
    """What `create_db_context` returns: each call opens one unit of work."""

    def __call__(self) -> AbstractAsyncContextManager[S_co]: ...
