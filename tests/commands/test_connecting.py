"""Where the commands connect to: a URL, a DSN, DATABASE_URL, libpq's variables and files."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import make_url

from pgtoolset._commands._libpq import ServiceError, completed
from tests.commands.running import environment, line, run, run_here, running, start
from tests.support import plain_url

PASSWORD = "hunter2 %'\\"
QUIET = "No session waits for a lock.\n"


@dataclass
class Server:
    """The server of the tests, and a role there that has a password."""

    directory: str
    port: str
    database: str
    role: str = "pgtoolset_operator"

    def variables(self, **more: str) -> dict[str, str]:
        return {
            "PGHOST": self.directory,
            "PGPORT": self.port,
            "PGDATABASE": self.database,
            "PGUSER": "postgres",
            **more,
        }


@pytest.fixture
async def server(database_url: str, other: asyncpg.Connection) -> AsyncIterator[Server]:
    """The parts of the URL of the tests' database."""
    url = make_url(database_url)
    host = url.query.get("host", url.host)
    assert isinstance(host, str)
    port = await other.fetchval("SELECT current_setting('port')")
    yield Server(host, port, str(url.database))


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("through", ["URL", "DSN", "DATABASE_URL", "variables", "service", "user"])
async def test_every_way_to_connect(server: Server, through: str, tmp_path: Path) -> None:
    """Each way reaches the database, for each command, and the URL need not be an argument."""
    dsn = f"host={server.directory} port={server.port} user=postgres dbname='{server.database}'"
    url = f"postgresql://postgres@/{server.database}?host={server.directory}&port={server.port}"
    service = tmp_path / "services"
    service.write_text(
        f"# the shop\n[other]\nhost=/nowhere\n[shop]\nhost={server.directory}\n"
        f"port={server.port}\ndbname={server.database}\nuser=postgres\n[last]\nport=1\n"
    )
    home = tmp_path / ".pg_service.conf"
    home.write_text(service.read_text())
    arguments, variables = {
        "URL": ([url], {}),
        "DSN": ([dsn], {}),
        "DATABASE_URL": ([], {"DATABASE_URL": url}),
        "variables": ([], server.variables()),
        "service": ([], {"PGSERVICE": "shop", "PGSERVICEFILE": str(service)}),
        "user": (["postgresql://?service=shop"], {"HOME": str(tmp_path)}),
    }[through]
    assert await run("locks", *arguments, **variables) == (0, QUIET, "")
    code, output, errors = await run("doctor", *arguments, **variables)
    assert (code, errors) == (0, "")
    assert f"database {server.database} as postgres" in output
    async with running("watch", *arguments, "item", "1", **variables) as lines:
        assert "now: no row" in await line(lines)


@pytest.mark.usefixtures("engine")
async def test_parameters_of_libpq(server: Server, other: asyncpg.Connection) -> None:
    """`application_name`, `sslmode`, `options`, `connect_timeout`, `target_session_attrs` and
    several hosts of a URL hold, and so do PGAPPNAME and PGOPTIONS."""
    hosts = f"/nowhere,{server.directory}"
    query = (
        f"host={hosts}&port={server.port}&sslmode=prefer&connect_timeout=10"
        "&target_session_attrs=read-write&channel_binding=prefer"
    )
    url = f"postgresql://postgres@/{server.database}?{query}"
    for name, arguments, variables in (
        ("named", [f"{url}&application_name=named&options=-c%20work_mem%3D77MB"], {}),
        ("in PG", [url], {"PGAPPNAME": "in PG", "PGOPTIONS": "-c work_mem=77MB"}),
        ("fall", [f"{url}&fallback_application_name=fall&work_mem=77MB"], {}),
        ("pgtoolset", [url], {}),
    ):
        async with running("watch", *arguments, "item", "1", **variables) as lines:
            assert "now: no row" in await line(lines)
            sessions = await other.fetch(
                "SELECT application_name FROM pg_stat_activity WHERE datname = current_database()"
            )
            assert name in {each["application_name"] for each in sessions}


