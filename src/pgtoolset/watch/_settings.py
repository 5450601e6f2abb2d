"""The settings of a session, for looks on a connection that is not the session's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from pgtoolset._arguments import Settings
from pgtoolset._listeners import checkout_of
from pgtoolset._postgres.settings import change_settings, put_settings_back

__all__ = ["with_settings"]


@contextmanager
def with_settings(connection: Connection, settings: Settings | None) -> Iterator[None]:
    """Have settings on a connection for the block, and leave nothing of them there.

    The block is a transaction of its own, unless the connection is in one already. Runs in
    SQLAlchemy's greenlet.
    """
    if settings is None:
        yield
    elif connection.in_transaction():
        before = change_settings(connection, settings.values)
        try:
            yield
        except BaseException:
            with suppress(SQLAlchemyError):  # where PostgreSQL has refused a statement
                put_settings_back(connection, before)
            raise
        put_settings_back(connection, before)
    else:
        with connection.begin():
            checkout_of(connection).take_settings(settings)
            yield
