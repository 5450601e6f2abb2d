"""Sessions, factories of sessions and engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, Pool
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
)
from sqlalchemy.orm import Session, scoped_session

from pgtoolset._arguments.functions import is_async
from pgtoolset._arguments.shown import shown
from pgtoolset._compatibility import isolation_level_at_connect
from pgtoolset._postgres.engines import see
from pgtoolset.errors import TransactionStateError
from pgtoolset.protocols import ManagedSession, SessionFactory

S = TypeVar("S", bound=ManagedSession)

#: Of every place that finds out.
AUTOCOMMIT = (
    "the session's connection is in AUTOCOMMIT, where each statement is a transaction of its own "
    "and nothing can be rolled back; use an engine without isolation_level='AUTOCOMMIT', such as "
    "engine.execution_options(isolation_level='READ COMMITTED')"
)

#: In the `info` of a session of a read block.
READ_BLOCK = "pgtoolset.read_block"

_TRANSACTIONAL = ("in_transaction", "begin", "begin_nested")
_MANAGED = (*_TRANSACTIONAL, "commit", "rollback", "close")


def sync_session(session: object) -> Session:
    """Return the `Session` inside an `AsyncSession`; `TypeError` for anything else, and
    `UnsupportedDriverError` where its engine is of another driver.
    """
    sync = sync_session_of(session)
    if sync is None:
        raise TypeError(f"session must be an AsyncSession, not {shown(session)}{_advice(session)}")
    check_supported(sync)
    return sync


def writable_session(session: object, function: str) -> Session:
    """Return the `Session` as `sync_session` does; `TransactionStateError` in a read block."""
    sync = sync_session(session)
    refuse_read_block(sync, function)
    return sync


def refuse_read_block(session: Session, function: str) -> None:
    """Raise `TransactionStateError` where the session is that of a read block."""
    if READ_BLOCK in session.info:
        raise TransactionStateError(
            f"{function} cannot be used in a read block of ReadReplicas: its transaction is READ "
            "ONLY, on a standby where there is one, and a lock there protects nothing. Use a "
            "session of the primary, such as that of create_db_dependency or create_db_context."
        )


def sync_session_of(session: object) -> Session | None:
    """Return the `Session` inside an `AsyncSession`, `None` for a session of another kind."""
    if isinstance(session, AsyncSession):
        return session.sync_session
    sync = getattr(session, "sync_session", None)
    return sync if isinstance(sync, Session) else None


def check_transactional(session: object) -> None:
    """Raise `TypeError` for an object that is not a `TransactionalSession`."""
    if isinstance(session, AsyncSession):
        return
    _check_methods(
        session, _TRANSACTIONAL, "session must be an AsyncSession or another TransactionalSession"
    )


def check_session_maker(session_maker: object, name: str = "session_maker") -> None:
    """Raise `TypeError` for an object that cannot be a `SessionFactory`."""
    if not callable(session_maker) or session_maker is str or session_maker is bytes:
        raise TypeError(
            f"{name} must be an async_sessionmaker or another callable that makes a session, "
            f"not {shown(session_maker)}{_advice(session_maker)}"
        )
    if is_async(session_maker):
        raise TypeError(
            f"{name} must return a session, not a coroutine; {shown(session_maker)} is async"
        )


def check_session_makers(name: str, session_makers: object) -> None:
    """Raise `TypeError` for an object other than a sequence of factories of sessions."""
    if not isinstance(session_makers, Sequence) or isinstance(session_makers, str | bytes):
        raise TypeError(
            f"{name} must be a list of factories of sessions, such as async_sessionmaker, not "
            f"{shown(session_makers)}"
        )
    for number, session_maker in enumerate(session_makers):
        check_session_maker(session_maker, f"{name}[{number}]")


def new_session(session_maker: SessionFactory[S]) -> S:
    """Return a session of the factory; `TypeError` where it makes something else."""
    session = session_maker()
    if isinstance(session, AsyncSession):
        return session
    _check_methods(
        session, _MANAGED, "session_maker must make an AsyncSession or another ManagedSession"
    )
    return session


def check_supported(session: Session) -> None:
    """Raise `UnsupportedDriverError` where the session's engine is known, and is not supported.

    A session with several engines knows only with a statement which one it uses.
    """
    if session.bind is not None:
        check_bind(session.bind)


def check_bind(bind: Connection | Engine | AsyncConnection | AsyncEngine) -> None:
    """Raise `UnsupportedDriverError` for the bind of a statement that is not supported."""
    see(bind)


def check_atomic(session: Session) -> None:
    """Raise `TransactionStateError` where the session's connections are in AUTOCOMMIT, and
    `UnsupportedDriverError` where they are of another driver.

    Without I/O: what only a connection knows is checked when the session has one.
    """
    bind = session.bind
    if bind is not None:
        see(bind)
        if _isolation_level(session, bind) == "AUTOCOMMIT":
            raise TransactionStateError(AUTOCOMMIT)


def _isolation_level(session: Session, bind: Connection | Engine) -> object:
    """Return the isolation level that a transaction would have; `None` for the server's default."""
    # Sessions have options of their own from SQLAlchemy 2.1 on.
    options = getattr(session, "execution_options", None)
    level = options.get("isolation_level") if options else None
    return (
        level
        or bind.get_execution_options().get("isolation_level")
        or isolation_level_at_connect(bind.dialect)
    )


def check_engine(engine: object) -> AsyncEngine:
    """Return the engine; `TypeError` for an object that is not an `AsyncEngine`, and
    `UnsupportedDriverError` for one of another driver.
    """
    if not isinstance(engine, AsyncEngine):
        raise TypeError(f"engine must be an AsyncEngine, not {shown(engine)}")
    see(engine)
    return engine


def check_pool(engine: object) -> Pool:
    """Return the pool of an `AsyncEngine`, or of the `Engine` below one; other objects and drivers
    are refused as by `check_engine`.
    """
    if isinstance(engine, Engine):
        see(engine)
        return engine.pool
    return check_engine(engine).sync_engine.pool


def _check_methods(session: object, names: Sequence[str], wanted: str) -> None:
    """Raise `TypeError` for an object that lacks a method, or that is nearly a session."""
    missing = [name for name in names if not callable(getattr(session, name, None))]
    advice = _advice(session)
    if missing or advice:
        lacks = advice or f", which has no {missing[0]}()"
        raise TypeError(f"{wanted}, not {shown(session)}{lacks}")


def _advice(given: Any) -> str:
    """What to pass in place of an object that is nearly a session."""
    if isinstance(given, async_scoped_session):
        return "; pass the session that it gives when it is called: scoped()"
    if isinstance(given, Session | scoped_session):
        return "; a synchronous session cannot be awaited: pass an AsyncSession"
    if isinstance(given, type) and issubclass(given, AsyncSession):
        return "; pass a session, not its class"
    return ""
