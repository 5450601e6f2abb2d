"""`pgtoolset doctor`: what it reports of servers, and of roles that see little."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import psycopg
import pytest
from sqlalchemy import make_url

from pgtoolset._commands import _objects, doctor
from pgtoolset._commands._findings import Finding
from pgtoolset._commands._settings import Pools, of_connections, of_pooler, of_server, of_settings
from pgtoolset._postgres import pooling
from pgtoolset._postgres.checkup import Connections, ServerState
from pgtoolset._postgres.pooling import Pooler
from tests.commands.running import run
from tests.nodes import Nodes, execute
from tests.pgbouncer import pgbouncer
from tests.support import DRIVER, plain_url, until


async def examined(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the report of `doctor --json`, which has no word on errors."""
    code, output, errors = await run("doctor", *arguments, "--json")
    assert errors == ""
    return code, json.loads(output)


def names(findings: list[dict[str, Any]]) -> list[str]:
    return [each["name"] for each in findings]


@pytest.fixture
async def owner(empty_database: str) -> AsyncIterator[asyncpg.Connection]:
    """A superuser in a database of the test's own."""
    connection = await asyncpg.connect(plain_url(empty_database))
    yield connection
    await connection.close()


@pytest.fixture
async def clerk(owner: asyncpg.Connection, empty_database: str) -> AsyncIterator[str]:
    """The URL of a role without any privilege."""
    await owner.execute('CREATE ROLE "pgts clerk" LOGIN')
    yield (
        make_url(empty_database)
        .set(username="pgts clerk", password=None)
        .render_as_string(hide_password=False)
    )
    await owner.execute('DROP OWNED BY "pgts clerk"; DROP ROLE "pgts clerk"')


async def test_healthy(owner: asyncpg.Connection, empty_database: str) -> None:
    """A healthy server has no findings, the exit code is 0, and the report says what it is."""
    code, report = await examined(empty_database)
    assert (code, report["findings"]) == (0, [])
    server = report["server"]
    assert (server["role"], server["pooler"], server["driver"]) == ("primary", None, DRIVER)
    assert server["version"] == await owner.fetchval("SHOW server_version")
    assert server["database"] == make_url(empty_database).database
    code, output, errors = await run("doctor", empty_database)
    assert (code, errors) == (0, "")
    assert "\nNo findings, " in output
    assert output.startswith(f"PostgreSQL {server['version']}, primary: postgresql://")
    for note in report["notes"]:
        assert f"note {note['name']}\n  {note['message']}\n  -> {note['advice']}\n" in output


async def test_pgbouncer(empty_database: str) -> None:
    """Behind a pooler that loses prepared statements the option of the driver is named."""
    async with pgbouncer(empty_database) as url:
        code, report = await examined(url, "--pool-size", "9999")
    assert (code, names(report["findings"])) == (1, ["pooler"])
    assert report["server"]["pooler"] == {"mode": "transaction", "keeps_statements": False}
    option = {"asyncpg": "statement_cache_size", "psycopg": "prepare_threshold"}[DRIVER]
    assert option in report["findings"][0]["advice"]
    assert "max_client_conn" in next(
        each["advice"] for each in report["notes"] if each["name"] == "pools_behind_pooler"
    )


async def test_session_mode(empty_database: str) -> None:
    """A pooler in session mode keeps prepared statements, so that it is only noted."""
    async with pgbouncer(empty_database, pool_mode="session") as url:
        code, report = await examined(url)
    assert (code, report["findings"]) == (0, [])
    assert report["server"]["pooler"] == {"mode": "session", "keeps_statements": True}
    assert "pooler" in names(report["notes"])