async def test_passwords(server: Server, other: asyncpg.Connection, tmp_path: Path) -> None:
    """A password comes from PGPASSWORD, a password file, a service, and no way shows it."""
    # The embedded server trusts a local socket, so what is sent is seen by a server of ours.
    passwords: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        length = int.from_bytes(await reader.readexactly(4))
        message = await reader.readexactly(length - 4)
        if message == (80877103).to_bytes(4):  # asks for TLS
            writer.write(b"N")
            length = int.from_bytes(await reader.readexactly(4))
            await reader.readexactly(length - 4)
        writer.write(b"R" + (8).to_bytes(4) + (3).to_bytes(4))  # a password in clear text
        await reader.readexactly(1)
        length = int.from_bytes(await reader.readexactly(4))
        passwords.append((await reader.readexactly(length - 4))[:-1].decode())
        fields = b"SFATAL\0C28P01\0Mpassword authentication failed: \x1b]0;title\x07\0\0"
        writer.write(b"E" + (4 + len(fields)).to_bytes(4) + fields)
        await writer.drain()
        writer.close()

    fake = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = str(fake.sockets[0].getsockname()[1])
    passfile = tmp_path / "pass"
    passfile.write_text(f"127.0.0.1:{port}:shop:me:hunter2\n")
    passfile.chmod(0o600)
    (tmp_path / ".pgpass").write_text(passfile.read_text())
    (tmp_path / ".pgpass").chmod(0o600)
    service = tmp_path / "service"
    service.write_text(f"[shop]\nhost=127.0.0.1\nport={port}\nuser=me\ndbname=shop\n")
    with_password = tmp_path / "with password"
    with_password.write_text(service.read_text() + f"password={PASSWORD}\n")
    at = f"127.0.0.1:{port}/shop"
    ways: list[tuple[list[str], dict[str, str], str]] = [
        ([f"postgresql://me:hunter2@{at}"], {}, "hunter2"),
        ([f"postgresql://{at}?user=me&password=hunter2"], {}, "hunter2"),
        ([f"host=127.0.0.1 port={port} user=me dbname=shop password='hunter2 \\' x'"], {}, "h"),
        ([f"postgresql://me@{at}"], {"PGPASSWORD": PASSWORD}, PASSWORD),
        ([f"postgresql://me@{at}"], {"PGPASSFILE": str(passfile)}, "hunter2"),
        ([f"postgresql://me@{at}?passfile={passfile}"], {}, "hunter2"),
        ([f"postgresql://me@{at}"], {"HOME": str(tmp_path)}, "hunter2"),
        ([], {"PGSERVICE": "shop", "PGSERVICEFILE": str(with_password)}, PASSWORD),
        (
            [],
            {"PGSERVICE": "shop", "PGSERVICEFILE": str(service), "PGPASSWORD": PASSWORD},
            PASSWORD,
        ),
        ([], {"DATABASE_URL": f"postgresql://me:hunter2@{at}"}, "hunter2"),
    ]
    async with fake:
        for arguments, variables, password in ways:
            passwords.clear()
            code, output, errors = await run("locks", *arguments, **variables)
            expected = "hunter2 ' x" if password == "h" else password
            assert passwords[:1] == [expected], (arguments, variables, errors)
            assert (code, output) == (2, "")
            assert "hunter2" not in errors
            assert errors.count("\n") == 1
            assert errors.rstrip("\n").isprintable()
            assert "password authentication failed" in errors


def test_what_a_url_lacks(tmp_path: Path) -> None:
    """A URL wins over the service, the service over the variables, and each parameter by itself."""
    file = tmp_path / "file"
    file.write_text("[a]\nhost=one\nport=1\nuser=u\npassword=50%#x\napplication_name = a b \n")
    environment = {
        "PGSERVICE": "a",
        "PGSERVICEFILE": str(file),
        "PGHOST": "two",
        "PGUSER": "v",
        "PGDATABASE": "d",
        "PGOPTIONS": "-c a=b",
    }
    url = completed(make_url("postgresql://:5432/"), environment)
    assert (url.username, url.password, url.port, url.database) == ("u", "50%#x", 5432, "d")
    assert dict(url.query) == {"host": "one", "application_name": "a b", "options": "-c a=b"}
    with pytest.raises(ServiceError, match="no service 'b'"):
        completed(make_url("postgresql://"), environment | {"PGSERVICE": "b"})
    directory = {"PGSYSCONFDIR": str(tmp_path), "HOME": str(tmp_path), "PGSERVICE": "a"}
    (tmp_path / "pg_service.conf").write_text("[a]\nhost=three\n")
    assert completed(make_url("postgresql://"), directory).query["host"] == "three"


