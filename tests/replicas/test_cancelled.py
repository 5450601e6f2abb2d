"""A cancellation at every suspension leaves no connection checked out, and no block counted."""

from __future__ import annotations

import asyncio
import gc

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from pgtoolset import ReadReplicas
from pgtoolset.replicas import _opening
from tests.replicas.cluster import Cluster, silent_url
from tests.replicas.test_reading import items, write
from tests.support import interrupt_everywhere, until


def is_at_rest(cluster: Cluster, replicas: ReadReplicas) -> bool:
    checked_out = [engine.pool.checkedout() for engine in cluster.engines]  # type: ignore[attr-defined]
    blocks = [each.open_blocks for each in replicas._fleet._standbys]
    return not any(checked_out + blocks)


@pytest.mark.parametrize("isolation_level", ["READ COMMITTED", "REPEATABLE READ"])
@pytest.mark.parametrize("place", ["standby", "behind", "primary"])
async def test_read(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, isolation_level: str, place: str
) -> None:
    """Cancelled anywhere, a read block gives back what it has; the next one reads as before."""
    monkeypatch.setattr(_opening, "FRESH", -1.0)  # it is asked each time
    replicas = cluster.replicas(max_wait=60 if place == "standby" else "5ms")
    if place == "behind":
        await cluster.pause()
    token = await write(cluster, replicas, 1)
    after = "the primary" if place == "primary" else token

    async def work(_: int) -> None:
        async with replicas.read(after=after, isolation_level=isolation_level) as session:  # type: ignore[arg-type]
            assert await items(session) == [1]

    async def check(_: int) -> None:
        assert not _opening._abandoned and is_at_rest(cluster, replicas)

    for _ in range(2):
        await work(0)
    # It waits for the opening, for the rows, and for the ROLLBACK.
    assert await interrupt_everywhere(work, check) >= 3


async def test_read_as_it_opens(
    cluster: Cluster, replicas: ReadReplicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancellation that arrives with the answer of a standby leaves no block counted on it."""
    run = _opening.Opening.run

    async def run_and_cancel(opening: _opening.Opening[AsyncSession]) -> _opening.Verdict:
        verdict = await run(opening)
        reader.cancel()
        return verdict

    monkeypatch.setattr(_opening.Opening, "run", run_and_cancel)
    reader = asyncio.create_task(replicas.read().__aenter__())
    await asyncio.wait([reader], timeout=30)
    assert reader.cancelled()
    assert is_at_rest(cluster, replicas)


async def test_dropped_block(cluster: Cluster, replicas: ReadReplicas) -> None:
    """A block that is dropped in its middle is not counted on its standby any more."""
    block = replicas.read()
    session = await block.__aenter__()
    await session.close()
    assert not is_at_rest(cluster, replicas)
    del block
    gc.collect()
    assert is_at_rest(cluster, replicas)


async def test_position(cluster: Cluster, replicas: ReadReplicas) -> None:
    """Cancelled anywhere, `position` gives its connection back and leaves the session as it was."""
    async with cluster.maker(cluster.nodes.primary)() as session:
        await session.execute(text("SELECT 1"))
        await session.commit()

        async def work(_: int) -> None:
            await replicas.position(session)

        async def check(_: int) -> None:
            assert is_at_rest(cluster, replicas)
            assert not session.in_transaction()

        await interrupt_everywhere(work, check)


async def test_waiting_for_a_silent_standby(cluster: Cluster) -> None:
    """A reader that is cancelled while a standby does not answer does not wait for it."""
    asked = asyncio.Event()
    writers: list[asyncio.StreamWriter] = []

    def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        asked.set()

    silent = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    replicas: ReadReplicas[AsyncSession] = ReadReplicas(
        cluster.maker(cluster.nodes.primary), [cluster.maker(silent_url(port))]
    )
    try:
        task = asyncio.create_task(replicas.read().__aenter__())
        await asked.wait()
        task.cancel()
        await asyncio.wait([task], timeout=30)
        assert task.cancelled()
        await until(lambda: is_at_rest(cluster, replicas))
    finally:
        silent.close()
        for writer in writers:
            writer.close()
