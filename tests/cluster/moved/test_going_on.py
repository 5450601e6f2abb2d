"""A primary that has moved: other tasks, retries, and cancellations."""

from __future__ import annotations

import asyncio
import random
from functools import partial
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from pgtoolset import get_transaction, run_transaction
from tests.cluster.moved.moving import (
    POOL,
    pids,
    refused,
    see,
    settle_on_the_standby,
    stored,
    write_item,
)
from tests.nodes import Nodes
from tests.proxy import Proxy
from tests.support import insert, interrupt_everywhere


async def test_others_keep_their_connections(nodes: Nodes, engine: AsyncEngine, maker: Any) -> None:
    """A task that reads on the standby meanwhile goes on, until it returns its connection."""
    await settle_on_the_standby(nodes, engine)
    async with maker() as reader, get_transaction(reader):
        before = await reader.scalar(text("SELECT pg_backend_pid()"))
        with pytest.raises(Exception) as caught:
            await write_item(maker, 1)
        assert refused(caught.value)
        assert await reader.scalar(text("SELECT pg_backend_pid()")) == before
    async with asyncio.TaskGroup() as group:
        for number in range(POOL):
            group.create_task(write_item(maker, number))
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
            await write_item(maker, 1)
            [after] = {await _pid(maker)}
            with pytest.raises(Exception, match="read-only"):
                async with get_transaction(second):
                    await insert(second, 1)
            assert await _pid(maker) == after
    assert [each.name for each in caplog.records].count("pgtoolset") == 1


async def _pid(maker: Any) -> object:
    async with maker() as session:
        return await session.scalar(text("SELECT pg_backend_pid()"))


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

    async def work(session: AsyncSession, number: int) -> None:
        nonlocal calls
        calls += 1
        try:
            await insert(session, number)
        except Exception:
            if not swallows:
                raise

    for number in range(50):
        await run_transaction(maker, partial(work, number=number))
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

    def pool() -> Any:
        return engine.pool  # another one after each `dispose()`

    async def prepare() -> None:
        nodes.move(nodes.standby)
        await engine.dispose()
        await see(engine)
        assert pool().checkedin() == 1

    async def work(number: int) -> None:
        with pytest.raises(Exception) as caught:
            if is_held:
                async with engine.connect() as connection:
                    async with AsyncSession(connection) as session, get_transaction(session):
                        await insert(session, number)
            else:
                await write_item(maker, number)
        assert refused(caught.value)

    async def check(number: int) -> None:
        assert pool().checkedout() == 0, number
        nodes.move(nodes.primary)
        for last in (False, True):
            try:
                await write_item(maker, number)
                break
            except Exception as error:
                assert refused(error) and not last
        await prepare()

    await prepare()
    assert await interrupt_everywhere(work, check) > 3
