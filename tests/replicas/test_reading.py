"""Read blocks: one READ ONLY transaction on one node, which has what the reader has written."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from pgtoolset import (
    ReadReplicas,
    TransactionAbortedError,
    TransactionStateError,
    advisory_lock,
    cleanup_tables,
    get_transaction,
    lock_rows,
    lock_tables,
    m2m_add,
    on_commit,
)
from pgtoolset._postgres.sqlstates import sqlstate_of
from pgtoolset.replicas import _opening
from tests.m2m.models import Post, Tag
from tests.nodes import execute
from tests.replicas.cluster import DRIVER, LONG, Cluster, counted, is_standby, server_of, settings
from tests.support import Base, Item, insert, swallow_error


async def write(cluster: Cluster, replicas: ReadReplicas, id_: int, *settings: str) -> str:
    """Commit an item and return the token of that."""
    async with cluster.maker(cluster.nodes.primary)() as session:
        for setting in settings:
            await session.execute(text(setting))
        await insert(session, id_)
        await session.commit()
        return await replicas.position(session)


async def items(session: AsyncSession) -> list[int]:
    return list(await session.scalars(select(Item.id).order_by(Item.id)))


@pytest.mark.parametrize("isolation_level", [None, "READ COMMITTED", "REPEATABLE READ"])
@pytest.mark.parametrize("setting", ["on", "off"])
async def test_read_after_write(
    cluster: Cluster, replicas: ReadReplicas, isolation_level: Any, setting: str
) -> None:
    """A standby shows what the token covers, each time, in each isolation level."""
    primary = cluster.maker(cluster.nodes.primary)
    stale = 0
    for number in range(30):
        async with primary() as session:
            await session.execute(text(f"SET LOCAL synchronous_commit = {setting}"))
            await insert(session, number)
            await session.commit()
            token = await replicas.position(session)
        async with replicas.read(after=token, isolation_level=isolation_level) as session:
            stale += number not in await items(session)
            assert await is_standby(session)
    assert stale == 0


async def test_default_isolation_level(cluster: Cluster) -> None:
    """A server whose default is REPEATABLE READ shows no older snapshot either."""
    options = settings(default_transaction_isolation="repeatable read")
    replicas = ReadReplicas(
        cluster.maker(cluster.nodes.primary),
        [cluster.maker(cluster.nodes.standby, **options)],
        max_wait=60,
    )
    for number in range(30):
        token = await write(cluster, replicas, number)
        async with replicas.read(after=token) as session:
            assert number in await items(session)
            assert await is_standby(session)
            level = await session.scalar(text("SHOW transaction_isolation"))
            assert level == "repeatable read"


async def test_waits_for_the_token(cluster: Cluster, replicas: ReadReplicas) -> None:
    """The block opens when the standby has replayed the token, and not before."""
    await cluster.pause()
    token = await write(cluster, replicas, 1)

    async def read() -> list[int]:
        async with replicas.read(after=token) as session:
            assert await is_standby(session)
            return await items(session)

    task = asyncio.create_task(read())
    done, _ = await asyncio.wait([task], timeout=0.1)
    assert not done
    await cluster.pause(paused=False)
    assert await task == [1]


@pytest.mark.parametrize("max_wait", [0.02, "20ms"])
async def test_max_wait(cluster: Cluster, max_wait: Any) -> None:
    """A standby that does not replay the token in time leaves the block to the primary."""
    replicas = cluster.replicas(max_wait=max_wait)
    async with replicas.read() as session:
        assert await is_standby(session)
    await cluster.pause()
    token = await write(cluster, replicas, 1)
    for _ in range(3):
        async with replicas.read(after=token) as session:
            assert await items(session) == [1]
            assert not await is_standby(session)
    async with replicas.read() as session:
        assert await is_standby(session)


async def test_read_only(cluster: Cluster, replicas: ReadReplicas) -> None:
    """A write is PostgreSQL's error, on each node, and costs no connection of the pool."""
    for after in (None, "no token"):
        with pytest.raises(DBAPIError) as caught:
            async with replicas.read(after=after) as session:
                pid = await session.scalar(text("SELECT pg_backend_pid()"))
                await insert(session, 1)
        assert sqlstate_of(caught.value) == "25006"
        for _ in range(2):  # the other standby has its turn
            async with replicas.read(after=after) as session:
                pids = {await session.scalar(text("SELECT pg_backend_pid()"))}
        async with replicas.read(after=after) as session:
            pids.add(await session.scalar(text("SELECT pg_backend_pid()")))
        assert pid in pids


