"""`EmbeddedServer`: quick, private, and gone with the process that started it."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from pydantic import PostgresDsn, TypeAdapter
from sqlalchemy import make_url

from pgtoolset import PgToolsetError
from pgtoolset.errors import EmbeddedServerError
from pgtoolset.testing import EmbeddedServer, _supervisor
from pgtoolset.testing import server as server_module
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
        ({"settings": {1: "off"}}, TypeError),
        ({"settings": {"jit": None}}, TypeError),
        ({"settings": {"jit": "o\0ff"}}, ValueError),
        ({"settings": {"jit=on -c fsync": "off"}}, ValueError),
        ({"settings": {"port": "0"}}, ValueError),
        ({"settings": {"port": "65536"}}, ValueError),
        ({"settings": {"port": "x"}}, ValueError),
        ({"tcp": "127.0.0.1"}, TypeError),
        ({"timeout": 0}, ValueError),
        ({"timeout": "soon"}, ValueError),
        ({"timeout": None}, TypeError),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception]) -> None:
    """A wrong argument is refused when the server is made, and the message begins with its name."""
    with pytest.raises(error, match=f"^{next(iter(arguments))} "):
        EmbeddedServer(**arguments)


@pytest.mark.parametrize("driver", ["postgres", "postgresql", "postgresql+psycopg2"])
def test_url_of_a_given_server(driver: str) -> None:
    """A URL for libpq or a driver that is not used becomes one for asyncpg, otherwise as it was."""
    url = parse_server_url("--pg-url", f"{driver}://u:p%40ss@h/app?sslmode=require")
    assert url == "postgresql+asyncpg://u:p%40ss@h/app?ssl=require"
    assert parse_server_url("--pg-url", url) == url


@pytest.mark.parametrize("named", ["postgresql", "postgresql+asyncpg", "postgresql+psycopg"])
def test_url_of_a_given_server_and_driver(named: str) -> None:
    """A driver that is given replaces the one in the URL, and the parameters are what it takes."""
    name = "ssl" if named == "postgresql+asyncpg" else "sslmode"
    given = f"{named}://u:p%40ss@h/app?{name}=require"
    url = parse_server_url("--pg-url", given, "psycopg")
    assert url == "postgresql+psycopg://u:p%40ss@h/app?sslmode=require"
    url = parse_server_url("--pg-url", given, "asyncpg")
    assert url == "postgresql+asyncpg://u:p%40ss@h/app?ssl=require"


def test_a_parameter_that_the_given_driver_lacks() -> None:
    """What psycopg can do and asyncpg cannot is an error, and not left out."""
    with pytest.raises(ValueError, match="channel_binding"):
        parse_server_url("--pg-url", "postgresql+psycopg://h/x?channel_binding=require", "asyncpg")


def test_url_of_a_given_server_with_psycopg() -> None:
    """A URL that names psycopg stays as it is."""
    url = "postgresql+psycopg://u:p%40ss@h/app?sslmode=require"
    assert parse_server_url("--pg-url", url) == url


def test_url_of_another_database() -> None:
    """The URL of a server that is not PostgreSQL is refused without being shown."""
    with pytest.raises(ValueError, match=r"^--pg-url ") as raised:
        parse_server_url("--pg-url", "mysql://u:secret@h/app")
    assert "secret" not in str(raised.value)


PROGRAM = """
import os, sys, time
from pgtoolset.testing import EmbeddedServer
server = EmbeddedServer(tcp="tcp" in sys.argv)
server.start()
if "fork" in sys.argv and not os.fork():
    time.sleep(600)  # it has inherited this process's end of the pipe to the supervisor
