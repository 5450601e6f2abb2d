"""Checked by mypy and pyright, never run: what the functions of databases are typed as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_type

from sqlalchemy import make_url

from pgtoolset import Blocker, DatabaseInUseError, create_database, drop_database


async def use(url: str) -> None:
    assert_type(await create_database("name", server_url=url), None)
    await create_database("name", server_url=make_url(url), template="template0", exist_ok=True)
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
