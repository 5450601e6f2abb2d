"""Names, queries and messages with control characters, from another session and the database.

Each function fails on a real server in each way that quotes such a text, and the commands print it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from sqlalchemy import Column, ForeignKey, MetaData, Table, insert, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

import pgtoolset
from pgtoolset import (
    DatabaseExistsError,
    DatabaseInUseError,
    LockTimeoutError,
    OutsideReferenceError,
    PgToolsetError,
    RowNotFoundError,
    RowWatcher,
    TransactionAbortedError,
    WatchFailedError,
    advisory_lock,
    cleanup_tables,
    create_database,
    create_db_context,
    drop_database,
    get_transaction,
    list_lock_waits,
    lock_rows,
    lock_tables,
    m2m_add,
    wait_for_row_change,
)
from pgtoolset._commands import doctor
from tests.commands.running import line, run, running
from tests.locks.locking import waiting
from tests.support import plain_url

#: The title of a terminal, a cleared screen, C1, a new line, an override and a zero width.
EVIL = "\x1b]0;t\x07\x1b[2J\x9b\r\n\u202e\u2066\u200b\u2028\x7f"
TABLE = f"t{EVIL}"
COLUMN = f"c{EVIL}"


class Base(DeclarativeBase):
    metadata = MetaData()


class Row(Base):
    __tablename__ = TABLE

    id: Mapped[int] = mapped_column(COLUMN, primary_key=True)
    note: Mapped[str] = mapped_column(f"n{EVIL}", default="")
    friends: Mapped[list[Row]] = relationship(
        secondary=lambda: friends,
        primaryjoin=lambda: Row.id == friends.c.one,
        secondaryjoin=lambda: Row.id == friends.c.two,
    )


friends = Table(
    f"f{EVIL}",
    Base.metadata,
    Column(f"o{EVIL}", ForeignKey(Row.id), key="one"),
    Column(f"w{EVIL}", ForeignKey(Row.id), key="two"),
)


class Odd(DeclarativeBase):
    """Attributes that are called as their columns are, as reflection makes them."""


Odd_ = type(f"Odd{EVIL}", (), {})
Odd.registry.map_imperatively(Odd_, Row.__table__.to_metadata(Odd.metadata))


def check(error: BaseException) -> None:
    """An error of the library is one line that commands no terminal."""
    assert str(error).isprintable(), ascii(str(error))
    assert all(str(each).isprintable() for each in error.args)


@pytest.fixture
async def url(empty_database: str) -> str:
    """A database with hostile tables, which is emptied after the test."""
    engine = create_async_engine(empty_database)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(insert(Row).values(id=1, note=EVIL))
    await engine.dispose()
    return empty_database


@pytest.fixture
async def own(url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(url)
    yield engine
    await engine.dispose()


@asynccontextmanager
async def holder(url: str, statement: str = "") -> AsyncIterator[asyncpg.Connection]:
    """A session with a hostile name, query and lock."""
    connection = await asyncpg.connect(plain_url(url))
    try:
        await connection.execute(f"SET application_name = 'app{EVIL}'")
        await connection.execute("BEGIN")
        await connection.execute(statement or f"LOCK TABLE \"{TABLE}\"; SELECT '{EVIL}'")
        yield connection
    finally:
        connection.terminate()


async def _locks(session: AsyncSession) -> None:
    async with lock_tables(session, [Row], timeout=0.2):
        pass


async def _rows(session: AsyncSession) -> None:
    await lock_rows(session, Row, [1], timeout=0.2)


async def _no_wait(session: AsyncSession) -> None:
    async with lock_tables(session, [Row], nowait=True):
        pass


@pytest.mark.parametrize("lock", [_locks, _rows, _no_wait])
async def test_locks(
    url: str, own: AsyncEngine, lock: Callable[[AsyncSession], Awaitable[None]]
) -> None:
    """A lock that cannot be acquired names the table and the session in the way, escaped."""
    async with holder(url), AsyncSession(own) as session:
        with pytest.raises(LockTimeoutError) as caught:
            await lock(session)
    check(caught.value)
    for blocker in caught.value.blockers:
        assert str(blocker).isprintable()
        assert repr(blocker).isprintable()
        assert EVIL.strip() in (blocker.query or ""), "the attribute is as PostgreSQL has it"


async def test_advisory_locks(url: str, own: AsyncEngine) -> None:
    """The same of an advisory lock whose key is hostile."""
    async with AsyncSession(own) as one, AsyncSession(own) as two:
        async with advisory_lock(one, EVIL):
            with pytest.raises(LockTimeoutError) as caught:
                async with advisory_lock(two, EVIL, timeout=0.2):
                    pass
    check(caught.value)


async def test_waits_and_their_command(url: str, own: AsyncEngine) -> None:
    """What `list_lock_waits` reports is raw, its words are clean, and so is the tree."""
    async with holder(url) as first, own.connect() as connection:
        waiter = await asyncpg.connect(plain_url(url))
        await waiter.execute(f"SET application_name = 'waits{EVIL}'")
        task = asyncio.create_task(waiter.execute(f'SELECT 1 /* {EVIL} */ FROM "{TABLE}"'))
        try:
            onlooker = await asyncpg.connect(plain_url(url))
            try:
                await waiting(onlooker)
            finally:
                await onlooker.close()
            [wait] = await list_lock_waits(connection)
            assert EVIL in (wait.query or "")
            assert EVIL in (wait.relation or "")
            assert str(wait).isprintable()
            assert repr(wait).isprintable()
            assert f"pid {wait.pid}" in str(wait)
            code, output, errors = await run("locks", url)
            assert (code, errors) == (0, "")
            assert len(output.splitlines()) == 2
            assert all(each.isprintable() for each in output.splitlines())
            assert str(first.get_server_pid()) in output
            code, output, _ = await run("locks", url, "--json")
            assert code == 0
            assert all(each.isprintable() for each in output.splitlines())
            assert json.loads(output)["waits"][0]["relation"] == wait.relation
        finally:
            waiter.terminate()
            await asyncio.gather(task, return_exceptions=True)


async def test_the_command_watch(url: str) -> None:
    """The names of columns and their values are printed escaped, and mistakes too."""
    async with running("watch", url, TABLE, "1", "--interval", "0.05") as lines:
        assert (await line(lines)).rstrip("\n").isprintable()
        connection = await asyncpg.connect(plain_url(url))
        note = f"n{EVIL}"
        await connection.execute(f'UPDATE "{TABLE}" SET "{note}" = \'b{EVIL}\'')
        assert "update" in (changed := await line(lines))
        assert changed.rstrip("\n").isprintable()
        await connection.execute(f'CREATE TABLE "k{EVIL}" (a bool, b "char")')
        await connection.close()
    for arguments in ([f"none{EVIL}", "1"], [TABLE, EVIL], [TABLE, "1", "2"], [f"k{EVIL}", "1"]):
        code, output, errors = await run("watch", url, *arguments)
        assert (code, output) == (2, "")
        assert errors.rstrip("\n").isprintable()


async def test_the_command_doctor(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with hostile names is printed escaped, to people and to programs."""
    monkeypatch.setattr(doctor, "LONG_IDLE", 0)
    connection = await asyncpg.connect(plain_url(url))
    await connection.execute(
        f"""CREATE SEQUENCE "s{EVIL}" MAXVALUE 10;
            ALTER TABLE "{TABLE}" ADD "z{EVIL}" int DEFAULT nextval('"s{EVIL}"');
            SELECT setval('"s{EVIL}"', 10);
            CREATE FUNCTION "f{EVIL}"() RETURNS trigger LANGUAGE plpgsql AS
              'BEGIN RETURN NULL; END';
            CREATE TRIGGER pgtoolset_insert AFTER INSERT ON "{TABLE}"
              EXECUTE FUNCTION "f{EVIL}"();
            INSERT INTO "{TABLE}" VALUES (2, '', 0), (3, '', 0)"""
    )
    with pytest.raises(asyncpg.UniqueViolationError):
        await connection.execute(
            f'CREATE UNIQUE INDEX CONCURRENTLY "i{EVIL}" ON "{TABLE}" ("z{EVIL}")'
        )
    await connection.close()
    async with holder(url, f"SELECT 'password=hunter2 {EVIL}'"):
        code, output, errors = await run("doctor", url)
        assert (code, errors) == (1, "")
        assert all(each.isprintable() for each in output.splitlines())
        assert "hunter2" not in output
        code, output, errors = await run("doctor", url, "--json")
    assert (code, errors) == (1, "")
    assert all(each.isprintable() for each in output.splitlines())
    assert "hunter2" not in output
    report = json.loads(output)
    assert {each["name"] for each in report["findings"]} == {
        "idle_in_transaction",
        "invalid_index",
        "missing_triggers",
        "sequence_end",
        "stolen_trigger",
    }
    assert all(each["message"].isprintable() for each in report["findings"])


