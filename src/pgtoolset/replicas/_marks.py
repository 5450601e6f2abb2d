"""The mark on the session of a read block: one transaction on one connection, and no more."""

from __future__ import annotations

from sqlalchemy import Connection, event
from sqlalchemy.orm import Session, SessionTransaction

from pgtoolset._arguments import READ_BLOCK
from pgtoolset.errors import TransactionStateError

__all__ = ["mark", "unmark", "was_refused"]

_is_listening = False


class _Mark:
    """What a read block has used.

    Attributes:
        connection: its connection, once it has one.
        was_refused: whether it has asked for another one.
    """

    __slots__ = ("connection", "was_refused")

    def __init__(self) -> None:
        self.connection: Connection | None = None
        self.was_refused = False


def mark(session: Session) -> None:
    """Mark the session of a read block, which has no connection yet."""
    global _is_listening
    if not _is_listening:
        _is_listening = True
        event.listen(Session, "after_begin", _after_begin)
    session.info[READ_BLOCK] = _Mark()


def was_refused(session: Session) -> bool:
    """Whether the block has used its session after its transaction, and got an error."""
    used: _Mark | None = session.info.get(READ_BLOCK)
    return used is not None and used.was_refused


def unmark(session: Session) -> None:
    """Take the mark off, at the end of the block."""
    session.info.pop(READ_BLOCK, None)


def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    """Refuse a second connection, which may be on a node that has replayed less, or a primary."""
    used: _Mark | None = session.info.get(READ_BLOCK)
    if used is None or used.connection is connection:  # a savepoint has the same one
        return
    if used.connection is None:
        used.connection = connection
        return
    used.was_refused = True
    # The session keeps it, and would execute its next statement there.
    connection.invalidate()
    raise TransactionStateError(
        "a read block is one READ ONLY transaction on one connection, and this one has ended by a "
        "commit() or rollback(), or the statement belongs to another engine; open another "
        "`async with replicas.read(...)`"
    )
