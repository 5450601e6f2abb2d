"""Who holds the connections of a pool: noted as each is taken, forgotten as each returns.

A pool that is exhausted says so with their names. An event of the pool would put every checkout on
SQLAlchemy's slow path; the pool's own methods are called at the same moments.
https://docs.sqlalchemy.org/en/20/core/pooling.html
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Callable
from contextvars import Context
from functools import partial
from time import monotonic
from typing import Any

from sqlalchemy import Pool, PoolProxiedConnection, QueuePool
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry

from pgtoolset._observers import OPEN, Observers, OpenTransaction, observers_of
from pgtoolset._postgres.callers import Caller, caller, line_of
from pgtoolset._postgres.checkouts import in_time
from pgtoolset._postgres.drivers import driver_of
from pgtoolset._text import one_line
from pgtoolset.errors import PoolTimeoutError
from pgtoolset.values import CodeLocation, ConnectionHolder

#: In the attributes of a pool: its `Holders`.
_KEY = "pgtoolset.holders"

#: In the `record_info` of a connection that is out: its `Held`. So it lives as long.
_HELD = "pgtoolset.held"

#: The longest part of a statement that is shown, in characters.
_LONGEST_STATEMENT = 200

#: Of each of SQLAlchemy's pools.
_METHODS = ("_do_get", "_do_return_conn", "_create_connection", "recreate")

logger = logging.getLogger("pgtoolset")


class Held:
    """A connection that is out of its pool.

    Attributes:
        task: the name of the task that took it.
        caller: the place that took it.
        since: when it was taken.
        statement: the last statement on it.
        idle_since: when that has ended, or the connection was taken.
        is_reported: whether the log says already that its transaction is idle.
    """

    __slots__ = (
        "_shown",
        "caller",
        "idle_since",
        "is_reported",
        "since",
        "statement",
        "task",
    )

    def __init__(self, found: Caller | None) -> None:
        self.caller = found
        try:
            task = asyncio.current_task()
        except RuntimeError:  # outside of an event loop
            task = None
        self.task = None if task is None else task.get_name()
        self.since = monotonic()
        self.statement: str | None = None
        self.idle_since = self.since
        self.is_reported = False
        self._shown: tuple[str, str] | None = None

    def describe(self, now: float) -> ConnectionHolder:
        """Return what is known of it, in the words of messages."""
        where = None
        if self.caller is not None:
            code, _ = self.caller
            where = CodeLocation(code.co_filename, line_of(self.caller), code.co_name)
        return ConnectionHolder(self.task, now - self.since, where, self._shown_statement())

    def _shown_statement(self) -> str | None:
        statement = self.statement
        if statement is None:
            return None
        # Of an exhausted pool each waiter reports it.
        if self._shown is None or self._shown[0] is not statement:
            self._shown = statement, one_line(statement, _LONGEST_STATEMENT)
        return self._shown[1]


class IdleLimit:
    """The longest time that a transaction may be idle without a line in the log.

    The pools that an engine has one after the other share it.

    Attributes:
        after: seconds; `None` while nothing is reported.
    """

    __slots__ = ("__weakref__", "_calls", "after")

    def __init__(self) -> None:
        self.after: float | None = None
        self._calls = 0

    def set(self, after: float) -> Callable[[], None]:
        """Set the limit; return a function that removes it again, unless a later call has set it.

        The function does not keep the limit alive.
        """
        self.after = after
        self._calls += 1
        return partial(_remove, weakref.ref(self), self._calls)

    def remove(self, call: int) -> None:
        """Remove what a call has set."""
        if call == self._calls:
            self.after = None


def _remove(reference: weakref.ref[IdleLimit], call: int) -> None:
    limit = reference()
    if limit is not None:
        limit.remove(call)


class Holders:
    """The connections of one pool that are out.

    Attributes:
        limit: the limit of idle transactions.
    """

    __slots__ = ("__weakref__", "_held", "_timer", "held", "limit")

    def __init__(self, limit: IdleLimit) -> None:
        self.limit = limit
        #: By the pool's entry, or by itself while the entry is being made.
        self._held: dict[ConnectionPoolEntry | Held, Held] = {}
        #: Returns what was noted of a connection.
        self.held = self._held.get
        self._timer: _Timer | None = None

    def list(self) -> list[ConnectionHolder]:
        """Return the holders, the longest first."""
        now = monotonic()
        held = sorted(self._held.copy().values(), key=lambda each: each.since)
        return [each.describe(now) for each in held]

    def take(self, entry: ConnectionPoolEntry) -> None:
        """Note who takes a connection."""
        held = self._held[entry] = Held(caller())
        info = entry.record_info
        if info is not None:
            info[_HELD] = held
        if self.limit.after is not None:
            self.watch()

    def open(self) -> Held:
        """Note who opens a connection: it has its place in the pool already."""
        held = Held(caller())
        self._held[held] = held
        return held

    def opened(self, held: Held) -> None:
        """Forget who has opened a connection."""
        del self._held[held]

    def give_back(self, entry: ConnectionPoolEntry, held: Held) -> None:
        """Forget a connection, unless another thread has taken it already."""
        if self._held.get(entry) is held:
            del self._held[entry]
            if entry.record_info is not None:
                entry.record_info.pop(_HELD, None)

    def timed_out(self, pool: Pool, seconds: float, error: Exception) -> PoolTimeoutError:
        """Return the error of a caller that has waited for a connection in vain."""
        holders = self.list()
        if not isinstance(pool, QueuePool):
            return PoolTimeoutError(str(error.args[0]), holders=holders)
        parts = [_exhausted(pool, seconds)]
        unknown = pool.checkedout() - len(holders)
        if unknown > 0:
            parts.append(f"{unknown} of them since before pgtoolset has seen the engine")
        if holders:
            parts.append(f"the longest is held by {holders[0]}")
        advice = (
            "End each transaction before you wait for something else than the database, or let "
            "the pool have more connections (pool_size, max_overflow)."
        )
        return PoolTimeoutError(f"{'; '.join(parts)}. {advice}", holders=holders)

    def watch(self) -> None:
        """Begin to look for idle transactions, while connections are out."""
        after = self.limit.after
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        if after is not None and self._held and not (self._timer and self._timer.runs_in(loop)):
            self._timer = _Timer(self, loop, after)

    def limit_idle(self, after: float) -> Callable[[], None]:
        """Report transactions that are idle for some seconds; return a function that ends that."""
        stop = self.limit.set(after)
        self._timer = None  # it may be due too late
        self.watch()
        return stop

    def look(self, timer: _Timer, loop: asyncio.AbstractEventLoop) -> None:
        """Report each transaction that has been idle for too long, and look again in time."""
        if self._timer is not timer:
            return
        self._timer = None
        after = self.limit.after
        if after is None or not self._held:
            return
        now, next_look = monotonic(), after
        for entry, held in self._held.copy().items():
            if held.is_reported or isinstance(entry, Held):
                continue
            rest = held.idle_since + after - now
            if rest > 0:
                next_look = min(next_look, rest)
            elif _is_idle_in_transaction(entry):
                held.is_reported = True
                logger.warning(
                    "a transaction has been idle for %.1f s: %s",
                    now - held.idle_since,
                    held.describe(now),
                )
        self._timer = _Timer(self, loop, next_look)


class _Timer:
    """Has a pool looked at once; it keeps neither the pool nor the event loop alive."""

    __slots__ = ("_holders", "_loop")

    def __init__(self, holders: Holders, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._holders = weakref.ref(holders)
        self._loop = weakref.ref(loop)
        # An empty context: that of a request would be kept until then.
        loop.call_later(seconds, self._look, context=Context())

    def runs_in(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether it is in an event loop that runs, and not in one that has ended."""
        return self._loop() is loop

    def _look(self) -> None:
        holders, loop = self._holders(), self._loop()
        if holders is not None and loop is not None:
            holders.look(self, loop)


