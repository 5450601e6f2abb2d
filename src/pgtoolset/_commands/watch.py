"""`pgtoolset watch [URL] TABLE KEY`: print a line for each change of a row."""

from __future__ import annotations

import argparse
import asyncio
import warnings
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import URL, Connection, MetaData, Table, text
from sqlalchemy.dialects.postgresql import DOMAIN, OID
from sqlalchemy.exc import NoSuchTableError, SAWarning
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import registry
from sqlalchemy.types import TypeEngine

from pgtoolset._arguments import is_connection_string, shown
from pgtoolset._commands._command import (
    CommandError,
    UsageError,
    connected,
    explained,
    interval_of,
    parse_url,
)
from pgtoolset._commands._console import put, show
from pgtoolset._commands._json import as_json
from pgtoolset._postgres.catalog import EQ
from pgtoolset._postgres.pooling import is_pooled
from pgtoolset._text import printable
from pgtoolset.errors import WatchFailedError
from pgtoolset.values import RowChange
from pgtoolset.watch.watcher import RowWatcher

HELP = "print the changes of a row as they happen"
DESCRIPTION = (
    "Prints a line for each change of a row, until Ctrl-C. The row may not exist yet. The first "
    "argument is a URL where it contains :// or is a DSN. A key that begins with a dash stands "
    "after --, as in: pgtoolset watch --interval 1 orders -- -a1"
)

EXAMPLES = explained(
    [
        ("the order 17 in the database of DATABASE_URL", "pgtoolset watch orders 17"),
        (
            "a row with two parts in its key, ten times a second",
            "pgtoolset watch --interval 100ms shop.stock berlin 4711",
        ),
        ("a key that begins with a dash", "pgtoolset watch orders -- -a1"),
        (
            "the new status of each update",
            "pgtoolset watch --json orders 17 | jq -r '.after.status'",
        ),
    ],
    "JSON: one object a line, with at, kind (now, insert, update or delete), table, key, before "
    "and after. Changes that are undone between two looks are not seen.",
    "Exit codes: 0 after a closed pipe; 1 where the table cannot be read any more; 2 for wrong "
    "arguments, or where the database cannot be reached; 130 after Ctrl-C.",
)

#: Parts of a line.
_STYLES = {
    r"^\S+": "aside",
    r"(?<=\d )(now|update)(?=:)": "name",
    r"(?<=\d )insert(?=:)": "ok",
    r"(?<=\d )delete(?=:)": "error",
}

