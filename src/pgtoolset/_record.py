"""The record of a session: the connections of its open transaction, its error and its callbacks.

SQLAlchemy's events fill it. The listeners on `Session` are registered once, with the first session
that gets a record, and return at once for a session without one.
https://docs.sqlalchemy.org/en/20/orm/session_events.html
"""

from __future__ import annotations

from contextlib import suppress

from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, SessionTransaction

from pgtoolset._arguments import AUTOCOMMIT, Settings
from pgtoolset._callbacks import Callback, check_can_run, run_in_greenlet
from pgtoolset._checkouts import Checkout
from pgtoolset._compatibility import connections_of
from pgtoolset._deadlines import suspended
from pgtoolset._listeners import checkout_of
from pgtoolset._outcomes import aborted_by, rolled_back_outside, unknown_again
from pgtoolset._postgres.connections import begun_transaction
from pgtoolset._postgres.discards import discard, is_autocommit, is_open
from pgtoolset._postgres.modes import Modes
from pgtoolset._postgres.settings import change_settings, put_settings_back
from pgtoolset._postgres.sqlstates import reported_by_server
from pgtoolset._postgres.standby import note_refusal
from pgtoolset.errors import CommitUnknownError, TransactionStateError
from pgtoolset.types import CommitObserver

#: In the `info` of a session.
_KEY = "pgtoolset.record"

#: In the `info` of a session whose commits stand for real ones, although they are savepoints: the
#: plugin's sessions, which a test commits.
_STANDS_ALONE = "pgtoolset.testing.joined"

_is_listening = False


class SettingsLevel:
    """Settings of a block inside of a transaction that is not its own, until the block ends.

    Attributes:
        settings: the settings.
        level: the savepoint of the block; `None` where its session has joined the transaction of a
            connection.
    """

    __slots__ = ("_before", "level", "settings")

    def __init__(self, settings: Settings, level: SessionTransaction | None = None) -> None:
        self.settings = settings
        self.level = level
        self._before: list[tuple[Connection, dict[str, str]]] = []

    def apply(self, connection: Connection) -> None:
        """Set them on a connection of the block. Runs in SQLAlchemy's greenlet."""
        try:
            before = change_settings(connection, self.settings.values)
        except Exception as error:
            # Where PostgreSQL has refused them the transaction is aborted. Otherwise the next
            # statement would run without them.
            if is_open(connection) and not reported_by_server(error):
                discard(connection.connection)
            raise
        self._before.append((connection, before))
        checkout_of(connection).note_settings(self.settings.values)

    def undo(self) -> None:
        """Put their earlier values back, after the block. Runs in SQLAlchemy's greenlet.

        A deadline that is over does not stop it: what follows in the transaction would run with
        the settings of the block.
        """
        before, self._before = self._before, []
        for connection, values in before:
            if is_open(connection) and connection.in_transaction():
                with suspended():
                    put_settings_back(connection, values)
                checkout_of(connection).note_settings(values)


