"""A pool that is full of connections to a primary that has moved."""

from __future__ import annotations

from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from pgtoolset import get_transaction
from tests.nodes import Nodes, execute
from tests.support import insert

POOL = 3


async def settle_on_the_standby(nodes: Nodes, engine: AsyncEngine) -> None:
    """Fill the pool with connections to the standby, as a name does that is still the old one."""
    nodes.move(nodes.standby)
    await engine.dispose()
    connections = [await engine.connect() for _ in range(POOL)]
    for connection in connections:
        await connection.close()
    nodes.move(nodes.primary)


async def pids(engine: AsyncEngine) -> list[int]:
    """Return the process ids behind the connections that the pool gives out."""
    connections = [await engine.connect() for _ in range(POOL)]
    found = [
        int(await connection.scalar(text("SELECT pg_backend_pid()")) or 0)
        for connection in connections
    ]
    for connection in connections:
        await connection.close()
    return sorted(found)


def refused(error: BaseException) -> bool:
    """Whether an error is the driver's with 25006, as SQLAlchemy has wrapped it or bare."""
    original: Any = getattr(error, "orig", None) or error
    original = original if getattr(original, "sqlstate", None) else original.__cause__
    return getattr(original, "sqlstate", None) == "25006"


async def stored(nodes: Nodes) -> int:
    count: Any = await execute(nodes.primary, "SELECT count(*) FROM item")
    return int(count)


async def see(engine: AsyncEngine) -> None:
    """Let the library see an engine."""
    async with AsyncSession(engine) as session, get_transaction(session):
        await session.execute(text("SELECT 1"))


async def write_item(maker: Any, number: int) -> None:
    async with maker() as session, get_transaction(session):
        await insert(session, number)