@pytest.mark.skipif(
    DRIVER == "psycopg" and tuple(map(int, psycopg.__version__.split(".")[:2])) < (3, 3),
    reason="psycopg 3.2 goes on connecting after a cancellation: no answer in time is all it says",
)
async def test_one_backend(empty_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a second client would wait for the only backend, the examination does not."""
    monkeypatch.setattr(pooling, "_LIMIT", 0.5)
    async with pgbouncer(empty_database, 2, pool_mode="session") as url:
        holder = await asyncpg.connect(plain_url(url), statement_cache_size=0)
        try:
            await holder.fetchval("SELECT 1")
            code, report = await examined(url)
        finally:
            await holder.close()
    assert code == 1
    assert report["server"]["pooler"] == {"mode": None, "keeps_statements": None}
    assert "may lose prepared statements" in report["findings"][0]["message"]


async def test_statement_mode(empty_database: str) -> None:
    """A pooler that has no transactions is refused, with its own words, in one line."""
    async with pgbouncer(empty_database, pool_mode="statement") as url:
        code, output, errors = await run("doctor", url)
    assert (code, output) == (2, "")
    assert "statement pooling mode" in errors
    assert errors.count("\n") == 1


async def test_standby(nodes: Nodes) -> None:
    """A standby is no finding; one whose replay is paused is."""
    url = nodes.standby.url(driver=f"postgresql+{DRIVER}")
    code, report = await examined(url)
    assert (code, report["findings"], report["server"]["role"]) == (0, [], "standby")
    assert "standby" in names(report["notes"])
    await execute(nodes.standby, "SELECT pg_wal_replay_pause()")
    code, report = await examined(url)
    assert (code, names(report["findings"])) == (1, ["replay_paused"])


async def test_a_role_without_rights(owner: asyncpg.Connection, clerk: str) -> None:
    """Such a role gets what it may see, and a note for each thing that it may not."""
    await owner.execute(
        """CREATE TABLE closed (id serial);
           REVOKE SELECT ON pg_catalog.pg_index FROM PUBLIC"""
    )
    try:
        code, report = await examined(clerk)
    finally:
        await owner.execute("GRANT SELECT ON pg_catalog.pg_index TO PUBLIC")
    assert (code, report["findings"]) == (0, [])
    assert report["server"]["user"] == "pgts clerk"
    notes = [each["message"] for each in report["notes"] if each["name"] == "not_checked"]
    assert sorted(each.partition(";")[0] for each in notes) == [
        "not checked: how far sequences are from their ends",
        "not checked: indexes",
        "not checked: what other roles' sessions do",
    ]
    assert any("pg_index" in each for each in notes)
    assert any("public.closed_id_seq" in each for each in notes)


async def test_a_granted_role(owner: asyncpg.Connection, clerk: str) -> None:
    """A member of pg_monitor that may read the sequences gets no such note."""
    await owner.execute(
        """CREATE TABLE closed (id serial); GRANT pg_monitor TO "pgts clerk";
           GRANT SELECT ON closed_id_seq TO "pgts clerk" """
    )
    code, report = await examined(clerk)
    assert code == 0
    assert "not_checked" not in names(report["notes"])


async def test_no_connection_for_a_role(owner: asyncpg.Connection, clerk: str) -> None:
    """A role that may not connect is a failure in one line, without a traceback."""
    database = await owner.fetchval("SELECT current_database()")
    await owner.execute(f'REVOKE CONNECT ON DATABASE "{database}" FROM PUBLIC')
    try:
        code, output, errors = await run("doctor", clerk)
    finally:
        await owner.execute(f'GRANT CONNECT ON DATABASE "{database}" TO PUBLIC')
    assert (code, output) == (2, "")
    assert errors.startswith("pgtoolset: postgresql://pgts clerk@/")
    assert "permission denied" in errors
    assert errors.count("\n") == 1


async def test_sessions(
    owner: asyncpg.Connection, empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that is idle in its transaction, and one that waits behind it, are found."""
    monkeypatch.setattr(doctor, "LONG_IDLE", 0)
    monkeypatch.setattr(_objects, "LONG_WAIT", 0)
    await owner.execute("CREATE TABLE t (); SET application_name = 'till'")
    await owner.execute("BEGIN; LOCK TABLE t")
    waiter = await asyncpg.connect(plain_url(empty_database))
    onlooker = await asyncpg.connect(plain_url(empty_database))
    task = asyncio.create_task(waiter.execute("SELECT FROM t"))
    try:

        async def waits() -> bool:
            return bool(await onlooker.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

        await until(waits)
        code, report = await examined(empty_database)
    finally:
        await owner.execute("ROLLBACK")
        await task
        await waiter.close()
        await onlooker.close()
    pid = owner.get_server_pid()
    assert (code, names(report["findings"])) == (1, ["idle_in_transaction", "lock_wait"])
    idle, wait = report["findings"]
    assert idle["message"].startswith(f"pid {pid} (till, postgres) has been idle")
    assert "LOCK TABLE t" in idle["message"]
    assert f"--terminate {pid}" in idle["advice"]
    assert f"for ACCESS SHARE on public.t, behind {pid}" in wait["message"]


async def test_sessions_that_have_just_begun(
    owner: asyncpg.Connection, empty_database: str
) -> None:
    """A transaction that has been idle for a moment is none of the findings."""
    await owner.execute("BEGIN")
    code, report = await examined(empty_database)
    assert (code, report["findings"]) == (0, [])


async def test_connections(owner: asyncpg.Connection, empty_database: str, clerk: str) -> None:
    """Pools that fit are no finding; larger ones than the server, or the role, allows are."""
    code, report = await examined(empty_database, "--processes", "2")
    assert (code, report["findings"]) == (0, [])
    code, report = await examined(empty_database, "--processes", "7", "--pool-size", "40")
    assert (code, names(report["findings"])) == (1, ["pools_too_large"])
    most = int(await owner.fetchval("SHOW max_connections"))
    assert (
        f"7 processes with 40 connections each want 280, and {most - 3} are available"
        in (report["findings"][0]["message"])
    )
    await owner.execute('ALTER ROLE "pgts clerk" CONNECTION LIMIT 9')
    code, report = await examined(clerk, "--pool-size", "9")
    assert (code, report["findings"]) == (0, [])
    code, report = await examined(clerk, "--pool-size", "10")
    assert (code, names(report["findings"])) == (1, ["pools_too_large"])
    assert "CONNECTION LIMIT of the role or the database is 9" in report["findings"][0]["message"]


async def test_settings_of_a_role(owner: asyncpg.Connection, clerk: str) -> None:
    """Settings count as the role has them that connects."""
    await owner.execute('ALTER ROLE "pgts clerk" SET lock_timeout = 200')
    code, report = await examined(clerk)
    assert (code, names(report["findings"])) == (1, ["short_lock_timeout"])
    assert "lock_timeout is 200 ms" in report["findings"][0]["message"]
    assert report["server"]["settings"]["lock_timeout"] == "200"


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"lock_timeout": "0", "deadlock_timeout": "1000"}, ["no_time_limits"]),
        ({"lock_timeout": "2000", "deadlock_timeout": "1000"}, []),
        ({"lock_timeout": "999", "deadlock_timeout": "1000"}, ["short_lock_timeout"]),
        ({"lock_timeout": "2000", "statement_timeout": "2000"}, ["useless_lock_timeout"]),
        ({"lock_timeout": "2000", "statement_timeout": "2001"}, []),
        ({"idle_in_transaction_session_timeout": "4999"}, ["short_idle_timeout"]),
        ({"idle_in_transaction_session_timeout": "60000"}, []),
        ({"idle_session_timeout": "1"}, ["idle_session_timeout"]),
        ({"fsync": "off"}, ["no_fsync"]),
        ({"fsync": "on"}, []),
        ({}, []),
    ],
)
def test_settings(settings: dict[str, str], found: list[str]) -> None:
    """Each setting that hurts is one finding or note, and no other value is."""
    assert [each.name for each in of_settings(settings)] == found


