"""A COMMIT that is observed, and what became of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum, auto
from typing import Any

from pgtoolset._postgres.sqlstates import refuses_commit


class Outcome(Enum):
    """The outcome of a COMMIT."""

    #: PostgreSQL has stored the transaction.
    STORED = auto()
    #: PostgreSQL has answered ROLLBACK, because an error had aborted the transaction.
    DISCARDED = auto()
    #: PostgreSQL has answered with an error, and has rolled back.
    REFUSED = auto()
    #: The driver has refused to send it.
    NOT_SENT = auto()
    #: It was sent, and no answer says what became of it.
    UNKNOWN = auto()


class CommitAttempt(ABC):
    """Stands in for what sends the COMMIT of a connection, and remembers its outcome.

    Attributes:
        outcome: the outcome of the COMMIT so far.
        error: the driver's error, where there was one.
        was_lost: whether the driver had lost the connection.
    """

    __slots__ = ("_raw", "error", "outcome", "was_lost")

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.outcome = Outcome.NOT_SENT
        self.error: BaseException | None = None
        self.was_lost = False

    @abstractmethod
    async def commit(self) -> None:
        """Send COMMIT and wait for its answer, whatever cancels the caller in between."""

    def _fail(self, error: BaseException, *, is_sent: bool) -> bool:
        """Note an error of the COMMIT; return whether the connection must end with it.

        Unless the error is an answer, a transaction may still be open on the connection, or a late
        answer may still arrive.
        """
        self.error = error
        if is_sent and refuses_commit(error):
            self.outcome = Outcome.REFUSED
            return False
        self.outcome = Outcome.UNKNOWN if is_sent else Outcome.NOT_SENT
        return True