async def test_pool_is_left_read_write(cluster: Cluster, replicas: ReadReplicas) -> None:
    """After a block on the primary its connection writes again, in its own isolation level."""
    maker = cluster.maker(cluster.nodes.primary, pool_size=1)
    on_primary: ReadReplicas[AsyncSession] = ReadReplicas(maker, [])
    async with on_primary.read(isolation_level="REPEATABLE READ") as session:
        assert await items(session) == []
    async with maker() as session:
        assert await session.scalar(text("SHOW transaction_isolation")) == "read committed"
        await insert(session, 1)
        await session.commit()


async def test_serializable(cluster: Cluster, replicas: ReadReplicas) -> None:
    """SERIALIZABLE, which no standby has, means the primary."""
    token = await write(cluster, replicas, 1)
    async with replicas.read(after=token, isolation_level="SERIALIZABLE") as session:
        assert await items(session) == [1]
        assert not await is_standby(session)


async def test_turns(cluster: Cluster, replicas: ReadReplicas) -> None:
    """Blocks go to the standby with the fewest open ones, in turn where they are equal."""
    seen: list[str] = []
    for _ in range(4):
        async with replicas.read() as session:
            seen.append(await server_of(session))
    assert seen[0] != seen[1] and seen[:2] == seen[2:]
    async with replicas.read() as session:
        busy = await server_of(session)
        for _ in range(2):
            async with replicas.read() as other:
                assert await server_of(other) != busy


async def test_one_transaction(cluster: Cluster, replicas: ReadReplicas) -> None:
    """After a commit or rollback in the block its session reads nowhere else."""
    for end in (AsyncSession.commit, AsyncSession.rollback):
        async with replicas.read() as session:
            await items(session)
            await end(session)
            with pytest.raises(TransactionStateError, match="one READ ONLY transaction"):
                await items(session)
        async with replicas.read() as session:
            assert await items(session) == []


async def test_savepoints_and_callbacks(cluster: Cluster, replicas: ReadReplicas) -> None:
    """Nested blocks and `on_commit` work as in each session."""
    heard: list[str] = []
    async with replicas.read() as session:
        on_commit(session, lambda: heard.append("end"))
        with pytest.raises(DBAPIError):
            async with get_transaction(session):
                await session.execute(text("SELECT 1 / 0"))
        assert await items(session) == []
    assert heard == ["end"]


async def test_swallowed_error(cluster: Cluster, replicas: ReadReplicas) -> None:
    """A block that swallowed an error does not end as if it had read everything."""
    with pytest.raises(TransactionAbortedError):
        async with replicas.read() as session:
            await swallow_error(session)


REFUSED: dict[str, Callable[[AsyncSession], Awaitable[Any]]] = {
    "lock_tables": lambda session: lock_tables(session, [Item]).__aenter__(),
    "lock_rows": lambda session: lock_rows(session, Item, [1]),
    "advisory_lock": lambda session: advisory_lock(session, "key").__aenter__(),
    "m2m_": lambda session: m2m_add(session, Post(id=1), Post.tags, Tag(key=1)),
    "cleanup_tables": lambda session: cleanup_tables(session, Base),
}


@pytest.mark.parametrize("function", REFUSED)
@pytest.mark.parametrize("after", [None, "the primary"])
async def test_locks_are_refused(cluster: Cluster, function: str, after: str | None) -> None:
    """What locks or writes refuses the session of a read block before any SQL, and names it."""
    replicas = cluster.replicas()
    async with replicas.read(after=after) as session:
        sent = [counted(engine) for engine in cluster.engines]
        with pytest.raises(TransactionStateError, match=rf"{function}.* read block"):
            await REFUSED[function](session)
        with pytest.raises(TransactionStateError, match=r"position.* read block"):
            await replicas.position(session)
        assert not any(sent)
        assert await items(session) == []