print(server._directory, server._supervisor.pid, flush=True)
time.sleep(600)
"""


class Program:
    """A process with a server that runs.

    Attributes:
        process: the process.
        directory: that of the server.
        supervisor: the process id of the server's supervisor.
    """

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        assert self.process.stdout is not None
        directory, supervisor = self.process.stdout.readline().split()
        self.directory = Path(directory)
        self.supervisor = int(supervisor)
        assert running_on(self.directory)

    def end(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_running(end: signal.Signals) -> None:
    """The server and its data end with the process that started it, even by SIGKILL."""
    program = Program()
    program.end(end)
    until_gone(program.directory)


def test_nothing_is_left_by_a_process_that_has_forked() -> None:
    """The server ends with the process that started it, where a child of that lives on."""
    program = Program("fork")
    try:
        program.end()
        until_gone(program.directory)
    finally:
        os.killpg(program.process.pid, signal.SIGKILL)


@pytest.mark.parametrize("order", ["supervisor", "supervisor, process", "process, supervisor"])
def test_killed_supervisor(order: str) -> None:
    """PostgreSQL ends when its supervisor is killed, in either order with the process that started
    it, and the next server that starts deletes the data."""
    program = Program()
    for each in order.split(", "):
        if each == "supervisor":
            with suppress(ProcessLookupError):  # it has noticed the end of the process already
                os.kill(program.supervisor, signal.SIGKILL)
        else:
            program.end()
    if sys.platform == "linux":  # elsewhere the next server ends it
        until_ended(program.directory)
    try:
        with EmbeddedServer():
            until_gone(program.directory)
    finally:
        if program.process.poll() is None:
            program.end()


def until_ended(directory: Path) -> None:
    """Wait until no process works on a directory."""
    deadline = time.monotonic() + 60
    while running_on(directory):
        assert time.monotonic() < deadline, f"left behind: {running_on(directory)}"
        time.sleep(0.02)


def test_killed_supervisor_of_a_server_that_is_stopped() -> None:
    """`stop` deletes the data where the supervisor was killed, and other methods say that the
    server has ended."""
    server = EmbeddedServer()
    server.start()
    supervisor = server._supervisor
    assert supervisor is not None
    supervisor.kill()
    supervisor.wait()
    with pytest.raises(EmbeddedServerError, match="ended"):
        server.restart()
    server.stop()
    until_gone(server._directory)


def test_left_over_without_the_help_of_the_kernel(tmp_path: Path) -> None:
    """A server that runs on where no signal ends it with its supervisor is ended by the next one,
    and a server whose supervisor lives is not touched."""
    records = tmp_path / "records"
    left, alive = tmp_path / "left", tmp_path / "alive"
    processes = []

    def notice() -> None:
        # A run in the background of a shell ignores the signal, and so would the process.
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)

    for directory in (left, alive):
        (directory / "data").mkdir(parents=True)
        command = [sys.executable, "-c", "import time; time.sleep(600)", f"{directory}/data"]
        processes.append(subprocess.Popen(command, start_new_session=True, preexec_fn=notice))
        (directory / "data" / "postmaster.pid").write_text(f"{processes[-1].pid}\n")
    records.mkdir()
    (records / "left").write_text(str(left))
    record = _supervisor.claim(str(records), str(alive))
    try:
        # A record that another process has locked is that of a living supervisor.
        _supervisor.sweep(str(records))
        assert processes[0].wait(60) == -signal.SIGQUIT
        assert not left.exists()
        assert processes[1].poll() is None
        assert alive.exists()
        assert [each.name for each in records.iterdir()] == ["alive"]
        assert record == str(records / "alive")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_pid_file_of_a_process_that_has_ended(tmp_path: Path) -> None:
    """A process that has the id of a server of the past is not ended."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "postmaster.pid").write_text(f"{os.getppid()}\n")
    _supervisor.end_left_over(str(tmp_path))
    assert not tmp_path.exists()


@pytest.mark.parametrize("name", ["log", "pg_hba.conf"])
def test_links_in_the_directory(tmp_path: Path, name: str) -> None:
    """A link that stands in the place of a file of the directory is never followed."""
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / name).symlink_to(target)
    with pytest.raises(FileExistsError):
        _supervisor._prepare(str(tmp_path), "", "rules")
    assert target.read_text() == "precious"
    assert _supervisor.end_of_file(str(tmp_path / name)) == ""


def test_private() -> None:
    """Without tcp the server has no port, its directory admits its owner alone, and its rules know
    no host."""
    with EmbeddedServer() as server:
        assert query(server, "SHOW listen_addresses") == ""
        assert server._directory.stat().st_mode & 0o777 == 0o700
        assert query(server, "SELECT count(*) FROM pg_hba_file_rules WHERE type = 'host'") == 0
        assert (server._directory / "log").stat().st_mode & 0o777 == 0o600


# TCP


