"""What the library needs of a driver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from sqlalchemy import URL, Dialect, PoolProxiedConnection
from sqlalchemy.engine.interfaces import DBAPIConnection

from pgtoolset._postgres.drivers._attempts import CommitAttempt


class Driver(Protocol):
    """One driver. `raw` is a connection of it, or a wrapper around one.

    Attributes:
        begins_by_itself: whether each statement begins a transaction where none is open, also
            after a COMMIT that SQLAlchemy has not sent.
        options: the attributes of its connection that a user may set, and SQLAlchemy relies on.
        prepared_prefix: how the names of its prepared statements begin.
        without_caches: the arguments of `create_async_engine` with which it prepares none.
    """

    begins_by_itself: bool
    options: tuple[str, ...]
    prepared_prefix: str
    without_caches: str

    async def connect(self, url: URL, database: str) -> Any:
        """Connect to a database without SQLAlchemy, with the methods of asyncpg's connection."""
        ...

    def refuses_database(self, error: BaseException) -> bool:
        """Whether a server has refused a connection so that another database may accept it."""
        ...

    def mend(self, dialect: Dialect) -> None:
        """Change what a dialect of SQLAlchemy does with options of a connection, if needed."""
        ...

    def terminate(self, raw: Any) -> None:
        """Close the socket at once, without waiting for the server. Never raises."""
        ...

    async def close(self, raw: Any) -> None:
        """Close the connection, and cancel what runs on it."""
        ...

    def close_pooled(
        self, adapter: Any, dialect_terminate: Callable[[DBAPIConnection], None]
    ) -> None:
        """Close the connection of SQLAlchemy's adapter, which its pool has given up."""
        ...

    def roll_back(
        self,
        connection: PoolProxiedConnection,
        dialect_rollback: Callable[[PoolProxiedConnection], None],
    ) -> None:
        """Roll back; without a suspension that a cancellation could hit if nothing is sent."""
        ...

    def is_closed(self, raw: Any) -> bool:
        """Whether it is closed, or the server has hung up; asyncpg learns that from its loop."""
        ...

    def is_in_transaction(self, raw: Any) -> bool:
        """Whether a transaction is open, as the server has said last."""
        ...

    def keeps_its_backend(self, raw: Any) -> bool:
        """Whether two statements outside a transaction reach the same backend of PostgreSQL."""
        ...

    def server_pid(self, raw: Any) -> int:
        """Return the process id that the driver got as it connected; 0 where it does not say."""
        ...

    def reported(self, raw: Any, name: str) -> str | None:
        """Return the last value of a parameter that the server reports unasked."""
        ...

    async def finds_row(self, raw: Any, statement: str) -> bool:
        """Whether a query has one row. It is not prepared, and its transaction ends with it."""
        ...

    def refuses_to_begin(self, raw: Any) -> bool:
        """Whether the driver takes a transaction for open whose BEGIN the server has refused."""
        ...

    def is_read_only(self, connection: PoolProxiedConnection) -> bool:
        """Whether an option of the connection has its transactions begin as READ ONLY."""
        ...

    def is_running(self, connection: PoolProxiedConnection) -> bool:
        """Whether a task executes a statement on the connection at this moment."""
        ...

    def is_committing(self, connection: PoolProxiedConnection) -> bool:
        """Whether a COMMIT that is observed was sent and has not ended."""
        ...

    def isolation_level(self, connection: PoolProxiedConnection) -> str | None:
        """Return the isolation level of the transactions, or AUTOCOMMIT; `None` by default."""
        ...

    def begun_transaction(self, connection: PoolProxiedConnection) -> Any | None:
        """Return what stands for the open transaction; `None` before the first statement."""
        ...

    def begin(self, connection: PoolProxiedConnection, statements: str) -> None:
        """Begin the transaction and execute statements as the first of it; where it has begun, only
        the latter. An error of theirs leaves the transaction open and aborted, as any error does.
        """
        ...

    def show(self, connection: PoolProxiedConnection, name: str) -> str:
        """Return a setting, inside of the transaction that has begun; it takes no snapshot."""
        ...

    def check_verifiable(self, connection: PoolProxiedConnection) -> None:
        """Raise `UnsupportedVersionError` where a COMMIT could not be verified."""
        ...

    def verify_next_commit(self, connection: PoolProxiedConnection) -> CommitAttempt | None:
        """Observe the COMMIT that `connection` is about to send; `None` where it sends none."""
        ...
