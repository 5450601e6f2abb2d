"""Exactly one `TransactionEnded` for each transaction, wherever a unit of work is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from tests.observe.conftest import Events
from tests.settings import left_behind, narrow
from tests.support import interrupt_everywhere, stored
from tests.transactions.test_cancelled_begins import BLOCKS, Block


@pytest.fixture
async def engine(database_url: str, other: asyncpg.Connection) -> AsyncIterator[AsyncEngine]:
    async with narrow(database_url) as engine:
        yield engine
    await other.execute("TRUNCATE item, part, account")


@pytest.mark.parametrize("block", BLOCKS)
async def test_exactly_one(
    engine: AsyncEngine, events: Events, other: asyncpg.Connection, block: Block
) -> None:
    """Each transaction in which a statement was sent has one event, and one that is stored says
    so."""
    maker = async_sessionmaker(engine, expire_on_commit=False)
    await left_behind(engine)  # how the first connection is made is SQLAlchemy's
    begun: list[Any] = []
    completed: set[int] = set()

    @event.listens_for(engine.sync_engine, "before_cursor_execute")
    def note(connection: Connection, *_: Any) -> None:
        transaction = connection.get_transaction()
        if transaction not in begun:
            begun.append(transaction)

    async def work(n: int) -> None:
        await block(maker, n)
        completed.add(n)

    async def check(n: int) -> None:
        await asyncio.sleep(0)
        ends = events.ends()
        assert len(ends) == len(begun), f"at suspension {n}: {ends}"
        is_stored = n in await stored(other)
        assert not is_stored or ends[-1][0] in ("committed", "unknown"), f"at {n}: {ends}"
        assert n not in completed or ends[-1][0] == "committed", f"at suspension {n}: {ends}"
        await left_behind(engine)
        events.clear()
        begun.clear()

    assert await interrupt_everywhere(work, check) >= 3
