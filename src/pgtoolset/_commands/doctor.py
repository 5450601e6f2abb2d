"""`pgtoolset doctor [URL]`: look for what needs care, and say what to do about it."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict
from typing import Any, TypeVar

from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

import pgtoolset
from pgtoolset._commands._command import add_url, connected, described, explained, parse_url
from pgtoolset._commands._console import put, show
from pgtoolset._commands._findings import Finding, Report, plural
from pgtoolset._commands._json import as_json
from pgtoolset._commands._objects import (
    LONG_IDLE,
    not_checked,
    of_indexes,
    of_sequences,
    of_sessions,
    of_sizes,
    of_triggers,
    of_waits,
    watched_oids,
)
from pgtoolset._commands._settings import (
    SETTINGS,
    Pools,
    of_connections,
    of_pooler,
    of_server,
    of_settings,
)
from pgtoolset._postgres.checkup import (
    ServerState,
    connections_of,
    hidden_sessions,
    idle_sessions,
    invalid_indexes,
    limited,
    server_state,
    settings_of,
    table_sizes,
)
from pgtoolset._postgres.pooling import Pooler, find_pooler
from pgtoolset._postgres.sequence_ends import sequence_ends
from pgtoolset._postgres.sqlstates import driver_error, sqlstate_of
from pgtoolset._postgres.trigger_state import trigger_functions, triggers
from pgtoolset._postgres.urls import driver_named
from pgtoolset._text import printable
from pgtoolset.locks.waits import list_lock_waits

HELP = "look for what needs care, and say what to do"
DESCRIPTION = (
    "Looks at a server and a database for what breaks an application now or soon: the version and "
    "role of the server, a pooler in front and the option that it needs, settings, connections, "
    "the triggers of RowWatcher(notify=True), statistics of watched tables, sequences near their "
    "end, invalid indexes, sessions that are idle in a transaction, and waits for locks. It "
    "writes nothing."
)
EXAMPLES = explained(
    [
        ("the database of DATABASE_URL", "pgtoolset doctor"),
        (
            "are there enough connections for 8 processes with 20 each?",
            "pgtoolset doctor --processes 8 --pool-size 20",
        ),
        (
            "the names of the findings",
            "pgtoolset doctor --json | jq -r '.findings[].name'",
        ),
        ("fail a deployment that something would hurt", "pgtoolset doctor || exit 1"),
    ],
    "JSON: an object with server, findings and notes. Each finding has severity (error or "
    "warning), name, message and advice, and so has each note (info).",
    "A role that may not see something gets a note that names it. pg_monitor sees everything.",
    "Exit codes: 0 where there are no findings, whatever the notes say; 1 where there are; 2 for "
    "wrong arguments, or where the database cannot be reached.",
)

#: SQLAlchemy's defaults: pool_size=5 and max_overflow=10.
_DEFAULT_POOL = 15

#: Seconds for one look. PostgreSQL ends a statement before.
_LONGEST_LOOK = 20.0

_STYLES = {
    r"^error(?= )": "error",
    r"^warning(?= )": "warning",
    r"^note(?= )": "info",
    r"(?<=^error )\w+|(?<=^warning )\w+|(?<=^note )\w+": "name",
    r"^No findings": "ok",
}

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_url(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--pool-size",
        metavar="N",
        type=_count,
        help="the connections that each process of the application may open, pool_size and "
        f"max_overflow together ({_DEFAULT_POOL} where only --processes is given)",
    )
    parser.add_argument(
        "--processes", metavar="N", type=_count, help="the processes of the application (1)"
    )


def run(options: argparse.Namespace) -> int:
    report = asyncio.run(_examine(parse_url(options.url, keeps_driver=True), _pools(options)))
    if options.json:
        put(as_json(asdict(report), indent=2))
    else:
        _print(report)
    return 1 if report.findings else 0


def _pools(options: argparse.Namespace) -> Pools | None:
    if options.pool_size is None and options.processes is None:
        return None
    return Pools(options.pool_size or _DEFAULT_POOL, options.processes or 1)


async def _examine(url: URL, pools: Pools | None) -> Report:
    driver = driver_named(url)
    async with connected(url) as engine, connected(url, caches=True) as caching:
        async with engine.connect() as connection:
            examination = _Examination(connection)
            state = await examination.ask(server_state)
            settings = await examination.ask(lambda each: settings_of(each, SETTINGS))
            pooler = await examination.try_to(
                "the pooler in front of PostgreSQL", lambda each: find_pooler(each, engine, caching)
            )
            examination.add(of_server(state, driver))
            examination.add(of_pooler(pooler, driver))
            examination.add(of_settings(settings))
            connections = await examination.check("connections", connections_of)
            if connections is not None:
                examination.add(of_connections(connections, settings, pools, pooler is not None))
            await _examine_objects(examination, state)
            await _examine_sessions(examination)
    return Report.of(_server(url, state, settings, pooler, driver), examination.found)


async def _examine_objects(examination: _Examination, state: ServerState) -> None:
    found = await examination.check("triggers", triggers)
    functions = await examination.check("trigger functions", trigger_functions)
    if found is not None and functions is not None:
        examination.add(of_triggers(found, functions))
    watched = watched_oids(found or [])
    if watched and not state.is_standby:  # which analyzes nothing, and knows its primary's figures
        sizes = await examination.check("statistics", lambda each: table_sizes(each, watched))
        examination.add(of_sizes(sizes or []))
    ends = await examination.try_to("sequences", sequence_ends)
    examination.add(of_sequences(ends or []))
    indexes = await examination.check("indexes", invalid_indexes)
    examination.add(of_indexes(indexes or []))


async def _examine_sessions(examination: _Examination) -> None:
    idle = await examination.check("sessions", lambda each: idle_sessions(each, LONG_IDLE))
    hidden = await examination.check("hidden sessions", hidden_sessions)
    examination.add(of_sessions(idle or [], hidden or 0))
    waits = await examination.check("locks", list_lock_waits)
    examination.add(of_waits(waits or []))


class _Examination:
    """Questions over one connection, and the findings so far."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection
        self.found: list[Finding] = []

    def add(self, findings: Iterable[Finding]) -> None:
        """Add findings."""
        self.found.extend(findings)

    async def ask(self, look: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Return an answer without which there is no report."""
        async with asyncio.timeout(_LONGEST_LOOK), self._connection.begin():
            return await look(self._connection)

    async def check(self, what: str, look: Callable[[AsyncConnection], Awaitable[T]]) -> T | None:
        """Return an answer, in a transaction in which nothing takes long."""

        async def in_limits(connection: AsyncConnection) -> T:
            async with limited(connection):
                return await look(connection)

        return await self.try_to(what, in_limits)

    async def try_to(self, what: str, look: Callable[[AsyncConnection], Awaitable[T]]) -> T | None:
        """Return an answer; `None`, with a note, where PostgreSQL refuses it."""
        try:
            async with asyncio.timeout(_LONGEST_LOOK):
                return await look(self._connection)
        except DBAPIError as error:
            if error.connection_invalidated or sqlstate_of(error) is None:
                raise
            reason = str(driver_error(error)).splitlines()[0]
        self.found.append(
            not_checked(
                what, reason, "run doctor as a role that may, such as a member of pg_monitor"
            )
        )
        return None


def _server(
    url: URL, state: ServerState, settings: dict[str, str], pooler: Pooler | None, driver: str
) -> dict[str, Any]:
    return {
        "address": described(url),
        "database": state.database,
        "user": state.user,
        "version": state.version,
        "version_num": state.version_num,
        "role": "standby" if state.is_standby else "primary",
        "pooler": None if pooler is None else asdict(pooler),
        "driver": driver,
        "driver_version": str(sys.modules[driver].__version__),
        "pgtoolset": pgtoolset.__version__,
        "implementation": pgtoolset.implementation,
        "settings": settings,
    }


def _print(report: Report) -> None:
    server = report.server
    pooler = server["pooler"]
    behind = f", behind a pooler in {pooler['mode'] or 'unknown'} mode" if pooler else ""
    show(
        printable(f"PostgreSQL {server['version']}, {server['role']}{behind}: {server['address']}")
    )
    show(
        printable(
            f"{server['driver']} {server['driver_version']}, pgtoolset {server['pgtoolset']} "
            f"({server['implementation']}), database {server['database']} as {server['user']}"
        ),
    )
    for each in (*report.findings, *report.notes):
        show("")
        severity = "note" if each.severity == "info" else each.severity
        show(f"{severity} {each.name}", _STYLES)
        show(each.message, indent=2, wraps=True)
        show(f"-> {each.advice}", {"^->": "ok"}, indent=2, wraps=True)
    show("")
    counted = plural(len(report.findings), "finding") if report.findings else "No findings"
    show(f"{counted}, {plural(len(report.notes), 'note')}.", _STYLES)


def _count(argument: str) -> int:
    if not argument.isdecimal() or not 0 < int(argument[:20]) < 2**31:
        raise argparse.ArgumentTypeError("must be a number from 1")
    return int(argument)
