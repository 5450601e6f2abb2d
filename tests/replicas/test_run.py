"""`run`: work that runs once more, on the primary, where a standby was in its way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from pgtoolset import ReadReplicas
from tests.nodes import execute
from tests.replicas.cluster import Cluster, is_standby
from tests.replicas.test_reading import items, write
from tests.support import insert, until

#: Locks the items for a moment, which the standby replays.
LOCKED = """
DO $$ BEGIN
  LOCK TABLE item IN ACCESS EXCLUSIVE MODE;
  CREATE TABLE IF NOT EXISTS x ();
  DROP TABLE x;
END $$
"""


async def test_result(cluster: Cluster, replicas: ReadReplicas) -> None:
    """It returns what the work returns, which has run once, on a standby."""
    token = await write(cluster, replicas, 1)
    places: list[bool] = []

    async def work(session: AsyncSession) -> list[int]:
        places.append(await is_standby(session))
        return await items(session)

    assert await replicas.run(work, after=token, isolation_level="REPEATABLE READ") == [1]
    assert places == [True]


async def test_conflict_with_recovery(cluster: Cluster) -> None:
    """A query that a standby cancels, because it is in the way of the primary's work, runs again
    on the primary."""
    replicas: ReadReplicas[AsyncSession] = ReadReplicas(
        cluster.maker(cluster.nodes.primary), [cluster.maker(cluster.nodes.standby)], max_wait=60
    )
    standby, primary = cluster.nodes.standby, cluster.nodes.primary
    await execute(standby, "ALTER SYSTEM SET max_standby_streaming_delay = '10ms'")
    await execute(standby, "SELECT pg_reload_conf()")
    places: list[bool] = []

    async def work(session: AsyncSession) -> list[int]:
        places.append(await is_standby(session))
        found = await items(session)
        if places[-1]:
            await execute(primary, LOCKED)
            await session.execute(text("SELECT pg_sleep(60)"))
        return found

    try:
        assert await replicas.run(work, isolation_level="REPEATABLE READ") == []
    finally:
        await execute(standby, "ALTER SYSTEM RESET ALL")
        await execute(standby, "SELECT pg_reload_conf()")
    assert places == [True, False]


async def test_lost_standby(cluster: Cluster, replicas: ReadReplicas) -> None:
    """Work whose connection to a standby is lost runs again on the primary."""
    places: list[bool] = []

    async def work(session: AsyncSession) -> str:
        places.append(await is_standby(session))
        if places[-1]:
            pid = await session.scalar(text("SELECT pg_backend_pid()"))
            for server in cluster.standbys:
                await execute(server, f"SELECT pg_terminate_backend({pid})")

            async def is_gone() -> bool:
                look = f"SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = {pid})"
                return all([await execute(server, look) for server in cluster.standbys])

            await until(is_gone)
        return str(await session.scalar(text("SELECT 'read'")))

    assert await replicas.run(work) == "read"
    assert places == [True, False]


async def write_something(session: AsyncSession) -> None:
    await insert(session, 1)


async def fail(session: AsyncSession) -> None:
    raise KeyError("of the work")


@pytest.mark.parametrize(("work", "error"), [(write_something, DBAPIError), (fail, KeyError)])
async def test_other_errors(
    replicas: ReadReplicas, work: Callable[..., Any], error: type[Exception]
) -> None:
    """Any other error of the work propagates, and it does not run again."""
    calls: list[AsyncSession] = []

    async def counting(session: AsyncSession) -> None:
        calls.append(session)
        await work(session)

    with pytest.raises(error):
        await replicas.run(counting)
    assert len(calls) == 1


async def test_plain_function(replicas: ReadReplicas) -> None:
    """A function that returns no awaitable is named."""
    with pytest.raises(TypeError, match="async function"):
        await replicas.run(lambda session: 5)  # type: ignore[arg-type, return-value]