class Record:
    """The state of the open transaction of one session; emptied when the transaction ends.

    Attributes:
        verifies_commits: whether a block of ours is open, so that each `commit()` is verified.
        is_ending: whether the commit at the end of that block is being sent.
        resolve_commit: seconds in which a commit without an answer is to be resolved, where its
            block asks for that.
        unknown: the error of a commit whose outcome is unknown; kept until that block has ended.
        checkouts: the connections of the transaction.
        is_atomic: whether a block has found that none of them is in AUTOCOMMIT.
        callbacks: of `on_commit`, each with the level whose rollback removes it.
        committed: the level that has just been committed.
        abandoned: the transaction whose block has ended while another task used the session.
        observer: observes each COMMIT, on its connection.
        settings: of each transaction of the block.
        levels: the settings of the blocks inside, the innermost last.
        joined: the settings on connections whose transaction is not the session's.
        begins_on_bind: whether the session, bound to a connection, begins its transactions.
        carried: what the transaction, which has no connection yet, takes over from the one before
            it, for each engine.
    """

    __slots__ = (
        "abandoned",
        "begins_on_bind",
        "callbacks",
        "carried",
        "checkouts",
        "committed",
        "is_atomic",
        "is_ending",
        "joined",
        "levels",
        "observer",
        "resolve_commit",
        "settings",
        "unknown",
        "verifies_commits",
    )

    def __init__(self) -> None:
        self.verifies_commits = False
        self.is_ending = False
        self.resolve_commit: float | None = None
        self.unknown: CommitUnknownError | None = None
        self.checkouts: list[Checkout] = []
        self.is_atomic = False
        self.callbacks: list[tuple[SessionTransaction, Callback]] = []
        self.committed: SessionTransaction | None = None
        self.abandoned: SessionTransaction | None = None
        self.observer: CommitObserver | None = None
        self.settings: Settings | None = None
        self.levels: list[SettingsLevel] = []
        self.joined: SettingsLevel | None = None
        self.begins_on_bind = False
        self.carried: dict[Engine, Modes] = {}

    def take_settings(self, session: Session, settings: Settings | None) -> None:
        """Have the settings for each transaction from the next one on."""
        self.settings = settings
        if settings is not None:
            bind = session.bind
            self.begins_on_bind = isinstance(bind, Connection) and not bind.in_transaction()

    @property
    def needs_verified_commit(self) -> bool:
        """Whether a COMMIT that PostgreSQL answers with ROLLBACK must be an error."""
        return self.verifies_commits or bool(self.callbacks)

    @property
    def current_settings(self) -> Settings | None:
        """The settings of the next statement: those of the unit, and of the blocks inside."""
        current = self.settings
        for level in self.levels:
            current = level.settings if current is None else current.updated(level.settings)
        return current

    @property
    def connections(self) -> list[Connection]:
        """The connections of the transaction."""
        return [checkout.connection for checkout in self.checkouts]

    @property
    def error(self) -> BaseException | None:
        """The error that aborted the transaction, or the first that may have."""
        for checkout in self.checkouts:
            if checkout.error is not None:
                return checkout.error
        return None

    @property
    def is_partly_stored(self) -> bool:
        """Whether some of several connections are committed, and the others are not."""
        committed = [checkout.is_committed_under(self) for checkout in self.checkouts]
        return any(committed) and not all(committed)

    def add_connection(self, connection: Connection) -> None:
        """Note that the transaction uses a connection from now on."""
        for checkout in self.checkouts:
            if checkout.connection is connection:
                return
        checkout = checkout_of(connection)
        checkout.enter(self)
        self.checkouts.append(checkout)
        self.is_atomic = False

    def apply_settings(
        self, session: Session, transaction: SessionTransaction, connection: Connection
    ) -> None:
        """Give a connection that the transaction, or a savepoint, begins to use its settings."""
        if transaction.nested:
            for each in self.levels:
                if each.level is transaction:
                    each.apply(connection)
        elif not self._is_joined(session, connection):
            self._prepare(connection)
        elif self.settings is not None:
            if self.joined is None:
                self.joined = SettingsLevel(self.settings)
            self.joined.apply(connection)

    def _prepare(self, connection: Connection) -> None:
        """Give a transaction that has not begun yet its modes and settings."""
        checkout = checkout_of(connection)
        modes = self.carried.get(connection.engine)
        if modes is not None:
            modes.apply(connection)
            checkout.prelude = modes.statement
            checkout.is_read_only = modes.is_read_only
        if self.settings is not None:
            checkout.take_settings(self.settings)

    def _is_joined(self, session: Session, connection: Connection) -> bool:
        """Whether a transaction may be that of the caller, who goes on with the connection."""
        return (
            (connection is session.bind and not self.begins_on_bind)
            or connection.in_nested_transaction()
            or begun_transaction(connection.connection) is not None
        )

    def move_callbacks(self, level: SessionTransaction, enclosing: SessionTransaction) -> None:
        """Give the callbacks of a savepoint that ended to the level around it, or drop them."""
        if self.committed is level:
            self.callbacks = [
                (enclosing if each is level else each, callback)
                for each, callback in self.callbacks
            ]
        else:
            self.callbacks = [entry for entry in self.callbacks if entry[0] is not level]

    def empty(self) -> None:
        """Forget the transaction, which has ended."""
        for checkout in self.checkouts:
            checkout.participants.pop(self, None)
        self.checkouts.clear()
        self.is_atomic = False
        self.callbacks.clear()
        self.carried.clear()
        self.committed = self.abandoned = None
        if not self.verifies_commits:
            self.unknown = None


def record_of(session: Session) -> Record:
    """Return the record of a session; the first call makes it, and SQLAlchemy's events fill it."""
    record: Record | None = session.info.get(_KEY)
    if record is None:
        if not _is_listening:
            _listen()
        record = session.info[_KEY] = Record()
        # No event has told of the connections of a transaction that began before.
        transaction = session.get_transaction()
        if transaction is not None:
            for connection in connections_of(transaction):
                record.add_connection(connection)
    return record


def current_settings(session: Session) -> Settings | None:
    """Return the settings that the next statement of a session has."""
    record: Record | None = session.info.get(_KEY)
    return None if record is None else record.current_settings


def innermost(session: Session) -> SessionTransaction | None:
    """Return the savepoint or transaction that a session is in now, the innermost of them."""
    return session.get_nested_transaction() or session.get_transaction()