@pytest.mark.parametrize("command", ["locks", "watch", "doctor"])
@pytest.mark.parametrize(
    ("arguments", "variables", "says"),
    [
        ([], {}, "DATABASE_URL"),
        (["nonsense://me:hunter2@h/db"], {}, "PostgreSQL"),
        (["postgresql://me:hunter2@h:port/db"], {}, "URL"),
        (["postgresql://me:hun@ter2@h/db"], {}, "percent-encoded"),
        (["postgres//me:hunter2@h/db"], {}, "URL"),
        (["me:hunter2@h/db"], {}, "URL"),
        (["host=/nowhere password='hunter2 x' user=me"], {}, "/nowhere"),
        (["host=/nowhere password=hunter2 user"], {}, "URL"),
        (["postgresql://me@/x?host=/nowhere&password=hunter2"], {}, "/nowhere"),
        (["postgresql://me@/x?host=/nowhere&sslpassword=hunter2"], {}, "/nowhere"),
        (["postgresql://me:hunter2@127.0.0.1:1/db"], {}, "127.0.0.1"),
        (["postgresql://me:hunter2@127.0.0.1:99999/db"], {}, "port"),
        (["postgresql://me:hunter2@127.0.0.1:1,127.0.0.1:2/db"], {}, "Connect"),
        (["postgresql://me:hunter2@no-such-host.invalid/db"], {}, "no-such-host"),
        (["postgresql://me:hunter2@127.0.0.1:1/db?channel_binding=require"], {}, "channel_binding"),
        (["postgresql://me:hunter2@127.0.0.1:1/db?sslmode=nonsense"], {}, "sslmode"),
        (["postgresql://me:hunter2@127.0.0.1:1/db?connect_timeout=x"], {}, "time"),
        (["postgresql://me:hunter2@127.0.0.1:1/db?target_session_attrs=x"], {}, "127.0.0.1"),
        (["postgresql://?service=none"], {"PGSERVICEFILE": "/nowhere"}, "no service 'none'"),
        ([], {"PGHOST": "/nowhere", "PGPASSWORD": "hunter2"}, "/nowhere"),
        ([], {"PGSERVICE": "x", "HOME": "/nowhere"}, "no service 'x'"),
        ([], {"DATABASE_URL": "me:hunter2@h"}, "DATABASE_URL"),
        ([], {"PGHOST": "h", "PGCHANNELBINDING": "require"}, "channel_binding"),
    ],
)
def test_no_connection(
    command: str, arguments: list[str], variables: dict[str, str], says: str
) -> None:
    """A URL that is wrong or leads nowhere: one line on standard error, exit code 2, no secret."""
    more = ["item", "1"] if command == "watch" else []
    code, output, errors = run_here(command, *arguments, *more, **variables)
    assert (code, output) == (2, ""), errors
    assert says in errors
    assert "Traceback" not in errors
    assert "hunter2" not in errors
    assert "ter2" not in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["postgresql://me:hunter2@h/db"],
        ["me:hunter2@h"],
        ["locks", "postgresql://me:hunter2@h/db", "postgresql://me:hunter2@h/db"],
        ["locks", "--terminate", "postgresql://me:hunter2@h/db"],
        ["locks", "--watch", "postgresql://me:hunter2@h/db"],
        ["locks", "--json=postgresql://me:hunter2@h/db"],
        ["locks", "--url=postgresql://me:hunter2@h/db"],
        ["watch", "--interval", "host=h password=hunter2", "item", "1"],
        ["locks", "--yes", "postgresql://me:hunter2@h/db"],
        ["locks", "--json", "--terminate", "1", "postgresql://me:hunter2@h/db"],
        ["locks", "--watch", "--terminate", "1", "postgresql://me:hunter2@h/db"],
        ["doctor", "postgresql://me:hunter2@h/db", "postgresql://me:hunter2@h/db"],
        ["doctor", "--pool-size", "postgresql://me:hunter2@h/db"],
        ["doctor", "--pool-size=0", "postgresql://me:hunter2@h/db"],
        ["doctor", "--processes", "-1", "postgresql://me:hunter2@h/db"],
        ["doctor", "--processes", "٣", "postgresql://me:hunter2@h/db"],
        ["doctor", "--json=postgresql://me:hunter2@h/db"],
        ["watch", "postgresql://me:hunter2@h/db"],
        ["watch", "postgresql://me:hunter2@h/db", "item"],
        ["watch", "item"],
        ["locks", "\x1b]0;title\x07", "\x1b]0;title\x07"],
        [],
    ],
)
def test_usage(arguments: list[str]) -> None:
    """Wrong arguments: exit code 2, and the message shows no URL and no control character."""
    code, output, errors = run_here(*arguments)
    assert (code, output) == (2, "")
    assert all(each.isprintable() for each in errors.splitlines())
    assert "hunter2" not in errors
    assert "Traceback" not in errors


