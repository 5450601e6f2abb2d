"""Each statement, COMMIT, savepoint and error of a connection, passed on to its checkout.

The listeners on a dialect are registered with its first noted connection.
https://docs.sqlalchemy.org/en/20/core/events.html
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any

from sqlalchemy import Connection, Dialect, Engine, PoolProxiedConnection, event
from sqlalchemy.engine import ExceptionContext, ExecutionContext
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor

from pgtoolset._checkouts import Checkout, DialectCommit
from pgtoolset._deadlines import Deadline, begun_deadline, current, is_suspended, suspended
from pgtoolset._limits import LastResort, may_limit, note_text
from pgtoolset._postgres.connections import (
    Outcome,
    check_verifiable,
    close_pooled,
    is_open_cursor,
    is_pooled,
)
from pgtoolset._postgres.discards import (
    checked_rollback,
    is_autocommit,
    is_discarded,
    is_open,
)
from pgtoolset._postgres.engines import see_connection
from pgtoolset._postgres.poolers import explained
from pgtoolset._postgres.sending import PUTS_BACK
from pgtoolset._postgres.sqlstates import breaks_connection
from pgtoolset._postgres.standby import note_node, note_refusal, replacing_rollback
from pgtoolset._postgres.statements import Execute, noted, wrap_statements
from pgtoolset.errors import DeadlineExceededError, PoolerError

#: In the attributes of a dialect that has the listeners, and in the `info` of a connection that was
#: looked at; and, with the checkout, in the attributes of the object that the pool returned. So the
#: checkout lives exactly as long: a session that is dropped without `close()` is collected, and its
#: connection with it.
_KEY = "pgtoolset.checkout"

#: The attributes of a connection that cannot have any of ours.
_NOTHING: dict[str, Any] = {}

#: In the attributes of a dialect whose errors are listened to.
_ERRORS = "pgtoolset.errors"


def checkout_of(connection: Connection) -> Checkout:
    """Return what the sessions on a connection share; the first call makes it.

    Raises:
        UnsupportedDriverError: the database or the driver is not supported. Nothing was sent.
        UnsupportedVersionError: the driver's connection is wrapped so that its commits could not be
            verified. Nothing was sent.
    """
    attributes = vars(connection.connection)
    checkout: Checkout | None = attributes.get(_KEY)
    if checkout is None:
        if _KEY not in connection.connection.info or _KEY not in vars(connection.dialect):
            _see(connection)
        checkout = attributes[_KEY] = Checkout(connection)
    else:
        checkout.follow()
    return checkout


def _see(connection: Connection) -> None:
    """Look at a connection of the driver, and at its engine, when they are first used."""
    see_connection(connection)
    if _KEY not in vars(connection.dialect):
        _listen(connection.dialect)
    proxied = connection.connection
    is_verifiable = check_verifiable(proxied)
    note_node(proxied)
    if is_verifiable:
        proxied.info[_KEY] = True


def verify_commit_of(connection: Connection) -> None:
    """Verify the COMMIT that a block of ours sends on a connection without a session."""
    checkout_of(connection).owes_commit = True


def listen_to_errors(bind: Connection | Engine | None) -> None:
    """Listen to the errors of an engine from its first connection on.

    The rest follows with the first connection, or the first error on one.
    """
    if bind is not None and _ERRORS not in vars(bind.dialect):
        _listen_to_errors(bind.dialect)


def listen(dialect: Dialect) -> None:
    """Listen to an engine before its first connection is noted. Only the first call does work."""
    if _KEY not in vars(dialect):
        _listen(dialect)


def checkout_on(connection: PoolProxiedConnection) -> Checkout | None:
    """Return what the sessions on a connection share; `None` where none of ours uses it."""
    return _checkout_on(connection)


def _listen_to_errors(dialect: Dialect) -> None:
    if _ERRORS not in vars(dialect):
        vars(dialect)[_ERRORS] = True
        event.listen(dialect, "handle_error", _on_error)


def _known_checkout(connection: Connection | None) -> Checkout | None:
    if connection is None or not is_open(connection):
        return None
    return _checkout_on(connection.connection)


def _checkout_on(connection: PoolProxiedConnection) -> Checkout | None:
    checkout: Checkout | None = getattr(connection, "__dict__", _NOTHING).get(_KEY)
    if checkout is not None:
        checkout.follow()
    return checkout


def _listen(dialect: Dialect) -> None:
    """Listen to errors, and to each COMMIT and savepoint just before it is sent.

    An engine with a listener takes SQLAlchemy's slow path at every statement and every checkout:
    10 us for each statement. The dialect's own methods are called at the same moments, and cost
    nothing elsewhere.
    """
    vars(dialect)[_KEY] = True
    _listen_to_errors(dialect)
    rollback = dialect.do_rollback
    our_rollback = replacing_rollback(checked_rollback(rollback))
    savepoint = dialect.do_savepoint
    rollback_to_savepoint = dialect.do_rollback_to_savepoint
    release_savepoint = dialect.do_release_savepoint
    terminate = dialect.do_terminate

    def do_rollback(dbapi_connection: PoolProxiedConnection) -> None:
        (our_rollback if is_pooled(dbapi_connection) else rollback)(dbapi_connection)

    def do_savepoint(connection: Connection, name: str) -> None:
        if checkout := _known_checkout(connection):
            checkout.mark_savepoint(name)
        savepoint(connection, name)

    def do_rollback_to_savepoint(connection: Connection, name: str) -> None:
        if checkout := _known_checkout(connection):
            checkout.roll_back_to_savepoint(name)
        with suspended():
            rollback_to_savepoint(connection, name)

    def do_release_savepoint(connection: Connection, name: str) -> None:
        checkout = _known_checkout(connection)
        if checkout is None:
            with suspended():
                release_savepoint(connection, name)
        else:
            checkout.release(name, release_savepoint)

    def do_terminate(dbapi_connection: DBAPIConnection) -> None:
        close_pooled(dbapi_connection, terminate)

    methods = vars(dialect)
    methods["do_commit"] = _verified_commit(dialect.do_commit)
    methods["do_terminate"] = do_terminate
    methods["do_commit_twophase"] = _answered_commit(dialect.do_commit_twophase)
    methods["do_rollback_twophase"] = _rollback_at_any_time(dialect.do_rollback_twophase)
    methods["do_rollback"] = do_rollback
    methods["do_savepoint"] = do_savepoint
    methods["do_rollback_to_savepoint"] = do_rollback_to_savepoint
    methods["do_release_savepoint"] = do_release_savepoint
    wrap_statements(dialect, _listened)


def _listened(execute: Execute) -> Execute:
    """Return one of the methods of a dialect that execute a statement, which is prepared for.

    This runs for each statement. What nearly none needs takes no call here.
    """
    noting = noted(execute)

    def listened(cursor: DBAPICursor, statement: str, parameters: Any, context: Any = None) -> None:
        if context is None:
            execute(cursor, statement, parameters, context)
            return
        # Not of the first connection of an engine, over which SQLAlchemy looks at the server.
        attributes = getattr(context.root_connection.connection, "__dict__", _NOTHING)
        checkout: Checkout | None = attributes.get(_KEY)
        if getattr(cursor, "server_side", False):
            _note_cursor(context)
        if begun_deadline() is not None and (deadline := current()) is not None:
            send = partial(noting, cursor, statement, parameters, context)
            _within(deadline, context, checkout, statement, send)
            return
        if checkout is not None and (checkout.prelude or checkout.limit is not None):
            _begin(checkout)
        if context.is_text and may_limit(statement):
            _note_text(context, checkout, statement)
        if checkout is None:
            noting(cursor, statement, parameters, context)
            return
        held = checkout.held
        if held is None:
            execute(cursor, statement, parameters, context)
            return
        held.statement = statement
        try:
            execute(cursor, statement, parameters, context)
        finally:
            held.idle_since = monotonic()

    return listened


def _begin(checkout: Checkout) -> None:
    """Begin the transaction with what its sessions want of it, and without an ended deadline.

    SQLAlchemy treats an error as one of the statement.
    """
    if checkout.prelude:
        checkout.begin()
    if checkout.limit is not None and not is_suspended():
        checkout.end_limit()


def _note_cursor(context: ExecutionContext) -> None:
    """Note a cursor that may stay open on the server after its statement."""
    proxied = context.root_connection.connection
    if is_pooled(proxied):
        checkout = checkout_of(context.root_connection)
        checkout.cursors = [*filter(is_open_cursor, checkout.cursors), context.cursor]


def _note_text(context: Any, checkout: Checkout | None, statement: str) -> None:
    """Follow a text of the caller, which may set the limit of a statement."""
    proxied = context.root_connection.connection
    if is_pooled(proxied) and not PUTS_BACK.keys() <= context.execution_options.keys():
        note_text(proxied, None if checkout is None else checkout.limit, statement)


def _within(
    deadline: Deadline,
    context: Any,
    checkout: Checkout | None,
    statement: str,
    send: Callable[[], None],
) -> None:
    """Send a statement, unless a deadline is over; limit it by the time that is left."""
    connection = context.root_connection
    if checkout is None and not is_pooled(connection.connection):
        send()  # the pool's wait is limited
        return
    left = deadline.left()
    if left <= 0:
        raise deadline.exceeded("statement", "the next statement was not sent")
    if checkout is None:
        checkout = checkout_of(connection)
    checkout.last_resort = LastResort(connection, deadline, left)
    with checkout.last_resort:
        if not is_autocommit(connection):
            checkout.begin_within(deadline)
        if context.is_text and may_limit(statement):
            _note_text(context, checkout, statement)
        send()


def _verified_commit(commit: DialectCommit) -> DialectCommit:
    """Return `Dialect.do_commit` that verifies what our sessions rely on."""

    def do_commit(dbapi_connection: PoolProxiedConnection) -> None:
        checkout = _checkout_on(dbapi_connection)
        if checkout is None:
            commit(dbapi_connection)
        elif checkout.needs_verified_commit():
            checkout.commit(dbapi_connection, commit)
        else:
            commit(dbapi_connection)
            checkout.note_commit()

    return do_commit


def _answered_commit(commit_twophase: Callable[..., None]) -> Callable[..., None]:
    """Return `Dialect.do_commit_twophase` that says so where COMMIT PREPARED is not answered."""

    def do_commit_twophase(
        connection: Connection, xid: Any, is_prepared: bool = True, recover: bool = False
    ) -> None:
        send = partial(commit_twophase, connection, xid, is_prepared, recover)
        checkout = _known_checkout(connection)
        with suspended():
            if is_prepared and checkout is not None and checkout.needs_verified_commit():
                checkout.commit_prepared(send)
            else:
                send()

    return do_commit_twophase


def _rollback_at_any_time(rollback_twophase: Callable[..., None]) -> Callable[..., None]:
    """Return `Dialect.do_rollback_twophase` that no deadline stops: what is prepared would stay,
    with its locks.
    """

    def do_rollback_twophase(connection: Connection, *arguments: Any, **options: Any) -> None:
        with suspended():
            rollback_twophase(connection, *arguments, **options)

    return do_rollback_twophase


def _on_error(context: ExceptionContext) -> PoolerError | DeadlineExceededError | None:
    if isinstance(context.original_exception, DeadlineExceededError):
        # Nothing was sent. SQLAlchemy takes a TimeoutError for a statement that was cut.
        context.is_disconnect = False
        return None
    connection = context.connection
    if connection is None or not is_open(connection) or is_pooled(connection.connection):
        _note_error(context)
    return _exceeded(context) or explained(context)


def _exceeded(context: ExceptionContext) -> DeadlineExceededError | None:
    """Return the error of a deadline, where that has ended the statement."""
    checkout = _known_checkout(context.connection)
    if checkout is None:
        return None
    cut = checkout.last_resort
    if cut is not None and cut.has_closed:
        context.is_disconnect = True
        context.invalidate_pool_on_disconnect = False
        return cut.deadline.exceeded(
            "statement", "the server has not answered a statement, and the connection is closed"
        )
    limit = checkout.limit
    error = context.sqlalchemy_exception or context.original_exception
    if limit is not None and limit.deadline is not None and limit.explains(error):
        return limit.deadline.exceeded("statement", "PostgreSQL has canceled a statement")
    return None


def _note_error(context: ExceptionContext) -> None:
    if is_discarded(context.connection):
        context.invalidate_pool_on_disconnect = False
    checkout = _known_checkout(context.connection)
    error = context.sqlalchemy_exception or context.original_exception
    if context.connection is not None:
        if is_open(context.connection) and _KEY not in vars(context.dialect):
            _listen(context.dialect)
        is_read_only = checkout is not None and checkout.is_read_only
        note_refusal(
            context.connection, error, is_read_only=is_read_only, statement=context.statement
        )
    if checkout is None:
        return
    attempt = checkout.attempt
    if attempt is not None and attempt.outcome in (Outcome.UNKNOWN, Outcome.NOT_SENT):
        # The connection was closed. The others of the pool are as good as they were, unless the
        # driver had lost this one.
        context.is_disconnect = True
        context.invalidate_pool_on_disconnect = attempt.was_lost
    elif breaks_connection(error):
        context.is_disconnect = True
    checkout.note_error(error, is_disconnect=context.is_disconnect)