async def test_databases(server_url: str) -> None:
    """A database that exists, or is in use by a hostile session, is named escaped."""
    name = f"pgtoolset{EVIL}"
    await drop_database(name, server_url=server_url, missing_ok=True, force=True)
    await create_database(name, server_url=server_url)
    try:
        with pytest.raises(DatabaseExistsError) as exists:
            await create_database(name, server_url=server_url)
        check(exists.value)
        connection = await asyncpg.connect(plain_url(server_url), database=name)
        try:
            await connection.execute(f"SET application_name = 'a{EVIL}'")
            await connection.execute(f"SELECT '{EVIL}'")
            with pytest.raises(DatabaseInUseError) as in_use:
                await drop_database(name, server_url=server_url)
            check(in_use.value)
            assert in_use.value.sessions
            assert in_use.value.database == name
        finally:
            await connection.close()
    finally:
        await drop_database(name, server_url=server_url, force=True)


async def test_rows_from_outside(url: str, own: AsyncEngine) -> None:
    """A table outside of the metadata, and its constraint, are named escaped."""
    async with own.begin() as connection:
        await connection.exec_driver_sql(
            f'CREATE TABLE "out{EVIL}"'
            f' (i int CONSTRAINT "fk{EVIL}" REFERENCES "{TABLE}" ("{COLUMN}"))'
        )
        await connection.exec_driver_sql(f'INSERT INTO "out{EVIL}" VALUES (1)')
    async with AsyncSession(own) as session:
        with pytest.raises(OutsideReferenceError) as caught:
            await cleanup_tables(session, Base)
    check(caught.value)


