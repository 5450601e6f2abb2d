"""Checked by mypy and pyright, never run: what the functions of worker databases are typed as."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import assert_type

from sqlalchemy import URL, MetaData, make_url
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase

from pgtoolset.testing import create_db_session, create_worker_database, worker_database_url


class Base(DeclarativeBase):
    pass


async def use_session(url: str) -> None:
    async with create_db_session(url, Base) as session:
        assert_type(session, AsyncSession)
    async with create_db_session(
        make_url(url),
        MetaData(),
        echo=True,
        drop_tables=False,
        cleanup=True,
        engine_kwargs={"pool_size": 1},
    ):
        pass


async def use(url: str, parsed: URL) -> None:
    assert_type(worker_database_url(url, "test_db"), str)
    assert_type(worker_database_url(parsed, "test_db", prefix="shop"), str)
    block: AbstractAsyncContextManager[str] = create_worker_database(url)
    async with block as worker_url:
        assert_type(worker_url, str)
    async with create_worker_database(
        make_url(url), "test_db", prefix="shop", server_url=url, template="t"
    ):
        pass


def wrong(url: str) -> None:
    create_db_session(url)  # type: ignore[call-arg]
    create_db_session(url, "base")  # type: ignore[arg-type]
    worker_database_url(url)  # type: ignore[call-arg]
    worker_database_url(url, "test_db", "shop")  # type: ignore[call-arg]
    create_worker_database(None)  # type: ignore[arg-type]
