"""The pair of nodes that tests of a cluster use."""

from __future__ import annotations

import asyncpg
import pytest

from tests.nodes import Nodes, execute


async def at_the_address(nodes: Nodes, statement: str) -> object:
    connection = await asyncpg.connect(nodes.address(driver="postgresql"))
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


@pytest.mark.parametrize("times", [1, 2])
async def test_switch_over(nodes: Nodes, times: int) -> None:
    """The nodes change places without a loss, as often as one likes, and the address follows."""
    for number in range(times):
        await execute(nodes.primary, f"INSERT INTO item (id, name) VALUES ({number}, '')")
        old = nodes.primary
        await nodes.switch_over()
        assert nodes.standby is old
        assert await at_the_address(nodes, "SELECT count(*) FROM item") == number + 1
        assert await execute(nodes.standby, "SELECT count(*) FROM item") == number + 1
        assert await execute(nodes.standby, "SELECT pg_is_in_recovery()")
        assert not await at_the_address(nodes, "SELECT pg_is_in_recovery()")


@pytest.mark.parametrize("rejoins", [True, False])
async def test_fail_over(nodes: Nodes, rejoins: bool) -> None:
    """After a crash of the primary the standby serves the address; the next test finds a pair."""
    await execute(nodes.primary, "INSERT INTO item (id, name) VALUES (1, '')")
    await nodes.caught_up()
    await nodes.fail_over()
    assert await at_the_address(nodes, "SELECT count(*) FROM item") == 1
    if rejoins:
        await nodes.rejoin()
        assert await execute(nodes.standby, "SELECT count(*) FROM item") == 1


async def test_restored(nodes: Nodes) -> None:
    """A test finds empty tables and a standby that follows, whatever the last one left."""
    assert await execute(nodes.standby, "SELECT count(*) FROM item") == 0
    await execute(nodes.primary, "INSERT INTO item (id, name) VALUES (1, '')")
    await nodes.caught_up()
    assert await execute(nodes.standby, "SELECT count(*) FROM item") == 1
