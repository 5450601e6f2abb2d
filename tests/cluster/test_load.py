"""The load of the cluster example on two embedded nodes, which needs neither Patroni nor etcd."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from examples.cluster.crowd import Crowd
from examples.cluster.ledger import judge
from examples.cluster.models import Base
from examples.cluster.store import create_tables, read_back
from examples.cluster.waiting import until
from examples.cluster.ways import Way
from examples.cluster.with_pgtoolset import CrowdWithPgtoolset
from sqlalchemy.ext.asyncio import create_async_engine

from tests.nodes import Nodes, execute


@asynccontextmanager
async def running(nodes: Nodes) -> AsyncIterator[Crowd]:
    """Yield a crowd that writes through the address of the primary while the block runs."""
    urls = (nodes.address(), nodes.primary.url(), nodes.standby.url())
    engines = [create_async_engine(url, connect_args={"timeout": 5}) for url in urls]
    await create_tables(engines[0], ["way"])
    await nodes.caught_up()
    crowd = CrowdWithPgtoolset(Way("way", engines[0], tuple(engines[1:])), {})
    crowd.start()
    try:
        yield crowd
        await crowd.stop()
    finally:
        await crowd.end()
        for engine in engines:
            await engine.dispose()


async def until_more(crowd: Crowd) -> None:
    """Wait until more is written, read and seen."""
    counts: list[Callable[[], int]] = [
        lambda: sum(write.outcome == "acknowledged" for write in crowd.ledger.writes),
        lambda: sum(read.has_token for read in crowd.ledger.reads),
        lambda: len(crowd.ledger.seen),
    ]
    wanted = [count() + 5 for count in counts]

    def has_more() -> bool:
        return all(count() >= least for count, least in zip(counts, wanted, strict=True))

    await until(has_more, 60, lambda: "the application does not go on")


async def test_truth_through_promotions(nodes: Nodes) -> None:
    """Through two switchovers and a crash with a promotion nothing that was told is false, and
    writes, token reads and the watcher go on."""
    async with running(nodes) as crowd:
        await until_more(crowd)
        await nodes.switch_over()
        await until_more(crowd)
        await nodes.switch_over()
        await until_more(crowd)
        # A crash loses no acknowledged work where a standby has a copy of it.
        await execute(nodes.primary, "ALTER SYSTEM SET synchronous_standby_names = '*'")
        await execute(nodes.primary, "SELECT pg_reload_conf()")
        await until_more(crowd)
        await nodes.fail_over()
        await until_more(crowd)
    engine = create_async_engine(nodes.primary.url())
    try:
        verdict = judge(crowd.ledger, *await read_back(engine))
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.drop_all)
    finally:
        await engine.dispose()
    assert verdict.holds, verdict
