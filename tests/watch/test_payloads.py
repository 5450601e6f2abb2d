"""Payloads of NOTIFY: any role of the database can send one on the channel of a table."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import asyncpg
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncEngine

from pgtoolset import RowWatcher
from pgtoolset._postgres.notifications import LONGEST_PAYLOAD, channel_in, keys_in
from pgtoolset._postgres.untrusted import json_in
from pgtoolset.watch._registry import Groups
from pgtoolset.watch._subscriptions import Waiter
from pgtoolset.watch.targets import resolve_target
from tests.support import Item

HOSTILE = [
    "[[{}]]",
    "[[[1]]]",
    "[" * 7000,
    "[" * 3000 + "]" * 3000,
    '{"a":' * 1500,
    f"[[{'9' * 5000}]]",
    f"[[-{'9' * 5000}]]",
    "[[1e999]]",
    "[[NaN]]",
    "[[Infinity]]",
    "[[1, 2, 3]]",
    "[[]]",
    "[1]",
    "[null]",
    '["ab"]',
    '{"id": 1}',
    "null",
    "true",
    "[[true]]",
    "[[null]]",
    "[[1.0]]",
    '[["\\ud800"]]',
    "\x01",
    "not JSON",
]

payloads = st.one_of(
    st.text(),
    st.sampled_from(HOSTILE),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ).map(json.dumps),
)


@given(payloads)
@example(json.dumps([[1]] * 1500))
def test_keys_of_any_payload(payload: str) -> None:
    """A payload is keys of integers and strings, or else has every row polled."""
    keys = keys_in(payload)
    if keys is not None:
        assert all(type(part) in (int, str) for key in keys for part in key)
        assert [list(key) for key in keys] == json.loads(payload)


@given(payloads)
def test_a_payload_can_only_have_rows_polled(payload: str) -> None:
    """Whatever a payload says, the group polls its keys, or none; nothing is raised or kept."""

    async def announce() -> None:
        groups = Groups(_engine())
        target = resolve_target(Item, None)
        waiter = Waiter(target, 1, 1, None)
        groups.subscribe(waiter)
        (group,) = groups.all()
        group._due.clear()
        group.channels = ("items",)
        groups.mark_announced("items", payload)
        assert group._due <= {1}
        groups.mark_announced("another", payload)
        waiter.future.cancel()

    asyncio.run(announce())


def _engine() -> AsyncEngine:
    from sqlalchemy.ext.asyncio import create_async_engine

    return create_async_engine("postgresql+asyncpg://")


@pytest.mark.asyncpg(reason="RowWatcher")
@pytest.mark.parametrize("payload", HOSTILE, ids=range(len(HOSTILE)))
async def test_a_watcher_survives_hostile_payloads(
    engine: AsyncEngine, other: asyncpg.Connection, payload: str
) -> None:
    """After a hostile payload the watcher reports the next change, and the event loop no error."""
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    await other.execute("INSERT INTO item VALUES (1, 'old')")
    channel = channel_in(Item.__table__, "public")  # type: ignore[arg-type]
    async with RowWatcher(engine, interval=30, notify=True) as watcher:
        async with watcher.changes(Item, 1) as changes:
            await other.execute("SELECT pg_notify($1, $2)", channel, payload[:LONGEST_PAYLOAD])
            await other.execute("UPDATE item SET name = 'new'")
            await other.execute("SELECT pg_notify($1, '[[1]]')", channel)
            change = await anext(changes)
    assert change.after == {"id": 1, "name": "new"}
    assert problems == []


@given(st.text() | payloads, st.integers(0, 50))
def test_json_is_parsed_with_a_limit(text: str, longest: int) -> None:
    """A text that is too long or not JSON has no value, and never an error."""
    value = json_in(text, longest=longest)
    if len(text) > longest:
        assert value is None
    if value is not None:
        assert json.loads(text) == value
