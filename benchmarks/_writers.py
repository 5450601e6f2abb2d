"""What the triggers of `row_change_trigger` cost those who write."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import asyncpg

from benchmarks._harness import Spread, alternate, headline, tell

SECONDS = 1.0


async def compare(url: str, table: str, rounds: int) -> None:
    """An UPDATE of one row is a transaction here; each connection has a row of its own."""
    headline("writers: transactions a second with the triggers / without")
    for count, flush in ((1, "on"), (1, "off"), (16, "on"), (16, "off")):
        settings = {"synchronous_commit": flush}
        connections = [await asyncpg.connect(url, server_settings=settings) for _ in range(count)]
        try:

            def contestant(
                action: str, connections: list[asyncpg.Connection]
            ) -> Callable[[], Awaitable[float]]:
                async def run() -> float:
                    await connections[0].execute(f"ALTER TABLE {table} {action} TRIGGER USER")
                    return await throughput(connections, table)

                return run

            figures = await alternate(
                {
                    "with": contestant("ENABLE", connections),
                    "without": contestant("DISABLE", connections),
                },
                rounds=rounds,
                warm_up=1,
            )
        finally:
            await asyncio.gather(*(connection.close() for connection in connections))
        plain = Spread.of(figures["without"]).median
        what = f"{count:>2} connection(s), synchronous_commit {flush}, {plain:.0f}/s without"
        tell(what, Spread.of_ratios(figures["with"], figures["without"]))


async def throughput(connections: list[asyncpg.Connection], table: str) -> float:
    end = time.perf_counter() + SECONDS
    done = 0

    async def write(connection: asyncpg.Connection, id_: int) -> None:
        nonlocal done
        while time.perf_counter() < end:
            await connection.execute(f"UPDATE {table} SET status = 'written' WHERE id = $1", id_)
            done += 1

    await asyncio.gather(*(write(connection, id_) for id_, connection in enumerate(connections, 1)))
    return done / SECONDS
