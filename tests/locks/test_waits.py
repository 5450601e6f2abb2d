"""`list_lock_waits` and the command `pgtoolset locks`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from pgtoolset import Blocker, LockWait, list_lock_waits
from pgtoolset._commands.locks import tree
from tests.commands.running import run, start
from tests.locks.locking import waiting
from tests.support import plain_url, until


@asynccontextmanager
async def jam(
    database_url: str, other: asyncpg.Connection, holder: str, *waiters: str
) -> AsyncIterator[list[int]]:
    """Sessions that wait behind one another; yields the pids, the holder's first."""
    connections: list[asyncpg.Connection] = []
    tasks: list[asyncio.Task[str]] = []
    try:
        for number, statement in enumerate((holder, *waiters)):
            name = {"application_name": f"jam {number}"}
            connections.append(await asyncpg.connect(plain_url(database_url), server_settings=name))
            await connections[-1].execute("BEGIN")
            tasks.append(asyncio.create_task(connections[-1].execute(statement)))
            if number:
                await waiting(other, number)
            else:
                await tasks[0]
        yield [connection.get_server_pid() for connection in connections]
    finally:
        for connection in connections:
            connection.terminate()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("through", ["session", "connection", "engine"])
async def test_who_waits_for_whom(
    engine: AsyncEngine, database_url: str, other: asyncpg.Connection, through: str
) -> None:
    """Each wait has relation, mode, blockers and time, the longest first, over any source."""
    async with jam(
        database_url, other, "LOCK TABLE item", "LOCK TABLE item IN SHARE MODE", "SELECT FROM item"
    ) as pids:
        async with engine.connect() as connection, AsyncSession(engine) as session:
            source = {"session": session, "connection": connection, "engine": engine}[through]
            first, second = await list_lock_waits(source)
            assert (first.pid, first.blocked_by) == (pids[1], (pids[0],))
            assert (first.relation, first.mode) == ("public.item", "SHARE")
            assert (first.application_name, first.query) == (
                "jam 1",
                "LOCK TABLE item IN SHARE MODE",
            )
            assert first.waiting_for is not None
            assert second.waiting_for is not None
            assert timedelta(0) <= second.waiting_for <= first.waiting_for < timedelta(minutes=1)
            assert (second.pid, second.mode) == (pids[2], "ACCESS SHARE")
            assert set(second.blocked_by) == {pids[0]}


async def test_row_waits(engine: AsyncEngine, database_url: str, other: asyncpg.Connection) -> None:
    """A wait for a row has its table, and a later query in the transaction sees new waits."""
    await other.execute("INSERT INTO item (id, name) VALUES (1, '')")
    lock = "SELECT FROM item WHERE id = 1 FOR UPDATE"
    async with async_sessionmaker(engine)() as session, session.begin():
        assert list(await list_lock_waits(session)) == []
        async with jam(database_url, other, lock, lock, lock) as pids:
            waits = {wait.pid: wait for wait in await list_lock_waits(session)}
            assert {wait.relation for wait in waits.values()} == {"public.item"}
            assert waits[pids[1]].blocked_by == (pids[0],)
            assert pids[1] in waits[pids[2]].blocked_by


async def test_wrong_source() -> None:
    """What does not reach a database is refused."""
    with pytest.raises(TypeError):
        await list_lock_waits("postgresql://")


async def test_tree(database_url: str, other: asyncpg.Connection) -> None:
    """Waiters stand below the sessions in their way, and the absence of waits is said in words."""
    code, out, _ = await run("locks", plain_url(database_url))
    assert (code, out) == (0, "No session waits for a lock.\n")
    async with jam(
        database_url, other, "LOCK TABLE item IN SHARE MODE", "LOCK TABLE item", "SELECT FROM item"
    ) as pids:
        code, out, _ = await run("locks", DATABASE_URL=database_url)
        lines = out.splitlines()
        assert code == 0
        assert lines[0].startswith(f"{pids[0]} jam 0 idle in transaction, transaction of ")
        assert lines[1].startswith(f"└─ {pids[1]} jam 1 waits for ")
        assert "ACCESS EXCLUSIVE on public.item" in lines[1]
        assert lines[2].startswith(f"   └─ {pids[2]} jam 2 waits for ")
        assert len(lines) == 3


