"""What the database has: the tables before a run, and what is stored after it."""

from collections.abc import Iterable

from sqlalchemy import func, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine

from examples.cluster.models import Base, Beat, Counter, Entry

#: The kinds of locks under which a counter is raised.
LOCKS = ("advisory", "table")


async def create_tables(engine: AsyncEngine, ways: Iterable[str]) -> None:
    """Make the tables, with a watched row and the counters of each way."""
    names = list(ways)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(insert(Beat), [{"name": name} for name in names])
        await connection.execute(
            insert(Counter), [{"name": f"{name} {lock}"} for name in names for lock in LOCKS]
        )


async def read_back(engine: AsyncEngine) -> tuple[dict[str, int], dict[str, int]]:
    """Return how many rows there are of each write, and the values of the counters."""
    async with engine.connect() as connection:
        rows = await connection.execute(select(Entry.write, func.count()).group_by(Entry.write))
        counters = await connection.execute(select(Counter.name, Counter.value))
        return {row[0]: row[1] for row in rows}, {row[0]: row[1] for row in counters}
