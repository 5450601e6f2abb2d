"""The block of driver_connection: the driver's own connection, lent by the session for a while."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, suppress
from types import TracebackType
from typing import Any

from sqlalchemy import Connection, PoolProxiedConnection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from pgtoolset._arguments import AUTOCOMMIT
from pgtoolset._checkouts import Checkout
from pgtoolset._deadlines import begun_deadline, suspended
from pgtoolset._limits import SETTING, forget_limit_of
from pgtoolset._listeners import checkout_of
from pgtoolset._postgres.connections import (
    begin_with,
    begun_transaction,
    driver_options,
    is_closed,
    is_transaction_open,
    raw_at,
    show,
)
from pgtoolset._postgres.discards import discard, is_autocommit, is_open, is_running
from pgtoolset._postgres.sending import send
from pgtoolset._postgres.sqlstates import IN_FAILED_SQL_TRANSACTION, UNDEFINED_OBJECT, sqlstate_of
from pgtoolset._record import note_driver_error, record_of
from pgtoolset.errors import TransactionStateError

#: A setting that ends with the transaction. Another one that was begun in its place does not have
#: it, and the state of the connection is the same then. Neither statement takes a snapshot.
_NAME = "pgtoolset.driver_connection"
_MARK = f"SET LOCAL {_NAME} = 'lent'"
_ASK = f"SHOW {_NAME}"

_ENDED = (
    "A block of driver_connection has ended the transaction of the session, by a COMMIT or a "
    "ROLLBACK of its own: what was executed before that is stored or not, as it says, and nothing "
    "else is. The connection is closed. Leave the end of the transaction to the session."
)
_ENDED_BY_SESSION = (
    "The session has ended its transaction inside of a block of driver_connection, whose "
    "connection belongs to the pool, or to others, since then. End the block before that."
)


class Loan(AbstractAsyncContextManager[Any]):
    """Yields the connection of the driver below a session.

    A class, as all blocks here: one that is dropped in its middle is collected, while the event
    loop would first run a generator to its end.
    """

    __slots__ = ("_checkout", "_options", "_proxied", "_sync")

    _checkout: Checkout
    _proxied: PoolProxiedConnection

    def __init__(self, sync: Session) -> None:
        self._sync = sync
        self._options: dict[str, Any] = {}

    async def __aenter__(self) -> Any:
        record_of(self._sync)
        await greenlet_spawn(self._lend)
        return raw_at(self._proxied)

    def _lend(self) -> None:
        self._sync.flush()
        connection = self._sync.connection()
        if is_autocommit(connection):
            raise TransactionStateError(AUTOCOMMIT)
        self._checkout = checkout = checkout_of(connection)
        _mark(checkout)
        self._proxied = connection.connection
        forget_limit_of(self._proxied)  # a SET of the block stays with the connection
        self._options = driver_options(self._proxied)
        # So that its COMMIT is verified, and refused while this block is open.
        checkout.owes_commit = True
        checkout.borrowers += 1

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        connection = self._checkout.connection
        if not self._is_lent(connection):
            if exc is None:
                raise TransactionStateError(_ENDED_BY_SESSION)
            return
        self._checkout.borrowers -= 1
        self._checkout.note_settings((SETTING,))  # the block may have set it
        self._put_options_back()
        if exc is not None:
            self._checkout.note_error(exc)
            note_driver_error(self._sync, exc)
        if not is_transaction_open(self._proxied):
            has_ended = not is_closed(raw_at(self._proxied))
        else:
            has_ended = exc is None and await greenlet_spawn(_has_ended, self._checkout)
        if has_ended:
            ended = self._checkout.ended = TransactionStateError(_ENDED)
            await greenlet_spawn(discard, self._proxied)
            if exc is None:
                raise ended

    def _is_lent(self, connection: Connection) -> bool:
        """Whether the session still has the connection, in the same transaction of SQLAlchemy's."""
        if not is_open(connection) or connection.connection is not self._proxied:
            return False
        self._checkout.follow()
        return self._checkout.borrowers > 0

    def _put_options_back(self) -> None:
        raw: Any = raw_at(self._proxied)
        for name, value in self._options.items():
            if getattr(raw, name, value) is not value:
                setattr(raw, name, value)


def _mark(checkout: Checkout) -> None:
    """Set the mark.

    SQLAlchemy's way to a statement costs more than a round trip. It is taken where the transaction
    is still to begin or a limit to be set, and after an error, which it has to see and will meet
    again.
    """
    connection = checkout.connection
    proxied = connection.connection
    is_plain = begun_deadline() is None and checkout.limit is None
    if is_plain and begun_transaction(proxied) is not None:
        with suppress(Exception):
            begin_with(proxied, _MARK)
            return
    send(connection, _MARK).close()


def _has_ended(checkout: Checkout) -> bool:
    """Whether the transaction is another one. An aborted one cannot be asked: its COMMIT is
    refused in any case. After a deadline it is asked too: the session may go on.
    """
    connection, before = checkout.connection, checkout.error
    if is_running(connection.connection):
        return False
    try:
        return show(connection.connection, _NAME) != "lent"
    except Exception as error:
        state = sqlstate_of(error)
        if state in (IN_FAILED_SQL_TRANSACTION, UNDEFINED_OBJECT):
            return state == UNDEFINED_OBJECT  # no transaction of that backend has had the mark
    # SQLAlchemy has to see other errors.
    try:
        with suspended():
            return bool(send(connection, _ASK).scalar_one() != "lent")
    except DBAPIError as error:
        if sqlstate_of(error) != IN_FAILED_SQL_TRANSACTION:
            raise
        if before is None:
            checkout.forget_error()  # this is not the one that has aborted it
        return False
