"""`_arguments.sessions`: what is nearly a session gets an error that says what to pass instead."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from pgtoolset._arguments import (
    check_engine,
    check_session_maker,
    check_transactional,
    new_session,
    sync_session,
)

URL = "postgresql+asyncpg://user:secret@host/database"
scoped: Any = async_scoped_session(async_sessionmaker(), scopefunc=lambda: 1)

NEARLY = [
    (scoped, r"pass the session that it gives when it is called"),
    (Session(), r"synchronous session"),
    (scoped_session(sessionmaker()), r"synchronous session"),
    (AsyncSession, r"not its class"),
    (URL, "not a URL$"),
    (create_async_engine(URL), "not an AsyncEngine"),
    (None, "not None"),
    (5, "not 5"),
]


@pytest.mark.parametrize(("given", "advice"), NEARLY)
def test_session(given: Any, advice: str) -> None:
    """Each gets a `TypeError` with advice, and no secret is shown."""
    with pytest.raises(TypeError, match=rf"^session must be an AsyncSession.*{advice}") as caught:
        sync_session(given)
    assert "secret" not in str(caught.value)
    with pytest.raises(
        TypeError, match=r"^session must be an AsyncSession or another Trans"
    ) as caught:
        check_transactional(given)
    assert "secret" not in str(caught.value)


def test_taken() -> None:
    """An `AsyncSession` is taken, and a `TransactionalSession` of any kind."""

    class Plain:
        def in_transaction(self) -> bool:
            return False

        def begin(self) -> None: ...

        def begin_nested(self) -> None: ...

    session = AsyncSession()
    assert sync_session(session) is session.sync_session
    check_transactional(session)
    check_transactional(Plain())


@pytest.mark.parametrize("given", [None, 5, URL, AsyncSession(), create_async_engine(URL)])
def test_session_maker(given: Any) -> None:
    """What cannot be called makes no session."""
    with pytest.raises(TypeError, match=r"^session_maker must be an async_sessionmaker") as caught:
        check_session_maker(given)
    assert "secret" not in str(caught.value)


def test_session_maker_that_is_async() -> None:
    """A coroutine function makes a coroutine, not a session."""

    async def make() -> AsyncSession:
        return AsyncSession()

    with pytest.raises(TypeError, match=r"^session_maker must return a session, not a coroutine"):
        check_session_maker(make)


@pytest.mark.parametrize("made", [None, Session(), URL, object()])
def test_what_a_factory_makes(made: Any) -> None:
    """A factory that makes something else is told so, with what the thing lacks."""
    with pytest.raises(TypeError, match=r"^session_maker must make an AsyncSession") as caught:
        new_session(lambda: made)
    assert "secret" not in str(caught.value)


def test_engine() -> None:
    """A synchronous engine is not an `AsyncEngine`."""
    with pytest.raises(TypeError, match=r"^engine must be an AsyncEngine, not an Engine"):
        check_engine(create_async_engine(URL).sync_engine)
