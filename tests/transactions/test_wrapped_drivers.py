"""Any object around asyncpg's connection works, or is refused before the first statement."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import asyncpg
import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.pool import NullPool

from pgtoolset import (
    CommitUnknownError,
    RowWatcher,
    TransactionAbortedError,
    UnsupportedVersionError,
    create_db_context,
    get_transaction,
    lock_tables,
    on_commit,
    run_transaction,
)
from pgtoolset._postgres.connections import is_closed
from tests.proxy import Proxy
from tests.settings import setting
from tests.support import Item, insert, plain_url, stored, swallow_error, until

pytestmark = pytest.mark.asyncpg(reason="objects around a connection of asyncpg")

Creator: TypeAlias = Callable[[], Awaitable[Any]]


class Subclass(asyncpg.Connection):  # type: ignore[misc]
    """What `connection_class=` makes."""


class SlowSubclass(asyncpg.Connection):  # type: ignore[misc]
    """One whose statements wait for something else first, as a tracer's may."""

    async def execute(self, *arguments: Any, **keywords: Any) -> Any:
        await asyncio.sleep(0)
        return await super().execute(*arguments, **keywords)


class Slotted:
    """A proxy that passes on what it does not know, and takes no attribute."""

    __slots__ = ("_wrapped",)

    def __init__(self, wrapped: Any) -> None:
        object.__setattr__(self, "_wrapped", wrapped)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


class Loose:
    """A proxy that passes on what it does not know, and keeps attributes to itself."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)


class Transparent(Loose):
    """A proxy as wrapt makes them: attributes are set on the wrapped object."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "wrapped":
            object.__setattr__(self, name, value)
        else:
            setattr(self.wrapped, name, value)


class Tracing(Loose):
    """A proxy whose statements are coroutines of its own."""

    async def execute(self, *arguments: Any, **keywords: Any) -> Any:
        return await self.wrapped.execute(*arguments, **keywords)


class OwnTransaction:
    """A transaction that shows nothing of asyncpg's."""

    def __init__(self, transaction: Any) -> None:
        self.start = transaction.start
        self.commit = transaction.commit
        self.rollback = transaction.rollback


class Opaque(Loose):
    """A proxy that makes transactions of its own: what they do to asyncpg cannot be followed."""

    def transaction(self, **options: Any) -> Any:
        return OwnTransaction(self.wrapped.transaction(**options))


@asynccontextmanager
async def creator_of(kind: str, url: str) -> AsyncIterator[Creator]:
    if kind == "pool":
        async with asyncpg.create_pool(url, min_size=1, max_size=3) as pool:
            yield pool.acquire
        return
    classes = {"subclass": Subclass, "slow subclass": SlowSubclass}
    wrappers = {
        "slotted": Slotted,
        "loose": Loose,
        "transparent": Transparent,
        "tracing": Tracing,
        "opaque": Opaque,
    }

    async def create() -> Any:
        connection = await asyncpg.connect(
            url, connection_class=classes.get(kind, asyncpg.Connection)
        )
        return wrappers[kind](connection) if kind in wrappers else connection

    yield create


KINDS = ["pool", "subclass", "slow subclass", "slotted", "loose", "transparent", "tracing"]


@pytest.fixture
async def wrapped(
    request: pytest.FixtureRequest, database_url: str, other: asyncpg.Connection
) -> AsyncIterator[AsyncEngine]:
    async with creator_of(request.param, plain_url(database_url)) as create:
        engine = create_async_engine(
            "postgresql+asyncpg://", async_creator=create, poolclass=NullPool
        )
        yield engine
        await engine.dispose()
    await other.execute("TRUNCATE item, part")


@pytest.mark.parametrize("wrapped", KINDS, indirect=True)
async def test_units(wrapped: AsyncEngine, other: asyncpg.Connection) -> None:
    """Commits, callbacks, savepoints, retries and honesty are as with asyncpg's own connection."""
    maker = async_sessionmaker(wrapped)
    db_context = create_db_context(maker)
    log: list[str] = []
    async with db_context() as session:
        await insert(session, 1)
        on_commit(session, lambda: log.append("end"))
        async with get_transaction(session):
            await insert(session, 2)
    assert log == ["end"]
    async with db_context() as session:
        await insert(session, 3)
        await session.commit()
        await insert(session, 4)
    with pytest.raises(TransactionAbortedError):
        async with db_context() as session:
            await insert(session, 5)
            await swallow_error(session)
    with pytest.raises(TransactionAbortedError, match="did not see"):
        async with db_context() as session:
            await insert(session, 6)
            raw: Any = await (await session.connection()).get_raw_connection()
            with pytest.raises(asyncpg.PostgresError):
                await raw.driver_connection.fetch("SELECT 1 / 0")
    with pytest.raises(KeyError):
        async with db_context() as session:
            await insert(session, 7)
            raise KeyError

    async def work(session: AsyncSession) -> None:
        await insert(session, 8)

    await run_transaction(maker, work, isolation_level="SERIALIZABLE")
    assert await stored(other) == {1, 2, 3, 4, 8}