async def test_a_swallowed_message(own: AsyncEngine, caplog: pytest.LogCaptureFixture) -> None:
    """The message of a server that a block has swallowed is quoted escaped, without a password."""
    words = f"x{EVIL} postgresql://me:hunter2@h/db"
    raising = text(
        f"DO $do$ BEGIN RAISE EXCEPTION '%', $w${words}$w$ USING DETAIL = 'a\nb'; END $do$"
    )
    with pytest.raises(TransactionAbortedError) as caught:
        async with create_db_context(session_maker=lambda: AsyncSession(own))() as session:
            try:
                await session.execute(raising)
            except DBAPIError:
                pass
    check(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "hunter2" in str(caught.value.__cause__), "the driver's error is unchanged"
    async with AsyncSession(own) as session, get_transaction(session):

        def callback() -> None:
            raise ValueError(words)

        pgtoolset.on_commit(session, callback)
    [record] = [each for each in caplog.records if each.levelno == logging.ERROR]
    formatted = logging.Formatter().format(record)
    assert all(each.isprintable() for each in formatted.split("\n"))
    assert "hunter2" not in formatted


@pytest.mark.asyncpg(reason="RowWatcher")
async def test_watching(url: str, own: AsyncEngine) -> None:
    """Errors of watching: a missing row, a table that is gone, a class with hostile names."""
    async with AsyncSession(own) as session:
        for model in (Row, Odd_):
            with pytest.raises(RowNotFoundError) as missing:
                await wait_for_row_change(session, model, 7, timeout=1)
            check(missing.value)
    async with RowWatcher(own, interval=0.02) as watcher:
        with pytest.raises(RowNotFoundError) as missing:
            await watcher.wait(Odd_, 7, timeout=5)
        check(missing.value)
        waiter = asyncio.create_task(watcher.wait(Row, 1, timeout=30))
        async with watcher.changes(Row, 1):
            async with own.begin() as connection:
                await connection.run_sync(Base.metadata.drop_all)
            with pytest.raises(WatchFailedError) as failed:
                await waiter
            check(failed.value)


async def test_refused_arguments(own: AsyncEngine) -> None:
    """A refusal of an argument of a model with hostile names is clean, too."""
    column: Any = getattr(Odd_, COLUMN)
    calls: list[Callable[[AsyncSession], Awaitable[object]]] = [
        lambda session: lock_rows(session, Odd_, ["x"]),
        lambda session: lock_rows(session, Odd_, [None]),
        lambda session: lock_rows(session, Odd_, [(1, 2)]),
        lambda session: lock_rows(session, Odd_, [{EVIL: 1}]),
        lambda session: wait_for_row_change(session, Odd_, EVIL),
        lambda session: wait_for_row_change(session, Odd_, 1, columns=column),
        lambda session: wait_for_row_change(session, Odd_, 1, columns=[EVIL]),
        lambda session: wait_for_row_change(session, Odd_, 1, columns=[5]),
        lambda session: wait_for_row_change(session, Row, 1, columns=[column]),
        lambda session: wait_for_row_change(session, Odd_, 1, baseline={EVIL: 1}),
        lambda session: wait_for_row_change(session, Odd_, 1, baseline={}),
        lambda session: wait_for_row_change(session, Odd_, 1, baseline=Row()),
        lambda session: m2m_add(session, Row(id=1), column, Row(id=2)),
        lambda session: m2m_add(session, Odd_(), Row.friends, Row(id=2)),
        lambda session: m2m_add(session, Row(id=1), Row.friends, pks=[EVIL]),
        lambda session: m2m_add(session, Row(id=1), Row.friends, pks=[2], values={EVIL: 1}),
        lambda session: create_database(EVIL * 9, server_url=EVIL),
        lambda session: drop_database(EVIL, server_url=f"{EVIL}://{EVIL}"),
    ]
    for call in calls:
        async with AsyncSession(own) as session:
            with pytest.raises((ValueError, TypeError, PgToolsetError)) as caught:
                await call(session)
        check(caught.value)
