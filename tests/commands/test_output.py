"""What all commands share: colours, JSON, help, completion, and a pooler in between."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import sys
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from pgtoolset import Blocker, LockWait, cli
from pgtoolset._commands import COMMANDS, doctor
from pgtoolset._commands._findings import Finding
from pgtoolset._commands._json import as_json
from tests.commands.running import environment, line, run, run_here, running, start
from tests.locks.locking import waiting
from tests.pgbouncer import pgbouncer
from tests.support import plain_url

ESCAPE = "\x1b"


@pytest.mark.parametrize(
    ("terminal", "variables", "is_coloured"),
    [
        (True, {"TERM": "xterm"}, True),
        (True, {"TERM": "xterm", "NO_COLOR": ""}, True),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
        (False, {"TERM": "xterm"}, False),
        (False, {"TERM": "xterm", "FORCE_COLOR": "1", "CLICOLOR_FORCE": "1"}, False),
    ],
)
async def test_colours(
    database_url: str, terminal: bool, variables: dict[str, str], is_coloured: bool
) -> None:
    """Colours are for terminals, and not where NO_COLOR is set; the text is the same."""
    for arguments in (["doctor"], ["doctor", "--json"], ["locks"]):
        code, output, errors = await run(*arguments, database_url, terminal=terminal, **variables)
        assert (code, errors) == (0, "")
        assert (ESCAPE in output) is (is_coloured and arguments == ["doctor"])
        if "--json" in arguments:
            json.loads(output)


async def test_colours_change_no_text(database_url: str) -> None:
    """Without its colours the output of a wide terminal is that of a pipe."""
    _, plain, _ = await run("doctor", database_url)
    _, coloured, _ = await run("doctor", database_url, terminal=True, TERM="xterm", COLUMNS="1000")
    lines = re.sub(r"\x1b\[[0-9;]*m", "", coloured).splitlines()
    assert [each.rstrip() for each in lines] == plain.splitlines()


async def test_a_coloured_tree(database_url: str, other: asyncpg.Connection) -> None:
    """The tree of waits has colours on a terminal, and is the same tree."""
    await other.execute("BEGIN; LOCK TABLE item")
    waiter = await asyncpg.connect(plain_url(database_url))
    task = asyncio.create_task(waiter.execute("SELECT FROM item"))
    try:
        await waiting(other)
        _, plain, _ = await run("locks", database_url)
        _, output, _ = await run("locks", database_url, terminal=True, TERM="xterm")
    finally:
        await other.execute("ROLLBACK")
        await asyncio.wait([task])
        await waiter.close()
    assert ESCAPE not in plain
    assert f"\x1b[1m{other.get_server_pid()}" in output
    assert len(output.splitlines()) == 2


WITHOUT_RICH = """
import sys
sys.modules["rich"] = sys.modules["argcomplete"] = None
from pgtoolset import cli
sys.stdout.isatty = lambda: True
sys.exit(cli.main(sys.argv[1:]))
"""


async def test_without_the_extra(database_url: str) -> None:
    """Without Rich and argcomplete the commands print the same text, without colours."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", WITHOUT_RICH, "doctor", database_url),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment({"TERM": "xterm", "_ARGCOMPLETE": "1"}),
    )
    output, errors = await process.communicate()
    assert (process.returncode, errors) == (0, b"")
    assert output.decode() == (await run("doctor", database_url))[1]


FIELDS: dict[str, set[str]] = {
    "server": {
        *("address", "database", "user", "version", "version_num", "role", "pooler", "driver"),
        *("driver_version", "pgtoolset", "implementation", "settings"),
    },
    "finding": set(Finding.__dataclass_fields__),
    "wait": set(LockWait.__dataclass_fields__),
    "blocker": set(Blocker.__dataclass_fields__),
}


