from collections.abc import AsyncIterator
from typing import Any

import httpx
import inventory
import pytest

from pgtoolset import create_db_dependency


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def client(pg_session_maker: Any) -> AsyncIterator[httpx.AsyncClient]:
    inventory.app.dependency_overrides[inventory.get_db] = create_db_dependency(
        session_maker=pg_session_maker
    )
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(inventory.app), base_url="http://test"
    ) as client:
        yield client
    inventory.app.dependency_overrides.clear()
