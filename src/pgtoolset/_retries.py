"""Which errors allow a transaction to run again, and what a caller adds to them."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from pgtoolset._arguments import check_function, shown
from pgtoolset._postgres.sqlstates import LOST_CONNECTION, RETRYABLE, breaks_connection, sqlstate_of
from pgtoolset.errors import CommitUnknownError, TransactionLostError
from pgtoolset.values import RetryAttempt

RetryOn: TypeAlias = Callable[[Exception], bool]
OnRetry: TypeAlias = Callable[[RetryAttempt], Awaitable[object] | object]

#: Seconds: the longest pause before the second attempt. It doubles with each further attempt, up to
#: the limit.
BACKOFF_BASE = 0.02
BACKOFF_LIMIT = 1.0


@dataclass(frozen=True, slots=True)
class Retries:
    """What the caller of `run_transaction` adds: further errors, and an observer."""

    retry_on: RetryOn | None = None
    on_retry: OnRetry | None = None

    def __post_init__(self) -> None:
        if self.retry_on is not None:
            check_function("retry_on", "a plain function of the error", self.retry_on)
            if inspect.iscoroutinefunction(self.retry_on):
                raise TypeError(
                    "retry_on must be a plain function of the error, and "
                    f"{shown(self.retry_on)} is async"
                )
        if self.on_retry is not None:
            check_function("on_retry", "a function of the attempt", self.on_retry)

    def allow(self, error: Exception) -> bool:
        """Whether the transaction that failed with `error` may run again."""
        causes = list(_causes_of(error))
        if any(isinstance(cause, CommitUnknownError) for cause in causes):
            return False  # it may be stored
        if any(_is_transient(cause) for cause in causes):
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
        await asyncio.sleep(seconds)


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


def _is_transient(error: BaseException) -> bool:
    """Whether PostgreSQL asks to run again, or the connection was lost before a COMMIT was sent.

    A connection that is lost at the COMMIT is a `CommitUnknownError`, or a `TransactionLostError`
    where it is known that nothing is stored.
    """
    if isinstance(error, TransactionLostError):
        return True
    sqlstate = sqlstate_of(error)
    if sqlstate in RETRYABLE or sqlstate in LOST_CONNECTION:
        return True
    return getattr(error, "connection_invalidated", False) is True or breaks_connection(error)


def _answer(retry_on: RetryOn, error: Exception) -> bool:
    answer: Any = retry_on(error)
    if not isinstance(answer, bool):
        raise TypeError(
            f"retry_on must return True or False; {shown(retry_on)} returned {shown(answer)}"
        ) from error
    return answer
