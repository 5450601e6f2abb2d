"""A primary that has moved: the pool leaves the standby that it was, and nothing else changes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import Column, ForeignKey, Table, text
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from pgtoolset import (
    LockTimeoutError,
    TransactionAbortedError,
    advisory_lock,
    cleanup_tables,
    create_db_context,
    get_transaction,
    lock_rows,
    lock_tables,
    m2m_add,
    run_transaction,
)
from tests.nodes import Nodes, execute
from tests.proxy import Proxy
from tests.support import Base, Item, insert, interrupt_everywhere, roles

POOL = 3


class Catalog(DeclarativeBase):
    pass


post_tag = Table(
    "post_tag",
    Catalog.metadata,
    Column("post_id", ForeignKey("post.id"), primary_key=True),
    Column("tag_id", ForeignKey("tag.id"), primary_key=True),
)


class Tag(Catalog):
    __tablename__ = "tag"

    id: Mapped[int] = mapped_column(primary_key=True)


class Post(Catalog):
    __tablename__ = "post"

    id: Mapped[int] = mapped_column(primary_key=True)
    tags: Mapped[list[Tag]] = relationship(secondary=post_tag)


@pytest.fixture(params=["asyncpg", "psycopg"])
def driver(request: pytest.FixtureRequest) -> str:
    return f"postgresql+{request.param}"


@pytest.fixture
async def engine(nodes: Nodes, driver: str) -> AsyncIterator[AsyncEngine]:
    """An engine at the address of the pair."""
    engine = create_async_engine(nodes.address(driver=driver), pool_size=POOL, max_overflow=0)
    try:
        yield engine
        assert engine.pool.checkedout() == 0, "the test left a connection checked out"  # type: ignore[attr-defined]
    finally:
        await engine.dispose()


@pytest.fixture
def maker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(engine, expire_on_commit=False)


async def settle_on_the_standby(nodes: Nodes, engine: AsyncEngine) -> None:
    """Fill the pool with connections to the standby, as a name does that is still the old one."""
    nodes.move(nodes.standby)
    await engine.dispose()
    connections = [await engine.connect() for _ in range(POOL)]
    for connection in connections:
        await connection.close()
    nodes.move(nodes.primary)


async def pids(engine: AsyncEngine) -> list[int]:
    """Return the process ids behind the connections that the pool gives out."""
    connections = [await engine.connect() for _ in range(POOL)]
    found = [
        int(await connection.scalar(text("SELECT pg_backend_pid()")) or 0)
        for connection in connections
    ]
    for connection in connections:
        await connection.close()
    return sorted(found)


def refused(error: BaseException) -> bool:
    """Whether an error is the driver's with 25006, as SQLAlchemy has wrapped it or bare."""
    original: Any = getattr(error, "orig", None) or error
    original = original if getattr(original, "sqlstate", None) else original.__cause__
    return getattr(original, "sqlstate", None) == "25006"


async def stored(nodes: Nodes) -> int:
    return int(await execute(nodes.primary, "SELECT count(*) FROM item"))  # type: ignore[call-overload]


