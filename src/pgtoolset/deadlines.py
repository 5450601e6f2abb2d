"""`deadline`: one length of time for all that a block does with the database."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType

from pgtoolset._arguments import seconds
from pgtoolset._deadlines import Deadline, open_deadlines
from pgtoolset.types import Duration

__all__ = ["deadline"]


def deadline(timeout: Duration) -> AbstractContextManager[None]:
    """Bound all that a block does with the database by one length of time.

    The waits for a connection and for locks, each statement, the attempts of `run_transaction` and
    the waits for rows end together when the time is over, with an error that says which of them it
    was. A COMMIT that was sent is never cut, and a rollback neither. Of several blocks around one
    another the one that ends first counts. Tasks that are started inside have the same deadline,
    until the block ends. Python code of the block is not interrupted: `asyncio.timeout` does that,
    and would do it in the middle of a statement.

    PostgreSQL ends a statement by `statement_timeout`, which travels with the BEGIN of a
    transaction and is sent again as the time runs out. A shorter one of the server, the role or the
    transaction stays. It ends with the transaction, or before the first statement after the block.

    Args:
        timeout: seconds, a `timedelta` or a string such as `"500ms"`, above 0. It begins with the
            block.

    Returns:
        A context manager. It can be used again: each block has the whole time.

    Raises:
        ValueError, TypeError: `timeout` is not a length of time above 0.

    What the block does with the database raises `DeadlineExceededError` once the time is over. Its
    `spent_on` says what the rest of it was spent on: `"pool"`, `"lock"` (a function of this
    library), `"statement"`, `"retry"` or `"wait"`.

    Example:
        >>> db_context = create_db_context(session_maker)
        >>> with deadline("2s"):
        ...     async with db_context() as session:
        ...         account = await session.get_one(Account, 1)

    See docs/deadlines.md and
    https://www.postgresql.org/docs/current/runtime-config-client.html#GUC-STATEMENT-TIMEOUT
    """
    return _Block(seconds("timeout", timeout))


class _Block(AbstractContextManager[None]):
    __slots__ = ("_open", "_seconds")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._open: list[Deadline] = []

    def __enter__(self) -> None:
        self._open.append(Deadline(self._seconds))

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Tasks may share the object, each with a block of its own.
        own = next((each for each in open_deadlines() if each in self._open), self._open[-1])
        self._open.remove(own)
        own.close()
