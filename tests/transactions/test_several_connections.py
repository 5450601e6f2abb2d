"""One session with two connections: two COMMITs, of which one may fail after the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import asyncpg
import pytest
from sqlalchemy import Connection, event, text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from pgtoolset import (
    CommitUnknownError,
    TransactionAbortedError,
    TransactionStateError,
    create_db_context,
    deadline,
    get_transaction,
    on_commit,
    run_transaction,
)
from pgtoolset.testing import EmbeddedServer
from tests.support import DRIVERNAME, insert, plain_url, stored, swallow_error

#: SQLAlchemy rolls back the connection that is committed too, and warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*transaction already deassociated from connection")

Maker = async_sessionmaker[AsyncSession]


@pytest.fixture
async def second(database_url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0)
    yield engine
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    await engine.dispose()


@pytest.fixture
def maker(engine: AsyncEngine, second: AsyncEngine) -> Maker:
    """Sessions whose statements on `account` go to the second engine."""

    class Routed(Session):
        def get_bind(self, mapper: Any = None, *, clause: Any = None, **kw: Any) -> Any:
            return (second if "account" in str(clause) else engine).sync_engine

    return async_sessionmaker(sync_session_class=Routed, expire_on_commit=False)


class Refused(Exception):
    """The second COMMIT was not sent."""

    sqlstate = "40001"


@pytest.fixture
def second_commit_fails(engine: AsyncEngine, second: AsyncEngine) -> Iterator[list[Connection]]:
    """Whichever connection commits first does, and the other one fails; list the first ones."""
    committed: list[Connection] = []

    def on_engine_commit(connection: Connection) -> None:
        if len(committed) % 2:
            committed.append(connection)
            raise Refused
        committed.append(connection)

    engines = (engine.sync_engine, second.sync_engine)
    for each in engines:
        event.listen(each, "commit", on_engine_commit)
    yield committed
    for each in engines:
        event.remove(each, "commit", on_engine_commit)


async def write(session: AsyncSession, id_: int) -> None:
    await insert(session, id_)
    await session.execute(text(f"INSERT INTO account (id, balance) VALUES ({id_}, 0)"))


async def accounts(connection: asyncpg.Connection) -> set[int]:
    return {row["id"] for row in await connection.fetch("SELECT id FROM account")}


async def test_all_connections_are_committed(maker: Maker, other: asyncpg.Connection) -> None:
    """The end of a block commits each connection of its session, and then runs the callbacks."""
    log: list[str] = []
    async with create_db_context(maker)() as session:
        await write(session, 1)
        on_commit(session, lambda: log.append("callback"))
    assert await stored(other) == await accounts(other) == {1}
    assert log == ["callback"]


@pytest.mark.parametrize("phase", ["end", "commit"])
async def test_partly_stored(
    maker: Maker, other: asyncpg.Connection, second_commit_fails: list[Connection], phase: str
) -> None:
    """Work that one of two connections has stored is neither committed nor aborted, and an error
    of a `commit()` that the block swallows is raised again at its end."""
    log: list[str] = []
    with pytest.raises(CommitUnknownError, match="has stored its part") as caught:
        async with create_db_context(maker)() as session:
            await write(session, 1)
            on_commit(session, lambda: log.append("callback"))
            if phase == "commit":
                with pytest.raises(CommitUnknownError):
                    await session.commit()
    assert caught.value.phase == phase
    assert isinstance(caught.value.__cause__, Refused)
    assert len(await stored(other)) + len(await accounts(other)) == 1
    assert log == []


async def test_partly_stored_is_not_tried_again(
    maker: Maker, other: asyncpg.Connection, second_commit_fails: list[Connection]
) -> None:
    """A serialization failure at the second COMMIT does not store the first part twice."""
    attempts = 0

    async def work(session: AsyncSession) -> None:
        nonlocal attempts
        attempts += 1
        await write(session, attempts)

    with pytest.raises(CommitUnknownError):
        await run_transaction(maker, work)
    assert attempts == 1


async def test_savepoint_of_two_connections(maker: Maker, other: asyncpg.Connection) -> None:
    """A nested block that swallowed an error leaves nothing behind, whichever of its connections
    has released its savepoint first."""
    for number in range(1, 11):
        with pytest.raises(Exception, match=r"closed|aborted"):
            async with create_db_context(maker)() as session:
                await write(session, number)
                with pytest.raises(TransactionAbortedError):
                    async with get_transaction(session):
                        await write(session, 100 + number)
                        await swallow_error(session)
        assert await stored(other) == await accounts(other) == set()


@pytest.fixture
def two_phase_url() -> Iterator[str]:
    with EmbeddedServer(settings={"max_prepared_transactions": "5"}) as server:
        yield server.url(driver=DRIVERNAME)


async def test_commit_prepared_without_an_answer(two_phase_url: str) -> None:
    """A two-phase transaction whose COMMIT PREPARED is not answered is in doubt: it is not tried
    again, and it is neither stored nor rolled back here."""
    engine = create_async_engine(two_phase_url, pool_size=1, max_overflow=0)
    other = await asyncpg.connect(plain_url(two_phase_url))
    await other.execute("CREATE TABLE item (id integer PRIMARY KEY, name text)")
    two_phase = async_sessionmaker(engine, twophase=True)
    attempts = 0

    async def work(session: AsyncSession) -> None:
        nonlocal attempts
        attempts += 1
        await insert(session, attempts)
        assert await session.scalar(text("SELECT current_setting('app.tenant', true)")) == "a"
        pid = await session.scalar(text("SELECT pg_backend_pid()"))
        if attempts > 1:
            kill = partial(other.fetchval, "SELECT pg_terminate_backend($1, 60000)", pid)
            event.listen(
                engine.sync_engine,
                "commit_twophase",
                lambda *_: await_only(kill()),
                once=True,
            )

    settings = {"app.tenant": "a"}
    await run_transaction(two_phase, work, settings=settings)
    assert await stored(other) == {1}
    with pytest.raises(CommitUnknownError) as caught:
        await run_transaction(two_phase, work, settings=settings)
    assert caught.value.phase == "end"
    assert attempts == 2
    assert await other.fetchval("SELECT count(*) FROM pg_prepared_xacts") == 1
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    await other.close()
    await engine.dispose()


async def test_rollback_of_what_is_prepared_after_a_deadline(two_phase_url: str) -> None:
    """A deadline that is over does not stop ROLLBACK PREPARED: no part stays, with its locks."""
    engine, second = create_async_engine(two_phase_url), create_async_engine(two_phase_url)
    for each in (engine, second):  # which the library sees by that
        async with create_db_context(async_sessionmaker(each))() as session:
            await session.execute(text("SELECT 1"))
    async with AsyncSession(twophase=True) as session:
        with deadline(0.3):
            for each in (engine, second):
                await session.execute(
                    text("SELECT pg_current_xact_id()"), bind_arguments={"bind": each.sync_engine}
                )
            await session.run_sync(lambda sync: sync.prepare())
            await asyncio.sleep(0.35)
            await session.rollback()
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT count(*) FROM pg_prepared_xacts")) == 0
    await engine.dispose()
    await second.dispose()


async def test_a_connection_that_comes_later(engine: AsyncEngine, second: AsyncEngine) -> None:
    """A savepoint is refused where a connection in AUTOCOMMIT has come to the transaction, also
    after one before it was not."""
    autocommit = second.execution_options(isolation_level="AUTOCOMMIT").sync_engine

    class Routed(Session):
        def get_bind(self, mapper: Any = None, *, clause: Any = None, **kw: Any) -> Any:
            return autocommit if "account" in str(clause) else engine.sync_engine

    async with AsyncSession(sync_session_class=Routed) as session:
        await session.begin()
        await session.execute(text("SELECT 1"))
        async with get_transaction(session):
            await session.execute(text("SELECT 1"))
        await session.execute(text("SELECT count(*) FROM account"))
        with pytest.raises(TransactionStateError, match="AUTOCOMMIT"):
            async with get_transaction(session):
                pass
