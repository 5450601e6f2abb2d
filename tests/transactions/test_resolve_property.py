"""500 connections that are cut at a COMMIT, before, inside and after it, while the server goes on,
is restarted, crashes or is replaced: no answer is wrong, and no work is done twice.

Many units are at their COMMIT at the same time, so that one restart serves all of them.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import NullPool, make_url, text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset import (
    CommitUnknownError,
    TransactionLostError,
    create_db_context,
    on_commit,
    run_transaction,
)
from pgtoolset.testing import EmbeddedServer
from tests.nodes import Nodes
from tests.pgbouncer import pgbouncer
from tests.proxy import Direction, How, Proxy
from tests.support import Base, plain_url, sqlalchemy_url

Action = Callable[[], Awaitable[None]]

#: Before the COMMIT, inside it, and after it.
CUTS: list[tuple[Direction, How]] = [
    ("to server", "RST"),
    ("to server", "half"),
    ("to server", "whole"),
    ("to client", "half"),
    ("to client", "RST"),
]

#: Those of which the client does not hear before all of them are cut.
HELD: list[tuple[Direction, How]] = [("to client", "RST"), ("to server", "RST")]

#: What a pooler in transaction mode needs.
WITHOUT_CACHES: dict[str, dict[str, object]] = {
    "postgresql+asyncpg": {
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
        "prepared_statement_name_func": lambda: f"pgtoolset_{uuid4()}",
    },
    "postgresql+psycopg": {"prepare_threshold": None},
}

#: Of rows: each attempt has one of its own.
IDS = itertools.count(1)


@dataclass
class Unit:
    """A unit of work, and what it was told.

    Attributes:
        name: the name of its rows.
        ids: the ids of its rows, one for each attempt.
        told: `"stored"`, `"lost"`, `"unknown"`, or another error.
        callbacks: the ids whose callbacks have run.
    """

    is_tried_again: bool
    name: str = field(default_factory=lambda: str(uuid4()))
    ids: list[int] = field(default_factory=list)
    told: str = ""
    callbacks: list[int] = field(default_factory=list)

    async def work(self, session: AsyncSession) -> None:
        id_ = next(IDS)
        self.ids.append(id_)
        on_commit(session, lambda: self.callbacks.append(id_))
        # Half of them are not flushed at their COMMIT, so that a crash forgets them.
        if id_ % 2:
            await session.execute(text("SET LOCAL synchronous_commit = off"))
        insert = text("INSERT INTO item (id, name) VALUES (:id, :name)")
        await session.execute(insert, {"id": id_, "name": self.name})

    async def run(self, maker: async_sessionmaker[AsyncSession]) -> None:
        try:
            if self.is_tried_again:
                await run_transaction(maker, self.work, resolve_commit=30)
            else:
                async with create_db_context(maker, resolve_commit=30)() as session:
                    await self.work(session)
            self.told = "stored"
        except TransactionLostError:
            self.told = "lost"
        except CommitUnknownError:
            self.told = "unknown"
        except Exception as error:
            self.told = repr(error)

    def check(self, rows: dict[str, list[int]]) -> None:
        """Compare what the unit was told with what is stored."""
        found = rows.get(self.name, [])
        assert len(found) <= 1, f"done twice: {self}"
        if self.told == "stored":
            assert found == self.ids[-1:] == self.callbacks, f"not stored: {self}"
        elif self.told == "unknown":
            assert found in ([], self.ids[-1:]), f"an earlier attempt was stored: {self}"
            assert self.callbacks == []
        else:
            assert found == self.callbacks == [], f"stored: {self}"


class Lab:
    """Units whose connections run through a proxy.

    Attributes:
        told: how many units were told what.
    """

    def __init__(self, proxy: Proxy, engine: AsyncEngine, url: str) -> None:
        self._proxy = proxy
        self._maker = async_sessionmaker(engine)
        self._url = url
        self.told: Counter[str] = Counter()

    @classmethod
    @asynccontextmanager
    async def at(cls, url: str, direct_url: str = "", **arguments: object) -> AsyncIterator[Lab]:
        async with Proxy.to(url) as proxy:
            engine = create_async_engine(
                sqlalchemy_url(proxy.url), poolclass=NullPool, connect_args=arguments
            )
            try:
                yield cls(proxy, engine, direct_url or url)
            finally:
                await engine.dispose()

    async def cut(
        self,
        number: int,
        meanwhile: Action | None = None,
        *,
        at_once: int = 10,
        cuts: Sequence[tuple[Direction, How]] = CUTS,
    ) -> None:
        """Cut a number of connections, some at the same time; `meanwhile` happens once for them."""
        for done in range(0, number, at_once):
            direction, how = cuts[done // at_once % len(cuts)]
            gathered = _Gathered(at_once, meanwhile)
            self._proxy.cut_at_commit(how, direction, times=at_once, meanwhile=gathered.arrive)
            units = [Unit(is_tried_again=bool(n % 2)) for n in range(at_once)]
            async with asyncio.timeout(120):
                await asyncio.gather(*(unit.run(self._maker) for unit in units))
                await gathered.done.wait()
            assert self._proxy.cut is None, units
            await self._check(units)

    async def _check(self, units: list[Unit]) -> None:
        # A connection that was cut may still be at its COMMIT, where that was not resolved.
        connection = await asyncpg.connect(plain_url(self._url))
        try:
            rows: dict[str, list[int]] = {}
            names = [unit.name for unit in units]
            for row in await connection.fetch(
                "SELECT name, id FROM item WHERE name = ANY ($1)", names
            ):
                rows.setdefault(row["name"], []).append(row["id"])
        finally:
            await connection.close()
        for unit in units:
            unit.check(rows)
            self.told[unit.told] += 1


class _Gathered:
    """Waits for a number of connections, lets something happen once, and lets them go on."""

    def __init__(self, number: int, action: Action | None) -> None:
        self._missing = number
        self._action = action
        self.done = asyncio.Event()

    async def arrive(self) -> None:
        self._missing -= 1
        if not self._missing:
            if self._action is not None:
                await self._action()
            self.done.set()
        await self.done.wait()


async def _use_ids(url: str) -> None:
    """Commit transactions that take ids which lost ones may have had."""
    connection = await asyncpg.connect(plain_url(url))
    try:
        for _ in range(30):
            await connection.fetchval("SELECT pg_current_xact_id()")
    finally:
        await connection.close()


async def test_network(database_url: str, other: asyncpg.Connection) -> None:
    """200 cuts on the network: each is resolved."""
    async with Lab.at(database_url) as lab:
        await lab.cut(200)
    await other.execute("TRUNCATE item, part")
    assert set(lab.told) == {"stored", "lost"}


async def test_backend_killed(database_url: str, other: asyncpg.Connection) -> None:
    """110 cuts where the backends are killed meanwhile: each is resolved."""

    async def kill() -> None:
        await other.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )

    async with Lab.at(database_url) as lab:
        await lab.cut(110, kill)
    await other.execute("TRUNCATE item, part")
    assert set(lab.told) == {"stored", "lost"}


@pytest.mark.parametrize("is_killed", [False, True])
async def test_pgbouncer(database_url: str, other: asyncpg.Connection, is_killed: bool) -> None:
    """110 cuts before PgBouncer, with and without killed backends: each is resolved."""

    async def kill() -> None:
        await other.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )

    without_caches = WITHOUT_CACHES[make_url(sqlalchemy_url(database_url)).drivername]
    async with (
        pgbouncer(database_url) as url,
        Lab.at(url, database_url, **without_caches) as lab,
    ):
        # As many at the same time as PgBouncer has backends.
        await lab.cut(56 if is_killed else 54, kill if is_killed else None, at_once=2)
    await other.execute("TRUNCATE item, part")
    assert set(lab.told) == {"stored", "lost"}


@pytest.fixture
async def server(request: pytest.FixtureRequest) -> AsyncIterator[EmbeddedServer]:
    """A server of its own, which flushes only what a commit waits for."""
    version = 16 if request.config.option.pg_version == "16" else 18
    settings = {"wal_writer_delay": "10s", "autovacuum": "off", "shared_buffers": "16MB"}
    server = EmbeddedServer(version=version, settings=settings)  # type: ignore[arg-type]
    await asyncio.to_thread(server.start)
    try:
        engine = create_async_engine(server.url())
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        await engine.dispose()
        yield server
    finally:
        await asyncio.to_thread(server.stop)


async def test_restarts(server: EmbeddedServer) -> None:
    """50 cuts while the server is restarted: each is resolved. 20 while it crashes: none is."""

    async def restart() -> None:
        await asyncio.to_thread(server.restart)

    async def crash() -> None:
        await asyncio.to_thread(server.restart, immediate=True)
        await _use_ids(server.url())

    async with Lab.at(server.url()) as lab:
        await lab.cut(50, restart)
        assert set(lab.told) == {"stored", "lost"}
        lab.told.clear()
        await lab.cut(20, crash, cuts=HELD)
    assert set(lab.told) == {"unknown"}


async def test_failover(nodes: Nodes) -> None:
    """10 cuts in a failover to a standby that has not received the work: none is resolved."""

    async def fail_over() -> None:
        await nodes.fail_over()
        await _use_ids(nodes.primary.url())

    async with nodes.standby_cut_off(), Lab.at(nodes.address()) as lab:
        await lab.cut(10, fail_over, cuts=HELD)
    assert set(lab.told) == {"unknown"}