@pytest.mark.parametrize(
    ("version", "severities"),
    [(130020, ["error"]), (140000, []), (180004, []), (190000, ["warning"])],
)
def test_versions(version: int, severities: list[str]) -> None:
    """Versions outside of 14 to 18 are findings."""
    state = ServerState(f"{version // 10000}.0", version, False, False, "db", "me")
    found = [each for each in of_server(state, "asyncpg") if each.name != "interpreted_modules"]
    assert [each.severity for each in found] == severities


def test_driver() -> None:
    """Without asyncpg there is no RowWatcher, which is a note."""
    state = ServerState("18.0", 180000, False, False, "db", "me")
    assert "no_row_watcher" in [each.name for each in of_server(state, "psycopg")]


@pytest.mark.parametrize(
    ("used", "pools", "found"),
    [
        (79, None, []),
        (80, None, ["connections_in_use"]),
        (1, Pools(20, 5), []),
        (1, Pools(101, 1), ["pools_too_large"]),
        (90, Pools(51, 2), ["connections_in_use", "pools_too_large"]),
    ],
)
def test_limits(used: int, pools: Pools | None, found: list[str]) -> None:
    """Reserved connections are not for pools, and most of the others in use are a finding."""
    settings = {
        "max_connections": "105",
        "superuser_reserved_connections": "3",
        "reserved_connections": "2",
    }
    connections = Connections(used, None)
    assert [each.name for each in of_connections(connections, settings, pools, False)] == found


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("keeps", [True, False, None])
def test_poolers(driver: str, keeps: bool | None) -> None:
    """Only a pooler that keeps prepared statements needs no option."""
    [found] = of_pooler(Pooler("transaction", keeps), driver)
    assert (found.severity == "info") is (keeps is True)


def test_findings_are_one_line() -> None:
    """The parts of a finding are cleaned where it is made, whoever made them."""
    dirty = "a\nb \x1b[2J postgresql://me:hunter2@h/db"
    finding = Finding("error", "x", dirty, dirty)
    for each in (finding.message, finding.advice):
        assert each.isprintable()
        assert "hunter2" not in each