def test_tree_of_a_deadlock_and_of_hostile_names() -> None:
    """Sessions of a deadlock are shown once each, and foreign text cannot command the terminal."""

    def wait(pid: int, *blocked_by: int) -> LockWait:
        return LockWait(pid, blocked_by, None, "SHARE", None, "evil\x1b[2J", "SELECT\n1")

    sessions = {pid: Blocker(pid, None, None, None, None) for pid in (0, 1, 2, 3)}
    lines = tree([wait(1, 2), wait(2, 1), wait(3, 0)], sessions)
    assert lines[0].startswith("a prepared transaction")
    assert [line.strip("└─ ").split()[0] for line in lines[1:]] == ["3", "1", "2"]
    assert all("\x1b" not in line and "\n" not in line for line in lines)


async def test_json(database_url: str, other: asyncpg.Connection) -> None:
    """JSON has the waits and the blockers that wait for nothing, with times in seconds."""
    async with jam(database_url, other, "LOCK TABLE item", "SELECT FROM item") as pids:
        code, out, _ = await run("locks", database_url, "--json")
    report = json.loads(out)
    assert code == 0
    assert [(wait["pid"], wait["blocked_by"]) for wait in report["waits"]] == [(pids[1], [pids[0]])]
    assert isinstance(report["waits"][0]["waiting_for"], float)
    assert [blocker["pid"] for blocker in report["blockers"]] == [pids[0]]
    assert report["blockers"][0]["application_name"] == "jam 0"


async def test_watch(database_url: str, other: asyncpg.Connection) -> None:
    """It asks again and again, one line of JSON each time, until it is interrupted."""
    process = await start("locks", database_url, "--json", "--watch", "0.1")
    assert process.stdout is not None
    assert json.loads(await process.stdout.readline())["waits"] == []
    async with jam(database_url, other, "LOCK TABLE item", "SELECT FROM item"):
        stdout = process.stdout

        async def seen() -> bool:
            return len(json.loads(await stdout.readline())["waits"]) == 1

        await until(seen)
    process.send_signal(2)
    assert await asyncio.wait_for(process.wait(), 10) == 130


@pytest.mark.parametrize(
    ("answer", "options", "ends"), [("y\n", [], True), ("", ["--yes"], True), ("", [], False)]
)
async def test_terminate(
    database_url: str, other: asyncpg.Connection, answer: str, options: list[str], ends: bool
) -> None:
    """It shows the session that it is about to end, and ends it only when that is confirmed."""
    async with jam(database_url, other, "LOCK TABLE item", "SELECT FROM item") as pids:
        code, out, _ = await run(
            "locks", database_url, "--terminate", str(pids[0]), *options, answer=answer
        )
        assert out.startswith(f"{pids[0]} jam 0 idle in transaction")
        assert (code, ("Terminated" in out), ("Nothing was done" in out)) == (
            0 if ends else 1,
            ends,
            not ends,
        )

        async def gone() -> bool:
            return not await other.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE pid = $1", pids[0]
            )

        if ends:
            await until(gone)
        else:
            assert not await gone()


async def test_mistakes(database_url: str) -> None:
    """Each mistake is one line on standard error, without a traceback, with its exit code."""
    for arguments, code, says in (
        (["locks"], 2, "DATABASE_URL"),
        (["locks", "mysql://x"], 2, "URL of a PostgreSQL server"),
        (["locks", "postgresql://nobody@/nothing?host=/nowhere"], 2, "nothing"),
        (["locks", database_url, "--terminate", "2147483647"], 1, "no session with pid"),
        (["locks", database_url, "--terminate", "-1"], 2, "PID"),
        (["locks", database_url, "--watch", "0"], 2, "seconds"),
        (["nonsense"], 2, "nonsense"),
    ):
        result, _, error = await run(*arguments)
        assert (result, "Traceback" in error) == (code, False), error
        assert says in error
