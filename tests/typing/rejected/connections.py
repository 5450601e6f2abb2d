"""Calls that type checkers must refuse: each marked line, and no other. Never run."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from pgtoolset import driver_connection, release_connection


def refused(
    session: AsyncSession,
    sync: Session,
    connection: AsyncConnection,
    maker: async_sessionmaker[AsyncSession],
) -> None:
    release_connection(session)
    release_connection(sync)  # refused
    release_connection(connection)  # refused
    release_connection(maker)  # refused
    release_connection(session, True)  # refused
    release_connection(session, commit="yes")  # refused
    release_connection(session, commit=None)  # refused
    driver_connection(session)
    driver_connection(sync)  # refused
    driver_connection(connection)  # refused
    driver_connection(session, commit=True)  # refused
