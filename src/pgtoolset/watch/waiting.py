"""`wait_for_row_change`: polls a row over the pool, and holds no connection between two polls."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from pgtoolset._arguments import (
    check_predicate,
    optional_seconds,
    parse_key,
    seconds,
    shown,
    sync_session,
)
from pgtoolset._cancellation import Requests
from pgtoolset._deadlines import bounded, suspended
from pgtoolset.errors import DeadlineExceededError, WaitTimeoutError
from pgtoolset.types import ColumnAttribute, Duration
from pgtoolset.watch._batches import LAST_POLL_TIMEOUT
from pgtoolset.watch._loading import place, seen_by
from pgtoolset.watch._own import OwnRow
from pgtoolset.watch._polls import PollTimeout, RowQuery, is_lost, is_outdated, poll_on_connection
from pgtoolset.watch._queues import joined_queue
from pgtoolset.watch.conditions import Condition
from pgtoolset.watch.targets import resolve_target

__all__ = ["wait_for_row_change"]

M = TypeVar("M")

#: Seconds: the first and the longest pause after a poll that failed, where the interval is not
#: shorter.
FIRST_RETRY = 0.02
LONGEST_RETRY = 0.5

#: Polls in a row that may fail because of DDL: a cache is older than the table, or a table
#: that is complete again a moment later.
MOST_SCHEMA_FAILURES = 3


async def wait_for_row_change(
    session: AsyncSession,
    model: type[M],
    pk_value: Any,
    *,
    columns: Iterable[ColumnAttribute] | None = None,
    interval: Duration = 0.5,
    timeout: Duration | None = None,
    until: Callable[[M], bool] | None = None,
    baseline: M | Mapping[str, Any] | None = None,
) -> M:
    """Wait until a row has changed, and return it as an instance in `session` with its new values.

    Each poll takes a connection of the session's engine in AUTOCOMMIT, and returns it to the pool.
    So it sees committed rows, whatever the isolation level of the session, and a sleeping waiter
    holds no connection. What the session has flushed and not committed is not a change. A session
    that is bound to a single connection uses it for polls, within the transaction that is open
    there, if any.

    The session's transaction and its pending changes stay as they are: an attribute with unflushed
    changes keeps them, and so does a row that the transaction has written. The execution options of
    the session, its connection and its engine hold for polls, and so do its routing and its
    `settings`. A setting that a statement of yours has set is unknown here. A lost
    connection is replaced until the timeout. Where the pool has no free
    connection, the poll waits for one; SQLAlchemy's `TimeoutError` is raised, after the pool's own
    timeout, only where the session itself holds one of its connections.

    The waiters of an engine take turns, over at most half of its pool, and waiters for rows of one
    model share statements. With very many waiters polls are late, and none is left out.

    Args:
        session: an `AsyncSession`.
        model: a mapped class.
        pk_value: the primary key: a scalar, or a tuple or mapping for a composite one.
        columns: attributes or names of mapped columns; `None` watches all of them.
        interval: the time between two polls (seconds, a `timedelta` or a string such as "500ms").
            It is up to a tenth shorter where that lets waiters share a statement, and longer where
            there are too many of them.
        timeout: the longest time to wait, in the same forms; `None` sets no limit, and 0 polls
            once. The last poll is at the deadline, or when the waiter's turn comes after that. It
            is given up where no waiter is served for a second.
        until: a function of the row, a detached instance. The wait ends when it returns true, at
            once if it already does, whatever `columns` and `baseline` say.
        baseline: what the caller has seen, an instance of `model` or a mapping of attribute names
            to values. A change since then is returned at once. Of an instance the loaded values
            count, without unflushed changes.

    Returns:
        The session's instance of the row.

    Raises:
        RowNotFoundError: there is no such row, or row-level security may hide it.
        RowDeletedError: the row was deleted, perhaps by the session's own transaction; a
            `RowNotFoundError` too.
        WaitTimeoutError: the row did not change in time.
        DeadlineExceededError: the same, where a `deadline` is earlier than the timeout.
        TypeError, ValueError: an argument is wrong; before any SQL. A `TypeError` too where
            `until` returns an awaitable.

    Example:
        >>> account = await session.get(Account, 1)
        >>> try:
        ...     account = await wait_for_row_change(
        ...         session, Account, 1, baseline=account, interval=0.05, timeout=0.1
        ...     )
        ... except WaitTimeoutError:
        ...     pass

    See https://www.postgresql.org/docs/current/transaction-iso.html and
    https://docs.sqlalchemy.org/en/20/orm/session_state_management.html
    """
    sync = sync_session(session)
    target = resolve_target(model, columns)
    key = parse_key("pk_value", target.mapper, pk_value)
    pause = seconds("interval", interval)
    limit = optional_seconds("timeout", timeout, zero=True)
    check_predicate("until", until)
    seen = None if baseline is None else seen_by(target, baseline)
    row = f"{target} {shown(key[0] if len(key) == 1 else key)}"
    query = RowQuery(target, key, sync, Condition(target, row, until, seen))
    limit, deadline = bounded(limit)
    try:
        # Waiters poll for one another, and no deadline but their own shall cut that.
        with suspended():
            found = await _Wait(query, row, pause, limit).run(sync)
    except (WaitTimeoutError, DeadlineExceededError) as error:
        if deadline is None:
            raise
        raise deadline.exceeded("wait", f"{row} did not change in time") from error
    placed: M = await greenlet_spawn(place, sync, target, found)
    return placed


class _Wait:
    """The polls of one call, until its condition is met."""

    def __init__(
        self,
        query: RowQuery,
        row: str,
        interval: float,
        timeout: float | None,
    ) -> None:
        self._query = query
        self._row = row
        self._interval = interval
        self._timeout = timeout
        self._schema_failures = 0
        self._loop = asyncio.get_running_loop()
        self._deadline = math.inf if timeout is None else self._loop.time() + timeout

    async def run(self, session: Session) -> Any:
        """Return the row that meets the condition as it is for the session: a detached instance."""
        if isinstance(self._query.bind, Connection):
            return await self._poll_until_met(
                self._poll_on_connection, lambda last: last + self._interval
            )
        with joined_queue(self._query) as queue:

            def poll() -> Awaitable[Any]:
                return queue.poll(self._query, self._deadline)

            found = await self._poll_until_met(
                poll, lambda last: queue.next_poll_at(last, self._interval)
            )
            return await OwnRow(session, self._query).instead_of(found, poll)

    async def _poll_until_met(
        self, poll: Callable[[], Awaitable[Any]], next_poll_at: Callable[[float], float]
    ) -> Any:
        poll_at = self._loop.time()
        retry = FIRST_RETRY
        requests = Requests()
        while True:
            is_last = self._loop.time() >= self._deadline
            problem: Exception | None = None
            try:
                row = await poll()
            except Exception as error:
                if not self._may_pass(error):
                    raise
                problem = error
                pause = LONGEST_RETRY if self._schema_failures > 1 else retry
                poll_at = self._loop.time() + min(self._interval, pause)
                retry = min(2 * retry, LONGEST_RETRY)
            else:
                retry = FIRST_RETRY
                self._schema_failures = 0
                if self._query.condition.is_met(row):
                    return row
                # A poll that waited for its turn may have been sent after the deadline.
                is_last = is_last or self._query.sent_at >= self._deadline
                poll_at = max(next_poll_at(poll_at), self._loop.time())
            self._raise_if_over(is_last, problem)
            wake_at = poll_at if is_last else min(poll_at, self._deadline)
            await asyncio.sleep(max(0, wake_at - self._loop.time()))
            requests.raise_swallowed()

    def _raise_if_over(self, was_last: bool, problem: Exception | None) -> None:
        # A last poll that failed is repeated while there is time for it.
        is_over = was_last and problem is None
        if not is_over and self._loop.time() < self._deadline + LAST_POLL_TIMEOUT:
            return
        message = f"{self._row} did not change within {self._timeout} s."
        if problem is not None:
            message += f" There was no connection: {type(problem).__name__}: {problem}"
        raise WaitTimeoutError(message) from problem

    async def _poll_on_connection(self) -> Any:
        now = self._loop.time()
        timeout = PollTimeout(max(now, self._deadline) + LAST_POLL_TIMEOUT, pool_timeout=0.0)
        return await timeout.run(poll_on_connection, self._query, self._query.bind, timeout.sending)

    def _may_pass(self, error: Exception) -> bool:
        """Return whether another poll may succeed."""
        bind = self._query.bind
        if is_outdated(error) and not (isinstance(bind, Connection) and bind.in_transaction()):
            self._schema_failures += 1
            return self._schema_failures < MOST_SCHEMA_FAILURES
        if isinstance(bind, Connection):
            return False  # it cannot be replaced: its transaction is lost with it
        if isinstance(error, PoolTimeoutError):
            return not self._query.holds_pool_connection()
        return is_lost(error)
