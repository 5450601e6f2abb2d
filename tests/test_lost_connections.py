"""A connection that is lost: each place that judges an error by that comes to the same answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import asyncpg
import pytest
from sqlalchemy.exc import DBAPIError

from pgtoolset._outcomes import LOST, aborted_by
from pgtoolset._postgres.sqlstates import has_lost_connection
from pgtoolset._retries import Retries
from pgtoolset.watch import _polls

#: asyncpg has lost its place in the protocol; SQLAlchemy 2.0 passes this on as it is.
PLACE = asyncpg.InternalClientError("got result for unknown protocol state 3")


def wrapped(error: Exception, *, is_disconnect: bool) -> DBAPIError:
    return DBAPIError("SELECT 1", None, error, connection_invalidated=is_disconnect)


def says_lost(error: Exception) -> bool:
    return LOST in str(aborted_by(error))


JUDGES: list[Callable[[Any], bool]] = [
    *(has_lost_connection, says_lost, lambda error: Retries().allow(error), _polls.is_lost)
]
LOSSES = [
    *(PLACE, wrapped(PLACE, is_disconnect=False), wrapped(Exception(), is_disconnect=True)),
    wrapped(asyncpg.ConnectionDoesNotExistError("closed"), is_disconnect=True),
]
OTHERS = [
    *(ValueError(), asyncpg.InterfaceError("another operation is in progress")),
    *(asyncpg.UniqueViolationError("twice"), wrapped(Exception(), is_disconnect=False)),
]


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("error", LOSSES, ids=repr)
def test_lost(judge: Callable[[Any], bool], error: Exception) -> None:
    """A connection that the server or the driver has ended is lost, wrapped or not."""
    assert judge(error)


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_not_lost(judge: Callable[[Any], bool], error: Exception) -> None:
    """Another error leaves the connection where it is."""
    assert not judge(error)
