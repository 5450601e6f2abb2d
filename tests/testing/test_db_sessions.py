"""`create_db_session`: tables and a session for a block, and nothing of either afterwards."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import Column, Enum, ForeignKey, Integer, MetaData, Table, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from pgtoolset import LockTimeoutError
from pgtoolset.testing import create_db_session, db_sessions
from tests.proxy import Proxy
from tests.support import connect_args, interrupt_everywhere, plain_url, swallow_error, until


class Base(DeclarativeBase):
    pass


class Thing(Base):
    __tablename__ = "thing"

    id: Mapped[int] = mapped_column(primary_key=True)
    size: Mapped[str] = mapped_column(Enum("small", "large", name="size"), default="small")


@pytest.fixture
def url(empty_database: str) -> str:
    return empty_database


@pytest.fixture
async def sql(url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(
        plain_url(url), server_settings={"application_name": "who forgot"}
    )
    yield connection
    await connection.close()


async def left(sql: asyncpg.Connection) -> list[str]:
    """The tables and types that are in the database, and its other sessions."""
    rows = await sql.fetch(
        """SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace
           UNION ALL SELECT typname FROM pg_type WHERE typnamespace = 'public'::regnamespace
           UNION ALL SELECT pid::text FROM pg_stat_activity
             WHERE datname = current_database() AND pid <> pg_backend_pid()
               AND backend_type = 'client backend'"""
    )
    return [row[0] for row in rows]


async def until_nothing_left(sql: asyncpg.Connection) -> None:
    """A backend needs a moment to notice that its client has left."""

    async def nothing() -> bool:
        return not await left(sql)

    await until(nothing)


async def test_block(url: str, sql: asyncpg.Connection) -> None:
    """The tables exist during the block, the session has no transaction, and nothing is left."""
    async with create_db_session(url, Base) as session:
        assert type(session) is AsyncSession
        assert not session.in_transaction()
        thing = Thing()
        session.add(thing)
        await session.commit()
        assert thing.id == 1  # not expired
        assert await sql.fetchval("SELECT size FROM thing") == "small"
    await until_nothing_left(sql)


async def test_plain_url_and_metadata(url: str, sql: asyncpg.Connection) -> None:
    """A URL without a driver and a MetaData are accepted."""
    async with create_db_session(plain_url(url), Base.metadata) as session:
        assert await session.scalar(text("SELECT count(*) FROM thing")) == 0
    await until_nothing_left(sql)


@pytest.mark.parametrize("end", ["raise", "fail", "cancel", "forget"])
async def test_whatever_happens(url: str, sql: asyncpg.Connection, end: str) -> None:
    """An exception, a failed or open transaction and a cancellation leave nothing, and the error
    propagates."""

    async def block() -> None:
        async with create_db_session(url, Base) as session:
            session.add(Thing())
            await session.flush()
            if end == "raise":
                raise KeyError
            if end == "fail":
                await swallow_error(session)
            if end == "cancel":
                flushed.set()
                await asyncio.Event().wait()

    flushed = asyncio.Event()
    task = asyncio.create_task(block())
    if end == "cancel":
        await flushed.wait()
        task.cancel()
    await asyncio.wait([task])
    if end in ("raise", "cancel"):
        with pytest.raises(KeyError if end == "raise" else asyncio.CancelledError):
            task.result()
    else:
        task.result()
    await until_nothing_left(sql)


async def test_tables_that_stay(url: str, sql: asyncpg.Connection) -> None:
    """With drop_tables=False the tables stay, as they are or emptied."""
    for cleanup in (False, True):
        async with create_db_session(url, Base, drop_tables=False, cleanup=cleanup) as session:
            session.add(Thing())
            await session.commit()
        assert await sql.fetchval("SELECT count(*) FROM thing") == (0 if cleanup else 1)
    async with create_db_session(url, Base) as session:
        session.add(Thing())
        await session.flush()
    await until_nothing_left(sql)


async def test_options(url: str) -> None:
    """Further arguments reach the engine and the session."""

    class MySession(AsyncSession):
        pass

    engine_kwargs = {"connect_args": connect_args(application_name="mine")}
    async with create_db_session(
        url,
        Base,
        expire_on_commit=True,
        engine_kwargs=engine_kwargs,
        session_kwargs={"class_": MySession},
    ) as session:
        assert type(session) is MySession
        assert session.sync_session.expire_on_commit
        assert await session.scalar(text("SHOW application_name")) == "mine"


async def test_cycle_without_names(url: str, sql: asyncpg.Connection) -> None:
    """Tables in a cycle of constraints without names, which SQLAlchemy cannot drop, are dropped."""
    metadata = MetaData()
    Table(
        "one",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("two", ForeignKey("two.id")),
    )
    Table(
        "two",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("one", ForeignKey("one.id")),
    )
    async with create_db_session(url, metadata):
        assert await sql.fetchval("SELECT count(*) FROM one, two") == 0
    await until_nothing_left(sql)


async def test_tables_cannot_be_made(url: str, sql: asyncpg.Connection) -> None:
    """Where a table cannot be created none is, and no connection stays."""
    metadata = MetaData()
    Table("fine", metadata, Column("id", Integer, primary_key=True))
    Table("not_fine", metadata, Column("id", Integer, primary_key=True), schema="missing")
    with pytest.raises(DBAPIError, match="missing"):
        async with create_db_session(url, metadata):
            raise AssertionError
    await until_nothing_left(sql)


async def test_tables_in_use(
    url: str,
    sql: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An open transaction of another session is named in the error, or logged after an error."""
    monkeypatch.setattr(db_sessions, "LOCK_TIMEOUT", 1)
    transaction = sql.transaction()
    with pytest.raises(LockTimeoutError, match="who forgot") as raised:
        async with create_db_session(url, Base):
            await transaction.start()
            await sql.execute("SELECT FROM thing")
    assert raised.value.blockers[0].pid == sql.get_server_pid()
    assert raised.value.tables == ("thing",)
    with pytest.raises(KeyError):
        async with create_db_session(url, Base):
            raise KeyError
    assert "who forgot" in caplog.text
    await transaction.rollback()
    async with create_db_session(url, Base):
        pass
    await until_nothing_left(sql)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"base": None}, TypeError),
        ({"database_url": None}, TypeError),
        ({"database_url": "sqlite://"}, ValueError),
        ({"engine_kwargs": {"no_such": 1}}, TypeError),
    ],
)
async def test_bad_arguments(arguments: dict[str, Any], error: type[Exception]) -> None:
    """A wrong argument is refused before any SQL: here is no server at all."""
    with pytest.raises(error):
        async with create_db_session(
            **({"database_url": "postgresql://nobody@127.0.0.1:1/x", "base": Base} | arguments)
        ):
            raise AssertionError


