"""Section 1 of the contract, "released": a session that is forgotten unclosed is collected."""

from __future__ import annotations

import asyncio
import gc
import warnings
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from pgtoolset import get_transaction, on_commit
from tests.support import until

Maker = async_sessionmaker[AsyncSession]


async def after_a_block(session: AsyncSession) -> None:
    async with get_transaction(session):
        await session.execute(text("SELECT 1"))
    await session.execute(text("SELECT 1"))


async def inside_a_block(session: AsyncSession) -> None:
    await get_transaction(session).__aenter__()
    await session.execute(text("SELECT 1"))


async def inside_a_savepoint(session: AsyncSession) -> None:
    await inside_a_block(session)
    await get_transaction(session).__aenter__()
    await session.execute(text("SELECT 1"))


async def with_a_callback(session: AsyncSession) -> None:
    await session.execute(text("SELECT 1"))
    on_commit(session, lambda: None)


async def by_sqlalchemy_alone(session: AsyncSession) -> None:
    await session.execute(text("SELECT 1"))


@pytest.mark.filterwarnings("ignore:The garbage collector is trying to clean up")
@pytest.mark.parametrize(
    "use", [by_sqlalchemy_alone, after_a_block, with_a_callback, inside_a_block, inside_a_savepoint]
)
async def test_forgotten_session(
    engine: AsyncEngine, session_maker: Maker, use: Callable[[AsyncSession], Awaitable[None]]
) -> None:
    """A session that is dropped with a transaction open is collected, and so is its connection."""
    pool: Any = engine.pool

    async def forget() -> weakref.ref[AsyncSession]:
        session = session_maker()
        await use(session)
        assert pool.checkedout() == 1
        return weakref.ref(session)

    forgotten = await forget()

    def is_collected() -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gc.collect()
        return forgotten() is None and pool.checkedout() == 0

    await until(is_collected)
    await asyncio.sleep(0)  # the loop closes the socket in its next iteration
