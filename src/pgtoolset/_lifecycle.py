"""A session from its making to its closing, whatever happens in between."""

from __future__ import annotations

import asyncio
import inspect
import logging
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from pgtoolset._cancellation import uninterrupted
from pgtoolset._postgres.connections import terminate
from pgtoolset._record import record_of
from pgtoolset.protocols import ManagedSession, SessionFactory

logger = logging.getLogger("pgtoolset")

M = TypeVar("M", bound=ManagedSession)

#: Seconds that a ROLLBACK may take before its connection is given up and discarded.
ROLLBACK_TIMEOUT = 10.0


def check_session_maker(session_maker: object) -> None:
    """Raise `TypeError` for what cannot be a `SessionFactory`."""
    make = getattr(session_maker, "__call__", None)  # noqa: B004 - the method itself is looked at below
    if make is None:
        raise TypeError(
            f"session_maker must be an async_sessionmaker or another callable that makes a session, "
            f"not {session_maker!r}"
        )
    if inspect.iscoroutinefunction(session_maker) or inspect.iscoroutinefunction(make):
        raise TypeError(
            f"session_maker must return a session, not a coroutine; {session_maker!r} is async"
        )


def new_session(session_maker: SessionFactory[M]) -> M:
    """A session from the factory, or `TypeError` where it made something else."""
    session = session_maker()
    if isinstance(session, AsyncSession):
        return session
    for name in ("in_transaction", "begin", "begin_nested", "commit", "rollback", "close"):
        if not callable(getattr(session, name, None)):
            raise TypeError(
                f"session_maker must make sessions; it made {session!r}, which has no {name}()"
            )
    check_is_async(session, "session_maker must be an async_sessionmaker")
    return session


def check_is_async(session: object, what: str) -> None:
    if isinstance(session, Session):
        raise TypeError(
            f"{what}: {session!r} is a synchronous Session, and only an AsyncSession can be awaited"
        )


def sync_session_of(session: object) -> Session | None:
    """The `Session` inside an `AsyncSession`; `None` for a session of another kind."""
    sync = getattr(session, "sync_session", None)
    return sync if isinstance(sync, Session) else None


async def abandon(session: Any) -> None:
    """Roll back what is open. Never raises: the error that led here is the one to be told."""
    if session.in_transaction():
        await uninterrupted(_roll_back(session))


async def close(session: ManagedSession) -> None:
    """Close the session and give its connection back, or discard it. Never raises."""
    await abandon(session)
    try:
        await session.close()
    except Exception:
        logger.warning("closing a session failed; its connection is discarded", exc_info=True)
        await uninterrupted(_discard(session))


async def _roll_back(session: Any) -> None:
    # Cutting the connection ends a ROLLBACK that is not answered; cancelling it would ask the same
    # server to answer.
    hang_up = asyncio.get_running_loop().call_later(ROLLBACK_TIMEOUT, _hang_up, session)
    try:
        await session.rollback()
    except Exception:
        logger.warning("a rollback failed; its connection is discarded", exc_info=True)
        await _discard(session)
    finally:
        hang_up.cancel()


def _hang_up(session: Any) -> None:
    sync = sync_session_of(session)
    for connection in () if sync is None else record_of(sync).connections:
        if not connection.closed and not connection.invalidated:
            terminate(connection)


async def _discard(session: Any) -> None:
    invalidate = getattr(session, "invalidate", None)
    if invalidate is not None:
        try:
            await invalidate()
        except Exception:
            logger.warning("discarding a connection failed", exc_info=True)
