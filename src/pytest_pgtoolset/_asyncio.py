"""Fixtures for the tests of pytest-asyncio: one for each scope of its loops.

The loop of a fixture is fixed when it is defined, and a session must be opened in the loop of its
test, so the plugin requests the fixture of the test's scope by name.
https://pytest-asyncio.readthedocs.io/en/stable/concepts.html
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import pytest
import pytest_asyncio

from pytest_pgtoolset import has_passed

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import async_sessionmaker

    from pytest_pgtoolset._joined import Connections, JoinedSessions

_Scope: TypeAlias = Literal["function", "class", "module", "package", "session"]


def _connection_fixture(scope: _Scope) -> Any:
    @pytest_asyncio.fixture(scope=scope, loop_scope=scope, name=f"_pg_connection_{scope}")
    async def connection(_pg_connections: Connections) -> AsyncIterator[None]:
        yield
        await _pg_connections.close()

    return connection


def _joined_fixture(scope: _Scope) -> Any:
    @pytest_asyncio.fixture(loop_scope=scope, name=f"_pg_joined_{scope}")
    async def joined(
        request: pytest.FixtureRequest,
        _pg_connections: Connections,
        pg_session_options: dict[str, Any],
    ) -> AsyncIterator[JoinedSessions]:
        options = pg_session_options
        async with _pg_connections.sessions(options, lambda: has_passed(request)) as joined:
            yield joined

    return joined


def _committing_fixture(scope: _Scope) -> Any:
    @pytest_asyncio.fixture(loop_scope=scope, name=f"_pg_committing_{scope}")
    async def committing(pg_session_maker: async_sessionmaker[Any]) -> AsyncIterator[Any]:
        async with pg_session_maker() as session:
            yield session

    return committing


_scopes: tuple[_Scope, ...] = ("function", "class", "module", "package", "session")
for _scope in _scopes:
    globals()[f"_connection_{_scope}"] = _connection_fixture(_scope)
    globals()[f"_joined_{_scope}"] = _joined_fixture(_scope)
    globals()[f"_committing_{_scope}"] = _committing_fixture(_scope)
