"""`pgtoolset locks [URL]`: print the sessions that wait for locks, as a tree."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncConnection

from pgtoolset._commands._command import (
    CommandError,
    UsageError,
    add_url,
    connected,
    explained,
    interval_of,
    parse_url,
)
from pgtoolset._commands._console import clear, put, show
from pgtoolset._commands._json import as_json
from pgtoolset._postgres.catalog import EQ
from pgtoolset._postgres.locks import sessions_of
from pgtoolset._text import one_line, printable
from pgtoolset.locks.waits import list_lock_waits
from pgtoolset.values import Blocker, LockWait

HELP = "print the sessions that wait for locks, as a tree"
DESCRIPTION = (
    "Prints the sessions of a database that wait for a lock, below their blockers. With "
    "--terminate it ends a session, which rolls its transaction back."
)

EXAMPLES = explained(
    [
        ("who waits for whom in the database of DATABASE_URL", "pgtoolset locks"),
        ("the same, twice a second, until Ctrl-C", "pgtoolset locks --watch 500ms"),
        (
            "the pids that have waited for more than 5 seconds",
            "pgtoolset locks --json | jq '.waits[] | select(.waiting_for > 5) | .pid'",
        ),
        ("end the session at the root of the tree", "pgtoolset locks --terminate 4242"),
    ],
    "JSON: an object with waits and blockers. Times are in seconds. What this role may not see is "
    "null.",
    "Exit codes: 0; 1 where a session was not terminated; 2 for wrong arguments, or where the "
    "database cannot be reached.",
)

_QUERY_LENGTH = 100

#: Parts of a line of the tree.
_STYLES = {
    r"^[│├└─ ]*\d+": "name",
    r"(?<=\d )waits for [0-9.]+ s|(?<= )idle in transaction(?: \(aborted\))?": "warning",
    r"[│├└─]": "aside",
}


_KNOWN = text(f"SELECT pg_catalog.count(*) FROM pg_catalog.pg_stat_activity WHERE pid {EQ} :pid")
_TERMINATE = text("SELECT pg_catalog.pg_terminate_backend(:pid)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_url(parser)
    parser.add_argument(
        "--json", action="store_true", help="print JSON; with --watch a line each time"
    )
    parser.add_argument("--yes", action="store_true", help="with --terminate, do not ask")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--watch",
        metavar="TIME",
        type=interval_of("--watch", 0.05),
        nargs="?",
        const=2.0,
        help="repeat after this time, in seconds or as 500ms (2), until Ctrl-C",
    )
    what.add_argument(
        "--terminate", metavar="PID", type=_pid, help="end this session, after asking"
    )


def run(options: argparse.Namespace) -> int:
    _check(options)
    return asyncio.run(_run(parse_url(options.url), options))


def _check(options: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if options.yes and options.terminate is None:
        raise UsageError("--yes is for --terminate alone; see pgtoolset locks --help")
    if options.json and options.terminate is not None:
        raise UsageError("--json does not go with --terminate; see pgtoolset locks --help")


async def _run(url: URL, options: argparse.Namespace) -> int:
    async with connected(url) as engine, engine.connect() as connection:
        if options.terminate is not None:
            return await _terminate(connection, options.terminate, ask=not options.yes)
        while True:
            await _report(connection, options)
            if not options.watch:
                return 0
            await asyncio.sleep(options.watch)


async def _report(connection: AsyncConnection, options: argparse.Namespace) -> None:
    async with connection.begin():
        waits = await list_lock_waits(connection)
        sessions = {each.pid: each for each in await sessions_of(connection, _pids(waits))}
    if options.json:
        put(as_json(_plain(waits, sessions), indent=None if options.watch else 2))
        return
    if options.watch:
        clear()
    for line in tree(waits, sessions) or ["No session waits for a lock."]:
        show(line, _STYLES)


async def _terminate(connection: AsyncConnection, pid: int, *, ask: bool) -> int:
    async with connection.begin():
        session = (await sessions_of(connection, [pid]))[0]
        known = await connection.scalar(_KNOWN, {"pid": pid})
    if not known:
        raise CommandError(f"there is no session with pid {pid}")
    put(_session(session))
    if ask:
        put("Terminate it, and roll its transaction back? [y/N] ", end="")
        answer = await asyncio.to_thread(sys.stdin.readline)
        if answer.strip().lower() not in ("y", "yes"):
            put("Nothing was done.")
            return 1
    async with connection.begin():
        is_sent = await connection.scalar(_TERMINATE, {"pid": pid})
    if not is_sent:
        raise CommandError(f"pid {pid} cannot be terminated: it has ended")
    put(f"Terminated pid {pid}.")
    return 0


def tree(waits: Sequence[LockWait], sessions: Mapping[int, Blocker]) -> list[str]:
    """Return the lines of the tree: a session stands below the ones that block it directly."""
    by_pid = {wait.pid: wait for wait in waits}
    below: dict[int, list[int]] = {}
    for wait in waits:
        for pid in _direct(wait, by_pid):
            below.setdefault(pid, []).append(wait.pid)
    roots = [pid for pid in below if pid not in by_pid]
    lines: list[str] = []
    shown: set[int] = set()

    def show(pid: int, indent: str, branch: str, path: tuple[int, ...]) -> None:
        shown.add(pid)
        line = _waiting(by_pid[pid], sessions) if pid in by_pid else _session(sessions[pid])
        lines.append(f"{indent}{branch}{line}")
        if branch:
            indent += "│  " if branch.startswith("├") else "   "
        children = [child for child in below.get(pid, ()) if child not in path]
        for child in children:
            show(child, indent, "└─ " if child == children[-1] else "├─ ", (*path, pid, child))

    for pid in roots:
        show(pid, "", "", (pid,))
    for wait in waits:
        # In a deadlock every session waits, until PostgreSQL notices after deadlock_timeout.
        if wait.pid not in shown:
            show(wait.pid, "", "", (wait.pid,))
    return lines


def _direct(wait: LockWait, by_pid: Mapping[int, LockWait]) -> list[int]:
    """Return the sessions that block a wait, but not through other ones alone."""

    def ancestors(pid: int, seen: set[int]) -> set[int]:
        for each in by_pid[pid].blocked_by if pid in by_pid else ():
            if each not in seen:
                seen.add(each)
                ancestors(each, seen)
        return seen

    behind: set[int] = set()
    for pid in wait.blocked_by:
        behind |= ancestors(pid, set())
    return [pid for pid in wait.blocked_by if pid not in behind] or list(wait.blocked_by)


def _waiting(wait: LockWait, sessions: Mapping[int, Blocker]) -> str:
    relation = f" on {printable(wait.relation)}" if wait.relation else ""
    since = "" if wait.waiting_for is None else f" for {wait.waiting_for.total_seconds():.1f} s"
    name = _name(wait.pid, wait.application_name)
    return f"{name} waits{since}: {printable(wait.mode or 'a lock')}{relation}{_query(wait.query)}"


def _session(session: Blocker) -> str:
    if session.pid == 0:
        return "a prepared transaction (see pg_prepared_xacts)"
    age = (
        ""
        if session.transaction_age is None
        else f", transaction of {session.transaction_age.total_seconds():.1f} s"
    )
    state = printable(session.state or "this role may not see its state")
    return f"{_name(session.pid, session.application_name)} {state}{age}{_query(session.query)}"


def _name(pid: int, application_name: str | None) -> str:
    return f"{pid} {one_line(application_name)}" if application_name else str(pid)


def _query(query: str | None) -> str:
    line = one_line(query or "", _QUERY_LENGTH)
    return f"  {line}" if line else ""


def _pids(waits: Iterable[LockWait]) -> list[int]:
    return sorted({pid for wait in waits for pid in (wait.pid, *wait.blocked_by)})


def _plain(waits: Sequence[LockWait], sessions: Mapping[int, Blocker]) -> dict[str, Any]:
    waiting = {wait.pid for wait in waits}
    blockers = [asdict(session) for pid, session in sessions.items() if pid not in waiting]
    return {"waits": [asdict(wait) for wait in waits], "blockers": blockers}


def _pid(argument: str) -> int:
    if not argument.isdecimal() or not 0 < int(argument[:20]) < 2**31:
        raise argparse.ArgumentTypeError("must be the process id of a session")
    return int(argument)
