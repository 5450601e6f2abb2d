"""The same application as it is written without pgtoolset: SQLAlchemy, `pool_pre_ping`, a retry."""

import asyncio
import random
from collections.abc import Mapping

from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError

from examples.cluster.crowd import Crowd
from examples.cluster.ledger import Write
from examples.cluster.models import Entry
from examples.cluster.ways import Way

#: How often a transaction is tried, as is usual.
ATTEMPTS = 5


class CrowdByHand(Crowd):
    """Writers and readers that use SQLAlchemy alone."""

    def __init__(self, way: Way, ports: Mapping[int, str]) -> None:
        super().__init__(way, ports, has_tokens=False)

    async def write_once(self, write: Write) -> str | None:
        for attempt in range(ATTEMPTS):
            try:
                async with self.way.maker.begin() as session:
                    session.add(Entry(write=write.id))
                break
            except (DBAPIError, OSError):
                if attempt == ATTEMPTS - 1:
                    raise
                await asyncio.sleep(random.uniform(0, 0.05 * 2**attempt))
        write.committed()
        return None

    async def write_retried(self, write: Write) -> None:
        await self.write_once(write)

    async def write_locked(self, write: Write) -> None:
        async with self.way.maker.begin() as session:
            await session.execute(
                text("SELECT pg_advisory_xact_lock(hashtext(:key))"), {"key": write.counter}
            )
            await self.raise_counter(session, write)
        write.committed()

    async def read(self, write: Write, token: str | None) -> tuple[int | None, bool]:
        async with self.way.standby_makers[0].begin() as session:
            port = await session.scalar(select(func.inet_server_port()))
            found = await session.scalar(select(Entry.number).where(Entry.write == write.id))
            return port, found is not None

    async def beat(self, value: int) -> bool:
        return False  # there is nothing to watch a row with

    async def watch(self) -> None:
        pass
