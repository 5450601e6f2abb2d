"""The wait for a connection of a pool, which a deadline bounds: for its turn, and for the server.

The pool's own timeout counts the wait for a turn alone. A server that does not answer as it is
connected to, or as the pool tests a connection, has others wait as long.
https://docs.sqlalchemy.org/en/20/core/pooling.html
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from math import inf
from time import monotonic
from typing import Any, TypeAlias

from sqlalchemy import Pool, PoolProxiedConnection, QueuePool

from pgtoolset._deadlines import current

#: Returns the error that names the holders of an exhausted pool.
Account: TypeAlias = Callable[[float, TimeoutError], Exception]


def in_time(pool: Pool, account: Account) -> Callable[[], PoolProxiedConnection]:
    """Return `Pool.connect` that ends at a deadline.

    Args:
        pool: the pool.
        account: called with the seconds of a wait that has ended, where the pool was exhausted.
    """
    connect = pool.connect

    def connect_in_time() -> PoolProxiedConnection:
        deadline = current()
        if deadline is None:
            return connect()
        if deadline.left() <= 0:
            raise deadline.exceeded("statement", "no connection was asked for")
        began_at = monotonic()
        try:
            return _within(deadline.left(), connect)
        except _Over as over:
            cause: BaseException = over
            if isinstance(pool, QueuePool) and pool.checkedout() >= _size(pool):
                cause = account(monotonic() - began_at, over)
            raise deadline.exceeded("pool", _reason(cause)) from cause

    return connect_in_time


class _Over(TimeoutError):
    """The time for a connection is over."""


def _within(seconds: float, connect: Callable[[], PoolProxiedConnection]) -> PoolProxiedConnection:
    """Take a connection. Runs in SQLAlchemy's greenlet, and so in the task of the caller."""
    timeout = asyncio.timeout(max(0.0, seconds))
    _run(timeout.__aenter__())
    try:
        connection = connect()
    except BaseException as error:
        try:
            _run(timeout.__aexit__(type(error), error, error.__traceback__))
        except TimeoutError as over:
            raise _Over("the server has not answered in time") from over
        raise
    _run(timeout.__aexit__(None, None, None))
    return connection


def _run(step: Coroutine[Any, Any, object]) -> None:
    """Run a coroutine that does not suspend, without a switch of greenlets."""
    try:
        step.send(None)
    except StopIteration:
        return
    step.close()
    raise RuntimeError("asyncio.Timeout has suspended")


def _size(pool: QueuePool) -> float:
    """Return how many connections a pool gives out at most."""
    most: int = getattr(pool, "_max_overflow", -1)
    return inf if most < 0 else pool.size() + most


def _reason(cause: BaseException) -> str:
    if isinstance(cause, _Over):
        return "the server has not answered a new connection"
    return str(cause)