#: The schema of a table, by the search_path where none is given.
_SCHEMA = text(f"""
SELECT n.nspname FROM pg_catalog.pg_class AS c
JOIN pg_catalog.pg_namespace AS n ON n.oid {EQ} c.relnamespace
WHERE c.oid {EQ} CAST(pg_catalog.to_regclass(
    CASE WHEN CAST(:schema AS varchar) IS NULL THEN pg_catalog.quote_ident(:name)
    ELSE pg_catalog.format('%I.%I', CAST(:schema AS varchar), CAST(:name AS varchar)) END
) AS pg_catalog.oid)
""")
_SAFE_PATH = text("SELECT pg_catalog.set_config('search_path', 'pg_catalog', true)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "pgtoolset watch [-h] [--interval TIME] [--json] [URL] TABLE KEY [KEY ...]"
    parser.add_argument(
        "arguments",
        metavar="[URL] TABLE KEY",
        nargs="+",
        help="the database (see below); the table, as NAME or SCHEMA.NAME; and the primary key, "
        "its parts as separate arguments",
    )
    parser.add_argument(
        "--interval",
        metavar="TIME",
        type=interval_of("--interval"),
        default=0.5,
        help="the time between two ticks, in seconds or as 500ms (0.5)",
    )
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each change")


def run(options: argparse.Namespace) -> int:
    url, table, key = _told_apart(options.arguments)
    return asyncio.run(_run(parse_url(url), table, key, options))


async def _run(url: URL, table: str, parts: list[str], options: argparse.Namespace) -> int:
    async with connected(url) as engine:
        async with engine.connect() as connection:
            pooled = await is_pooled(connection)
            model = await _mapped(connection, table)
    key = _key(model, parts)
    printed = _JsonLines(model.__table__, key) if options.json else _Lines()
    async with connected(url, caches=not pooled) as engine:
        try:
            async with RowWatcher(engine, interval=options.interval) as watcher:
                async with watcher.changes(model, key) as changes:
                    printed.now(changes.current)
                    async for change in changes:
                        printed.change(change)
        except ValueError as error:
            # The argument of a function is no word of the command line.
            raise UsageError(str(error).removeprefix("pk_value: ")) from None
        except WatchFailedError as error:
            raise CommandError(str(error)) from None
    return 0


def _told_apart(arguments: list[str]) -> tuple[str | None, str, list[str]]:
    """Return the URL, the table and the parts of the key."""
    url = arguments[0] if is_connection_string(arguments[0]) else None
    table, *key = [*(arguments if url is None else arguments[1:]), ""]
    if not key[:-1]:
        raise UsageError("TABLE and KEY are needed: pgtoolset watch [URL] TABLE KEY; see --help")
    return url, table, key[:-1]


class _Lines:
    """Changes for people: the new values of a row, or the ones that a deletion removed."""

    def now(self, values: Mapping[str, Any] | None) -> None:
        """Print the row that watching begins with."""
        self._print("now", values)

    def change(self, change: RowChange[Any]) -> None:
        """Print a change."""
        before, after = change.before, change.after
        values = after or before
        if after is not None and before is not None:
            values = {name: value for name, value in after.items() if before[name] != value}
        self._print(change.kind, values)

    def _print(self, what: str, values: Mapping[str, Any] | None) -> None:
        row = (
            "no row"
            if values is None
            else ", ".join(f"{name}={value!r}" for name, value in values.items())
        )
        show(f"{datetime.now():%H:%M:%S.%f} {what}: {printable(row)}", _STYLES)


class _JsonLines:
    """Changes for programs: the whole row before and after, a line for each change."""

    def __init__(self, table: Table, key: tuple[Any, ...]) -> None:
        names = [column.name for column in table.primary_key.columns]
        self._about = {"table": table.fullname, "key": dict(zip(names, key, strict=True))}

    def now(self, values: Mapping[str, Any] | None) -> None:
        """Print the row that watching begins with."""
        self._print("now", None, values)

    def change(self, change: RowChange[Any]) -> None:
        """Print a change."""
        self._print(change.kind, change.before, change.after)

    def _print(
        self, kind: str, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None
    ) -> None:
        at = datetime.now().astimezone()
        line = {"at": at, "kind": kind, **self._about, "before": before, "after": after}
        put(as_json(line))


async def _mapped(connection: AsyncConnection, name: str) -> type[Any]:
    """Return a class for a table, from the database's own description of it."""
    schema, _, table_name = name.rpartition(".")

    def reflect(connection: Connection) -> Table:
        found = connection.execute(_SCHEMA, {"schema": schema or None, "name": table_name}).first()
        if found is None:
            raise NoSuchTableError(name)
        # SQLAlchemy's queries name functions without a schema: no other than PostgreSQL's may be
        # found. The setting ends with the transaction.
        connection.execute(_SAFE_PATH)
        with warnings.catch_warnings():
            # SQLAlchemy warns of types and indexes that it does not know. Watching needs neither.
            warnings.simplefilter("ignore", SAWarning)
            return Table(
                table_name,
                MetaData(),
                schema=found.nspname,
                autoload_with=connection,
                resolve_fks=False,
            )

    try:
        async with connection.begin():
            table = await connection.run_sync(reflect)
    except NoSuchTableError:
        raise UsageError(f"there is no table {shown(name)}") from None
    if not table.primary_key.columns:
        raise UsageError(f"table {shown(name)} has no primary key, which watching needs")
    model = type(table_name, (), {})
    registry().map_imperatively(model, table)
    return model


def _key(model: type[Any], parts: list[str]) -> tuple[Any, ...]:
    """Return the key, each part in the type of its column."""
    columns = list(model.__table__.primary_key.columns)
    if len(parts) != len(columns):
        names = ", ".join(column.name for column in columns)
        raise UsageError(
            f"the primary key has {len(columns)} part(s) ({names}), but {len(parts)} were given"
        )
    return tuple(
        _part(column.name, _python_type(column.type), part)
        for column, part in zip(columns, parts, strict=True)
    )


def _python_type(type_: TypeEngine[Any]) -> type[Any]:
    """Return the Python type of a key's values, or `str` where only the driver knows it."""
    if isinstance(type_, DOMAIN):
        return _python_type(type_.data_type)
    if isinstance(type_, OID):
        return int
    try:
        known = type_.python_type
    except NotImplementedError:
        return str
    return str if known is object else known


def _part(name: str, type_: type[Any], part: str) -> Any:
    if type_ is bool:
        try:
            return {"t": True, "true": True, "f": False, "false": False}[part.lower()]
        except KeyError:
            raise UsageError(f"{shown(part)} cannot be {name}: true or false is needed") from None
    try:
        return type_.fromisoformat(part) if hasattr(type_, "fromisoformat") else type_(part)
    except (ValueError, TypeError, ArithmeticError):
        raise UsageError(f"{shown(part)} cannot be {name}: its type is {type_.__name__}") from None
