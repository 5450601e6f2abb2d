"""`pgtoolset watch [URL] TABLE KEY`: print a line for each change of a row."""

from __future__ import annotations

import argparse
import asyncio
import warnings
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import URL, Connection, MetaData, Table, text
from sqlalchemy.dialects.postgresql import DOMAIN
from sqlalchemy.exc import NoSuchTableError, SAWarning
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import registry
from sqlalchemy.types import TypeEngine

from pgtoolset._arguments import is_connection_string, shown
from pgtoolset._commands._command import (
    CommandError,
    UsageError,
    connected,
    interval_of,
    parse_url,
)
from pgtoolset._postgres.catalog import EQ
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

#: The schema of a table, by the search_path where none is given.
_SCHEMA = text(f"""
SELECT n.nspname FROM pg_catalog.pg_class AS c
JOIN pg_catalog.pg_namespace AS n ON n.oid {EQ} c.relnamespace
WHERE c.oid {EQ} CAST(pg_catalog.to_regclass(
    CASE WHEN CAST(:schema AS varchar) IS NULL THEN pg_catalog.quote_ident(:name)
    ELSE pg_catalog.format('%I.%I', CAST(:schema AS varchar), CAST(:name AS varchar)) END
) AS pg_catalog.oid)
""")
_SAFE_PATH = text("SELECT pg_catalog.set_config('search_path', 'pg_catalog', false)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "pgtoolset watch [-h] [--interval TIME] [URL] TABLE KEY [KEY ...]"
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


def run(options: argparse.Namespace) -> int:
    url, table, key = _told_apart(options.arguments)
    return asyncio.run(_run(parse_url(url), table, key, options.interval))


async def _run(url: URL, table: str, key: list[str], interval: float) -> int:
    async with connected(url) as engine:
        model = await _mapped(engine, table)
        try:
            async with RowWatcher(engine, interval=interval) as watcher:
                async with watcher.changes(model, _key(model, key)) as changes:
                    _print_row("now", changes.current)
                    async for change in changes:
                        _print_row(change.kind, _new_values(change))
        except ValueError as error:
            raise UsageError(str(error)) from None
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


def _new_values(change: RowChange[Any]) -> Mapping[str, Any] | None:
    """Return what an insertion or an update has written, or what a deletion has removed."""
    if change.after is None or change.before is None:
        return change.after or change.before
    before = change.before
    return {name: value for name, value in change.after.items() if before[name] != value}


async def _mapped(engine: AsyncEngine, name: str) -> type[Any]:
    """Return a class for a table, from the database's own description of it."""
    schema, _, table_name = name.rpartition(".")

    def reflect(connection: Connection) -> Table:
        found = connection.execute(_SCHEMA, {"schema": schema or None, "name": table_name}).first()
        if found is None:
            raise NoSuchTableError(name)
        # SQLAlchemy's queries name functions without a schema: no other than PostgreSQL's may be
        # found. The connection is closed afterwards.
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
        async with engine.connect() as connection:
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


def _print_row(what: str, values: Mapping[str, Any] | None) -> None:
    row = (
        "no row"
        if values is None
        else ", ".join(f"{name}={value!r}" for name, value in values.items())
    )
    print(f"{datetime.now():%H:%M:%S.%f} {what}: {printable(row)}", flush=True)