async def connect(url: str, **changes: Any) -> asyncpg.Connection:
    return await asyncpg.connect(url.replace("+asyncpg", ""), **changes)


async def test_tcp(capfd: pytest.CaptureFixture[str]) -> None:
    """With tcp the URL has host, port, user and password, pydantic accepts it, and no password or a
    wrong one is refused, in every database."""
    server = EmbeddedServer(tcp=True)
    with pytest.raises(EmbeddedServerError, match=r"start\(\)"):
        server.url()
    await asyncio.to_thread(server.start)
    try:
        url = make_url(server.url("template1"))
        assert (url.host, url.username, url.database) == ("127.0.0.1", "postgres", "template1")
        assert url.port
        assert url.password
        assert not url.query
        dsn = TypeAdapter(PostgresDsn).validate_python(server.url())
        connection = await connect(str(dsn))
        assert await connection.fetchval("SHOW listen_addresses") == "127.0.0.1"
        assert await connection.fetchval("SELECT inet_server_port()") == url.port
        assert await connection.fetchval("SELECT setting::int FROM pg_settings WHERE name = 'port'")
        stored = await connection.fetchval(
            "SELECT rolpassword FROM pg_authid WHERE rolname = $1", "postgres"
        )
        assert stored.startswith("SCRAM-SHA-256$4096:")
        await connection.close()
        for password in ("", "wrong", url.password[:-1], url.password.swapcase()):
            with pytest.raises(asyncpg.InvalidPasswordError):
                await connect(server.url(), password=password)
        password = url.password
        assert password not in repr(server) + repr(server._loopback)
        assert password not in " ".join(await asyncio.to_thread(running_on, Path("/")))
        log = await asyncio.to_thread((server._directory / "log").read_text)
        assert "password" in log  # a refusal
        assert password not in log
    finally:
        await asyncio.to_thread(server.stop)
    output = capfd.readouterr()
    assert password not in output.out + output.err
    await asyncio.to_thread(until_gone, server._directory)


def test_tcp_after_a_restart() -> None:
    """The port and the password stay the same over a restart, and a second start has other ones."""
    server = EmbeddedServer(tcp=True)
    urls = []
    for _ in range(2):
        with server:
            urls.append(server.url())
            server.restart()
            assert server.url() == urls[-1]
            assert query(server, "SELECT 1") == 1
    assert len({make_url(url).password for url in urls}) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a port be reserved")
def test_reserved_port() -> None:
    """While the server is shut down no other process is given its port."""
    with EmbeddedServer(tcp=True) as server:
        port = make_url(server.url()).port
        server.shut_down()
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        server.resume()
        assert query(server, "SELECT 1") == 1


def test_port_that_another_process_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that another process takes before PostgreSQL has it is replaced by another one."""
    taken = []

    class Unlucky(server_module.Loopback):
        def __init__(self, port: int = 0) -> None:
            super().__init__(port)
            if len(taken) < 2:
                self.close()
                taken.append(socket.create_server(("127.0.0.1", self.port)))

    monkeypatch.setattr(server_module, "Loopback", Unlucky)
    try:
        with EmbeddedServer(tcp=True) as server:
            assert query(server, "SELECT 1") == 1
            assert len(taken) == 2
    finally:
        for each in taken:
            each.close()


def test_port_of_the_settings() -> None:
    """The port of the settings is in the URL: that of the socket, or that of TCP."""
    with EmbeddedServer(settings={"PORT": "6543"}) as server:
        assert make_url(server.url()).query["port"] == "6543"
        assert query(server, "SHOW port") == "6543"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        server = EmbeddedServer(tcp=True, settings={"port": str(port)})
        with pytest.raises(EmbeddedServerError, match=f"port {port}"):
            server.start()
    with server:
        assert make_url(server.url()).port == port
        assert query(server, "SELECT 1") == 1


@pytest.mark.parametrize(
    "name",
    ["listen_addresses", "Listen-Addresses", "hba_file", "unix_socket_directories"],
)
def test_settings_that_would_admit_others(name: str) -> None:
    """A setting that says who can connect is refused, and the error names `tcp`."""
    with pytest.raises(ValueError, match=r"^settings .*tcp=True.* password"):
        EmbeddedServer(settings={name: "*"})


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
