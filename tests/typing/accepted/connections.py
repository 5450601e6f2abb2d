"""The connection of a session, given back or used past SQLAlchemy. Never run."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any, assert_type

import asyncpg
import psycopg
from sqlalchemy.ext.asyncio import AsyncSession

from pgtoolset import driver_connection, release_connection


class MySession(AsyncSession):
    """A session of the application."""


async def given_back(session: AsyncSession, mine: MySession) -> None:
    assert_type(release_connection(session), AbstractAsyncContextManager[None])
    async with release_connection(mine, commit=True):
        pass
    async with release_connection(session=session):
        pass


async def copy_with_asyncpg(session: AsyncSession, records: list[tuple[int, str]]) -> None:
    async with driver_connection(session) as connection:
        assert isinstance(connection, asyncpg.Connection)
        await connection.copy_records_to_table("item", records=records)


async def copy_with_psycopg(session: AsyncSession) -> None:
    async with driver_connection(session) as connection:
        assert isinstance(connection, psycopg.AsyncConnection)
        assert_type(connection, psycopg.AsyncConnection[Any])
        async with connection.cursor() as cursor, cursor.copy("COPY item FROM STDIN") as copy:
            await copy.write_row((1, "one"))
