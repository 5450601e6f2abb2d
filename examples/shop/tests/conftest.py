"""The shop over HTTP, on the sessions of each test."""

from collections.abc import AsyncIterator

import httpx
import pytest
from examples.shop import db, mail
from examples.shop.app import create_app
from examples.shop.settings import Settings
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker


@pytest.fixture
async def shop(
    pg_session_maker: async_sessionmaker[AsyncSession], pg_database_url: str
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the shop, whose shelves are full; what it commits is gone after the test."""
    db.session_maker.configure(**pg_session_maker.kw)
    await db.stock_the_shelves()
    app = create_app(Settings.from_url(pg_database_url))
    app.state.mailer = mail.Mailer()
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://shop"
    ) as client:
        yield client
