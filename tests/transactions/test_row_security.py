"""Tenants under forced row-level security never see a row of another, however units end."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import asyncpg
import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from pgtoolset import create_db_context, get_transaction, release_connection, run_transaction
from tests.pgbouncer import WITHOUT_CACHES, pgbouncer
from tests.settings import Maker, narrow
from tests.support import Item, Part, swallow_error
from tests.tenants import secured_items, tenant


@pytest.fixture
async def secured(
    engine: AsyncEngine, other: asyncpg.Connection, database_url: str
) -> AsyncIterator[str]:
    async with secured_items(other):
        yield database_url


class Crowd:
    """Units of several tenants, and the rows that each has seen.

    Attributes:
        foreign: the rows of another tenant that one has seen.
        looks: how often one has looked.
    """

    def __init__(self, maker: Maker) -> None:
        self.maker = maker
        self.foreign: list[tuple[str, str]] = []
        self.looks = 0

    async def look(self, session: AsyncSession, name: str) -> None:
        """Look at all rows, and write one."""
        self.looks += 1
        rows = (await session.scalars(select(Item.name))).all()
        self.foreign += [(name, row) for row in rows if row.partition(":")[0] != name]
        await session.execute(
            text("INSERT INTO item SELECT coalesce(max(id), 0) + :step, :name FROM item"),
            {"name": f"{name}: row", "step": random.randint(1, 10**8)},
        )

    async def unit(self, name: str, ends: str) -> None:
        """One unit, in which something goes as `ends` says."""
        await getattr(self, ends)(name)

    async def commits(self, name: str) -> None:
        async with create_db_context(self.maker, settings=tenant(name))() as session:
            await self.look(session, name)
            await session.commit()
            await self.look(session, name)
            await session.rollback()
            await self.look(session, name)

    async def savepoints(self, name: str) -> None:
        async with create_db_context(self.maker, settings=tenant(name))() as session:
            with suppress(KeyError):
                async with get_transaction(session):
                    await self.look(session, name)
                    raise KeyError
            guest = "guest"
            async with get_transaction(session, settings=tenant(guest)):
                await self.look(session, guest)
            await self.look(session, name)
            with suppress(KeyError):
                async with get_transaction(session, settings=tenant(guest)):
                    await self.look(session, guest)
                    raise KeyError
            await self.look(session, name)

    async def retries(self, name: str) -> None:
        attempts: list[int] = []

        async def work(session: AsyncSession) -> None:
            await self.look(session, name)
            attempts.append(1)
            if len(attempts) < 3:
                await session.execute(
                    text("DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$")
                )

        await run_transaction(self.maker, work, settings=tenant(name))

    async def is_cancelled(self, name: str) -> None:
        # asyncpg warns of a connection that a cancellation has interrupted while it was made.
        is_connected = asyncio.Event()

        async def work() -> None:
            async with create_db_context(self.maker, settings=tenant(name))() as session:
                await session.connection()
                is_connected.set()
                await self.look(session, name)
                await session.execute(text("SELECT pg_sleep(0.01)"))
                await self.look(session, name)

        task = asyncio.create_task(work())
        await is_connected.wait()
        await asyncio.wait([task], timeout=random.uniform(0, 0.02))
        task.cancel()
        await asyncio.wait([task])

    async def fails_at_the_commit(self, name: str) -> None:
        async with create_db_context(self.maker, settings=tenant(name))() as session:
            await self.look(session, name)
            session.add(Part(id=random.randint(1, 2**30), item_id=2**30))
            with suppress(IntegrityError):
                await session.commit()
            await session.rollback()
            await self.look(session, name)

    async def releases(self, name: str) -> None:
        async with create_db_context(self.maker, settings=tenant(name))() as session:
            for _ in range(2):
                found = (await session.scalars(select(Item.name))).all()
                self.foreign += [(name, row) for row in found if row.partition(":")[0] != name]
                async with release_connection(session):
                    await asyncio.sleep(random.uniform(0, 0.01))
            await self.look(session, name)
            async with release_connection(session, commit=True):
                await asyncio.sleep(0)
            await self.look(session, name)

    async def swallows(self, name: str) -> None:
        with suppress(RuntimeError):
            async with create_db_context(self.maker, settings=tenant(name))() as session:
                await self.look(session, name)
                await swallow_error(session)

    async def has_no_tenant(self, name: str) -> None:
        settings = {"role": tenant(name)["role"]}
        async with create_db_context(self.maker, settings=settings)() as session:
            assert (await session.scalars(select(Item.name))).all() == []
            with pytest.raises(DBAPIError, match="row-level security"):
                async with get_transaction(session):
                    session.add(Item(id=-1, name=f"{name}: x"))


ENDS = [
    "commits",
    "savepoints",
    "retries",
    "is_cancelled",
    "fails_at_the_commit",
    "releases",
    "swallows",
    "has_no_tenant",
]


@pytest.mark.parametrize("ends", ENDS)
async def test_two_tenants_over_one_connection(secured: str, ends: str) -> None:
    """Two tenants that take turns on one pooled connection."""
    async with narrow(secured) as engine:
        crowd = Crowd(async_sessionmaker(engine))
        for _ in range(3):
            for name in ("a", "b"):
                await crowd.unit(name, ends)
        assert crowd.foreign == []
        assert crowd.looks or ends == "has_no_tenant"


async def test_a_crowd_behind_pgbouncer(secured: str) -> None:
    """200 tasks of 20 tenants over 4 backends of PgBouncer, whose units end in each way."""
    options: dict[str, Any] = {"pool_size": 20, "pool_timeout": 120}
    async with (
        pgbouncer(secured, backends=4) as url,
        narrow(url, connect_args=WITHOUT_CACHES, **options) as engine,
    ):
        crowd = Crowd(async_sessionmaker(engine))
        await asyncio.gather(
            *(crowd.unit(f"t{number % 20}", ENDS[number % len(ENDS)]) for number in range(200))
        )
        assert crowd.foreign == []
        assert crowd.looks > 300
