"""Checked by mypy and pyright, never run: what `create_test_client` is typed as."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, assert_type

import httpx
from fastapi import FastAPI
from litestar import Litestar
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from starlette.applications import Starlette

from pgtoolset import create_db_dependency
from pgtoolset.testing import create_test_client

get_db = create_db_dependency(session_maker=async_sessionmaker())


async def plain(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None: ...


async def use(
    app: FastAPI, starlette: Starlette, litestar: Litestar, session: AsyncSession
) -> None:
    async with create_test_client(app) as client:
        assert_type(client, httpx.AsyncClient)
    block: AbstractAsyncContextManager[httpx.AsyncClient] = create_test_client(
        app,
        dependency_overrides={get_db: lambda: session},
        base_url="https://shop.example",
        lifespan=False,
    )
    async with block:
        pass
    for each in (create_test_client(starlette), create_test_client(litestar)):
        async with each:
            pass
    async with create_test_client(plain):
        pass
