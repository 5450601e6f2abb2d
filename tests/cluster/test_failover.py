"""run_transaction through a failover, with URLs that name both nodes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset import CommitUnknownError, RetryAttempt, run_transaction
from tests.nodes import Nodes, execute
from tests.proxy import Proxy
from tests.support import insert, until


@pytest.fixture
async def hosts(nodes: Nodes) -> AsyncIterator[list[str]]:
    """The addresses of both nodes over TCP, that of the primary last."""
    async with Proxy.to(nodes.standby.url()) as standby, Proxy.to(nodes.primary.url()) as primary:
        urls = [make_url(proxy.url) for proxy in (standby, primary)]
        yield [f"{url.host}:{url.port}" for url in urls]


def url_of(driver: str, hosts: list[str], target: str) -> str:
    """Return the URL of several hosts, as SQLAlchemy writes it for either driver."""
    names = "&".join(f"host={host}" for host in hosts)
    return f"postgresql+{driver}://postgres@/postgres?{names}&target_session_attrs={target}"


@pytest.fixture(params=["asyncpg-primary", "asyncpg-read-write", "psycopg-read-write"])
async def engine(hosts: list[str], request: Any) -> AsyncIterator[AsyncEngine]:
    driver, _, target = request.param.partition("-")
    engine = create_async_engine(url_of(driver, hosts, target), pool_size=4)
    try:
        yield engine
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    finally:
        await engine.dispose()


@pytest.mark.parametrize("how", ["switch_over", "fail_over"])
async def test_run_transaction(nodes: Nodes, engine: AsyncEngine, how: str) -> None:
    """A transaction that has begun fails by no switchover and no failover, unless its COMMIT was
    cut: connections are lost, refused, and refused again for the want of a primary."""
    maker = async_sessionmaker(engine)
    done: set[int] = set()
    unknown: set[int] = set()
    has_begun, changed, stopped = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def write(writer: int) -> None:
        number = writer * 1000
        while not stopped.is_set():
            number += 1

            async def work(session: AsyncSession, number: int = number) -> None:
                await insert(session, number)
                await session.execute(text("SELECT 1"))

            attempts: list[RetryAttempt] = []
            try:
                await run_transaction(maker, work, attempts=60, on_retry=attempts.append)
                done.add(number)
            except CommitUnknownError:
                unknown.add(number)
            except Exception:
                if attempts:
                    raise
                await asyncio.sleep(0.02)  # its first attempt found no server

    async def meet() -> list[RetryAttempt]:
        """Write in a transaction that is open while the nodes change."""

        async def work(session: AsyncSession) -> None:
            await insert(session, 1)
            has_begun.set()
            await changed.wait()
            await session.execute(text("SELECT 1"))

        attempts: list[RetryAttempt] = []
        await run_transaction(maker, work, attempts=60, on_retry=attempts.append)
        return attempts

    async def change() -> None:
        await until(lambda: len(done) > 20)
        await has_begun.wait()
        await nodes.caught_up()
        await getattr(nodes, how)()
        changed.set()
        before = len(done)
        await until(lambda: len(done) > before + 20)
        stopped.set()

    async with asyncio.TaskGroup() as group:
        for writer in range(1, 4):
            group.create_task(write(writer))
        met = group.create_task(meet())
        group.create_task(change())
    assert met.result(), "the transaction that was open met no change"
    stored = await execute(nodes.primary, "SELECT array_agg(id) FROM item")
    assert isinstance(stored, list)
    assert 1 in stored
    assert set(stored) - {1} <= done | unknown
    if how == "switch_over":
        assert done <= set(stored)


async def test_new_connections(nodes: Nodes, engine: AsyncEngine) -> None:
    """A connection goes to the node that takes writes, whichever host the URL names first."""
    async with engine.connect() as connection:
        assert not await connection.scalar(text("SELECT pg_is_in_recovery()"))


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_refused_at_first(nodes: Nodes, driver: str, hosts: list[str]) -> None:
    """Where the first attempt finds no primary at all, the error propagates at once."""
    attempts: list[RetryAttempt] = []
    engine = create_async_engine(url_of(driver, hosts[:1], "read-write"))
    with pytest.raises(Exception):  # noqa: B017 - asyncpg's, psycopg's or SQLAlchemy's
        await run_transaction(
            async_sessionmaker(engine), lambda session: insert(session, 1), on_retry=attempts.append
        )
    assert not attempts
    await engine.dispose()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_errors_of_the_work(nodes: Nodes, driver: str) -> None:
    """An error of the network that the work raises by itself is never one of the server, after a
    connection was lost either."""
    engine = create_async_engine(nodes.primary.url(driver=f"postgresql+{driver}"))
    calls = 0

    async def work(session: AsyncSession) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise ConnectionRefusedError("another server")
        await session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    with pytest.raises(ConnectionRefusedError):
        await run_transaction(async_sessionmaker(engine), work)
    assert calls == 2
    await engine.dispose()