async def test_blocks(
    nodes: Nodes, engine: AsyncEngine, maker: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """After a switchover one of 50 blocks fails, with PostgreSQL's own error, where 50 did."""
    await pids(engine)
    await nodes.switch_over(moves_address=False)  # which has cut each connection
    db_context = create_db_context(maker)
    failures: list[BaseException] = []
    for number in range(50):
        try:
            async with db_context() as session:
                await insert(session, number)
        except Exception as error:
            failures.append(error)
            if refused(error):
                nodes.move(nodes.primary)
    assert [refused(error) for error in failures if not _is_cut(error)] == [True]
    assert len(failures) <= 1 + POOL
    assert await stored(nodes) == 50 - len(failures)
    assert [each.name for each in caplog.records].count("pgtoolset") == 1


def _is_cut(error: BaseException) -> bool:
    return getattr(error, "connection_invalidated", False) is True


async def by_block(session: AsyncSession) -> None:
    async with get_transaction(session):
        await insert(session, 1)


async def by_savepoint(session: AsyncSession) -> None:
    async with get_transaction(session), get_transaction(session):
        await insert(session, 1)


async def by_plain_session(session: AsyncSession) -> None:
    await insert(session, 1)


async def by_flush(session: AsyncSession) -> None:
    async with get_transaction(session):
        session.add(Item(id=1))


async def by_lock_tables(session: AsyncSession) -> None:
    async with lock_tables(session, [Item]):
        pass


async def by_lock_rows(session: AsyncSession) -> None:
    await lock_rows(session, Item, [1])


async def by_lock_rows_in_time(session: AsyncSession) -> None:
    await lock_rows(session, Item, [1], timeout=5)


async def by_advisory_lock(session: AsyncSession) -> None:
    async with advisory_lock(session, 1):
        await insert(session, 1)


async def by_serializable(session: AsyncSession) -> None:
    async with get_transaction(session, isolation_level="SERIALIZABLE"):
        await insert(session, 1)


async def by_read_write(session: AsyncSession) -> None:
    async with get_transaction(session, read_only=False):
        await insert(session, 1)


async def by_cleanup(session: AsyncSession) -> None:
    await cleanup_tables(session, Base)


async def by_driver_connection(session: AsyncSession) -> None:
    async with get_transaction(session):
        await session.execute(text("SELECT 1"))
        raw = await (await session.connection()).get_raw_connection()
        await raw.driver_connection.execute("INSERT INTO item VALUES (1, '')")  # type: ignore[union-attr]


WRITES = [
    by_block,
    by_savepoint,
    by_flush,
    by_lock_tables,
    by_lock_rows,
    by_lock_rows_in_time,
    by_advisory_lock,
    by_serializable,
    by_read_write,
    by_cleanup,
    by_driver_connection,
]


@pytest.mark.parametrize("write", WRITES)
async def test_every_function(
    nodes: Nodes, engine: AsyncEngine, maker: Any, write: Callable[[AsyncSession], Awaitable[None]]
) -> None:
    """Whatever was refused, the next block and all after it reach the new primary."""
    await execute(nodes.primary, "INSERT INTO item VALUES (0, '')")
    await nodes.caught_up()
    await settle_on_the_standby(nodes, engine)
    with pytest.raises(Exception) as caught:
        async with maker() as session:
            await write(session)
    assert not isinstance(caught.value, LockTimeoutError), caught.value
    async with asyncio.TaskGroup() as group:
        for number in range(10, 10 + 2 * POOL):
            group.create_task(_insert(maker, number))
    assert await stored(nodes) == 1 + 2 * POOL


async def _insert(maker: Any, number: int) -> None:
    async with maker() as session, get_transaction(session):
        await insert(session, number)


async def test_many_to_many(nodes: Nodes, engine: AsyncEngine, maker: Any, driver: str) -> None:
    """A write of an association in a session that is in no block of ours counts as well."""
    async with engine.begin() as connection:
        await connection.run_sync(Catalog.metadata.create_all)
        await connection.execute(text("TRUNCATE post, tag, post_tag"))
        await connection.execute(text("INSERT INTO post VALUES (1)"))
        await connection.execute(text("INSERT INTO tag VALUES (1)"))
    await nodes.caught_up()
    await settle_on_the_standby(nodes, engine)
    async with maker() as session:
        post = await session.get_one(Post, 1)
        with pytest.raises(Exception) as caught:
            await m2m_add(session, post, Post.tags, pks=[1])
    assert refused(caught.value)
    async with maker() as session, session.begin():
        await m2m_add(session, await session.get_one(Post, 1), Post.tags, pks=[1])
    assert await execute(nodes.primary, "SELECT count(*) FROM post_tag") == 1


async def test_plain_engine(nodes: Nodes, engine: AsyncEngine, maker: Any) -> None:
    """A statement of SQLAlchemy's own on an engine that the library has seen counts as well."""
    await see(engine)
    await settle_on_the_standby(nodes, engine)
    with pytest.raises(Exception) as caught:
        async with engine.begin() as connection:
            await connection.execute(Item.__table__.insert(), {"id": 1, "name": ""})  # type: ignore[attr-defined]
    assert refused(caught.value)
    async with engine.begin() as connection:
        await connection.execute(Item.__table__.insert(), {"id": 1, "name": ""})  # type: ignore[attr-defined]
    assert await stored(nodes) == 1


async def see(engine: AsyncEngine) -> None:
    """Let the library see an engine."""
    async with AsyncSession(engine) as session, get_transaction(session):
        await session.execute(text("SELECT 1"))


@pytest.mark.parametrize("is_ours", [True, False])
async def test_a_connection_that_is_kept(
    nodes: Nodes, engine: AsyncEngine, maker: Any, is_ours: bool
) -> None:
    """An owner who keeps one connection for transaction after transaction has another one from the
    next transaction on, with sessions that are joined to it and without."""
    await see(engine)
    await settle_on_the_standby(nodes, engine)

    async def write(connection: AsyncConnection, number: int) -> None:
        if is_ours:
            async with AsyncSession(connection) as session, get_transaction(session):
                await insert(session, number)
        else:
            await connection.execute(text(f"INSERT INTO item VALUES ({number}, '')"))

    async with engine.connect() as connection:
        for number in (1, 2, 3):
            try:
                await write(connection, number)
                await connection.commit()
            except Exception as error:
                assert refused(error) and number == 1
                await connection.rollback()
    assert await stored(nodes) == 2


async def test_a_savepoint_is_swallowed(nodes: Nodes, engine: AsyncEngine, maker: Any) -> None:
    """A block that swallows the error of a savepoint goes on reading, and ends as it would have."""
    await settle_on_the_standby(nodes, engine)
    async with maker() as session, get_transaction(session):
        for _ in range(2):
            with pytest.raises(Exception) as caught:
                async with get_transaction(session):
                    await insert(session, 1)
            assert refused(caught.value)
            assert await session.scalar(text("SELECT pg_is_in_recovery()"))
    await _insert(maker, 1)
    assert await stored(nodes) == 1


async def test_swallowed(nodes: Nodes, engine: AsyncEngine, maker: Any, driver: str) -> None:
    """A block that swallows the error is told, and the next one reaches the new primary."""
    await settle_on_the_standby(nodes, engine)
    expected = TransactionAbortedError if driver.endswith("asyncpg") else Exception
    with pytest.raises(expected):
        async with maker() as session, get_transaction(session):
            try:
                await insert(session, 1)
            except Exception as error:
                assert refused(error)
            if not driver.endswith("asyncpg"):
                await session.execute(text("SELECT 1"))
    await _insert(maker, 1)
    assert await stored(nodes) == 1


async def test_others_keep_their_connections(nodes: Nodes, engine: AsyncEngine, maker: Any) -> None:
    """A task that reads on the standby meanwhile goes on, until it returns its connection."""
    await settle_on_the_standby(nodes, engine)
    async with maker() as reader, get_transaction(reader):
        before = await reader.scalar(text("SELECT pg_backend_pid()"))
        with pytest.raises(Exception) as caught:
            await _insert(maker, 1)
        assert refused(caught.value)
        assert await reader.scalar(text("SELECT pg_backend_pid()")) == before
    async with asyncio.TaskGroup() as group:
        for number in range(POOL):
            group.create_task(_insert(maker, number))
    assert await stored(nodes) == POOL


async def test_once_for_all_that_fail(
    nodes: Nodes, engine: AsyncEngine, maker: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Transactions that are refused at the same time replace the pool once: what was opened since
    stays."""
    await settle_on_the_standby(nodes, engine)
    async with maker() as first, maker() as second:
        async with get_transaction(first), get_transaction(second):
            for session in (first, second):
                await session.execute(text("SELECT 1"))
            with pytest.raises(Exception, match="read-only"):
                async with get_transaction(first):
                    await insert(first, 1)
            await _insert(maker, 1)
            [after] = {await _pid(maker)}
            with pytest.raises(Exception, match="read-only"):
                async with get_transaction(second):
                    await insert(second, 1)
            assert await _pid(maker) == after
    assert [each.name for each in caplog.records].count("pgtoolset") == 1


async def _pid(maker: Any) -> object:
    async with maker() as session:
        return await session.scalar(text("SELECT pg_backend_pid()"))


async def as_an_option(session: AsyncSession) -> None:
    async with get_transaction(session, read_only=True):
        await insert(session, 1)


async def as_an_option_of_sqlalchemy(session: AsyncSession) -> None:
    await session.connection(execution_options={"postgresql_readonly": True})
    await insert(session, 1)


async def as_an_option_of_a_joined_session(session: AsyncSession) -> None:
    engine: Any = session.bind
    async with engine.connect() as connection:
        async with AsyncSession(connection) as joined, get_transaction(joined, read_only=True):
            await insert(joined, 1)


async def by_a_statement(session: AsyncSession) -> None:
    async with get_transaction(session):
        await session.execute(text("SET TRANSACTION READ ONLY"))
        await insert(session, 1)


async def by_a_session_default(session: AsyncSession) -> None:
    engine: Any = session.bind
    async with engine.connect() as connection:
        await connection.execute(text("SET default_transaction_read_only = on"))
        await connection.commit()
        async with AsyncSession(connection) as joined, get_transaction(joined):
            await insert(joined, 1)


@pytest.mark.parametrize("node", ["primary", "standby"])
@pytest.mark.parametrize(
    "fail",
    [
        as_an_option,
        as_an_option_of_sqlalchemy,
        as_an_option_of_a_joined_session,
        by_a_statement,
        by_a_session_default,
    ],
)
async def test_read_only_blocks(
    nodes: Nodes,
    engine: AsyncEngine,
    maker: Any,
    node: str,
    fail: Callable[[AsyncSession], Awaitable[None]],
) -> None:
    """A block that asked for READ ONLY discards nothing when it writes: each backend is the same
    afterwards, on a primary and on a standby."""
    if node == "standby" and fail is by_a_statement:
        return  # there PostgreSQL tells nobody that the transaction was READ ONLY by a statement
    await see(engine)
    nodes.move(getattr(nodes, node))
    await engine.dispose()
    before = await pids(engine)
    with pytest.raises(Exception) as caught:
        async with maker() as session:
            await fail(session)
    assert refused(caught.value)
    assert await pids(engine) == before


async def test_serializable_readers(nodes: Nodes, engine: AsyncEngine, maker: Any) -> None:
    """A standby refuses SERIALIZABLE to readers too: their pool leaves a primary that has moved,
    and run_transaction reads on the new one."""
    await settle_on_the_standby(nodes, engine)
    before = await pids(engine)

    async def read(session: AsyncSession) -> int:
        return int(await session.scalar(text("SELECT pg_backend_pid()")) or 0)

    options: Any = {"isolation_level": "SERIALIZABLE", "read_only": True}
    assert await run_transaction(maker, read, attempts=2, **options) not in before
    assert not set(await pids(engine)) & set(before)
    async with maker() as session, get_transaction(session, **options):
        with pytest.raises(Exception) as caught:
            await insert(session, 1)
        await session.rollback()
    assert refused(caught.value)


async def test_role_that_is_read_only(nodes: Nodes, driver: str) -> None:
    """A role whose transactions are read-only by default discards nothing, nor does a standby."""
    async with roles(nodes.primary.url(), "reader"):
        await execute(nodes.primary, "ALTER ROLE reader SET default_transaction_read_only = on")
        await execute(nodes.primary, "GRANT ALL ON item TO reader")
        await nodes.caught_up()
        for node in (nodes.primary, nodes.standby):
            url = node.url(driver=driver).replace("postgres@", "reader@")
            engine = create_async_engine(url, pool_size=POOL)
            before = await pids(engine)
            with pytest.raises(Exception) as caught:
                await _insert(async_sessionmaker(engine), 1)
            assert refused(caught.value)
            assert await pids(engine) == before
            await engine.dispose()


async def test_promoted_meanwhile(nodes: Nodes, engine: AsyncEngine, maker: Any) -> None:
    """A transaction that began before the promotion is refused, and nothing need be discarded:
    run_transaction tries again on the same connections."""
    nodes.move(nodes.standby)
    await engine.dispose()
    before = await pids(engine)
    calls = 0

    async def work(session: AsyncSession) -> None:
        nonlocal calls
        calls += 1
        assert await session.scalar(text("SELECT pg_is_in_recovery()")) is (calls == 1)
        if calls == 1:
            await nodes.promote()
        await insert(session, calls)

    await run_transaction(maker, work)
    assert calls == 2
    assert await stored(nodes) == 1
    assert await pids(engine) == before
    with pytest.raises(Exception) as caught:
        await run_transaction(maker, by_hand)
    assert refused(caught.value) and calls == 2


async def by_hand(session: AsyncSession) -> None:
    await session.execute(text("SET TRANSACTION READ ONLY"))
    await insert(session, 3)


@pytest.mark.parametrize("swallows", [False, True])
async def test_run_transaction(
    nodes: Nodes,
    engine: AsyncEngine,
    maker: Any,
    monkeypatch: pytest.MonkeyPatch,
    swallows: bool,
) -> None:
    """No transaction of run_transaction fails, raised or swallowed, and each is stored once."""
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.0)
    await settle_on_the_standby(nodes, engine)
    calls = 0

    async def work(session: AsyncSession, number: int, swallows: bool) -> None:
        nonlocal calls
        calls += 1
        try:
            await insert(session, number)
        except Exception:
            if not swallows:
                raise

    for number in range(50):
        await run_transaction(maker, lambda session: work(session, number, swallows))  # noqa: B023
    assert calls == 51
    assert await stored(nodes) == 50


async def test_healthy_blocks(nodes: Nodes, driver: str) -> None:
    """A block on a healthy primary sends exactly what SQLAlchemy alone sends."""
    async with Proxy.to(nodes.primary.url()) as proxy:
        url = proxy.url.replace("postgresql+asyncpg", driver)
        counts = []
        for is_ours in (False, True):
            engine = create_async_engine(url, pool_size=1)
            for _ in range(3):
                before = proxy.counts["to server"]
                async with AsyncSession(engine) as session:
                    async with get_transaction(session) if is_ours else session.begin():
                        await session.execute(text("UPDATE item SET name = ''"))
            counts.append(proxy.counts["to server"] - before)
            await engine.dispose()
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("is_held", [False, True])
async def test_cancelled_anywhere(
    nodes: Nodes, engine: AsyncEngine, maker: Any, is_held: bool
) -> None:
    """Wherever a cancellation hits a refused block, its connection is in the pool or closed, and
    the next transaction is one of the new primary, or of a standby that was not asked yet."""

    async def prepare() -> None:
        nodes.move(nodes.standby)
        await engine.dispose()
        await see(engine)
        assert engine.pool.checkedin() == 1  # type: ignore[attr-defined]

    async def work(number: int) -> None:
        with pytest.raises(Exception) as caught:
            if is_held:
                async with engine.connect() as connection:
                    async with AsyncSession(connection) as session, get_transaction(session):
                        await insert(session, number)
            else:
                await _insert(maker, number)
        assert refused(caught.value)

    async def check(number: int) -> None:
        assert engine.pool.checkedout() == 0, number  # type: ignore[attr-defined]
        nodes.move(nodes.primary)
        for last in (False, True):
            try:
                await _insert(maker, number)
                break
            except Exception as error:
                assert refused(error) and not last
        await prepare()

    await prepare()
    assert await interrupt_everywhere(work, check) > 3
