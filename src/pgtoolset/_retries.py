"""Which errors allow a transaction to run again, and what a caller adds to them."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass
from traceback import walk_tb
from typing import Any, TypeAlias

from sqlalchemy import Dialect

from pgtoolset._arguments import check_function, check_plain_function, close_unawaited, shown
from pgtoolset._deadlines import current
from pgtoolset._observers import tell
from pgtoolset._postgres.sqlstates import (
    LOST_CONNECTION,
    NOT_REACHED,
    RETRYABLE,
    breaks_connection,
    is_refused_connection,
    sqlstate_of,
)
from pgtoolset._postgres.standby import has_moved
from pgtoolset.errors import (
    CommitUnknownError,
    DeadlineExceededError,
    PoolTimeoutError,
    TransactionLostError,
)
from pgtoolset.events import Retried
from pgtoolset.values import RetryAttempt

RetryOn: TypeAlias = Callable[[Exception], bool]
OnRetry: TypeAlias = Callable[[RetryAttempt], Awaitable[object] | object]

#: Seconds: the longest pause before the second attempt. It doubles with each further attempt, up to
#: the limit.
BACKOFF_BASE = 0.02
BACKOFF_LIMIT = 1.0


@dataclass(slots=True)
class Retries:
    """The retries of one call of `run_transaction`, and what its caller adds to them.

    Attributes:
        retry_on: a function that allows further errors.
        on_retry: an observer.
        is_reconnecting: whether an attempt has lost its server, which may come back, or another one
            in its place.
        dialects: of the engines that the last attempt used. Their observers receive the event.
    """

    retry_on: RetryOn | None = None
    on_retry: OnRetry | None = None
    is_reconnecting: bool = False
    dialects: Collection[Dialect] = ()

    def __post_init__(self) -> None:
        if self.retry_on is not None:
            check_plain_function("retry_on", "a plain function of the error", self.retry_on)
        if self.on_retry is not None:
            check_function("on_retry", "a function of the attempt", self.on_retry)

    def allow(self, error: Exception) -> bool:
        """Whether the transaction that failed with `error` may run again."""
        causes = list(_causes_of(error))
        if any(isinstance(cause, CommitUnknownError) for cause in causes):
            return False  # it may be stored
        if isinstance(error, DeadlineExceededError):
            return False  # it names what has spent the time already
        if any(_has_lost_server(cause) for cause in causes):
            self.is_reconnecting = True
            return True
        if any(sqlstate_of(cause) in RETRYABLE for cause in causes):
            return True
        if self.is_reconnecting and any(_is_refused_connection(cause) for cause in causes):
            return True
        return self.retry_on is not None and _answer(self.retry_on, error)

    async def pause(self, number: int, error: Exception) -> None:
        """Tell the caller of the attempt that has failed, and wait before the next."""
        limit = min(BACKOFF_LIMIT, BACKOFF_BASE * 2 ** (number - 1))
        seconds = random.uniform(0, limit)
        if self.on_retry is not None:
            result = self.on_retry(RetryAttempt(number, error, seconds))
            if inspect.isawaitable(result):
                await result
        deadline = current()
        if deadline is not None and deadline.left() <= seconds:
            raise deadline.exceeded(
                "retry", f"attempt {number} failed, and no time is left for another one"
            ) from error
        self._tell(number, error, seconds)
        await asyncio.sleep(seconds)

    def _tell(self, number: int, error: Exception, pause: float) -> None:
        sqlstates = filter(None, map(sqlstate_of, _causes_of(error)))
        retried = Retried(number, type(error).__name__, next(sqlstates, None), pause)
        for dialect in self.dialects:
            tell(dialect, retried)


def _causes_of(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, the causes of `raise ... from`, and the members of groups, each once.

    Not the context of an error that was raised while another one was handled: only the program can
    say whether the first one is the reason of the second.
    """
    seen: set[int] = set()
    todo: list[BaseException] = [error]
    while todo:
        found = todo.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        if found.__cause__ is not None:
            todo.append(found.__cause__)
        if isinstance(found, BaseExceptionGroup):
            todo.extend(found.exceptions)


def _has_lost_server(error: BaseException) -> bool:
    """Whether a connection was lost before a COMMIT was sent, or its primary has moved.

    A connection that is lost at the COMMIT is a `CommitUnknownError`, or a `TransactionLostError`
    where it is known that nothing is stored.
    """
    if isinstance(error, TransactionLostError):
        return True
    if sqlstate_of(error) in LOST_CONNECTION or has_moved(error):
        return True
    if getattr(error, "connection_invalidated", False) is True:
        return True
    # asyncpg refuses a node that is none of the wanted kind by an error of the same class.
    return breaks_connection(error) and not _is_from_pool(error)


def _is_refused_connection(error: BaseException) -> bool:
    """Whether no server could be reached, or none that takes writes yet."""
    if not _is_from_pool(error):
        return False
    sqlstate = sqlstate_of(error)
    if sqlstate is not None:
        return sqlstate in NOT_REACHED
    is_of_system = isinstance(error, OSError) and not isinstance(error, PoolTimeoutError)
    return is_of_system or is_refused_connection(error)


def _is_from_pool(error: BaseException) -> bool:
    """Whether an error was raised while SQLAlchemy's pool connected.

    There an error of the network is none of SQLAlchemy, and `work` may raise one of its own.
    """
    return any(
        frame.f_globals.get("__name__") == "sqlalchemy.pool.base"
        for frame, _ in walk_tb(error.__traceback__)
    )


def _answer(retry_on: RetryOn, error: Exception) -> bool:
    answer: Any = retry_on(error)
    if not isinstance(answer, bool):
        close_unawaited(answer)
        raise TypeError(
            f"retry_on must return True or False; {shown(retry_on)} returned {shown(answer)}"
        ) from error
    return answer
