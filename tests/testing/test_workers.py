"""`create_worker_database`: one database for each worker, and no other one touched."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from pgtoolset import (
    DatabaseExistsError,
    DatabaseInUseError,
    DatabaseNotFoundError,
    create_database,
    drop_database,
)
from pgtoolset._postgres import renaming
from pgtoolset.testing import _owners, create_worker_database, worker_database_url, workers
from pgtoolset.testing._owners import Owner, draft_name, is_forgotten_draft, new_owner, owner_in
from tests import pgbouncer
from tests.support import Interrupted, plain_url, until

PREFIX = "pgtoolset worker test"
URL = "postgresql+asyncpg://user:p%40ss@host:5432/app?ssl=require"


async def names(connection: asyncpg.Connection) -> set[str]:
    """The databases of these tests, and drafts."""
    rows = await connection.fetch(
        "SELECT datname FROM pg_database "
        "WHERE starts_with(datname, $1) OR datname LIKE 'pgtoolset-%'",
        PREFIX,
    )
    return {row["datname"] for row in rows}


async def make(connection: asyncpg.Connection, name: str, comment: str | None = None) -> None:
    await connection.execute(f'CREATE DATABASE "{name}"')
    if comment is not None:
        await connection.execute(f"COMMENT ON DATABASE \"{name}\" IS '{comment}'")


@pytest.fixture(autouse=True)
async def databases_gone(
    other: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[None]:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    yield
    for name in await names(other):
        await other.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


# The URL


def test_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is prefix and worker, or the default; the rest of the URL stays as it is."""
    assert worker_database_url(URL, "test_db") == URL.replace("/app", "/test_db")
    assert worker_database_url(make_url(URL), "test_db", prefix="shop") == URL.replace(
        "/app", "/shop_test_db"
    )
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw3")
    assert worker_database_url(URL, "test_db") == URL.replace("/app", "/gw3")
    assert worker_database_url(URL, "test_db", prefix="shop") == URL.replace("/app", "/shop_gw3")


@pytest.mark.parametrize("scheme", ["postgres", "postgresql"])
def test_plain_url(scheme: str) -> None:
    """A URL without a driver becomes one for create_async_engine."""
    url = worker_database_url(f"{scheme}://u:secret@h/app?sslmode=require", "test_db")
    assert url == "postgresql+asyncpg://u:secret@h/test_db?ssl=require"


