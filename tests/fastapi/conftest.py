"""The tables of `api`, for one test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest

from tests.fastapi.api import DROP, TABLES


@pytest.fixture
async def tables(other: asyncpg.Connection) -> AsyncIterator[None]:
    """Tables that only this test sees, with a row in each."""
    await other.execute(DROP + TABLES)
    yield
    await other.execute(DROP)
