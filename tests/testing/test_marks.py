"""Comments on databases: any role can write one on its own database."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pgtoolset._postgres.quoting import literal
from pgtoolset.errors import DatabaseExistsError
from pgtoolset.testing import create_worker_database
from pgtoolset.testing._owners import (
    Owner,
    draft_name,
    is_forgotten_draft,
    new_owner,
    owner_in,
)
from pgtoolset.testing.templates import _Mark
from tests.support import plain_url

GOOD = json.loads(new_owner().mark())

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
marks = st.one_of(
    st.none(),
    st.text(),
    values.map(json.dumps),
    st.dictionaries(st.sampled_from(sorted(GOOD)), values).map(
        lambda changed: json.dumps({**GOOD, **changed})
    ),
    st.sampled_from(sorted(set(GOOD) - {"kind", "machine", "token"})).flatmap(
        lambda name: st.integers(-(10**400), 10**400).map(
            lambda number: json.dumps({**GOOD, name: number})
        )
    ),
    st.integers(1, 100_000).map(lambda depth: "[" * depth),
)

HOSTILE = [
    json.dumps({**GOOD, "machine": "elsewhere", "created": 10**400}),
    json.dumps({**GOOD, "machine": "elsewhere", "created": -(10**400)}),
    json.dumps({**GOOD, "pid": 10**400}),
    json.dumps({**GOOD, "pid": 0}),
    json.dumps({**GOOD, "pid": -1}),
    json.dumps({**GOOD, "started": 10**4000}),
    json.dumps({**GOOD, "created": float("nan")}),
    json.dumps({**GOOD, "created": float("inf")}),
    json.dumps({**GOOD, "created": True}),
    json.dumps({**GOOD, "machine": ["x"]}),
    json.dumps({**GOOD, "machine": "x" * 100_000}),
    f'{{"kind": {"9" * 5000}}}',
    "[" * 50_000,
    '{"kind":' * 20_000,
    "null",
]


@given(marks)
@example(HOSTILE[0])
@example(HOSTILE[2])
def test_any_comment_is_a_mark_or_not(comment: str | None) -> None:
    """A comment is a mark of a possible process, about which all can be asked, or it is no mark."""
    owner = owner_in(comment)
    if owner is not None:
        assert isinstance(owner.is_forgotten(), bool)
        assert owner.is_alive() in (True, False, None)
        assert owner_in(owner.mark()) == owner


@pytest.mark.parametrize("comment", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_comment_is_no_mark(comment: str) -> None:
    """Numbers that no process has, other types and endless texts: the database is not ours."""
    assert owner_in(comment) is None


@given(st.builds(Owner, st.text(), *[st.integers(0, 16**20)] * 3, st.just("0123456789")))
def test_any_draft_name_is_forgotten_or_not(owner: Owner) -> None:
    """The name of a draft with any numbers raises nothing."""
    assert is_forgotten_draft(draft_name(owner)) in (True, False)


@given(st.none() | st.text() | values.map(json.dumps) | marks)
@example('pgtoolset template {"used": "10000-01-01", "has_rows": true}')
@example('pgtoolset template {"used": ["2026-01-01"], "has_rows": 1}')
@example("pgtoolset template " + "[" * 100_000)
def test_any_comment_of_a_template_has_a_mark(comment: str | None) -> None:
    """A comment that is no mark of ours means: used today, with rows."""
    mark = _Mark.read(comment)
    assert isinstance(mark.has_rows, bool)
    assert _Mark.read(str(mark)) == mark


@pytest.fixture
async def server(server_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(plain_url(server_url))
    yield connection
    await connection.execute("DROP DATABASE IF EXISTS pgts_hostile")
    await connection.close()


@pytest.mark.parametrize("comment", HOSTILE, ids=range(len(HOSTILE)))
async def test_a_hostile_comment_stops_no_run(
    server: asyncpg.Connection, server_url: str, comment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a database with a hostile comment a worker's is made, and the other one stays."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    await server.execute("CREATE DATABASE pgts_hostile TEMPLATE template0")
    await server.execute(f"COMMENT ON DATABASE pgts_hostile IS {literal(comment)}")
    async with create_worker_database(server_url, "main", prefix="pgts_other"):
        pass
    with pytest.raises(DatabaseExistsError):
        async with create_worker_database(server_url, "pgts_hostile"):
            pass
    found: Any = await server.fetchval("SELECT 1 FROM pg_database WHERE datname = 'pgts_hostile'")
    assert found == 1
