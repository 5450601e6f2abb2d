"""The application of these tests, served by uvicorn."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import httpx
import pytest

from tests.sessions.shop import SLOW, Maker, Shop
from tests.support import serving


@pytest.fixture
def shop(session_maker: Maker) -> Shop:
    return Shop(session_maker)


@pytest.fixture
async def client(shop: Shop) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(shop.app) as port:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            yield client


@pytest.fixture
async def slow_commit(other: asyncpg.Connection) -> AsyncIterator[None]:
    """A COMMIT after an insert takes SLOW seconds, by a deferred constraint trigger."""
    await other.execute(
        f"""
        CREATE OR REPLACE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN PERFORM pg_sleep({SLOW}); RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION slow();
        """
    )
    yield
    await other.execute("DROP FUNCTION slow CASCADE")