async def test_json_of_doctor(database_url: str) -> None:
    """The report of `doctor` is an object with the documented parts, and its findings too."""
    code, output, _ = await run("doctor", database_url, "--json", "--pool-size", "9999")
    report = json.loads(output, parse_constant=pytest.fail)
    assert code == 1
    assert list(report) == ["server", "findings", "notes"]
    assert set(report["server"]) == FIELDS["server"]
    for each in (*report["findings"], *report["notes"]):
        assert set(each) == FIELDS["finding"] == {"severity", "name", "message", "advice"}
        assert all(isinstance(part, str) and part for part in each.values())
    assert {each["severity"] for each in report["findings"]} <= {"error", "warning"}
    assert {each["severity"] for each in report["notes"]} == {"info"}


async def test_json_of_locks(database_url: str, other: asyncpg.Connection) -> None:
    """What `locks --json` prints has the attributes of `LockWait` and `Blocker`, again and again
    with --watch."""
    await other.execute("BEGIN; LOCK TABLE item")
    waiter = await asyncpg.connect(plain_url(database_url))
    task = asyncio.create_task(waiter.execute("SELECT FROM item"))
    try:
        await waiting(other)
        async with running("locks", database_url, "--json", "--watch", "50ms") as lines:
            for _ in range(2):
                report = json.loads(await line(lines), parse_constant=pytest.fail)
                assert [set(each) for each in report["waits"]] == [FIELDS["wait"]]
                assert [set(each) for each in report["blockers"]] == [FIELDS["blocker"]]
                assert isinstance(report["waits"][0]["waiting_for"], float)
                assert report["waits"][0]["blocked_by"] == [other.get_server_pid()]
    finally:
        await other.execute("ROLLBACK")
        await task
        await waiter.close()


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (None, None),
        (True, True),
        (2**70, 2**70),
        (0.5, 0.5),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
        (Decimal("1.50"), "1.50"),
        (date(2026, 1, 2), "2026-01-02"),
        (time(1, 2), "01:02:00"),
        (timedelta(hours=1), 3600.0),
        (b"\x00\xff", "\\x00ff"),
        (memoryview(b"a"), "\\x61"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        ([date(2026, 1, 2), [None]], ["2026-01-02", [None]]),
        (({"a": (1,)},), [{"a": [1]}]),
        ({1: frozenset({2})}, {"1": [2]}),
        ("\x1b\u202e\ud800", "\x1b\u202e\ud800"),
    ],
)
def test_values_as_json(value: Any, plain: Any) -> None:
    """Each value of a database is JSON in ASCII, which loses nothing that a text can keep."""
    printed = as_json(value)
    assert printed.isascii() and printed.isprintable()
    assert json.loads(printed, parse_constant=pytest.fail) == plain


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    """The help of a command fits a terminal, says where it connects to, and has examples that its
    own parser accepts."""
    code, output, errors = run_here(command, "--help", COLUMNS="80")
    assert (code, errors) == (0, "")
    assert "DATABASE_URL" in output
    assert "Exit codes: 0" in output
    examples = output.partition("examples:\n")[2].partition("\n\nJSON")[0]
    lines = [each.strip() for each in examples.splitlines() if each.strip()]
    assert len(lines) >= 4
    for purpose, example in zip(lines[::2], lines[1::2], strict=True):
        assert purpose.startswith("# ")
        program, *arguments = shlex.split(re.split(r" \|\|? ", example)[0])
        assert (program, arguments[0]) == ("pgtoolset", command)
        assert cli._parser().parse_args(arguments).run is COMMANDS[command].run
    assert all(len(each) <= 80 for each in output.splitlines() if "| jq" not in each)


def test_help_of_the_program() -> None:
    """The help of the program names each command, and each of its examples is one of them."""
    code, output, errors = run_here("--help")
    assert (code, errors) == (0, "")
    for name, command in COMMANDS.items():
        assert re.search(rf"^    {name} +{re.escape(command.HELP[:20])}", output, re.MULTILINE)
        assert f"  pgtoolset {name} " in output
    code, output, _ = run_here("--version")
    assert re.fullmatch(r"pgtoolset \d+\.\d+\.\d+ \((c|python)\)\n", output)