@pytest.mark.parametrize("wrapped", KINDS, indirect=True)
async def test_settings(wrapped: AsyncEngine, other: asyncpg.Connection) -> None:
    """Settings hold in each transaction and nested block, and a refused one is its own error."""
    maker = async_sessionmaker(wrapped)
    async with create_db_context(maker, settings={"app.tenant": "a"})() as session:
        for _ in range(2):
            await insert(session, 1)
            assert await setting(session) == "a"
            async with get_transaction(session, settings={"app.tenant": "b"}):
                assert await setting(session) == "b"
            assert await setting(session) == "a"
            await session.rollback()
        await insert(session, 2)
        await session.commit()
    with pytest.raises(TransactionAbortedError):
        async with create_db_context(maker, settings={"statement_timeout": "soon"})() as session:
            with pytest.raises(DBAPIError, match="soon"):
                await insert(session, 3)
            with pytest.raises(DBAPIError, match="aborted"):
                await insert(session, 4)
    async with create_db_context(maker)() as session:
        assert await setting(session) == ""
    assert await stored(other) == {2}


@pytest.mark.parametrize("wrapped", KINDS, indirect=True)
async def test_locks_and_watching(wrapped: AsyncEngine, other: asyncpg.Connection) -> None:
    """Locks and a RowWatcher reach into the same connections."""
    maker = async_sessionmaker(wrapped)
    await other.execute("INSERT INTO item (id, name) VALUES (1, 'old')")
    async with maker() as session, lock_tables(session, [Item]):
        await session.execute(text("SELECT 1"))
    async with RowWatcher(wrapped, interval=0.05) as watcher:
        changes = watcher.changes(Item, 1)
        async with maker() as session, session.begin():
            await session.execute(text("UPDATE item SET name = 'new'"))
        change = await watcher.wait(Item, 1, baseline={"id": 1, "name": "old"}, timeout=60)
        assert change.after == {"id": 1, "name": "new"}
        del changes


@pytest.mark.parametrize("wrapped", ["opaque"], indirect=True)
async def test_refused_before_the_first_statement(
    wrapped: AsyncEngine, other: asyncpg.Connection
) -> None:
    """A wrapper whose commits could not be verified is refused before anything is sent."""
    sent: list[str] = []
    event.listen(
        wrapped.sync_engine, "before_cursor_execute", lambda *arguments: sent.append(arguments[2])
    )
    with pytest.raises(UnsupportedVersionError, match="_top_xact of Opaque"):
        async with create_db_context(async_sessionmaker(wrapped))() as session:
            await insert(session, 1)
    assert sent == []
    assert await stored(other) == set()


@pytest.mark.parametrize("kind", KINDS)
async def test_lost_answer(database_url: str, other: asyncpg.Connection, kind: str) -> None:
    """A lost answer to the COMMIT is in doubt, and a connection that was lost before is not."""
    async with (
        Proxy.to(database_url) as proxy,
        creator_of(kind, plain_url(proxy.url)) as create,
    ):
        engine = create_async_engine(
            "postgresql+asyncpg://", async_creator=create, poolclass=NullPool
        )
        db_context = create_db_context(async_sessionmaker(engine))
        with pytest.raises(CommitUnknownError):
            async with db_context() as session:
                await insert(session, 1)
                proxy.cut_at_commit("RST")
        with pytest.raises((DBAPIError, asyncpg.InterfaceError)):
            async with db_context() as session:
                await insert(session, 2)
                raw: Any = await (await session.connection()).get_raw_connection()
                proxy.drop()
                await until(lambda: is_closed(raw.driver_connection))
        async with db_context() as session:
            await insert(session, 3)
        await engine.dispose()
    assert await stored(other) == {1, 3}
    await other.execute("TRUNCATE item, part")
