"""`pgtoolset locks URL`: who waits for whom, as a tree."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from pgtoolset._commands._command import CommandError, add_url, connected, parse_url
from pgtoolset._postgres.locks import sessions_of
from pgtoolset.locks.waits import list_lock_waits
from pgtoolset.values import Blocker, LockWait

HELP = "who waits for whom, as a tree"
DESCRIPTION = (
    "Shows the sessions of a database that wait for a lock, under those that are in their way. With --terminate it "
    "ends one of them, which rolls its transaction back."
)

_QUERY_LENGTH = 100
_CLEAR = "\033[H\033[2J"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_url(parser)
    parser.add_argument(
        "--json", action="store_true", help="print JSON; with --watch one line for each look"
    )
    parser.add_argument("--yes", action="store_true", help="with --terminate, do not ask")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--watch",
        metavar="SECONDS",
        type=_seconds,
        nargs="?",
        const=2.0,
        help="look again every so many seconds (2), until Ctrl-C",
    )
    what.add_argument(
        "--terminate", metavar="PID", type=_pid, help="end this session, after asking"
    )


def run(options: argparse.Namespace) -> int:
    return asyncio.run(_run(options))


async def _run(options: argparse.Namespace) -> int:
    async with connected(parse_url(options.url)) as engine, engine.connect() as connection:
        if options.terminate is not None:
            return await _terminate(connection, options.terminate, ask=not options.yes)
        while True:
            waits = await list_lock_waits(connection)
            sessions = {each.pid: each for each in await sessions_of(connection, _pids(waits))}
            if options.json:
                report = json.dumps(_as_json(waits, sessions), indent=None if options.watch else 2)
            else:
                report = "\n".join(tree(waits, sessions)) or "Nobody waits for a lock."
            if options.watch and sys.stdout.isatty() and not options.json:
                report = f"{_CLEAR}{report}"
            print(report, flush=True)
            if not options.watch:
                return 0
            await asyncio.sleep(options.watch)


async def _terminate(connection: AsyncConnection, pid: int, *, ask: bool) -> int:
    session = (await sessions_of(connection, [pid]))[0]
    known = await connection.scalar(
        text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid"), {"pid": pid}
    )
    if not known:
        raise CommandError(f"there is no session with pid {pid}")
    print(_session(session))
    if ask:
        print("Terminate it, and roll its transaction back? [y/N] ", end="", flush=True)
        answer = await asyncio.to_thread(sys.stdin.readline)
        if answer.strip().lower() not in ("y", "yes"):
            print("Nothing was done.")
            return 1
    if not await connection.scalar(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid}):
        raise CommandError(f"pid {pid} could not be terminated: it has ended meanwhile")
    print(f"Terminated pid {pid}.")
    return 0


def tree(waits: Sequence[LockWait], sessions: Mapping[int, Blocker]) -> list[str]:
    """The lines of the tree: who waits stands below whoever is directly in its way."""
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
        # In a deadlock everybody waits, until PostgreSQL notices after deadlock_timeout.
        if wait.pid not in shown:
            show(wait.pid, "", "", (wait.pid,))
    return lines


def _direct(wait: LockWait, by_pid: Mapping[int, LockWait]) -> list[int]:
    """Of those in the way of a wait, the ones that no other of them waits for."""

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
    relation = f" on {wait.relation}" if wait.relation else ""
    since = "" if wait.waiting_for is None else f" for {wait.waiting_for.total_seconds():.1f} s"
    return f"{_name(wait.pid, wait.application_name)} waits{since}: {wait.mode}{relation}{_query(wait.query)}"


def _session(session: Blocker) -> str:
    if session.pid == 0:
        return "a prepared transaction (see pg_prepared_xacts)"
    age = (
        ""
        if session.transaction_age is None
        else f", transaction of {session.transaction_age.total_seconds():.1f} s"
    )
    state = session.state or "its state is not to be seen by this role"
    return f"{_name(session.pid, session.application_name)} {state}{age}{_query(session.query)}"


def _name(pid: int, application_name: str | None) -> str:
    return f"{pid} {_printable(application_name)}" if application_name else str(pid)


def _query(query: str | None) -> str:
    line = _printable(query or "")
    if len(line) > _QUERY_LENGTH:
        line = line[:_QUERY_LENGTH] + "..."
    return f"  {line}" if line else ""


def _printable(line: str) -> str:
    """One line without control characters: others have written it, and a terminal would obey
    them."""
    return "".join(
        character if character.isprintable() else "?" for character in " ".join(line.split())
    )


def _pids(waits: Iterable[LockWait]) -> list[int]:
    return sorted({pid for wait in waits for pid in (wait.pid, *wait.blocked_by)})


def _as_json(waits: Sequence[LockWait], sessions: Mapping[int, Blocker]) -> dict[str, Any]:
    waiting = {wait.pid for wait in waits}
    blockers = [_plain(asdict(session)) for pid, session in sessions.items() if pid not in waiting]
    return {"waits": [_plain(asdict(wait)) for wait in waits], "blockers": blockers}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.total_seconds() if isinstance(value, timedelta) else value
        for name, value in values.items()
    }


def _seconds(argument: str) -> float:
    seconds = float(argument)
    if not 0.05 <= seconds <= 86400:
        raise argparse.ArgumentTypeError("must be from 0.05 to 86400 seconds")
    return seconds


def _pid(argument: str) -> int:
    pid = int(argument)
    if not 0 < pid < 2**31:
        raise argparse.ArgumentTypeError("must be the process id of a session")
    return pid