async def test_sequences(cluster: Cluster, replicas: ReadReplicas) -> None:
    """`nextval` is PostgreSQL's error, on each node."""
    await execute(cluster.nodes.primary, "CREATE SEQUENCE IF NOT EXISTS numbers")
    await cluster.caught_up()
    for after in (None, "the primary"):
        with pytest.raises(DBAPIError) as caught:
            async with replicas.read(after=after) as session:
                await session.execute(text("SELECT nextval('numbers')"))
        assert sqlstate_of(caught.value) == "25006"


async def test_no_statement_more(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A standby that is known to have the token is not asked again, and without one never."""
    monkeypatch.setattr(_opening, "FRESH", float(LONG))
    maker = cluster.maker(cluster.nodes.standby, pool_size=1)
    replicas = ReadReplicas(cluster.maker(cluster.nodes.primary), [maker], max_wait=60)
    token = await write(cluster, replicas, 1)
    async with replicas.read(after=token) as session:
        assert await items(session) == [1]
    sent = counted(cluster.engines[0])
    for after in (token, None):
        async with replicas.read(after=after) as session:
            assert await items(session) == [1]
    assert all("FROM item" in statement for statement in sent)
    assert len(sent) == 2


@pytest.mark.parametrize("isolation_level", [None, "SERIALIZABLE"])
async def test_no_question_to_the_primary(cluster: Cluster, isolation_level: Any) -> None:
    """The primary is not asked for its state on behalf of a reader without a token."""
    replicas: ReadReplicas[AsyncSession] = ReadReplicas(cluster.maker(cluster.nodes.primary), [])
    sent = counted(cluster.engines[0])
    async with replicas.read(isolation_level=isolation_level) as session:
        assert await items(session) == []
    assert len(sent) == 1


async def test_behind_a_pooler(cluster: Cluster) -> None:
    """Where the next transaction may reach another server, each block asks, and under REPEATABLE
    READ the transaction itself asks again whether it is on the same one."""
    cache = {"statement_cache_size": 0} if DRIVER == "asyncpg" else {"prepare_threshold": None}
    maker = cluster.maker(cluster.nodes.standby, connect_args=cache)
    replicas = ReadReplicas(cluster.maker(cluster.nodes.primary), [maker], max_wait=60)
    sent = counted(cluster.engines[0])
    for number in range(10):
        token = await write(cluster, replicas, number)
        del sent[:]
        async with replicas.read(after=token, isolation_level="REPEATABLE READ") as session:
            assert number in await items(session)
            assert sum("postmaster_start_time" in each for each in sent) >= 2
        async with replicas.read(after=token) as session:
            assert number in await items(session)
            assert await is_standby(session)


async def test_block_opens_once(cluster: Cluster, replicas: ReadReplicas) -> None:
    """A block that is open cannot be entered again, and one that has ended can."""
    block = replicas.read()
    async with block as session:
        with pytest.raises(TransactionStateError, match="open already"):
            await block.__aenter__()
        assert await items(session) == []
    async with block as session:
        assert await items(session) == []


async def test_joined_session(cluster: Cluster) -> None:
    """A factory of sessions that share a connection is refused, and the connection left alone."""
    engine = cluster.engine(cluster.nodes.standby.url())
    async with engine.connect() as connection:
        maker: async_sessionmaker[AsyncSession] = async_sessionmaker(connection)
        replicas = ReadReplicas(maker, [maker])
        with pytest.raises(TransactionStateError, match="bound to an engine"):
            async with replicas.read():
                raise AssertionError
        assert not connection.in_transaction()


async def test_forgotten_block(cluster: Cluster, replicas: ReadReplicas) -> None:
    """A block that is forgotten in its middle is collected, and its connection with it."""
    session = await replicas.read().__aenter__()
    await items(session)
    await session.rollback()
    forgotten = weakref.ref(session)
    del session
    gc.collect()
    assert forgotten() is None