def _exhausted(pool: QueuePool, seconds: float) -> str:
    return (
        f"no connection of the pool became free in {seconds:.1f} s: {pool.checkedout()} in use "
        f"(pool_size {pool.size()}, overflow {pool.overflow()})"
    )


def holders_of(pool: Pool) -> Holders | None:
    """Return the holders of a pool, noted from the first call on.

    `None` for a pool that does not have the methods of SQLAlchemy's pools.
    """
    found: Holders | None = vars(pool).get(_KEY)
    return _observe(pool, IdleLimit()) if found is None else found


def see_pool(pool: Pool) -> None:
    """Note the holders of a pool from now on. Only the first call does work."""
    if _KEY not in vars(pool):
        _observe(pool, IdleLimit())


def see_pool_of(connection: PoolProxiedConnection, pool: Pool) -> None:
    """As `see_pool`, by a connection that was just taken: its holder is noted, too."""
    if _KEY in vars(pool):
        return
    holders = _observe(pool, IdleLimit())
    entry = getattr(connection, "_connection_record", None)
    if holders is not None and entry is not None:
        holders.take(entry)


def _observe(pool: Pool, limit: IdleLimit) -> Holders | None:
    if not all(hasattr(pool, name) for name in _METHODS):
        return None
    get, give_back = pool._do_get, pool._do_return_conn
    create, recreate = pool._create_connection, pool.recreate
    holders = Holders(limit)
    observers = observers_of(pool._dialect)

    def do_get() -> ConnectionPoolEntry:
        began_at = monotonic()
        try:
            entry = get()
        except PoolTimeoutError:
            raise
        except PoolTimeout as error:
            raise holders.timed_out(pool, monotonic() - began_at, error) from error
        try:
            holders.take(entry)
        except BaseException:
            give_back(entry)
            raise
        return entry

    def create_connection() -> ConnectionPoolEntry:
        held = holders.open()
        try:
            return create()
        finally:
            holders.opened(held)

    def recreate_observed() -> Pool:
        recreated = recreate()
        _observe(recreated, limit)
        return recreated

    methods: dict[str, Any] = vars(pool)
    methods["_do_get"] = do_get
    methods["connect"] = in_time(pool, partial(holders.timed_out, pool), observers)
    methods["_do_return_conn"] = _returning(give_back, holders, observers)
    methods["_create_connection"] = create_connection
    methods["recreate"] = recreate_observed
    methods[_KEY] = holders
    return holders


