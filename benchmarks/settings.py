"""What `settings=` costs a unit of work. Run as `python -m benchmarks.settings`.

One SELECT in `db_context()`: without settings, with settings that travel with the BEGIN, and with a
statement of its own that sets them first, as one writes it by hand. CPU time is that of the client
and of its backend together; the backend's comes from Linux's clock of its process, where the server
runs on this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal, TypeAlias

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from benchmarks._harness import Spread, alternate, database_url, environment, headline, tell
from pgtoolset import create_db_context

Limit: TypeAlias = tuple[Literal["at most", "at least"], float]

SELECT = text("SELECT 1")
SETTINGS = {"app.tenant_id": "6d1cb3a4-8f4b-4c43-9d5e-0f7f0d6f6a51", "statement_timeout": "5s"}
BY_HAND = text(
    "SELECT set_config('app.tenant_id', :tenant, true), set_config('statement_timeout', '5s', true)"
)

#: Units in one round.
UNITS = 50


def nanoseconds_of(pid: int) -> int:
    """Return the CPU time of a process; 0 where it runs elsewhere."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])
    except OSError:
        return 0


class Contestant:
    """An engine of one connection, and one way to give its transactions settings."""

    def __init__(self, url: str, *, given: bool, by_hand: bool = False) -> None:
        self.engine = create_async_engine(url, pool_size=1, max_overflow=0)
        maker = async_sessionmaker(self.engine)
        self.db_context = create_db_context(maker, settings=SETTINGS if given else None)
        self.by_hand = by_hand
        self.pid = 0

    async def unit(self) -> None:
        async with self.db_context() as session:
            if self.by_hand:
                await session.execute(BY_HAND, {"tenant": SETTINGS["app.tenant_id"]})
            await session.execute(SELECT)

    async def round(self) -> tuple[float, float]:
        """Return the wall time and the CPU time of a unit, in microseconds."""
        if not self.pid:
            async with self.db_context() as session:
                self.pid = await self._pid(session)
        backend, client = nanoseconds_of(self.pid), time.process_time_ns()
        wall = time.perf_counter_ns()
        for _ in range(UNITS):
            await self.unit()
        wall = time.perf_counter_ns() - wall
        used = time.process_time_ns() - client + nanoseconds_of(self.pid) - backend
        return wall / UNITS / 1000, used / UNITS / 1000

    async def _pid(self, session: AsyncSession) -> int:
        return int((await session.execute(text("SELECT pg_backend_pid()"))).scalar_one())


async def run(rounds: int) -> None:
    environment("sqlalchemy", "asyncpg", "psycopg")
    with database_url() as url:
        contestants = {
            "without": Contestant(url, given=False),
            "settings": Contestant(url, given=True),
            "by hand": Contestant(url, given=False, by_hand=True),
            "control": Contestant(url, given=False),
        }
        rounds_of: dict[str, Callable[[], Awaitable[tuple[float, float]]]] = {
            name: contestant.round for name, contestant in contestants.items()
        }
        results = await alternate(rounds_of, rounds=rounds, warm_up=5)
        for contestant in contestants.values():
            await contestant.engine.dispose()
    is_asyncpg = "+asyncpg" in url
    driver = "asyncpg" if is_asyncpg else "psycopg"
    headline(f"db_context(settings=) / db_context(), with one SELECT, {driver}")
    base = results["without"]
    for name, what in (
        ("settings", "settings="),
        ("by hand", "a statement of its own"),
        ("control", "control: without once more"),
    ):
        target = 1.15 if name == "settings" and is_asyncpg else None
        for number, kind in enumerate(("wall time", "CPU time of client and backend")):
            ours, theirs = ([each[number] for each in rows] for rows in (results[name], base))
            limit: Limit | None = None if target is None else ("at most", target)
            tell(f"{what}, {kind}", Spread.of_ratios(ours, theirs), limit)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.settings", description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    asyncio.run(run(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
