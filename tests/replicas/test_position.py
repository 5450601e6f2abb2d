"""Positions: a token covers what its session has committed, however it was committed."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from pgtoolset import ReadReplicas, TransactionStateError, get_transaction
from pgtoolset.replicas._tokens import parse_token
from tests.nodes import execute
from tests.replicas.cluster import Cluster, counted, is_standby
from tests.support import insert

LSN = "SELECT pg_wal_lsn_diff({}, '0/0')::bigint"


@pytest.mark.parametrize("setting", ["off", "local", "on"])
@pytest.mark.parametrize("scope", ["LOCAL", "SESSION"])
async def test_synchronous_commit(
    cluster: Cluster, replicas: ReadReplicas, setting: str, scope: str
) -> None:
    """Whatever `synchronous_commit` was, and however it was set, the work is on the disk then."""
    maker = cluster.maker(cluster.nodes.primary, pool_size=1)
    for number in range(10):
        async with maker() as session:
            await session.execute(text(f"SET {scope} synchronous_commit = {setting}"))
            await insert(session, number)
            await session.commit()
            written = await session.scalar(text(LSN.format("pg_current_wal_insert_lsn()")))
            await session.rollback()
            position = parse_token(await replicas.position(session))
            flushed = await execute(cluster.nodes.primary, LSN.format("pg_current_wal_flush_lsn()"))
        assert position is not None
        assert written <= position.lsn <= flushed  # type: ignore[operator]


async def test_work_of_others(cluster: Cluster, replicas: ReadReplicas) -> None:
    """A page that another transaction has begun to write does not keep a standby from the token."""
    maker = cluster.maker(cluster.nodes.primary)
    async with maker() as other:
        for number in range(20):
            await insert(other, 1000 + number)
            async with maker() as session:
                await session.execute(text("SET LOCAL synchronous_commit = off"))
                await insert(session, number)
                await session.commit()
                await insert(other, 2000 + number)
                token = await replicas.position(session)
            async with replicas.read(after=token) as session:
                look = text("SELECT 1 FROM item WHERE id = :id")
                assert await session.scalar(look, {"id": number}) == 1
                assert await is_standby(session)
        await other.rollback()


async def test_round_trips(cluster: Cluster, replicas: ReadReplicas) -> None:
    """Where nothing waits for the disk, a position is one statement outside of a transaction."""
    maker = cluster.maker(cluster.nodes.primary)
    async with maker() as session:
        await insert(session, 1)
        await session.commit()
        sent = counted(cluster.engines[-1])
        await replicas.position(session)
        assert len(sent) <= 2  # a background process may have written
        assert not session.in_transaction()


async def test_open_transaction(cluster: Cluster, replicas: ReadReplicas) -> None:
    """A session that has only read may ask in its transaction; one that has written may not."""
    async with cluster.maker(cluster.nodes.primary)() as session:
        await insert(session, 1)
        with pytest.raises(TransactionStateError, match="after the commit"):
            await replicas.position(session)
        await session.commit()
        await session.execute(text("SELECT 1"))
        token = await replicas.position(session)
        assert session.in_transaction()
    async with get_transaction(session), replicas.read(after=token) as reader:
        assert await reader.scalar(text("SELECT count(*) FROM item")) == 1


async def test_joined_session(cluster: Cluster, replicas: ReadReplicas) -> None:
    """A session that shares a connection asks on it, and leaves its transaction as it was."""
    engine = cluster.engine(cluster.nodes.primary.url(), pool_size=1)
    async with engine.connect() as connection:
        maker: async_sessionmaker[AsyncSession] = async_sessionmaker(connection)
        async with maker() as session:
            await insert(session, 1)
            await session.commit()
            assert parse_token(await replicas.position(session)) is not None
        assert not connection.in_transaction()
        async with connection.begin():
            assert parse_token(await replicas.position(maker())) is not None
            assert connection.in_transaction()


async def test_standby(cluster: Cluster, replicas: ReadReplicas) -> None:
    """A session on a standby has no position, and is told so."""
    async with cluster.maker(cluster.nodes.standby)() as session:
        with pytest.raises(TransactionStateError, match="standby"):
            await replicas.position(session)
        await session.execute(text("SELECT 1"))
        with pytest.raises(TransactionStateError, match="standby"):
            await replicas.position(session)


@pytest.mark.parametrize("given", [5, None, object(), "session"])
async def test_no_session(replicas: ReadReplicas, given: Any) -> None:
    """What is no session is a TypeError."""
    with pytest.raises(TypeError, match="session must be"):
        await replicas.position(given)
