"""`advisory_lock`: keys, bad arguments, and one statement for each kind of call."""

from __future__ import annotations

import hashlib
from typing import Any

import asyncpg
import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from pgtoolset import LockTimeoutError, advisory_lock
from pgtoolset._arguments import advisory_numbers
from tests.locks.locking import holding, nothing_left

Maker = async_sessionmaker[AsyncSession]


@pytest.mark.parametrize(
    ("key", "classid", "objid", "objsubid"),
    [
        (42, 0, 42, 1),
        (-1, 2**32 - 1, 2**32 - 1, 1),
        (2**63 - 1, 2**31 - 1, 2**32 - 1, 1),
        ((7, -8), 7, 2**32 - 8, 2),
        ("nightly report", 0xCD1FAB31, 0xFFFFFFFF, 1),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
async def test_keys(
    session_maker: Maker,
    other: asyncpg.Connection,
    key: Any,
    classid: int,
    objid: int,
    objsubid: int,
    nested: bool,
) -> None:
    """The lock in pg_locks is a bigint, two int4, or the first 64 bits of a string's SHA-256."""
    if isinstance(key, str):
        digest = hashlib.sha256(key.encode()).digest()
        classid, objid = int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")
    async with session_maker() as session:
        if nested:
            await session.begin()
        async with advisory_lock(session, key):
            rows = await other.fetch(
                "SELECT classid, objid, objsubid FROM pg_locks WHERE locktype = 'advisory'"
            )
            assert [tuple(row) for row in rows] == [(classid, objid, objsubid)]
    await nothing_left(other)


def test_string_keys_are_stable() -> None:
    """A string is the same lock for ever: in another process, another version, another Python."""
    empty = int.from_bytes(bytes.fromhex("e3b0c44298fc1c14"), "big", signed=True)
    assert advisory_numbers("key", "") == (empty,)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"key": None}, TypeError),
        ({"key": True}, TypeError),
        ({"key": 1.5}, TypeError),
        ({"key": b"x"}, TypeError),
        ({"key": (1, 2, 3)}, TypeError),
        ({"key": (1, "2")}, TypeError),
        ({"key": 2**63}, ValueError),
        ({"key": (2**31, 0)}, ValueError),
        ({"timeout": 0}, ValueError),
        ({"shared": "yes"}, TypeError),
        ({"nowait": None}, TypeError),
        ({"session": None}, TypeError),
    ],
)
async def test_bad_arguments(
    session_maker: Maker, arguments: dict[str, Any], error: type[Exception]
) -> None:
    """A bad argument is refused by the call itself, by its name: no SQL, no transaction."""
    async with session_maker() as session:
        with pytest.raises(error, match=f"^{next(iter(arguments))}"):
            advisory_lock(**({"session": session, "key": 1} | arguments))
        assert not session.in_transaction()


async def test_an_error_does_not_show_a_url(
    session_maker: Maker, other: asyncpg.Connection
) -> None:
    """A URL that is used as a key stays out of the error."""
    url = "postgresql://till:secret@host/shop"
    take = f"SELECT pg_advisory_xact_lock({advisory_numbers('key', url)[0]})"
    async with holding(other, take), session_maker() as session:
        with pytest.raises(LockTimeoutError, match="advisory lock a URL") as caught:
            async with advisory_lock(session, url, timeout="50ms"):
                pass
    assert "secret" not in str(caught.value)


async def test_the_statement_is_made_once(
    engine: AsyncEngine, session_maker: Maker, other: asyncpg.Connection
) -> None:
    """Calls of one kind execute one statement, whatever their keys; each other kind has its own."""
    kinds: list[dict[str, Any]] = [{}, {"shared": True}, {"nowait": True}, {"timeout": "5s"}]
    executed: list[Any] = []

    def note(_: object, statement: Any, *rest: object) -> None:
        if "advisory" in str(statement):
            executed.append(statement)

    event.listen(engine.sync_engine, "before_execute", note)
    try:
        for first, second in ((1, -2), ("one", "two"), ((3, 4), (-5, 6))):
            for kind in kinds:
                for key in (first, second):
                    async with session_maker() as session, advisory_lock(session, key, **kind):
                        (held,) = await held_keys(other)
                        assert held == advisory_numbers("key", key)
    finally:
        event.remove(engine.sync_engine, "before_execute", note)
    assert len(executed) == 24
    # A string is a key of one number.
    assert len({id(each) for each in executed}) == 2 * len(kinds)
    assert all(executed[at] is executed[at + 1] for at in range(0, 24, 2))


async def held_keys(other: asyncpg.Connection) -> list[tuple[int, ...]]:
    """The keys of the advisory locks that are held now, as the function takes them."""
    rows = await other.fetch(
        "SELECT classid::bigint, objid::bigint, objsubid FROM pg_locks WHERE locktype = 'advisory'"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    return [
        (signed(high << 32 | low, 64),) if kind == 1 else (signed(high, 32), signed(low, 32))
        for high, low, kind in rows
    ]


def signed(number: int, bits: int) -> int:
    return number - (1 << bits) if number >> (bits - 1) else number