def _returning(
    give_back: Callable[[ConnectionPoolEntry], None], holders: Holders, observers: Observers
) -> Callable[[ConnectionPoolEntry], None]:
    """Return `Pool._do_return_conn` that forgets the holder, and the transaction."""

    def do_return_conn(entry: ConnectionPoolEntry) -> None:
        held = holders.held(entry)
        try:
            give_back(entry)
        finally:
            if held is not None:
                holders.give_back(entry, held)
            if observers:
                _lose_transaction(entry)

    return do_return_conn


def _lose_transaction(entry: ConnectionPoolEntry) -> None:
    """Tell of a transaction that is still open, although its connection is not out any more."""
    info = entry.record_info
    opened: OpenTransaction | None = None if info is None else info.pop(OPEN, None)
    if opened is not None:
        opened.lose()


def held_on(connection: PoolProxiedConnection) -> Held | None:
    """Return what was noted of a connection that is out of its pool."""
    info = connection.record_info
    return None if info is None else info.get(_HELD)


def _is_idle_in_transaction(entry: ConnectionPoolEntry) -> bool:
    raw = entry.driver_connection
    if raw is None:
        return False
    driver = driver_of(raw)
    if driver.is_closed(raw) or not driver.is_in_transaction(raw):
        return False
    connection: Any = entry  # which has what the driver looks at, as each connection of a pool
    return not driver.is_running(connection)
