"""`EmbeddedServer`: quick, private, and gone with the process that started it."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from pgtoolset import PgToolsetError
from pgtoolset.errors import EmbeddedServerError
from pgtoolset.testing import EmbeddedServer, _supervisor
from pgtoolset.testing.server import load_embedded, parse_server_url


def query(server: EmbeddedServer, statement: str, database: str = "postgres") -> Any:
    async def run() -> Any:
        connection = await asyncpg.connect(server.url(database, driver="postgresql"))
        try:
            return await connection.fetchval(statement)
        finally:
            await connection.close()

    return asyncio.run(run())


def running_on(directory: Path) -> list[str]:
    """The command lines of the processes that work on a data directory."""
    if not Path("/proc/self").exists():
        command = ["ps", "-ww", "-eo", "args"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [line for line in done.stdout.splitlines() if str(directory) in line]
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            found.append((process / "cmdline").read_text(errors="replace").replace("\0", " "))
    return [line for line in found if str(directory) in line]


def until_gone(directory: Path) -> None:
    """Wait until neither the directory nor a process that works on it is left."""
    deadline = time.monotonic() + 60
    while directory.exists() or running_on(directory):
        assert time.monotonic() < deadline, f"left behind: {running_on(directory)} {directory}"
        time.sleep(0.02)


@pytest.mark.parametrize("version", [18, 16])
def test_versions(version: Any) -> None:
    """PostgreSQL 18 and 16 answer a query as soon as the block starts, and leave nothing at its
    end."""
    with EmbeddedServer(version=version) as server:
        assert query(server, "SHOW server_version").startswith(f"{version}.")
        directory = server._directory
        assert running_on(directory)
    until_gone(directory)


def test_warm_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a warm cache no `initdb` runs, and start, query and stop need less than 2 s of CPU."""
    with EmbeddedServer():
        pass

    def fail(self: object) -> None:
        raise AssertionError("initdb")

    monkeypatch.setattr(load_embedded(), "ensure_pgdata_inited", fail)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with EmbeddedServer() as server:
        query(server, "SELECT 1")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_servers_are_private() -> None:
    """Two servers share nothing."""
    with EmbeddedServer() as one, EmbeddedServer() as two:
        query(one, "CREATE TABLE only_here ()")
        assert query(one, "SELECT to_regclass('only_here')::text") == "only_here"
        assert query(two, "SELECT to_regclass('only_here')::text") is None


@pytest.mark.parametrize("immediate", [False, True])
def test_restart_keeps_the_data(immediate: bool) -> None:
    """A restart, also one as by a crash, keeps the URL and what was committed."""
    with EmbeddedServer() as server:
        query(server, "CREATE TABLE kept AS SELECT 1 AS n")
        started = query(server, "SELECT pg_postmaster_start_time()")
        server.restart(immediate=immediate)
        assert query(server, "SELECT n FROM kept") == 1
        assert query(server, "SELECT pg_postmaster_start_time()") > started


def test_settings() -> None:
    """The settings reach the server."""
    with EmbeddedServer(settings={"max_connections": "17"}) as server:
        assert query(server, "SHOW max_connections") == "17"


def test_stop_twice() -> None:
    """A second stop does nothing, and a stopped server can start again, empty."""
    server = EmbeddedServer()
    server.start()
    server.stop()
    server.stop()
    with server:
        assert query(server, "SELECT 1") == 1


def test_bad_setting() -> None:
    """A server that does not start raises an error with its log and leaves nothing."""
    server = EmbeddedServer(settings={"no_such_setting": "1"})
    with pytest.raises(EmbeddedServerError, match="no_such_setting") as caught:
        server.start()
    assert isinstance(caught.value, PgToolsetError)
    until_gone(server._directory)


def test_wrong_order() -> None:
    """The restart of a stopped server and the start of a running one are errors that say so."""
    server = EmbeddedServer()
    with pytest.raises(EmbeddedServerError, match="start"):
        server.restart()
    with server, pytest.raises(EmbeddedServerError, match="running already"):
        server.start()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"version": 17}, ValueError),
        ({"version": "18"}, ValueError),
        ({"version": True}, ValueError),
        ({"settings": ["fsync=off"]}, TypeError),
        ({"timeout": 0}, ValueError),
        ({"timeout": "soon"}, ValueError),
        ({"timeout": None}, TypeError),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception]) -> None:
    """A wrong argument is refused when the server is made, and the message begins with its name."""
    with pytest.raises(error, match=f"^{next(iter(arguments))} "):
        EmbeddedServer(**arguments)


@pytest.mark.parametrize("driver", ["postgres", "postgresql", "postgresql+psycopg"])
def test_url_of_a_given_server(driver: str) -> None:
    """A URL for libpq or another driver becomes one for asyncpg, and keeps everything else."""
    url = parse_server_url("--pg-url", f"{driver}://u:p%40ss@h/app?sslmode=require")
    assert url == "postgresql+asyncpg://u:p%40ss@h/app?ssl=require"
    assert parse_server_url("--pg-url", url) == url


def test_url_of_another_database() -> None:
    """The URL of a server that is not PostgreSQL is refused without being shown."""
    with pytest.raises(ValueError, match=r"^--pg-url ") as raised:
        parse_server_url("--pg-url", "mysql://u:secret@h/app")
    assert "secret" not in str(raised.value)


PROGRAM = """
import sys, time
from pgtoolset.testing import EmbeddedServer
server = EmbeddedServer()
server.start()
print(server._directory, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_running(end: signal.Signals) -> None:
    """The server and its data end with the process that started it, even by SIGKILL."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        assert process.stdout is not None
        directory = Path(process.stdout.readline().strip())
        assert running_on(directory)
        os.kill(process.pid, end)
    until_gone(directory)


def test_connections_do_not_keep_it_alive() -> None:
    """An open connection does not delay the stop."""

    async def leave_open(server: EmbeddedServer) -> None:
        connection = await asyncpg.connect(server.url(driver="postgresql"))
        start = time.monotonic()
        await asyncio.to_thread(server.stop)
        assert time.monotonic() - start < _supervisor.SHUTDOWN_TIMEOUT
        connection.terminate()

    server = EmbeddedServer()
    server.start()
    asyncio.run(leave_open(server))
    until_gone(server._directory)