async def test_cancelled_everywhere(url: str, sql: asyncpg.Connection) -> None:
    """A block that is cancelled at any suspension leaves neither tables nor connections."""

    async def work(_: int) -> None:
        async with create_db_session(url, Base) as session:
            session.add(Thing())
            await session.commit()

    async def check(_: int) -> None:
        await until_nothing_left(sql)

    assert await interrupt_everywhere(work, check) > 5


# Connections that are cut


class CuttingProxy(Proxy):
    """Cuts every connection once, before it forwards a chunk.

    Attributes:
        at: the number of the chunk; 0 for none.
        chunks: the chunks until now.
        is_lasting: new connections are refused after the cut.
    """

    at = chunks = 0
    is_lasting = False

    async def _forward(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *_: object
    ) -> None:
        with suppress(OSError):
            while chunk := await source.read(65536):
                self.chunks += 1
                if self.chunks == self.at:
                    self.refusing = self.is_lasting
                    self.drop()
                    break
                sink.write(chunk)
                await sink.drain()
        sink.transport.abort()

    def cut_at(self, chunk: int) -> None:
        self.at, self.chunks, self.refusing = chunk, 0, False


async def block(url: str) -> None:
    async with create_db_session(url, Base) as session:
        session.add(Thing())
        await session.commit()


