"""`pgtoolset watch`: what it prints, and how it fails."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from typing import Any

import asyncpg
import pytest

from tests.commands.running import run, start


@pytest.mark.usefixtures("engine")
async def test_prints_changes(database_url: str, other: asyncpg.Connection) -> None:
    """The row as it is, then a line for each insertion, update and deletion."""
    process = await start("watch", database_url, "item", "1", "--interval", "0.05")
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            assert b"now: no row" in await process.stdout.readline()
            await other.execute("INSERT INTO item VALUES (1, 'new')")
            assert b"insert: id=1, name='new'" in await process.stdout.readline()
            await other.execute("UPDATE item SET name = 'paid'")
            assert (await process.stdout.readline()).endswith(b"update: name='paid'\n")
            await other.execute("DELETE FROM item")
            assert b"delete: id=1, name='paid'" in await process.stdout.readline()
    finally:
        process.kill()
        await process.communicate()


@pytest.mark.usefixtures("engine")
async def test_keys_of_odd_types(database_url: str, other: asyncpg.Connection) -> None:
    """The parts of a key have the types of their columns: domain, address, moment, enum, oid."""
    await other.execute(
        """
        CREATE SCHEMA "Odd";
        CREATE DOMAIN "Odd".positive AS int CHECK (VALUE > 0);
        CREATE TYPE "Odd".colour AS ENUM ('red', 'green');
        CREATE TABLE "Odd"."a table" (
            n "Odd".positive, host inet, at timestamptz, colour "Odd".colour, flag bool, o oid,
            "the value" json, PRIMARY KEY (n, host, at, colour, flag, o)
        );
        INSERT INTO "Odd"."a table"
            VALUES (1, '10.0.0.1', '2026-01-01 00:00+00', 'red', false, 17, '[1]');
        """
    )
    key = ("1", "10.0.0.1", "2026-01-01T01:00:00+01:00", "red", "false", "17")
    process = await start("watch", database_url, "Odd.a table", *key, "--interval", "0.05")
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            assert b"the value=[1]" in await process.stdout.readline()
            await other.execute('UPDATE "Odd"."a table" SET "the value" = \'[2]\'')
            assert (await process.stdout.readline()).endswith(b"update: the value=[2]\n")
    finally:
        process.kill()
        _, errors = await process.communicate()
        await other.execute('DROP SCHEMA "Odd" CASCADE')
    assert not errors


@pytest.mark.usefixtures("engine")
async def test_json(database_url: str, other: asyncpg.Connection) -> None:
    """With --json each change is one line: an object with the row before and after."""
    await other.execute(
        """CREATE TABLE odd (a text, b int, at timestamptz, price numeric, raw bytea, ratio float8,
                             takes interval, PRIMARY KEY (a, b));
           INSERT INTO odd VALUES ('x', 1, '2026-01-01 00:00+00', 1.50, '\\x00ff', 'NaN', '1:30')"""
    )
    process = await start("watch", database_url, "odd", "x", "1", "--json", "--interval", "0.05")
    assert process.stdout is not None

    def parsed(line: bytes) -> dict[str, Any]:
        assert line.isascii()
        change: dict[str, Any] = json.loads(line, parse_constant=pytest.fail)
        assert list(change) == ["at", "kind", "table", "key", "before", "after"]
        assert datetime.fromisoformat(change["at"]).tzinfo is not None
        assert (change["table"], change["key"]) == ("public.odd", {"a": "x", "b": 1})
        return change

    try:
        async with asyncio.timeout(60):
            now = parsed(await process.stdout.readline())
            await other.execute("UPDATE odd SET price = 2")
            update = parsed(await process.stdout.readline())
            await other.execute("DELETE FROM odd")
            delete = parsed(await process.stdout.readline())
    finally:
        process.kill()
        await process.communicate()
        await other.execute("DROP TABLE odd")
    row = {
        **{"a": "x", "b": 1, "at": "2026-01-01T00:00:00+00:00", "price": "1.50"},
        **{"raw": "\\x00ff", "ratio": "nan", "takes": 5400.0},
    }
    assert (now["kind"], now["before"], now["after"]) == ("now", None, row)
    assert (update["kind"], update["before"]) == ("update", row)
    assert update["after"] == row | {"price": "2"}
    assert (delete["kind"], delete["before"], delete["after"]) == ("delete", update["after"], None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing", "1"), "no table"),
        (("item", "1", "2"), "1 part"),
        (("item", "one"), "cannot be id"),
        (("item", "99999999999"), "pgtoolset: item.id is an integer of 32 bits"),
    ],
)
async def test_bad_arguments(database_url: str, arguments: tuple[str, ...], message: str) -> None:
    """A wrong table or key is one sentence on standard error, and exit code 2."""
    code, _, errors = await run("watch", database_url, *arguments)
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("command", ["locks", "watch", "doctor"])
async def test_unknown_option(command: str) -> None:
    """An unknown option is answered with the usage of its command, and not of all of them."""
    code, _, errors = await run(command, "item", "1", "--no-such-option")
    assert code == 2
    assert errors.startswith(f"usage: pgtoolset {command} ")
    assert f"pgtoolset {command}: error: unrecognized arguments:" in errors
    assert "--no-such-option" in errors


async def test_bad_interval(database_url: str) -> None:
    """An interval that is not a time is a usage error, which names the option."""
    for interval in ("0", "soon", "-1s"):
        code, _, errors = await run("watch", database_url, "item", "1", f"--interval={interval}")
        assert code == 2
        assert "--interval must be" in errors


@pytest.mark.usefixtures("engine")
async def test_interval_with_a_unit(database_url: str, other: asyncpg.Connection) -> None:
    """An interval is taken with a unit, as everywhere."""
    process = await start("watch", database_url, "item", "1", "--interval", "50ms")
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            assert b"now: no row" in await process.stdout.readline()
    finally:
        process.kill()
        await process.communicate()