#: In a process of its own: argcomplete takes file descriptors as a shell leaves them.
COMPLETING = """
import io, os, sys
import argcomplete
from pgtoolset import cli
for typed in sys.argv[1:]:
    os.environ.update(COMP_LINE=typed, COMP_POINT=str(len(typed)))
    words = io.StringIO()
    try:
        argcomplete.autocomplete(cli._parser(), exit_method=sys.exit, output_stream=words)
    except SystemExit:
        print(*words.getvalue().split(), flush=True)
"""


async def test_completion() -> None:
    """A shell with argcomplete completes commands and options."""
    lines = {
        "pgtoolset ": {"locks", "watch", "doctor"},
        "pgtoolset d": {"doctor"},
        "pgtoolset doctor --p": {"--pool-size", "--processes"},
        "pgtoolset locks --": {"--json", "--yes", "--watch", "--terminate", "--help"},
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", COMPLETING, *lines),
        stdout=asyncio.subprocess.PIPE,
        env=environment({"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n"}),
    )
    output, _ = await process.communicate()
    for offered, printed in zip(lines.values(), output.decode().splitlines(), strict=True):
        words = set(printed.split())
        assert offered <= words
        assert words & set(COMMANDS) == offered & set(COMMANDS)


async def test_completion_of_a_process(tmp_path: Path) -> None:
    """The program itself answers the shell, and does nothing else."""
    answer = tmp_path / "answer"
    process = await start(
        _ARGCOMPLETE="1",
        _ARGCOMPLETE_STDOUT_FILENAME=str(answer),
        COMP_LINE="pgtoolset wa",
        COMP_POINT="12",
    )
    output, _ = await process.communicate()
    assert (process.returncode, output) == (0, b"")
    assert answer.read_text().strip() == "watch"


async def test_behind_pgbouncer(database_url: str, other: asyncpg.Connection) -> None:
    """`locks` and `watch` work in transaction mode, and leave no setting on a backend."""
    await other.execute("INSERT INTO item VALUES (1, 'new')")
    try:
        async with pgbouncer(database_url) as url:
            for _ in range(3):
                assert await run("locks", url) == (0, "No session waits for a lock.\n", "")
            async with running("watch", url, "item", "1", "--interval", "50ms") as lines:
                assert "now: id=1" in await line(lines)
                await other.execute("UPDATE item SET name = 'paid'")
                assert "update: name='paid'" in await line(lines)
            paths = set()
            clients = [
                await asyncpg.connect(plain_url(url), statement_cache_size=0) for _ in range(2)
            ]
            for client in clients:
                await client.execute("BEGIN")
                paths.add(await client.fetchval("SELECT current_setting('search_path')"))
            for client in clients:
                await client.close()
            assert paths == {await other.fetchval("SHOW search_path")}
    finally:
        await other.execute("DELETE FROM item")


async def test_a_silent_server() -> None:
    """A server that takes a connection and says nothing is given up, in one line."""

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    silent = await asyncio.start_server(take, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    async with silent:
        for command in (["locks"], ["doctor"], ["watch"]):
            more = ["item", "1"] if command == ["watch"] else []
            url = f"postgresql://me:hunter2@127.0.0.1:{port}/db?connect_timeout=1"
            code, output, errors = await run(*command, url, *more)
            assert (code, output) == (2, "")
            assert (
                errors == f"pgtoolset: postgresql://me:***@127.0.0.1:{port}/db: no answer in time\n"
            )


def test_a_limit_to_connect() -> None:
    """Without a limit in the URL or PGCONNECT_TIMEOUT a connection is tried for 10 seconds."""
    for url, seconds in (("postgresql://h", "10"), ("postgresql://h?connect_timeout=3", "3")):
        assert doctor.parse_url(url).query["connect_timeout"] == seconds
