"""Transactions of an engine with observers: timed from the first statement, reported at the end.

The methods of the engine's dialect are wrapped while it has an observer. Without one nothing here
runs: not a line is in the way of a statement, a COMMIT or a ROLLBACK.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any, TypeAlias
from weakref import ref

from sqlalchemy import Connection, Dialect, PoolProxiedConnection
from sqlalchemy.engine.interfaces import DBAPICursor, ExecutionContext

from pgtoolset._checkouts import Checkout
from pgtoolset._listeners import checkout_on, listen
from pgtoolset._observers import OPEN, Observers, observers_of, tell_each, tell_soon
from pgtoolset._postgres.connections import (
    Outcome,
    begun_transaction,
    is_closed,
    is_detached,
    is_pooled,
)
from pgtoolset._postgres.discards import is_autocommit, is_open
from pgtoolset._postgres.drivers import driver_at, raw_at
from pgtoolset._postgres.sqlstates import sqlstate_of
from pgtoolset.errors import (
    CommitUnknownError,
    DeadlineExceededError,
    TransactionAbortedError,
    TransactionLostError,
    UnsupportedVersionError,
)
from pgtoolset.events import Observer, TransactionEnded, TransactionOutcome

Method: TypeAlias = Callable[..., None]

#: In the attributes of a dialect: its wrapped methods.
_KEY = "pgtoolset.endings"

#: What a COMMIT that has failed says of its transaction, by what became of it. Where it was not
#: sent, the transaction is still open.
_ENDED: dict[Outcome, TransactionOutcome] = {
    Outcome.STORED: "committed",
    Outcome.DISCARDED: "aborted",
    Outcome.REFUSED: "rolled_back",
    Outcome.UNKNOWN: "unknown",
}


class _Open:
    """An open transaction, from its first statement on.

    It is kept with the connection in the pool, so it must not keep alive what uses that.

    Attributes:
        is_ending: whether the statement that ends it is being sent.
        is_aborted: whether it was to be committed, and cannot be.
        is_gone: whether its connection has left it while that statement was sent.
    """

    __slots__ = (
        "_began_at",
        "_connection",
        "_is_ours",
        "_is_over",
        "_isolation_level",
        "_read_only",
        "_subscriptions",
        "is_aborted",
        "is_ending",
        "is_gone",
    )

    def __init__(self, observers: Observers, connection: PoolProxiedConnection) -> None:
        driver = driver_at(connection)
        level = driver.isolation_level(connection)
        # One that comes later has not seen its begin, and may not have seen what came after it.
        self._subscriptions = tuple(observers)
        self._connection = ref(connection)
        self._is_ours = checkout_on(connection) is not None
        self._is_over = False
        self._isolation_level = None if level is None else level.replace("_", " ").upper()
        self._read_only = driver.is_read_only(connection)
        self.is_ending = False
        self.is_aborted = False
        self.is_gone = False
        self._began_at = monotonic()

    def is_on(self, connection: PoolProxiedConnection) -> bool:
        """Whether it is the open transaction of a connection, and all of it was seen."""
        return self._connection() is connection and self._is_seen()

    def _is_seen(self) -> bool:
        """Whether an observer of its begin is still there."""
        return any(each.observer is not None for each in self._subscriptions)

    def end(
        self, checkout: Checkout, outcome: TransactionOutcome, error: BaseException | None = None
    ) -> None:
        """Tell of its end, once.

        Args:
            checkout: the connection while it is out of the pool.
            outcome: how it has ended.
            error: of the statement that has ended it.
        """
        connection = self._connection()
        info = None if connection is None else connection.record_info
        if info is not None and info.get(OPEN) is self:
            del info[OPEN]
        self._tell(checkout, outcome, error)

    def lose(self) -> None:
        """Tell that it has gone with its connection, unless that has only left its pool."""
        connection = self._connection()
        if self.is_ending:
            self.is_gone = True
        elif connection is not None:
            checkout = checkout_on(connection)
            if checkout is not None and not is_detached(connection):
                self._tell(checkout, "lost")
        elif self._is_ours and self._is_seen():
            # Its session was forgotten, and the garbage collector may run in an observer.
            tell_soon(self._subscriptions, self._event("lost", None, self._read_only))

    def _tell(
        self, checkout: Checkout, outcome: TransactionOutcome, error: BaseException | None = None
    ) -> None:
        if self._is_over or not self._is_seen():
            return
        self._is_over = True
        sqlstate = None
        if outcome != "committed":
            sqlstate = sqlstate_of(error) or sqlstate_of(checkout.error)
        is_read_only = self._read_only or checkout.is_read_only
        tell_each(self._subscriptions, self._event(outcome, sqlstate, is_read_only))

    def _event(
        self, outcome: TransactionOutcome, sqlstate: str | None, read_only: bool
    ) -> TransactionEnded:
        seconds = monotonic() - self._began_at
        return TransactionEnded(outcome, seconds, sqlstate, self._isolation_level, read_only)


def observe(dialect: Dialect, observer: Observer) -> Callable[[], None]:
    """Add an observer to an engine, by its dialect; return a function that removes it again."""
    listen(dialect)  # the wrapped methods know the outcome of a COMMIT then
    observers = observers_of(dialect)
    remove = observers.add(observer)
    _wrap(dialect, observers)
    dialect_ref = ref(dialect)

    def stop() -> None:
        was_last, dialect = remove(), dialect_ref()
        if was_last and dialect is not None:
            _unwrap(dialect)

    return stop


def note_aborted(checkout: Checkout) -> None:
    """Note that a transaction was to be committed, and is aborted: a ROLLBACK follows."""
    connection = checkout.connection
    if is_open(connection):
        info = connection.connection.record_info
        opened = None if info is None else info.get(OPEN)
        if opened is not None:
            opened.is_aborted = True


class _Wrapper:
    """One method of a dialect, with a function around it while there are observers."""

    __slots__ = ("_around", "_observers", "method")

    def __init__(self, method: Method, observers: Observers, around: Callable[..., None]) -> None:
        self.method = method
        self._observers = observers
        self._around = around

    def __call__(self, *arguments: Any, **options: Any) -> None:
        if self._observers:
            self._around(self._observers, self.method, *arguments, **options)
        else:  # another wrapper is around this one, so that it could not be taken away
            self.method(*arguments, **options)


def _wrap(dialect: Dialect, observers: Observers) -> None:
    methods: dict[str, Any] = vars(dialect)
    wrapped: dict[str, _Wrapper] = methods.setdefault(_KEY, {})
    for name in _AROUND.keys() - wrapped.keys():
        wrapper = _Wrapper(getattr(dialect, name), observers, _AROUND[name])
        wrapped[name] = methods[name] = wrapper


def _unwrap(dialect: Dialect) -> None:
    methods: dict[str, Any] = vars(dialect)
    wrapped: dict[str, _Wrapper] = methods[_KEY]
    for name, wrapper in list(wrapped.items()):
        if methods.get(name) is wrapper:
            methods[name] = wrapped.pop(name).method
    if not wrapped:
        del methods[_KEY]


def _open_on(connection: PoolProxiedConnection) -> _Open | None:
    """Return the open transaction of a connection, unless its end is being sent already."""
    if not is_pooled(connection):
        return None
    info = connection.record_info
    opened: _Open | None = None if info is None else info.get(OPEN)
    if opened is None or opened.is_ending or not opened.is_on(connection):
        return None
    return opened


def _execute(
    observers: Observers, execute: Method, cursor: DBAPICursor, statement: str, *arguments: Any
) -> None:
    context: Any = arguments[-1] if arguments else None
    is_known = isinstance(context, ExecutionContext)  # others may call the method without one
    is_first = is_known and _note_statement(observers, context.root_connection)
    try:
        execute(cursor, statement, *arguments)
    except DeadlineExceededError:
        if is_first:  # it was not sent
            _forget(context.root_connection.connection)
        raise


def _note_statement(observers: Observers, connection: Connection) -> bool:
    """Note a transaction with its first statement; return whether this is one."""
    proxied = connection.connection
    if not is_pooled(proxied):
        return False  # SQLAlchemy looks at the server of a new engine
    info = proxied.record_info
    if info is None or is_autocommit(connection):
        return False  # it belongs to no pool, or begins no transaction
    opened: _Open | None = info.get(OPEN)
    if (opened is not None and opened.is_on(proxied)) or _has_begun(proxied):
        return False
    info[OPEN] = _Open(observers, proxied)
    return True


def _has_begun(connection: PoolProxiedConnection) -> bool:
    """Whether an earlier statement has begun the transaction, before there was an observer."""
    try:
        return begun_transaction(connection) is not None
    except UnsupportedVersionError:
        return False  # of a wrapped driver, on which none of our units can be


def _commit(observers: Observers, commit: Method, connection: PoolProxiedConnection) -> None:
    opened = _open_on(connection)
    checkout = None if opened is None else checkout_on(connection)
    if opened is None or checkout is None:
        _forget(connection)
        commit(connection)
    else:
        _commit_and_tell(opened, checkout, partial(commit, connection))


def _commit_and_tell(opened: _Open, checkout: Checkout, commit: Callable[[], None]) -> None:
    is_verified = checkout.needs_verified_commit()
    attempt_before = checkout.attempt
    is_aborted = not is_verified and checkout.is_aborted
    end = partial(opened.end, checkout, "aborted" if is_aborted else "committed")
    if checkout.deferred:
        checkout.deferred.insert(0, end)  # the callbacks do not belong to the transaction
    opened.is_ending = True
    try:
        commit()
    except BaseException as error:
        opened.is_ending = False
        checkout.deferred[:] = [each for each in checkout.deferred if each is not end]
        attempt = checkout.attempt
        sent = None if attempt is None or attempt is attempt_before else attempt.outcome
        outcome = _outcome_of(error, sent)
        if outcome is not None or opened.is_gone:
            opened.end(checkout, outcome or "lost", error)
        elif isinstance(error, TransactionAbortedError):
            opened.is_aborted = True
        raise
    end()


def _outcome_of(error: BaseException, sent: Outcome | None) -> TransactionOutcome | None:
    """Return how a COMMIT that raised has ended its transaction; `None` where it has not."""
    if isinstance(error, CommitUnknownError):
        return "unknown"
    if isinstance(error, TransactionLostError):
        return "lost"
    return None if sent is None else _ENDED.get(sent)


def _rollback(observers: Observers, rollback: Method, connection: PoolProxiedConnection) -> None:
    opened = _open_on(connection)
    checkout = None if opened is None else checkout_on(connection)
    if opened is None or checkout is None:
        if opened is not None:
            _forget(connection)
        rollback(connection)
    else:
        _roll_back_and_tell(opened, checkout, partial(rollback, connection))


def _roll_back_and_tell(opened: _Open, checkout: Checkout, rollback: Callable[[], None]) -> None:
    opened.is_ending = True
    try:
        rollback()
    except BaseException as error:
        opened.end(checkout, "lost", error)
        raise
    if opened.is_gone or _is_closed(checkout.connection):
        opened.end(checkout, "lost")
    else:
        opened.end(checkout, "aborted" if opened.is_aborted else "rolled_back")


def _is_closed(connection: Connection) -> bool:
    """Whether the connection of the driver is closed; PostgreSQL rolls back then, unasked."""
    return not is_open(connection) or is_closed(raw_at(connection.connection))


def _two_phase(
    tell: Callable[[_Open, Checkout, Callable[[], None]], None],
) -> Callable[..., None]:
    """Return the function around `do_commit_twophase` or `do_rollback_twophase`."""

    def around(
        observers: Observers,
        method: Method,
        connection: Connection,
        *arguments: Any,
        **options: Any,
    ) -> None:
        proxied = connection.connection
        opened = _open_on(proxied)
        checkout = None if opened is None else checkout_on(proxied)
        send = partial(method, connection, *arguments, **options)
        if opened is None or checkout is None:
            send()
        else:
            tell(opened, checkout, send)

    return around


def _forget(connection: PoolProxiedConnection) -> None:
    if is_pooled(connection) and connection.record_info is not None:
        opened = connection.record_info.get(OPEN)
        if opened is not None and not opened.is_ending:
            del connection.record_info[OPEN]


_AROUND: dict[str, Callable[..., None]] = {
    "do_execute": _execute,
    "do_executemany": _execute,
    "do_execute_no_params": _execute,
    "do_commit": _commit,
    "do_rollback": _rollback,
    "do_commit_twophase": _two_phase(_commit_and_tell),
    "do_rollback_twophase": _two_phase(_roll_back_and_tell),
}