def test_long_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that PostgreSQL would cut to the same 63 bytes stay different, and it can hold each."""
    found = set()
    for prefix in ("p" * 70, "p" * 71, "é" * 40, "é" * 41, "p" * 60):
        for worker in ("gw1", "gw11", "w" * 70, "w" * 71):
            monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
            name = str(make_url(worker_database_url(URL, "test_db", prefix=prefix)).database)
            assert len(name.encode()) <= 63
            assert name.startswith(prefix[:12])
            assert name.endswith(worker[:20])
            found.add(name)
    assert len(found) == 20


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"database_url": "sqlite://"}, ValueError),
        ({"database_url": None}, TypeError),
        ({"default_test_db": ""}, ValueError),
        ({"default_test_db": None}, TypeError),
        ({"default_test_db": "a\0b"}, ValueError),
        ({"prefix": "a\0b"}, ValueError),
        ({"prefix": "\ud800"}, ValueError),
        ({"prefix": 7}, TypeError),
    ],
)
async def test_bad_arguments(arguments: dict[str, Any], error: type[Exception]) -> None:
    """A wrong argument is refused before any SQL: here is no server at all."""
    arguments = {
        "database_url": "postgresql://nobody@127.0.0.1:1/x",
        "default_test_db": "test_db",
    } | arguments
    with pytest.raises(error):
        worker_database_url(**arguments)
    with pytest.raises(error):
        async with create_worker_database(**arguments):
            raise AssertionError


async def test_bad_server_and_template() -> None:
    """A wrong server_url or template is refused before any SQL."""
    with pytest.raises(ValueError, match="server_url"):
        async with create_worker_database(
            "postgresql://nobody@127.0.0.1:1/x", server_url="sqlite://"
        ):
            raise AssertionError
    with pytest.raises(ValueError, match="template"):
        async with create_worker_database("postgresql://nobody@127.0.0.1:1/x", template="x" * 64):
            raise AssertionError


# A block


async def test_block(
    server_url: str, other: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database is there during the block, empty and usable by its URL, and gone after it."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw5")
    async with create_worker_database(server_url, prefix=PREFIX) as url:
        assert make_url(url).database == f"{PREFIX}_gw5"
        assert await names(other) == {f"{PREFIX}_gw5"}
        engine = create_async_engine(url)
        async with engine.begin() as connection:
            await connection.execute(text("CREATE TABLE t ()"))
        await engine.dispose()
    assert not await names(other)


async def test_block_that_raises_with_connections_open(
    server_url: str, other: asyncpg.Connection
) -> None:
    """After an exception, with a transaction open in it, the database is gone and the exception
    propagates."""
    connection = None
    with pytest.raises(KeyError):
        async with create_worker_database(server_url, prefix=PREFIX) as url:
            connection = await asyncpg.connect(plain_url(url))
            await connection.execute("BEGIN; CREATE TABLE t ()")
            raise KeyError
    assert connection is not None
    await connection.close()
    assert not await names(other)


async def test_from_a_template_by_another_server_url(
    server_url: str, other: asyncpg.Connection
) -> None:
    """The template is copied over server_url, and the URL is that of database_url."""
    model = f"{PREFIX} model"
    await create_database(model, server_url=server_url)
    connection = await asyncpg.connect(plain_url(server_url), database=model)
    await connection.execute("CREATE TABLE number AS SELECT 7 AS n")
    await connection.close()
    app_url = make_url(server_url).set(database="not there", username="nobody")
    async with create_worker_database(
        app_url, prefix=PREFIX, server_url=server_url, template=model
    ) as url:
        assert make_url(url).username == "nobody"
        connection = await asyncpg.connect(plain_url(server_url), database=make_url(url).database)
        assert await connection.fetchval("SELECT n FROM number") == 7
        await connection.close()
    with pytest.raises(DatabaseNotFoundError, match=f"{PREFIX}_test_db"):
        async with create_worker_database(server_url, prefix=PREFIX, template=f"{PREFIX} missing"):
            raise AssertionError
    assert await names(other) == {model}


async def test_dropped_by_the_block_itself(server_url: str, other: asyncpg.Connection) -> None:
    """A block may drop its database; a database that replaces it stays."""
    name = f"{PREFIX}_test_db"
    async with create_worker_database(server_url, prefix=PREFIX):
        await drop_database(name, server_url=server_url)
    async with create_worker_database(server_url, prefix=PREFIX):
        await drop_database(name, server_url=server_url)
        await make(other, name)
    assert await names(other) == {name}


# The owner


async def test_not_ours(server_url: str, other: asyncpg.Connection) -> None:
    """A database of that name without a mark is an error and stays, whatever its comment."""
    name = f"{PREFIX}_test_db"
    for comment in (None, "of great value", "{}", "[1]", '{"kind": "pgtoolset worker database"}'):
        await make(other, name, comment)
        with pytest.raises(DatabaseExistsError, match=name):
            async with create_worker_database(server_url, prefix=PREFIX):
                raise AssertionError
        assert await names(other) == {name}
        await drop_database(name, server_url=server_url)


async def test_two_at_a_time(server_url: str, other: asyncpg.Connection) -> None:
    """The second of two blocks of one name raises an error with the process id of the first."""
    async with create_worker_database(server_url, prefix=PREFIX) as url:
        with pytest.raises(DatabaseExistsError, match=str(os.getpid())):
            async with create_worker_database(server_url, prefix=PREFIX):
                raise AssertionError
        async with create_worker_database(server_url, "another", prefix=PREFIX):
            assert len(await names(other)) == 2
        await (await asyncpg.connect(plain_url(url))).close()
    assert not await names(other)


async def test_entered_by_many_at_once(server_url: str, other: asyncpg.Connection) -> None:
    """Of many blocks of one name at a time, one gets the database."""

    refused = 0

    async def block() -> bool:
        nonlocal refused
        try:
            async with create_worker_database(server_url, prefix=PREFIX) as url:
                await (await asyncpg.connect(plain_url(url))).close()
                await until(lambda: refused == 3)
        except DatabaseExistsError:
            refused += 1
            return False
        return True

    assert sorted(await asyncio.gather(*(block() for _ in range(4)))) == [False, False, False, True]
    assert not await names(other)


async def alive() -> Owner:
    """This process."""
    return await asyncio.to_thread(new_owner)


async def parent() -> Owner:
    """Another process that is alive."""
    started = await asyncio.to_thread(_owners._started, os.getppid())
    return replace(await alive(), pid=os.getppid(), started=started or 0)


async def dead() -> Owner:
    """A process of this machine that has ended."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    await process.wait()
    return replace(await alive(), pid=process.pid)


