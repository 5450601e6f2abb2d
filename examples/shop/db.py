"""The wiring: one engine, one session maker, and the two things that pgtoolset makes of it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.pool import NullPool

from examples.shop.models import Base, Product, Tag, Voucher
from examples.shop.settings import Settings
from pgtoolset import RowWatcher, create_db_context, create_db_dependency

POOL_SIZE = 5

#: The tags that products can have on the page.
LABELS = ("fragile", "gift", "new", "seasonal")

#: Made without an engine, which needs a URL and an event loop: `connected` brings it when the
#: application starts.
session_maker = async_sessionmaker(expire_on_commit=False)

get_db = create_db_dependency(session_maker=session_maker)
db_context = create_db_context(session_maker=session_maker)

#: What an endpoint asks for: a session in a transaction that is committed before the response
#: starts.
Session = Annotated[AsyncSession, Depends(get_db)]


@asynccontextmanager
async def connected(settings: Settings) -> AsyncIterator[AsyncEngine]:
    """Give the session maker its engine, create the tables and fill the shelves; dispose of the
    engine at the end."""
    engine = create_async_engine(
        settings.url,
        pool_size=POOL_SIZE,
        max_overflow=0,
        pool_timeout=60,  # the tour has 200 requests wait for 5 connections, on slow machines too
        connect_args={"server_settings": settings.server_settings(settings.application_name)},
    )
    session_maker.configure(bind=engine)
    try:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        await stock_the_shelves()
        yield engine
    finally:
        await engine.dispose()


@asynccontextmanager
async def watching(settings: Settings) -> AsyncIterator[RowWatcher]:
    """The one watcher for everybody who waits. An engine of its own gives its connection a name of
    its own."""
    server_settings = settings.server_settings(settings.watcher_name)
    engine = create_async_engine(settings.url, connect_args={"server_settings": server_settings})
    try:
        async with RowWatcher(engine, interval=0.5, notify=True) as watcher:
            yield watcher
    finally:
        await engine.dispose()


@asynccontextmanager
async def observing(settings: Settings) -> AsyncIterator[AsyncEngine]:
    """An engine beside the pool, for those who look at the shop or stand in its way. Each statement
    sees all that is committed."""
    server_settings = settings.server_settings(settings.page_name)
    engine = create_async_engine(
        settings.url,
        poolclass=NullPool,
        isolation_level="AUTOCOMMIT",
        connect_args={"server_settings": server_settings},
    )
    try:
        yield engine
    finally:
        await engine.dispose()


async def stock_the_shelves() -> None:
    """Put the shop's goods and vouchers into empty tables. Outside of a request, this is what
    `db_context` is for."""
    async with db_context() as session:
        session.add_all(
            [
                Product(sku="beans", price_cents=890, stock=200, shelf=500),
                Product(sku="cup", price_cents=450, stock=30, shelf=60),
                Product(sku="grinder", price_cents=7900, stock=8, shelf=10),
                Product(sku="kettle", price_cents=3400, stock=60, shelf=100),
                Product(sku="roaster", price_cents=99000, stock=1, shelf=2),
                Voucher(code="WELCOME10", percent=10),
                *(Tag(name=name) for name in LABELS),
            ]
        )