def stands_alone(session: Session) -> bool:
    """Whether the commits of a session stand for real ones, although it is joined to a connection.

    Those of the plugin's sessions do.
    """
    return _STANDS_ALONE in session.info


def note_driver_error(session: Session, error: BaseException) -> None:
    """Note an error of the driver's own connection, which SQLAlchemy has not seen."""
    if isinstance(error, SQLAlchemyError):
        return
    for checkout in record_of(session).checkouts:
        note_refusal(checkout.connection, error, is_read_only=checkout.is_read_only, statement=None)


def _listen() -> None:
    global _is_listening
    _is_listening = True
    event.listen(Session, "after_begin", _after_begin)
    event.listen(Session, "before_commit", _before_commit)
    event.listen(Session, "after_commit", _after_commit)
    event.listen(Session, "after_transaction_end", _after_transaction_end)


def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    record: Record | None = session.info.get(_KEY)
    if record is not None:
        record.add_connection(connection)
        if record.abandoned is not None or (record.verifies_commits and is_autocommit(connection)):
            _refuse_connection(record, session, connection)
        if record.settings is not None or record.levels or record.carried:
            record.apply_settings(session, transaction, connection)


def _refuse_connection(record: Record, session: Session, connection: Connection) -> None:
    """Take a connection away again that would be used outside of any transaction of ours.

    A session that kept it would execute its next statement there. It goes back to its pool at once,
    and what comes over it is refused until the session rolls back. Closed, its transaction would
    warn then that it has no connection.
    """
    is_late = record.abandoned is not None and record.abandoned is session.get_transaction()
    if not is_late and not is_autocommit(connection):
        return
    if connection is not session.bind:
        connection.invalidate()
    if is_late:
        raise TransactionStateError(
            "the block that this statement belongs to has ended while the statement waited for a "
            "connection; wait for every task that uses the session before the end of its block"
        )
    raise TransactionStateError(AUTOCOMMIT)


def _before_commit(session: Session) -> None:
    record: Record | None = session.info.get(_KEY)
    if (
        record is None
        or not record.needs_verified_commit
        or session.in_nested_transaction()  # a RELEASE
    ):
        return
    if record.callbacks:
        check_can_run()
    if record.unknown is not None:
        raise unknown_again(record.unknown)
    for checkout in record.checkouts:
        if checkout.connection.invalidated:
            # SQLAlchemy would refuse the commit with an error of its own.
            raise aborted_by(record.error)
        if checkout.is_rolled_back_under(record):
            raise rolled_back_outside()


def _after_commit(session: Session) -> None:
    record: Record | None = session.info.get(_KEY)
    if record is not None:
        record.committed = innermost(session)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    record: Record | None = session.info.get(_KEY)
    if record is None:
        return
    parent = transaction.parent
    if parent is None:
        _end(session, record, transaction)
    elif transaction.nested and record.callbacks:
        record.move_callbacks(transaction, _level_of(parent))


def _end(session: Session, record: Record, transaction: SessionTransaction) -> None:
    """Run the callbacks after the COMMIT, or keep them until the one that is still to come."""
    is_committed = record.committed is transaction
    callbacks = [callback for _, callback in record.callbacks] if record.callbacks else []
    is_relied_on = record.verifies_commits or bool(callbacks)
    joined = [checkout for checkout in record.checkouts if checkout.is_joined]
    if callbacks and not record.checkouts:
        joined = _outer_transaction(session)
    if record.joined is not None:
        _end_joined_settings(record, is_committed=is_committed)
    record.empty()
    if not (is_committed and is_relied_on):
        return
    if joined and not stands_alone(session):
        joined[0].defer(callbacks)
    elif callbacks:
        run_in_greenlet(callbacks)


def _end_joined_settings(record: Record, *, is_committed: bool) -> None:
    """Put back the settings of a session in the transaction that goes on without it."""
    assert record.joined is not None
    settings, record.joined = record.joined, None
    if is_committed:
        settings.undo()
        return
    # The rollback of its savepoint has done so, unless it had joined without one.
    with suppress(SQLAlchemyError):
        settings.undo()


def _outer_transaction(session: Session) -> list[Checkout]:
    """Return the checkout of an open transaction that a session without a statement would join."""
    bind = session.bind
    if isinstance(bind, Connection) and not bind.closed and bind.in_transaction():
        return [checkout_of(bind)]
    return []


def _level_of(transaction: SessionTransaction) -> SessionTransaction:
    """Return the savepoint or transaction around a flush, which has a transaction of its own."""
    while not transaction.nested and transaction.parent is not None:
        transaction = transaction.parent
    return transaction
