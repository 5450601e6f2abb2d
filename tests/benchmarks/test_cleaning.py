"""The turns of `cleanup_tables`: one that fails leaves nothing to the next one."""

from __future__ import annotations

import asyncio

import pytest
from benchmarks.testing import cleaned
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

pytestmark = pytest.mark.once


async def test_failed_turns(server_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn that fails, or is stopped in a statement, is the failure of that turn alone."""
    seen: list[int] = []
    mode = ""

    async def clean(session: AsyncSession) -> None:
        seen.append(await session.scalar(text("SELECT count(*) FROM table_12")) or 0)
        if mode == "error":
            await session.execute(text("SELECT 1 / 0"))
        if mode == "hangs":
            await session.execute(text("SELECT pg_sleep(600)"))
        await session.execute(text("TRUNCATE table_12 CASCADE"))
        await session.commit()

    async with cleaned(server_url, "failing", clean, index=True) as turn:
        for mode in ("error", "hangs", "", "error"):
            try:
                async with asyncio.timeout(2 if mode == "hangs" else None):
                    figures = await turn(3)
            except (DBAPIError, TimeoutError):
                assert mode
            else:
                assert not mode and figures["wall"] > 0
    assert seen == [3, 3, 3, 3]