@pytest.mark.usefixtures("engine")
async def test_a_table_is_told_from_a_url(server: Server, other: asyncpg.Connection) -> None:
    """The first argument is a URL where it looks like one, and a key may begin with a dash."""
    await other.execute(
        """CREATE TABLE odd (name text, number int, PRIMARY KEY (name, number));
        INSERT INTO odd VALUES ('-a', -5), ('postgresql://x', 1)"""
    )
    variables = server.variables()
    url = f"postgresql://postgres@/{server.database}?host={server.directory}"
    try:
        for first, prefix in ((variables, []), ({}, [url])):
            for key, expected in (
                (["--", "-a", "-5"], "name='-a', number=-5"),
                (["postgresql://x", "1"], "name='postgresql://x', number=1"),
            ):
                async with running("watch", *prefix, "odd", *key, **first) as lines:
                    assert expected in await line(lines)
        async with running("watch", "item", "-5", **variables) as lines:
            assert "no row" in await line(lines)
    finally:
        await other.execute("DROP TABLE odd")


async def test_a_reader_that_leaves(server: Server) -> None:
    """A pipe that is closed ends the command without a traceback."""
    process = await start("watch", "item", "1", "--interval", "0.05", **server.variables())
    assert process.stdout is not None
    process.stdout._transport.close()  # type: ignore[attr-defined]
    connection = await asyncpg.connect(
        plain_url(f"postgresql://postgres@/{server.database}?host={server.directory}")
    )
    try:
        for number in range(1000):
            await connection.execute(
                "INSERT INTO item VALUES (1, $1) ON CONFLICT (id) DO UPDATE SET name = $1",
                str(number),
            )
            if process.returncode is not None:
                break
            await asyncio.sleep(0.01)
    finally:
        await connection.execute("DELETE FROM item")
        await connection.close()
    async with asyncio.timeout(60):
        assert process.stderr is not None
        errors = await process.stderr.read()
        await process.wait()
    assert b"Traceback" not in errors


async def test_a_process_of_its_own() -> None:
    """The exit code of a command is that of its process."""
    process = await start("locks", "nonsense")
    output, errors = await process.communicate()
    assert (process.returncode, output) == (2, b"")
    assert b"URL" in errors
    assert errors.count(b"\n") == 1


@pytest.mark.parametrize("arguments", [["doctor"], ["doctor", "--json"], ["locks"], ["watch"]])
async def test_an_output_that_cannot_be_written(server: Server, arguments: list[str]) -> None:
    """A full disk is said in one line, and not blamed on the database."""
    key = ["item", "1"] if arguments == ["watch"] else []
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", 'exec "$0" -m pgtoolset.cli "$@" >/dev/full', sys.executable),
        *(*arguments, *key),
        stderr=asyncio.subprocess.PIPE,
        env=environment(server.variables()),
    )
    _, errors = await process.communicate()
    assert errors.decode() == "pgtoolset: the output cannot be written: No space left on device\n"
    assert process.returncode == 1


async def test_no_output(server: Server) -> None:
    """A command whose output is closed ends as any other."""
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", 'exec "$0" -m pgtoolset.cli locks >&-', sys.executable),
        stderr=asyncio.subprocess.PIPE,
        env=environment(server.variables()),
    )
    _, errors = await process.communicate()
    assert (process.returncode, errors) == (0, b"")
