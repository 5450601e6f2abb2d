"""Units whose COMMIT is cut while a server of their own is restarted, crashes or is replaced."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from pgtoolset import create_db_context
from pgtoolset.testing import EmbeddedServer
from tests.nodes import execute
from tests.proxy import Direction, How, Proxy
from tests.support import Base, insert, plain_url, roles, sqlalchemy_url

Action = Callable[[], Awaitable[None]]

#: Seconds: longer than any test, but for those in which no answer can come.
LONG = 60

IDS = itertools.count(1)


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[EmbeddedServer]:
    """A server that the tests restart and crash."""
    # What is not flushed at a commit stays so.
    settings = {"wal_writer_delay": "10s", "autovacuum": "off", "shared_buffers": "16MB"}
    version = 16 if request.config.option.pg_version == "16" else 18
    with EmbeddedServer(version=version, settings=settings) as server:  # type: ignore[arg-type]

        async def create() -> None:
            engine = create_async_engine(server.url())
            async with engine.begin() as connection:
                await connection.run_sync(Base.metadata.create_all)
            await engine.dispose()

        asyncio.run(create())
        yield server


class Lab:
    """Sessions of a server or of an address, through a proxy."""

    def __init__(self, proxy: Proxy, maker: async_sessionmaker[AsyncSession]) -> None:
        self.proxy = proxy
        self.maker = maker

    @classmethod
    @asynccontextmanager
    async def at(cls, url: str, user: str = "postgres") -> AsyncIterator[Lab]:
        async with Proxy.to(url) as proxy:
            engine = create_async_engine(sqlalchemy_url(proxy.url).replace("postgres@", f"{user}@"))
            try:
                yield cls(proxy, async_sessionmaker(engine, expire_on_commit=False))
            finally:
                await engine.dispose()

    async def write(
        self,
        meanwhile: Action | None = None,
        *,
        how: How = "RST",
        direction: Direction = "to client",
        timeout: float = LONG,
        commands: tuple[str, ...] = (),
    ) -> int:
        """Insert an item as a unit whose COMMIT is cut; return its id."""
        id_ = next(IDS)
        async with create_db_context(self.maker, resolve_commit=timeout)() as session:
            connection = await session.connection()
            for command in commands:
                await connection.exec_driver_sql(command)
            await insert(session, id_)
            self.proxy.cut_at_commit(how, direction, meanwhile=meanwhile)
        return id_


@pytest.fixture
async def lab(server: EmbeddedServer) -> AsyncIterator[Lab]:
    async with Lab.at(server.url()) as lab:
        yield lab


@pytest.fixture
async def plain_role(server: EmbeddedServer) -> AsyncIterator[str]:
    """A role that has privileges on tables only."""
    async with roles(server.url(), "plain"):
        await execute(server, "GRANT ALL ON ALL TABLES IN SCHEMA public TO plain")
        yield "plain"


async def is_stored(server: EmbeddedServer, id_: int) -> bool:
    return bool(await execute(server, f"SELECT count(*) FROM item WHERE id = {id_}"))


async def give_ids_away(server: EmbeddedServer, last: int = 0) -> int:
    """Commit transactions until `last` is the id of one; return the id of the first."""
    connection = await asyncpg.connect(plain_url(server.url()))
    try:
        ids = [0]
        while ids[-1] <= last:
            ids.append(await connection.fetchval("SELECT pg_current_xact_id()::text::int"))
        return ids[1]
    finally:
        await connection.close()


async def last_id_is_stored(server: EmbeddedServer) -> bool:
    """Whether the last item that any test of this module has made is stored."""
    return await is_stored(server, next(IDS) - 1)
