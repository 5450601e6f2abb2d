"""Checked by mypy and pyright, never run: what the functions of databases are typed as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_type

from pydantic import PostgresDsn
from sqlalchemy import MetaData, make_url
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase

from pgtoolset import Blocker, DatabaseInUseError, cleanup_tables, create_database, drop_database


class Base(DeclarativeBase):
    pass


class MySession(AsyncSession):
    pass


async def clean(session: MySession) -> None:
    assert_type(await cleanup_tables(session, Base), None)
    await cleanup_tables(session, MetaData(), timeout="500ms")
    await cleanup_tables(session=session, base=Base, timeout=None)


async def use(url: str) -> None:
    assert_type(await create_database("name", server_url=url), None)
    await create_database("name", server_url=make_url(url), template="template0", exist_ok=True)
    await create_database("name", server_url=PostgresDsn(url))
    assert_type(await drop_database("name", server_url=url, missing_ok=True, force=True), None)


def told(error: DatabaseInUseError) -> None:
    sessions: Sequence[Blocker] = error.sessions
    assert_type(error.database, str)
    assert sessions


async def wrong(url: str) -> None:
    await create_database("name", url)  # type: ignore[call-arg]
    await create_database("name")  # type: ignore[call-arg]
    await create_database(b"name", server_url=url)  # type: ignore[arg-type]
    await drop_database("name", server_url=None)  # type: ignore[arg-type]


async def wrong_cleaning(session: AsyncSession) -> None:
    await cleanup_tables(session, "base")  # type: ignore[arg-type]
    await cleanup_tables(session.sync_session, Base)  # type: ignore[arg-type]
    await cleanup_tables(session)  # type: ignore[call-arg]
