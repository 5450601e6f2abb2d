"""A standby refuses LISTEN: the watcher tries again, so that a promotion turns notifications on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from pgtoolset import RowWatcher, row_change_trigger
from pgtoolset.testing import EmbeddedServer
from pgtoolset.watch import _hub
from tests.support import Base, Item, until

pytestmark = pytest.mark.asyncpg(reason="RowWatcher")


@pytest.fixture
async def standby() -> AsyncIterator[EmbeddedServer]:
    """A server in recovery, which has the items and their triggers."""
    server = EmbeddedServer()
    await asyncio.to_thread(server.start)
    try:
        engine = create_async_engine(server.url())
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
            for ddl in row_change_trigger(Item):
                await connection.execute(ddl)
            await connection.run_sync(lambda sync: sync.execute(Item.__table__.insert(), {"id": 1}))  # type: ignore[attr-defined]
        await engine.dispose()
        await asyncio.to_thread(server.shut_down)
        await asyncio.to_thread((server._directory / "data" / "standby.signal").touch)
        # `resume` waits for a primary.
        await asyncio.to_thread(server._command, "start")
        await until(lambda: answers(server))
        yield server
    finally:
        await asyncio.to_thread(server.stop)


async def answers(server: EmbeddedServer) -> bool:
    try:
        connection = await asyncpg.connect(server.url(driver="postgresql"))
    except (OSError, asyncpg.PostgresError):
        return False
    try:
        return bool(await connection.fetchval("SELECT pg_is_in_recovery()"))
    finally:
        await connection.close()


@pytest.mark.parametrize("reconnects", [False, True])
async def test_promotion(
    standby: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, reconnects: bool
) -> None:
    """After the promotion of a standby notifications arrive, over the connection that was there and
    over a new one."""
    monkeypatch.setattr(_hub, "LISTEN_RETRY", 3600 if reconnects else 0.05)
    heard: list[str] = []
    hear = _hub.Hub._heard

    def noted(hub: Any, channel: str, payload: str) -> None:
        heard.append(payload)
        hear(hub, channel, payload)

    monkeypatch.setattr(_hub.Hub, "_heard", noted)
    engine = create_async_engine(standby.url())
    try:
        async with (
            RowWatcher(engine, interval=0.05, notify=True) as watcher,
            watcher.changes(Item, 1) as changes,
        ):
            assert changes.current == {"id": 1, "name": ""}
            other = await asyncpg.connect(standby.url(driver="postgresql"))
            try:
                await other.execute("SELECT pg_promote()")
                if reconnects:
                    await other.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                        "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
                    )

                async def is_heard() -> bool:
                    await other.execute("UPDATE item SET name = name || '!'")
                    return bool(heard)

                await until(is_heard)
                assert "!" in str((await anext(changes)).after)
            finally:
                await other.close()
    finally:
        await engine.dispose()
    assert set(heard) == {"[[1]]"}
