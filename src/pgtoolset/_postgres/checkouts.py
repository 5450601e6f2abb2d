"""The wait for a connection of a pool, which a deadline bounds: for its turn, and for the server.

The pool's own timeout counts the wait for a turn alone. A server that does not answer as it is
connected to, or as the pool tests a connection, has others wait as long.
https://docs.sqlalchemy.org/en/20/core/pooling.html
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from sqlalchemy import Pool, PoolProxiedConnection
from sqlalchemy.util import await_only

from pgtoolset._deadlines import Deadline, current

#: In the attributes of a pool whose waits are bounded.
_KEY = "pgtoolset.bounded"


def bound_pool(pool: Pool) -> None:
    """Bound the waits for the connections of a pool. Only the first call does work."""
    methods: dict[str, Any] = vars(pool)
    if _KEY in methods:
        return
    connect, recreate = pool.connect, pool.recreate

    def connect_in_time() -> PoolProxiedConnection:
        deadline = current()
        if deadline is None:
            return connect()
        if deadline.left() <= 0:
            raise deadline.exceeded("statement", "no connection was asked for")
        return _within(deadline, connect)

    def recreate_bounded() -> Pool:
        recreated = recreate()
        bound_pool(recreated)
        return recreated

    methods["connect"] = connect_in_time
    methods["recreate"] = recreate_bounded
    methods[_KEY] = True


def _within(
    deadline: Deadline, connect: Callable[[], PoolProxiedConnection]
) -> PoolProxiedConnection:
    """Take a connection. Runs in SQLAlchemy's greenlet, and so in the task of the caller."""
    timeout = asyncio.timeout(max(0.0, deadline.left()))
    await_only(timeout.__aenter__())
    try:
        connection = connect()
    except BaseException as error:
        try:
            await_only(timeout.__aexit__(type(error), error, error.__traceback__))
        except TimeoutError as over:
            raise deadline.exceeded("pool", "no connection could be taken in time") from over
        raise
    await_only(timeout.__aexit__(None, None, None))
    return connection
