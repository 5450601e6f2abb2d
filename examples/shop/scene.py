"""What is left for `pgtoolset locks` to show, once the tour is over."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool

from examples.shop.console import eventually
from examples.shop.models import Audit
from examples.shop.settings import Settings
from pgtoolset import list_lock_waits, lock_tables


@asynccontextmanager
async def jam(settings: Settings) -> AsyncIterator[None]:
    """An auditor who locked a table and went for lunch, and a clerk who waits for it. The shop
    itself goes on."""
    async with _engine(settings, "auditor") as auditor, _engine(settings, "clerk") as clerk:
        async with AsyncSession(auditor) as audit, lock_tables(audit, [Audit], mode="SHARE"):
            waiter = asyncio.create_task(_close(clerk))
            try:
                await eventually("a clerk who waits", partial(_waits, auditor), True)
                yield
            finally:
                waiter.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await waiter


async def _waits(engine: AsyncEngine) -> bool:
    return any(
        wait.relation and "audits" in wait.relation for wait in await list_lock_waits(engine)
    )


async def _close(engine: AsyncEngine) -> None:
    async with (
        AsyncSession(engine) as session,
        lock_tables(session, [Audit], mode="EXCLUSIVE", timeout=None),
    ):
        pass


@asynccontextmanager
async def _engine(settings: Settings, name: str) -> AsyncIterator[AsyncEngine]:
    server_settings = settings.server_settings(f"{name} of the shop")
    engine = create_async_engine(
        settings.url, poolclass=NullPool, connect_args={"server_settings": server_settings}
    )
    try:
        yield engine
    finally:
        await engine.dispose()
