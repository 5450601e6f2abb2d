"""Sessions for a FastAPI request and for everywhere else: one unit of work each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, TypeVar

from pgtoolset._arguments import (
    SettingsSource,
    check_resolve_commit,
    check_session_maker,
    optional_seconds,
    shown,
)
from pgtoolset._requests import (
    as_dependency,
    http_connection_type,
    make_injectable,
    raise_called_by_hand,
    raise_settings_by_hand,
    session_of_request,
    session_of_request_in_thread,
)
from pgtoolset._units import NOT_GIVEN, UnitContext, UnitOfWork, UnitOptions
from pgtoolset.protocols import DatabaseContext, DatabaseDependency, ManagedSession, SessionFactory
from pgtoolset.types import Duration, ReadTokens, SettingsOrFunction

__all__ = ["create_db_context", "create_db_dependency"]

S = TypeVar("S", bound=ManagedSession)


def create_db_dependency(
    session_maker: SessionFactory[S],
    *,
    resolve_commit: Duration | None = None,
    replicas: ReadTokens | None = None,
    settings: SettingsOrFunction | Callable[..., Any] | None = None,
    require: Sequence[str] = (),
    deadline: Duration | None = None,
) -> DatabaseDependency[S]:
    """Make a FastAPI dependency whose sessions are committed before the response starts.

    Use it as a plain `Depends(get_db)`. The endpoint gets a session that is in a transaction. The
    session checks out no connection before its first statement. After the endpoint has returned,
    the transaction is committed, and only then the response starts: a commit that fails gives the
    client an error. An exception that leaves the endpoint rolls back, also where another dependency
    swallows it. What a streaming response writes is committed at the end of the stream. A request
    has one session of this dependency, however often and in whatever way it is requested.

    Without FastAPI, `async for session in get_db(): ...` and `asynccontextmanager(get_db)` give the
    same unit of work. Leaving the `async for` early (`break`, `return`) rolls back.

    Args:
        session_maker: an `async_sessionmaker`, or any factory of sessions. The dependency is typed
            with its session.
        resolve_commit: the time in which a commit whose answer was lost with its connection is
            resolved: PostgreSQL is asked what became of it. Seconds, a `timedelta` or a string such
            as `"5s"`; `None` leaves it unknown. It costs one short statement before each COMMIT.
        replicas: a `ReadReplicas` that is installed in the application. Each response whose unit
            has written carries a token then, with which `create_read_dependency` reads that work on
            a standby. It costs a statement before each commit, and one after a commit that has
            written. The writes of a stream come too late for its response.
        settings: settings of PostgreSQL for each transaction of the unit, such as
            `{"app.tenant_id": "7", "statement_timeout": "2s"}`; or a function without parameters
            that returns those of a unit that begins; or a dependency of FastAPI that does: any
            function with parameters, an async one, or `Depends(...)`. They hold from the first
            statement on, also after a `commit()` or `rollback()` of the endpoint, and none outlives
            its transaction. With asyncpg they cost no statement, with psycopg one.
        require: names of settings without which, or with an empty value, no unit begins.
        deadline: the time for all that a unit does with the database, in the forms of
            `resolve_commit`. It begins with the unit, and counts as a block of `deadline` around
            it. `None` sets no limit.

    Returns:
        A function that returns an async generator of one session. FastAPI, which calls it with the
        request, gets a coroutine that returns the session.

    Raises:
        TypeError: `session_maker` is not a factory of sessions, or `replicas` no `ReadReplicas`.
        ValueError, TypeError: `resolve_commit` or `deadline` is not a length of time above 0, or a
            setting has no valid name or value.

    At the end of a request the dependency raises `TransactionAbortedError` where the endpoint
    swallowed a database error that aborted the transaction, and `CommitUnknownError` where the
    connection was lost between COMMIT and its answer; with `resolve_commit`, `TransactionLostError`
    where the work is certainly not stored, and nothing where it is. At its start it raises
    `SettingMissingError` for a required setting that is missing,
    `UnsupportedVersionError` with FastAPI older than 0.121, and `TransactionStateError` where
    FastAPI ends dependencies after the response (`app.frontend`), or `replicas` is not installed.

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
    connection_type = http_connection_type()
    resolved = None if connection_type is None else as_dependency(settings)
    options = _unit_options(
        resolve_commit, {} if resolved is not None else settings, require, deadline
    )
    if replicas is not None and not callable(getattr(replicas, "observer_of", None)):
        raise TypeError(f"replicas must be a ReadReplicas, not {shown(replicas)}")

    async def as_generator() -> AsyncGenerator[S, None]:
        if resolved is not None:
            raise_settings_by_hand()
        unit = UnitOfWork(session_maker, options)
        try:
            await unit.begin()
            yield unit.session
            await unit.commit()
        finally:
            await unit.close()

    if connection_type is None:
        return as_generator

    def get_db(*arguments: Any, connection: Any = None, settings: object = NOT_GIVEN) -> Any:
        if arguments:
            raise_called_by_hand()
        if connection is None:
            return as_generator()
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return session_of_request_in_thread(
                connection, get_db, session_maker, options, replicas, settings
            )
        return session_of_request(connection, get_db, session_maker, options, replicas, settings)

    make_injectable(get_db, connection_type, resolved)
    return get_db


