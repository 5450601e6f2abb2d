"""What `doctor` says of a database: triggers, statistics, sequences, indexes, and its sessions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pgtoolset._commands._findings import ERROR, INFO, WARNING, Finding, listed, plural
from pgtoolset._postgres.checkup import IdleSession, InvalidIndex, TableSize
from pgtoolset._postgres.notifications import EVENTS, is_own_body, is_own_function
from pgtoolset._postgres.sequence_ends import SequenceEnd
from pgtoolset._postgres.trigger_state import Trigger, TriggerFunction
from pgtoolset._text import one_line
from pgtoolset.values import LockWait

__all__ = [
    "LONG_IDLE",
    "of_indexes",
    "of_sequences",
    "of_sessions",
    "of_sizes",
    "of_triggers",
    "of_waits",
    "watched_oids",
]

#: Seconds: the longest time to be idle in a transaction, and to wait for a lock.
LONG_IDLE = 60.0
LONG_WAIT = 5.0

#: The shares of the values of a sequence that are a warning, and an error.
NEAR_END = 0.8
AT_END = 0.95

#: Bytes of a table that needs no statistics: one page.
_SMALL = 8192

_QUERY_LENGTH = 80

_RUN_AGAIN = "run the DDL of row_change_trigger(Model) again, as the role that owns the table"


def of_triggers(
    triggers: Sequence[Trigger], functions: Sequence[TriggerFunction]
) -> Iterator[Finding]:
    """Judge what announces changes to `RowWatcher(notify=True)`."""
    for function in functions:
        yield from _of_function(function)
    tables: dict[int, list[Trigger]] = {}
    for trigger in triggers:
        tables.setdefault(trigger.table_oid, []).append(trigger)
        yield from _of_trigger(trigger)
    for each in tables.values():
        running = {trigger.name for trigger in each if trigger.is_enabled}
        lacking = [name for name in _names() if name not in running]
        if lacking:
            yield Finding(
                WARNING,
                "missing_triggers",
                f"{each[0].table} lacks {listed(lacking)}, or has it disabled: RowWatcher sees "
                "these changes at its interval only",
                _RUN_AGAIN,
            )


def _names() -> list[str]:
    return [f"pgtoolset_{event.lower()}" for event in EVENTS]


def _of_function(function: TriggerFunction) -> Iterator[Finding]:
    if not function.is_plain or not is_own_body(function.name, function.body):
        yield Finding(
            ERROR,
            "altered_trigger_function",
            f"{function.call}, which {function.owner} owns, is not as this version of pgtoolset "
            "creates it: it was altered, or another version has made it. It runs with the rights "
            "of each writer",
            f"read it (\\sf {function.call}), then {_RUN_AGAIN}",
        )
    if not function.calls:
        yield Finding(
            WARNING,
            "unused_trigger_function",
            f"no trigger executes {function.call}: the triggers are missing, perhaps because "
            "their table was created again",
            f"{_RUN_AGAIN}, or DROP FUNCTION {function.call} where the table is gone",
        )


def _of_trigger(trigger: Trigger) -> Iterator[Finding]:
    if not is_own_function(trigger.function):
        yield Finding(
            ERROR,
            "stolen_trigger",
            f"{trigger.name} of {trigger.table} executes {trigger.call}, and not a function of "
            "pgtoolset",
            f"drop the trigger, then {_RUN_AGAIN}",
        )
    elif not trigger.is_plain:
        yield Finding(
            ERROR,
            "altered_trigger",
            f"{trigger.name} of {trigger.table} does not run after each statement of its event",
            _RUN_AGAIN,
        )
    if not trigger.is_trusted:
        yield Finding(
            ERROR,
            "stolen_trigger_function",
            f"{trigger.call} belongs to {trigger.function_owner}, and {trigger.table} to "
            f"{trigger.table_owner}: {trigger.function_owner} may replace at any time what "
            f"{trigger.name} does with the rights of each writer",
            f"DROP FUNCTION {trigger.call} CASCADE, then {_RUN_AGAIN}",
        )


def watched_oids(triggers: Sequence[Trigger]) -> list[int]:
    """Return the tables that announce their changes, and so are watched."""
    return sorted({trigger.table_oid for trigger in triggers})


def of_sizes(sizes: Sequence[TableSize]) -> Iterator[Finding]:
    """Judge the statistics of tables that are watched."""
    for each in sizes:
        if not each.is_analyzed and each.size > _SMALL:
            yield Finding(
                WARNING,
                "no_statistics",
                f"{each.table} was never analyzed, and has {each.size // 1024:,} kB: the planner "
                "guesses its rows, and a tick of RowWatcher may read all of them",
                f"ANALYZE {each.table}",
            )


def of_sequences(sequences: Sequence[SequenceEnd]) -> Iterator[Finding]:
    """Judge how far sequences are from their ends."""
    for each in sequences:
        if each.value is None:
            continue
        used = (abs(each.value - each.first) + 1) / (abs(each.last - each.first) + 1)
        if used < NEAR_END:
            continue
        is_over = (each.value > each.last) is (each.last > each.first)
        left = 0 if is_over else abs(each.last - each.value)
        of_column = f", by the {each.type} column {each.column}" if each.column else ""
        grow = (
            "ALTER TABLE ... ALTER COLUMN ... TYPE bigint (it rewrites the table), and "
            if each.column and each.type != "bigint"
            else ""
        )
        yield Finding(
            ERROR if used >= AT_END else WARNING,
            "sequence_end",
            f"{each.name} has used {min(used, 1):.0%} of its values and has {left:,} left: it ends "
            f"at {each.last:,}{of_column}",
            f"{grow}ALTER SEQUENCE {each.name} AS bigint NO MAXVALUE, before the values run out",
        )
    unread = [each.name for each in sequences if not each.is_readable]
    if unread:
        yield not_checked(
            "how far sequences are from their ends",
            f"this role may not read {listed(unread)}",
            "GRANT SELECT ON the sequences to it, or run doctor as their owner",
        )


def of_indexes(indexes: Sequence[InvalidIndex]) -> Iterator[Finding]:
    """Judge indexes that serve no query."""
    for each in indexes:
        yield Finding(
            WARNING,
            "invalid_index",
            f"the index {each.index} of {each.table} is invalid: each write keeps it up to date, "
            "and no query uses it",
            f"REINDEX INDEX CONCURRENTLY {each.index}, or DROP INDEX CONCURRENTLY {each.index}",
        )


def of_sessions(idle: Sequence[IdleSession], hidden: int) -> Iterator[Finding]:
    """Judge sessions that keep a transaction open."""
    for each in idle:
        name = f"{each.application_name}, " if each.application_name else ""
        query = one_line(each.query, _QUERY_LENGTH)
        yield Finding(
            WARNING,
            "idle_in_transaction",
            f"pid {each.pid} ({name}{each.user}) has been idle in a transaction for "
            f"{each.seconds:.0f} s: it keeps its locks, and VACUUM keeps each row version that it "
            f"may see. Its last statement: {query}",
            "find the code that keeps it open, or end it: pgtoolset locks --terminate "
            f"{each.pid}; idle_in_transaction_session_timeout ends such sessions",
        )
    if hidden:
        yield not_checked(
            "what other roles' sessions do",
            f"this role may not see it of {plural(hidden, 'session')}",
            "GRANT pg_read_all_stats TO it (pg_monitor contains it), or run doctor as a role that "
            "has it",
        )


def of_waits(waits: Sequence[LockWait]) -> Iterator[Finding]:
    """Judge waits for locks."""
    for each in waits:
        if each.waiting_for is None or each.waiting_for.total_seconds() < LONG_WAIT:
            continue
        what = f"{each.mode or 'a lock'}{f' on {each.relation}' if each.relation else ''}"
        blockers = ", ".join(map(str, each.blocked_by)) or "a session that has just ended"
        yield Finding(
            WARNING,
            "lock_wait",
            f"pid {each.pid} has waited {each.waiting_for.total_seconds():.0f} s for {what}, "
            f"behind {blockers}",
            "pgtoolset locks shows the tree; pgtoolset locks --terminate PID ends the session at "
            "its root",
        )


def not_checked(what: str, reason: str, advice: str) -> Finding:
    """Return the note that something could not be looked at."""
    return Finding(INFO, "not_checked", f"not checked: {what}; {reason}", advice)
