"""Statements in another event loop than that of their connection, refused with what to do.

asyncpg refuses them too, in words that name no fixture: "attached to a different loop".
"""

from __future__ import annotations

import asyncio
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from pgtoolset.errors import TransactionStateError

_LOOP = "pgtoolset.testing.loop"
_NAME = "pgtoolset.testing.fixture"


def refuse_other_loops(engine: AsyncEngine) -> None:
    """Let each statement on a connection of the engine check that it runs in the right loop."""
    event.listen(engine.sync_engine, "connect", _remember)
    event.listen(engine.sync_engine, "before_cursor_execute", _check)


def name_connection(connection: AsyncConnection, fixtures: str) -> None:
    """Say which fixtures use a connection, for the message."""
    assert connection.sync_connection is not None
    connection.sync_connection.info[_NAME] = fixtures


def _remember(dbapi_connection: Any, record: Any) -> None:
    record.info[_LOOP] = asyncio.get_running_loop()


def _check(connection: Connection, *statement: object) -> None:
    info = connection.info
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return  # SQLAlchemy raises MissingGreenlet
    if info[_LOOP] is loop:
        return
    fixtures = info.get(_NAME)
    if fixtures is not None:
        what = f"{fixtures} use a connection of the event loop of the test"
        instead = (
            "Or mark the test with pytest.mark.pg_commit: each session of pg_session_maker then "
            "opens a connection of its own, in the loop that uses it"
        )
    else:
        what = "a connection of pg_engine is used that was opened in one event loop"
        instead = (
            "Or open the session in the loop that uses it: give the application pg_session_maker "
            "or pg_engine in place of pg_session"
        )
    raise TransactionStateError(
        f"{what}, and this statement runs in another event loop. TestClient of Starlette and "
        "FastAPI runs the application in a loop of its own. In an async test, use "
        "pgtoolset.testing.create_test_client(app), an httpx.AsyncClient, in its place: its "
        "requests run in the loop of the test. In a sync test, use the fixture pg_client. "
        f"{instead}"
    )
