"""The wait for a connection of a pool, which a deadline bounds: for its turn, and for the server.

The pool's own timeout counts the wait for a turn alone. A server that does not answer as it is
connected to, or as the pool tests a connection, has others wait as long.
https://docs.sqlalchemy.org/en/20/core/pooling.html
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from math import inf
from time import monotonic
from typing import TypeAlias

from sqlalchemy import Pool, PoolProxiedConnection, QueuePool
from sqlalchemy.exc import TimeoutError as PoolTimeout

from pgtoolset._deadlines import begun_deadline, current
from pgtoolset._observers import Observers
from pgtoolset.errors import DeadlineExceededError
from pgtoolset.events import PoolOutcome, PoolWaited

#: In the attributes of a pool of `pool_apart`.
_APART = "pgtoolset.apart"

#: Returns the error that names the holders of an exhausted pool.
Account: TypeAlias = Callable[[float, TimeoutError], Exception]


def in_time(
    pool: Pool, account: Account, observers: Observers
) -> Callable[[], PoolProxiedConnection]:
    """Return `Pool.connect` that ends at a deadline, and reports each wait to observers.

    Args:
        pool: the pool.
        account: called with the seconds of a wait that has ended, where the pool was exhausted.
        observers: of the engine.
    """
    connect = pool.connect

    def connect_in_time(is_told: bool = False) -> PoolProxiedConnection:
        if observers and not is_told and _APART not in vars(pool):
            return _told(observers, partial(connect_in_time, True))
        deadline = None if begun_deadline() is None else current()
        if deadline is None:
            return connect()
        began_at = monotonic()
        left = deadline.end - began_at
        if left <= 0:
            raise deadline.exceeded("statement", "no connection was asked for")
        try:
            return _within(left, connect)
        except _Over as over:
            cause: BaseException = over
            if isinstance(pool, QueuePool) and pool.checkedout() >= _size(pool):
                cause = account(monotonic() - began_at, over)
            raise deadline.exceeded("pool", _reason(cause)) from cause

    return connect_in_time


def pool_apart(pool: Pool) -> Pool:
    """Return an empty pool that connects as a pool does, for connections outside of it.

    No user of the engine waits for these, so its observers are not told of them.
    """
    apart = pool.recreate()
    vars(apart)[_APART] = True
    return apart


def _told(
    observers: Observers, connect: Callable[[], PoolProxiedConnection]
) -> PoolProxiedConnection:
    began_at = monotonic()
    try:
        connection = connect()
    except BaseException as error:
        observers.tell(PoolWaited(_outcome_of(error), monotonic() - began_at))
        raise
    observers.tell(PoolWaited("acquired", monotonic() - began_at))
    return connection


def _outcome_of(error: BaseException) -> PoolOutcome:
    if isinstance(error, DeadlineExceededError):
        return "deadline"
    if isinstance(error, PoolTimeout):
        return "timed_out"
    return "cancelled" if isinstance(error, asyncio.CancelledError) else "failed"


class _Over(TimeoutError):
    """The time for a connection is over."""


def _within(seconds: float, connect: Callable[[], PoolProxiedConnection]) -> PoolProxiedConnection:
    """Take a connection. Runs in SQLAlchemy's greenlet, and so in the task of the caller.

    It is `asyncio.timeout` without its coroutines, which cost more than a connection that waits in
    the pool.
    """
    task = asyncio.current_task()
    assert task is not None
    before = task.cancelling()
    is_over = False

    def end() -> None:
        nonlocal is_over
        is_over = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, end)
    try:
        return connect()
    except asyncio.CancelledError as error:
        if is_over and task.cancelling() - 1 <= before:
            raise _Over("the server has not answered in time") from error
        raise
    finally:
        timer.cancel()
        if is_over:
            task.uncancel()  # it is no request of the caller


def _size(pool: QueuePool) -> float:
    """Return how many connections a pool gives out at most."""
    most: int = getattr(pool, "_max_overflow", -1)
    return inf if most < 0 else pool.size() + most


def _reason(cause: BaseException) -> str:
    if isinstance(cause, _Over):
        return "the server has not answered a new connection"
    return str(cause)
