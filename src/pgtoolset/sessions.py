"""Sessions for a FastAPI request and for everywhere else: one unit of work each."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Any, Generic, TypeVar

from pgtoolset._arguments import check_session_maker, new_session, sync_session_of
from pgtoolset._commits import stop_verifying, verify_commits
from pgtoolset._compatibility import unsupported
from pgtoolset._lifecycle import close
from pgtoolset._record import record_of
from pgtoolset.protocols import DatabaseContext, DatabaseDependency, ManagedSession, SessionFactory

__all__ = ["create_db_context", "create_db_dependency"]

S = TypeVar("S", bound=ManagedSession)

#: The keys of the ASGI scope where FastAPI, from 0.121 on, keeps two exit stacks: it unwinds the
#: first between the endpoint and the response, the second after the response. FastAPI does not
#: document them; see docs/compatibility.md.
_FUNCTION_STACK = "fastapi_function_astack"
_REQUEST_STACK = "fastapi_inner_astack"


def create_db_dependency(session_maker: SessionFactory[S]) -> DatabaseDependency[S]:
    """Make a FastAPI dependency whose sessions are committed before the response starts.

    Use it as a plain `Depends(get_db)`. The endpoint gets a session that is in a transaction. The
    session checks out no connection before its first statement. After the endpoint has returned,
    the transaction is committed, and only then the response starts: a commit that fails gives the
    client an error. An exception in the endpoint rolls back. What a streaming response writes is
    committed at the end of the stream.

    Without FastAPI, `async for session in get_db(): ...` and `asynccontextmanager(get_db)` give the
    same unit of work. Leaving the `async for` early (`break`, `return`) rolls back.

    Args:
        session_maker: an `async_sessionmaker`, or any factory of sessions. The dependency is typed
            with its session.

    Returns:
        A function that returns an async generator of one session. FastAPI, which calls it with the
        request, gets a coroutine that returns the session.

    Raises:
        TypeError: `session_maker` is not a factory of sessions.

    At the end of a request the dependency raises `TransactionAbortedError` where the endpoint
    swallowed a database error that aborted the transaction, and at its start
    `UnsupportedVersionError` with FastAPI older than 0.121.

    Example:
        >>> engine = create_async_engine(url)
        >>> get_db = create_db_dependency(session_maker=async_sessionmaker(engine))
        >>> @app.post("/orders", status_code=201)
        ... async def place_order(
        ...     order: OrderIn, session: Annotated[AsyncSession, Depends(get_db)]
        ... ) -> OrderOut: ...

    See https://fastapi.tiangolo.com/tutorial/dependencies/dependencies-with-yield/
    """
    check_session_maker(session_maker)

    async def as_generator() -> AsyncGenerator[S, None]:
        unit = UnitOfWork(session_maker)
        try:
            await unit.begin()
            yield unit.session
            await unit.commit()
        finally:
            await unit.close()

    connection_type = _http_connection_type()
    if connection_type is None:
        return as_generator

    async def in_request(connection: Any) -> S:
        before_response, after_response = _exit_stacks(connection)
        unit = UnitOfWork(session_maker)
        after_response.push_async_exit(unit.finish)
        await unit.begin()
        before_response.push_async_exit(unit.commit_unless_failed)
        return unit.session

    def get_db(connection: Any = None) -> Any:
        return as_generator() if connection is None else in_request(connection)

    _make_injectable(get_db, connection_type)
    return get_db


def create_db_context(session_maker: SessionFactory[S]) -> DatabaseContext[S]:
    """Make a context manager for sessions outside of a request: jobs, scripts, consumers, tests.

    Each `async with db_context() as session` is one unit of work. The session is in a transaction,
    and checks out no connection before its first statement. The end of the block commits. An
    exception, cancellation included, rolls everything back and propagates unchanged. The block may
    call `commit()` or `rollback()` and go on; the transaction that is open at its end is committed.
    Afterwards the session is closed, however the block ended.

    Args:
        session_maker: an `async_sessionmaker`, or any factory of sessions.

    Returns:
        A function without parameters that returns an async context manager, which yields one
        session.

    Raises:
        TypeError: `session_maker` is not a factory of sessions.

    The end of the block raises `TransactionAbortedError` where the block swallowed a database error
    that aborted the transaction. A cancellation that arrives during the COMMIT is delivered after
    it, so the caller never takes stored work for rolled back.

    Example:
        >>> db_context = create_db_context(session_maker=async_sessionmaker(engine))
        >>> async with db_context() as session:
        ...     session.add(Order(customer="Ada"))

    See https://docs.sqlalchemy.org/en/20/orm/session_basics.html
    """
    check_session_maker(session_maker)

    @asynccontextmanager
    async def db_context() -> AsyncIterator[S]:
        unit = UnitOfWork(session_maker)
        try:
            await unit.begin()
            yield unit.session
            await unit.commit()
        finally:
            await unit.close()

    return db_context


class UnitOfWork(Generic[S]):
    """One session from its factory to its closing."""

    __slots__ = ("_sync", "session")

    def __init__(self, session_maker: SessionFactory[S]) -> None:
        self.session: S = new_session(session_maker)
        self._sync = sync_session_of(self.session)

    async def begin(self) -> None:
        """Begin the transaction, without a connection."""
        if self._sync is None:
            await self.session.begin()
            return
        verify_commits(self._sync)
        # The half of `AsyncSession.begin()` that does no I/O, so it needs no greenlet.
        if not self._sync.in_transaction():
            self._sync.begin()

    async def commit(self) -> None:
        """Commit the open transaction; the session stays usable."""
        if self.session.in_transaction():
            await self.session.commit()

    async def commit_unless_failed(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Commit at the exit of FastAPI's stack before the response, unless the endpoint raised.

        After an exception `finish` rolls back, at the exit of the other stack.
        """
        if exc_type is not None or not self.session.in_transaction():
            return
        await self.commit()
        # A streaming response may go on, in a session that does not begin a transaction itself too.
        if self._sync is not None and not self._sync.autobegin:
            self._sync.begin()

    async def finish(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Commit what a streaming response wrote, unless it failed or was cancelled, and close."""
        try:
            if exc_type is None and not self._was_cancelled():
                await self.commit()
        finally:
            await self.close()

    def _was_cancelled(self) -> bool:
        # Starlette cancels the stream of a client that hangs up, and raises no error for it.
        return self._sync is not None and isinstance(
            record_of(self._sync).error, asyncio.CancelledError
        )

    async def close(self) -> None:
        """Roll back the open transaction, close the session and release its connection."""
        if self._sync is not None:
            stop_verifying(self._sync)
        await close(self.session)


def _http_connection_type() -> type | None:
    """Return the base class of requests and websockets; `None` where FastAPI is not installed."""
    try:
        from starlette.requests import HTTPConnection  # FastAPI re-exports it, but imports more
    except ModuleNotFoundError:
        return None
    return HTTPConnection


def _make_injectable(get_db: Any, connection_type: type) -> None:
    """Let FastAPI call `get_db` with the request or websocket, and await the result.

    FastAPI passes the connection to a parameter of this type. It has a default and is not part of
    the declared type, so that `get_db()` can be called without FastAPI.

    For an async generator function FastAPI would make a context manager, a cancel scope and two
    more coroutines in each request: 50 us, more than all the rest of this module.
    """
    if sys.version_info >= (3, 12):
        inspect.markcoroutinefunction(get_db)
    else:
        get_db._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]
    parameter = inspect.Parameter(
        "connection", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=connection_type
    )
    get_db.__signature__ = inspect.Signature([parameter])


def _exit_stacks(connection: Any) -> tuple[AsyncExitStack, AsyncExitStack]:
    """Return FastAPI's exit stacks before and after the response."""
    before_response = connection.scope.get(_FUNCTION_STACK)
    after_response = connection.scope.get(_REQUEST_STACK)
    if isinstance(before_response, AsyncExitStack) and isinstance(after_response, AsyncExitStack):
        return before_response, after_response
    raise unsupported(
        "fastapi",
        f"exit stacks {_FUNCTION_STACK!r} and {_REQUEST_STACK!r} in the scope of the request",
        "Depends(get_db) cannot commit before the response",
        "Use FastAPI 0.121 or newer.",
    )
