"""A server of its own, on which every name of pg_catalog has another meaning."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import asyncpg
import pytest

from pgtoolset._postgres import lookout
from pgtoolset.testing import EmbeddedServer
from tests.safety.planting import AFTER_CATALOG, BEFORE_CATALOG, plant, spared_drivers
from tests.support import DRIVERNAME, plain_url


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error waits for the names of its blockers, however slow the machine is."""
    monkeypatch.setattr(lookout, "_GRACE", 20.0)
    monkeypatch.setattr(lookout, "_SHORT_GRACE", 20.0)


@pytest.fixture(scope="session")
def planted_server(pytestconfig: pytest.Config) -> Iterator[str]:
    """The URL of a server whose databases, new ones too, have the schema `evil`."""
    version = 16 if pytestconfig.option.pg_version == "16" else 18
    with EmbeddedServer(version=version, settings={"jit": "off"}) as server:  # type: ignore[arg-type]
        asyncio.run(_plant_all(plain_url(server.url(driver=DRIVERNAME))))
        yield server.url(driver=DRIVERNAME)


async def _plant_all(url: str) -> None:
    # A new database is a copy of template1.
    planted = [await plant(url, name) for name in ("template1", "postgres")]
    for kinds in planted:
        assert kinds["functions"] > 2500 and kinds["operators"] > 700, kinds
        assert kinds["relations"] > 120 and kinds["types"] > 80, kinds


@pytest.fixture(params=[BEFORE_CATALOG, AFTER_CATALOG])
async def planted_url(planted_server: str, request: pytest.FixtureRequest) -> str:
    """The URL of its database `postgres`, whose search_path begins with the schema `evil`."""
    connection = await asyncpg.connect(plain_url(planted_server))
    try:
        await connection.execute(f"ALTER ROLE CURRENT_USER SET search_path = {request.param}")
    finally:
        await connection.close()
    return planted_server


@pytest.fixture(autouse=True)
def drivers_are_spared() -> Iterator[None]:
    """What asyncpg and SQLAlchemy send of their own accord is not the library's."""
    with spared_drivers():
        yield
