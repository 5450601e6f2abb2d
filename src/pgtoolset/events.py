"""The events that an observer of an engine receives.

Each is a frozen dataclass with plain values: no SQL, no parameter and no object of the library. All
lengths of time are seconds of the monotonic clock, and each event says from when to when.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

__all__ = [
    "CommitResolved",
    "Event",
    "LockKind",
    "LockWaited",
    "Observer",
    "PoolOutcome",
    "PoolWaited",
    "Resolved",
    "Retried",
    "TransactionEnded",
    "TransactionOutcome",
    "WatcherLooked",
]

#: How a transaction has ended; see `TransactionEnded`.
TransactionOutcome: TypeAlias = Literal["committed", "rolled_back", "aborted", "lost", "unknown"]

#: How the wait for a connection has ended; see `PoolWaited`.
PoolOutcome: TypeAlias = Literal["acquired", "timed_out", "deadline", "cancelled", "failed"]

#: Which function has waited for a lock: `lock_tables`, `lock_rows` or `advisory_lock`.
LockKind: TypeAlias = Literal["tables", "rows", "advisory"]

#: What PostgreSQL has said of a COMMIT whose answer was lost; see `CommitResolved`.
Resolved: TypeAlias = Literal["stored", "lost", "unknown"]


@dataclass(frozen=True, slots=True)
class TransactionEnded:
    """A transaction has ended: that of a unit of work or of a block, or one that a `commit()` or
    `rollback()` inside of it has ended.

    One event for each transaction of PostgreSQL. A session that executes no statement has no
    transaction there, a savepoint is a part of one, and sessions that are joined to one connection
    share one.

    Attributes:
        outcome: `"committed"`: it is stored. `"rolled_back"`: it was rolled back, or PostgreSQL has
            refused the commit with an error. `"aborted"`: it was to be committed, but an error that
            its block had swallowed had aborted it, and nothing is stored. `"lost"`: its connection
            was lost, or closed because of a cancellation, and nothing is stored. `"unknown"`: the
            answer to its COMMIT was lost.
        seconds: from its first statement to the answer that ended it; where the answer to the
            COMMIT was lost and `resolve_commit` asks for the outcome, to the end of that.
        sqlstate: of the error that aborted it or that refused the commit; `None` where PostgreSQL
            has reported none.
        isolation_level: as an option of the engine, the session or the block has set it, such as
            `"SERIALIZABLE"`; `None` where that is the server's default, or a statement has set it.
        read_only: whether such an option has made it READ ONLY.
    """

    outcome: TransactionOutcome
    seconds: float
    sqlstate: str | None = None
    isolation_level: str | None = None
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class PoolWaited:
    """A connection was asked of the pool: one event for each, also where one was free at once.

    Attributes:
        outcome: `"acquired"`; `"timed_out"`: the pool was exhausted until its timeout;
            `"deadline"`: a `deadline` was over before; `"cancelled"`: the task was; `"failed"`: no
            connection could be made.
        seconds: from the request to its end. It includes the wait for a turn, the test of
            `pool_pre_ping`, and the time to connect where the pool has made a connection.
    """

    outcome: PoolOutcome
    seconds: float


@dataclass(frozen=True, slots=True)
class LockWaited:
    """`lock_tables`, `lock_rows` or `advisory_lock` has asked for its locks: one event for each
    call, also where they were free.

    Attributes:
        kind: the function: `"tables"`, `"rows"` or `"advisory"`.
        names: the qualified names of the tables; of `lock_rows` that of the model's table, of
            `advisory_lock` its key.
        mode: the lock mode.
        acquired: whether the locks were acquired; `False` after a timeout, with `nowait`, and after
            any other error.
        seconds: from the statement that asks for them to its answer; of `lock_rows` until its rows
            are loaded.
    """

    kind: LockKind
    names: tuple[str, ...]
    mode: str
    acquired: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Retried:
    """An attempt of `run_transaction` has failed, and there will be another one after a pause.

    Attributes:
        number: of the attempt that has failed, from 1.
        error: the class of its error, without its text.
        sqlstate: the first SQLSTATE that the error, or one of its causes, has.
        pause: seconds until the next attempt.
    """

    number: int
    error: str
    sqlstate: str | None
    pause: float


@dataclass(frozen=True, slots=True)
class CommitResolved:
    """PostgreSQL was asked what became of a COMMIT whose answer was lost (`resolve_commit`).

    The `TransactionEnded` of that transaction follows.

    Attributes:
        outcome: `"stored"`, `"lost"` (certainly not stored), or `"unknown"`.
        seconds: from the first question to the end of the search.
    """

    outcome: Resolved
    seconds: float


@dataclass(frozen=True, slots=True)
class WatcherLooked:
    """A `RowWatcher` has looked at its rows, or has failed to.

    One event for each look at rows, which is each tick and each notification, and for each attempt
    to connect that has failed.

    Attributes:
        seconds: from the begin of the look until the last waiter has received its change.
        waiters: waiters and streams that the watcher served as the look began.
        groups: statements of the look: one for each model and set of columns that was due.
        late: seconds by which it has begun after its time: the event loop was busy, or the look
            before it took longer than the interval. 0 for a look that a notification has caused.
        lag: seconds from the begin of the last look at all rows that has succeeded to the end of
            this one; before the first of them, from the first waiter on. The rows that the waiters
            had seen were no older.
        failed: whether a statement of the look has failed, or the connection is lost.
    """

    seconds: float
    waiters: int
    groups: int
    late: float
    lag: float
    failed: bool


#: What an observer receives.
Event: TypeAlias = (
    TransactionEnded | PoolWaited | LockWaited | Retried | CommitResolved | WatcherLooked
)


class Observer(Protocol):
    """Receives the events of an engine, one at a time. See `pgtoolset.observe.subscribe`.

    A plain function of one parameter is one. It is called in the event loop, in the task that the
    event is about, which goes on only after it: it must not block. Its errors are logged.
    """

    def __call__(self, event: Event, /) -> object:
        """Take note of an event. The result is ignored."""
        ...