@pytest.fixture
async def proxy(url: str) -> AsyncIterator[CuttingProxy]:
    async with CuttingProxy.to(url) as proxy:
        assert isinstance(proxy, CuttingProxy)
        yield proxy


async def test_cut_everywhere(proxy: CuttingProxy, sql: asyncpg.Connection) -> None:
    """A connection that is cut at any chunk leaves neither tables nor types nor connections."""
    cut, is_whole = 0, False
    while not is_whole:
        cut += 1
        proxy.cut_at(cut)
        try:
            await block(proxy.url)
        except (OSError, DBAPIError, asyncpg.PostgresError):
            pass
        is_whole = proxy.chunks < cut
        await until_nothing_left(sql)
    assert cut > 30


async def test_cut_for_good_everywhere(
    proxy: CuttingProxy, url: str, sql: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the server cannot be reached after the cut, the next block drops what was left, also
    one of other tables, in the process that left it."""
    monkeypatch.setattr(db_sessions, "_PAUSE", 0)
    other = MetaData()
    Table("another", other, Column("id", Integer, primary_key=True))
    proxy.is_lasting = True
    cut, lost, is_whole = -3, 0, False
    while not is_whole:
        cut += 4
        proxy.cut_at(cut)
        try:
            await block(proxy.url)
        except (OSError, DBAPIError, asyncpg.PostgresError):
            lost += "thing" in await left(sql)
        is_whole = proxy.chunks < cut
        async with create_db_session(url, other):
            assert "thing" not in await left(sql)
        await until_nothing_left(sql)
    assert lost > 2


PROGRAM = """
import asyncio, os, sys
from tests.testing.test_db_sessions import Base, create_db_session

async def main():
    async with create_db_session(sys.argv[1], Base):
        os.kill(os.getpid(), 9)

asyncio.run(main())
"""


async def test_killed(url: str, sql: asyncpg.Connection) -> None:
    """The next block drops the tables and types of a process that was killed, and no others."""
    await sql.execute(
        """CREATE TABLE precious (id int); CREATE TYPE mood AS ENUM ('good');
           COMMENT ON TYPE mood IS '{"kind": "pgtoolset session table", "pid": 1}';
           COMMENT ON TABLE precious IS 'mine'"""
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM, url), cwd=Path(__file__).parents[2]
    )
    assert await process.wait() == -signal.SIGKILL
    assert {"thing", "size", "precious", "mood"} <= set(await left(sql))
    async with create_db_session(url, MetaData()):
        there = set(await left(sql))
        assert {"precious", "mood"} <= there
        assert not {"thing", "size", "thing_id_seq"} & there


async def test_of_a_living_process(url: str, sql: asyncpg.Connection) -> None:
    """A block drops no tables of another one that is open, and the comments of tables stay those
    of the metadata."""
    metadata = MetaData()
    Table("said", metadata, Column("id", Integer, primary_key=True), comment="what it is")
    async with create_db_session(url, metadata):
        async with create_db_session(url, Base):
            assert {"said", "thing"} <= set(await left(sql))
        comment = "SELECT obj_description('said'::regclass, 'pg_class')"
        assert await sql.fetchval(comment) == "what it is"
        assert await sql.fetchval("SELECT obj_description('said'::regtype, 'pg_type')")
    await until_nothing_left(sql)


async def test_left_over_in_use(
    url: str, sql: asyncpg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """What an earlier run has left and something else depends on stays, and a warning says so."""
    async with create_db_session(url, Base):
        mark = await sql.fetchval("SELECT obj_description('thing'::regtype, 'pg_type')")
    await sql.execute("CREATE TABLE t (id int); CREATE VIEW v AS SELECT id FROM t")
    await sql.execute(f"COMMENT ON TYPE t IS '{mark}'")
    await block(url)
    assert "could not be dropped" in caplog.text
    assert {"t", "v"} <= set(await left(sql))
    await sql.execute("DROP VIEW v")
    await block(url)
    await until_nothing_left(sql)