async def test_left_over(
    server_url: str, other: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that a dead process, a reused process id, another machine or a failed teardown has
    left is dropped first."""
    name = f"{PREFIX}_test_db"
    own = await alive()
    for owner in (
        await dead(),
        replace(own, pid=os.getppid(), started=1),
        replace(own, machine="elsewhere"),
        own,
    ):
        await make(other, name, owner.mark())
        connection = await asyncpg.connect(plain_url(server_url), database=name)
        if owner.machine == "elsewhere":
            await connection.close()
        async with create_worker_database(server_url, prefix=PREFIX) as url:
            fresh = await asyncpg.connect(plain_url(url))
            comment = await fresh.fetchval(
                "SELECT shobj_description(oid, 'pg_database') FROM pg_database "
                "WHERE datname = current_database()"
            )
            assert owner_in(comment) not in (None, owner)
            await fresh.close()
        await connection.close()
        assert not await names(other)


async def test_of_a_living_process(server_url: str, other: asyncpg.Connection) -> None:
    """A database of another living process is an error under its name and is never swept."""
    name = f"{PREFIX}_test_db"
    await make(other, name, (await parent()).mark())
    with pytest.raises(DatabaseExistsError, match=f"pid {os.getppid()}"):
        async with create_worker_database(server_url, prefix=PREFIX):
            raise AssertionError
    async with create_worker_database(server_url, "another", prefix=PREFIX):
        assert name in await names(other)
    assert await names(other) == {name}


async def test_of_another_machine(server_url: str, other: asyncpg.Connection) -> None:
    """A database of another machine is not swept, and is an error under its name while it has
    sessions."""
    name = f"{PREFIX}_test_db"
    await make(other, name, replace(await alive(), machine="elsewhere").mark())
    async with create_worker_database(server_url, "another", prefix=PREFIX):
        assert name in await names(other)
    connection = await asyncpg.connect(plain_url(server_url), database=name)
    with pytest.raises(DatabaseInUseError, match="elsewhere"):
        async with create_worker_database(server_url, prefix=PREFIX):
            raise AssertionError
    await connection.close()


async def test_of_another_machine_long_ago(server_url: str, other: asyncpg.Connection) -> None:
    """A database of another machine is swept after a day, unless it has sessions."""
    owner = replace(await alive(), machine="elsewhere")
    await make(other, f"{PREFIX} of today", owner.mark())
    for name in ("long ago", "still used"):
        await make(other, f"{PREFIX} {name}", replace(owner, created=owner.created - 90_000).mark())
    connection = await asyncpg.connect(plain_url(server_url), database=f"{PREFIX} still used")
    async with create_worker_database(server_url, prefix=PREFIX):
        pass
    assert await names(other) == {f"{PREFIX} of today", f"{PREFIX} still used"}
    await connection.close()


async def test_sweep(server_url: str, other: asyncpg.Connection) -> None:
    """Databases and drafts of dead processes are swept under any name; databases without a mark
    stay."""
    await make(other, f"{PREFIX} abandoned", (await dead()).mark())
    await make(other, draft_name(await dead()))
    await make(other, draft_name(await alive()))
    await make(other, f"{PREFIX} foreign")
    await make(other, f"{PREFIX} commented", json.dumps({"kind": "something else", "pid": 1}))
    before = await names(other)
    assert len(before) == 5
    async with create_worker_database(server_url, prefix=PREFIX):
        pass
    left = await names(other)
    assert left >= {f"{PREFIX} foreign", f"{PREFIX} commented"}
    assert len(left) == 3


async def test_swept_by_many_at_once(server_url: str, other: asyncpg.Connection) -> None:
    """Workers that sweep the same databases at a time each get their own."""
    for number in range(3):
        await make(other, f"{PREFIX} abandoned {number}", (await dead()).mark())
        await make(other, f"{PREFIX}_worker{number}", (await dead()).mark())

    all_are_in = asyncio.Barrier(4)

    async def block(number: int) -> None:
        async with create_worker_database(server_url, f"worker{number}", prefix=PREFIX) as url:
            await (await asyncpg.connect(plain_url(url))).close()
            await all_are_in.wait()

    await asyncio.gather(*map(block, range(4)))
    assert not await names(other)


def test_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of a draft says whether its maker is alive; one of another machine is abandoned
    after an hour."""
    owner = new_owner()
    assert not is_forgotten_draft(draft_name(owner))
    assert is_forgotten_draft(draft_name(replace(owner, started=owner.started + 1)))
    assert not is_forgotten_draft("pgtoolset-draft")
    foreign = draft_name(owner).replace(_owners._digest(), "0" * 12)
    assert not is_forgotten_draft(foreign)
    now = _owners.time.time()
    monkeypatch.setattr(_owners.time, "time", lambda: now + 3700)
    assert is_forgotten_draft(foreign)
    assert not is_forgotten_draft(draft_name(owner))
    assert len(draft_name(replace(owner, pid=2**22, started=2**40)).encode()) <= 63


PROGRAM = """
import asyncio, sys, asyncpg
from pgtoolset.testing import create_worker_database

async def main():
    async with create_worker_database(sys.argv[1], prefix=sys.argv[2]) as url:
        connection = await asyncpg.connect("postgresql" + url[url.index("://"):])
        await connection.execute("BEGIN; CREATE TABLE t ()")
        print("ready", flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_killed(
    server_url: str, other: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run, under another name too, drops the database of a killed run."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    for next_worker in ("gw0", "gw7"):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", PROGRAM, server_url, PREFIX),
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTEST_XDIST_WORKER": "gw0"},
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
        with pytest.raises(DatabaseExistsError, match=f"pid {process.pid}"):
            async with create_worker_database(server_url, prefix=PREFIX):
                raise AssertionError
        process.send_signal(signal.SIGKILL)
        await process.wait()
        assert await names(other) == {f"{PREFIX}_gw0"}
        monkeypatch.setenv("PYTEST_XDIST_WORKER", next_worker)
        async with create_worker_database(server_url, prefix=PREFIX):
            assert await names(other) == {f"{PREFIX}_{next_worker}"}
        monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
        assert not await names(other)


# Locks of others


@pytest.fixture
async def stranger(server_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A session that can hold locks, in an open transaction."""
    settings = {"application_name": "the stranger"}
    connection = await asyncpg.connect(plain_url(server_url), server_settings=settings)
    await connection.execute("BEGIN")
    yield connection
    await connection.close()


async def is_waiting(connection: asyncpg.Connection) -> bool:
    """Whether a session waits for a lock on a database."""
    query = "SELECT count(*) FROM pg_locks WHERE locktype = 'object' AND NOT granted"
    return bool(await connection.fetchval(query))


@pytest.mark.parametrize("whose", ["left over", "of the block"])
async def test_locked_by_a_stranger(
    server_url: str,
    other: asyncpg.Connection,
    stranger: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    whose: str,
) -> None:
    """A database that another session has locked is waited for within a limit; the error names the
    session, and the next run drops the database."""
    monkeypatch.setattr(renaming, "LOCK_TIMEOUT", 0.2)
    name = f"{PREFIX}_test_db"
    lock = f'ALTER DATABASE "{name}" CONNECTION LIMIT 7; COMMENT ON DATABASE "{name}" IS NULL'
    with pytest.raises(DatabaseInUseError, match="the stranger") as raised:
        if whose == "left over":
            await make(other, name, (await dead()).mark())
            await stranger.execute(lock)
        async with create_worker_database(server_url, prefix=PREFIX):
            await stranger.execute(lock)
    assert [each.pid for each in raised.value.sessions] == [stranger.get_server_pid()]
    assert raised.value.database == name
    assert await names(other) == {name}
    await stranger.execute("ROLLBACK")
    async with create_worker_database(server_url, prefix=PREFIX):
        pass
    assert not await names(other)


async def test_template_locked_by_a_stranger(
    server_url: str,
    other: asyncpg.Connection,
    stranger: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A template that another session has locked is waited for within a limit, and nothing is
    left."""
    model = f"{PREFIX} model"
    await make(other, model)
    await stranger.execute(f"COMMENT ON DATABASE \"{model}\" IS 'locked'")
    monkeypatch.setattr(workers, "_MAKE_TIMEOUT", 0.5)
    with pytest.raises(DatabaseInUseError, match=r"within 0\.5 s"):
        async with create_worker_database(server_url, prefix=PREFIX, template=model):
            raise AssertionError
    assert await names(other) == {model}


@pytest.mark.parametrize("whose", ["left over", "the template"])
async def test_cancelled_while_a_lock_is_waited_for(
    server_url: str, other: asyncpg.Connection, stranger: asyncpg.Connection, whose: str
) -> None:
    """A cancellation ends the wait for a lock of another session, and leaves nothing."""
    name = f"{PREFIX}_test_db" if whose == "left over" else f"{PREFIX} model"
    await make(other, name, (await dead()).mark() if whose == "left over" else None)
    await stranger.execute(f"COMMENT ON DATABASE \"{name}\" IS 'locked'")

    async def block() -> None:
        template = None if whose == "left over" else name
        async with create_worker_database(server_url, prefix=PREFIX, template=template):
            raise AssertionError

    task = asyncio.create_task(block())
    await until(lambda: is_waiting(other))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not await is_waiting(other)
    assert await names(other) == {name}


async def test_replaced_after_the_look(server_url: str, other: asyncpg.Connection) -> None:
    """A database that has taken the place of the one that was seen keeps its name and its
    sessions."""
    name = f"{PREFIX}_test_db"
    await make(other, name, "new")
    server = plain_url(server_url)
    session = await asyncpg.connect(server, database=name)
    await renaming.end_sessions(other, name, "old")
    assert await session.fetchval("SELECT 1") == 1
    await session.close()
    assert not await renaming.rename_if_marked(other, name, f"{PREFIX} doomed", "old")
    assert not await renaming.rename_if_marked(other, name, f"{PREFIX} doomed", None)
    assert await names(other) == {name}
    assert await renaming.rename_if_marked(other, name, f"{PREFIX} doomed", "new")
    assert await names(other) == {f"{PREFIX} doomed"}


async def test_behind_a_pooler(server_url: str, other: asyncpg.Connection) -> None:
    """Behind PgBouncer in transaction mode, with fewer backends than workers, each gets its own
    database, what is left over is swept, and no lock stays on a backend."""
    await make(other, f"{PREFIX} abandoned", (await dead()).mark())
    all_are_in = asyncio.Barrier(4)

    async def block(number: int) -> None:
        async with create_worker_database(pooled, f"worker{number}", prefix=PREFIX):
            await all_are_in.wait()

    async with pgbouncer.pgbouncer(server_url) as pooled:
        for _ in range(2):
            await asyncio.gather(*map(block, range(4)))
            assert not await names(other)
            assert not await other.fetch("SELECT * FROM pg_locks WHERE locktype = 'advisory'")


# Failures


async def test_cancelled_everywhere(server_url: str, other: asyncpg.Connection) -> None:
    """A block that is cancelled at any suspension leaves no database and no draft."""

    async def block() -> None:
        async with create_worker_database(server_url, prefix=PREFIX):
            await asyncio.sleep(0)

    before = set(workers._open)  # the database that this test runs on is one
    for n in range(1, 200):
        interrupted = Interrupted(block(), n)

        async def run(interrupted: Interrupted = interrupted) -> None:
            await interrupted

        task = asyncio.create_task(run())
        await asyncio.wait([task], timeout=20)
        assert task.done(), n
        if not task.cancelled():
            task.result()
        assert not await names(other), n
        assert workers._open == before
        if not interrupted.happened:
            break
    else:
        raise AssertionError("never finished")
    assert n > 10


async def test_teardown_fails(
    server_url: str,
    other: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A drop that fails raises after a block that succeeded, and is logged after another."""

    async def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no server")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no server"):
        async with create_worker_database(server_url, prefix=PREFIX):
            patched.setattr(workers, "drop", fail)
    with monkeypatch.context() as patched, pytest.raises(KeyError):
        async with create_worker_database(server_url, prefix=PREFIX):
            patched.setattr(workers, "drop", fail)
            raise KeyError
    assert "could not be dropped" in caplog.text
    async with create_worker_database(server_url, prefix=PREFIX):
        pass
    assert not await names(other)
