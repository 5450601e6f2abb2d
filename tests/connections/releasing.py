"""What the tests of release_connection share."""

from __future__ import annotations

from typing import Any

from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

Maker = async_sessionmaker[AsyncSession]


def sent_over(engine: AsyncEngine) -> list[str]:
    statements: list[str] = []
    event.listen(
        engine.sync_engine, "before_cursor_execute", lambda *args: statements.append(args[2])
    )
    return statements


def held(engine: AsyncEngine) -> int:
    return engine.pool.checkedout()  # type: ignore[attr-defined,no-any-return]


async def read(session: AsyncSession) -> None:
    await session.execute(text("SELECT count(*) FROM item"))


async def xact_start(session: AsyncSession) -> Any:
    return await session.scalar(text("SELECT now()"))
