"""A server that does not answer: a block must not wait for ever for its ROLLBACK."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from pgtoolset import _lifecycle, create_db_context
from pgtoolset.testing import EmbeddedServer
from tests.support import DRIVERNAME


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as server:
        yield server


async def test_rollback_that_hangs(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """released: a connection whose ROLLBACK gets no answer in time is discarded."""
    monkeypatch.setattr(_lifecycle, "ROLLBACK_TIMEOUT", 0.3)
    engine = create_async_engine(server.url(driver=DRIVERNAME), pool_size=1, max_overflow=0)
    pool: Any = engine.pool
    db_context = create_db_context(async_sessionmaker(engine))
    frozen = 0
    start = time.monotonic()
    try:
        with pytest.raises(KeyError):
            async with db_context() as session:
                frozen = await session.scalar(text("SELECT pg_backend_pid()")) or 0
                os.kill(frozen, signal.SIGSTOP)
                start = time.monotonic()
                raise KeyError
        assert time.monotonic() - start < 5
        assert pool.checkedout() == 0
        async with db_context() as session:
            assert await session.scalar(text("SELECT pg_backend_pid()")) != frozen
        assert "rollback failed" in caplog.text
        await asyncio.sleep(0)
    finally:
        if frozen:
            os.kill(frozen, signal.SIGCONT)
        await engine.dispose()
