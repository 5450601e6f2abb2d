"""The `statement_timeout` that a deadline sets in a transaction, and connections that are silent.

It travels with the BEGIN, is sent again while the time runs out, and never lengthens a limit that
is there without it. It does not cut a COMMIT: PostgreSQL disarms it first, for deferred triggers
and for the wait for a standby too.
https://www.postgresql.org/docs/current/runtime-config-client.html#GUC-STATEMENT-TIMEOUT
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import Context
from math import ceil
from types import TracebackType

from sqlalchemy import Connection, PoolProxiedConnection

from pgtoolset._arguments import milliseconds, seconds
from pgtoolset._deadlines import Deadline
from pgtoolset._postgres.connections import begin_with, show, terminate
from pgtoolset._postgres.discards import is_open
from pgtoolset._postgres.sqlstates import QUERY_CANCELED, sqlstate_of

SETTING = "statement_timeout"

#: In the `info` of a connection: its limit outside of transactions that change it, in milliseconds.
_KEY = "pgtoolset.statement_timeout"

#: How much longer than the time that is left a statement may run, because the limit was sent with
#: an earlier one: a share of that time, and milliseconds. So a transaction of many statements sends
#: it now and then, more often as the end comes closer.
_STALE_SHARE = 0.1
_STALE_LEAST = 5

#: Milliseconds: a shorter limit could cut the statement that takes it off.
_SHORTEST = 11

#: Milliseconds: people set multiples of this, so a deadline does not.
_ROUND = 10

#: Milliseconds: the longest limit that PostgreSQL takes, 24 days.
_LONGEST = 2**31 - 1

#: Seconds by which PostgreSQL may seem to end a statement before its time.
_EARLY = 0.01

#: Seconds after the time of a statement at which its connection is closed: PostgreSQL, or the
#: network, does not answer then.
_GRACE = 0.5

#: Seconds in which an answer that has arrived reaches the task that waits for it.
_DELIVERY = 0.05


class StatementLimit:
    """The limit of the statements of one transaction.

    Attributes:
        deadline: for which it was set; `None` where it was taken off.
    """

    __slots__ = ("_base", "_ours", "_set", "deadline")

    def __init__(self) -> None:
        self.deadline: Deadline | None = None
        #: Without a deadline, in milliseconds: 0 is none, and `None` is not known.
        self._base: int | None = None
        #: On the server; `None` where it must be asked for.
        self._set: int | None = None
        #: Each value that was set here, with the limit below it. A savepoint or a block may put a
        #: value back, and it alone tells the limit then: a value never has two.
        self._ours: dict[int, int] = {}

    def opening(
        self, connection: PoolProxiedConnection, deadline: Deadline, given: str | None
    ) -> str | None:
        """Return the statement that limits a transaction which begins with it.

        `None` where the limit without it is not known. Nothing is sent.

        Args:
            connection: on which the transaction begins.
            deadline: of its statements.
            given: the limit that other statements at its beginning set.
        """
        self._base = self._set = _parsed(given) if given else connection.info.get(_KEY)
        return None if self._base is None else self._statement(deadline)

    def begun(self, connection: PoolProxiedConnection, *, is_given: bool) -> None:
        """Ask for the limit at the beginning of a transaction, as `apply` will need it."""
        self._base = self._set = _asked(connection)
        if not is_given:
            connection.info[_KEY] = self._base

    def apply(self, connection: PoolProxiedConnection, deadline: Deadline) -> None:
        """Limit the next statement, which may take a statement before it."""
        if self._set is None:
            self._ask(connection)
        self._send(connection, self._statement(deadline))

    def take_off(self, connection: PoolProxiedConnection) -> None:
        """Let the following statements run as if there had been no deadline."""
        if self._set is None:
            self._ask(connection)
        if self._set != self._base:
            self._send(connection, _set_local(self._base or 0))
        self._set = self._base
        self.deadline = None

    def forget(self) -> None:
        """Note that the limit may be another one now: after a ROLLBACK TO, or a SET of others."""
        self._set = None

    def explains(self, error: BaseException) -> bool:
        """Whether the deadline has ended a statement."""
        deadline = self.deadline
        return (
            deadline is not None
            and sqlstate_of(error) == QUERY_CANCELED
            and deadline.left() <= _EARLY
        )

    def _send(self, connection: PoolProxiedConnection, statement: str) -> None:
        if not statement:
            return
        try:
            begin_with(connection, statement)
        except BaseException:
            self.forget()  # it may have been executed or not
            raise

    def _ask(self, connection: PoolProxiedConnection) -> None:
        self._set = shown = _asked(connection)
        self._base = self._ours.get(shown, shown)

    def _statement(self, deadline: Deadline) -> str:
        """Return the statement that sets the limit to the time left; empty where it is set."""
        base = self._base
        assert base is not None
        self.deadline = deadline
        left = max(_SHORTEST, min(_LONGEST, ceil(deadline.left() * 1000)))
        wanted = min(left, base) if base else left
        ours = self._ours
        while wanted > 1 and (
            ours.get(wanted, base) != base or (wanted != base and wanted % _ROUND == 0)
        ):
            wanted -= 1
        present = self._set
        if present is not None and 0 < present and wanted <= present:
            stale = 0 if wanted == base else max(_STALE_LEAST, wanted * _STALE_SHARE)
            if present - wanted <= stale:
                return ""
        self._set = wanted
        ours[wanted] = base
        return _set_local(wanted)


def may_limit(text: str) -> bool:
    """Whether a statement of the caller may be one for `note_text`; nearly none is."""
    return SETTING in text.lower()


def note_text(connection: PoolProxiedConnection, limit: StatementLimit | None, text: str) -> None:
    """Follow a statement of the caller that names the setting, and so may set the limit.

    Args:
        connection: on which it is sent.
        limit: of the transaction.
        text: the statement.
    """
    lower = text.lower()
    if lower.lstrip().startswith("show"):
        return
    if limit is not None:
        limit.forget()
    if "local" not in lower:
        forget_limit_of(connection)


def forget_limit_of(connection: PoolProxiedConnection) -> None:
    """Have the limit asked for at the next transaction: what is not seen here may change it."""
    connection.info.pop(_KEY, None)


class LastResort(AbstractContextManager[None]):
    """A block that waits for the answer to a statement, for which no server may be left.

    Its connection is closed a little after the deadline, if PostgreSQL has not answered by then.

    Args:
        connection: the connection.
        deadline: the deadline.
        left: the seconds until then.

    Attributes:
        deadline: the deadline.
        has_closed: whether that has happened.
    """

    __slots__ = ("_connection", "_seconds", "_timer", "deadline", "has_closed")

    def __init__(self, connection: Connection, deadline: Deadline, left: float) -> None:
        self._connection = connection
        self._seconds = left * (1 + _STALE_SHARE) + _GRACE
        self.deadline = deadline
        self.has_closed = False

    def __enter__(self) -> None:
        self._later(self._seconds, self._look)

    def _later(self, delay: float, callback: Callable[[], object]) -> None:
        # An empty context: that of the caller would be kept until then.
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(delay, callback, context=Context())

    def _look(self) -> None:
        # In a loop that was late itself an answer may have arrived.
        self._later(_DELIVERY, self._close)

    def _close(self) -> None:
        if is_open(self._connection):
            self.has_closed = True
            terminate(self._connection)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._timer.cancel()


def _asked(connection: PoolProxiedConnection) -> int:
    found = _parsed(show(connection, SETTING))
    assert found is not None  # PostgreSQL writes a number with a unit
    return found


def _parsed(text: str) -> int | None:
    """Return the milliseconds of a value as PostgreSQL reads it, `None` for one to ask for."""
    text = text.strip()
    if text.isascii() and text.isdigit():
        return int(text)
    try:
        return milliseconds(seconds(SETTING, text))
    except ValueError:
        return None


def _set_local(limit: int) -> str:
    return f"SET LOCAL {SETTING} = {limit};"
