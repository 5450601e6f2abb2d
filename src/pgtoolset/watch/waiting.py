"""wait_for_row_change: no connection while it sleeps, and a turn at one when it looks."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.util import greenlet_spawn

from pgtoolset._native import row_comparator
from pgtoolset.errors import RowDeletedError, RowNotFoundError, WaitTimeoutError
from pgtoolset.types import ColumnAttribute, Duration
from pgtoolset.watch._loading import place, seen_by, values_of
from pgtoolset.watch._looks import Look, Patience, is_lost, look_over
from pgtoolset.watch._turns import GRACE, in_line
from pgtoolset.watch.targets import (
    Target,
    check_predicate,
    check_seconds,
    check_session,
    parse_key,
    raw_key,
    resolve_target,
)

__all__ = ["wait_for_row_change"]

M = TypeVar("M")

#: Seconds: the first and the longest pause after a look that failed; the interval where that is
#: shorter.
RETRY_FIRST = 0.02
RETRY = 0.5


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

    It looks at the row over a connection of the session's engine in AUTOCOMMIT, and gives it back
    after each look: so it sees what is committed whatever the isolation level of the session, and
    holds nothing while it sleeps. What the session has flushed and not committed is no change to
    it. On a session that is bound to a single connection it looks over that one, as part of the
    transaction that is open there, if any.

    The session's transaction is left alone, and so are its pending changes: an attribute with
    unflushed changes keeps them. A lost connection is replaced until the timeout, and a pool that
    has none left is waited for; SQLAlchemy's `TimeoutError` comes, after the pool's own timeout,
    only where the session itself holds one of its connections.

    The waiters of an engine look in turn, over half of its pool at most, and those who wait for
    rows of one model look together: a crowd sees changes late, and misses none for want of a
    connection.

    Args:
        session: an `AsyncSession`.
        model: a mapped class.
        pk_value: the primary key: a scalar, or a tuple or mapping for a composite one.
        columns: attributes or names of mapped columns; `None` watches all of them.
        interval: seconds between two looks: up to a tenth less where others look then, more where
            too many do.
        timeout: seconds; `None` waits for ever. The last look is at the deadline, or when its turn
            comes after that; where nobody's turn comes for a second, it is given up.
        until: a function of the row, a detached instance; the wait ends when it returns true, at
            once if it already does. It decides alone then, whatever `columns` and `baseline` say.
        baseline: what the caller has seen, an instance or a mapping of attribute names to values; a
            change since then is returned at once. Of an instance its loaded values count, and not
            its unflushed changes.

    Raises:
        RowNotFoundError: there is no such row.
        RowDeletedError: the row has vanished; a `RowNotFoundError` too.
        WaitTimeoutError: it has not changed in time.
        TypeError, ValueError: an argument is not what it must be; before any SQL.

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
    check_session(session)
    target = resolve_target(model, columns)
    parts = parse_key(target, pk_value)
    pause = check_seconds("interval", interval)
    seconds = None if timeout is None else check_seconds("timeout", timeout, zero=True)
    check_predicate(until)
    bind = session.sync_session.get_bind(target.mapper)
    raw_key(target, parts, bind.dialect)
    wait = _Wait(
        target,
        pk_value,
        pause,
        seconds,
        until,
        None if baseline is None else seen_by(target, baseline),
    )
    found = await wait.run(
        Look(target, parts, session.sync_session, bind, private=until is not None)
    )
    return await greenlet_spawn(place, session.sync_session, target, found)


class _Wait:
    """One wait: when to look, and whether what was found ends it."""

    def __init__(
        self,
        target: Target[Any],
        pk_value: Any,
        interval: float,
        timeout: float | None,
        until: Callable[[Any], bool] | None,
        baseline: dict[str, Any] | None,
    ) -> None:
        self._target = target
        self._what = f"{target} {pk_value!r}"
        self._interval = interval
        self._timeout = timeout
        self._until = until
        self._was_there = baseline is not None
        self._baseline = dict(baseline or {})

    async def run(self, spot: Look) -> Any:
        if isinstance(spot.bind, Connection):
            return await self._until_over(
                spot, partial(self._look_over, spot.bind), lambda then: then + self._interval
            )
        with in_line(spot) as line:
            return await self._until_over(
                spot, line.look, lambda then: line.next_moment(then, self._interval)
            )

    async def _until_over(
        self,
        spot: Look,
        look: Callable[[Look, float], Awaitable[Any]],
        after: Callable[[float], float],
    ) -> Any:
        loop = asyncio.get_running_loop()
        deadline = math.inf if self._timeout is None else loop.time() + self._timeout
        next_look = loop.time()
        trouble: Exception | None = None
        retry = RETRY_FIRST
        while True:
            last = loop.time() >= deadline
            try:
                row = await look(spot, deadline)
            except Exception as error:
                if not _may_pass(spot, error):
                    raise
                trouble = error
                next_look = loop.time() + min(self._interval, retry)
                retry = min(2 * retry, RETRY)
            else:
                trouble, retry = None, RETRY_FIRST
                if self._is_over(row):
                    return row
                last = last or spot.at >= deadline
                next_look = max(after(next_look), loop.time())
            # A last look that failed is none, as long as there is time for another.
            if (last and trouble is None) or loop.time() >= deadline + GRACE:
                why = (
                    ""
                    if trouble is None
                    else f" There was no connection: {type(trouble).__name__}: {trouble}"
                )
                raise WaitTimeoutError(
                    f"{self._what} did not change within {self._timeout} s.{why}"
                ) from trouble
            await asyncio.sleep(
                max(0, (next_look if last else min(next_look, deadline)) - loop.time())
            )

    async def _look_over(self, connection: Connection, spot: Look, deadline: float) -> Any:
        patience = Patience(max(asyncio.get_running_loop().time(), deadline) + GRACE, 0.0)
        return await patience.spawn(look_over, spot, connection, patience.asking)

    def _is_over(self, row: Any) -> bool:
        """Whether this is what is waited for; what it differs from is noted at the first look."""
        if row is None:
            if self._was_there:
                raise RowDeletedError(f"{self._what} has been deleted while it was waited for.")
            raise RowNotFoundError(
                f"There is no {self._target} with this primary key: {self._what}."
            )
        self._was_there = True
        if self._until is not None:
            return bool(self._until(row))
        changed = False
        for name, value in values_of(self._target, row).items():
            if name not in self._baseline:
                self._baseline[name] = value
            elif not row_comparator.same_value(self._baseline[name], value):
                changed = True
        return changed


def _may_pass(spot: Look, error: Exception) -> bool:
    """Whether another look may succeed."""
    if isinstance(spot.bind, Connection):
        return False  # it cannot be replaced: its transaction is lost with it
    if isinstance(error, PoolTimeoutError):
        return not spot.is_in_its_own_way()
    return is_lost(error)
