"""What `doctor` says of a server: its version and role, its settings, its connections, a pooler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pgtoolset
from pgtoolset._commands._findings import ERROR, INFO, WARNING, Finding, plural
from pgtoolset._postgres.checkup import Connections, ServerState
from pgtoolset._postgres.drivers import DRIVERS
from pgtoolset._postgres.pooling import Pooler

__all__ = ["SETTINGS", "Pools", "of_connections", "of_pooler", "of_server", "of_settings"]

#: The versions of PostgreSQL that the library supports.
_OLDEST, _NEWEST = 14, 18

#: The settings that are looked at.
SETTINGS = (
    *("lock_timeout", "statement_timeout", "deadlock_timeout", "fsync"),
    *("idle_in_transaction_session_timeout", "idle_session_timeout"),
    *("max_connections", "superuser_reserved_connections", "reserved_connections"),
)

#: Milliseconds: a transaction that is idle for less may still be at work.
_SHORT_IDLE = 5_000

#: The share of the connections that may be in use.
_BUSY = 0.8


@dataclass(frozen=True, slots=True)
class Pools:
    """The pools of an application.

    Attributes:
        size: connections that each process may open.
        processes: how many processes there are.
    """

    size: int
    processes: int


def of_server(state: ServerState, driver: str) -> Iterator[Finding]:
    """Judge the version and the role of a server, and what this installation uses it with."""
    major = state.version_num // 10_000
    if major < _OLDEST:
        yield Finding(
            ERROR,
            "unsupported_version",
            f"PostgreSQL {state.version} is older than {_OLDEST}, the oldest that pgtoolset "
            "supports",
            f"upgrade the server to PostgreSQL {_OLDEST} or newer",
        )
    elif major > _NEWEST:
        yield Finding(
            WARNING,
            "untested_version",
            f"pgtoolset {pgtoolset.__version__} was tested up to PostgreSQL {_NEWEST}, and this "
            f"is {state.version}",
            "upgrade pgtoolset, and run your tests against this version",
        )
    if state.is_standby:
        yield Finding(
            INFO,
            "standby",
            "the server is a standby: it refuses each write (25006), LISTEN and row locks",
            "give writers the primary, or several hosts with target_session_attrs=read-write; "
            "read here with ReadReplicas; run doctor on the primary for statistics",
        )
    if state.is_paused:
        yield Finding(
            WARNING,
            "replay_paused",
            "the standby replays nothing: its replay is paused",
            "SELECT pg_wal_replay_resume()",
        )
    if pgtoolset.implementation == "python":
        yield Finding(
            INFO,
            "interpreted_modules",
            "the two hot modules of pgtoolset are interpreted here",
            "install a wheel, or install with a C compiler, where thousands of rows are watched or "
            "associated at a time",
        )
    if driver != "asyncpg":
        yield Finding(
            INFO,
            "no_row_watcher",
            f"the driver is {driver}, and RowWatcher needs asyncpg",
            "pip install asyncpg, and use wait_for_row_change where it is not there",
        )


def of_settings(settings: Mapping[str, str]) -> Iterator[Finding]:
    """Judge the settings that this role has in this database."""
    times = {
        name: int(value) for name, value in settings.items() if name.endswith("_timeout")
    }  # milliseconds; 0 sets no limit
    lock, statement = times.get("lock_timeout", 0), times.get("statement_timeout", 0)
    deadlock = times.get("deadlock_timeout", 0)
    idle = times.get("idle_in_transaction_session_timeout", 0)
    if 0 < lock < deadlock:
        yield Finding(
            WARNING,
            "short_lock_timeout",
            f"lock_timeout is {_time(lock)}, shorter than deadlock_timeout ({_time(deadlock)}): a "
            "deadlock ends as a lock that was not available (55P03), which run_transaction does "
            "not try again",
            f"set lock_timeout above {_time(deadlock)}, and pass timeout= to the functions that "
            "lock for a shorter one",
        )
    if 0 < statement <= lock:
        yield Finding(
            WARNING,
            "useless_lock_timeout",
            f"statement_timeout ({_time(statement)}) ends each statement before lock_timeout "
            f"({_time(lock)}) does",
            "set lock_timeout below statement_timeout, so that the error says that a lock was the "
            "reason",
        )
    if 0 < idle < _SHORT_IDLE:
        yield Finding(
            WARNING,
            "short_idle_timeout",
            f"idle_in_transaction_session_timeout is {_time(idle)}: a unit of work that waits "
            "longer for something else loses its connection and its work",
            "set it to a minute or so, or wait outside of the transaction",
        )
    if times.get("idle_session_timeout", 0):
        yield Finding(
            WARNING,
            "idle_session_timeout",
            f"idle_session_timeout is {_time(times['idle_session_timeout'])}: it ends connections "
            "that wait in a pool, and the next user of each gets an error",
            "set it to 0 for the role of the application (ALTER ROLE ... SET idle_session_timeout "
            "= 0), or give create_async_engine a shorter pool_recycle and pool_pre_ping=True",
        )
    endless = [
        name
        for name in ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout")
        if times.get(name) == 0
    ]
    if endless:
        yield Finding(
            INFO,
            "no_time_limits",
            f"without a limit for this role: {', '.join(endless)}; a transaction that is forgotten "
            "keeps its locks, and statements wait for them without end",
            "set limits for the role of the application, such as ALTER ROLE ... SET "
            "idle_in_transaction_session_timeout = '1min'",
        )
    if settings.get("fsync") == "off":
        yield Finding(
            INFO,
            "no_fsync",
            "fsync is off: a crash of the machine can destroy the whole cluster",
            "leave it off for tests only",
        )


def of_connections(
    connections: Connections, settings: Mapping[str, str], pools: Pools | None, pooler: bool
) -> Iterator[Finding]:
    """Judge the connections that a server has, against the wanted ones."""
    most = int(settings["max_connections"])
    reserved = sum(
        int(settings.get(name, 0))
        for name in ("superuser_reserved_connections", "reserved_connections")
    )
    room = most - reserved
    explained = f"max_connections is {most:,}, of which {reserved:,} are reserved"
    if connections.used >= _BUSY * room:
        yield Finding(
            WARNING,
            "connections_in_use",
            f"{connections.used:,} of {room:,} connections are in use ({explained})",
            "make the pools smaller, put PgBouncer in front, or raise max_connections",
        )
    if pools is None:
        return
    if pooler:
        yield Finding(
            INFO,
            "pools_behind_pooler",
            "the pools connect to a pooler, which hides its limits",
            "compare them with max_client_conn and default_pool_size of the pooler",
        )
        return
    wanted = pools.size * pools.processes
    limit = room if connections.limit is None else min(room, connections.limit)
    if limit < room:
        explained = f"CONNECTION LIMIT of the role or the database is {limit:,}"
    if wanted > limit:
        processes = plural(pools.processes, "process", "processes")
        yield Finding(
            ERROR,
            "pools_too_large",
            f"{processes} with {plural(pools.size, 'connection')} each want {wanted:,}, and "
            f"{limit:,} are available ({explained})",
            f"let pool_size and max_overflow together be at most {limit // pools.processes:,}, put "
            "PgBouncer in front, or raise the limit; a RowWatcher and a wait for a lock take one "
            "more in each process",
        )


def of_pooler(pooler: Pooler | None, driver: str) -> Iterator[Finding]:
    """Judge the pooler in front of a server, by what an engine has to be given."""
    if pooler is None:
        return
    mode = f"a pooler in {pooler.mode} mode" if pooler.mode else "a pooler"
    if pooler.keeps_statements:
        yield Finding(
            INFO,
            "pooler",
            f"{mode} is in front of PostgreSQL, and keeps prepared statements",
            "give RowWatcher(notify=True) an engine that connects to PostgreSQL itself: a pooler "
            "passes no notification on, and settings of a session do not stay",
        )
        return
    lacking = "loses" if pooler.keeps_statements is False else "may lose"
    yield Finding(
        WARNING,
        "pooler",
        f"{mode} is in front of PostgreSQL, and {lacking} prepared statements: the next "
        "transaction may have another backend",
        f"pass {DRIVERS[driver].without_caches} to create_async_engine, or set "
        "max_prepared_statements in PgBouncer 1.21 or newer; give RowWatcher(notify=True) an "
        "engine that connects to PostgreSQL itself",
    )


def _time(milliseconds: int) -> str:
    """Return a time as PostgreSQL takes it."""
    return f"{milliseconds // 1000} s" if milliseconds % 1000 == 0 else f"{milliseconds} ms"
