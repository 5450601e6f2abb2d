"""The page on the command line: its commands run, and print what it shows."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from pgtoolset import cli
from pgtoolset._commands import _objects, _settings
from tests.commands.running import line, run, running
from tests.support import plain_url

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "command-line.md"

#: Anything that differs from run to run, and from server to server.
VARYING = re.compile(
    r"\d+\.\d+(\.\d+)?(?= |,)|postgresql://.*|\((c|python)\)|database .* as \w+|\d+ notes?"
    r"|^\d\d:\d\d:\d\d\.\d{6}|\d{4}-\d\d-\d\dT[^\"]+|(?<=^)(asyncpg|psycopg)"
)


def shells(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Each command of a page's shell blocks, and the lines that it prints there."""
    for block in re.findall(r"^```(?:console)?\n(\$ .*?)^```$", page.read_text(), re.M | re.S):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, *output = part.rstrip().splitlines()
            yield command, output


def arguments_of(command: str) -> list[str]:
    """The arguments of `pgtoolset` in a command of a shell, without a pipe and variables."""
    words = shlex.split(command.partition(" | ")[0], comments=True)
    return words[words.index("pgtoolset") + 1 :]


@pytest.mark.parametrize("page", ["command-line.md", "locks.md", "watching.md"])
def test_commands_of_pages(page: str) -> None:
    """Every command that a page shows is one that the parser accepts."""
    commands = [each for each, _ in shells(PAGE.parent / page) if "pgtoolset " in each]
    assert commands
    for each in commands:
        assert cli._parser().parse_args(arguments_of(each))


def without_notes(output: str) -> list[str]:
    """The lines of a report, without its notes, which depend on the server and the package."""
    return re.sub(r"^note .*\n(  .*\n)+\n", "", output, flags=re.M).splitlines()


def alike(lines: list[str]) -> list[str]:
    return [VARYING.sub("*", each) for each in lines]


async def test_the_page(empty_database: str) -> None:
    """The commands of the page print what it shows, on a table as it describes it."""
    connection = await asyncpg.connect(plain_url(empty_database))
    await connection.execute(
        """CREATE TABLE orders (id serial PRIMARY KEY, status text);
           INSERT INTO orders VALUES (17, 'new');
           SELECT setval('orders_id_seq', 1954210119)"""
    )
    shown = 0
    try:
        for command, expected in shells(PAGE):
            if not command.startswith("pgtoolset ") or "host=" in command:
                continue  # another program, or a server that only the page knows
            arguments = arguments_of(command)
            if "watch" in arguments or "--watch" in arguments:
                printed = await beginning(connection, arguments, len(expected), empty_database)
            else:
                code, output, errors = await run(*arguments, DATABASE_URL=empty_database)
                assert (code, errors) == (int(arguments[0] == "doctor"), "")
                printed = without_notes(output)
            if expected:
                shown += 1
                assert alike(printed) == alike(expected), command
    finally:
        await connection.close()
    assert shown == 4


async def beginning(
    connection: asyncpg.Connection, arguments: list[str], count: int, url: str
) -> list[str]:
    """Return the first lines of a command that has no end, while the order is paid."""
    async with running(*arguments, DATABASE_URL=url) as lines:
        printed = await line(lines)
        assert printed
        if count > 1:
            await connection.execute("UPDATE orders SET status = 'paid'")
        for _ in range(count - 1):
            printed += await line(lines)
    return printed.splitlines()


def test_names_of_findings() -> None:
    """The page lists each name of a finding, and no other."""
    made: set[str] = set()
    for module in (_objects, _settings):
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id == "Finding":
                    name = node.args[1]
                    assert isinstance(name, ast.Constant)
                    made.add(str(name.value))
    text = PAGE.read_text().partition("\n## doctor")[2].partition("\n### From a program")[0]
    rows = "".join(re.findall(r"^\| (`.*?) \|", text, re.M)) + text.partition("The notes are")[2]
    settings = {"lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout"}
    assert set(re.findall(r"`(\w+)`", rows)) - settings == made