def create_db_context(
    session_maker: SessionFactory[S],
    *,
    resolve_commit: Duration | None = None,
    settings: SettingsOrFunction | None = None,
    require: Sequence[str] = (),
    deadline: Duration | None = None,
) -> DatabaseContext[S]:
    """Make a context manager for sessions outside of a request: jobs, scripts, consumers, tests.

    Each `async with db_context() as session` is one unit of work. The session is in a transaction,
    and checks out no connection before its first statement. The end of the block commits. An
    exception, cancellation included, rolls everything back and propagates unchanged. The block may
    call `commit()` or `rollback()` and go on; the transaction that is open at its end is committed.
    Afterwards the session is closed, however the block ended.

    Args:
        session_maker: an `async_sessionmaker`, or any factory of sessions.
        resolve_commit: the time in which a commit whose answer was lost with its connection is
            resolved: PostgreSQL is asked what became of it. Seconds, a `timedelta` or a string such
            as `"5s"`; `None` leaves it unknown. It costs one short statement before each COMMIT.
        settings: settings of PostgreSQL for each transaction of the unit, such as
            `{"app.tenant_id": "7", "statement_timeout": "2s"}`; or a function without parameters
            that returns those of a unit that begins. They hold from the first statement on, also
            after a `commit()` or `rollback()` of the block, and none outlives its transaction. With
            asyncpg they cost no statement, with psycopg one.
        require: names of settings without which, or with an empty value, no unit begins:
            `SettingMissingError`.
        deadline: the time for all that a unit does with the database, in the forms of
            `resolve_commit`. It begins with the unit, and counts as a block of `deadline` around
            it. `None` sets no limit.

    Returns:
        A function without parameters that returns an async context manager, which yields one
        session.

    Raises:
        TypeError: `session_maker` is not a factory of sessions.
        ValueError, TypeError: `resolve_commit` or `deadline` is not a length of time above 0, or a
            setting has no valid name or value.

    The end of the block raises `TransactionAbortedError` where the block swallowed a database error
    that aborted the transaction, and `CommitUnknownError` where the connection was lost between
    COMMIT and its answer; with `resolve_commit`, `TransactionLostError` where the work is certainly
    not stored, and nothing where it is. A cancellation that arrives during the COMMIT is delivered
    after it, so the caller never takes stored work for rolled back.

    Example:
        >>> db_context = create_db_context(session_maker=async_sessionmaker(engine))
        >>> async with db_context() as session:
        ...     session.add(Order(customer="Ada"))

    See https://docs.sqlalchemy.org/en/20/orm/session_basics.html
    """
    check_session_maker(session_maker)
    options = _unit_options(resolve_commit, settings, require, deadline)

    def db_context() -> UnitContext[S]:
        return UnitContext(session_maker, options)

    return db_context


def _unit_options(
    resolve_commit: object, settings: Any, require: Sequence[str], deadline: object
) -> UnitOptions:
    has_settings = settings is not None or require != ()
    return UnitOptions(
        resolve_commit=check_resolve_commit(resolve_commit),
        settings=SettingsSource(settings, require) if has_settings else None,
        deadline=optional_seconds("deadline", deadline),
    )
